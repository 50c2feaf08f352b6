"""What happens on the page, by event. Every handler returns the parts of the page that change, with their new values.

A session holds an analysed slide as values (CPU tensors), never an open slide.
"""

import dataclasses
import functools
import html
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Collection, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gradio as gr
import numpy as np
import torch
from torch import Tensor

from sparsewsi.bags.bag import list_parts
from sparsewsi.files import as_path
from sparsewsi.model.limits import Limits
from sparsewsi.model.prompt import format_question
from sparsewsi.model.selection import Selection
from sparsewsi.report import umap
from sparsewsi.report.answer import Answer, FocusEffect
from sparsewsi.report.case import ANNOTATIONS, Case
from sparsewsi.report.phantom import choose_questions, describe_truths, find_truth
from sparsewsi.report.qupath import read_regions
from sparsewsi.report.scope import find_place, find_target, put_as_presence, suggest, within, word_answer
from sparsewsi.slides.slide import Slide
from sparsewsi.web import chat as words
from sparsewsi.web import intake
from sparsewsi.web.chat import (
    Question,
    Questions,
    back_to_question,
    read_edit,
    read_options,
    show_answer,
    show_evidence,
    show_next,
    show_question,
    show_suggestions,
    show_without,
    text_of,
)
from sparsewsi.web.desk import CaseSlide, Desk, Exchange, Left, Messages, Opened
from sparsewsi.web.errors import explain_errors, refuse, say_which, stop_unseen
from sparsewsi.web.examples import EXAMPLES, name_example, open_example
from sparsewsi.web.gallery import find_sample
from sparsewsi.web.jobs import Halted, Job
from sparsewsi.web.layout import FEWEST, MOST, Page, state_facts, tell_about, tell_doubts, tell_earlier
from sparsewsi.web.limits import MOST_CALLED, check_question, check_slides, check_turns, read_told
from sparsewsi.web.turns import Turn
from sparsewsi.web.viewer import (
    BY_SLIDE,
    bag_props,
    file_props,
    foci_props,
    map_props,
    packed,
    slide_props,
    words_props,
)

COMING = "The answer is coming; what it rests on is weighed after it."
STOPPED = "Stopped; the evidence was not weighed."
UNWEIGHED = "The evidence could not be weighed."
BROKEN_OFF = "The answer broke off here; ask again."
WEIGHING = "Weighing the evidence: the answer is scored again without each of the patches …"
WAITS = "A question waits already, so this one stays in the box: wait for the answer or press Stop."
IN_BOX = "The question is in the box: Enter asks it, once the slide is ready."
OPENING = {"phantom": "Opening the phantom (generated on first use)", "cmu-1": "Fetching CMU-1 (CC0)"}
# Of a slide just opened.
NOTHING = ("unpicked", "bag", "kept", "foci", "map", "words", "evidence", "whatif", "compared", "work")
MOST_LIKES = 24
MARKS = ("agree", "disagree")
WHAT_IF = "what if"  # the turn of one
MOST_VIEWS, MOST_PICKS = 200, 4096  # taken from one event of the viewer

UNPICKED = "Pinned: 0 · dropped: 0"
OUTSIDE = "This model cannot answer that; it can answer:"
AT_READY = "It will be asked when the slide is ready."
UNKNOWN = "The page was loaded anew, and this server does not know the slide of before any more: open it again."
DELETED = "The page was loaded anew. What is uploaded is deleted when its page goes: choose the file again."
STOPPED_AT_RELOAD = "The page was loaded anew, which ended the analysis of before."
CANCELLED = "The analysis was cancelled. Open the slide again to go on."
NOT_ADDED = "The analysis was cancelled; the case is as it was."
NO_WORD = "This model has no word for that, so it cannot point at it."

Changes = dict[Any, Any]  # part of the page -> new value; gr.skip() where nothing changes
Answers = dict[int, Answer]  # by their place in the chat


@dataclasses.dataclass(frozen=True, eq=False)
class Aside:
    """What a what-if has taken the place of, until it is left."""

    opened: Opened
    chat: list
    questions: Questions
    answers: Answers


@dataclasses.dataclass(frozen=True)
class Asked:
    """Slides that were asked for: paths or addresses.

    beside: they are added to the case that is open; left: they are those of a page before, with its chat
    """

    paths: tuple[str, ...]
    beside: bool = False
    left: Left | None = None


