"""The state of one server: its model, the slides that pages show, the API's cases, answers on their way, its log.

A Desk is made in main and passed to what needs it; no module keeps anything of a server.
"""

import gc
import hashlib
import re
import secrets
import shutil
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsewsi.bags.bag import Bag, join, save_bag
from sparsewsi.bags.encoders import load_encoder
from sparsewsi.bags.extract import bag_of, choose_coords, read_patches
from sparsewsi.bags.foreign import load_bag
from sparsewsi.bags.patch_encoder import PatchEncoder
from sparsewsi.files import append_line, cache_folder
from sparsewsi.model.config import SparseWSIConfig, name_model
from sparsewsi.model.words import Words
from sparsewsi.readers.pictures import PictureReader, Pictures
from sparsewsi.report import umap
from sparsewsi.report.answer import Answer, word_notice
from sparsewsi.report.case import Case, Model, open_case
from sparsewsi.slides.confined import open_confined
from sparsewsi.slides.remote import ANY, OPEN, is_remote
from sparsewsi.slides.slide import Slide, SlideError, open_slide
from sparsewsi.slides.tissue import patch_side
from sparsewsi.web import intake, zero_gpu
from sparsewsi.web.examples import name_example
from sparsewsi.web.folder import UNOPENED, delete_untouched, measure
from sparsewsi.web.gallery import find_sample
from sparsewsi.web.jobs import EVERY, Halted, Job, Jobs, Peek
from sparsewsi.web.limits import MOST_WEIGHED, TOO_LONG, check_slides
from sparsewsi.web.memory import give_back
from sparsewsi.web.turns import Turns
from sparsewsi.web.viewer import PICTURES, Slides

Messages = Sequence[Mapping[str, str]]
Talk = tuple[list, Mapping[int, Any], Mapping[int, Answer]]  # a chat, its questions and answers, by their place in it
Exchange = tuple[str, str, str]  # of which slides, what was asked, what was answered
MOST_OPENED, MOST_FEATURES = 512, 512 << 20  # analysed slides that are kept, and bytes of their features
MOST_PATCHES = 200_000  # of a case; their features take half a GB
BATCH = 16  # patches that are encoded in one turn: who waits for theirs waits so long
MOST_DECODED = 192 << 20  # bytes of px of all PNG and JPEG slides that are open: one of 8,192 x 8,192 px
MOST_YIELDED = 60.0  # s for which the compiler of the map lets questions go first
MOST_GONE = 10_000  # sessions that are remembered to have ended
LEFT_FOR, MOST_LEFT, MOST_LEFT_FEATURES = 600.0, 64, 256 << 20  # s that a closed page's case is kept, how many, bytes
MOST_REMEMBERED = 50  # answers of the API that a new one is held against
MOST_LOGGED, MOST_LOGGED_IN_ALL = 1 << 20, 1 << 30  # bytes of a session's log, and of the server's


@dataclass(frozen=True, eq=False)
class CaseSlide:
    """One slide of a case.

    token:     its name for the viewer
    slide_mpp: um/px of the scan if it was given by hand, else None
    props:     what the viewer must know of it (viewer.slide_props)
    bag:       its patches, once they are encoded; their features are a part of the case's
    """

    token: str
    path: str
    slide_mpp: float | None = None
    props: dict[str, Any] = field(default_factory=dict)
    bag: Bag | None = None


