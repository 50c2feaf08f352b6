"""Tiled TIFF and SVS read tile by tile, without OpenSlide: the same px as OpenSlide's, several times faster.

OpenSlide paints every tile onto a canvas and hands it over as premultiplied ARGB; where a level is a plain grid of JPEG
or JPEG 2000 tiles none of that is needed. sources.py compares a few tiles with OpenSlide's before it trusts this
module, and asks OpenSlide about every tile that is found damaged here.
Frames: level px throughout; sizes and places are (w, h) and (x, y).
"""

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile

# Tiles that neighbouring patches share: a row of them on a slide 100,000 px wide is 77 MB.
CACHE_BYTES = 128 << 20
JPEG = 7
COMPRESSIONS = (JPEG, 33003, 33005, 34712)  # JPEG; Aperio's and the TIFF number of JPEG 2000
# libjpeg-turbo writes to what begins at a multiple of 32 bytes past the processor's cache, which makes decoding a third
# slower where the px are read again at once.
OFF_LINE = 16
AS_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"  # a segment by which three channels are red, green, blue
END = b"\xff\xd9"  # of a JPEG and of a JPEG 2000 codestream; their coded data never hold it, their headers may


class EndsEarly(ValueError):
    """A tile without an end.

    tile: its number; box: (x0, y0, x1, y1) of it within the level, level px; filled: its data end in a run of one byte
    """

    def __init__(self, tile: int, box: tuple[int, int, int, int], filled: bool):
        super().__init__("A tile ends early.")
        self.tile, self.box, self.filled = tile, box, filled


@dataclass(frozen=True)
class _Grid:
    """The tiles of one level."""

    size: tuple[int, int]
    tile: tuple[int, int]
    offsets: np.ndarray  # of each tile in the file, row by row
    lengths: np.ndarray
    # (compressed tile, its number, where its px may go, contiguous) -> uint8 (tile h, tile w, 3), there or elsewhere
    decode: Callable[[bytes, int, np.ndarray], np.ndarray]


