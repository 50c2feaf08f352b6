"""Where the tissue of a slide lies, and the grid of patches that cover it. What tissue looks like: see stain.py.

Two grids: the mask, about 8 um/px, decides each px by its colour; cells of about 32 um, whole numbers of mask px,
decide what belongs together.
"""

import math
from dataclasses import dataclass

import numpy as np

from sparsewsi.slides.refusals import SlideError
from sparsewsi.slides.slide import Slide
from sparsewsi.slides.stain import doubt_colours, find_stained

MASK_MPP = 8.0  # um per mask px
MOST_PX = 250_000_000  # of a mask: more than glass of 100 x 70 mm at 5.3 um/px; each takes some 10 bytes
NUCLEAR_MPP = 1.5  # um/px, from which on nuclei are a few px and their colour is mixed with what is around them
SPOTS, SPOT = 8, 112  # places in the tissue whose colours are looked at, and their sides in px
LOST = 16  # mask px: side of the squares in which damage is looked for, 128 um


@dataclass(frozen=True)
class Tissue:
    """mask: bool (h, w), px (0, 0) at the slide's origin, False outside its bounds; scale: level-0 px per mask px
    reason: why nothing was found, "" if something was; note: what was left out, "" if nothing to speak of
    """

    mask: np.ndarray
    scale: float
    reason: str
    note: str


def find_tissue(slide: Slide, mpp: float = MASK_MPP) -> Tissue:
    """The tissue of a slide, at about mpp um/px: the nearest size that a level gives without interpolation.

    Found once for a slide and kept. Raises SlideError if the slide states no resolution or is damaged.
    """
    key = f"tissue at {mpp}"
    if key not in slide.cache:
        slide.cache[key] = _segment(slide, mpp)
    return slide.cache[key]


def tissue_mask(slide: Slide, mpp: float = MASK_MPP) -> tuple[np.ndarray, float]:
    """find_tissue's mask and scale: (bool (h, w), level-0 px per mask px). An empty mask is legal (see why_empty)."""
    found = find_tissue(slide, mpp)
    return found.mask, found.scale


def patch_coords(slide: Slide, mpp: float, patch_size: int, min_tissue: float = 0.1) -> np.ndarray:
    """Top-left corners of the patches that hold tissue, in row-major order.

    mpp:        resolution to read at, um/px
    patch_size: side of a patch in px *at that mpp*
    min_tissue: keep a patch if at least this fraction of its area is tissue, in [0, 1]; 0 keeps every patch
    Returns (N, 2) int32, (x, y) in the level-0 frame, multiples of patch_side(...); N = 0 is legal (see why_empty).
    Raises SlideError if the slide states no resolution, or one so coarse that it would be enlarged more than 2 times.
    """
    side = patch_side(slide, mpp, patch_size)
    _check_fraction(min_tissue)
    found = find_tissue(slide)
    columns, rows, shares = _grid_shares(slide, found, side)
    keep = shares >= min_tissue - 1e-9
    row, column = np.nonzero(keep)  # row-major
    return np.stack([columns[column], rows[row]], axis=1).astype(np.int32)


def patch_side(slide: Slide, mpp: float, patch_size: int) -> int:
    """Side of a patch in level-0 px, and the step of the grid: patch_size px at mpp, to the nearest px.

    A patch read at exactly mpp is up to half a level-0 px wider or narrower than this.
    Raises SlideError as patch_coords.
    """
    if patch_size < 1:
        raise SlideError(f"patch_size must be at least 1 px, got {patch_size}.")
    slide.check_mpp(mpp)
    return max(1, round(patch_size * mpp / slide.require_mpp()))


def why_empty(slide: Slide, mpp: float, patch_size: int, min_tissue: float = 0.1) -> str:
    """One sentence on why patch_coords(...) with these arguments is empty; "" if it is not."""
    side = patch_side(slide, mpp, patch_size)
    _check_fraction(min_tissue)
    found = find_tissue(slide)
    most = float(_grid_shares(slide, found, side)[2].max(initial=0.0))
    if most >= min_tissue - 1e-9:
        return ""
    reason = found.reason or (
        f"No patch is tissue to {100 * min_tissue:.3g} % or more (the fullest one to {100 * most:.2g} %); "
        "the tissue is too small for patches of this size, lower min_tissue or patch_size."
    )
    return f"{slide.doubt} {reason}" if slide.doubt else reason


def _check_fraction(min_tissue: float) -> None:
    if not 0 <= min_tissue <= 1:
        raise SlideError(f"min_tissue is a fraction from 0 to 1, got {min_tissue}.")


# ---- the grid ----