class Handlers:
    """The handlers of one page of one desk."""

    def __init__(self, desk: Desk, page: Page) -> None:
        self.desk, self.page = desk, page

    # ---- a slide is asked for

    def on_choose(
        self,
        event: gr.EventData,
        beside: bool,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Changes:
        """A card of the gallery was chosen. beside: the slide is added to the case, here and below."""
        name = str(event._data.get("name")) if isinstance(event._data, dict) else ""
        if name in EXAMPLES:
            return self._open_example(name, request, progress, beside)
        sample = find_sample(name)
        if sample is None:
            raise stop_unseen()
        progress(None, desc="Asking the server of this slide")
        with self._opening(request):
            return {self.page.asked: Asked((sample.address,), beside), self.page.mpp: f"{sample.mpp:g}"}

    def on_upload(
        self,
        files: list[str],
        beside: bool,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Changes:
        """Files were uploaded: the slides of one case. None is opened if one cannot be."""
        session, paths = request.session_hash, []
        try:
            with self._opening(request) as job:
                check_slides(len(files))
                for number, file in enumerate(files, 1):
                    which = f" {number} of {len(files)}" if len(files) > 1 else ""
                    progress(None, desc=f"Looking at file{which}" if which else "Looking at the file")
                    with say_which(which and f"File{which}"):
                        paths.append(str(self.desk.keep_upload(file, session, job, beside=beside or number > 1)))
        finally:
            for file in files:
                self.desk.drop_upload(file)
        return {self.page.asked: Asked(tuple(paths), beside)}

    def on_typed_path(
        self,
        text: str,
        beside: bool,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Changes:
        """Paths or addresses were typed, one a line: the slides of one case."""
        progress(None, desc="Looking at the file")
        with self._opening(request) as job:
            lines = [line.strip() for line in text.splitlines() if line.strip()] or [text]
            check_slides(len(lines))
            for number, line in enumerate(lines, 1):
                with say_which(f"Line {number}" if len(lines) > 1 else ""):
                    self.desk.check(line, job)
        return {self.page.asked: Asked(tuple(str(as_path(line)) for line in lines), beside)}

    def on_load(
        self,
        token: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[Changes]:
        """Open what the page showed before it was loaded anew, or else the example that its address names.

        token: of a slide that it showed; "" on a page that is new. What cannot come back is told
        """
        page, name = self.page, dict(request.query_params).get("slide", "")
        left = self.desk.take_left(token) if token else None
        if token and name not in EXAMPLES and (left is None or left.lost or left.kept is None):
            lost = UNKNOWN if left is None else DELETED if left.lost else STOPPED_AT_RELOAD
            again = left is not None and bool(left.slides)
            yield {page.left: left, page.lost: f"<p>{lost}</p>", page.reopen: gr.Button(visible=again)}
            raise stop_unseen()
        if left is not None and left.slides:
            yield self.on_reopen(left, request)
        elif name in EXAMPLES:
            yield self._open_example(name, request, progress)
        else:
            raise stop_unseen()

    def on_reopen(self, left: Left | None, request: gr.Request) -> Changes:
        """Open again what a page before this one showed."""
        if left is None:
            raise stop_unseen()
        with self._opening(request):
            return {self.page.asked: Asked(tuple(one.path for one in left.slides), left=left)}

    def _open_example(self, name: str, request: gr.Request, progress: gr.Progress, beside: bool = False) -> Changes:
        progress(None, desc=OPENING[name])
        with self._opening(request, "example"):  # which may wait for a network
            path = open_example(name)
        return {self.page.asked: Asked((str(path),), beside)}

    @contextmanager
    def _opening(self, request: gr.Request, what: str = "slide") -> Iterator[Job]:
        """The slide that was asked for last is the one that opens, however long the others take."""
        session = str(request.session_hash)
        mine = self.desk.begin_opening(session)
        try:
            with explain_errors(), self.desk.jobs.run(session, what) as job:
                yield job
        except gr.Error:
            self.desk.end_opening(session, mine, failed=True)
            raise
        if not self.desk.end_opening(session, mine):
            raise stop_unseen()

    def on_unload(self, request: gr.Request) -> None:
        """The tab was closed."""
        self.desk.forget(request.session_hash)

    # ---- a slide is there

    def on_slide(
        self,
        asked: Asked | None,
        resolution: str,
        opened: Opened | None,
        aside: Aside | None,
        coming: tuple[CaseSlide, ...] | None,
        request: gr.Request,
    ) -> Changes:
        """Show the slides themselves, at once. What belonged to those before goes, unless these are added to them.

        coming: slides whose analysis is on its way; they are analysed anew with the ones that are added
        """
        desk, page, session = self.desk, self.page, str(request.session_hash)
        desk.jobs.end(session)
        base = desk.latest(aside.opened if aside else opened)
        beside = asked is not None and asked.beside and bool(base or coming)
        there = base.slides if base is not None and beside else ()
        with explain_errors(), desk.jobs.run(session, "slide") as job:
            if asked is None or not asked.paths:
                raise ValueError("Open a slide first.")
            mpp, known = read_mpp(resolution), [one.token for one in there]
            again = [one for one in coming or () if beside and one.token not in known]
            left = asked.left.slides if asked.left and mpp is None else ()
            wanted = [*again, *(left or (CaseSlide("", path, mpp) for path in asked.paths))]
            there = tuple(one for one in there if all(_is_anew(one, other) for other in wanted))
            check_slides(len(there) + len(wanted))
            looked: list[CaseSlide] = []
            with ExitStack() as opens:
                first = opens.enter_context(desk.open_slide(wanted[0].path, wanted[0].slide_mpp, job))
                for one in wanted:
                    with nullcontext(first) if not looked else desk.open_slide(one.path, one.slide_mpp, job) as slide:
                        props = slide_props("", slide, name_example(one.path))
                        bag = one.bag if one.bag and one.bag.slide == props["name"] else None
                        looked.append(dataclasses.replace(one, props=props, bag=bag))
                _require_different([*there, *looked])
                opens.pop_all()  # it stays open, for the viewer
            desk.slides.drop(*(one.token for one in again))
            new: list[CaseSlide] = []
            for one in looked:
                new.append(desk.show(one, job, None if new else first, beside=bool(there or new)))
                told = {name: one.props[name] for name in ("size", "mpp")}
                desk.record(session, event="open", slide=one.props["name"], **told)
            desk.sweep(session)
        names = [one.props["name"] for one in new]
        shown = [one.props for one in (*there, *new)]
        changes: Changes = {
            page.coming: tuple(new),
            page.beside: False,
            page.typed_path: "",
            page.mpp: "",  # or it would be taken for the next slide's
            page.lost: "",
            page.reopen: gr.Button(visible=False),
            **self._give_next_back(session),
        }
        if beside:
            desk.turns.stop(session)
            left = {} if aside is None else self.on_leave(opened, [], {}, aside, request)
            left[page.view] = gr.HTML(**(left[page.view].props if left else {}), slides=shown, work=None)
            return left | changes | {page.facts: state_facts(desk, None, f"{', '.join(names)} · being added")}
        desk.turns.drop(session)
        return changes | {
            page.waiting: None,
            page.view: gr.HTML(slides=shown, **dict.fromkeys(NOTHING), files=[]),
            page.opened: None,
            page.chat: [],
            page.questions: {},
            page.answers: {},
            page.compare: "",
            page.earlier: "",
            page.secret: gr.Accordion(visible=False),
            page.facts: state_facts(desk, None, f"{', '.join(names)} · being analysed"),
            page.doubts: "",
            page.aside: None,
            page.called: "",
            page.picks: {"pinned": [], "dropped": []},
            page.picked: UNPICKED,
        }

    def on_slide_shown(
        self, coming: tuple[CaseSlide, ...] | None, opened: Opened | None, chat: list, request: gr.Request
    ) -> Iterator[Changes]:
        """Analyse the slides, one after the other, saying every second how far it is.

        Where that fails, or is cancelled, the page says so until the next one; what was analysed before stays. With
        the first of them the chat of a case that had others starts anew.
        """
        desk, page, coming = self.desk, self.page, coming or ()
        case, failed = desk.latest(opened), []
        for number, one in enumerate(coming):
            try:
                before = chat if number == 0 and case is not None else None
                case = yield from self._analyse(one, case, coming[number + 1 :], before, request)
            except gr.Error as error:
                if not desk.slides.holds(one.token):  # another one was opened meanwhile
                    raise
                which = f"{one.props['name']}: " if len(coming) > 1 or case else ""
                cancelled = NOT_ADDED if case else CANCELLED
                failed.append(f"{which}{error.message}" if error.message else cancelled)
                if not error.message:
                    break
        if not failed:
            return
        told = {"error": " ".join(failed)}
        if case is None:
            name = next(one.props["name"] for one in coming)
            doing = f"{name} · {'cancelled' if told['error'] == CANCELLED else 'not analysed'}"
            facts = state_facts(desk, None, doing, wrong=True)
            yield {page.coming: None, page.view: gr.HTML(work=told), page.facts: facts}
            return
        kept = [one.token for one in case.slides]
        desk.slides.drop(*(one.token for one in coming if one.token not in kept))
        view = gr.HTML(slides=[one.props for one in case.slides], work=told)
        yield {page.coming: None, page.view: view, page.facts: state_facts(desk, case.case)}

    def _analyse(
        self,
        one: CaseSlide,
        base: Opened | None,
        rest: tuple[CaseSlide, ...],
        others_chat: list | None,
        request: gr.Request,
    ) -> Generator[Changes, None, Opened]:
        """The case with one more slide. rest: those that are analysed after it; others_chat: of the case without it"""
        desk, page, found, outlined = self.desk, self.page, None, False
        others = tuple(other for other in base.slides if _is_anew(other, one)) if base else ()

        def analyse(job: Job) -> Opened:
            return desk.analyse(one, others, job=job.name)

        with explain_errors():
            for job in desk.jobs.follow(str(request.session_hash), "slide", one.token, analyse):
                found = job.result
                if found is None:
                    tissue = tissue_props(desk, job, outlined)
                    outlined = outlined or "coords" in tissue
                    yield {page.view: gr.HTML(work={"token": one.token, **work_props(job), **tissue})}
            if found is not None and base is not None:
                found.take_marks(base)
            if found is None or not desk.keep(found):  # another one was opened meanwhile
                raise Halted
            self.on_analysed(found, {}, request)  # before the page offers its files
            anew = {} if others_chat is None or base is None else self._start_anew(others_chat, base, found)
            yield self._show_case(found, rest, changed=base is not None) | anew
        return found

    def _start_anew(self, chat: list, before: Opened, found: Opened) -> Changes:
        """What was answered was about other slides: it stays to be read, apart."""
        page = self.page
        found.earlier = (*before.earlier, *read_exchanges(name_slides(before), _take_waiting(chat)))
        anew: Changes = {page.chat: [], page.questions: {}, page.answers: {}, page.compare: ""}
        return anew | {page.earlier: tell_earlier(found.earlier)}

    def _show_case(self, opened: Opened, rest: tuple[CaseSlide, ...] = (), changed: bool = False) -> Changes:
        """The page of a case that was just analysed. rest: slides on their way; changed: it had other slides before."""
        desk, page = self.desk, self.page
        with explain_errors():
            case = opened.case
            truths = [
                None if desk.is_upload(one.path) else find_truth(one.path)  # a stranger's file may say what it likes
                for one in opened.slides
            ]
            planted = describe_truths(truths, case.bag, case.selection)
            facts = state_facts(desk, case)
        starters = choose_questions(truths)
        props = bag_props(case.bag, case.selection)
        slides = [one.props for one in (*opened.slides, *rest)]
        changes: Changes = {
            page.opened: opened,
            page.coming: rest,
            page.facts: facts,
            page.secret: gr.Accordion(visible=any(truths), open=False),
            page.planted: planted,
            page.examples: gr.Dataset(
                samples=[[text] for text, _ in starters], sample_labels=[text for text, _ in starters]
            ),
            page.starters: starters,
            page.mpp: "",
            page.k: max(FEWEST, min(MOST, desk.config.num_tokens)),
            page.alone: gr.Markdown(visible=not desk.config.multi_turn),
        }
        if changed:
            changes |= {page.picks: {"pinned": [], "dropped": []}, page.picked: UNPICKED, page.aside: None}
            props |= dict.fromkeys(("map", "words", "foci", "evidence")) | {"whatif": "", "unpicked": uuid.uuid4().hex}
        files = file_props(len(opened.slides) > 1)
        return changes | {page.view: gr.HTML(slides=slides, **props, files=files, work=None)}

    def on_remove(
        self,
        event: gr.EventData,
        opened: Opened | None,
        aside: Aside | None,
        coming: tuple[CaseSlide, ...] | None,
        chat: list,
        request: gr.Request,
    ) -> Changes:
        """Take a slide out of the case: patches are chosen anew among those of the others."""
        desk, session = self.desk, str(request.session_hash)
        base = desk.latest(aside.opened if aside else opened)
        number = event._data.get("number") if isinstance(event._data, dict) else None
        if base is None or not isinstance(number, int) or not 0 <= number < len(base.slides):
            raise stop_unseen()
        if coming:
            raise refuse("A slide is being analysed: wait for it or cancel it first.")
        if len(base.slides) == 1:
            raise refuse("A case has one slide at least; open another one in its place.")
        desk.turns.drop(session)
        desk.jobs.end(session)
        left = [one for place, one in enumerate(base.slides) if place != number]
        with explain_errors(), desk.jobs.run(session, "slide", left[0].token) as job:
            found = desk.select(left, job=job.name)
            found.take_marks(base)
            desk.slides.drop(base.slides[number].token)
            if not desk.keep(found):
                raise Halted
            desk.sweep(session)
        self.on_analysed(found, {}, request)
        return self._show_case(found, changed=True) | self._start_anew(chat, base, found)

    def on_talked(
        self, opened: Opened | None, aside: Aside | None, chat: list, questions: Questions, answers: Answers
    ) -> None:
        """Keep the chat beside its case, for a page that is loaded anew: that of before a what-if, in one."""
        if aside is not None:
            aside.opened.talk = (aside.chat, aside.questions, aside.answers)
        elif opened is not None:
            opened.talk = (chat, questions, answers)

    def on_back(self, asked: Asked | None, opened: Opened | None, chat: list, request: gr.Request) -> Changes:
        """A case that was opened again has its chat again, if the same patches are kept of the same slides."""
        page, left = self.page, asked.left if asked else None
        if left is None or left.kept is None or opened is None or opened.closed or chat:
            raise stop_unseen()
        slides, before = ([(one.path, one.slide_mpp) for one in case.slides] for case in (opened, left))
        if slides != before or tuple(opened.case.selection.indices.tolist()) != left.kept:
            raise stop_unseen()
        opened.talk, opened.earlier = left.talk, left.earlier
        chat, questions, answers = left.talk
        self.on_analysed(opened, dict(answers), request)
        back: Changes = {page.chat: chat, page.questions: questions, page.answers: answers, page.called: left.called}
        back |= {page.earlier: tell_earlier(left.earlier)}
        return back | self._show_evidence_of(opened, chat, dict(answers))

    def on_shown(self, event: gr.EventData) -> Changes:
        """Another slide of the case is looked at: regions that are imported are of that one."""
        number = event._data.get("number") if isinstance(event._data, dict) else None
        return {self.page.number: number if isinstance(number, int) and number >= 0 else 0}

    def on_case(self, opened: Opened | None) -> Changes:
        """What to doubt in this slide's answers, and which patches belong together."""
        if opened is None:
            return {self.page.doubts: ""}
        case = opened.case
        samples = [sample for one in opened.slides if (sample := find_sample(one.path))]
        told = tell_doubts(case) + "".join(tell_about(sample.caption) for sample in samples)
        return {self.page.doubts: told, self.page.view: gr.HTML(foci=foci_props(case.foci, case.selection))}

    def on_analysed(self, opened: Opened | None, answers: Answers, request: gr.Request) -> None:
        """From now on the downloads hold these answers."""
        if opened is not None:
            self._offer(opened, list(answers.values()), request)

    def _offer(self, opened: Opened, answers: Sequence[Answer], request: gr.Request) -> None:
        make = functools.partial(self._write_download, opened, opened.case, answers, request.session_hash)
        for one in opened.slides:
            self.desk.slides.offer(one.token, make)

    def _write_download(
        self, opened: Opened, case: Case, answers: Sequence[Answer], session: str | None, name: str
    ) -> Path:
        """Write one of DOWNLOADS to the session's folder, now that somebody asks for it. Raises as Jobs.run does."""
        desk, folder = self.desk, self.desk.files_of(session)
        if name == "log.jsonl":
            (folder / name).touch()
            return folder / name
        with desk.jobs.run(str(session), "files") as job, tempfile.TemporaryDirectory(dir=folder) as beside:
            names, where = ([name], folder) if name != BY_SLIDE else (["patches.geojson"], Path(beside))
            if name == BY_SLIDE and not any(desk.is_upload(one.path) for one in opened.slides):
                names.append(ANNOTATIONS)  # whose writer reads the slide's files in this process

            def opening(path: Path, slide_mpp: float | None) -> Slide:
                return desk.open_slide(path, slide_mpp, job)

            written = case.write(where, answers, names, opening, opened.marks, opened.called)
            if name == BY_SLIDE:
                with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
                    for one in written:
                        archive.write(where / one, one)
        if not written:
            raise ValueError(f"{name} could not be drawn on this server.")
        return folder / name

    def on_map_wanted(self, opened: Opened | None, request: gr.Request) -> Changes:
        """Lay the patches out by what they look like."""
        if opened is None or opened.closed:
            return gr.skip()
        desk = self.desk
        with explain_errors(), desk.jobs.run(str(request.session_hash), "map", opened.token) as job:
            case = opened.case

            def look() -> None:
                job.look()
                desk.jobs.pause(job)

            words = words_props(desk.words(case, job.name))
            with desk.jobs.step(job):
                props = map_props(umap.map_features(case.bag.features, case.selection, look=look))
        return gr.skip() if opened.closed else {self.page.view: gr.HTML(map=props, words=words)}

    # ---- a question is asked

    def on_cancel(self, request: gr.Request) -> None:
        """The slide that is being analysed is not wanted any more."""
        self.desk.cancel(str(request.session_hash))

    def on_ready(
        self,
        opened: Opened | None,
        waiting: Question | None,
        coming: tuple[CaseSlide, ...] | None,
        chat: list,
        request: gr.Request,
    ) -> Changes:
        """The question that waited for the slides is asked or, if one could not be analysed, goes back to its box."""
        page = self.page
        if waiting is None:
            raise stop_unseen()
        if opened is None or coming is None:
            box = {page.question: waiting.text, page.given_options: "\n".join(waiting.options)}
            return {page.waiting: None, page.chat: _take_waiting(chat), **box}
        return self._ask(opened, [], waiting, {}, request) | {self.page.waiting: None}

    def on_starter(
        self,
        index: int,
        starters: list,
        opened: Opened | None,
        coming: tuple[CaseSlide, ...] | None,
        chat: list,
        questions: Questions,
        impression: str,
        request: gr.Request,
    ) -> Changes:
        """A question to start with was tapped: it is asked. Where no slide is ready it goes into the boxes instead."""
        text, options = starters[index]
        if opened is None or coming:
            gr.Info(IN_BOX, duration=6)
            return {self.page.question: text, self.page.given_options: "\n".join(options)}
        tapped = Question(text, tuple(options), impression=impression.strip())
        return self._ask_or_wait(opened, chat, tapped, questions, request) | {self.page.impression: ""}

    def on_question(
        self,
        question: str,
        given: str,
        impression: str,
        opened: Opened | None,
        coming: tuple[CaseSlide, ...] | None,
        chat: list,
        questions: Questions,
        request: gr.Request,
    ) -> Changes:
        """Put the question into the chat and give the box back empty, with a Stop button while the answer comes.

        One that is typed while a slide is analysed waits for that.
        """
        if opened is None and not coming:
            raise refuse("Open a slide first; the question stays in the box.")
        if not question.strip():
            raise refuse("Write a question first.")
        put = Question(question.strip(), read_options(given), impression=impression.strip())
        if opened is None or coming:
            return self._let_wait(put, _take_waiting(chat))
        changes = self._ask_or_wait(opened, chat, put, questions, request)
        waits = self.page.chat not in changes or self.desk.turns.busy(str(request.session_hash))
        box = wait_for_answer if waits else ask_for_question
        return changes | {self.page.question: box(value=""), self.page.given_options: "", self.page.impression: ""}

    def _ask_or_wait(
        self, opened: Opened, chat: list, question: Question, questions: Questions, request: gr.Request
    ) -> Changes:
        """Ask a question or, while another one is answered, have it asked after that."""
        turns, session = self.desk.turns, str(request.session_hash)
        if self._is_busy(chat, session):
            with explain_errors():
                check_question(question.text, question.options)
            if turns.let_wait(session, question):
                return {self.page.next_line: show_next(question)}
            if turns.get(session) is not None:
                raise refuse(WAITS)
        kept = chat[:-1] if chat and chat[-1]["role"] == "user" else chat  # a question that was not answered goes
        return self._ask(opened, kept, question, questions, request)

    def on_next(
        self, question: Question | None, opened: Opened | None, chat: list, questions: Questions, request: gr.Request
    ) -> Changes:
        """The answer before has come: the question that waited for it is asked."""
        if question is None:
            raise stop_unseen()
        if opened is None:  # it was closed meanwhile
            return {self.page.next: None, self.page.question: question.text}
        return self._ask_or_wait(opened, chat, question, questions, request) | {self.page.next: None}

    def _give_next_back(self, session: str) -> Changes:
        """The boxes, ready for the next question; the one that waited, if one did, is in them again."""
        page, question = self.page, self.desk.turns.take_next(session)
        if question is None:
            return {page.question: ask_for_question()}
        box = {page.question: ask_for_question(value=question.text), page.next_line: ""}
        return box | {page.given_options: "\n".join(question.options), page.impression: question.impression}

    def _let_wait(self, question: Question, before: list) -> Changes:
        page = self.page
        with explain_errors():
            check_question(question.text, question.options)
        chat = [*before, show_question(question), show_answer(AT_READY)]
        return {page.chat: chat, page.waiting: question} | dict.fromkeys(
            (page.question, page.given_options, page.impression), ""
        )

    def on_suggested(
        self,
        event: gr.EventData,
        opened: Opened | None,
        chat: list,
        questions: Questions,
        impression: str,
        request: gr.Request,
    ) -> Changes:
        """One of the questions that the model can answer was tapped."""
        if opened is None:
            raise refuse("Open a slide first.")
        offered = suggest(self._limits(opened.case))
        number = event._data.get("number") if isinstance(event._data, dict) else None
        if not isinstance(number, int) or not 0 <= number < len(offered):
            raise stop_unseen()
        one = offered[number]
        tapped = Question(one.text, one.options, impression=impression.strip())
        return self._ask_or_wait(opened, chat, tapped, questions, request) | {self.page.impression: ""}

    def _limits(self, case: Case) -> Limits:
        """What who answers was validated on: of another reader than the model's own LLM nothing is known."""
        return case.limits if self.desk.reader is None else Limits()

    def on_retry(self, opened: Opened, chat: list, request: gr.Request) -> Changes:
        """Ask the last question again."""
        self._refuse_while_busy(chat, request)
        asked = back_to_question(chat)
        self.desk.turns.begin(str(request.session_hash), name_question(opened, asked))
        return {self.page.chat: asked, self.page.question: wait_for_answer()}

    def on_edit(
        self, opened: Opened, chat: list, questions: Questions, change: gr.EditData, request: gr.Request
    ) -> Changes:
        """Ask an edited question in place of the old one and of what came after it."""
        self._refuse_while_busy(chat, request)
        place = change.index[0] if isinstance(change.index, (list, tuple)) else change.index
        edited = read_edit(html.unescape(str(change.value)), questions.get(place, Question("")))
        return self._ask(opened, chat[:place], edited, questions, request)

    def _ask(
        self, opened: Opened, before: list, question: Question, questions: Questions, request: gr.Request
    ) -> Changes:
        with explain_errors():
            check_question(question.text, question.options)
            format_question(question.text, question.options)  # the model would refuse too many options only later
            limits = self._limits(opened.case)
        earlier = {place: one for place, one in questions.items() if place < len(before)}
        target = "" if question.options else find_target(question.text)
        presence = put_as_presence(limits, target) if target else None
        if presence is not None:
            question = dataclasses.replace(question, options=presence.options, put=presence.text)
        elif (target and limits.kinds) or not within(limits, question.text, question.options):
            said = [NO_WORD if target else OUTSIDE, show_suggestions(suggest(limits))]
            return {
                self.page.chat: [*before, show_question(question), show_answer(said[0], said[1:])],
                self.page.questions: earlier | {len(before): question},
                self.page.question: ask_for_question(),
            }
        asked = [*before, show_question(question)]
        self.desk.turns.begin(str(request.session_hash), name_question(opened, asked))
        return {
            self.page.chat: asked,
            self.page.questions: earlier | {len(before): question},
            self.page.question: wait_for_answer(),
        }

    def _refuse_while_busy(self, chat: list, request: gr.Request) -> None:
        """One question at a time, as the chat is what all of them write."""
        if self._is_busy(chat, str(request.session_hash)):
            raise refuse("The last question is still being answered: wait for it or press Stop.")

    def _is_busy(self, chat: list, session: str) -> bool:
        """Whether an answer is coming; it may have come, and the page not be told yet."""
        last = str(chat[-1]["content"]) if chat else ""
        return self.desk.turns.busy(session) or COMING in last or WEIGHING in last

    # ---- and answered

    def on_asked(
        self, opened: Opened | None, chat: list, questions: Questions, answers: Answers, request: gr.Request
    ) -> Iterator[Changes]:
        """Stream the answer to the last question, then what it rests on, until Stop is pressed."""
        session = str(request.session_hash)
        turn = self.desk.turns.take(session, name_question(opened, chat)) if opened is not None else None
        if opened is None or turn is None:
            yield gr.skip()
            return
        try:
            yield from self._reply(turn, opened, chat, questions, answers, request)
        finally:  # also if the page is gone, or what it sent is refused
            turn.done = True

    def _reply(
        self, turn: Turn, opened: Opened, chat: list, questions: Questions, answers: Answers, request: gr.Request
    ) -> Iterator[Changes]:
        desk, page, session = self.desk, self.page, str(request.session_hash)
        with explain_errors():
            case = opened.case
            said = {place: answer.text for place, answer in answers.items()}
            turns, given = words.turns_of(chat, questions, desk.config.multi_turn, said)
            check_turns(turns, given)
        answers = {place: earlier for place, earlier in answers.items() if place < len(chat)}
        question, failure, whole = questions.get(len(chat) - 1, Question("")), None, False
        answer = self._begin_answer(question, turns, given)
        try:
            with explain_errors(), suppress(Halted), desk.jobs.run(session, "question", opened.token) as job:
                if turn.stopped:
                    raise Halted
                with closing(self._tell(answer, case, turns, job.name)) as steps:
                    for answer in steps:
                        yield {page.chat: [*chat, show_told(answer, case)]}
                answer, whole = desk.weigh(case, turns, answer, job.name), True
        except gr.Error as error:  # no half answer may stand as a whole one
            failure = error
        turn.done = True
        if whole:
            answers[len(chat)] = answer
        else:
            answer = break_off(answer, failure is not None)
        if opened.closed:  # by a slide that was added or removed
            yield gr.skip()
        elif desk.turns.get(session) is turn:
            chat = chat if failure and not answer.text else [*chat, show_told(answer, case)]
            if not failure:
                desk.record(request.session_hash, event="ask", slide=case.bag.slide, **dataclasses.asdict(answer))
            self.on_analysed(opened, answers, request)
            changes = {page.chat: chat, page.answers: answers, page.question: ask_for_question()}
            yield changes | self._show_evidence_of(opened, chat, answers, point(answer, case) if whole else None)
        elif desk.turns.get(session) is None:  # cleared, or another slide: a word may have come after that
            yield {page.chat: [], page.answers: {}}
        if failure:
            raise failure

    def _begin_answer(self, question: Question, turns: Messages, options: Sequence[str]) -> Answer:
        """An answer of which nothing has come yet."""
        reader = self.desk.reader
        return Answer(
            turns[-1]["content"],
            "",
            tuple(options),
            reader=reader.name if reader else "",
            asked=question.text if question.put else "",
            impression=question.impression,
            unweighed=COMING if self.desk.weighs else "",
        )

    def _tell(self, begun: Answer, case: Case, turns: Messages, job: str) -> Generator[Answer]:
        """An answer as far as it has come, at every step judged as far as it can be: all but what it rests on.

        One of several options is told once it is known how sure the model is.
        """
        desk, text = self.desk, ""
        if begun.options and desk.reader is None:  # the likeliest option is the answer: asked for once, not twice
            judged = desk.judge(case, turns, None, begun.options, job)
        else:
            with closing(desk.answer(case, turns, begun.options, job)) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    text += piece
                    if not begun.options:
                        yield dataclasses.replace(begun, text=text.lstrip())
            judged = desk.judge(case, turns, text, begun.options, job)
        known = {"asked": begun.asked, "impression": begun.impression}
        yield dataclasses.replace(judged, unweighed=WEIGHING if desk.weighs else "", **known)

    def on_answered(self, request: gr.Request) -> Changes:
        """The answer has come, or will not: the box is for the next question, if that has not been asked already.

        One that waited is asked now.
        """
        page, turns, session = self.page, self.desk.turns, str(request.session_hash)
        if turns.busy(session):
            return gr.skip()
        question = turns.take_next(session)
        turns.end(session)
        changes: Changes = {page.question: ask_for_question()}
        return changes if question is None else changes | {page.next: question, page.next_line: ""}

    def on_stop(self, chat: list, request: gr.Request) -> Changes:
        """Stop an answer: one that has started says so itself, soon. A question that waits goes back to its box."""
        session = str(request.session_hash)
        changes = self._give_next_back(session)
        turn = self.desk.turns.stop(session)
        self.desk.jobs.end(session, "question")
        if turn is not None and turn.started and not turn.done:
            return changes if len(changes) > 1 else gr.skip()
        if turn is not None and not turn.started:
            changes[self.page.chat] = [*chat, show_answer("", [STOPPED])]
        return changes

    def on_answer_shown(self, opened: Opened | None, chat: list, answers: Answers) -> Changes:
        """The viewer shows the evidence of the answer that the chat ends with, never that of another one."""
        return self._show_evidence_of(opened, chat, answers)

    def _show_evidence_of(
        self, opened: Opened | None, chat: list, answers: Answers, pointed: dict[str, Any] | None = None
    ) -> Changes:
        answer = answers.get(len(chat) - 1)
        evidence = evidence_props(opened.case.selection, answer) if opened and answer else None
        props: dict[str, Any] = {"evidence": evidence} if pointed is None else {"evidence": evidence, "focus": pointed}
        return {self.page.view: gr.HTML(**props)}

    def on_undo(self, chat: list, questions: Questions, answers: Answers, request: gr.Request) -> Changes:
        """Take back the last question; its words return to the boxes."""
        self._refuse_while_busy(chat, request)
        kept = back_to_question(chat)
        last = len(kept) - 1
        question = questions.get(last, Question(text_of(kept[last])))
        return {
            self.page.chat: kept[:last],
            self.page.questions: {place: one for place, one in questions.items() if place < last},
            self.page.answers: {place: answer for place, answer in answers.items() if place < last},
            self.page.question: question.text,
            self.page.given_options: "\n".join(question.options),
        }

    def on_clear(self, request: gr.Request) -> Changes:
        """The chat was emptied; an answer that is still coming does not fill it again."""
        boxes = self._give_next_back(str(request.session_hash))
        self.desk.turns.drop(str(request.session_hash))
        self.desk.jobs.end(str(request.session_hash), "question")
        return {self.page.questions: {}, self.page.answers: {}, **boxes}

    # ---- the viewer tells something

    def on_picks(self, event: gr.EventData, opened: Opened) -> Changes:
        """Keep which patches were pinned and dropped in the viewer, and say how many."""
        with explain_errors():
            total = len(opened.case.bag.coords)
            told = {key: read_told(event._data, key) for key in ("pinned", "dropped")}
            picks = {key: [i for i in told[key] if isinstance(i, int) and 0 <= i < total] for key in told}
            if len(picks["pinned"]) > MOST or len(picks["dropped"]) > MOST_PICKS:
                raise ValueError(f"At most {MOST} patches can be pinned and {MOST_PICKS:,} dropped; take some back.")
        said = f"Pinned: {len(picks['pinned'])} · dropped: {len(picks['dropped'])}"
        return {self.page.picks: picks, self.page.picked: said}

    def on_marks(self, event: gr.EventData, opened: Opened | None) -> None:
        """Keep what the reader says of patches: it goes into every file."""
        with explain_errors():
            told = read_told(event._data, "marks")
        if opened is None:
            return
        known = [pair for pair in told if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], int)]
        opened.marks.clear()
        opened.marks |= {index: mark for index, mark in known if mark in MARKS and 0 <= index < opened.patches}

    def on_called(self, called: str, opened: Opened | None, aside: Aside | None, request: gr.Request) -> None:
        """Keep what the reader calls the case: for its report and the log of this session, and for no file's name."""
        if opened is None or not isinstance(called, str):
            return
        name = " ".join(called.split())[:MOST_CALLED]
        if name == opened.called:
            return
        for one in (opened, *([aside.opened] if aside else [])):
            one.called = name
        self.desk.record(request.session_hash, shared=False, event="name", name=name)

    def on_unpick(self) -> Changes:
        """Nothing is pinned or dropped any more, in the viewer too."""
        picks: Changes = {self.page.picks: {"pinned": [], "dropped": []}, self.page.picked: UNPICKED}
        return picks | {self.page.view: gr.HTML(unpicked=uuid.uuid4().hex)}

    def on_likes(self, event: gr.EventData, opened: Opened | None) -> Changes:
        """The patches of the slide that look most like one of them."""
        if opened is None:
            return gr.skip()
        told, features = event._data, opened.case.bag.features
        index = told.get("index") if isinstance(told, dict) else None
        if not isinstance(index, int) or not 0 <= index < len(features):
            return gr.skip()
        rank = int(1 + (opened.case.selection.scores > opened.case.selection.scores[index]).sum())
        members = {"indices": find_likes(features, index), "where": f"likes of #{rank}", "nonce": uuid.uuid4().hex}
        return {self.page.view: gr.HTML(members=members)}

    def on_journal(self, event: gr.EventData, request: gr.Request) -> None:
        """Write down what was looked at."""
        with explain_errors():
            views = read_told(event._data, "views")
        self.desk.record(request.session_hash, event="look", views=views[:MOST_VIEWS])

    def on_regions(self, file: str, opened: Opened | None, number: int, request: gr.Request) -> Changes:
        """Regions drawn in QuPath, on the slide that is looked at: list and mark the patches in them."""
        desk = self.desk
        with explain_errors(), desk.jobs.run(str(request.session_hash), "files") as job:
            try:
                if opened is None:
                    raise ValueError("Open a slide first: the regions must be of that slide.")
                with desk.jobs.step(job):
                    bag = opened.case.bag
                    number = min(number, len(list_parts(bag)) - 1)
                    found = read_regions(intake.require_upload(file, desk.uploads), bag, number)
            finally:
                desk.drop_upload(file)
        members = {"indices": found.tolist(), "where": "imported regions", "nonce": uuid.uuid4().hex}
        return {self.page.view: gr.HTML(members=members)}

    # ---- what if

    def on_ask_again(
        self,
        opened: Opened | None,
        chat: list,
        questions: Questions,
        answers: Answers,
        aside: Aside | None,
        k: int,
        selector: str,
        picks: dict[str, list[int]],
        request: gr.Request,
    ) -> Iterator[Changes]:
        """Ask the last question once more, from other patches: slide, film and chat are the what-if's until it is left.

        Another what-if takes the place of the one before, beside the same answer of the model's own patches.
        """

        def choose(case: Case, job: str) -> tuple[Case, str]:
            check_size(k)
            other = self.desk.choose(case, int(k), selector, picks["pinned"], picks["dropped"], job)
            return other, name_selection(other, picks)

        yield from self._ask_of_others(opened, chat, questions, answers, aside, choose, request)

    def on_without(
        self,
        event: gr.EventData,
        opened: Opened | None,
        chat: list,
        questions: Questions,
        answers: Answers,
        aside: Aside | None,
        request: gr.Request,
    ) -> Iterator[Changes]:
        """Ask the last question once more without the patches of a focus: of a reader that cannot be measured."""
        name = event._data.get("name") if isinstance(event._data, dict) else None
        shown = None if opened is None or opened.closed else opened.case
        focus = next((one for one in shown.foci if one.name == name), None) if shown else None
        if shown is None or focus is None:
            raise stop_unseen()
        less = shown.without(focus)
        label = f"{len(less.selection.indices)} patches, without focus {focus.name}"
        yield from self._ask_of_others(opened, chat, questions, answers, aside, lambda *_: (less, label), request)

    def _ask_of_others(
        self,
        opened: Opened | None,
        chat: list,
        questions: Questions,
        answers: Answers,
        aside: Aside | None,
        choose: Callable[[Case, str], tuple[Case, str]],
        request: gr.Request,
    ) -> Iterator[Changes]:
        """Ask the last question of other patches. choose: from the case and its job's name, the other case and its
        label"""
        self._refuse_while_busy(chat, request)
        if aside is None and opened is not None:
            aside = Aside(opened, chat, questions, answers)
        turns, session = self.desk.turns, str(request.session_hash)
        with explain_errors():
            require_whole(opened, aside)
            if aside is None or not aside.answers:
                raise ValueError("Ask a question first: a what-if asks the same again, from other patches.")
            check_turns(*words.turns_of(aside.chat[: max(aside.answers) + 1], aside.questions, history=False))
        turns.begin(session, WHAT_IF)
        turn = turns.take(session, WHAT_IF)
        assert turn is not None
        try:
            with closing(self._ask_what_if(turn, aside, choose, request)) as steps:
                for changes in steps:
                    if turns.get(session) is not turn or aside.opened.closed:
                        break
                    yield changes
            if aside.opened.closed:
                yield {self.page.compare: ""}
        finally:
            turn.done = True

    def _ask_what_if(
        self,
        turn: Turn,
        aside: Aside,
        choose: Callable[[Case, str], tuple[Case, str]],
        request: gr.Request,
    ) -> Generator[Changes]:
        desk, page, session, failure, whole = self.desk, self.page, str(request.session_hash), None, False
        case, last = aside.opened.case, max(aside.answers)
        first, chat = aside.answers[last], aside.chat[: last + 1]
        known = show_known(dataclasses.replace(first, impression=""), case, foci=False)  # focus A is the other's now
        left = (name_selection(case), text_of(chat[-1]), known)
        said = {place: one.text for place, one in aside.answers.items()}
        turns, given = words.turns_of(chat, aside.questions, desk.config.multi_turn, said)
        question = aside.questions.get(last - 1, Question(first.put, given))
        answer = self._begin_answer(dataclasses.replace(question, impression=""), turns, given)
        with explain_errors(), desk.jobs.run(session, "question", aside.opened.token) as job:
            other, label = choose(case, job.name)
            mine = aside.opened.beside(other)

            def beside(message: dict[str, Any]) -> Changes:
                text, lines = text_of(message), message["content"][1:]
                return {
                    page.compare: words.compare([left, (f"What if: {label}", text, lines)]),
                    page.chat: [show_question(question), message],
                }

            view = gr.HTML(**selection_props(other), whatif=label)
            state = {page.opened: mine, page.aside: aside, page.questions: {0: question}, page.answers: {}}
            yield {**beside(show_answer("…")), **state, page.view: view, page.question: wait_for_answer()}
            try:
                with explain_errors(), suppress(Halted), closing(self._tell(answer, other, turns, job.name)) as steps:
                    for answer in steps:
                        yield beside(show_told(answer, other))
                    answer, whole = desk.weigh(other, turns, answer, job.name), True
            except gr.Error as error:
                failure = error
        turn.done = True
        if desk.turns.get(session) is not turn or aside.opened.closed:  # it was left, or another slide was opened
            return
        answers = {1: answer} if whole else {}
        if not whole:
            answer = break_off(answer, failure is not None)
        else:
            asked: dict[str, Any] = dataclasses.asdict(answer) | {"what_if": label}
            desk.record(session, event="ask", slide=other.bag.slide, **asked)
        self.on_analysed(mine, answers, request)
        yield {
            **beside(show_told(answer, other)),
            page.answers: answers,
            page.question: ask_for_question(),
            **self._show_evidence_of(mine, [None, None], answers, point(answer, other) if whole else None),
        }
        if failure:
            raise failure

    def on_leave(
        self, opened: Opened | None, chat: list, answers: Answers, aside: Aside | None, request: gr.Request
    ) -> Changes:
        """Leave a what-if: slide, film, chat, picks and downloads are what they were before, answered or not."""
        page, session = self.page, str(request.session_hash)
        turn = self.desk.turns.get(session)
        if turn is not None and turn.asked == WHAT_IF:
            boxes = self._give_next_back(session)
            self.desk.turns.drop(session)
            self.desk.jobs.end(session, "question")
        else:
            self._refuse_while_busy(chat, request)
            boxes = {}
        before = aside or (None if opened is None else Aside(opened, chat, {}, answers))
        if before is None:
            return {page.compare: ""}
        case = before.opened.case
        self.on_analysed(before.opened, before.answers, request)
        same = opened is None or opened.slides == before.opened.slides
        props: dict[str, Any] = selection_props(case) if same else whole_props(before.opened)
        answer = before.answers.get(len(before.chat) - 1)
        props["evidence"] = evidence_props(case.selection, answer) if answer else None
        changes: Changes = {
            **boxes,
            page.compare: "",
            page.view: gr.HTML(**props, whatif="", unpicked=uuid.uuid4().hex),
            page.picks: {"pinned": [], "dropped": []},
            page.picked: UNPICKED,
            page.k: max(FEWEST, min(MOST, self.desk.config.num_tokens)),
            page.selector: "learned",
            page.aside: None,
        }
        if aside is not None:
            changes |= {page.opened: aside.opened, page.chat: aside.chat}
            changes |= {page.questions: aside.questions, page.answers: aside.answers}
        return changes


# ---- values


def whole_props(opened: Opened) -> dict[str, Any]:
    """The viewer's props of a case that it does not show yet, no answer resting on it."""
    case = opened.case
    slides = {"slides": [one.props for one in opened.slides]}
    return slides | bag_props(case.bag, case.selection) | selection_props(case)


def check_size(k: int) -> None:
    """Raise ValueError for more patches than a what-if takes, or fewer."""
    if not FEWEST <= k <= MOST:
        raise ValueError(f"A what-if takes {FEWEST} to {MOST} patches, got {k:,}.")


def require_whole(opened: Opened | None, aside: Aside | None) -> None:
    """Raise ValueError where two slides of the case stand side by side."""
    if opened is not None and aside is not None and opened.slides != aside.opened.slides:
        raise ValueError("Leave the comparison of two slides first.")


def name_selection(case: Case, picks: Mapping[str, Collection[int]] = MappingProxyType({})) -> str:
    """What a selection is called. picks: patches that were pinned and dropped"""
    label = f"{len(case.selection.indices)} {case.selector} patches"
    return label + "".join(f", {len(picks[key])} {key}" for key in ("pinned", "dropped") if picks.get(key))


def _is_anew(one: CaseSlide, other: CaseSlide) -> bool:
    """Whether they are not the same file, read at another resolution that was given by hand."""
    return one.path != other.path or one.slide_mpp == other.slide_mpp


def _require_different(slides: Sequence[CaseSlide]) -> None:
    """Raise ValueError for a slide that comes twice, wherever its file lies: it would count twice."""
    names = [one.props["name"] for one in slides]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ValueError(f"{name} is in the case already, as slide {names.index(name) + 1}; it was not added.")


def name_slides(opened: Opened) -> str:
    """The slides of a case, as its answers are told by; also of one that was closed."""
    return ", ".join(one.props["name"] for one in opened.slides)


def read_exchanges(about: str, chat: list) -> list[Exchange]:
    """What was asked in a chat and answered, in the chat's own words. about: the slides that it was about"""
    asked = [place for place, message in enumerate(chat[:-1]) if message["role"] == "user"]
    said = [(text_of(chat[place]), text_of(chat[place + 1])) for place in asked]
    return [(about, " ".join(question.split()), answer) for question, answer in said]


def _take_waiting(chat: list) -> list:
    """The chat without a question that waits for a slide."""
    return chat[:-2] if chat and text_of(chat[-1]) == AT_READY else chat


def number_kept(case: Case) -> list[int]:
    """The numbers, from 1, of the slides that the kept patches are of; nothing of a case of one slide."""
    return [number + 1 for number in case.numbers.tolist()] if case.bag.parts else []


def read_mpp(text: str) -> float | None:
    """um/px from the field; None when it is empty. Raises ValueError for what is no resolution."""
    if not text.strip():
        return None
    try:
        return float(text.strip().replace(",", "."))
    except ValueError:
        raise ValueError(f"The scan resolution is a number of µm/px such as 0.25, got {text.strip()!r}.") from None


def find_likes(features: Tensor, index: int, most: int = MOST_LIKES) -> list[int]:
    """Indices of the patches that look most like one of features (N, D), by cosine, best first, without itself."""
    directions = torch.nn.functional.normalize(features.float() - features.float().mean(0), dim=1)
    near = directions @ directions[index]
    near[index] = -2
    return near.topk(min(most, len(near) - 1)).indices.tolist()


def name_question(opened: Opened, chat: list) -> Hashable:
    """Which question the chat ends with, of which slide: the same after it has been to the page and back."""
    return opened.token, len(chat), " ".join(text_of(chat[-1]).split())


def work_props(job: Job) -> dict[str, Any]:
    """The viewer's prop "work"."""
    left = job.seconds_left
    return {
        "phase": job.phase,
        "place": job.place,
        "done": job.done,
        "total": job.total,
        "seconds_left": None if left is None else round(left, 1),
    }


def tissue_props(desk: Desk, job: Job, outlined: bool) -> dict[str, Any]:
    """What the prop "work" says of the slide so far: where its patches lie, once, and which are kept for now."""
    peek = job.peek()
    if peek is None:
        return {}
    where = {} if outlined else {"coords": packed(peek.coords, np.int32), "side": peek.patch_size}
    return {**where, "kept": packed(desk.provisional(job), np.int32)}


def break_off(answer: Answer, failed: bool) -> Answer:
    """An answer that was stopped, or that failed, before it was weighed."""
    why = STOPPED if not failed else UNWEIGHED if answer.unweighed == WEIGHING else BROKEN_OFF
    return dataclasses.replace(answer, unweighed=why)


def show_told(answer: Answer, case: Case) -> dict[str, Any]:
    """An answer as the chat shows it, however far it has come."""
    return show_answer(word_answer(answer, case.limits, case.selection.ranks.tolist()), show_known(answer, case))


def show_known(answer: Answer, case: Case, foci: bool = True) -> list[str]:
    """What stands under an answer; of one whose reader cannot be measured also what it can be asked again without."""
    blocks = show_evidence(answer, case.selection, answer.impression, number_kept(case), foci)
    again = answer.sent and answer.evidence and foci and len(case.foci) > 1
    return [*blocks, show_without(case.foci, len(case.selection.indices), answer.sent)] if again else blocks


def point(answer: Answer, case: Case) -> dict[str, Any] | None:
    """Where the viewer is to go, of an answer to "where is ...?": its prop "focus"."""
    place = find_place(answer, case.selection.ranks.tolist()) if answer.asked else None
    if place is None:
        return None
    where = {"name": place.name} if isinstance(place, FocusEffect) else {"rank": place}
    return {**where, "nonce": uuid.uuid4().hex}


def wait_for_answer(**changes: Any) -> gr.Textbox:
    """The question box while an answer is coming, with a Stop button."""
    return gr.Textbox(submit_btn=False, stop_btn="Stop", placeholder="Ask what is next", **changes)


def ask_for_question(**changes: Any) -> gr.Textbox:
    """The question box, ready for the next question."""
    return gr.Textbox(submit_btn=True, stop_btn=False, placeholder="Ask about the slide", **changes)


def evidence_props(selection: Selection, answer: Answer) -> dict[str, Any] | None:
    """The viewer's prop "evidence"."""
    if not answer.effects or answer.rests == "not":
        return None
    return {
        "indices": selection.indices.tolist(),
        "effects": [round(effect, 4) for effect in answer.effects],
        "foci": {focus.name: round(focus.effect, 4) for focus in answer.foci},
    }


def selection_props(case: Case) -> dict[str, Any]:
    """The viewer's props of a selection that no answer rests on yet."""
    kept = packed(case.selection.indices, np.int32)
    return {"kept": kept, "foci": foci_props(case.foci, case.selection), "evidence": None}
