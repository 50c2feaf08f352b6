"""What the pages of a TIFF are: OpenSlide takes one of them for the slide, and not always the right one.

OpenSlide's generic reader takes the first page and every later one that is marked as reduced; the widest becomes level
0. A larger page that bears no mark is passed over, and a macro image that comes first is shown: it may show the label.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from sparsewsi.slides.refusals import CONVERT, SlideError

MOST_PAGES = 64  # more are no pyramid; a hostile file may have a million
PLACES = 4  # across and down, where two pages are compared
COMPARABLE = 0.05  # of the slide's area: macro and label images are larger than that of no slide that is meant
SIMILAR = 0.9  # correlation of px that show the same
FLAT = 2.0  # standard deviation of px that show nothing
OTHER_IMAGES = r"(?i)\b(label|macro|overview|thumb\w*|preview|barcode)\b"

Read = Callable[[tuple[int, int], tuple[int, int]], np.ndarray]  # ((x, y), (w, h)) of level 0 -> uint8 (h, w, 3)


@dataclass(frozen=True)
class Page:
    """One tiled page. numbers: of the TIFF's kinds (1 unsigned, 2 signed, 3 floating); extra: meanings of the channels
    behind the colours (0 none, 1 and 2 transparency)
    """

    index: int
    size: tuple[int, int]
    reduced: bool
    samples: int
    bits: int
    numbers: int
    extra: tuple[int, ...]
    compression: int
    orientation: int
    resolution: dict[str, str]  # as OpenSlide's properties would name it

    @property
    def area(self) -> int:
        return self.size[0] * self.size[1]


def read_pages(file: Path) -> list[Page]:
    """The tiled pages of a TIFF, without those below other pages. tifffile raises what it likes."""
    with _tiff(file) as tiff:
        return [_page(i, page) for i, page in _tiled(tiff)]


def check_pages(file: Path, pages: list[Page], size: tuple[int, int], description: str, read: Read) -> tuple[str, ...]:
    """Doubts about the page that OpenSlide took for level 0, which has `size` px.

    description: of the first page, where OME-XML names the images; read: px of level 0
    Raises SlideError if the page may be another image than the slide.
    """
    taken = find_level0(pages, size)
    if taken is None:
        return ()
    names = _ome_names(description)
    if names and re.search(OTHER_IMAGES, names[0]) and taken.index == 0:
        raise SlideError(
            "The first image of this OME-TIFF is its macro or label image, and OpenSlide would show that alone; "
            f"{CONVERT}."
        )
    larger = [page for page in pages if page.area > taken.area]
    if larger:
        most = max(larger, key=lambda page: page.area)
        sizes = f"{size[0]} x {size[1]} px, but holds another of {most.size[0]} x {most.size[1]} px"
        if not _shows_the_same(file, most, size, read):
            raise SlideError(
                f"The TIFF begins with an image of {sizes}: OpenSlide would show the first, which may be a macro or "
                f"label image; {CONVERT}, with the slide itself first."
            )
        return (
            f"The TIFF begins with a reduced image: OpenSlide reads {sizes}, which it passes over. The slide is read "
            "at the lower resolution; write its full image first to use it.",
        )
    others = [page for page in pages if page.size != size and page.area >= COMPARABLE * taken.area and not page.reduced]
    if others and not any(names):  # OME-XML has said what they are
        most = max(others, key=lambda page: page.area)
        sizes = f"{size[0]} x {size[1]} px and {most.size[0]} x {most.size[1]} px"
        levels = [page for page in pages if page.reduced and page.index != taken.index]
        if not any(_differ(page, taken) <= _differ(page, most) for page in levels):
            raise SlideError(
                f"The TIFF holds two images, of {sizes}, and does not say which is the slide: the first may be its "
                f"label or macro image, so neither is shown; {CONVERT}, with the slide alone."
            )
        return (f"The TIFF holds several images, of {sizes}; the first alone is read: see that it is the slide.",)
    same = [page for page in pages if page.size == size and page.index != taken.index and not page.reduced]
    if same:
        return (
            f"The TIFF holds {1 + len(same)} images of {size[0]} x {size[1]} px, such as focus planes, channels or "
            "stains; the first alone is read.",
        )
    return ()


def find_level0(pages: list[Page], size: tuple[int, int]) -> Page | None:
    """The page that OpenSlide's generic reader takes for level 0."""
    return next((page for page in pages if page.size == size and (page.index == 0 or page.reduced)), None)