def _grid_shares(slide: Slide, found: Tissue, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x of the columns, y of the rows, tissue fraction (rows, columns)) of all patches that touch the bounds, level 0.

    The grid starts at the slide's origin whatever the bounds are, so that slides and tools agree on it.
    """
    x, y, w, h = slide.bounds
    columns = np.arange(x // side, -(-(x + w) // side), dtype=np.int64) * side
    rows = np.arange(y // side, -(-(y + h) // side), dtype=np.int64) * side
    return columns, rows, coverage(found.mask, columns / found.scale, rows / found.scale, side / found.scale)


def coverage(mask: np.ndarray, left: np.ndarray, top: np.ndarray, side: float) -> np.ndarray:
    """Fraction of each square that is True, exact for squares that cut mask px: (len(top), len(left)).

    left, top, side in mask px, fractions allowed; what lies beyond the mask counts as False.
    """
    sums = np.stack([_row_sum(mask, start, start + side) for start in top])  # (rows, w)
    return np.stack([_row_sum(sums.T, start, start + side) for start in left], axis=1) / side**2


def _row_sum(mask: np.ndarray, start: float, stop: float) -> np.ndarray:
    """Sum of the rows in [start, stop), the first and last in part: float64 (w,)."""
    first, last = max(0, math.floor(start)), min(len(mask), math.ceil(stop))
    row = np.arange(first, last)
    share = np.minimum(row + 1, stop) - np.maximum(row, start)
    return share @ mask[first:last]


# ---- from px to a mask ----


def _segment(slide: Slide, mpp: float) -> Tissue:
    scale = _mask_scale(slide, mpp)
    width, height = (math.ceil(side / scale - 1e-6) for side in slide.size)
    if width * height > MOST_PX:
        across, down = (side * slide.require_mpp() / 1000 for side in slide.size)
        raise SlideError(
            f"At {slide.require_mpp():.4g} µm/px the slide would be {across:,.0f} x {down:,.0f} mm, which no glass is; "
            "its resolution or size is wrong. Pass slide_mpp= if it is the resolution."
        )
    # Only the scanned part is read; it begins on a mask px.
    x, y, w, h = slide.bounds
    left, top = int(x / scale), int(y / scale)
    right, bottom = math.ceil((x + w) / scale - 1e-6), math.ceil((y + h) / scale - 1e-6)
    rgb, lost = _read_what_is_there(slide, (left * scale, top * scale), (right - left, bottom - top), scale)
    found = find_stained(rgb, scale * slide.require_mpp())
    part = found.mask if lost is None else found.mask | lost  # whoever reads the patches there finds out which they are
    mask = np.pad(part, ((top, height - bottom), (left, width - right))) if part.shape != (height, width) else part
    notes = [found.note, doubt_colours(_read_spots(slide, mask, scale))]
    return Tissue(mask, scale, found.reason, " ".join(filter(None, notes)))


def _read_spots(slide: Slide, mask: np.ndarray, scale: float) -> np.ndarray:
    """Pictures of 1 um/px spread over the tissue, uint8 (n, h, w, 3); none of a slide that shows no nuclei."""
    places, found = np.flatnonzero(mask), [np.empty((0, SPOT, SPOT, 3), np.uint8)]
    if slide.require_mpp() > NUCLEAR_MPP or not len(places):
        return found[0]
    mpp = max(1.0, slide.require_mpp())
    for place in places[np.linspace(0, len(places) - 1, SPOTS + 2, dtype=int)[1:-1]].tolist():
        y, x = divmod(place, mask.shape[1])
        half = SPOT / 2 * mpp / slide.require_mpp()
        try:
            found.append(slide.read(((x + 0.5) * scale - half, (y + 0.5) * scale - half), (SPOT, SPOT), mpp)[None])
        except SlideError:
            continue
    return np.concatenate(found)


def _read_what_is_there(
    slide: Slide, xy: tuple[float, float], size: tuple[int, int], scale: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """slide.read_scaled, white where the file is damaged, and where that is, in squares of LOST mask px: bool (h, w).

    None if the file is whole. Raises SlideError if more than half is damaged.
    """
    try:
        return slide.read_scaled(xy, size, scale), None
    except SlideError as error:
        rgb, lost = np.full((*size[::-1], 3), 255, np.uint8), np.ones(size[::-1], bool)
        damage = error
    for top in range(0, size[1], LOST):
        for left in range(0, size[0], LOST):
            part = (min(LOST, size[0] - left), min(LOST, size[1] - top))
            here = (slice(top, top + part[1]), slice(left, left + part[0]))
            try:
                rgb[here] = slide.read_scaled((xy[0] + left * scale, xy[1] + top * scale), part, scale)
                lost[here] = False
            except SlideError:
                continue
    if lost.mean() > 0.5:
        raise damage
    return rgb, lost


def _mask_scale(slide: Slide, mpp: float) -> float:
    """Level-0 px per mask px: a level of 2/3 to 3/2 of mpp as it is, else a whole fraction of the next finer level."""
    if not (math.isfinite(mpp) and mpp > 0):
        raise SlideError(f"The resolution of the mask must be a positive number of µm/px, got {mpp}.")
    target = mpp / slide.require_mpp()
    nearest = min(slide.level_downsamples, key=lambda d: abs(math.log(d / target)))
    if 2 / 3 <= nearest / target <= 3 / 2:
        return nearest
    finer = slide.level_downsamples[slide.level_for(target)]
    return finer * max(1, round(target / finer))
