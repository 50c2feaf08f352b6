"""A Deep Zoom image (.dzi and its folder of tiles), on this machine or over http(s): tiles are read as they are needed.

The format states no resolution, so that slide_mpp is asked for. Frames: level px throughout.
"""

import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from PIL import Image

from sparsewsi.files import as_path
from sparsewsi.slides.levels import compare_roughly
from sparsewsi.slides.refusals import DAMAGED, SlideError, quote_reason
from sparsewsi.slides.remote import ANY, UNREACHABLE, Hosts, Remote, find_address
from sparsewsi.slides.tiff import decode_jpeg
from sparsewsi.slides.tile_cache import TileCache

CACHE_BYTES = 64 << 20  # of decoded tiles
MOST_BYTES = 16 << 20  # of one tile; of a descriptor, see MOST_TEXT
MOST_TEXT = 1 << 16
MOST_SIDE = 4096  # px, of a tile
NO_DESCRIPTOR = "The .dzi is no Deep Zoom description, or holds sizes that cannot be; copy or export it again."

Fetch = Callable[[str, int], bytes]  # (what comes after the descriptor's name without .dzi, most bytes) -> content


@dataclass(frozen=True)
class Layout:
    """What a .dzi says: the image's (w, h), side and overlap of its tiles in px, and their ending."""

    size: tuple[int, int]
    tile: int
    overlap: int
    ending: str

    def level_size(self, shrink: int) -> tuple[int, int]:
        """(w, h) of the level that is halved `shrink` times."""
        return tuple(-(-side // 2**shrink) for side in self.size)  # type: ignore[return-value]

    @property
    def highest(self) -> int:
        """The number that Deep Zoom gives the finest level."""
        return (max(self.size) - 1).bit_length()


def open_deep_zoom(path: str | Path, hosts: Hosts = ANY) -> tuple["DeepZoomSource", bytes] | None:
    """The source and some bytes that tell it from others; None for what is not named .dzi.

    path: a .dzi file, or its http(s) address; hosts: which servers may be asked
    Raises SlideError if it cannot be read or is no Deep Zoom.
    """
    address = find_address(path)
    if not (urlsplit(address).path if address else str(path)).strip().strip("'\"").lower().endswith(".dzi"):
        return None
    remote = Remote(hosts) if address else None
    fetch = _fetch_from(address, remote) if address and remote else _read_from(as_path(path))
    try:
        text = fetch(".dzi", MOST_TEXT)
        source = DeepZoomSource(parse_descriptor(text), fetch, remote)
        return source, text + source.coarsest_bytes()
    except BaseException:
        if remote is not None:
            remote.close()
        raise


def parse_descriptor(text: bytes) -> Layout:
    """What a .dzi says. Raises SlideError for anything else, entities included."""
    try:
        if b"<!" in text:  # a document type may define entities that grow without end
            raise ValueError
        image = ElementTree.fromstring(text)
        size = next(child for child in image if child.tag.rpartition("}")[2] == "Size")
        layout = Layout(
            (int(size.attrib["Width"]), int(size.attrib["Height"])),
            int(image.attrib["TileSize"]),
            int(image.attrib["Overlap"]),
            image.attrib["Format"].lower(),
        )
    except (ElementTree.ParseError, ValueError, KeyError, StopIteration):
        raise SlideError(NO_DESCRIPTOR) from None
    fine = 0 < min(layout.size) <= max(layout.size) < 1 << 24 and 16 <= layout.tile <= MOST_SIDE
    if not fine or not 0 <= layout.overlap < layout.tile or layout.ending not in ("jpg", "jpeg", "png"):
        raise SlideError(NO_DESCRIPTOR)
    return layout


class DeepZoomSource:
    """The levels of a Deep Zoom image down to the first that is one tile. Threads may share it."""

    vendor = "deepzoom"

    def __init__(self, layout: Layout, fetch: Fetch, remote: Remote | None = None):
        self._layout, self._fetch, self._remote = layout, fetch, remote
        self.properties: dict[str, str] = {}
        shrinks = range(layout.highest + 1)
        last = next((n for n in shrinks if max(layout.level_size(n)) <= layout.tile), layout.highest)
        self.level_sizes = tuple(layout.level_size(shrink) for shrink in range(last + 1))
        self.level_downsamples = tuple(float(2**shrink) for shrink in range(last + 1))
        self._shrinks = tuple(range(last + 1))
        self._tiles = TileCache(CACHE_BYTES)
        self.doubts: tuple[str, ...] = ()
        if remote is None:  # from a server it would be a hundred requests
            found, notes = compare_roughly(self.level_sizes, self.level_downsamples, self.read)
            self._shrinks = tuple(shrink for shrink in self._shrinks if found[shrink] is not None)
            self.level_sizes = tuple(self.level_sizes[shrink] for shrink in self._shrinks)
            self.level_downsamples = tuple(self.level_downsamples[shrink] for shrink in self._shrinks)
            self.doubts = tuple(notes)
            self._tiles.clear()

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
        out = np.full((size[1], size[0], 3), 255, np.uint8)
        (width, height), tile = self.level_sizes[level], self._layout.tile
        x0, y0 = max(0, xy[0]), max(0, xy[1])
        x1, y1 = min(width, xy[0] + size[0]), min(height, xy[1] + size[1])
        if x0 >= x1 or y0 >= y1:
            return out
        for row in range(y0 // tile, (y1 - 1) // tile + 1):
            for column in range(x0 // tile, (x1 - 1) // tile + 1):
                pixels = self._tile(level, column, row)  # without the overlap
                left, top = column * tile, row * tile
                a, b = max(x0, left), min(x1, left + pixels.shape[1])
                c, d = max(y0, top), min(y1, top + pixels.shape[0])
                out[c - xy[1] : d - xy[1], a - xy[0] : b - xy[0]] = pixels[c - top : d - top, a - left : b - left]
        return out

    def coarsest_bytes(self) -> bytes:
        """The one tile of the coarsest level, as it is stored."""
        return self._load(len(self.level_sizes) - 1, 0, 0)

    def close(self) -> None:
        if self._remote is not None:
            self._remote.close()
        self._tiles.clear()

    def _tile(self, level: int, column: int, row: int) -> np.ndarray:
        """A tile's own px, uint8 (h, w, 3), from the cache or read; only whole ones are kept."""
        place = (level, column, row)
        pixels = self._tiles.get(place)
        if pixels is None:
            pixels = self._decode(self._load(level, column, row), level, column, row)
            self._tiles.put(place, pixels)
        return pixels

    def _load(self, level: int, column: int, row: int) -> bytes:
        place = f"_files/{self._layout.highest - self._shrinks[level]}/{column}_{row}.{self._layout.ending}"
        return self._fetch(place, MOST_BYTES)

    def _decode(self, data: bytes, level: int, column: int, row: int) -> np.ndarray:
        tile, overlap = self._layout.tile, self._layout.overlap
        spans = []  # (first px of the tile's own, of its file; how many; side of the file) across and down
        for number, side in zip((column, row), self.level_sizes[level]):
            before, own = (overlap if number else 0), min(tile, side - number * tile)
            after = min(overlap, side - number * tile - own)
            spans.append((before, own, before + own + after))
        try:
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
            if image.size != (spans[0][2], spans[1][2]):
                raise SlideError(DAMAGED.format(": a tile has another size than the .dzi says"))
            plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            pixels = decode_jpeg(data) if plain else np.asarray(image.convert("RGB"))
        except SlideError:
            raise
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise SlideError(DAMAGED.format(quote_reason(str(error)))) from None
        (left, width, _), (top, height, _) = spans
        return pixels[top : top + height, left : left + width].copy()


# ---- where the bytes are


def _read_from(file: Path) -> Fetch:
    stem = file.name[: -len(".dzi")]

    def fetch(what: str, most: int) -> bytes:
        place = file if what == ".dzi" else file.parent / f"{stem}{what}"
        try:
            with place.open("rb") as stream:
                data = stream.read(most + 1)
        except FileNotFoundError:
            if what == ".dzi":
                raise SlideError("There is no file at the path given; check how it is written.") from None
            raise SlideError(
                "A tile of the Deep Zoom image is missing; its folder _files must lie beside it."
            ) from None
        except (OSError, ValueError):
            raise SlideError("The slide may not be read, or its disk is not there.") from None
        if len(data) > most:
            raise SlideError(NO_DESCRIPTOR if what == ".dzi" else DAMAGED.format(": a tile is too large"))
        return data

    return fetch


def _fetch_from(address: str, remote: Remote) -> Fetch:
    parts = urlsplit(address)
    stem = parts.path[: -len(".dzi")]

    def fetch(what: str, most: int) -> bytes:
        reply = remote.get(urlunsplit(parts._replace(path=stem + what, fragment="")), most)
        if reply.status != 200:
            raise SlideError(UNREACHABLE.format(f"answered {reply.status}"))
        return reply.content

    return fetch
