"""The state of one server: its model, the slides that pages show, the API's cases, answers on their way, its log.

A Desk is made in main and passed to what needs it; no module keeps anything of a server.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from sparsewsi.bags.bag import Bag, save_bag
from sparsewsi.bags.encoders import load_encoder
from sparsewsi.bags.extract import extract_bag
from sparsewsi.bags.foreign import load_bag
from sparsewsi.bags.patch_encoder import PatchEncoder
from sparsewsi.files import append_line, cache_folder
from sparsewsi.model.config import SparseWSIConfig, name_model
from sparsewsi.model.selection import Selection
from sparsewsi.report import umap
from sparsewsi.report.answer import Answer, word_notice
from sparsewsi.report.case import Case, Model, open_case
from sparsewsi.web.errors import Halted
from sparsewsi.web.examples import name_example
from sparsewsi.web.turns import Turns
from sparsewsi.web.viewer import Slides

Progress = Callable[..., Any]  # called as gr.Progress is
Messages = Sequence[Mapping[str, str]]
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
    allow_paths: any file of this machine may be opened by its path: never on a page that others can reach
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
        self.folder, self.uploads = folder, uploads or folder / "gradio"
        self.slides, self.turns = Slides(), Turns()
        self._cases: dict[str, Case] = {}  # by token
        self._openings: dict[str, object] = {}  # by session: the slide that was asked for last
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
        bag = self._read_bag(path, slide_mpp, tell)
        tell(1, desc="Selecting patches")
        return Opened(token, open_case(model, bag, path, selector=selector, slide_mpp=slide_mpp))

    def _read_bag(self, path: str, slide_mpp: float | None, tell: Progress) -> Bag:
        """The slide's patches, encoded; those of examples are kept in the cache, nobody else's ever are."""
        model, encoder = self.load()
        config = model.config
        name = f"{Path(path).stem}-{config.encoder}-{config.mpp:g}-{config.patch_size}.safetensors"
        kept = cache_folder() / name if name_example(path) and slide_mpp is None else None
        if kept is not None and kept.is_file():
            return load_bag(kept)

        def count(done: int, total: int) -> None:
            tell((done, total), desc="Encoding the patches", unit="patches")

        tell(None, desc="Finding tissue")
        bag = extract_bag(
            path, encoder, mpp=config.mpp, patch_size=config.patch_size, slide_mpp=slide_mpp, progress=count
        )
        if kept is not None:
            save_bag(bag, kept)
        return bag

    def _choose(self, case: Case, k: int, selector: str, pinned: Collection[int], dropped: Collection[int]) -> Case:
        """The case with other patches."""
        return case.choose(self.model, k, selector, pinned, dropped)

    def _answer(self, case: Case, messages: Messages, options: Sequence[str]) -> Iterator[str]:
        """The answer to the last of the messages, in pieces."""
        yield from case.answer(self.model, messages, options)

    def _measure(
        self,
        case: Case,
        messages: Messages,
        text: str,
        options: Sequence[str],
        session: str | None = None,
        evidence: bool = True,
    ) -> Answer:
        """What is known of an answer. Raises Halted once the session has pressed Stop."""
        turn = self.turns.get(session) if session is not None else None

        def look(*_: int) -> None:
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

    def keep_case(self, opened: Opened) -> None:
        """Keep a case for callers of the API, in place of the oldest if there are too many."""
        self._cases[opened.token] = opened.case
        for old in list(self._cases)[:-CASES]:
            self._cases.pop(old, None)

    def find_case(self, token: str) -> Case:
        """An analysed slide of the API. Raises ValueError for one that is not known."""
        if token not in self._cases:
            raise ValueError(
                "This case is not known, or no longer. Call analyze first; a case lives as long as its session."
            )
        return self._cases[token]

    def forget(self, session: str | None) -> None:
        """Delete what a session uploaded and what was made of it."""
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
