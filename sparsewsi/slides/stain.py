"""Which px of a slide are stained tissue, without weights: H&E, and the brown of immunohistochemistry.

Colours are judged as optical densities against the slide's own glass, OD = -ln(I / I_glass): dyes absorb, so densities
add, and a grey veil or a dim lamp adds the same to all three. Whatever mix of haematoxylin and eosin a px holds, it
absorbs green more than blue, and red at most about as much as green; DAB over haematoxylin absorbs blue most and red
least. Little else on a slide does either:

    green, blue pen   absorb red more than green
    red pen           absorbs blue as much as green, and hardly any red
    black pen, dust   absorb all alike
    glass             absorbs nothing

Other stains (trichrome, silver, Alcian blue) look like ink; what is left out is therefore measured and said.
Cells of about 32 um decide what belongs together: gaps and fat are filled, specks dropped, pen marks taken out with
whatever is under them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

CELL_UM = 32.0  # side of a cell
OFFSET = 4.0  # added to intensities before the logarithm, so that noise in black px counts for little
LEAST_STAIN = 0.02  # OD_green - OD_blue of the palest tissue; glass is within 0.01 of 0
LEAST_SHARE = 0.13  # the same as a share of OD_green: blood has 0.18 and more, red ink 0.1 and less
BROWN_BLUE = (1.02, 2.0)  # OD_blue / OD_green of DAB with and without haematoxylin; yellow and orange have more
BROWN_RED = (0.3, 0.85)  # OD_red / OD_green of it; red ink has less, black ink and dust more
MARK_SHARE = 0.4  # a cell of which this share is dark, but not stained, is a pen mark or dirt
SPECK_MM2 = 0.015  # tissue and marks smaller than this are dropped
FAT_MM2 = 0.05  # fat smaller than this is taken for scratches
HOLE_MM2 = 0.03  # holes smaller than this, 0.2 mm across, are lumina and gaps within tissue
GAP_UM = 64.0  # gaps narrower than this are closed
STRIP = 256  # rows of mask px handled at once
FILL, DARK_FILL = 8, 48  # grey values: what is painted where nothing was scanned is black, or one dark grey
LEFT_OUT = (
    0.05,
    0.2,
)  # share and mm2 of the coloured area from which on it is said; of H&E 0.01 is left out
LEAST_PX = 2000  # stained px that tell whether colours are swapped
DEAD_SHARE = 0.2  # of the liveliest channel's standard deviation; of H&E the least of 84 slides is above 0.5
LEAST_RUN = -0.25  # correlation of darkness and redness around nuclei, below which they are
DEFAULT_GLASS = (245.0, 245.0, 245.0)  # where a slide shows no glass

DARK_FIELD = "The slide is dark all over, as in fluorescence; tissue is only found on bright slides stained with H&E."
MEANT = "tissue is found by the colours of H&E and of brown IHC"
BLANK = "No tissue was found: the slide is blank, or too pale to be told from glass."
MARKS = f"No stained tissue was found on the slide, only dark or pen-coloured marks, or another stain; {MEANT}."
GREY = f"The slide has no colours, as an image of one channel; {MEANT}."
OTHER = f"No tissue was found: what is coloured on the slide looks like dirt or another stain; {MEANT}."
SWAPPED = (
    "The colours run against those of H&E, nuclei redder than what is around them: red and blue may be swapped in the "
    "file (BGR written as RGB), or it is another stain. Compare the picture with the slide under a microscope."
)
DEAD = (
    "The {} channel of the slide is nearly the same everywhere in its tissue: its colours are not those of a stain. "
    "Export it again, or ask who scanned it."
)
SPECKS = (
    f"Only specks smaller than {SPECK_MM2:g} mm2 are stained, by the resolution that the slide states; if tissue is "
    "larger on the slide, that resolution is wrong: pass slide_mpp=."
)


@dataclass(frozen=True)
class Stained:
    """mask: bool (h, w); reason: why it is empty, "" if it is not; note: what was left out, "" if little was."""

    mask: np.ndarray
    reason: str = ""
    note: str = ""


def find_stained(rgb: np.ndarray, um: float) -> Stained:
    """The stained tissue of an image of um um/px, uint8 (h, w, 3)."""
    colours = _colours(rgb, um)
    if colours is None:
        return Stained(np.zeros(rgb.shape[:2], bool), DARK_FIELD)
    return _tissue_of(colours, um)


def doubt_colours(rgb: np.ndarray) -> str:
    """A sentence on colours that no stain has, of pictures of tissue (see is_swapped); "" if they may be one's."""
    px = rgb.reshape(-1, 3)
    if len(px) < LEAST_PX:
        return ""
    spread = px.std(0)
    if spread.min() < DEAD_SHARE * spread.max():
        return DEAD.format(("red", "green", "blue")[int(spread.argmin())])
    return SWAPPED if is_swapped(rgb) else ""