def _differ(one: Page, other: Page) -> float:
    """By how much the shapes of two pages differ."""
    return abs(math.log(one.size[0] * other.size[1] / (one.size[1] * other.size[0])))


def _tiff(file: Path) -> tifffile.TiffFile:
    return tifffile.TiffFile(file, name="slide")  # a name of our own: tifffile's messages would hold the file's


def _tiled(tiff: tifffile.TiffFile) -> Iterator[tuple[int, tifffile.TiffPage]]:
    for i, page in enumerate(itertools.islice(tiff.pages, MOST_PAGES)):
        if isinstance(page, tifffile.TiffPage) and page.is_tiled:
            yield i, page


def _page(index: int, page: tifffile.TiffPage) -> Page:
    def tag(code: int, default: Any) -> Any:
        found = page.tags.get(code)
        return default if found is None else found.value

    resolution = {}
    unit = {2: "inch", 3: "centimeter"}.get(int(tag(296, 2)))
    for code, key in ((282, "tiff.XResolution"), (283, "tiff.YResolution")):
        top, bottom = tag(code, (0, 1))
        if unit and top and bottom:
            resolution |= {key: repr(top / bottom), "tiff.ResolutionUnit": unit}
    return Page(
        index=index,
        size=(page.imagewidth, page.imagelength),
        reduced=bool(page.subfiletype & 1),
        samples=page.samplesperpixel,
        bits=int(np.max(page.bitspersample)),
        numbers=int(np.max(tag(339, 1))),
        extra=(*map(int, page.extrasamples),),
        compression=int(page.compression),
        orientation=int(tag(274, 1)),
        resolution=resolution,
    )


def _ome_names(description: str) -> list[str]:
    """Names of the images of an OME-TIFF in the order of the file; "" for one without."""
    if "openmicroscopy.org" not in description:
        return []
    images = re.findall(r"<(?:\w+:)?Image\b[^>]*>", description)
    return [(re.findall(r'\bName="([^"]*)"', image) or [""])[0].replace("_", " ") for image in images]


def _shows_the_same(file: Path, page: Page, size: tuple[int, int], read: Read) -> bool:
    """Does level 0, of `size` px, show a larger page reduced? False as well where both show too little to tell."""
    ratio = page.size[0] / size[0]
    if abs(page.size[1] / size[1] / ratio - 1) > 0.02:
        return False
    pairs = []
    with _tiff(file) as tiff:
        found = next(tiled for i, tiled in _tiled(tiff) if i == page.index)
        for x, y, pixels in _tiles(found):
            width, height = (max(1, round(side / ratio)) for side in pixels.shape[1::-1])
            theirs = read((round(x / ratio), round(y / ratio)), (width, height))
            pairs.append((_reduce(pixels, 8), _reduce(theirs, 8)))
    if not pairs:
        return False
    one, other = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    return min(one.std(), other.std()) > FLAT and float(np.corrcoef(one, other)[0, 1]) > SIMILAR


def _tiles(page: tifffile.TiffPage) -> Iterator[tuple[int, int, np.ndarray]]:
    """(x, y, px) of PLACES x PLACES whole tiles spread over a page."""
    width, height = page.tilewidth, page.tilelength
    columns, rows = -(-page.imagewidth // width), page.imagelength // height
    inner = page.imagewidth // width
    tables = {} if page.jpegtables is None else {"jpegtables": page.jpegtables}
    for row in sorted({(2 * i + 1) * rows // (2 * PLACES) for i in range(PLACES)}):
        for column in sorted({(2 * i + 1) * inner // (2 * PLACES) for i in range(PLACES)}):
            number = row * columns + column
            page.parent.filehandle.seek(page.dataoffsets[number])
            data = page.parent.filehandle.read(page.databytecounts[number])
            pixels = page.decode(data, number, **tables)[0]
            if pixels is not None and pixels[0].shape == (height, width, 3) and pixels.dtype == np.uint8:
                yield column * width, row * height, pixels[0]


def _reduce(pixels: np.ndarray, side: int) -> np.ndarray:
    """Grey means of side x side parts of uint8 (h, w, 3): float (side, side)."""
    return np.asarray(Image.fromarray(pixels).convert("L").resize((side, side), Image.Resampling.BOX), float)