class Opened:
    """A case that was analysed for a page or a caller of the API: one slide or several, in order.

    token: its name, which is that of its first slide.
    Its features, which take most of the memory, go when its session does, whoever still holds this.
    """

    def __init__(self, slides: Sequence[CaseSlide], case: Case):
        self.slides, self.token = tuple(slides), slides[0].token
        self.bytes, self.features = case.bag.features.nbytes, case.bag.features.data_ptr()
        self._case: Case | None = case
        self._beside: weakref.WeakSet[Opened] = weakref.WeakSet()
        self.marks: dict[int, str] = {}  # by index of a patch: what the reader says of it
        self.called = ""  # what the reader calls the case
        self.talk: Talk = ([], {}, {})
        self.answers: deque[Answer] = deque(maxlen=MOST_REMEMBERED)  # that callers of the API had
        self.earlier: tuple[Exchange, ...] = ()  # what was answered while the case had other slides

    @property
    def case(self) -> Case:
        """Raises ValueError once the case was closed."""
        if self._case is None:
            raise ValueError("This slide has been closed; open it again.")
        return self._case

    @property
    def closed(self) -> bool:
        """Whether another case has taken its place, or its session has ended."""
        return self._case is None

    def beside(self, case: Case, slides: Sequence[CaseSlide] = ()) -> "Opened":
        """The same slides with other patches, or some of them alone; it goes when this one does."""
        other = Opened(slides or self.slides, case)
        other.called = self.called
        if not slides:
            other.marks = self.marks
        self._beside.add(other)
        return other

    def take_marks(self, before: "Opened") -> None:
        """Keep what the reader said of the case before, and of the patches of its slides that are still there."""
        self.called, self.earlier = before.called, before.earlier
        starts = dict(self._starts())
        for token, start in before._starts():
            count = next((len(one.bag.coords) for one in self.slides if one.token == token and one.bag), 0)
            here = {i - start: mark for i, mark in before.marks.items() if start <= i < start + count}
            self.marks |= {starts[token] + row: mark for row, mark in here.items()}

    def _starts(self) -> Iterator[tuple[str, int]]:
        """The slides' tokens, and the index of the first patch of each."""
        start = 0
        for one in self.slides:
            yield one.token, start
            start += len(one.bag.coords) if one.bag else 0

    @property
    def patches(self) -> int:
        """How many the case has."""
        return 0 if self._case is None else len(self._case.bag.coords)

    def close(self) -> None:
        self._case = None
        self.slides = tuple(replace(one, bag=None) for one in self.slides)
        for other in list(self._beside):
            other.close()


@dataclass(frozen=True, eq=False)
class Left:
    """A case whose page was closed or loaded anew, for a while and for who shows one of its tokens.

    slides: those that can be opened again; with their patches, where these are nobody else's to see
    lost:   how many were uploaded, and are deleted
    kept:   indices of its patches; None if it was not wholly analysed
    asked:  the question that was being answered or waited for a slide, a chat.Question; None if none did
    """

    tokens: frozenset[str]
    slides: tuple[CaseSlide, ...]
    lost: int
    kept: tuple[int, ...] | None
    talk: Talk
    earlier: tuple[Exchange, ...]
    called: str
    since: float
    asked: Any = None

    @property
    def bytes(self) -> int:
        return sum(one.bag.features.nbytes for one in self.slides if one.bag)


