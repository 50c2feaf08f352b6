"""Phantom slides: computer-generated H&E-like slides whose content is known, as imaging phantoms are.

A seed decides everything: pieces of tissue on glass, a dominant background tissue with one or two others, and a few
compact foci ("needles") of other kinds; a Beer-Lambert stain model with per-slide stain, light, blur and grain makes
the colours. `phantom_map` decides what lies where, `render` paints any rectangle of it, `write_phantom` writes a
pyramidal TIFF with its ground truth, `patches` gives labelled patches without a slide. How tissue looks is in
phantom_shader.

No phantom is a patient's tissue, and nothing learnt from phantoms says anything about patients.

Frames: level-0 px of the slide, and "world" px of 0.5 um, in which tissue is defined (the same at mpp = 0.5).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from sparsewsi.phantom import shader

BACKGROUNDS = ("stroma_fibrous", "smooth_muscle", "adipose", "normal_mucosa_colon")
NEEDLES = ("carcinoma", "lymphoid", "mucin", "necrosis", "blood")
KINDS = (*BACKGROUNDS, *NEEDLES, "background")
WORDS = {  # what a question or an answer calls them; the demonstration model was trained on these words
    "stroma_fibrous": "fibrous stroma",
    "smooth_muscle": "smooth muscle",
    "adipose": "fat",
    "normal_mucosa_colon": "colon mucosa",
    "carcinoma": "carcinoma",
    "lymphoid": "lymphoid tissue",
    "mucin": "mucin",
    "necrosis": "necrosis",
    "blood": "blood",
}
KIND_IDS = {
    "background": shader.GLASS,
    "stroma_fibrous": shader.STROMA,
    "smooth_muscle": shader.MUSCLE,
    "adipose": shader.ADIPOSE,
    "normal_mucosa_colon": shader.MUCOSA,
    "carcinoma": shader.CARCINOMA,
    "lymphoid": shader.LYMPHOID,
    "mucin": shader.MUCIN,
    "necrosis": shader.NECROSIS,
    "blood": shader.BLOOD,
}
KIND_NAMES = tuple(sorted(KIND_IDS, key=KIND_IDS.__getitem__))
LAYERS = ("normal_mucosa_colon", "stroma_fibrous", "smooth_muscle", "adipose")  # the order of a bowel wall

VERSION = 1
NATIVE_MPP = 0.5
PATCH = 224  # world px; needles are sized in patches of this side
NEEDLE_SHARE = 0.3  # a patch is called by its needle when at least this share of it is that needle
EXAMPLE_SEED, EXAMPLE_SIZE = 133, 12_000
MIN_SIZE, MAX_SIZE = 1_024, 40_000
TILE = 256  # TIFF tile side, px
BLOCK = 512  # side of the blocks a rectangle is painted in, px
DOWNSAMPLE = 4  # between pyramid levels


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


# ---------------------------------------------------------------------------------------------------- the map


def _stain(seed: int) -> Stain:
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


def _contents(seed: int) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
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


def _pure(labels: np.ndarray) -> np.ndarray:
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
    scale = mpp / NATIVE_MPP
    cells = int(np.ceil(size * scale / shader.CELL))
    dominant, others, kinds = _contents(seed)
    mask = _tissue(cells, rng)

    # Background tissues lie in layers, as in the wall of a hollow organ, along a wavy direction.
    v, u = np.meshgrid(*(np.linspace(-1, 1, cells, dtype=np.float32),) * 2, indexing="ij")
    turn = rng.uniform(0, 2 * np.pi)
    height = u * np.cos(turn) + v * np.sin(turn) + 0.38 * _field(mask.shape, rng, 3, 3)
    height += 0.05 * _field(mask.shape, rng, max(6, cells // 12), 2)
    shares = rng.uniform(0.14, 0.40 / len(others), len(others))
    share = {dominant: 1 - float(shares.sum()), **dict(zip(others, shares.tolist()))}
    layers = [kind for kind in LAYERS if kind in share]
    cuts = np.quantile(height[mask], np.cumsum([share[kind] for kind in layers])[:-1])
    ids = np.array([KIND_IDS[kind] for kind in layers], np.uint8)
    labels = np.where(mask, ids[np.searchsorted(cuts, height)], shader.GLASS).astype(np.uint8)

    per_patch = (PATCH // shader.CELL) ** 2
    patches_of_tissue = mask.sum() / per_patch
    depth = _depth(mask)
    free = mask.copy()
    needles = []
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
            box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) * shader.CELL / scale
            x0, y0, x1, y1 = (int(edge) for edge in np.clip(np.round(box), 0, size))
            needles.append(Needle(kind, x0, y0, x1 - x0, y1 - y0))
    return PhantomMap(seed, size, mpp, labels, _pure(labels), _stain(seed), dominant, others, tuple(needles))


# -------------------------------------------------------------------------------------------------- rendering


def _table() -> np.ndarray:
    """Transmission exp(-density) over [0, shader.LUT_MAX]."""
    return np.exp(-np.linspace(0, shader.LUT_MAX, shader.LUT_SIZE))


TRANSMISSION = _table()


def _only_glass(phantom: PhantomMap, x: int, y: int, w: int, h: int) -> bool:
    """Whether no tissue can reach a rectangle (level-0 px): all map cells within a cell of it are glass."""
    ox, oy = phantom.origin
    x0, y0 = (int(edge // shader.CELL) - 1 for edge in (x * phantom.scale - ox, y * phantom.scale - oy))
    x1 = int(((x + w) * phantom.scale - ox) // shader.CELL) + 2
    y1 = int(((y + h) * phantom.scale - oy) // shader.CELL) + 2
    return not phantom.labels[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)].any()


def _paint(phantom: PhantomMap, x: int, y: int, out: np.ndarray) -> None:
    """Fill `out`, uint8 (h, w, 3), with the pixels whose corner is (x, y)."""
    stain = phantom.stain
    h, w = out.shape[:2]
    if _only_glass(phantom, x, y, w, h):
        shader.glass(x, y, stain.white, stain.grain, stain.salt, out)
        return
    margin = int(np.ceil(shader.REACH / phantom.scale)) + 3
    sharp = shader.densities(
        x - margin,
        y - margin,
        w + 2 * margin,
        h + 2 * margin,
        phantom.scale,
        phantom.labels,
        phantom.pure,
        float(phantom.origin[0]),
        float(phantom.origin[1]),
        stain.angle,
        stain.salt,
    )
    fields = np.zeros_like(sharp)
    for field, blurred in zip(sharp, fields):
        shader.blur(field, blurred, *stain.blur)
    shader.transmit(fields, x, y, margin, stain.vectors, stain.white, stain.grain, TRANSMISSION, stain.salt, out)


def render(phantom: PhantomMap, x: int, y: int, w: int, h: int) -> np.ndarray:
    """Pixels of any rectangle, uint8 (h, w, 3); x, y, w, h in level-0 px.

    However a slide is cut, each pixel comes out the same. Outside the slide is glass.
    """
    out = np.empty((h, w, 3), np.uint8)
    for top in range(0, h, BLOCK):
        for left in range(0, w, BLOCK):
            _paint(phantom, x + left, y + top, out[top : top + BLOCK, left : left + BLOCK])
    return out


def patches(seed: int, kind: str, n: int, size: int = PATCH, mixed: float = 0.3) -> np.ndarray:
    """Training patches of one kind, in the stain of the phantom of a seed, at 0.5 um/px.

    seed:  the slide; patches of different kinds and one seed share a stain
    kind:  one of KINDS
    mixed: share of the patches that lie on a border to another kind, as most patches of a small focus do; a needle
           then covers 35 to 90 % of its patch (GroundTruth calls it by the needle), other kinds 55 to 90 %
    Returns uint8 (n, size, size, 3). Raises ValueError for an unknown kind.
    """
    if kind not in KIND_IDS:
        raise ValueError(f"{kind!r} is no kind of phantom tissue. Choose one of {', '.join(KINDS)}.")
    stain = _stain(seed)
    rng = np.random.default_rng((seed, 5, KIND_IDS[kind]))
    out = np.empty((n, size, size, 3), np.uint8)
    side = size // shader.CELL + 5
    for pixels in out:
        labels = np.full((side, side), KIND_IDS[kind], np.uint8)
        if rng.random() < mixed:
            labels = _border(labels, kind, rng)
        x, y = (int(corner) for corner in rng.integers(0, 2**20, 2))
        origin = (x - 2 * shader.CELL, y - 2 * shader.CELL)
        _paint(PhantomMap(seed, size, NATIVE_MPP, labels, _pure(labels), stain, kind, (), (), origin), x, y, pixels)
    return out


def _border(labels: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """The map of a patch across which a slightly curved border to another kind runs."""
    low = 0.35 if kind in NEEDLES else 0.55
    rest = BACKGROUNDS if kind in NEEDLES or kind == "background" else (*BACKGROUNDS, "background")
    other = str(rng.choice([name for name in rest if name != kind]))
    side = labels.shape[0]
    y, x = np.indices(labels.shape) - (side - 1) / 2
    turn, curve = rng.uniform(0, 2 * np.pi), rng.normal(0, 0.06)
    a, b = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    height = a + curve * b * b
    cut = np.quantile(height[2:-3, 2:-3], rng.uniform(low, 0.9))  # the patch itself: 7 x 7 cells at 224 px
    return np.where(height > cut, KIND_IDS[other], labels).astype(np.uint8)


# ----------------------------------------------------------------------------------------------- ground truth


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """What is true of a phantom."""

    map: PhantomMap

    @property
    def dominant(self) -> str:
        """The kind of most of the tissue."""
        return self.map.dominant

    @property
    def present(self) -> tuple[str, ...]:
        """Needle kinds in the slide, sorted."""
        return self.map.present

    @property
    def needles(self) -> tuple[Needle, ...]:
        """Every focus with its box in level-0 px."""
        return self.map.needles

    def shares(self, coords: np.ndarray, patch_size: int) -> np.ndarray:
        """Which share of each patch is which kind: float32 (N, 10), columns in the order of KIND_NAMES.

        coords (N, 2): corners in level-0 px; patch_size: side in level-0 px. Sampled on 16 x 16 points of a patch.
        """
        coords = np.asarray(coords, np.float64).reshape(-1, 2)
        steps = (np.arange(16) + 0.5) / 16 * patch_size
        out = np.zeros((len(coords), len(KIND_NAMES)), np.float32)
        for start in range(0, len(coords), 4_096):  # bounded memory
            part = coords[start : start + 4_096]
            x, y = np.broadcast_arrays(
                part[:, 0, None, None] + steps[None, None, :], part[:, 1, None, None] + steps[None, :, None]
            )
            scale = self.map.scale
            kinds = shader.kinds_at(
                x.ravel() * scale, y.ravel() * scale, self.map.labels, self.map.pure, self.map.stain.salt
            ).reshape(len(part), -1)
            for kind in range(len(KIND_NAMES)):
                out[start : start + len(part), kind] = (kinds == kind).mean(1)
        return out

    def label_at(self, coords: np.ndarray, patch_size: int) -> np.ndarray:
        """The kind of each patch, str (N,).

        Rule: the needle kind with the largest share, if that is at least 30 % of the patch; else the kind (glass is
        "background") with the largest share.
        coords (N, 2): corners in level-0 px; patch_size: side in level-0 px.
        """
        shares = self.shares(coords, patch_size)
        needles = np.isin(KIND_NAMES, NEEDLES)
        hidden = np.where(needles, shares, 0)
        best = np.where(hidden.max(1) >= NEEDLE_SHARE, hidden.argmax(1), shares.argmax(1))
        return np.array(KIND_NAMES)[best]

    def questions(self, n: int, seed: int = 0) -> list[dict[str, object]]:
        """n questions with options and answers, families in turn: present, absent, dominant, diagnosis.

        Options are the kinds' WORDS (or Yes and No) in random order. "absent" needs two needle kinds or more and is
        left out otherwise.
        """
        rng = np.random.default_rng((self.map.seed, seed, 6))
        absent = [kind for kind in NEEDLES if kind not in self.present]
        families = ["present", "dominant", "diagnosis"] + ["absent"] * (len(self.present) > 1)
        asked = []
        for index in range(n):
            family = families[index % len(families)]
            if family == "present":
                answer = str(rng.choice(self.present))
                options, text = (
                    [answer, *rng.permutation(absent)[:3]],
                    "Which of these tissues is present in this slide?",
                )
            elif family == "absent":
                answer = str(rng.choice(absent))
                options, text = [answer, *self.present], "Which of these tissues is absent from this slide?"
            elif family == "dominant":
                answer, options = self.dominant, list(BACKGROUNDS)
                text = "Which tissue makes up most of this slide?"
            else:
                answer, options = ("Yes" if "carcinoma" in self.present else "No"), ["Yes", "No"]
                text = f"Does this slide contain {WORDS['carcinoma']}?"
            shuffled = [WORDS.get(str(option), str(option)) for option in rng.permutation(options)]
            asked.append({"question": text, "options": shuffled, "answer": WORDS.get(answer, answer), "family": family})
        return asked

    def to_json(self) -> str:
        """What <slide>.truth.json says; seed, size and mpp suffice to make the map again."""
        record = {
            "sparsewsi_phantom": {"seed": self.map.seed, "size": self.map.size, "version": VERSION},
            "mpp": self.map.mpp,
            "dominant": self.dominant,
            "others": list(self.map.others),
            "present": list(self.present),
            "needles": [asdict(needle) for needle in self.needles],
            "label_rule": f"the needle kind that covers {NEEDLE_SHARE:.0%} of a patch or more, else the commonest kind",
        }
        return json.dumps(record, indent=1)


def ground_truth(seed: int, size: int, mpp: float = NATIVE_MPP) -> GroundTruth:
    """What is true of the phantom of a seed, without writing it."""
    return GroundTruth(phantom_map(seed, size, mpp))


def truth_path(slide: str | Path) -> Path:
    """Where the ground truth of a written phantom lies: <slide>.truth.json."""
    return Path(f"{slide}.truth.json")


def load_truth(slide: str | Path) -> GroundTruth:
    """Ground truth of a phantom that write_phantom wrote.

    Raises ValueError if there is no truth beside the slide or another version wrote it.
    """
    path = truth_path(slide)
    if not path.is_file():
        raise ValueError(f"{path.name} is not beside the slide. Only phantoms written by write_phantom have one.")
    record = json.loads(path.read_text())
    stated = record["sparsewsi_phantom"]
    if stated["version"] != VERSION:
        raise ValueError(
            f"{path.name} was written by version {stated['version']} of the generator, this is version {VERSION}. "
            "Write the phantom again."
        )
    return ground_truth(stated["seed"], stated["size"], record["mpp"])


# ---------------------------------------------------------------------------------------------------- writing


class _Level:
    """One pyramid level being built: takes rows of pixels, gives encoded tiles, hands the shrunken rows on."""

    def __init__(self, size: int):
        self.size = size
        self.tiles: list[bytes] = []  # JPEG, tens of MB for the largest phantom
        self.pending = np.empty((0, size, 3), np.uint8)

    def add(self, rows: np.ndarray, pool: ThreadPoolExecutor, last: bool) -> None:
        self.pending = np.concatenate([self.pending, rows])
        while len(self.pending) >= TILE or (last and len(self.pending)):
            self.tiles += _encode_row(self.pending[:TILE], pool)
            self.pending = self.pending[TILE:]


def _encode_row(rows: np.ndarray, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """One row of TIFF tiles as JPEG streams; the last tiles are filled up with their edge."""
    import imagecodecs

    def encode(left: int) -> bytes:
        tile = rows[:, left : left + TILE]
        gap = (0, TILE - tile.shape[0]), (0, TILE - tile.shape[1]), (0, 0)
        tile = np.ascontiguousarray(np.pad(tile, gap, mode="edge"))
        return bytes(
            imagecodecs.jpeg8_encode(tile, level=82, colorspace="rgb", outcolorspace="ycbcr", subsampling="420")
        )

    return pool.map(encode, range(0, rows.shape[1], TILE))


def _shrink(rows: np.ndarray, size: int) -> np.ndarray:
    """Mean over DOWNSAMPLE x DOWNSAMPLE px, cut to `size` columns; leftover rows are dropped."""
    height = len(rows) // DOWNSAMPLE
    block = rows[: height * DOWNSAMPLE, : size * DOWNSAMPLE].reshape(height, DOWNSAMPLE, size, DOWNSAMPLE, 3)
    return ((block.sum((1, 3), dtype=np.uint16) + DOWNSAMPLE**2 // 2) // DOWNSAMPLE**2).astype(np.uint8)


def _strips(phantom: PhantomMap, pool: ThreadPoolExecutor) -> Iterator[tuple[int, np.ndarray]]:
    """(rows done, strip) from top to bottom in strips of BLOCK rows, painted by all threads."""
    for top in range(0, phantom.size, BLOCK):
        strip = np.empty((min(BLOCK, phantom.size - top), phantom.size, 3), np.uint8)
        lefts = range(0, phantom.size, BLOCK)
        list(pool.map(lambda left: _paint(phantom, left, top, strip[:, left : left + BLOCK]), lefts))  # noqa: B023
        yield top + len(strip), strip


def write_phantom(
    path: str | Path,
    seed: int = 7,
    size: int = EXAMPLE_SIZE,
    mpp: float = NATIVE_MPP,
    progress: Callable[[int, int], None] | None = None,
) -> GroundTruth:
    """Write the phantom of a seed as a pyramidal tiled JPEG TIFF, and <path>.truth.json beside it.

    size:     side, level-0 px; mpp: um per level-0 px, stated in the file
    progress: called with (rows done, rows in all)

    Written strip by strip in bounded memory to a temporary name and renamed, the truth first: a slide that is there is
    complete and has its truth. Raises ValueError for a size or mpp out of range, OSError if the folder is not writable.
    """
    path = Path(path)
    truth = ground_truth(seed, size, mpp)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        slide, record = Path(folder) / "slide.tiff", Path(folder) / "truth.json"
        _write_tiff(slide, truth.map, progress)
        record.write_text(truth.to_json())
        os.replace(record, truth_path(path))
        os.replace(slide, path)
    return truth


def _write_tiff(path: Path, phantom: PhantomMap, progress: Callable[[int, int], None] | None) -> None:
    import tifffile

    sizes = [phantom.size // DOWNSAMPLE]
    while len(sizes) < 2 or sizes[-1] > 1_024:
        sizes.append(sizes[-1] // DOWNSAMPLE)
    levels = [_Level(size) for size in sizes]
    left_over: list[np.ndarray] = [np.empty((0, phantom.size, 3), np.uint8)] + [level.pending for level in levels]

    def tiles(pool: ThreadPoolExecutor) -> Iterator[bytes]:
        for done, strip in _strips(phantom, pool):
            # The lower levels first: nobody resumes this generator once its last tile is taken.
            rows = strip
            for number, level in enumerate(levels):
                rows = np.concatenate([left_over[number], rows])
                whole = len(rows) // DOWNSAMPLE * DOWNSAMPLE
                left_over[number] = rows[whole:]
                rows = _shrink(rows[:whole], level.size)
                level.add(rows, pool, last=done == phantom.size)
            if progress is not None:
                progress(done, phantom.size)
            for top in range(0, len(strip), TILE):
                yield from _encode_row(strip[top : top + TILE], pool)

    description = {"sparsewsi_phantom": {"seed": phantom.seed, "size": phantom.size, "version": VERSION}}
    settings = {
        "dtype": np.uint8,
        "tile": (TILE, TILE),
        "photometric": "ycbcr",
        "compression": "jpeg",
        "compressionargs": {"level": 82},
        "subsampling": (2, 2),
        "metadata": None,
        "resolutionunit": "CENTIMETER",
    }
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, tifffile.TiffWriter(path, bigtiff=phantom.size > 30_000) as file:
        per_cm = 1e4 / phantom.mpp
        file.write(
            tiles(pool),
            shape=(phantom.size, phantom.size, 3),
            description=json.dumps(description),
            resolution=(per_cm, per_cm),
            software="sparsewsi phantom",
            **settings,
        )
        for level in levels:
            per_cm /= DOWNSAMPLE
            shape = (level.size, level.size, 3)
            file.write(iter(level.tiles), shape=shape, resolution=(per_cm, per_cm), subfiletype=1, **settings)


def example_slide(cache_dir: str | Path | None = None) -> Path:
    """The bundled example phantom, written on first use (some seconds).

    cache_dir: default $SPARSEWSI_CACHE, else ~/.cache/sparsewsi
    """
    folder = Path(cache_dir or os.environ.get("SPARSEWSI_CACHE") or Path.home() / ".cache" / "sparsewsi")
    path = folder / f"phantom-{EXAMPLE_SEED}-{EXAMPLE_SIZE}-v{VERSION}.tiff"
    if not (path.is_file() and truth_path(path).is_file()):
        write_phantom(path, EXAMPLE_SEED, EXAMPLE_SIZE)
    return path
