"""What holds the px of a slide: a file that OpenSlide reads, or a PNG or JPEG. Frames: level px throughout.

This is the only module that knows OpenSlide. Label and macro images are never opened: they may show a patient's name.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import openslide
from PIL import Image, ImageOps

from sparsewsi.slides.levels import compare_roughly, measure_downsamples, true_size
from sparsewsi.slides.pages import Page, check_pages, find_level0, read_pages
from sparsewsi.slides.refusals import CONVERT, DAMAGED, DAMAGED_IMAGE, DAMAGED_JPEG, SlideError, quote_reason
from sparsewsi.slides.tiff import EndsEarly, TiffTiles, decode_jpeg

# Largest region of one level decoded in one go: 8 MB of RGBA; larger ones are no faster.
BLOCK = (2048, 1024)
# OpenSlide's default of 32 MB is less than one row of tiles of a slide 40,000 px wide, and a row is read twice.
CACHE_BYTES = 64 << 20
# Formats that may be plain grids of tiles, read without OpenSlide where a few of these tiles agree with it: corners of
# tiles as fractions of a level's width and height.
TIFF_VENDORS = ("aperio", "generic-tiff")
CHECKED_AT = ((0.0, 0.0), (0.5, 0.5), (0.3, 0.7), (0.8, 0.2))
SPOTS = 5  # across and down, where px are looked at for what a TIFF says about them
SPOT = 32  # px
LARGEST_TILE = 1 << 24  # px

# What to do with px by the EXIF tag of their orientation.
TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda px: px,
    2: lambda px: px[:, ::-1],
    3: lambda px: px[::-1, ::-1],
    4: lambda px: px[::-1],
    5: lambda px: px.transpose(1, 0, 2),
    6: lambda px: np.rot90(px, -1),
    7: lambda px: px.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda px: np.rot90(px),
}

TOO_DEEP = "The image holds 16 or 32 bits per channel; save it as 8-bit RGB, scaled to the full range."


class Source(Protocol):
    """vendor: OpenSlide's name of the format, or "png" | "jpeg"; properties as OpenSlide names them
    level_sizes: (w, h) of every level, finest first; level_downsamples: level-0 px per px of every level
    doubts: sentences on what is doubtful in how the file holds its px
    """

    vendor: str
    properties: dict[str, str]
    level_sizes: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    doubts: tuple[str, ...]

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
        """uint8 (h, w, 3) of one level, xy in level px, white where there is nothing. Raises SlideError for damage.

        out: where the px may go; it is returned if they went there
        """
        ...

    def close(self) -> None: ...


def open_source(file: Path, head: bytes) -> Source | None:
    """What OpenSlide reads, or a PNG or JPEG; None for anything else. head: the first bytes of the file.

    Raises SlideError if the file is one of these, but damaged or not to be read right.
    """
    if file.suffix.lower() == ".vsi":
        raise SlideError(f"A .vsi file holds the label and an overview; its px lie in .ets files beside it; {CONVERT}.")
    try:
        return OpenSlideSource(file)
    except openslide.OpenSlideUnsupportedFormatError:
        if not is_image(head) or file.suffix.lower() == ".mrxs":
            return None
    except openslide.OpenSlideError as error:
        raise SlideError(
            f"OpenSlide knows the format but cannot open the slide{quote_reason(str(error))}; it is damaged, or "
            f"{CONVERT}."
        ) from None
    except SlideError:
        raise
    except (OSError, ValueError):
        raise SlideError("OpenSlide cannot open the file.") from None
    return ImageSource(file, head)


def is_image(head: bytes) -> bool:
    """Do the first bytes of a file say PNG or JPEG?"""
    return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))


class OpenSlideSource:
    """What OpenSlide reads; levels that are plain grids of tiles are read by TiffTiles once a few tiles agreed."""

    def __init__(self, file: Path):
        self._file = file
        self._slide = self._open()
        try:
            self._look_around()
        except BaseException:
            self._slide.close()
            raise
        self._tiles: TiffTiles | None = None
        self._agrees: dict[int, bool] = {}  # level -> TiffTiles gives OpenSlide's px
        self._verdicts: dict[tuple[int, int], SlideError | None] = {}  # (level, tile) without an end: what is wrong
        self._lock = threading.Lock()

    def _look_around(self) -> None:
        """Find out what the levels are, and whether OpenSlide shows them as they are meant."""
        self.properties = dict(self._slide.properties)
        self.vendor = self.properties.get("openslide.vendor", "unknown")
        sizes, own = self._slide.level_dimensions, self._slide.level_downsamples
        self._levels, self._stated, self._own_downsamples = tuple(range(len(sizes))), sizes, own
        doubts, suspects = (), set()
        if self.vendor in TIFF_VENDORS:
            doubts, suspects = self._look_at_pages()
        found, more = measure_downsamples(sizes, self._read_cheaply, suspects)
        if None in found:  # it may be the level before it that shows something else
            found, more = measure_downsamples(sizes, self._read_cheaply, range(1, len(sizes)))
        found, holes = compare_roughly(sizes, found, self._read_cheaply)
        more = [*more, *holes]
        kept = [level for level, scale in enumerate(found) if scale is not None]
        self._levels = tuple(kept)
        self._stated, self._own_downsamples = tuple(sizes[i] for i in kept), tuple(own[i] for i in kept)
        self.level_downsamples = tuple(scale for scale in found if scale is not None)
        self.level_sizes = tuple(true_size(sizes[0], sizes[i], found[i] or 1.0) for i in kept)
        self.doubts = (*doubts, *more)

    def _look_at_pages(self) -> tuple[tuple[str, ...], set[int]]:
        """(doubts, levels that may show another image)."""
        # A label or macro image stands behind the levels, or among them.
        suspects = {len(self._stated) - 1} - {0}
        try:
            pages = read_pages(self._file)
        except Exception:  # tifffile raises many types; what OpenSlide opened is then read as it is
            return (), suspects
        size = self._stated[0]
        areas = [page.area for page in pages if page.size in self._stated]
        if areas != sorted(areas, reverse=True):
            suspects = set(range(1, len(self._stated)))
        taken = next((page for page in pages if page.size == size), None)
        if taken is not None:
            self._check_px(taken)
        if self.vendor != "generic-tiff":
            return _say_rotated(taken), suspects
        description = self.properties.get("tiff.ImageDescription", "")
        doubts = check_pages(self._file, pages, size, description, lambda xy, part: self._read_openslide(0, xy, part))
        level0 = find_level0(pages, size)
        if level0 is not None and level0.index:  # OpenSlide tells the first page's resolution
            for key in ("openslide.mpp-x", "openslide.mpp-y", "tiff.XResolution", "tiff.YResolution"):
                self.properties.pop(key, None)
            self.properties |= level0.resolution
        return (*doubts, *_say_rotated(taken)), suspects

    def _check_px(self, page: Page) -> None:
        """Raise SlideError if OpenSlide would show other colours than the page holds."""
        if page.orientation != 1 and page.compression not in (7, 33003, 33005):
            raise SlideError(f"The TIFF says that its px are stored turned or mirrored, which is not read; {CONVERT}.")
        if page.numbers != 1 or page.bits > 16:
            raise SlideError("The TIFF holds signed, floating or 32-bit numbers; save it as 8-bit RGB.")
        if page.bits <= 8 and page.samples < 4:
            return
        spots = list(self._read_spots())
        alpha = np.concatenate([spot[..., 3].ravel() for spot in spots]) if page.samples > 3 and spots else None
        if alpha is not None and (
            not alpha.any() or (page.extra[:1] in ((), (0,)) and ((alpha > 0) & (alpha < 255)).any())
        ):
            what = "zeros" if not alpha.any() else "no colour"
            raise SlideError(
                f"The TIFF has a fourth channel of {what}, which would be read as transparency; save it with three "
                "channels (RGB), e.g. vips extract_band IN.tif OUT.tif 0 --n 3."
            )
        brightest = max((int(spot[..., :3].max()) for spot in spots), default=255)
        if page.bits > 8 and brightest < 128:
            raise SlideError(
                f"The TIFF holds {page.bits} bits a channel but uses only the lower of them, so that it would be read "
                "as nearly black; save it as 8-bit RGB, scaled to the full range."
            )

    def _read_cheaply(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        """_read_openslide, but not of a level whose tiles are so large that opening the slide would be felt."""
        tile = [int(self.properties.get(f"openslide.level[{level}].tile-{side}", 0)) for side in ("width", "height")]
        if tile[0] * tile[1] > LARGEST_TILE:
            raise SlideError("The tiles are too large to be compared.")
        return self._read_openslide(level, xy, size)

    def _read_spots(self) -> Iterator[np.ndarray]:
        """RGBA of small parts of level 0, spread over it: uint8 (h, w, 4)."""
        width, height = self._stated[0]
        for row in range(SPOTS):
            for column in range(SPOTS):
                corner = (width * (2 * column + 1) // (2 * SPOTS), height * (2 * row + 1) // (2 * SPOTS))
                try:
                    yield np.asarray(self._slide.read_region(corner, 0, (SPOT, SPOT)))
                except openslide.OpenSlideError:
                    self._slide = self._open()

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
        pixels = self._read_stated(level, xy, size, out)
        if self.level_sizes[level] != self._stated[level]:  # what lies beyond the slide is padding
            right, bottom = (max(0, side - start) for side, start in zip(self.level_sizes[level], xy))
            pixels = pixels.copy()
            pixels[bottom:], pixels[:, right:] = 255, 255
        return pixels

    def _read_stated(
        self, level: int, xy: tuple[int, int], size: tuple[int, int], out: np.ndarray | None
    ) -> np.ndarray:
        tiles = self._direct(level)
        if tiles is not None:
            try:
                return tiles.read(level, xy, size, out)
            except EndsEarly as damage:
                self._ask_openslide(level, damage)
            except Exception:  # decoders raise what they like: OpenSlide has the last word
                pass
        return self._read_openslide(level, xy, size)

    def _ask_openslide(self, level: int, damage: EndsEarly) -> None:
        """Raise SlideError if OpenSlide does not read a tile either that has no end, or fills up its end."""
        key = (level, damage.tile)
        if key not in self._verdicts:
            try:
                self._verdicts[key] = self._judge(level, damage)
            except SlideError as error:
                self._verdicts[key] = error
        verdict = self._verdicts[key]
        if verdict is not None:
            raise SlideError(*verdict.args)

    def _judge(self, level: int, damage: EndsEarly) -> SlideError | None:
        x0, y0, x1, y1 = damage.box
        px = self._read_openslide(level, (x0, y0), (x1 - x0, y1 - y0)).astype(np.int16)
        # A decoder takes filler for data and repeats one block to the end without a word.
        last, before = px[-16:, -16:], px[-16:, -32:-16]
        repeats = last.shape == before.shape and (last - before).std() < 1.5
        return SlideError(DAMAGED.format("")) if damage.filled and repeats and px.std() > 1.5 else None

    def close(self) -> None:
        self._slide.close()
        if self._tiles is not None:
            self._tiles.close()

    def _open(self) -> openslide.OpenSlide:
        slide = openslide.OpenSlide(self._file)
        slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        return slide

    def _read_openslide(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        if size[0] > BLOCK[0] or size[1] > BLOCK[1]:
            out = np.empty((size[1], size[0], 3), np.uint8)
            for (left, top), part, here in split(size, BLOCK):
                out[here] = self._read_openslide(level, (xy[0] + left, xy[1] + top), part)
            return out
        # OpenSlide takes the corner in level 0 and divides it by its own downsample; undo exactly that.
        own, number = self._own_downsamples[level], self._levels[level]
        corner = (round(xy[0] * own), round(xy[1] * own))
        try:
            region = self._slide.read_region(corner, number, size)
        except openslide.OpenSlideError:
            # A handle that failed once fails for ever, and for all threads: the damage may lie elsewhere.
            try:
                fresh = self._open()
                region = fresh.read_region(corner, number, size)
                self._slide = fresh
            except openslide.OpenSlideError as error:
                self._slide = self._open()
                raise SlideError(DAMAGED.format(quote_reason(str(error)))) from None
        return _lay_on_white(region)

    def _direct(self, level: int) -> TiffTiles | None:
        """TiffTiles if this level is to be read with it."""
        if level in self._agrees:
            return self._tiles if self._agrees[level] else None
        with self._lock:
            if level not in self._agrees:
                self._agrees[level] = self._find_out(level)
        return self._tiles if self._agrees[level] else None

    def _find_out(self, level: int) -> bool:
        if self.vendor not in TIFF_VENDORS or not hasattr(os, "pread"):
            return False
        try:
            if self._tiles is None:
                self._tiles = TiffTiles(self._file, self._stated)
            compared = [self._compare(self._tiles, level, place) for place in CHECKED_AT]
        except Exception:  # tifffile and decoders raise many types; OpenSlide then reads the slide
            return False
        return all(compared)

    def _compare(self, tiles: TiffTiles, level: int, place: tuple[float, float]) -> bool:
        """Does the tile at this place hold what OpenSlide gives?"""
        (width, height), tile = self._stated[level], tiles.tile_size(level)
        x, y = (int(part * side / step) * step for part, side, step in zip(place, (width, height), tile))
        size = (min(tile[0], width - x), min(tile[1], height - y))
        direct, wanted = tiles.read(level, (x, y), size), self._read_openslide(level, (x, y), size)
        if np.array_equal(direct, wanted):
            return True
        # Between two px OpenSlide blends them, up to half a level-0 px; only elsewhere the two can be equal.
        own = self._own_downsamples[level]
        on_px = all(round(v * own) / own == v for v in (x, y))
        return not on_px and float(np.abs(direct.astype(np.int16) - wanted).mean()) < 8


class ImageSource:
    """A PNG or JPEG, decoded when first read and kept: 3 bytes per px."""

    def __init__(self, file: Path, head: bytes):
        limit = Image.MAX_IMAGE_PIXELS
        try:
            with warnings.catch_warnings():
                # Pillow warns from its limit on and refuses from twice the limit on; the refusal is enough here.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                self._image = Image.open(file, formats=("PNG", "JPEG", "MPO"))
        except Image.DecompressionBombError:
            most = 2 * limit / 1e6 if limit else 0.0
            raise SlideError(
                f"The image has more than the {most:.0f} million px that are safe to decode; {CONVERT}."
            ) from None
        except (OSError, ValueError, SyntaxError):
            raise SlideError(DAMAGED_IMAGE) from None
        self._deep = head.startswith(b"\x89PNG") and head[24:25] == b"\x10"  # Pillow keeps the upper 8 of 16 bits
        if self._image.mode.startswith(("I", "F")):
            raise SlideError(TOO_DEEP)
        self._pixels: np.ndarray | None = None
        self._lock = threading.Lock()
        self.vendor = "png" if self._image.format == "PNG" else "jpeg"
        self.properties: dict[str, str] = {}
        # Of a PNG without EXIF Pillow would decode everything to find that out.
        exif = self._image.getexif() if self.vendor == "jpeg" or b"eXIf" in head else {}
        self._turned = turned if (turned := exif.get(274, 1)) in TURNED else 1
        width, height = self._image.size
        self.level_sizes = ((height, width),) if self._turned in (5, 6, 7, 8) else ((width, height),)
        self.level_downsamples = (1.0,)
        self.doubts: tuple[str, ...] = ()
        if self._turned != 1:
            self.doubts = (
                "The image is turned or mirrored as its EXIF tag says; positions count in the picture as shown.",
            )

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
        pixels = self._decode()
        (x, y), (width, height) = xy, size
        out = np.full((height, width, 3), 255, np.uint8)
        part = pixels[max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)]
        top, left = max(0, -y), max(0, -x)
        out[top : top + part.shape[0], left : left + part.shape[1]] = part
        return out

    def _decode(self) -> np.ndarray:
        with self._lock:
            if self._pixels is None:
                try:
                    self._pixels = self._decode_rgb()
                except SlideError:
                    raise
                except (OSError, ValueError, SyntaxError):
                    raise SlideError(DAMAGED_IMAGE) from None
                self._image.close()
            return self._pixels

    def _decode_jpeg(self) -> np.ndarray:
        """Px as they are stored."""
        assert self._image.fp is not None
        self._image.fp.seek(0)
        try:
            return decode_jpeg(self._image.fp.read())
        except ValueError as error:
            raise SlideError(DAMAGED_JPEG if str(error).startswith("Corrupt") else DAMAGED_IMAGE) from None

    def _decode_rgb(self) -> np.ndarray:
        if self.vendor == "jpeg" and self._image.mode in ("RGB", "L"):
            return TURNED[self._turned](self._decode_jpeg())
        image = ImageOps.exif_transpose(self._image) if self._turned != 1 else self._image
        if not image.has_transparency_data:
            rgb = np.asarray(image.convert("RGB"))
            if self._deep and rgb.max(initial=0) < 128:
                raise SlideError(TOO_DEEP)
            return rgb
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[1] == 0:  # a fourth channel of zeros, not a picture of nothing
            return np.asarray(image)[..., :3].copy()
        return _lay_on_white(image)

    def close(self) -> None:
        self._image.close()
        self._pixels = None


def split(
    size: tuple[int, int], block: tuple[int, ...]
) -> Iterator[tuple[tuple[int, int], tuple[int, int], tuple[slice, slice]]]:
    """A region of size = (w, h) in parts of at most a block: corner (x, y), (w, h), and where it lies in an array."""
    for top in range(0, size[1], block[1]):
        for left in range(0, size[0], block[0]):
            width, height = min(block[0], size[0] - left), min(block[1], size[1] - top)
            yield (left, top), (width, height), (slice(top, top + height), slice(left, left + width))


def _say_rotated(page: Page | None) -> tuple[str, ...]:
    if page is None or page.orientation == 1:
        return ()
    return ("The TIFF says that it is to be shown turned or mirrored; it is read as it is stored.",)


def _lay_on_white(region: Image.Image) -> np.ndarray:
    """RGBA image -> uint8 (h, w, 3) on white."""
    alpha = region.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return np.asarray(region.convert("RGB"))
    white = Image.new("RGB", region.size, (255, 255, 255))
    white.paste(region, mask=alpha)
    return np.asarray(white)
