"""Open a whole-slide image and read any region of it at any resolution.

Frames and units used here and in tissue.py:
    level 0   px of the finest level, origin at the top-left corner of the slide; written xy_level0
    level px  px of one level of the pyramid; level px * downsample = level-0 px
    mpp       um per px; read(..., mpp) returns px of exactly that size, whatever the levels are

This is the only module that knows OpenSlide. Label and macro images are never opened: they may show a patient's name.
For the same reason no message and no Slide.name holds a path or a file name: the caller knows what was asked for, and a
log or a shared page does not learn it.
"""

import functools
import hashlib
import json
import math
import os
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openslide
from PIL import Image

from sparsewsi.slides.tiff import TiffTiles

# A TIFF resolution outside this range is a writer's default (72, 96, 300 dpi are 353, 265, 85 um/px), not a scan's.
PLAUSIBLE_MPP = (0.05, 32.0)
# Beyond this factor a patch would show an encoder blur that no microscope at that resolution shows.
MAX_UPSAMPLING = 2.0
# Largest region of one level decoded in one go: 8 MB of RGBA; larger ones are no faster.
BLOCK = (2048, 1024)
# OpenSlide's default of 32 MB is less than one row of tiles of a slide 40,000 px wide, and a row is read twice.
CACHE_BYTES = 64 << 20
# Formats that may be plain grids of tiles, read without OpenSlide where a few of these tiles agree with it: corners of
# tiles as fractions of a level's width and height.
TIFF_VENDORS = ("aperio", "generic-tiff")
CHECKED_AT = ((0.0, 0.0), (0.5, 0.5), (0.3, 0.7), (0.8, 0.2))

DAMAGED = "Reading the slide failed{}; the file is damaged or cut short, copy it again."
CONVERT = "convert it to a pyramidal TIFF, e.g. vips tiffsave IN OUT.tiff --tile --pyramid --compression jpeg"


class SlideError(ValueError):
    """A slide that cannot be opened, read or used as asked; the message is one sentence for people."""


