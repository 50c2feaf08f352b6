"""Where the kept patches lie on the slide, and the patches themselves, as pictures.

N patches, K kept. Frames: level-0 px, px of the thumbnail (xy_thumb), px of the picture drawn (a small thumbnail is
enlarged first).
"""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparsewsi.bags.bag import Bag, list_parts, locate, number_slides, own_coords
from sparsewsi.model.selection import Selection
from sparsewsi.slides.slide import Slide

WHITE = 220  # of 255, above which all three colours of glass lie; viewer/strip.js has the same
LEAST_SIDE = 1000  # px: smaller thumbnails are enlarged, or the rank numbers would cover them
# Yellow in a dark casing: seen on pink, on purple, on white and on the black of fluorescence, by luminance alone.
BOX, CASING, INK = (255, 225, 25), (15, 15, 20), (255, 255, 255)


def _font(size: float) -> ImageFont.FreeTypeFont:
    """The sans serif that ships with matplotlib (Pillow's own has no µ); found without importing matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None, "matplotlib is in the base install"
    assert spec.origin is not None, "matplotlib is a package with a file"
    return ImageFont.truetype(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)


# ---- on the slide ----


def draw_overlay(
    thumbnail: np.ndarray, scale: float, bag: Bag, selection: Selection, number: int = 0, larger: float = 1
) -> Image.Image:
    """The thumbnail with a box around every kept patch, its rank in it, and a scale bar if mpp is known.

    thumbnail: uint8 (h, w, 3);  scale: level-0 px per thumbnail px;  number: of the slide, where the bag is of several
    larger: how many times as large lines and numbers are, for a picture that will be shown smaller
    Patches too small to be seen get a box of a least size around their centre; numbers that would cover each other are
    moved aside and tied to their box by a line.
    """
    picture, scale = _at_least(thumbnail, scale)
    draw = ImageDraw.Draw(picture)
    unit = larger * max(picture.size) / LEAST_SIDE
    font = _font(23 * unit)
    best_first = _of_slide(bag, selection, number)
    ranks = selection.ranks[best_first].tolist()
    boxes = [_box(bag, index, scale, 20 * unit) for index in selection.indices[best_first].tolist()]
    for left, top, right, bottom in reversed(boxes):  # the best is drawn last, on top
        draw.rectangle((left, top, right, bottom), outline=CASING, width=round(5 * unit))
        inset = round(1.5 * unit)
        draw.rectangle((left + inset, top + inset, right - inset, bottom - inset), outline=BOX, width=round(2.5 * unit))
    extents = [draw.textbbox((0, 0), f"{rank}", font, "mm", stroke_width=2 * unit) for rank in ranks]
    places = place_labels(boxes, extents, picture.size)
    for box, (x, y) in zip(boxes, places):
        if _nearest(box, x, y) != (x, y):
            draw.line((*_nearest(box, x, y), x, y), fill=CASING, width=max(1, round(1.5 * unit)))
    for rank, (x, y) in zip(ranks, places):
        draw.text((x, y), f"{rank}", INK, font, "mm", stroke_width=2 * unit, stroke_fill=CASING)
    if mpp := list_parts(bag)[number].slide_mpp:
        _scale_bar(draw, picture.size, mpp * scale, font, unit)
    return picture


def _of_slide(bag: Bag, selection: Selection, number: int) -> list[int]:
    """Places in selection.indices of the kept patches of one of the bag's slides, best first."""
    numbers = number_slides(bag)[selection.indices].tolist()
    return [place for place in selection.best_first.tolist() if numbers[place] == number]


def draw_canvas(bag: Bag, max_side: int = 1400, number: int = 0) -> tuple[np.ndarray, float]:
    """Stands in for the thumbnail of a bag whose slide is not at hand: its patches as grey squares on white.

    number: of the slide, where the bag is of several
    Returns (uint8 (h, w, 3), level-0 px per px). Without slide_size the canvas ends at the last patch.
    """
    part, coords = list_parts(bag)[number], own_coords(bag)[number_slides(bag) == number].numpy()
    size = part.slide_size
    if size is None:
        corner = coords.max(0) if len(coords) else np.zeros(2, int)
        size = (int(corner[0]) + part.patch_size, int(corner[1]) + part.patch_size)
    scale = max(size) / max_side
    picture = Image.new("RGB", (max(1, math.ceil(size[0] / scale)), max(1, math.ceil(size[1] / scale))), "white")
    draw = ImageDraw.Draw(picture)
    for x, y in coords / scale:
        side = part.patch_size / scale
        draw.rectangle((x, y, x + side - 1, y + side - 1), fill=(222, 214, 224))
    return np.asarray(picture), scale


def count_columns(pictures: int) -> int:
    """How many stand in a row of lay_side_by_side."""
    return math.ceil(math.sqrt(pictures))


