"""Where the tissue of an H&E slide lies, without weights, and the grid of patches that cover it.

Colours are judged as optical densities against the slide's own glass, OD = -ln(I / I_glass): dyes absorb, so densities
add, and a grey veil or a dim lamp adds the same to all three. Whatever mix of haematoxylin and eosin a px holds, it
absorbs green more than blue, and red at most about as much as green. Little else on a slide does both:

    green, blue pen   absorb red more than green
    red pen           absorbs blue as much as green
    black pen, dust   absorb all alike
    glass             absorbs nothing

Two grids: the mask, about 8 um/px, decides each px by its colour; cells of about 32 um, whole numbers of mask px,
decide what belongs together: gaps and fat are filled, specks dropped, pen marks taken out with whatever is under them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
from PIL import Image
from scipy import ndimage

from sparsewsi.slides.refusals import SlideError
from sparsewsi.slides.slide import Slide

MASK_MPP = 8.0  # um per mask px
CELL_UM = 32.0  # side of a cell
OFFSET = 4.0  # added to intensities before the logarithm, so that noise in black px counts for little
LEAST_STAIN = 0.02  # OD_green - OD_blue of the palest tissue; glass is within 0.01 of 0
LEAST_SHARE = 0.13  # the same as a share of OD_green: blood has 0.18 and more, red ink 0.1 and less
MARK_SHARE = 0.4  # a cell of which this share is dark, but not stained, is a pen mark or dirt
SPECK_MM2 = 0.015  # tissue and marks smaller than this are dropped
FAT_MM2 = 0.05  # fat smaller than this is taken for scratches
HOLE_MM2 = 0.03  # holes smaller than this, 0.2 mm across, are lumina and gaps within tissue
GAP_UM = 64.0  # gaps narrower than this are closed
STRIP = 256  # rows of mask px handled at once
LOST = 16  # mask px: side of the squares in which damage is looked for, 128 um
DARK_FIELD = "The slide is dark all over, as in fluorescence; tissue is only found on bright slides stained with H&E."
DEFAULT_GLASS = (245.0, 245.0, 245.0)  # where a slide shows no glass


@dataclass(frozen=True)
class _Segmentation:
    mask: np.ndarray  # bool (h, w)
    scale: float  # level-0 px per mask px
    reason: str  # why nothing was found, "" if something was


def tissue_mask(slide: Slide, mpp: float = MASK_MPP) -> tuple[np.ndarray, float]:
    """Mask of the tissue of a slide, at about mpp um/px: the nearest size that a level gives without interpolation.

    Returns (bool (h, w), level-0 px per mask px); mask px (0, 0) lies at the slide's origin, all is False outside the
    slide's bounds. An empty mask is legal (see why_empty). Raises SlideError if the slide states no resolution or is
    damaged.
    """
    found = _segment(slide, mpp)
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
    found = _segment(slide, MASK_MPP)
    columns, rows, coverage = _grid_coverage(slide, found, side)
    keep = coverage >= min_tissue - 1e-9
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
    found = _segment(slide, MASK_MPP)
    coverage = _grid_coverage(slide, found, side)[2]
    most = float(coverage.max(initial=0.0))
    if most >= min_tissue - 1e-9:
        return ""
    if found.reason:
        return found.reason
    return (
        f"No patch is tissue to {100 * min_tissue:.3g} % or more (the fullest one to {100 * most:.2g} %); "
        "the tissue is too small for patches of this size, lower min_tissue or patch_size."
    )


def _check_fraction(min_tissue: float) -> None:
    if not 0 <= min_tissue <= 1:
        raise SlideError(f"min_tissue is a fraction from 0 to 1, got {min_tissue}.")


# ---- the grid ----


def _grid_coverage(slide: Slide, found: _Segmentation, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x of the columns, y of the rows, tissue fraction (rows, columns)) of all patches that touch the bounds, level 0.

    The grid starts at the slide's origin whatever the bounds are, so that slides and tools agree on it.
    """
    x, y, w, h = slide.bounds
    columns = np.arange(x // side, -(-(x + w) // side), dtype=np.int64) * side
    rows = np.arange(y // side, -(-(y + h) // side), dtype=np.int64) * side
    return columns, rows, _coverage(found.mask, columns / found.scale, rows / found.scale, side / found.scale)


def _coverage(mask: np.ndarray, left: np.ndarray, top: np.ndarray, side: float) -> np.ndarray:
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


# ---- from colours to a mask ----


def _segment(slide: Slide, mpp: float) -> _Segmentation:
    scale = _mask_scale(slide, mpp)
    width, height = (math.ceil(side / scale - 1e-6) for side in slide.size)
    # Only the scanned part is read; it begins on a mask px.
    x, y, w, h = slide.bounds
    left, top = int(x / scale), int(y / scale)
    right, bottom = math.ceil((x + w) / scale - 1e-6), math.ceil((y + h) / scale - 1e-6)
    rgb, lost = _read_what_is_there(slide, (left * scale, top * scale), (right - left, bottom - top), scale)
    um = scale * slide.require_mpp()
    colours = _colours(rgb, um)
    del rgb  # a cell's worth of numbers stands for its px from here on
    if colours is None:
        return _Segmentation(np.zeros((height, width), bool), scale, DARK_FIELD)
    part, reason = _tissue_of(colours, um)
    if lost is not None:  # whoever reads the patches there finds out, and can tell which they are
        part |= lost
    mask = np.pad(part, ((top, height - bottom), (left, width - right))) if part.shape != (height, width) else part
    return _Segmentation(mask, scale, reason)


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
        raise SlideError(f"The resolution of the mask must be a positive number of um/px, got {mpp}.")
    target = mpp / slide.require_mpp()
    nearest = min(slide.level_downsamples, key=lambda d: abs(math.log(d / target)))
    if 2 / 3 <= nearest / target <= 3 / 2:
        return nearest
    finer = slide.level_downsamples[slide.level_for(target)]
    return finer * max(1, round(target / finer))


@dataclass(frozen=True)
class _Colours:
    """What the px of an image say, for their cells to decide."""

    cell: int  # mask px
    means: np.ndarray  # mean colours of the cells, uint8 (rows, columns, 3)
    glass: tuple[float, float, float]
    stained: np.ndarray  # px, bool (h, w)
    shares: tuple[np.ndarray, ...]  # of each cell's px: stained, foreign, darker than the cell; float32 (rows, columns)


def _colours(rgb: np.ndarray, um: float) -> _Colours | None:
    """Of an image of um um/px, uint8 (h, w, 3). None for a dark field."""
    cell = max(2, round(CELL_UM / um))
    strips = list(_strips(rgb, cell))
    means = np.concatenate([np.stack([np.asarray(band.reduce(cell)) for band in bands], -1) for _, bands in strips])
    if _is_dark_field(means):
        return None
    glass = _glass(means)
    stained, shares = np.empty(rgb.shape[:2], bool), []
    for rows, bands in strips:
        stained[rows], foreign = _classify(bands, glass)
        green = means[rows.start // cell : rows.stop // cell, :, 1]
        darker = _darker(np.asarray(bands[1]), green, cell)
        shares.append((_share(stained[rows], cell), _share(foreign, cell), _share(darker, cell)))
    return _Colours(cell, means, glass, stained, tuple(np.concatenate(parts) for parts in zip(*shares)))


def _tissue_of(colours: _Colours, um: float) -> tuple[np.ndarray, str]:
    """Mask of the image, bool (h, w), and the reason if it is empty."""
    stained_share, foreign_share, darker_share = colours.shares
    cell_um = colours.cell * um
    logarithm = np.log(np.arange(256, dtype=np.float32) + OFFSET)
    density = np.stack([math.log(i0 + OFFSET) - logarithm[colours.means[..., c]] for c, i0 in enumerate(colours.glass)])
    stain = density[1] - density[2]  # of optical densities
    marks = _marks(foreign_share, density, cell_um)
    tissue = stained_share > 0.5
    tissue |= _fat(darker_share, stain, tissue, cell_um)
    tissue = _close(tissue & ~marks, GAP_UM / cell_um)
    tissue = _fill_holes(tissue, (stain > 0.01) | (density[1] > 0.1), cell_um) & ~marks
    tissue = _drop_small(tissue, SPECK_MM2, cell_um)

    # Whole cells inside, single px along the rim: the outline is as fine as the mask.
    inside = _crossed(tissue, np.logical_and, beyond=True)
    rim = _dilated(tissue, 1) & ~marks
    mask = _spread(rim.view(np.uint8) + inside, colours.cell, colours.stained.shape) + colours.stained > 1
    if mask.any():
        return mask, ""
    if marks.any():
        return mask, "No stained tissue was found on the slide, only dark or pen-coloured marks."
    return mask, "No tissue was found: the slide is blank, or too pale to be told from glass."


def _strips(rgb: np.ndarray, cell: int) -> Iterator[tuple[slice, tuple[Image.Image, ...]]]:
    """(rows, bands) of strips that are whole rows of cells, few enough to stay in the processor's cache."""
    step = cell * max(1, STRIP // cell)
    for top in range(0, len(rgb), step):
        yield slice(top, top + step), Image.fromarray(rgb[top : top + step]).split()


def _is_dark_field(cells: np.ndarray) -> bool:
    lowest, highest = _extremes(cells)
    return bool((highest < 60).mean() > 0.5 and (lowest > 150).mean() < 0.01)


def _glass(cells: np.ndarray) -> tuple[float, float, float]:
    """Colour of the empty glass: the brightest of the common, nearly grey, even colours."""
    green = cells[..., 1].astype(np.int16)
    even = np.zeros(green.shape, bool)
    even[1:, 1:] = (np.abs(green[1:, 1:] - green[1:, :-1]) <= 2) & (np.abs(green[1:, 1:] - green[:-1, 1:]) <= 2)
    lowest, highest = _extremes(cells)
    grey = (highest - lowest <= 16) & (lowest >= 180)
    least = max(16, 1e-3 * grey.size)
    # Pure white is a scanner's padding, transparent px or beyond the border: glass only where there is no other.
    for candidates in (grey & even & (lowest < 254), grey & even, grey):
        if np.count_nonzero(candidates) >= least:
            break
    else:
        return DEFAULT_GLASS
    chosen = np.flatnonzero(candidates)
    colours = cells.reshape(-1, 3)[chosen[:: max(1, len(chosen) // 20_000)]]
    counts = np.bincount(colours[:, 1], minlength=256)
    level = int(np.nonzero(counts >= 0.2 * counts.max())[0][-1])
    red, green, blue = colours[np.abs(colours[:, 1].astype(np.int16) - level) <= 3].mean(0)
    return float(red), float(green), float(blue)


def _extremes(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest channel of every px; rgb.min(2) takes ten times as long."""
    red, green, blue = (rgb[..., c] for c in range(3))
    return np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)


def _classify(bands: tuple[Image.Image, ...], glass: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Per px of an image's bands, bool (h, w): stained as with H&E, and foreign: absorbs, but not as H&E does.

    Every rule compares blue or red with a function of green, so that tables of 256 entries stand for the logarithms.
    """
    red0, green0, blue0 = (c + OFFSET for c in glass)
    density = np.log(green0 / (np.arange(256) + OFFSET))  # OD_green of every green value
    red, green, blue = (np.asarray(band) for band in bands)

    def limit(values: np.ndarray) -> np.ndarray:
        """A function of green, rounded down, for every px."""
        return np.asarray(bands[1].point(np.clip(np.floor(values), 0, 255).astype(int).tolist()))

    # OD_green - OD_blue above both thresholds, OD_red not above OD_green. OD_green alone must pass the first as well:
    # white padding beside yellowish glass, and JPEG's colour fringes, only look as if something absorbed green.
    least_blue = blue0 * np.exp(np.maximum(LEAST_STAIN, LEAST_SHARE * density) - density) - OFFSET
    stained = blue > limit(np.where(density > LEAST_STAIN, least_blue, 255))
    stained &= red >= limit(red0 * np.exp(-(1.08 * density + 0.05)) - OFFSET)
    dark_green, dark_red = (math.ceil(c * math.exp(-0.3) - OFFSET) for c in (green0, red0))
    foreign = (green < dark_green) | (red < dark_red)
    foreign &= ~stained
    # Brown (melanin, haemosiderin) absorbs blue most and red least: neither stained nor a mark.
    where = np.flatnonzero(foreign)
    red, green, blue = (band.ravel()[where] for band in (red, green, blue))
    least_blue = (blue0 * np.exp(-1.1 * density - 0.05) - OFFSET)[green]
    foreign.ravel()[where] = (blue >= least_blue) | (red <= green)
    return stained, foreign


def _marks(foreign_share: np.ndarray, density: np.ndarray, cell_um: float) -> np.ndarray:
    """Cells of pen marks and dirt: cores that are not specks, what fades out around them, and a margin of 64 um.

    density: mean OD of the cells in red, green, blue (3, rows, columns)
    """
    cores = _drop_small(foreign_share > MARK_SHARE, SPECK_MM2, cell_um)
    if not cores.any():
        return cores
    red, green, blue = density
    # Ink over tissue mixes with its colours; only beside a core is a greyish or reddish tissue taken for ink.
    tinted = (green > 0.3) & ((red > 0.85 * green) | (blue > 0.72 * green))
    beside = _dilated(cores, 250 / cell_um)
    labels = _label((foreign_share > MARK_SHARE / 2) | (tinted & beside) | cores)
    with_core = np.zeros(int(labels.max()) + 1, bool)
    with_core[labels[cores]] = True
    return _dilated(with_core[labels], 64 / cell_um)


def _darker(green: np.ndarray, mean: np.ndarray, cell: int) -> np.ndarray:
    """Px that absorb more green than the mean of their cell, bool (h, w): lines on pale ground."""
    return green < _spread(np.maximum(mean, 6) - np.uint8(6), cell, green.shape)


def _fat(darker_share: np.ndarray, stain: np.ndarray, tissue: np.ndarray, cell_um: float) -> np.ndarray:
    """Cells of fat: a net of thin membranes, so pale that only the mean over 0.16 mm shows that they are pink.

    Scratches and dust make sparser lines, and grey ones. Cells beside tissue do not count, as its rim would pass for
    fat, but what is less than 3 cells wide may itself be a membrane.
    """
    counted = 1 - _dilated(_opened(tissue, 3), 1).astype(np.float32)
    span = max(1, round(160 / cell_um))
    weight = _summed(counted, span)
    stain_around = _summed(np.clip(stain, -0.05, 0.05) * counted, span)
    darker_around = _summed(darker_share * counted, span)
    fat = (counted > 0) & (weight > 0.1 * span**2) & (stain_around > 0.002 * weight) & (darker_around > 0.05 * weight)
    if not fat.any():
        return fat
    # A strand of tissue has such surroundings too, but they are narrow; nets of fat are not.
    return _drop_small(fat & _opened(fat | tissue, 288 / cell_um), FAT_MM2, cell_um)


def _summed(cells: np.ndarray, span: int) -> np.ndarray:
    """Sum over the square of span cells around each, 0 beyond the border; for few cells twice as fast as scipy's."""
    for _ in range(2):
        padded = np.pad(cells, ((span // 2, span - 1 - span // 2), (0, 0)))
        cells = reduce(np.add, (padded[shift : shift + len(cells)] for shift in range(span))).T
    return cells


def _share(mask: np.ndarray, cell: int) -> np.ndarray:
    """Share of True in each cell, float32 (ceil(h / cell), ceil(w / cell)); at the edge, of what the cell has."""
    return np.asarray(Image.fromarray(mask.view(np.uint8) * np.uint8(255)).reduce(cell)).astype(np.float32) / 255


def _spread(cells: np.ndarray, cell: int, shape: tuple[int, ...]) -> np.ndarray:
    return cells.repeat(cell, 1).repeat(cell, 0)[: shape[0], : shape[1]]


def _label(cells: np.ndarray, diagonal: bool = True) -> np.ndarray:
    """Components numbered from 1, 0 elsewhere, int32; diagonal neighbours belong together or not."""
    labels = np.zeros(cells.shape, np.int32)
    ndimage.label(cells, np.ones((3, 3)) if diagonal else None, output=labels)
    return labels


def _window(cells: np.ndarray, before: int, after: int, join: np.ufunc, beyond: bool) -> np.ndarray:
    """np.logical_or or _and over a square window: from `before` cells before each to `after` behind it, on both axes.

    What lies beyond the border counts as `beyond`. Windows double by joining the cells with themselves, shifted: a
    fraction of what scipy's filters take, which sort or count what is only true or false here.
    """
    for _ in range(2):
        cells = np.pad(cells, ((before, after), (0, 0)), constant_values=beyond)
        width = 1
        while width < before + after + 1:
            step = min(width, before + after + 1 - width)
            cells = join(cells[:-step], cells[step:])
            width += step
        cells = cells.T
    return cells


def _dilated(cells: np.ndarray, reach: float) -> np.ndarray:
    """Grown by reach cells (at least 1) to every side, corners included."""
    reach = max(1, round(reach))
    return _window(cells, reach, reach, np.logical_or, beyond=False)


def _opened(cells: np.ndarray, width: float) -> np.ndarray:
    """Only what a square of width cells fits into; squares may stick out over the border."""
    side = max(2, round(width))
    before, after = side // 2, side - 1 - side // 2
    eroded = _window(cells, before, after, np.logical_and, beyond=True)
    # An even window has no middle cell: mirrored, it grows back to where it was.
    return _window(eroded, after, before, np.logical_or, beyond=False) & cells


def _crossed(cells: np.ndarray, join: np.ufunc, beyond: bool) -> np.ndarray:
    """np.logical_or or _and of each cell and its four neighbours; what lies beyond the border counts as `beyond`."""
    padded = np.pad(cells, 1, constant_values=beyond)
    rows = join(padded[:-2, 1:-1], padded[2:, 1:-1])
    columns = join(padded[1:-1, :-2], padded[1:-1, 2:])
    return join(join(rows, columns), cells)


def _drop_small(cells: np.ndarray, mm2: float, cell_um: float) -> np.ndarray:
    """Without the components smaller than mm2."""
    labels = _label(cells)
    areas = np.bincount(labels.ravel()) * (cell_um / 1000) ** 2
    areas[0] = 0
    return (areas >= mm2)[labels]


def _close(cells: np.ndarray, gap: float) -> np.ndarray:
    """Closed over gaps of gap cells, as if the tissue went on beyond the border."""
    rounds = max(1, round(gap / 2))
    closed = np.pad(cells, 2 * rounds, mode="symmetric")
    for join in (np.logical_or, np.logical_and):
        for _ in range(rounds):
            closed = _crossed(closed, join, beyond=False)
    return closed[2 * rounds : -2 * rounds, 2 * rounds : -2 * rounds]


def _fill_holes(cells: np.ndarray, not_glass: np.ndarray, cell_um: float) -> np.ndarray:
    """Fill holes that are small, or mostly not glass: loose tissue, pigment (marks are taken out later)."""
    labels = _label(~cells, diagonal=False)
    sizes = np.bincount(labels.ravel())
    content = np.bincount(labels.ravel(), weights=not_glass.ravel()) / np.maximum(sizes, 1)
    fill = (sizes * (cell_um / 1000) ** 2 < HOLE_MM2) | (content > 0.5)
    # What reaches the border of the image is no hole.
    fill[np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))] = False
    fill[0] = False
    return cells | fill[labels]
