"""What lies where in a phantom: pieces of tissue on glass, layers of background tissue, a few foci of other kinds.

A seed decides everything. Frames: level-0 px of the slide, and "world" px of 0.5 um, in which tissue is defined (the
same at mpp = 0.5).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from sparsewsi.phantom import shader
from sparsewsi.phantom.kinds import BACKGROUNDS, KIND_IDS, LAYERS, NEEDLES

VERSION = 1  # of the generator: a seed's plan and pixels are the same in every release that states the same version
NATIVE_MPP = 0.5
PATCH = 224  # world px; needles are sized in patches of this side
MIN_SIZE, MAX_SIZE = 1_024, 40_000


@dataclass(frozen=True, eq=False)
class Stain:
    """How a slide was cut, stained and scanned.

    vectors: (3, 3) optical density per unit of haematoxylin, eosin and red cells (rows) in R, G, B (columns)
    white:   (3,) pixel value of bare glass
    grain:   standard deviation of the sensor noise, grey values
    blur:    the three weights (centre, 1 px, 2 px) of the optics' blur
    angle:   direction of the fibres, radians
    salt:    seed of the texture
    """

    vectors: np.ndarray
    white: np.ndarray
    grain: float
    blur: tuple[float, float, float]
    angle: float
    salt: int


@dataclass(frozen=True)
class Needle:
    """One focus: its kind and its bounding box in level-0 px."""

    kind: str
    x: int
    y: int
    w: int
    h: int


@dataclass(frozen=True, eq=False)
class PhantomMap:
    """What lies where in a phantom.

    labels:  (rows, columns) uint8 kind ids, one cell per 32 x 32 world px; drawn borders wobble by less than a cell
    pure:    the same where the cell and its eight neighbours agree, else shader.MIXED
    size:    side of the slide, level-0 px
    mpp:     um per level-0 px
    origin:  world px of the corner of labels[0, 0]
    """

    seed: int
    size: int
    mpp: float
    labels: np.ndarray
    pure: np.ndarray
    stain: Stain
    dominant: str
    others: tuple[str, ...]
    needles: tuple[Needle, ...]
    origin: tuple[int, int] = (0, 0)

    @property
    def scale(self) -> float:
        """World px per level-0 px."""
        return self.mpp / NATIVE_MPP

    @property
    def present(self) -> tuple[str, ...]:
        """Needle kinds in the slide, sorted."""
        return tuple(sorted({needle.kind for needle in self.needles}))


def stain_of(seed: int) -> Stain:
    """Stain, light and optics of a slide; ranges follow what laboratories and scanners show."""
    rng = np.random.default_rng((seed, 1))
    haematoxylin = np.array([0.64, 0.70, 0.32]) + rng.normal(0, 1, 3) * [0.045, 0.03, 0.05]
    eosin = np.array([0.13, 0.83, 0.36]) + rng.normal(0, 1, 3) * [0.05, 0.05, 0.08]
    red = np.array([0.17, 0.80, 0.62]) + rng.normal(0, 1, 3) * [0.05, 0.04, 0.08]
    strength = rng.uniform(0.95, 1.55), rng.uniform(0.75, 1.35), rng.uniform(0.85, 1.2)
    vectors = np.stack([v / np.linalg.norm(v) * s for v, s in zip((haematoxylin, eosin, red), strength)])
    tint = rng.normal(0, 1.2, 3)
    sigma = rng.uniform(0.40, 0.75)
    weights = np.exp(-0.5 * (np.arange(3) / sigma) ** 2)
    weights[2] -= rng.uniform(0.02, 0.07)  # scanners sharpen
    weights /= weights[0] + 2 * weights[1] + 2 * weights[2]
    return Stain(
        vectors=np.clip(vectors, 0.01, None),
        white=np.clip(rng.uniform(234, 247) + tint, 0, 252),
        grain=float(rng.uniform(0.8, 2.2)),
        blur=(float(weights[0]), float(weights[1]), float(weights[2])),
        angle=float(rng.uniform(0, np.pi)),
        salt=int(rng.integers(1, 2**20)),
    )


def _field(shape: tuple[int, int], rng: np.random.Generator, coarse: int, octaves: int) -> np.ndarray:
    """Smooth noise in about [-1, 1] over a grid: `coarse` waves across it, then finer octaves of half the height."""
    out = np.zeros(shape, np.float32)
    for octave in range(octaves):
        n = coarse * 2**octave + 3
        small = rng.uniform(-1, 1, (n, n)).astype(np.float32)
        y = np.linspace(1, n - 2, shape[0], dtype=np.float32)
        x = np.linspace(1, n - 2, shape[1], dtype=np.float32)
        out += 0.5**octave * ndimage.map_coordinates(small, np.meshgrid(y, x, indexing="ij"), order=3, mode="nearest")
    return out


def _tissue(cells: int, rng: np.random.Generator) -> np.ndarray:
    """One to three smooth pieces on glass: bool (cells, cells)."""
    v, u = np.meshgrid(*(np.linspace(-1, 1, cells, dtype=np.float32),) * 2, indexing="ij")
    count = int(rng.integers(1, 4))
    turn = rng.uniform(0, np.pi)
    best = np.full((cells, cells), -9.0, np.float32)
    for piece in range(count):
        shift = 0.0 if count == 1 else 1.25 * (piece / (count - 1) - 0.5)
        cy, cx = shift * np.sin(turn) + rng.normal(0, 0.05), shift * np.cos(turn) + rng.normal(0, 0.05)
        long, short = rng.uniform(0.58, 0.76), rng.uniform(0.42, 0.60) / (1 + 0.45 * (count - 1))
        lean = turn + np.pi / 2 + rng.normal(0, 0.15) if count > 1 else rng.uniform(0, np.pi)
        du, dv = u - cx, v - cy
        a, b = du * np.cos(lean) + dv * np.sin(lean), dv * np.cos(lean) - du * np.sin(lean)
        b = b + rng.normal(0, 0.45) * (a * a - 0.15)  # pieces bend
        shape = 1 - np.sqrt((a / long) ** 2 + (b / short) ** 2)
        best = np.maximum(best, shape + 0.22 * _field((cells, cells), rng, 4, 2))
    fine = max(0, int(np.log2(cells / 16)) - 2)
    best += 0.10 * _field((cells, cells), rng, 16, 1 + fine)
    rim = (u**8 + v**8) ** (1 / 8) + 0.04 * _field((cells, cells), rng, 5, 3)
    best -= 12 * np.clip(rim - 0.74, 0, None) ** 2 + 9 * np.clip(rim - 0.90, 0, None)  # glass all round
    mask = best > 0
    parts = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, output=parts)
    areas = np.bincount(parts.ravel())
    areas[0] = 0
    return (areas > 0.04 * areas.sum())[parts]  # no crumbs


def _depth(mask: np.ndarray) -> np.ndarray:
    """Distance of each cell to the outside of a mask, in cells; the grid's border is outside."""
    return np.asarray(ndimage.distance_transform_edt(np.pad(mask, 1)))[1:-1, 1:-1]


