"""Pixels of a phantom: any rectangle of its plan, and labelled patches without a slide.

A Beer-Lambert stain model with per-slide stain, light, blur and grain makes the colours; how tissue looks is in shader.
"""

import numpy as np

from sparsewsi.phantom import shader
from sparsewsi.phantom.kinds import BACKGROUNDS, KIND_IDS, KINDS, NEEDLES
from sparsewsi.phantom.plan import NATIVE_MPP, PATCH, PhantomMap, mark_pure, stain_of

BLOCK = 512  # side of the blocks a rectangle is painted in, px
TRANSMISSION = np.exp(-np.linspace(0, shader.LUT_MAX, shader.LUT_SIZE))  # over optical density


def only_glass(phantom: PhantomMap, x: int, y: int, w: int, h: int) -> bool:
    """Whether no tissue can reach a rectangle (level-0 px): all map cells within a cell of it are glass."""
    ox, oy = phantom.origin
    x0, y0 = (int(edge // shader.CELL) - 1 for edge in (x * phantom.scale - ox, y * phantom.scale - oy))
    x1 = int(((x + w) * phantom.scale - ox) // shader.CELL) + 2
    y1 = int(((y + h) * phantom.scale - oy) // shader.CELL) + 2
    return not phantom.labels[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)].any()


def paint(phantom: PhantomMap, x: int, y: int, out: np.ndarray) -> None:
    """Fill `out`, uint8 (h, w, 3), with the pixels whose corner is (x, y)."""
    stain = phantom.stain
    h, w = out.shape[:2]
    if only_glass(phantom, x, y, w, h):
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
            paint(phantom, x + left, y + top, out[top : top + BLOCK, left : left + BLOCK])
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
    stain = stain_of(seed)
    rng = np.random.default_rng((seed, 5, KIND_IDS[kind]))
    out = np.empty((n, size, size, 3), np.uint8)
    side = size // shader.CELL + 5
    for pixels in out:
        labels = np.full((side, side), KIND_IDS[kind], np.uint8)
        if rng.random() < mixed:
            labels = border(labels, kind, rng)
        x, y = (int(corner) for corner in rng.integers(0, 2**20, 2))
        origin = (x - 2 * shader.CELL, y - 2 * shader.CELL)
        paint(PhantomMap(seed, size, NATIVE_MPP, labels, mark_pure(labels), stain, kind, (), (), origin), x, y, pixels)
    return out


def border(labels: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
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
