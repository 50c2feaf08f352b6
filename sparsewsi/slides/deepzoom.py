"""A Deep Zoom image (.dzi and its folder of tiles), on this machine or over http(s): tiles are read as they are needed.

The format states no resolution, so that slide_mpp is asked for. Frames: level px throughout.
"""

import io
import re
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from PIL import Image

from sparsewsi.files import as_path
from sparsewsi.slides.refusals import DAMAGED, SlideError, quote_reason

CACHE_BYTES = 64 << 20  # of decoded tiles
MOST_BYTES = 16 << 20  # of one tile; of a descriptor, see MOST_TEXT
MOST_TEXT = 1 << 16
MOST_SIDE = 4096  # px, of a tile
TRIES = 4
NO_DESCRIPTOR = "The .dzi is no Deep Zoom description, or holds sizes that cannot be; copy or export it again."
UNREACHABLE = "The slide's server {}; check the address and that the server runs."

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


def open_deep_zoom(path: str | Path) -> tuple["DeepZoomSource", bytes] | None:
    """The source and some bytes that tell it from others; None for what is not named .dzi.

    path: a .dzi file, or its http(s) address. Raises SlideError if it cannot be read or is no Deep Zoom.
    """
    address = find_address(path)
    if not (urlsplit(address).path if address else str(path)).strip().strip("'\"").lower().endswith(".dzi"):
        return None
    fetch = _fetch_from(address) if address else _read_from(as_path(path))
    text = fetch(".dzi", MOST_TEXT)
    source = DeepZoomSource(parse_descriptor(text), fetch)
    return source, text + source.coarsest_bytes()


def find_address(path: str | Path) -> str | None:
    """The http(s) address that a path is; a Path folds the two slashes into one."""
    match = re.match(r"\s*(https?):/+(.+?)\s*$", str(path), re.IGNORECASE)
    return f"{match[1].lower()}://{match[2]}" if match else None


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
    doubts: tuple[str, ...] = ()

    def __init__(self, layout: Layout, fetch: Fetch):
        self._layout, self._fetch = layout, fetch
        self.properties: dict[str, str] = {}
        shrinks = range(layout.highest + 1)
        last = next((n for n in shrinks if max(layout.level_size(n)) <= layout.tile), layout.highest)
        self.level_sizes = tuple(layout.level_size(shrink) for shrink in range(last + 1))
        self.level_downsamples = tuple(float(2**shrink) for shrink in range(last + 1))
        self._tiles: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._held = 0  # bytes
        self._lock = threading.Lock()

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
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
        with self._lock:
            self._tiles.clear()
            self._held = 0

    def _tile(self, level: int, column: int, row: int) -> np.ndarray:
        """A tile's own px, uint8 (h, w, 3), from the cache or read; only whole ones are kept."""
        key = (level, column, row)
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
                return self._tiles[key]
        pixels = self._decode(self._load(level, column, row), level, column, row)
        with self._lock:
            if key not in self._tiles:
                self._tiles[key] = pixels
                self._held += pixels.nbytes
            while self._held > CACHE_BYTES and len(self._tiles) > 1:
                self._held -= self._tiles.popitem(last=False)[1].nbytes
        return pixels

    def _load(self, level: int, column: int, row: int) -> bytes:
        place = f"_files/{self._layout.highest - level}/{column}_{row}.{self._layout.ending}"
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
            pixels = np.asarray(image.convert("RGB"))
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


def _fetch_from(address: str) -> Fetch:
    """Reads over http(s). Redirects are not followed, so that an address leads where it says."""
    import httpx  # only those wait for it who read from a server

    parts = urlsplit(address)
    stem = parts.path[: -len(".dzi")]
    client = httpx.Client(timeout=httpx.Timeout(30, connect=10), follow_redirects=False)

    def fetch(what: str, most: int) -> bytes:
        place = urlunsplit(parts._replace(path=stem + what, fragment=""))
        problem = ""
        for number in range(TRIES):
            if number:
                time.sleep(0.2 * 4 ** (number - 1))
            try:
                with client.stream("GET", place) as response:
                    if response.status_code == 200:
                        return _take(response.iter_bytes(), most)
                    problem = f"answered {response.status_code}"
                    if response.status_code < 500 and response.status_code != 429:
                        break
            except (httpx.TransportError, httpx.InvalidURL) as error:
                problem = "broke off" if isinstance(error, httpx.RemoteProtocolError) else "cannot be reached"
        raise SlideError(UNREACHABLE.format(problem))

    return fetch


def _take(pieces, most: int) -> bytes:
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) > most:
            raise SlideError(DAMAGED.format(": the server sends more than a tile may hold"))
    return bytes(data)
