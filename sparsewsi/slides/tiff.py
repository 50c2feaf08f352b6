"""Tiled TIFF and SVS read tile by tile with tifffile and imagecodecs: the same px as OpenSlide's, several times faster.

OpenSlide paints every tile onto a canvas and hands it over as premultiplied ARGB; where a level is a plain grid of JPEG
or JPEG 2000 tiles none of that is needed. sources.py compares a few tiles with OpenSlide's before it trusts this
module, and asks OpenSlide about every tile that is found damaged here.
Frames: level px throughout; sizes and places are (w, h) and (x, y).
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

# Tiles that neighbouring patches share: a row of them on a slide 100,000 px wide is 77 MB.
CACHE_BYTES = 128 << 20
COMPRESSIONS = (7, 33003, 33005, 34712)  # JPEG; Aperio's and the TIFF number of JPEG 2000
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
    decode: Callable[[bytes, int], np.ndarray]  # (compressed tile, its number) -> uint8 (tile h, tile w, 3)


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

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        """uint8 (h, w, 3), white beyond the level. Raises EndsEarly for a tile without an end, or as decoders do."""
        grid = self._grids[level]
        (x, y), (width, height), (tile_w, tile_h) = xy, size, grid.tile
        left, top = max(0, x), max(0, y)
        right, bottom = min(grid.size[0], x + width), min(grid.size[1], y + height)
        whole = (left, top, right, bottom) == (x, y, x + width, y + height)
        out = np.empty((height, width, 3), np.uint8) if whole else np.full((height, width, 3), 255, np.uint8)
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
                tile = self._tile(level, row * columns + column, keep=not used_up)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[
                    y0 - tile_top : y1 - tile_top, x0 - tile_left : x1 - tile_left
                ]
        return out

    def close(self) -> None:
        os.close(self._file)
        self._tiles.clear()

    def _tile(self, level: int, number: int, keep: bool) -> np.ndarray:
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
        tile = grid.decode(data, number)
        if keep:
            with self._lock:
                if key not in self._tiles:  # another thread may have decoded it meanwhile
                    self._tiles[key] = tile
                    self._bytes += tile.nbytes
                while self._bytes > CACHE_BYTES:
                    self._bytes -= self._tiles.popitem(last=False)[1].nbytes
        return tile


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
    decode, tables, shape = page.decode, {}, (*tile[::-1], 3)
    if page.jpegtables is not None:
        tables = {"jpegtables": page.jpegtables}

    def decoded(data: bytes, number: int) -> np.ndarray:
        pixels = decode(data, number, **tables)[0]
        if pixels is None or pixels.shape[1:] != shape:
            raise ValueError("A tile has not the size that the TIFF states.")
        return pixels[0]

    return _Grid(size, tile, np.array(page.dataoffsets, np.int64), lengths, decoded)
