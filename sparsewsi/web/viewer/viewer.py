"""Slides as tiles, and the component that shows them: deep zoom, boxes, scores, map and strip share one selection.

A slide is known to the browser by a token that cannot be guessed. The routes here stand beside Gradio's own, whose
login they do not ask for: who has a page's token may see that page's slide, nobody else can.
Frames: level-0 px; tile (level, column, row) is TILE px wide and shows 2^level level-0 px per px.
N patches, K kept.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import itertools
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr
import gradio.themes
import numpy as np
import torch
from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from sparsewsi.bags.bag import Bag, list_parts, own_coords
from sparsewsi.model.foci import Focus
from sparsewsi.model.selection import Selection
from sparsewsi.model.words import Words
from sparsewsi.report.umap import FeatureMap
from sparsewsi.slides.slide import Slide, open_slide
from sparsewsi.web.jobs import Busy, Halted

HERE = Path(__file__).parent
PAGE_CSS = HERE / "page.css"
HEAR = HERE / "hear.js"  # in the head of the page, before its client
# The component's JavaScript, a file a job. Gradio runs them joined, as one function; .ci/lint.mjs reads this line.
SCRIPTS = (
    "state",
    "props",
    "selection",
    "strip",
    "tiles",
    "view",
    "together",
    "film",
    "marks",
    "map",
    "regions",
    "keys",
    "tabs",
    "address",
    "start",
)
PROPS = ("slides", "bag", "kept", "foci", "map", "words", "evidence", "members", "files", "focus")
PROPS += ("unlike", "whatif", "compared", "work", "picks")
TILE = 512  # px
QUALITY = 85
PICTURES = ("png", "jpeg")  # vendors whose slides are decoded as a whole
COARSE = 64  # tiles of a level, at most, that is kept of a picture
CACHE_BYTES = 64 << 20  # of JPEG tiles, all slides together
MOST_OPEN = 4  # slides held open at a time, each in a process; others are opened again when they are looked at
MOST_LEVELS = 20  # halvings of the largest slide
MOST_WAITING = 256  # pictures of one slide that are asked for at a time
MOST_KNOWN = 4096  # tokens; the one not looked at for longest is forgotten first
DOWNLOADS = {  # what may be asked for beside tiles, nothing else: what it is called on the page, and its type
    "report.html": ("report", "text/html"),
    "figure.png": ("figure for a talk, PNG", "image/png"),
    "figure.svg": ("figure for a talk, SVG", "image/svg+xml"),
    "patches.geojson": ("GeoJSON for QuPath", "application/geo+json"),
    "annotations.zip": ("GeoJSON for QuPath, a file a slide", "application/zip"),
    "patches.csv": ("CSV", "text/csv"),
    "selection.json": ("selection.json", "application/json"),
    "log.jsonl": ("log of this session", "application/x-ndjson"),
}
BY_SLIDE, ONE_SLIDE = "annotations.zip", "patches.geojson"  # what a case of several slides has, and one of one
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "private, max-age=600",
}


@dataclass
class _Known:
    """A slide that a page shows. The lock is held while it is read, so that it is never closed under a reader."""

    path: Path
    owner: str
    slide: Slide | None = None
    make: Callable[[str], Path] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0


class Slides:
    """Slides by token, their tiles as JPEG in a bounded cache, and the routes that serve both."""

    def __init__(self, opening: Callable[[Path], Slide] = open_slide, cache_bytes: int = CACHE_BYTES):
        self._open = opening
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._tiles: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._room = cache_bytes
        self._lock = threading.Lock()
        self._threads, self._writers = CapacityLimiter(2 * MOST_OPEN), CapacityLimiter(2 * MOST_OPEN)

    def add(self, path: str | Path, owner: str, slide: Slide | None = None, beside: bool = False) -> str:
        """A new token for a slide, in place of those that its owner, a session, had, or beside them.

        slide: open already, and closed from here on; None: it is opened when it is looked at
        """
        if not beside:
            self.forget(owner)
        token = secrets.token_urlsafe(24)
        with self._lock:
            self._known[token] = _Known(Path(path), owner, slide)
            too_many = [known.owner for known in self._known.values()][: max(0, len(self._known) - MOST_KNOWN)]
        for other in too_many:
            self.forget(other)
        return token

    def holds(self, token: str) -> bool:
        """Whether the token is worth anything: its session is there and has opened no other slide."""
        return token in self._known

    def rest(self) -> None:
        """Close the slides that nobody is looking at now; they are opened again when somebody does.

        Of a picture, which may find no memory for that until another one is closed, the coarse tiles are kept.
        """
        for token, known in list(self._known.items()):
            if known.lock.acquire(blocking=False):
                try:
                    if known.slide is not None and known.slide.vendor in PICTURES:
                        self._keep_coarse(token, known.slide)
                    _close(known)
                finally:
                    known.lock.release()

    def close(self, owner: str) -> None:
        """Close a session's slides that are not being read; they are opened again when somebody looks at them."""
        for known in list(self._known.values()):
            if known.owner == owner and known.lock.acquire(blocking=False):
                try:
                    _close(known)
                finally:
                    known.lock.release()

    def owner_of(self, token: str) -> str:
        """The session that a token was made for; "" for an unknown token."""
        known = self._known.get(token)
        return known.owner if known else ""

    def owners(self) -> set[str]:
        """Sessions that have a token."""
        return {known.owner for known in list(self._known.values())}

    def offer(self, token: str, make: Callable[[str], Path]) -> None:
        """What writes a slide's downloads, by their name, when one is asked for."""
        with self._lock:
            if token in self._known:
                self._known[token].make = make

    def paths_of(self, owner: str) -> list[Path]:
        """The slides that a session has tokens for."""
        return [known.path for known in list(self._known.values()) if known.owner == owner]

    def forget(self, owner: str) -> list[str]:
        """Close a session's slides and drop their tiles; returns their tokens, which are worth nothing any more."""
        with self._lock:
            tokens = [token for token, known in self._known.items() if known.owner == owner]
        self.drop(*tokens)
        return tokens

    def drop(self, *tokens: str) -> None:
        """Close some slides and drop their tiles; their tokens are worth nothing any more."""
        with self._lock:
            gone = [self._known.pop(token) for token in tokens if token in self._known]
            for key in [key for key in self._tiles if key[0] in tokens]:
                self._room += len(self._tiles.pop(key))
        for known in gone:
            with known.lock:
                _close(known)

    def jpeg(self, token: str, name: str, draw: Callable[[Slide], bytes]) -> bytes:
        """A JPEG of a slide, cached or drawn. Raises KeyError for an unknown token, SlideError from reading."""
        with self._lock:
            known = self._known[token]
            self._known.move_to_end(token)
            if (token, name) in self._tiles:
                self._tiles.move_to_end((token, name))
                return self._tiles[token, name]
            idle = [other for other in self._known.values() if other.slide is not None and other is not known]
        for other in idle[: max(0, len(idle) + 1 - MOST_OPEN)]:
            with other.lock:
                _close(other)
        with known.lock:
            if self._known.get(token) is not known:  # forgotten while this waited
                raise KeyError(token)
            if known.slide is None:
                known.slide = self._open(known.path)
            data = draw(known.slide)
        self._keep(token, name, data)
        return data

    def _keep(self, token: str, name: str, data: bytes) -> None:
        with self._lock:
            if token in self._known and (token, name) not in self._tiles:
                self._tiles[token, name] = data
                self._room -= len(data)
                while self._room < 0:
                    self._room += len(self._tiles.popitem(last=False)[1])

    def _keep_coarse(self, token: str, slide: Slide) -> None:
        """The tiles of the levels that have few, drawn now."""
        for level in range(MOST_LEVELS):
            columns, rows = (-(-side // (TILE << level)) for side in slide.size)
            for column, row in itertools.product(range(columns), range(rows)) if columns * rows <= COARSE else ():
                if (token, name := f"{level}/{column}_{row}") not in self._tiles:
                    with suppress(ValueError, OSError):  # what cannot be read is not there later either
                        self._keep(token, name, _draw_tile(slide, level, column, row))
            if columns * rows == 1:
                return

    def tile(self, token: str, level: int, column: int, row: int) -> bytes:
        """JPEG of one tile; the last of a row or column is smaller. Raises KeyError for one that does not exist."""
        name = f"{level}/{column}_{row}"
        if not 0 <= level <= MOST_LEVELS:
            raise KeyError(name)
        return self.jpeg(token, name, lambda slide: _draw_tile(slide, level, column, row))

    def patch(self, token: str, x: int, y: int, side: int, px: int) -> bytes:
        """JPEG of a square of level-0 px, px wide. Raises KeyError for one outside, or larger than any patch."""

        def draw(slide: Slide) -> bytes:
            if not (1 <= px <= TILE and 1 <= side <= 16 * TILE and x < slide.size[0] and y < slide.size[1]):
                raise KeyError(name)
            return slide.read_jpeg((x, y), (px, px), side / px, QUALITY)

        name = f"patch/{x}_{y}_{side}_{px}"
        return self.jpeg(token, name, draw)

    def download(self, token: str, name: str) -> Path:
        """One of DOWNLOADS, written now. Raises KeyError for an unknown token or name, and if none was offered."""
        make = self._known[token].make
        if name not in DOWNLOADS or make is None:
            raise KeyError(name)
        return make(name)

    def routes(self) -> list[Route]:
        """For demo.launch(app_kwargs={"routes": ...}). Under /gradio_api/, which every proxy of Gradio passes on."""
        numbers = r"([0-9]{1,7})"
        tile = re.compile(rf"([0-9]|1[0-9]|20)/{numbers}_{numbers}\.jpg")
        patch = re.compile(rf"patch/{numbers}_{numbers}_{numbers}_{numbers}\.jpg")

        def find(token: str, rest: str) -> Response:
            if found := tile.fullmatch(rest):
                return _jpeg(self.tile(token, *(int(v) for v in found.groups())))
            if found := patch.fullmatch(rest):
                return _jpeg(self.patch(token, *(int(v) for v in found.groups())))
            path = self.download(token, rest)
            headers = {**HEADERS, "Cache-Control": "no-store", "Content-Security-Policy": "sandbox"}
            _, kind = DOWNLOADS[rest]
            return FileResponse(path, media_type=kind, filename=f"sparsewsi-{rest}", headers=headers)

        async def serve(request: Request) -> Response:
            token, rest = request.path_params["token"], request.path_params["rest"]
            known, status, words = self._known.get(token), 404, "Not there."
            try:
                if known is None:
                    raise KeyError(token)
                if rest in DOWNLOADS:  # a job of its session's: it waits for its turn itself
                    return await to_thread.run_sync(find, token, rest, limiter=self._writers)
                if known.waiting >= MOST_WAITING:
                    raise BlockingIOError
                known.waiting += 1
                try:
                    async with known.turn:  # one thread a slide: a slow one keeps none from the others
                        return await to_thread.run_sync(find, token, rest, limiter=self._threads)
                finally:
                    known.waiting -= 1
            except BlockingIOError:
                status, words = 429, "Too much of this slide is being looked at."
            except Busy as error:
                status, words = 429, str(error)
            except (Halted, KeyError, ValueError, OSError):
                pass
            return Response(words, status, headers={**HEADERS, "Cache-Control": "no-store"})

        return [Route("/gradio_api/slide/{token}/{rest:path}", serve, methods=["GET"])]


def _draw_tile(slide: Slide, level: int, column: int, row: int) -> bytes:
    """Raises KeyError for a tile that does not exist."""
    scale, (width, height) = 2**level, slide.size
    left, top = column * TILE * scale, row * TILE * scale
    if left >= width or top >= height or (level and max(width, height) <= TILE * scale // 2):
        raise KeyError(f"{level}/{column}_{row}")
    size = [min(TILE, -(-(side - start) // scale)) for side, start in ((width, left), (height, top))]
    return slide.read_jpeg((left, top), (size[0], size[1]), scale, QUALITY)


def _close(known: _Known) -> None:
    if known.slide is not None:
        known.slide.close()
        known.slide = None


def _jpeg(data: bytes) -> Response:
    return Response(data, media_type="image/jpeg", headers=HEADERS)


# ---- the component, and how the page around it looks


def slide_viewer(**settings: Any) -> gr.HTML:
    """The component, empty. As an output it is filled by gr.HTML(slides=[...], **bag_props(...), map=...).

    Its events are `picks` ({pinned, dropped}: indices of patches), `journal` ({views}: what was looked at), `likes`
    ({index}), `ask` ({number} of a suggested question), `without` ({name} of a focus), `leave` (the what-if),
    `cancel` (the analysis), `shown` and `remove` ({number} of a slide, from 0).
    """
    html, css = ((HERE / f"viewer.{kind}").read_text(encoding="utf-8") for kind in ("html", "css"))
    js = "\n".join((HERE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    nothing = dict.fromkeys(PROPS)
    return gr.HTML(
        html_template=html,
        css_template=css,
        js_on_load=js,
        apply_default_css=False,
        padding=False,
        **nothing,
        **settings,
    )


def slide_props(token: str, slide: Slide, source: str = "") -> dict[str, Any]:
    """What the viewer must know of a slide. source: a name the address may carry to open it again, "" for uploads."""
    return {
        "token": token,
        "size": list(slide.size),
        "tile": TILE,
        "mpp": slide.mpp,
        "mpp_source": slide.mpp_source,
        "name": slide.name,
        "source": source,
    }


def foci_props(foci: Sequence[Focus], selection: Selection, effects: Mapping[str, float] | None = None) -> list[dict]:
    """The prop "foci": which of the kept patches belong together. effects: by name, what an answer loses without."""
    return [
        {
            "name": focus.name,
            "indices": selection.indices[list(focus.places)].tolist(),
            "effect": (effects or {}).get(focus.name),
        }
        for focus in foci
    ]


def bag_props(bag: Bag, selection: Selection) -> dict[str, Any]:
    """The props "bag" (all N patches with their scores and numbers) and "kept" (the K selected).

    coords are those on each patch's own slide; parts: [patches, side] of each slide, in order
    """
    every = replace(selection, indices=torch.arange(len(selection.scores)))
    return {
        "bag": {
            "coords": packed(own_coords(bag), np.int32),
            "scores": packed(selection.scores, np.float32),
            "ranks": packed(every.ranks, np.int32),
            "parts": [[part.patches, part.patch_size] for part in list_parts(bag)],
        },
        "kept": packed(selection.indices, np.int32),
    }


def file_props(several: bool = False) -> list[tuple[str, str]]:
    """The prop "files": what can be downloaded, of one slide or several, and what it is called."""
    other = ONE_SLIDE if several else BY_SLIDE
    return [(name, called) for name, (called, _) in DOWNLOADS.items() if name != other]


def map_props(points: FeatureMap) -> dict[str, Any]:
    """The prop "map"."""
    return {"xy": packed(points.xy, np.float32), "rows": packed(points.rows, np.int32), "title": points.title}


def words_props(words: Words | None) -> dict[str, Any] | None:
    """The prop "words"; None for a model that has no words for patches."""
    if words is None:
        return None
    return {
        "names": list(words.vocabulary),
        "nearest": packed(words.nearest, np.int32),
        "cosine": packed(words.cosine, np.float32),
    }


def packed(values: Any, dtype: type) -> str:
    """Numbers as base64 of little-endian bytes: a third of what they take as JSON, and no parsing."""
    return base64.b64encode(np.ascontiguousarray(values, np.dtype(dtype).newbyteorder("<")).tobytes()).decode()


def theme() -> gradio.themes.Base:
    """The colours of page.css for Gradio's own parts; fonts of the visitor's machine: no request to a font server."""
    base = gradio.themes.Base(
        primary_hue="cyan",
        secondary_hue="cyan",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["monospace"],
        text_size="sm",
        radius_size="md",
    )
    ink, quiet, line, paper, soft = (f"var(--room-{name})" for name in ("ink", "quiet", "line", "paper", "soft"))
    accent, on_accent = "var(--room-accent)", "var(--room-on-accent)"
    colours = {
        "body_background_fill": paper,
        "body_text_color": ink,
        "body_text_color_subdued": quiet,
        "background_fill_primary": paper,
        "background_fill_secondary": soft,
        "border_color_primary": line,
        "color_accent": accent,
        "color_accent_soft": soft,
        "link_text_color": accent,
        "block_background_fill": paper,
        "block_border_color": line,
        "block_title_text_color": quiet,
        "block_label_text_color": quiet,
        "block_label_background_fill": paper,
        "input_background_fill": paper,
        "input_background_fill_focus": paper,
        "input_border_color": line,
        "input_border_color_focus": accent,
        "input_placeholder_color": quiet,
        "slider_color": accent,
        "button_primary_background_fill": accent,
        "button_primary_background_fill_hover": accent,
        "button_primary_text_color": on_accent,
        "button_secondary_background_fill": paper,
        "button_secondary_background_fill_hover": soft,
        "button_secondary_border_color": line,
        "button_secondary_text_color": ink,
    }
    sizes = {
        "block_title_background_fill": "transparent",
        "block_title_padding": "0 0 2px 0",
        "block_title_text_weight": "500",
        "block_border_width": "1px",
        "input_border_width": "1px",
        "button_border_width": "1px",
        "block_shadow": "none",
        "input_shadow": "none",
    }
    dark = {f"{name}_dark": value for name, value in {**colours, **sizes}.items()}
    known = inspect.signature(base.set).parameters  # some have no dark twin
    return base.set(**{name: value for name, value in {**colours, **sizes, **dark}.items() if name in known})