def _focus(free: np.ndarray, inner: np.ndarray, cells: int, rng: np.random.Generator) -> np.ndarray:
    """A compact blob of `cells` cells within `free`, centred where `inner`: bool, same shape."""
    rows, columns = np.nonzero(inner)
    pick = int(rng.integers(len(rows)))
    reach = int(3 * np.sqrt(cells / np.pi)) + 3
    row, column = int(rows[pick]), int(columns[pick])
    window = np.s_[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]
    dy = np.arange(free.shape[0], dtype=np.float32)[window[0], None] - row
    dx = np.arange(free.shape[1], dtype=np.float32)[None, window[1]] - column
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.5)
    a, b = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    ragged = 1 + 0.35 * _field((2 * reach + 1, 2 * reach + 1), rng, 6, 2)[: a.shape[0], : a.shape[1]]
    distance = np.hypot(a / np.sqrt(stretch), b * np.sqrt(stretch)) * np.clip(ragged, 0.3, None)
    distance = np.where(free[window], distance, np.inf)
    part = np.zeros(a.shape, bool)
    part.flat[np.argsort(distance, axis=None, kind="stable")[: min(cells, int(free[window].sum()))]] = True
    focus = np.zeros(free.shape, bool)
    focus[window] = part
    return focus


def contents(seed: int) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Dominant background, other backgrounds and needle kinds of a seed.

    Each aligned run of four seeds has each background as the dominant once; needle kinds (one to three of five) are
    drawn independently of it, so that none can be guessed from the other.
    """
    order = np.random.default_rng((seed // 4, 2)).permutation(len(BACKGROUNDS))
    dominant = BACKGROUNDS[order[seed % 4]]
    rng = np.random.default_rng((seed, 3))
    rest = [kind for kind in BACKGROUNDS if kind != dominant]
    others = rng.permutation(rest)[: rng.integers(1, 3)]
    needles = rng.permutation(NEEDLES)[: rng.integers(1, 4)]
    return dominant, tuple(str(kind) for kind in others), tuple(str(kind) for kind in needles)


def mark_pure(labels: np.ndarray) -> np.ndarray:
    """Labels where a cell and its eight neighbours agree (outside is glass), else shader.MIXED."""
    padded = np.pad(labels, 1)
    low = ndimage.minimum_filter(padded, 3)[1:-1, 1:-1]
    high = ndimage.maximum_filter(padded, 3)[1:-1, 1:-1]
    return np.where(low == high, labels, shader.MIXED).astype(np.uint8)


def phantom_map(seed: int, size: int, mpp: float = NATIVE_MPP) -> PhantomMap:
    """Decide what lies where in the phantom of a seed.

    size: side of the square slide, level-0 px, 1,024 to 40,000
    mpp:  um per level-0 px, 0.2 to 1; tissue keeps its physical size

    The dominant kind covers more than half of the tissue. Each needle kind covers 4 to 12 patches of 224 world px,
    in one focus; slides of more than 4,000 tissue patches get proportionally more foci, and small ones less area
    (at most 6 % of the tissue, at least 1.5 patches).
    Raises ValueError for a size or mpp out of range.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"A phantom is {MIN_SIZE} to {MAX_SIZE} px wide, got {size}. Choose a size in this range.")
    if not 0.2 <= mpp <= 1.0:
        raise ValueError(f"A phantom has 0.2 to 1 um per px, got {mpp}. The native resolution is {NATIVE_MPP}.")
    rng = np.random.default_rng((seed, 4))
    cells = int(np.ceil(size * mpp / NATIVE_MPP / shader.CELL))
    dominant, others, kinds = contents(seed)
    mask = _tissue(cells, rng)
    labels = _layers(mask, dominant, others, rng)
    needles = tuple(_plant(labels, mask, kinds, size, mpp, rng))
    return PhantomMap(seed, size, mpp, labels, mark_pure(labels), stain_of(seed), dominant, others, needles)