def is_swapped(rgb: np.ndarray) -> bool:
    """Do pictures of tissue, uint8 (n, h, w, 3) of about 1 um/px, look like H&E with red and blue exchanged?

    As of BGR taken for RGB. Nuclei are darker than what is around them and, being blue, absorb more red than blue
    beside it; swapped, they absorb less. Where the line is drawn, none of 84 slides of H&E looks so as it is, and 64
    do once they are swapped.
    """
    density = -np.log((rgb + np.float32(OFFSET)) / np.float32(DEFAULT_GLASS[0] + OFFSET))
    red, green, blue = (density[..., c] for c in range(3))
    stained = (green > 0.15) & (green > blue + 0.02) & (red <= 1.08 * green + 0.05)
    if np.count_nonzero(stained) < LEAST_PX:
        return False
    redness = np.where(stained, (red - blue) / np.maximum(green, 0.05), 0)
    share = _around(stained) + np.float32(1e-6)
    dark = (green - _around(green * stained) / share)[stained]
    redder = (redness - _around(redness) / share)[stained]
    return min(dark.std(), redder.std()) > 0.01 and float(np.corrcoef(dark, redder)[0, 1]) < LEAST_RUN


def _around(values: np.ndarray) -> np.ndarray:
    """Means of (n, h, w) over a square of two nuclei around each px."""
    return ndimage.uniform_filter(values.astype(np.float32), 17, axes=(1, 2))


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
    rgb = _whiten_fill(rgb, cell)
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


def _tissue_of(colours: _Colours, um: float) -> Stained:
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
    specks = tissue
    tissue = _drop_small(tissue, SPECK_MM2, cell_um)

    # Whole cells inside, single px along the rim: the outline is as fine as the mask.
    inside = ndimage.binary_erosion(tissue, border_value=1)
    rim = _dilate(tissue, 1)
    left_out, share = _left_out(density, rim, cell_um)
    rim &= ~marks
    mask = _spread(rim.view(np.uint8) + inside, colours.cell, colours.stained.shape) + colours.stained > 1
    if mask.any():
        return Stained(mask, note=_say_left_out(left_out, share))
    lowest, highest = _extremes(colours.means)
    if (highest - lowest).max() <= 1 and int(highest.max()) - int(lowest.min()) > 30:
        return Stained(mask, GREY)
    if marks.any():
        return Stained(mask, MARKS)
    if left_out > LEFT_OUT[1]:
        return Stained(mask, OTHER)
    return Stained(mask, SPECKS if specks.any() else BLANK)


def _left_out(density: np.ndarray, tissue: np.ndarray, cell_um: float) -> tuple[float, float]:
    """What is coloured or dark but not tissue: (mm2, share of all that is coloured or dark)."""
    most, spread = density.max(0), density.max(0) - density.min(0)
    coloured = (most > 0.2) | ((most > 0.1) & (spread > 0.08))
    missed = np.count_nonzero(coloured & ~tissue)
    return missed * (cell_um / 1000) ** 2, missed / max(1, np.count_nonzero(coloured))


def _say_left_out(mm2: float, share: float) -> str:
    if share < LEFT_OUT[0] or mm2 < LEFT_OUT[1]:
        return ""
    return (
        f"{share:.0%} of what is coloured or dark on the slide ({mm2:.1f} mm2) was left out as ink, dirt or another "
        f"stain; {MEANT}. Compare the overview."
    )


