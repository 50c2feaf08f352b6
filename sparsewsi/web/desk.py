"""The state of one server: its model, the slides that pages show, the API's cases, answers on their way, its log.

A Desk is made in main and passed to what needs it; no module keeps anything of a server.
"""

import hashlib
import importlib.util
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from sparsewsi.bags.bag import Bag, save_bag
from sparsewsi.bags.encoders import load_encoder
from sparsewsi.bags.extract import encode_slide
from sparsewsi.bags.foreign import load_bag
from sparsewsi.bags.patch_encoder import PatchEncoder
from sparsewsi.files import append_line, cache_folder
from sparsewsi.model.config import SparseWSIConfig, name_model
from sparsewsi.model.selection import Selection
from sparsewsi.report import umap
from sparsewsi.report.answer import Answer, word_notice
from sparsewsi.report.case import Case, Model, open_case
from sparsewsi.slides.confined import open_confined
from sparsewsi.slides.remote import ANY, OPEN, is_remote
from sparsewsi.slides.slide import Slide, SlideError, open_slide
from sparsewsi.web import intake
from sparsewsi.web.errors import Halted, stop_unseen
from sparsewsi.web.examples import name_example
from sparsewsi.web.turns import Turns
from sparsewsi.web.viewer import Slides

Progress = Callable[..., Any]  # called as gr.Progress is
Messages = Sequence[Mapping[str, str]]
MOST_LEFT = 10_000  # callers that are remembered to have left
CASES = 16  # analysed slides kept for callers of the API; the oldest is forgotten first


@dataclass(frozen=True, eq=False)
class Opened:
    """A slide that was analysed for a page or a caller of the API. token: its name for the viewer."""

    token: str
    case: Case