class Desk:
    """What one server holds. Its model is loaded once, when it is first needed; its methods may be called by threads.

    model:       folder or hub repository of the model
    folder:      where uploads and downloads lie; nobody but us may read it, and who made it deletes it
    uploads:     where Gradio puts files that are uploaded
    quota:       bytes of strangers' files in all, at most; a session has a quarter of them
    log:         file that views and questions of all sessions are added to, as JSON lines
    allow_paths: any file of this machine may be opened by its path, and slides of any server: never on a page that
                 others can reach, which opens those of public collections alone (slides.remote.OPEN)
    reader:      who answers, from pictures of the patches; None: the model's own LLM
    """

    def __init__(
        self,
        model: str,
        folder: Path,
        *,
        uploads: Path | None = None,
        quota: int = 64 << 30,
        log: Path | None = None,
        allow_paths: bool = False,
        reader: PictureReader | None = None,
    ) -> None:
        self.reader = reader
        self.model_name, self.log, self.allow_paths = model, log, allow_paths
        self.hosts = ANY if allow_paths else OPEN
        self.folder, self.uploads, self.quota = folder, uploads or folder / "gradio", quota
        self.slides, self.turns, self.jobs = Slides(self.open_slide), Turns(), Jobs()
        self._opened: OrderedDict[str, Opened] = OrderedDict()  # by token; first what was not asked about for longest
        self._examples: dict[Path, Bag] = {}  # by file: one copy for all sessions
        self._gone: OrderedDict[str, None] = OrderedDict()  # sessions that were forgotten
        self._here: set[str] = set()  # sessions with an open page
        self._asked: dict[str, float] = {}  # by session: when it last asked for something (time.monotonic)
        self._openings: dict[str, object] = {}  # by session: the slide that was asked for last
        self._stays: set[str] = set()  # sessions whose case before was analysed
        self._held: dict[str, tuple[str, ...]] = {}  # by session: uploads of the case before, which can be opened again
        self._shown: dict[str, list[CaseSlide]] = {}  # by session: of its case, in order
        self._left: OrderedDict[str, Left] = OrderedDict()  # by session, which has ended
        self._images: weakref.WeakSet[Slide] = weakref.WeakSet()
        self._loading, self._writing, self._weighing = threading.Lock(), threading.Lock(), threading.Lock()
        self._compiling = threading.Lock()
        self._loaded: tuple[Model, PatchEncoder] | None = None

    # ---- the model

    def load(self) -> tuple[Model, PatchEncoder]:
        """The model and its patch encoder; a second caller waits for the first one's loading."""
        with self._loading:
            if self._loaded is None:
                from sparsewsi.model.sparse_wsi import SparseWSI  # seconds, that the page does not wait for

                model: Model = SparseWSI.from_pretrained(self.model_name)
                lent = zero_gpu.borrow(model) if zero_gpu.is_lent() else model
                self._loaded = lent, load_encoder(model.config.encoder)
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
    def reading(self) -> str:
        """Who reads, and what is sent where, to be told before the first question; "" for the model's own LLM."""
        reader = self.reader
        if reader is None:
            return ""
        measured = "" if reader.likelihoods else "What its answers rest on is not measured; a what-if asks it again. "
        return f"Read by {reader.name}, from pictures of the patches. {measured}{reader.sends}".strip()

    @property
    def notice(self) -> str:
        """The sentence under every answer."""
        return word_notice(self.config)

    def warm_up(self) -> None:
        """Load the model and what draws, let umap-learn compile, so that the first visitor waits for none of them.

        Whoever asks meanwhile goes first: a compiler that holds Python's lock doubles the time of an answer.
        """
        try:
            self.load()
        except (ValueError, OSError, RuntimeError) as error:
            print(f"The model could not be loaded yet: {error}", file=sys.stderr)
        until = time.monotonic() + MOST_YIELDED

        def pause() -> None:
            while self.jobs.answering and time.monotonic() < until:
                time.sleep(0.1)

        with self._compiling:
            umap.compile_ahead(pause)
        gc.collect()
        gc.freeze()  # what is there now stays: to look it through again and again would stop everything for a second

    def wait_for_map(self, job: Job) -> None:
        """Until umap-learn has compiled: who waited for that in a turn of the machine would keep it from all others."""
        while not self._compiling.acquire(timeout=EVERY):
            job.look()
        self._compiling.release()

    # ---- slides

    def open_slide(self, path: str | Path | None, slide_mpp: float | None = None, job: Job | None = None) -> Slide:
        """Open a slide in a process of its own; an upload's sees the folder of that upload alone. Raises SlideError.

        job: closes it under its readers when it ends, from the moment on that its process runs
        A slide on a server is read in this process: the child may open no connection.
        """
        if path is None:
            raise SlideError("The slide is not at hand, only its features.")
        if is_remote(path):
            slide = open_slide(path, slide_mpp=slide_mpp, hosts=self.hosts)
            if job is not None:
                job.hold(slide)
            return slide
        strange = self.is_upload(path)
        root = self._home_of(Path(path)) if strange else None
        slide = open_confined(path, root=root, slide_mpp=slide_mpp, begun=job.hold if job else None)
        if slide.vendor in PICTURES:
            self._weigh(slide)
        return slide

    def is_upload(self, path: str | Path) -> bool:
        """Whether a file is a stranger's."""
        return Path(path).is_relative_to(self.folder)

    def _home_of(self, upload: Path) -> Path:
        """The folder of one upload, in that of its session."""
        session, *below = upload.relative_to(self.folder).parts
        return self.folder.joinpath(session, *below[: min(1, len(below) - 1)])

    def _weigh(self, slide: Slide) -> None:
        """Close the slide and raise SlideError if there is no memory for its px, all of which are decoded together."""
        weight, most = 3 * slide.size[0] * slide.size[1], f"{MOST_DECODED / 1e6:.0f} MB"
        with self._weighing:
            if weight <= MOST_DECODED and self._decoded() + weight > MOST_DECODED:
                self.slides.rest()
            if self._decoded() + weight <= MOST_DECODED:
                self._images.add(slide)
                return
        slide.close()
        if weight > MOST_DECODED:
            raise SlideError(
                f"A PNG or JPEG is decoded as a whole; this one takes {weight / 1e6:,.0f} MB, more than the {most} "
                "that the page has for pictures. Save it as a pyramidal TIFF."
            )
        raise SlideError("The server has no memory for another PNG or JPEG now; try again in a few minutes.")

    def _decoded(self) -> int:
        """Bytes that the px of all open pictures take at most."""
        return sum(3 * slide.size[0] * slide.size[1] for slide in list(self._images) if not slide.closed)

    def check(self, path: str | Path, job: Job) -> None:
        """Raise ValueError if a slide cannot be opened and looked at."""
        intake.check(path, lambda path: self.open_slide(path, job=job))

    def keep_upload(self, file: str | Path, session: str | None, job: Job, beside: bool = False) -> Path:
        """Move an upload to its session's folder and look at it; returns what to open. Raises ValueError and Halted.

        beside: the session's other uploads stay, as those of one case; else those that it does not look at go
        """
        folder, most = self.folder_of(session), self.quota // 4
        upload = intake.require_upload(file, self.uploads)
        home = folder / secrets.token_hex(8)
        try:
            self._make_room(session, upload.stat().st_size, most, beside)
            folder.mkdir(mode=0o700, exist_ok=True)
            room = min(most - measure(folder), self.quota - measure(self.folder))
            kept = intake.keep_upload(upload, home, room, job.look)
            self.check(kept, job)
            self._require_here(session, job)
        except (ValueError, Halted):
            self.sweep(session)  # all or none of the files of one case
            with suppress(OSError):
                folder.rmdir()  # if it holds nothing else
            job.look()
            raise
        finally:
            shutil.rmtree(upload.parent, ignore_errors=True)
        return kept

    def _make_room(self, session: str | None, size: int, most: int, beside: bool) -> None:
        """Raise ValueError where a session's uploads would take more than it has; the slide before goes, if it must."""
        folder = self.folder_of(session)
        if not beside:
            self.sweep(session)
        if measure(folder) + size <= most:
            return
        if self._held.pop(str(session), ()):
            self.sweep(session)
            if measure(folder) + size <= most:
                return
        if beside:
            raise ValueError(f"The slides of a case may take {most / 1e9:,.1f} GB here together; leave some out.")
        shutil.rmtree(folder, ignore_errors=True)

    def sweep(self, session: str | None) -> None:
        """Delete what a session uploaded and looks at no more, but the uploads of its case before."""
        shown = [*self.slides.paths_of(str(session)), *map(Path, self._held.get(str(session), ()))]
        for home in self.folder_of(session).glob("*"):
            if not any(path.is_relative_to(home) for path in shown):
                shutil.rmtree(home) if home.is_dir() else home.unlink()

    def _require_here(self, session: str | None, job: Job) -> None:
        job.look()
        if str(session) in self._gone:
            raise Halted

    def show(self, one: CaseSlide, job: Job, slide: Slide | None = None, beside: bool = False) -> CaseSlide:
        """The slide with a token for the job's session, in place of those before or beside them. Raises Halted.

        slide: open already, and closed from here on
        """
        job.token = self.slides.add(one.path, job.session, slide, beside)
        if job.ended:
            self.slides.drop(job.token)
            raise Halted
        shown = replace(one, token=job.token, props=one.props | {"token": job.token})
        self._shown[job.session] = [*(self._shown.get(job.session, []) if beside else []), replace(shown, bag=None)]
        return shown

    def drop_upload(self, file: str | Path) -> None:
        """Delete what was uploaded and read; what was not uploaded stays."""
        with suppress(ValueError, OSError):
            upload = intake.require_upload(file, self.uploads)
            shutil.rmtree(upload.parent)

    # ---- from a slide to an answer

    def analyse(
        self, one: CaseSlide, others: Sequence[CaseSlide] = (), selector: str = "learned", job: str = ""
    ) -> Opened:
        """Slide -> bag -> selection among its patches and those of the others, saying what it is doing.

        others: slides of the same case that are encoded already; job: the name of its job
        Raises ValueError for a slide that is among the others, and for more slides or patches than a case may have.
        """
        doing = self.jobs.find(job)
        check_slides(len(others) + 1)
        doing.tell("loading the model")
        self.load()
        try:
            beside = sum(len(other.bag.coords) for other in others if other.bag)
            bag = one.bag or self._read_bag(one, beside, doing)
        except SlideError:
            doing.look()  # a slide that was closed under its reader is nobody's any more
            raise
        finally:
            give_back()
        if bag.slide in [other.bag.slide for other in others if other.bag]:
            raise ValueError("This slide is in the case already.")
        return self.select([*others, replace(one, bag=bag)], selector, job)

    def select(self, slides: Sequence[CaseSlide], selector: str = "learned", job: str = "") -> Opened:
        """The selection among the patches of all slides of a case, which are encoded."""
        doing = self.jobs.find(job)
        doing.tell("selecting")
        with self.jobs.step(doing):
            bags = [one.bag for one in slides if one.bag is not None]
            bag = join(bags)
            mpp = slides[0].slide_mpp if len(slides) == 1 else None
            how: dict[str, Any] = {"selector": selector, "slide_mpp": mpp, "progress": self._pausing(doing)}
            case = open_case(self.model, bag, [one.path for one in slides], **how)
        if len(slides) > 1:  # once in memory, not twice
            parts = bag.features.split([len(own.features) for own in bags])
            bags = [replace(own, features=part) for own, part in zip(bags, parts)]
            slides = [replace(one, bag=own) for one, own in zip(slides, bags)]
        return Opened(slides, case)

    def _read_bag(self, one: CaseSlide, beside: int, job: Job) -> Bag:
        """The slide's patches, encoded; those of examples and of the gallery are kept in the cache, nobody else's.

        beside: how many patches the other slides of the case have
        """
        model, encoder = self.load()
        config, path, slide_mpp = model.config, one.path, one.slide_mpp
        sample = find_sample(path)
        public = slide_mpp == sample.mpp if sample else name_example(path) and slide_mpp is None
        name = f"{sample.name if sample else Path(path).stem}-{config.encoder}-{config.mpp:g}-{config.patch_size}"
        kept = cache_folder() / f"{name}.safetensors" if public else None
        if kept is not None and kept.is_file():
            if kept not in self._examples:
                self._examples[kept] = load_bag(kept)
            _require_room(len(self._examples[kept].coords), beside)
            return self._examples[kept]
        job.tell("finding tissue")
        with self.open_slide(path, slide_mpp, job) as slide:
            bag = self._encode(one.token, slide, encoder, job, beside)
        if kept is not None:
            save_bag(bag, kept)
        return bag

    def _encode(self, token: str, slide: Slide, encoder: PatchEncoder, job: Job, beside: int) -> Bag:
        """bags.encode_slide, batch by batch when it is the session's turn, with what is there so far to be seen."""
        mpp, patch_size, shown = self.config.mpp, self.config.patch_size, self.slides.holds(token)
        coords = choose_coords(slide, mpp, patch_size)
        _require_room(len(coords), beside)
        side = patch_side(slide, mpp, patch_size)
        features = torch.empty(len(coords), encoder.dim, dtype=torch.float16)
        readable, done, kept = np.zeros(len(coords), bool), 0, 0
        job.seen = lambda: Peek(coords, side, features[:kept], readable[:done])
        job.tell("encoding", 0, len(coords))
        with closing(read_patches(slide, coords, mpp, patch_size, BATCH)) as batches:
            for pixels, fine in batches:
                if shown and not self.slides.holds(token):  # another one was opened
                    raise Halted
                with self.jobs.step(job):
                    part = encoder(pixels)
                features[kept : kept + len(part)] = part
                readable[done : done + len(fine)] = fine
                kept, done = kept + len(part), done + len(fine)
                job.tell("encoding", done, len(coords))
        return bag_of(slide, encoder.name, coords, readable, features[:kept], mpp, patch_size)

    def provisional(self, job: Job, k: int | None = None) -> Tensor:
        """What the model would keep if the patches that are encoded so far were all: (K,) indices of all patches.

        It is what it was a while ago, where finding it anew would take more than a tenth of the time.
        """
        peek, began = job.peek(), time.monotonic()
        if peek is None or not len(peek.features):
            return torch.empty(0, dtype=torch.int64)
        if job.kept is not None and began < job.kept[0]:
            return job.kept[1]
        coords = torch.from_numpy(np.flatnonzero(peek.readable)[: len(peek.features)])  # (n,)
        there = torch.from_numpy(np.ascontiguousarray(peek.coords[coords.numpy()], dtype=np.int32))
        bag = Bag(peek.features, there, peek.patch_size, self.config.mpp, self.config.encoder, "so far")
        kept, now = coords[self.model.select(bag, k).indices], time.monotonic()
        job.kept = now + 9 * (now - began), kept
        return kept

    def words(self, case: Case, job: str = "") -> Words | None:
        """The nearest word of each patch; None of a model that has none."""
        doing = self.jobs.find(job)
        with self.jobs.step(doing):
            try:
                return self.model.words(case.bag, self._pausing(doing))
            except ValueError:
                return None

    def choose(
        self, case: Case, k: int, selector: str, pinned: Collection[int], dropped: Collection[int], job: str = ""
    ) -> Case:
        """The case with other patches. job: the name of its job, here and below"""
        with self.jobs.step(self.jobs.find(job)):
            return case.choose(self.model, k, selector, pinned, dropped)

    def answer(self, case: Case, messages: Messages, options: Sequence[str], job: str = "") -> Iterator[str]:
        """The answer to the last of the messages in words, for as long as somebody waits: beside others' turns."""
        doing = self.jobs.find(job)
        doing.tell("answering")
        seen = self._cut(case, doing)
        with closing(case.answer(self.reader or self.model, messages, options, seen)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                doing.look()
                yield piece

    @property
    def weighs(self) -> bool:
        """Whether it can be measured what answers rest on."""
        return self.reader is None or self.reader.likelihoods

    def judge(self, case: Case, messages: Messages, text: str | None, options: Sequence[str], job: str = "") -> Answer:
        """What is known of an answer at once (Case.judge). Raises Halted once nobody waits for it."""
        doing = self.jobs.find(job)
        doing.tell("answering")
        with self.jobs.step(doing):
            seen = self._cut(case, doing) if self.weighs and options else None
            return case.judge(self.reader or self.model, messages, text, options, seen, self._pausing(doing))

    def weigh(self, case: Case, messages: Messages, answer: Answer, job: str = "") -> Answer:
        """The answer with what it rests on (Case.weigh). Raises Halted once nobody waits for it."""
        doing = self.jobs.find(job)

        def look(done: int, total: int) -> None:
            doing.tell("weighing the evidence", done, total)
            self.jobs.pause(doing)

        size = len(messages[-1]["content"]) + sum(map(len, answer.options)) + len(answer.text)
        if self.weighs and size > MOST_WEIGHED:
            return replace(answer, unweighed=TOO_LONG)
        doing.tell("weighing the evidence")
        with self.jobs.step(doing):
            seen = self._cut(case, doing) if self.weighs else None
            return case.weigh(self.reader or self.model, messages, answer, look, seen)

    def _pausing(self, job: Job) -> Callable[[int, int], None]:
        """What work calls between its passes, in a step of a job: others have their turn."""
        return lambda done, total: self.jobs.pause(job)

    def _cut(self, case: Case, job: Job) -> Pictures | None:
        """What the reader is shown of a case, from the slide's own process; None for the model's own LLM."""
        if self.reader is None:
            return None
        return case.cut(self.reader.overview, lambda path, mpp: self.open_slide(path, mpp, job))

    # ---- sessions

    def folder_of(self, session: str | None, what: str = "") -> Path:
        """Where a session's upload, or what else it has, lies. Its name, the browser's, is used as a digest only."""
        return self.folder / (hashlib.sha256(str(session).encode()).hexdigest()[:32] + what)

    def record(self, session: str | None, *, shared: bool = True, **event: Any) -> None:
        """Add a line to the session's log, and to the server's, unless they are full or the session has ended.

        shared: False for what a reader wrote that is nobody else's
        """
        folder = self.folder_of(session, "-files")
        line = {"time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "session": folder.name[:8], **event}
        with self._writing:
            if str(session) in self._gone or not _has_room(folder / "log.jsonl", MOST_LOGGED):
                return
            folder.mkdir(mode=0o700, exist_ok=True)
            append_line(folder / "log.jsonl", line)
            if shared and self.log is not None and _has_room(self.log, MOST_LOGGED_IN_ALL):
                append_line(self.log, line)

    def files_of(self, session: str | None) -> Path:
        """Where what is made for a session lies. Raises ValueError once it has ended."""
        folder = self.folder_of(session, "-files")
        with self._writing:
            if str(session) in self._gone:
                raise ValueError("This page has been closed; open it again.")
            folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def begin_opening(self, session: str) -> object:
        """A slide was asked for, in place of the one before. Returns what end_opening must be given."""
        self.jobs.end(session)
        self._openings[session] = mine = object()
        return mine

    def end_opening(self, session: str, mine: object, failed: bool = False) -> bool:
        """Whether the slide is still the last one asked for. One that could not be opened is in nobody's way."""
        last = self._openings.get(session, mine) is mine
        if failed and last:
            self._openings.pop(session, None)
        return last

    def cancel(self, session: str) -> None:
        """A session's slide is not wanted any more, however far its analysis has come."""
        self.jobs.end(session, "slide", "map")

    def keep(self, opened: Opened) -> bool:
        """Keep an analysed case until its session ends or, if there are too many, was not asked about for longest.

        It takes the place of its session's case before. False if the session has ended, or has opened another slide,
        while it was analysed.
        """
        if not all(self.slides.holds(one.token) for one in opened.slides):
            return False
        owner, before = self.slides.owner_of(opened.token), list(self._opened.items())
        for token, other in before:
            if other is not opened and self.slides.owner_of(token) in ("", owner):
                self._drop(token)
        self._opened[opened.token] = opened
        while len(self._opened) > 1 and (len(self._opened) > MOST_OPENED or self._features() > MOST_FEATURES):
            old = list(self._opened)[:-1]
            self._drop(next((token for token in old if self.slides.owner_of(token) not in self._here), old[0]))
        return True

    def _features(self) -> int:
        """Bytes of the features of all analysed slides; those of an example, which sessions share, count once."""
        return sum({one.features: one.bytes for one in list(self._opened.values())}.values())

    def _drop(self, token: str) -> None:
        opened = self._opened.pop(token, None)
        if opened is not None:
            opened.close()

    def latest(self, opened: Opened | None) -> Opened | None:
        """What has become of a case: itself or, if it got another slide meanwhile, that; None if it was closed."""
        return self._opened.get(opened.token) if opened is not None and opened.closed else opened

    def find_case(self, token: str) -> Case:
        """An analysed slide of the API. Raises ValueError for one that is not known."""
        opened = self._opened.get(token)
        if opened is None:
            raise ValueError(
                "This case is not known, or no longer. Call analyze first; a case lives as long as its session."
            )
        with suppress(KeyError):
            self._opened.move_to_end(token)
        if (owner := self.slides.owner_of(token)) in self._asked:
            self._asked[owner] = time.monotonic()
        return opened.case

    def remember(self, token: str, answer: Answer) -> list[Answer]:
        """Keep an answer of the API beside its case; returns those before it."""
        opened = self._opened.get(token)
        if opened is None:
            return []
        before = list(opened.answers)
        opened.answers.append(answer)
        return before

    def forget(self, session: str | None) -> None:
        """Delete what a session uploaded and what was made of it; what is done for it ends."""
        with self._writing:
            self._gone[str(session)] = None
            while len(self._gone) > MOST_GONE:
                self._gone.popitem(last=False)
            self._asked.pop(str(session), None)
        self._here.discard(str(session))
        self.leave(str(session))
        self._remember(str(session))
        for token in self.slides.forget(str(session)):
            self._drop(token)
        self.turns.forget(str(session))
        self._openings.pop(str(session), None)
        self._held.pop(str(session), None)
        self._stays.discard(str(session))
        for what in ("", "-files"):
            shutil.rmtree(self.folder_of(session, what), ignore_errors=True)

    def _remember(self, session: str) -> None:
        """Keep for a while what can be opened again of a session that ends: nothing that was uploaded.

        Features are kept only where slides are opened by path, by the one who sits there.
        """
        shown = [one for one in self._shown.pop(session, []) if self.slides.holds(one.token)]
        if not shown:
            return
        cases = [one for token, one in list(self._opened.items()) if self.slides.owner_of(token) == session]
        asked = self.turns.unanswered(session)
        self._left[session] = replace(self._leave(shown, cases[-1] if cases else None), asked=asked)
        while len(self._left) > MOST_LEFT or sum(one.bytes for one in list(self._left.values())) > MOST_LEFT_FEATURES:
            self._left.popitem(last=False)

    def stays_aside(self, session: str, opened: Opened | None) -> bool:
        """Whether the case before stays the one to go back to: what was not analysed takes the place of nothing."""
        return opened is None and session in self._stays

    def set_aside(self, session: str, shown: Sequence[CaseSlide], opened: Opened | None) -> Left | None:
        """The case that a page shows another one in place of, to be opened again; its uploads stay until a third comes.

        shown: its slides; opened: None where it was not analysed
        """
        if opened is not None:
            self._stays.add(session)
        self._held[session] = tuple(one.path for one in shown if self.is_upload(one.path))
        return self._leave(shown, opened, uploads=True) if shown else None

    def _leave(self, shown: Sequence[CaseSlide], opened: Opened | None, uploads: bool = False) -> Left:
        """What is kept of a case that is not shown any more. uploads: whether theirs stay"""
        encoded = {one.token: one.bag for one in opened.slides} if opened else {}
        whole = opened is not None and all(encoded.get(one.token) for one in shown)
        again = tuple(
            replace(one, token="", bag=encoded.get(one.token) if self.allow_paths else None)
            for one in shown
            if uploads or not self.is_upload(one.path)
        )
        kept = tuple(opened.case.selection.indices.tolist()) if opened and whole else None
        talk, earlier, called = (opened.talk, opened.earlier, opened.called) if opened else (([], {}, {}), (), "")
        tokens = frozenset(one.token for one in shown)
        return Left(tokens, again, len(shown) - len(again), kept, talk, earlier, called, time.monotonic())

    def take_left(self, token: str) -> Left | None:
        """The case of a page that was loaded anew, once; its session ends, if it has not yet.

        token: of one of its slides: who had the page knows it, and nobody can guess it
        """
        if owner := self.slides.owner_of(token):
            self.forget(owner)
        session = next((one for one, left in list(self._left.items()) if token in left.tokens), "")
        left = self._left.pop(session, None)
        return left if left is not None and left.since > time.monotonic() - LEFT_FOR else None

    # ---- callers come and go: the door tells

    def arrive(self, session: str) -> None:
        """Somebody opens a page, perhaps again, and stays until forget."""
        self._here.add(session)
        self.ask(session)

    def ask(self, session: str) -> None:
        """Somebody asks for something, perhaps without a page that could be closed."""
        with self._writing:
            self._gone.pop(session, None)
            self._asked[session] = time.monotonic()
            oldest = next(iter(self._asked)) if len(self._asked) > MOST_GONE else session
        if oldest != session and oldest not in self._here:
            self.forget(oldest)

    def heed(self, session: str, listens: bool) -> None:
        """Whether somebody listens to what is done for a session now."""
        self.jobs.heed(session, listens)

    def leave(self, session: str) -> None:
        """A session's caller does not wait any more: what is done for it now ends, and so do its slides' processes."""
        self.jobs.end(session)
        self.slides.close(session)

    def tidy(self) -> None:
        """Forget who has no page and has asked for nothing for long, and delete what nobody owns."""
        late = time.monotonic() - UNOPENED
        for session, last in list(self._asked.items()):
            if last < late and session not in self._here and not self.jobs.busy(session):
                self.forget(session)
        for session, left in list(self._left.items()):
            if left.since < time.monotonic() - LEFT_FOR:
                self._left.pop(session, None)
        known = {self.folder_of(session).name for session in [*self._here, *self._asked, *self.slides.owners()]}
        for entry in self.folder.iterdir():
            strange = re.fullmatch(r"[0-9a-f]{32}(-files)?", entry.name) and entry.name[:32] not in known
            if strange and entry.is_dir():
                delete_untouched(entry)
        for entry in self.uploads.glob("*"):
            delete_untouched(entry)
        give_back()


def _require_room(patches: int, beside: int) -> None:
    """Raise SlideError for a case of more patches than are encoded. beside: those of its other slides"""
    if patches + beside > MOST_PATCHES:
        others = f"with {beside:,} of the other slides " if beside else ""
        raise SlideError(
            f"The slide has {patches:,} patches of tissue, {others}more than the {MOST_PATCHES:,} that the page "
            "encodes. Encode it with sparsewsi extract."
        )


def _has_room(file: Path, most: int) -> bool:
    return not file.is_file() or file.stat().st_size < most