def _strips(rgb: np.ndarray, cell: int) -> Iterator[tuple[slice, tuple[Image.Image, ...]]]:
    """(rows, bands) of strips that are whole rows of cells, few enough to stay in the processor's cache."""
    step = cell * max(1, STRIP // cell)
    for top in range(0, len(rgb), step):
        yield slice(top, top + step), Image.fromarray(rgb[top : top + step]).split()


def _whiten_fill(rgb: np.ndarray, cell: int) -> np.ndarray:
    """White in place of the black, or dark grey, that was painted where nothing was scanned.

    Fill is one colour to the px and wide, or at the border; a bright slide has glass or tissue beside it, a dark field
    has not. Black pens are neither even nor, inside a slide, so wide.
    """
    means = np.stack([np.asarray(band.reduce(cell)) for band in Image.fromarray(rgb).split()], -1)
    lowest, highest = _extremes(means)
    dark = highest[highest <= DARK_FILL]
    if not len(dark):
        return rgb
    level = int(np.bincount(dark).argmax())
    seen = lowest[highest > level + 20]
    if not len(seen) or np.median(seen) < 80:
        return rgb
    painted = highest <= FILL if level <= FILL else (highest >= level - 2) & (highest <= level + 2)
    fill = _open(painted, 9) | _at_border(_open(painted, 4))
    if not fill.any():
        return rgb
    near = _spread(_dilate(fill, 2), cell, rgb.shape[:2])
    darkest, brightest = _extremes(rgb)
    black = near & (brightest <= level + 2 * FILL) & (darkest + np.uint8(2 * FILL) >= level)
    return np.where(black[..., None], np.uint8(255), rgb)


def _at_border(cells: np.ndarray) -> np.ndarray:
    """The components that touch the image's border."""
    labels = _label(cells)
    touching = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return np.isin(labels, touching[touching > 0])


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
    # Few px are left to be looked at for brown, of DAB, melanin or haemosiderin.
    where = np.flatnonzero(foreign)
    red, green, blue = (band.ravel()[where] for band in (red, green, blue))
    densities = [np.log(full / (np.arange(256, dtype=np.float32) + OFFSET)) for full in (red0, green0, blue0)]
    od_red, od_green, od_blue = (table[band] for table, band in zip(densities, (red, green, blue)))
    brown = (od_red > BROWN_RED[0] * od_green) & (od_red < BROWN_RED[1] * od_green)
    brown &= (od_blue > BROWN_BLUE[0] * od_green) & (od_blue < BROWN_BLUE[1] * od_green)
    stained.ravel()[where] = brown
    foreign.ravel()[where] = ~brown & ((od_blue <= 1.1 * od_green + 0.05) | (od_red >= od_green))
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
    beside = _dilate(cores, 250 / cell_um)
    labels = _label((foreign_share > MARK_SHARE / 2) | (tinted & beside) | cores)
    with_core = np.zeros(int(labels.max()) + 1, bool)
    with_core[labels[cores]] = True
    return _dilate(with_core[labels], 64 / cell_um)


def _darker(green: np.ndarray, mean: np.ndarray, cell: int) -> np.ndarray:
    """Px that absorb more green than the mean of their cell, bool (h, w): lines on pale ground."""
    return green < _spread(np.maximum(mean, 6) - np.uint8(6), cell, green.shape)


def _fat(darker_share: np.ndarray, stain: np.ndarray, tissue: np.ndarray, cell_um: float) -> np.ndarray:
    """Cells of fat: a net of thin membranes, so pale that only the mean over 0.16 mm shows that they are pink.

    Scratches and dust make sparser lines, and grey ones. Cells beside tissue do not count, as its rim would pass for
    fat, but what is less than 3 cells wide may itself be a membrane.
    """
    counted = 1 - _dilate(_open(tissue, 3), 1).astype(np.float32)
    span = max(1, round(160 / cell_um))
    weight = _summed(counted, span)
    stain_around = _summed(np.clip(stain, -0.05, 0.05) * counted, span)
    darker_around = _summed(darker_share * counted, span)
    fat = (counted > 0) & (weight > 0.1 * span**2) & (stain_around > 0.002 * weight) & (darker_around > 0.05 * weight)
    if not fat.any():
        return fat
    # A strand of tissue has such surroundings too, but they are narrow; nets of fat are not.
    return _drop_small(fat & _open(fat | tissue, 288 / cell_um), FAT_MM2, cell_um)


def _summed(cells: np.ndarray, span: int) -> np.ndarray:
    """Sum over the square of span cells around each, 0 beyond the border."""
    return ndimage.uniform_filter(cells, span, mode="constant") * span**2


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


def _dilate(cells: np.ndarray, reach: float) -> np.ndarray:
    """Grown by reach cells (at least 1) to every side, corners included."""
    return ndimage.maximum_filter(cells, 2 * max(1, round(reach)) + 1, mode="constant")


def _open(cells: np.ndarray, width: float) -> np.ndarray:
    """Only what a square of width cells fits into; squares may stick out over the border."""
    side = max(2, round(width))
    eroded = ndimage.minimum_filter(cells, side, mode="constant", cval=1)
    # An even window has no middle cell: mirrored, it grows back to where it was.
    return ndimage.maximum_filter(eroded, side, mode="constant", origin=side % 2 - 1) & cells


def _close(cells: np.ndarray, gap: float) -> np.ndarray:
    """Closed over gaps of gap cells, as if the tissue went on beyond the border."""
    rounds = max(1, round(gap / 2))
    padded = np.pad(cells, 2 * rounds, mode="symmetric")
    return ndimage.binary_closing(padded, iterations=rounds)[2 * rounds : -2 * rounds, 2 * rounds : -2 * rounds]


def _drop_small(cells: np.ndarray, mm2: float, cell_um: float) -> np.ndarray:
    """Without the components smaller than mm2."""
    labels = _label(cells)
    areas = np.bincount(labels.ravel()) * (cell_um / 1000) ** 2
    areas[0] = 0
    return (areas >= mm2)[labels]


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