def lay_side_by_side(pictures: Sequence[Image.Image], max_side: int) -> Image.Image:
    """The slides of a case as one picture, each with its number; one slide's is returned as it is."""
    if len(pictures) == 1:
        return pictures[0]
    columns = count_columns(len(pictures))
    side, font = max_side // columns, _font(max_side / columns / 24)
    head, rows = round(1.4 * font.size), math.ceil(len(pictures) / columns)
    small = [picture.copy() for picture in pictures]
    for picture in small:
        picture.thumbnail((side - 8, side - 8))
    heights = [max(p.height for p in small[row * columns : (row + 1) * columns]) + head + 8 for row in range(rows)]
    sheet = Image.new("RGB", (columns * side, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(small):
        row, column = divmod(number, columns)
        x, y = column * side + 4, sum(heights[:row]) + 4
        draw.text((x, y), f"Slide {number + 1}", CASING, font)
        sheet.paste(picture, (x, y + head))
    return sheet


def cut_patches(slide: Slide, bag: Bag, selection: Selection, number: int = 0) -> list[np.ndarray]:
    """The kept patches as they were encoded, best first: uint8 (p, p, 3) each.

    number: of the slide, where the bag is of several: its patches alone
    """
    assert bag.mpp is not None, "a bag made from a slide knows its mpp"
    found = []
    for index in selection.indices[_of_slide(bag, selection, number)].tolist():
        at = locate(bag, index)
        side = round(at.patch_size * slide.require_mpp() / bag.mpp)  # px at bag.mpp
        found.append(slide.read((at.x, at.y), (side, side), bag.mpp))
    return found


def tell_blank(bag: Bag, index: int, patch: np.ndarray) -> str:
    """What a patch that is hardly tissue shows instead, "" of others. patch: its px, uint8 (p, p, 3)"""
    at = locate(bag, index)
    size = list_parts(bag)[at.number].slide_size or (math.inf, math.inf)
    on = [max(0, min(start + at.patch_size, end) - max(start, 0)) for start, end in zip((at.x, at.y), size)]
    if on[0] * on[1] < at.patch_size**2 / 2:
        return "mostly beyond the scan"
    return "mostly white: glass, a gap or fat" if (patch.min(-1) > WHITE).mean() > 0.5 else ""


def _at_least(thumbnail: np.ndarray, scale: float) -> tuple[Image.Image, float]:
    """The thumbnail as a picture of at least LEAST_SIDE px, with its scale."""
    picture = Image.fromarray(thumbnail)
    factor = math.ceil(LEAST_SIDE / max(picture.size))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    return picture, scale / factor


def _box(bag: Bag, index: int, scale: float, least: float) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a patch in picture px, at least `least` px wide."""
    at = locate(bag, index)
    side = at.patch_size / scale
    x, y = (v / scale + side / 2 for v in (at.x, at.y))
    half = max(side, least) / 2
    return x - half, y - half, x + half, y + half


Rectangle = tuple[float, float, float, float]  # left, top, right, bottom


def place_labels(boxes: list[Rectangle], extents: list[Rectangle], size: tuple[float, float]) -> list[tuple]:
    """Centres of the boxes' labels: in the middle of a box that is larger than its label, else as near as is free.

    extents: the labels' rectangles about their centre;  size: of the picture, which labels do not leave
    """
    taken: list[Rectangle] = []
    places = []
    for (left, top, right, bottom), (west, north, east, south) in zip(boxes, extents):
        x0, y0, step = (left + right) / 2, (top + bottom) / 2, (south - north) / 3
        roomy = right - left > 1.2 * (east - west) and bottom - top > 1.2 * (south - north)
        blocked = taken if roomy else taken + boxes
        tries = [(0.0, 0.0)] if roomy else []  # then a spiral outwards: 16 directions, upper right first
        tries += [
            (ring * step * math.cos(turn * math.pi / 8 - 0.8), ring * step * math.sin(turn * math.pi / 8 - 0.8))
            for ring in range(2, 40)
            for turn in range(16)
        ]
        for dx, dy in tries:
            x = min(max(x0 + dx, -west), size[0] - east)
            y = min(max(y0 + dy, -north), size[1] - south)
            spot = (x + west, y + north, x + east, y + south)
            if not any(overlap(spot, other) for other in blocked):
                break
        else:
            x, y = x0, y0  # nowhere free: better on top of another number than far from its patch
            spot = (x + west, y + north, x + east, y + south)
        taken.append(spot)
        places.append((x, y))
    return places


def overlap(one: Rectangle, other: Rectangle) -> bool:
    """Whether two rectangles share more than an edge."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _nearest(box: Rectangle, x: float, y: float) -> tuple[float, float]:
    """The point of a box that is nearest to (x, y)."""
    return min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])


def _scale_bar(draw: ImageDraw.ImageDraw, size: tuple[int, int], um_per_px: float, font, unit: float) -> None:
    """A bar of 1, 2 or 5 times a power of ten um, about a sixth of the picture long, at the lower left."""
    length_um = round_length(size[0] * um_per_px / 6)
    text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    left, bottom = 20 * unit, size[1] - 20 * unit
    right = left + length_um / um_per_px
    draw.rectangle((left - 2 * unit, bottom - 8 * unit, right + 2 * unit, bottom + 2 * unit), fill=INK)
    draw.rectangle((left, bottom - 6 * unit, right, bottom), fill=CASING)
    place = ((left + right) / 2, bottom - 13 * unit)
    draw.text(place, text, CASING, font, "mb", stroke_width=round(3 * unit), stroke_fill=INK)


def round_length(most: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is no larger than `most`."""
    power = 10.0 ** math.floor(math.log10(most))
    return next(power * step for step in (5, 2, 1) if power * step <= most * (1 + 1e-9))