def _layers(mask: np.ndarray, dominant: str, others: tuple[str, ...], rng: np.random.Generator) -> np.ndarray:
    """Kind ids of the background tissues, uint8: layers along a wavy direction, as in the wall of a hollow organ."""
    v, u = np.meshgrid(*(np.linspace(-1, 1, len(mask), dtype=np.float32),) * 2, indexing="ij")
    turn = rng.uniform(0, 2 * np.pi)
    height = u * np.cos(turn) + v * np.sin(turn) + 0.38 * _field(mask.shape, rng, 3, 3)
    height += 0.05 * _field(mask.shape, rng, max(6, len(mask) // 12), 2)
    shares = rng.uniform(0.14, 0.40 / len(others), len(others))
    share = {dominant: 1 - float(shares.sum()), **dict(zip(others, shares.tolist()))}
    layers = [kind for kind in LAYERS if kind in share]
    cuts = np.quantile(height[mask], np.cumsum([share[kind] for kind in layers])[:-1])
    ids = np.array([KIND_IDS[kind] for kind in layers], np.uint8)
    return np.where(mask, ids[np.searchsorted(cuts, height)], shader.GLASS).astype(np.uint8)


def _plant(
    labels: np.ndarray, mask: np.ndarray, kinds: tuple[str, ...], size: int, mpp: float, rng: np.random.Generator
) -> Iterator[Needle]:
    """Write foci of the needle kinds into `labels`, apart from each other, and say where they are."""
    per_patch = (PATCH // shader.CELL) ** 2
    patches_of_tissue = mask.sum() / per_patch
    depth = _depth(mask)
    free = mask.copy()
    for kind in kinds:
        for _ in range(max(1, round(patches_of_tissue / 4_000))):
            share_of_patches = min(rng.uniform(4, 12), max(1.5, 0.06 * patches_of_tissue))
            radius = np.sqrt(share_of_patches * per_patch / np.pi)
            room = np.minimum(depth, _depth(free))
            inner = room >= min(1.3 * radius, 0.8 * room.max())
            focus = _focus(free, inner, round(share_of_patches * per_patch), rng)
            labels[focus] = KIND_IDS[kind]
            free &= np.logical_not(ndimage.binary_dilation(focus, iterations=3))
            rows, columns = np.nonzero(focus.any(1))[0], np.nonzero(focus.any(0))[0]
            scale = mpp / NATIVE_MPP
            box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) * shader.CELL / scale
            x0, y0, x1, y1 = (int(edge) for edge in np.clip(np.round(box), 0, size))
            yield Needle(kind, x0, y0, x1 - x0, y1 - y0)