class Slide:
    """One open slide; a context manager. Threads may share it; it cannot be pickled or copied (it holds an open file).

    name               shown to people: "phantom 7" or "slide 1a2b3c4d", never a path or a file name
    size               (W, H), level-0 px
    mpp                um per level-0 px, None if the slide states none (see require_mpp)
    mpp_source         "argument" | "openslide" | "tiff resolution" | "objective power" | None
    vendor             OpenSlide's name of the format, or "png" / "jpeg"
    objective_power    as stated, None if not
    level_sizes        (w, h) of every level, finest first
    level_downsamples  level-0 px per level px of every level
    bounds             (x, y, w, h), level-0 px: the part that was scanned
    phantom_seed       seed of the phantom generator that wrote the slide, None for a real slide
    warnings           sentences about doubtful metadata
    """

    def __init__(
        self, source: "_Source", *, name: str, slide_mpp: float | None = None, phantom_seed: int | None = None
    ):
        self._source = source
        self._closed = False
        self.name = name
        self.phantom_seed = phantom_seed
        self.vendor = source.vendor
        self.level_sizes = source.level_sizes
        self.level_downsamples = source.level_downsamples
        self.size = source.level_sizes[0]
        self.bounds = _bounds(source.properties, self.size)
        self.objective_power = _positive(source.properties.get("openslide.objective-power"))
        self.mpp, self.mpp_source, self._mpp_problem, self.warnings = _resolution(
            source.properties, source.vendor, slide_mpp
        )

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Slide {self.name!r} {self.size[0]} x {self.size[1]} px, mpp {self.mpp}>"

    def __reduce__(self):
        raise TypeError("A Slide holds an open file and is not copied or pickled; open_slide() it where it is needed.")

    def close(self) -> None:
        """Close the file. No other thread may be reading."""
        if not self._closed:
            self._closed = True
            self._source.close()

    def require_mpp(self) -> float:
        """um per level-0 px. Raises SlideError, naming the remedy, if the slide states none."""
        if self.mpp is None:
            raise SlideError(self._mpp_problem)
        return self.mpp

    def check_mpp(self, mpp: float) -> str | None:
        """Can this slide be read at mpp um/px? None if so, a sentence to show if it must be enlarged (up to 2 times).

        Raises SlideError if it states no resolution or would have to be enlarged more than 2 times.
        """
        own = self.require_mpp()
        if not (math.isfinite(mpp) and mpp > 0):
            raise SlideError(f"The resolution to read at must be a positive number of um/px, got {mpp}.")
        factor = own / mpp
        if factor > MAX_UPSAMPLING * (1 + 1e-6):
            raise SlideError(
                f"The slide's finest level is {own:.4g} um/px, too coarse to be read at {mpp:.4g} um/px "
                f"(at most {MAX_UPSAMPLING:g} times finer); use a slide scanned at a higher magnification."
            )
        if factor > 1.02:
            return (
                f"The slide is {own:.4g} um/px and is enlarged {factor:.2g} times to {mpp:.4g} um/px, "
                "so patches look blurred to the encoder."
            )
        return None

    def read(self, xy_level0: tuple[float, float], size: tuple[int, int], mpp: float) -> np.ndarray:
        """The region of size = (w, h) px at mpp um/px whose top-left corner is xy_level0.

        Returns uint8 (h, w, 3), resized by area from the nearest finer level; white beyond the slide and where it holds
        nothing. Raises SlideError if the slide states no resolution or cannot be read.
        """
        return self.read_scaled(xy_level0, size, mpp / self.require_mpp())

    def read_scaled(self, xy_level0: tuple[float, float], size: tuple[int, int], downsample: float) -> np.ndarray:
        """read() with the resolution given as level-0 px per px, for slides that state no mpp."""
        width, height = size
        if width < 1 or height < 1 or not (math.isfinite(downsample) and downsample > 0):
            raise SlideError(f"A region needs a positive size and scale, got {width} x {height} px at {downsample}.")
        level = self.level_for(downsample)
        ratio = downsample / self.level_downsamples[level]  # level px per px
        if abs(ratio - round(ratio)) * max(size) < 1e-3 and ratio > 0.5:
            ratio = float(round(ratio))  # 0.3 / 0.1 is 2.9999999999999996; the integer path is exact and faster
        x0, y0 = (v / self.level_downsamples[level] for v in xy_level0)
        block = tuple(max(1, int(side / max(ratio, 1))) for side in BLOCK)
        if ratio == 1 or (width <= block[0] and height <= block[1]):
            return self._read_block(level, (x0, y0), size, ratio)
        out = np.empty((height, width, 3), np.uint8)
        for (left, top), part, here in _parts(size, block):
            out[here] = self._read_block(level, (x0 + left * ratio, y0 + top * ratio), part, ratio)
        return out

    def level_for(self, downsample: float) -> int:
        """The coarsest level that is no coarser than downsample (level-0 px per px); 0 if none is."""
        fitting = [i for i, d in enumerate(self.level_downsamples) if d <= downsample * (1 + 1e-3)]
        return max(fitting, key=lambda i: self.level_downsamples[i], default=0)

    def read_level(self, level: int, xy_level0: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
        """The region of size = (w, h) px of one level, unscaled: uint8 (h, w, 3), white where there is nothing."""
        if not 0 <= level < len(self.level_sizes):
            raise SlideError(f"The slide has levels 0 to {len(self.level_sizes) - 1}, got {level}.")
        downsample = self.level_downsamples[level]
        return self._read_pixels(level, (round(xy_level0[0] / downsample), round(xy_level0[1] / downsample)), size)

    def thumbnail(self, max_side: int = 1024) -> tuple[np.ndarray, float]:
        """The whole slide with its longer side at most max_side px, never enlarged.

        Returns (uint8 (h, w, 3), level-0 px per thumbnail px). Memory is bounded however large the coarsest level is.
        """
        scale = max(1.0, max(self.size) / max_side)
        # The tolerance keeps 2000.0000000000002 from becoming 2001 px.
        width, height = (max(1, math.ceil(side / scale - 1e-6)) for side in self.size)
        return self.read_scaled((0, 0), (width, height), scale), scale

    def _read_block(self, level: int, xy: tuple[float, float], size: tuple[int, int], ratio: float) -> np.ndarray:
        """size px of ratio level px each, from xy in level px: the region around it, resized."""
        margin = (
            3 if ratio < 1 else 0
        )  # bicubic enlargement looks at neighbours; without them patches would show a frame
        x0, y0 = (math.floor(v + 1e-6) - margin for v in xy)
        x1, y1 = (math.ceil(v + n * ratio - 1e-6) + margin for v, n in zip(xy, size))
        pixels = self._read_pixels(level, (x0, y0), (x1 - x0, y1 - y0))
        left, top = xy[0] - x0, xy[1] - y0
        return _resize(pixels, (left, top, left + size[0] * ratio, top + size[1] * ratio), size)

    def _read_pixels(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        if self._closed:
            raise SlideError("The slide has been closed.")
        return self._source.read(level, xy, size)


def open_slide(path: str | Path, *, slide_mpp: float | None = None) -> Slide:
    """Open a slide: what OpenSlide reads (a DICOM slide as its folder or one of its files), or a PNG or JPEG.

    slide_mpp: um per level-0 px; wins over what the slide states, and is needed to work with a PNG or JPEG
    Raises SlideError with one sentence for anything that is not a slide, is damaged or may not be read.
    """
    if slide_mpp is not None and not (math.isfinite(slide_mpp) and slide_mpp > 0):
        raise SlideError(f"slide_mpp must be a positive number of um/px, e.g. 0.25 for a 40x scan, got {slide_mpp}.")
    if not str(path):
        raise SlideError("No slide was given; pass the path of one.")
    file = Path(path)
    try:
        if file.is_dir():
            file = _dicom_file(file)
        if not file.exists():
            raise SlideError("There is no file at the path given; check how it is written.")
        if not file.is_file():
            raise SlideError("The path given is neither a file nor a DICOM folder.")
        length = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(1 << 20)
            stream.seek(max(0, length - (1 << 20)))
            tail = stream.read()
    except PermissionError:
        raise SlideError("The slide may not be read: this user lacks the permission.") from None
    except SlideError:
        raise
    except (OSError, ValueError):  # a name too long, a null byte, a disk that fails
        raise SlideError("The path given cannot be read; check how it is written and that its disk is there.") from None
    if not head:
        raise SlideError("The file is empty; copy or download the slide again.")

    try:
        source: _Source = _OpenSlideSource(file)
    except openslide.OpenSlideUnsupportedFormatError:
        if not _is_image(head) or file.suffix.lower() == ".mrxs":
            raise SlideError(_why_unsupported(head, tail, length, file.suffix.lower())) from None
        source = _ImageSource(file)
    except openslide.OpenSlideError as error:
        reason = _without_names(str(error))
        raise SlideError(
            f"OpenSlide knows the format but cannot open the slide{reason}; it is damaged, or {CONVERT}."
        ) from None
    except (OSError, ValueError):
        raise SlideError("OpenSlide cannot open the file.") from None

    seed = _phantom_seed(source.properties)
    name = f"phantom {seed}" if seed is not None else f"slide {_digest(length, head, source)}"
    return Slide(source, name=name, slide_mpp=slide_mpp, phantom_seed=seed)


# ---- what holds the pixels ----


class _Source(Protocol):
    vendor: str
    properties: dict[str, str]
    level_sizes: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        """uint8 (h, w, 3) of one level, xy in level px, white where there is nothing."""
        ...

    def close(self) -> None: ...


class _OpenSlideSource:
    """What OpenSlide reads; levels that are plain grids of tiles are read by TiffTiles once a few tiles agreed."""

    def __init__(self, file: Path):
        self._file = file
        self._slide = self._open()
        self.properties = dict(self._slide.properties)
        self.vendor = self.properties.get("openslide.vendor", "unknown")
        self.level_sizes = self._slide.level_dimensions
        self._own_downsamples = self._slide.level_downsamples
        self.level_downsamples = tuple(
            _true_downsample(self.level_sizes[0], size, own)
            for size, own in zip(self.level_sizes, self._own_downsamples)
        )
        self._tiles: TiffTiles | None = None
        self._agrees: dict[int, bool] = {}  # level -> TiffTiles gives OpenSlide's px
        self._lock = threading.Lock()

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        tiles = self._direct(level)
        if tiles is not None:
            try:
                return tiles.read(level, xy, size)
            except ValueError:  # a tile ends early, which OpenSlide may show as grey
                raise SlideError(DAMAGED.format("")) from None
            except Exception:  # decoders raise what they like: OpenSlide has the last word
                pass
        return self._read_openslide(level, xy, size)

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
            for (left, top), part, here in _parts(size, BLOCK):
                out[here] = self._read_openslide(level, (xy[0] + left, xy[1] + top), part)
            return out
        # OpenSlide takes the corner in level 0 and divides it by its own downsample; undo exactly that.
        own = self._own_downsamples[level]
        corner = (round(xy[0] * own), round(xy[1] * own))
        try:
            region = self._slide.read_region(corner, level, size)
        except openslide.OpenSlideError:
            # A handle that failed once fails for ever, and for all threads: the damage may lie elsewhere.
            try:
                fresh = self._open()
                region = fresh.read_region(corner, level, size)
                self._slide = fresh
            except openslide.OpenSlideError as error:
                self._slide = self._open()
                reason = _without_names(str(error))
                raise SlideError(DAMAGED.format(reason)) from None
        return _on_white(region)

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
                self._tiles = TiffTiles(self._file, self.level_sizes)
            compared = [self._compare(self._tiles, level, place) for place in CHECKED_AT]
        except Exception:  # tifffile and decoders raise many types; OpenSlide then reads the slide
            return False
        return all(compared)

    def _compare(self, tiles: TiffTiles, level: int, place: tuple[float, float]) -> bool:
        """Does the tile at this place hold what OpenSlide gives?"""
        (width, height), tile = self.level_sizes[level], tiles.tile_size(level)
        x, y = (int(part * side / step) * step for part, side, step in zip(place, (width, height), tile))
        size = (min(tile[0], width - x), min(tile[1], height - y))
        direct, wanted = tiles.read(level, (x, y), size), self._read_openslide(level, (x, y), size)
        if np.array_equal(direct, wanted):
            return True
        # Between two px OpenSlide blends them, up to half a level-0 px; only elsewhere the two can be equal.
        own = self._own_downsamples[level]
        on_px = all(round(v * own) / own == v for v in (x, y))
        return not on_px and float(np.abs(direct.astype(np.int16) - wanted).mean()) < 8


class _ImageSource:
    """A PNG or JPEG, decoded when first read and kept: 3 bytes per px."""

    def __init__(self, file: Path):
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
            raise SlideError("The PNG or JPEG is damaged or cut short; copy it again.") from None
        if self._image.mode.startswith(("I", "F")):
            raise SlideError("The image holds 16 or 32 bits of grey per px; save it as 8-bit RGB.")
        self._pixels: np.ndarray | None = None
        self._lock = threading.Lock()
        self.vendor = "png" if self._image.format == "PNG" else "jpeg"
        self.properties: dict[str, str] = {}
        self.level_sizes = (self._image.size,)
        self.level_downsamples = (1.0,)

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        pixels = self._decoded()
        (x, y), (width, height) = xy, size
        out = np.full((height, width, 3), 255, np.uint8)
        part = pixels[max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)]
        top, left = max(0, -y), max(0, -x)
        out[top : top + part.shape[0], left : left + part.shape[1]] = part
        return out

    def _decoded(self) -> np.ndarray:
        with self._lock:
            if self._pixels is None:
                transparent = self._image.has_transparency_data
                try:
                    rgb = (
                        _on_white(self._image.convert("RGBA"))
                        if transparent
                        else np.asarray(self._image.convert("RGB"))
                    )
                except (OSError, ValueError, SyntaxError):
                    raise SlideError("The PNG or JPEG is damaged or cut short; copy it again.") from None
                self._pixels = rgb
                self._image.close()
            return self._pixels

    def close(self) -> None:
        self._image.close()
        self._pixels = None


def _parts(
    size: tuple[int, int], block: tuple[int, ...]
) -> Iterator[tuple[tuple[int, int], tuple[int, int], tuple[slice, slice]]]:
    """A region of size = (w, h) in parts of at most a block: corner (x, y), (w, h), and where it lies in an array."""
    for top in range(0, size[1], block[1]):
        for left in range(0, size[0], block[0]):
            width, height = min(block[0], size[0] - left), min(block[1], size[1] - top)
            yield (left, top), (width, height), (slice(top, top + height), slice(left, left + width))


def _on_white(region: Image.Image) -> np.ndarray:
    """RGBA image -> uint8 (h, w, 3) on white."""
    alpha = region.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return np.asarray(region.convert("RGB"))
    white = Image.new("RGB", region.size, (255, 255, 255))
    white.paste(region, mask=alpha)
    return np.asarray(white)


def _true_downsample(size0: tuple[int, int], size: tuple[int, int], own: float) -> float:
    """The whole number that explains a level's size, if one does; else OpenSlide's ratio.

    OpenSlide divides sizes, and these are rounded: 493 px made of 7,886 by halving four times read as 15.97 instead of
    16, which puts the far edge of the slide one level px off.
    """
    whole = round(own)
    explained = whole >= 1 and all(side0 // whole <= side <= -(-side0 // whole) for side0, side in zip(size0, size))
    return float(whole) if explained else own


# ---- resizing ----


def _resize(pixels: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """The box (x0, y0, x1, y1) of uint8 (h, w, 3), fractions of px included, as size = (w, h) px.

    Shrinking averages over the exact area of each new px, so that the mean colour is kept (Pillow's BOX filter takes
    each px wholly or not at all); enlarging is bicubic.
    """
    x0, y0, x1, y1 = box
    ratio = (x1 - x0) / size[0]
    if ratio < 1:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, box))
    if all(abs(v - round(v)) < 1e-3 for v in (x0, y0)) and abs(ratio - round(ratio)) * max(size) < 1e-3:
        left, top, whole = round(x0), round(y0), round(ratio)
        pixels = pixels[top : top + size[1] * whole, left : left + size[0] * whole]
        return pixels if whole == 1 else np.asarray(Image.fromarray(pixels).reduce(whole))
    height, width = pixels.shape[:2]
    rows = _area_weights(y0, y1, size[1], height) @ pixels.reshape(height, width * 3)  # (h, W * 3) float32
    out = _area_weights(x0, x1, size[0], width) @ _transposed(rows)  # (w, h * 3)
    return _transposed((out + 0.5).astype(np.uint8)).reshape(size[1], size[0], 3)


@functools.lru_cache(maxsize=64)
def _area_weights(start: float, stop: float, count: int, length: int) -> Any:
    """Sparse float32 (count, length): row i averages the i-th of count equal stretches of [start, stop), in px."""
    from scipy import sparse  # 0.2 s that most commands do not need

    edges = np.linspace(start, stop, count + 1)
    low, high = edges[:-1, None], edges[1:, None]
    first = np.floor(low).astype(np.int64)
    index = first + np.arange(int((np.ceil(high) - first).max()))  # (count, taps)
    share = np.clip(np.minimum(index + 1, high) - np.maximum(index, low), 0, None) / (high - low)
    taps = (share.astype(np.float32).ravel(), np.clip(index, 0, length - 1).ravel())
    return sparse.csr_array((*taps, np.arange(count + 1) * index.shape[1]), shape=(count, length))


def _transposed(rows: np.ndarray) -> np.ndarray:
    """(h, w * 3) -> (w, h * 3): rows and columns of px swapped, a px moved as one piece (three times as fast)."""
    px = np.dtype((np.void, 3 * rows.itemsize))
    return np.ascontiguousarray(rows.view(px).T).view(rows.dtype)


# ---- what the slide says about itself ----


def _positive(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _bounds(properties: dict[str, str], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(x, y, w, h) of the scanned part, level-0 px: openslide.bounds-* cut to the slide, or all of it."""
    try:
        x, y, w, h = (int(properties[f"openslide.bounds-{key}"]) for key in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return 0, 0, *size
    left, top = max(0, x), max(0, y)
    right, bottom = min(size[0], x + w), min(size[1], y + h)
    return (left, top, right - left, bottom - top) if right > left and bottom > top else (0, 0, *size)


_REMEDY = "Pass slide_mpp=, e.g. 0.25 for a 40x scan or 0.5 for a 20x scan."
_NO_MPP = f"The slide states no resolution (openslide.mpp-x). {_REMEDY}"


def _resolution(
    properties: dict[str, str], vendor: str, slide_mpp: float | None
) -> tuple[float | None, str | None, str, tuple[str, ...]]:
    """(mpp, source, sentence if mpp is None, warnings). The order: argument, property, TIFF resolution, objective."""
    if slide_mpp is not None:
        return float(slide_mpp), "argument", "", ()
    power = _positive(properties.get("openslide.objective-power"))
    problem = _NO_MPP
    for source, pair in (("openslide", _property_mpp(properties)), ("tiff resolution", _tiff_mpp(properties))):
        if pair is None:
            continue
        # For a plain TIFF OpenSlide's mpp is the TIFF resolution, and so is as believable as that.
        if source == "openslide" and vendor == "generic-tiff":
            source = "tiff resolution"
        if source == "tiff resolution" and not all(PLAUSIBLE_MPP[0] <= v <= PLAUSIBLE_MPP[1] for v in pair):
            problem = f"The TIFF resolution, {pair[0]:.4g} um/px, is a program's default and not a scan's. {_REMEDY}"
            continue
        mpp, notes = math.sqrt(pair[0] * pair[1]), []
        skew = max(pair) / min(pair)
        if skew > 1.05:
            sentence = (
                f"The slide states {pair[0]:.4g} um/px across and {pair[1]:.4g} down, and px that are not square are "
                "not read. Pass slide_mpp= if one of the two is a mistake."
            )
            return None, None, sentence, ()
        if skew > 1.01:
            notes.append(
                f"The slide states {pair[0]:.4g} um/px across, {pair[1]:.4g} down; {mpp:.4g} is used for both."
            )
        if power is not None and not 1 / 2.5 <= mpp * power / 10 <= 2.5:
            notes.append(
                f"The slide states {mpp:.4g} um/px but also an objective of {power:g}x, about {10 / power:.2g} um/px; "
                f"{mpp:.4g} is used, pass slide_mpp= if it is wrong."
            )
        return mpp, source, "", tuple(notes)
    if power is not None and 1 <= power <= 150:
        return 10 / power, "objective power", "", ()
    return None, None, problem, ()


def _property_mpp(properties: dict[str, str]) -> tuple[float, float] | None:
    x, y = _positive(properties.get("openslide.mpp-x")), _positive(properties.get("openslide.mpp-y"))
    return (x or y, y or x) if x or y else None  # type: ignore[return-value]


def _tiff_mpp(properties: dict[str, str]) -> tuple[float, float] | None:
    unit = {"inch": 25_400.0, "centimeter": 10_000.0}.get(properties.get("tiff.ResolutionUnit", ""))
    x, y = _positive(properties.get("tiff.XResolution")), _positive(properties.get("tiff.YResolution"))
    return (unit / x, unit / y) if unit and x and y else None


def _phantom_seed(properties: dict[str, str]) -> int | None:
    """Seed written by sparsewsi.phantom into the TIFF ImageDescription, {"sparsewsi_phantom": {"seed": 7, ...}}."""
    text = properties.get("tiff.ImageDescription") or properties.get("openslide.comment") or ""
    if '"sparsewsi_phantom"' not in text:
        return None
    try:
        seed = json.loads(text)["sparsewsi_phantom"]["seed"]
    except (ValueError, KeyError, TypeError):
        return None
    return seed if isinstance(seed, int) else None


def _digest(length: int, head: bytes, source: _Source) -> str:
    """8 hex digits that tell slides apart without naming them."""
    content = hashlib.sha256(length.to_bytes(8, "little") + head)
    if source.vendor in ("dicom", "mirax"):  # many files: the name must not depend on which one was given
        content = hashlib.sha256(source.properties.get("openslide.quickhash-1", "").encode() or content.digest())
    return content.hexdigest()[:8]


# ---- why a slide is refused ----


def _dicom_file(folder: Path) -> Path:
    """One file of the single DICOM series in a folder. Raises SlideError if there is none or there are several."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and _is_dicom(file)]
    if not files:
        if (folder / "Slidedat.ini").is_file():
            raise SlideError("This is the data folder of an MRXS slide; pass the .mrxs file beside it.")
        raise SlideError("The path given is a folder without a DICOM slide; pass one slide file.")
    if len({_dicom_series(file) for file in files} - {b""}) > 1:
        raise SlideError("The folder holds several DICOM series; pass one .dcm file of the slide.")
    return files[0]


def _is_dicom(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _dicom_series(file: Path) -> bytes:
    """SeriesInstanceUID (0020,000E) in explicit little endian, b"" where it is not found."""
    with file.open("rb") as stream:
        head = stream.read(1 << 16)
    at = head.find(b"\x20\x00\x0e\x00UI")
    if at < 0:
        return b""
    (length,) = struct.unpack_from("<H", head, at + 6)
    return head[at + 8 : at + 8 + length].rstrip(b"\0 ")


def _is_image(head: bytes) -> bool:
    return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))


def _why_unsupported(head: bytes, tail: bytes, length: int, suffix: str) -> str:
    """The sentence for a file that OpenSlide does not know."""
    first_ifd = _first_ifd(head)
    if first_ifd is not None:
        if first_ifd >= length:
            return "The TIFF is cut short: its directory lies beyond the end of the file; copy or download it again."
        if b"openmicroscopy.org/Schemas/OME" in head or b"openmicroscopy.org/Schemas/OME" in tail:
            return f"This OME-TIFF is not one that OpenSlide opens; {CONVERT}."
        return f"This TIFF is cut short, or not a tiled TIFF that OpenSlide opens; copy it again, or {CONVERT}."
    if suffix == ".mrxs":
        return "An MRXS slide needs its data folder, of the same name, beside the .mrxs file; copy both."
    if head[128:132] == b"DICM":
        return "This DICOM file is not a whole-slide microscopy image, or parts of it are missing."
    if not head.strip(b"\0"):
        return "The file holds only zeros; copy or download the slide again."
    if _is_text(head[:4096]):
        return (
            "The file holds text, not an image (a web page or a pointer saved in its place?); download the slide again."
        )
    return "The file is not a slide: neither a format that OpenSlide reads, nor PNG, nor JPEG."


def _first_ifd(head: bytes) -> int | None:
    """Offset of the first directory of a TIFF or BigTIFF; None if it is neither."""
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 16:
        return None
    (version,) = struct.unpack_from(order + "H", head, 2)
    if version == 42:
        return struct.unpack_from(order + "I", head, 4)[0]
    return struct.unpack_from(order + "Q", head, 8)[0] if version == 43 else None


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)


def _without_names(error: str) -> str:
    """': the reason' in OpenSlide's words, or '' where they may hold a path or a file name."""
    error = error.strip().rstrip(".")
    return "" if not error or re.search(r"[\\/]|\w\.[A-Za-z]\w", error) else f": {error}"