class Desk:
    """What one server holds. Its model is loaded once, when it is first needed; its methods may be called by threads.

    model:       folder or hub repository of the model
    folder:      where uploads and downloads lie; nobody but us may read it, and who made it deletes it
    uploads:     where Gradio puts files that are uploaded
    log:         file that views and questions of all sessions are added to, as JSON lines
    allow_paths: any file of this machine may be opened by its path, and slides of any server: never on a page that
                 others can reach, which opens those of public collections alone (slides.remote.OPEN)
    """

    def __init__(
        self,
        model: str,
        folder: Path,
        *,
        uploads: Path | None = None,
        log: Path | None = None,
        allow_paths: bool = False,
    ) -> None:
        self.model_name, self.log, self.allow_paths = model, log, allow_paths
        self.hosts = ANY if allow_paths else OPEN
        self.folder, self.uploads = folder, uploads or folder / "gradio"
        self.slides, self.turns = Slides(self.open_slide), Turns()
        self._cases: dict[str, Case] = {}  # by token
        self._openings: dict[str, object] = {}  # by session: the slide that was asked for last
        self._left: dict[str, float] = {}  # by session: when its caller was found gone (time.monotonic)
        self._reading: set[tuple[str, Slide]] = set()  # (session, a slide that is analysed for it)
        self._loading, self._writing = threading.Lock(), threading.Lock()
        self._loaded: tuple[Model, PatchEncoder] | None = None
        # On a Space what these are given is pickled, so the desk must not be among it.
        self.analyse = _run_on_gpu(self._analyse)
        self.choose = _run_on_gpu(self._choose)
        self.answer = _run_on_gpu(self._answer)
        self.measure = _run_on_gpu(self._measure)

    # ---- the model

    def load(self) -> tuple[Model, PatchEncoder]:
        """The model and its patch encoder; a second caller waits for the first one's loading."""
        with self._loading:
            if self._loaded is None:
                from sparsewsi.model.sparse_wsi import SparseWSI  # seconds, that the page does not wait for

                model = SparseWSI.from_pretrained(self.model_name)
                self._loaded = model, load_encoder(model.config.encoder)
            return self._loaded

    @property
    def model(self) -> Model:
        return self.load()[0]

    @property
    def config(self) -> SparseWSIConfig:
        """The model's configuration, read without its weights where it lies on this machine."""
        if self._loaded is None and Path(self.model_name).is_dir():
            return SparseWSIConfig.load(self.model_name)
        return self.model.config

    @property
    def title(self) -> str:
        """The model's name for people, never a path."""
        return name_model(self.model_name)

    @property
    def notice(self) -> str:
        """The sentence under every answer."""
        return word_notice(self.config)

    def warm_up(self) -> None:
        """Load the model and let umap-learn compile, so that the first visitor does not wait for either."""
        try:
            self.load()
        except (ValueError, OSError, RuntimeError) as error:
            print(f"The model could not be loaded yet: {error}", file=sys.stderr)
        few = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
        umap.map_features(few, Selection(torch.arange(4), few[:, 0].clone(), few[:4], len(few)))

    # ---- slides

    def open_slide(self, path: str | Path | None, slide_mpp: float | None = None) -> Slide:
        """Open a slide in a process of its own; one of a session's folder sees that folder alone. Raises SlideError.

        A slide on a server is read in this process: the child may open no connection.
        """
        if path is None:
            raise SlideError("The slide is not at hand, only its features.")
        if is_remote(path):
            return open_slide(path, slide_mpp=slide_mpp, hosts=self.hosts)
        uploaded = Path(path).is_relative_to(self.folder)
        root = self.folder / Path(path).relative_to(self.folder).parts[0] if uploaded else None
        return open_confined(path, root=root, slide_mpp=slide_mpp)

    def keep_upload(self, file: str | Path, session: str | None) -> Path:
        """Move an upload to its session's folder and look at it; returns what to open. Raises ValueError."""
        folder = self.folder_of(session)
        kept = intake.keep_upload(intake.require_upload(file, self.uploads), folder)
        try:
            intake.check(kept, folder)
        except ValueError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return kept

    @contextmanager
    def _read_for(self, session: str, slide: Slide) -> Iterator[None]:
        """A slide that is closed under its readers once the session's caller is gone."""
        self._reading.add((session, slide))
        try:
            yield
        finally:
            self._reading.discard((session, slide))

    def drop_upload(self, file: str | Path) -> None:
        """Delete what was uploaded and read; what was not uploaded stays."""
        with suppress(ValueError, OSError):
            intake.require_upload(file, self.uploads).unlink()

    # ---- from a slide to an answer

    def _analyse(
        self,
        token: str,
        path: str,
        slide_mpp: float | None,
        selector: str = "learned",
        progress: Progress | None = None,
    ) -> Opened:
        """Slide -> bag -> selection, saying what it is doing."""
        tell = progress or _say_nothing
        tell(None, desc="Loading the model")
        model = self.model
        bag = self._read_bag(token, path, slide_mpp, tell)
        tell(1, desc="Selecting patches")
        return Opened(token, open_case(model, bag, path, selector=selector, slide_mpp=slide_mpp))

    def _read_bag(self, token: str, path: str, slide_mpp: float | None, tell: Progress) -> Bag:
        """The slide's patches, encoded; those of examples are kept in the cache, nobody else's ever are."""
        model, encoder = self.load()
        config = model.config
        name = f"{Path(path).stem}-{config.encoder}-{config.mpp:g}-{config.patch_size}.safetensors"
        kept = cache_folder() / name if name_example(path) and slide_mpp is None else None
        if kept is not None and kept.is_file():
            return load_bag(kept)

        session, shown = self.slides.owner_of(token), self.slides.holds(token)
        look = self.watch(session)

        def count(done: int, total: int) -> None:
            look()
            if shown and not self.slides.holds(token):  # another one was opened
                raise stop_unseen()
            tell((done, total), desc="Encoding the patches", unit="patches")

        tell(None, desc="Finding tissue")
        with self.open_slide(path, slide_mpp) as slide, self._read_for(session, slide):
            bag = encode_slide(slide, encoder, mpp=config.mpp, patch_size=config.patch_size, progress=count)
        if kept is not None:
            save_bag(bag, kept)
        return bag

    def _choose(self, case: Case, k: int, selector: str, pinned: Collection[int], dropped: Collection[int]) -> Case:
        """The case with other patches."""
        return case.choose(self.model, k, selector, pinned, dropped)

    def _answer(
        self, case: Case, messages: Messages, options: Sequence[str], session: str | None = None
    ) -> Iterator[str]:
        """The answer to the last of the messages, in pieces, for as long as the session's caller is there."""
        look = self.watch(session)
        for piece in case.answer(self.model, messages, options):
            look()
            yield piece

    def _measure(
        self,
        case: Case,
        messages: Messages,
        text: str,
        options: Sequence[str],
        session: str | None = None,
        evidence: bool = True,
        caller: str | None = None,
    ) -> Answer:
        """What is known of an answer, for as long as the caller, a session, is there.

        session: whose Stop button ends it too; raises Halted then
        """
        turn = self.turns.get(session) if session is not None else None
        here = self.watch(caller or session)

        def look(*_: int) -> None:
            here()
            if session is not None and not self.turns.wanted(session, turn):
                raise Halted

        return case.measure(self.model, messages, text, options, evidence=evidence, progress=look)

    # ---- sessions

    def folder_of(self, session: str | None, what: str = "") -> Path:
        """Where a session's upload, or what else it has, lies. Its name, the browser's, is used as a digest only."""
        return self.folder / (hashlib.sha256(str(session).encode()).hexdigest()[:32] + what)

    def record(self, session: str | None, **event: Any) -> None:
        """Add a line to the session's log, and to the server's."""
        folder = self.folder_of(session, "-files")
        folder.mkdir(mode=0o700, exist_ok=True)
        line = {"time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "session": folder.name[:8], **event}
        with self._writing:
            append_line(folder / "log.jsonl", line)
            if self.log is not None:
                append_line(self.log, line)

    def begin_opening(self, session: str) -> object:
        """A slide was asked for. Returns what end_opening must be given."""
        self._openings[session] = mine = object()
        return mine

    def end_opening(self, session: str, mine: object, failed: bool = False) -> bool:
        """Whether the slide is still the last one asked for. One that could not be opened is in nobody's way."""
        last = self._openings.get(session, mine) is mine
        if failed and last:
            self._openings.pop(session, None)
        return last

    def leave(self, session: str) -> None:
        """A session's caller is gone: what is done for it now ends."""
        self._left[session] = time.monotonic()
        while len(self._left) > MOST_LEFT:
            self._left.pop(next(iter(self._left)), None)
        for slide in [slide for owner, slide in list(self._reading) if owner == session]:
            slide.close()

    def watch(self, session: str | None) -> Callable[..., None]:
        """What work for a session calls now and then: raises an unseen error once its caller has left."""
        began = time.monotonic()

        def look(*_: int) -> None:
            if session is not None and self._left.get(session, -math.inf) >= began:
                raise stop_unseen()

        return look

    def keep_case(self, opened: Opened) -> None:
        """Keep a case for callers of the API, in place of the oldest if there are too many."""
        self._cases[opened.token] = opened.case
        for old in list(self._cases)[:-CASES]:
            self._cases.pop(old, None)
            if self.slides.holds(old):  # its caller may have no session that could end
                self.forget(self.slides.owner_of(old))

    def find_case(self, token: str) -> Case:
        """An analysed slide of the API. Raises ValueError for one that is not known."""
        if token not in self._cases:
            raise ValueError(
                "This case is not known, or no longer. Call analyze first; a case lives as long as its session."
            )
        return self._cases[token]

    def forget(self, session: str | None) -> None:
        """Delete what a session uploaded and what was made of it; what is done for it ends."""
        self.leave(str(session))
        for token in self.slides.forget(str(session)):
            self._cases.pop(token, None)
        self.turns.drop(str(session))
        self._openings.pop(str(session), None)
        for what in ("", "-files"):
            shutil.rmtree(self.folder_of(session, what), ignore_errors=True)


def _say_nothing(*_given: Any, **_named: Any) -> None:
    """Progress of which nobody is told."""


Function = TypeVar("Function", bound=Callable[..., Any])


def _run_on_gpu(function: Function) -> Function:
    """spaces.GPU on a Hugging Face Space, the function itself elsewhere."""
    if os.environ.get("SPACE_ID") and importlib.util.find_spec("spaces"):
        import spaces  # type: ignore[import-not-found]

        return spaces.GPU(function)
    return function