class TiffTiles:
    """The levels of one tiled TIFF. Threads may share it: decoders drop the GIL.

    Raises ValueError if one of level_sizes is not a grid of JPEG or JPEG 2000 tiles; tifffile raises what it likes.
    """

    def __init__(self, file: Path, level_sizes: tuple[tuple[int, int], ...]):
        # A name of our own: tifffile's messages would hold the file's.
        with file.open("rb") as stream, tifffile.TiffFile(stream, name="slide") as tiff:
            pages: dict[tuple[int, int], Any] = {}
            for page in tiff.pages:
                if isinstance(page, tifffile.TiffPage) and page.is_tiled:
                    pages.setdefault((page.imagewidth, page.imagelength), page)
            self._grids = [_grid(pages.get(size), size) for size in level_sizes]
        self._file = os.open(file, os.O_RDONLY)
        self._tiles: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()  # (level, number), oldest first
        self._bytes = 0
        self._lock = threading.Lock()

    def tile_size(self, level: int) -> tuple[int, int]:
        return self._grids[level].tile

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
        """uint8 (h, w, 3), white beyond the level. Raises EndsEarly for a tile without an end, or as decoders do.

        out: where the px go, and what is returned then
        """
        grid = self._grids[level]
        (x, y), (width, height), (tile_w, tile_h) = xy, size, grid.tile
        left, top = max(0, x), max(0, y)
        right, bottom = min(grid.size[0], x + width), min(grid.size[1], y + height)
        whole = (left, top, right, bottom) == (x, y, x + width, y + height)
        out = empty((height, width, 3)) if out is None else out
        if not whole:
            out[:] = 255
        if left >= right or top >= bottom:
            return out
        columns = -(-grid.size[0] // tile_w)
        for row in range(top // tile_h, -(-bottom // tile_h)):
            tile_top = row * tile_h
            y0, y1 = max(top, tile_top), min(bottom, tile_top + tile_h)
            for column in range(left // tile_w, -(-right // tile_w)):
                tile_left = column * tile_w
                x0, x1 = max(left, tile_left), min(right, tile_left + tile_w)
                # Patches do not overlap: a tile that one of them uses up is not asked for again.
                used_up = (x0, y0) == (tile_left, tile_top) and (
                    (x1, y1) == (min(tile_left + tile_w, grid.size[0]), min(tile_top + tile_h, grid.size[1]))
                )
                here = out[y0 - y : y1 - y, x0 - x : x1 - x]
                straight = used_up and here.shape[:2] == (tile_h, tile_w) and here.flags.c_contiguous
                tile = self._tile(level, row * columns + column, not used_up, here if straight else None)
                if tile is not here:
                    here[:] = tile[y0 - tile_top : y1 - tile_top, x0 - tile_left : x1 - tile_left]
        return out

    def close(self) -> None:
        os.close(self._file)
        self._tiles.clear()

    def _tile(self, level: int, number: int, keep: bool, out: np.ndarray | None) -> np.ndarray:
        key = (level, number)
        with self._lock:
            tile = self._tiles.get(key)
            if tile is not None:
                self._tiles.move_to_end(key)
                return tile
        grid = self._grids[level]
        length = int(grid.lengths[number])
        data = os.pread(self._file, length, int(grid.offsets[number]))
        if len(data) < length or not has_end(data):  # decoders fill up what is missing with grey and say nothing
            (width, height), columns = grid.tile, -(-grid.size[0] // grid.tile[0])
            x, y = number % columns * width, number // columns * height
            box = (x, y, min(x + width, grid.size[0]), min(y + height, grid.size[1]))
            raise EndsEarly(number, box, len(set(data[-16:])) <= 1)
        tile = grid.decode(data, number, empty((*grid.tile[::-1], 3)) if out is None else out)
        if keep:
            with self._lock:
                if key not in self._tiles:  # another thread may have decoded it meanwhile
                    self._tiles[key] = tile
                    self._bytes += tile.nbytes
                while self._bytes > CACHE_BYTES:
                    self._bytes -= self._tiles.popitem(last=False)[1].nbytes
        return tile


def empty(shape: tuple[int, ...]) -> np.ndarray:
    """np.empty of uint8 that decoders fill fastest (OFF_LINE)."""
    size = math.prod(shape)
    memory = np.empty(size + 32, np.uint8)
    start = (OFF_LINE - memory.ctypes.data) % 32
    return memory[start : start + size].reshape(shape)


def decode_jpeg(data: bytes) -> np.ndarray:
    """uint8 (h, w, 3) of an RGB or grey JPEG. Raises ValueError where its data do not add up.

    Most decoders paint on there and say nothing; so does this one about what is odd, but costs no px.
    """
    try:
        return simplejpeg.decode_jpeg(data)
    except ValueError as error:
        if str(error).startswith("Corrupt"):
            raise
        return simplejpeg.decode_jpeg(data, strict=False)


def has_end(data: bytes) -> bool:
    """Does a JPEG or JPEG 2000 codestream end within data? What a writer left behind the end does not count.

    Headers are stepped over, as an EXIF thumbnail has an end of its own.
    """
    if data.startswith(b"\xff\xd8"):
        at = 2
        while data[at : at + 1] == b"\xff":
            marker = data[at + 1] if at + 1 < len(data) else 0
            if marker == 0xFF:  # fill bytes may stand before a marker
                at += 1
                continue
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
            if marker == 0xDA:  # start of scan
                break
        return data.find(END, at) >= 0
    # JPEG 2000, with or without boxes around it: the data of its first part follow the marker SOD.
    return data.find(END, max(0, data.find(b"\xff\x93"))) >= 0


def _grid(page: Any, size: tuple[int, int]) -> _Grid:
    """The grid of a tifffile.TiffPage. Raises ValueError if it is not one of RGB tiles in JPEG or JPEG 2000."""
    if page is None:
        raise ValueError(f"The TIFF has no tiled page of {size[0]} x {size[1]} px.")
    tile = (page.tilewidth, page.tilelength)
    lengths = np.array(page.databytecounts, np.int64)
    count = -(-size[0] // tile[0]) * -(-size[1] // tile[1])
    plain = page.dtype == np.uint8 and page.samplesperpixel == 3 and page.planarconfig == 1
    plain &= page.compression in COMPRESSIONS
    # A tile of length 0 holds nothing, and OpenSlide knows what to show in its place.
    if not plain or len(lengths) != count or not lengths.all():
        raise ValueError("The page is not a grid of RGB tiles in JPEG or JPEG 2000.")
    shape, offsets = (*tile[::-1], 3), np.array(page.dataoffsets, np.int64)
    if page.compression == JPEG:
        tables = (page.jpegtables or b"")[2:-2]
        # Aperio's RGB says nowhere in its data that it is none of the YCbCr that JPEG is for.
        before = b"\xff\xd8" + (AS_RGB if page.photometric == 2 and not page.is_jfif else b"") + tables

        def decode_jpeg(data: bytes, _: int, out: np.ndarray) -> np.ndarray:
            # Strict, as OpenSlide is: data that do not add up are an error, where most decoders paint on.
            if simplejpeg.decode_jpeg(before + data[2:], buffer=out).shape != shape:
                raise ValueError("A tile has not the size that the TIFF states.")
            return out

        return _Grid(size, tile, offsets, lengths, decode_jpeg)

    decode = page.decode

    def decoded(data: bytes, number: int, _: np.ndarray) -> np.ndarray:
        pixels = decode(data, number)[0]
        if pixels is None or pixels.shape[1:] != shape:
            raise ValueError("A tile has not the size that the TIFF states.")
        return pixels[0]

    return _Grid(size, tile, offsets, lengths, decoded)
