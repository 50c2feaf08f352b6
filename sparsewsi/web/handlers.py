"""What happens on the page, by event: slides, and what the viewer tells; questions are in answering.py, what_if.py and
beside.py. Every handler returns the parts of the page that change, with their new values.

A session holds an analysed slide as values (CPU tensors), never an open slide.
"""

import dataclasses
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from torch import Tensor

from sparsewsi.bags.bag import list_parts
from sparsewsi.files import as_path
from sparsewsi.report import umap
from sparsewsi.report.phantom import choose_questions, describe_truths, find_truth
from sparsewsi.report.qupath import find_regions
from sparsewsi.web import intake
from sparsewsi.web.answering import Answers, Changes, take_waiting
from sparsewsi.web.beside import Comparing
from sparsewsi.web.chat import (
    Questions,
    text_of,
)
from sparsewsi.web.desk import CaseSlide, Desk, Exchange, Left, Opened
from sparsewsi.web.errors import explain_errors, refuse, say_which, stop_unseen
from sparsewsi.web.examples import EXAMPLES, name_example, open_example
from sparsewsi.web.gallery import find_sample
from sparsewsi.web.jobs import Halted, Job
from sparsewsi.web.layout import FEWEST, MOST, offer_back, state_facts, tell_about, tell_doubts, tell_earlier
from sparsewsi.web.limits import MOST_CALLED, check_slides, read_told
from sparsewsi.web.viewer import (
    bag_props,
    file_props,
    foci_props,
    map_props,
    packed,
    slide_props,
    words_props,
)
from sparsewsi.web.what_if import UNPICKED, Aside, picks_prop

OPENING = {"phantom": "Opening the phantom (generated on first use)", "cmu-1": "Fetching CMU-1 (CC0)"}
# Of a slide just opened.
NOTHING = ("picks", "bag", "kept", "foci", "map", "words", "evidence", "whatif", "compared", "work")
MOST_LIKES = 24
MARKS = ("agree", "disagree")
MOST_VIEWS, MOST_PICKS = 200, 4096  # taken from one event of the viewer

UNKNOWN = "The page was loaded anew, and this server does not know the slide of before any more: open it again."
DELETED = "The page was loaded anew. What is uploaded is deleted when its page goes: choose the file again."
STOPPED_AT_RELOAD = "The page was loaded anew, which ended the analysis of before."
NOT_ANSWERED = "The page was loaded anew before a question was answered: it is in its box again, and Enter asks it."
CANCELLED = "The analysis was cancelled. Open the slide again to go on."
NOT_ADDED = "The analysis was cancelled; the case is as it was."


@dataclasses.dataclass(frozen=True)
class Asked:
    """Slides that were asked for: paths or addresses.

    beside: they are added to the case that is open; left: they are those of a page before, with its chat
    mpp: um/px of their level 0, where somebody publishes it
    """

    paths: tuple[str, ...]
    beside: bool = False
    left: Left | None = None
    mpp: float | None = None


class Handlers(Comparing):
    """The handlers of one page of one desk: here those of slides and of what the viewer tells."""

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
            return self._open_examples([name], request, progress, beside)
        sample = find_sample(name)
        if sample is None:
            raise stop_unseen()
        progress(None, desc="Asking the server of this slide")
        with self._opening(request):
            return {self.page.asked: Asked((sample.address,), beside, mpp=sample.mpp), self.page.mpp: ""}

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
        """Open what the page showed before it was loaded anew, or else the examples that its address names.

        token: of a slide that it showed; "" on a page that is new. What cannot come back is told
        """
        page, names = self.page, dict(request.query_params).get("slide", "").split(",")
        named = set(names) <= set(EXAMPLES)
        left = self.desk.take_left(token) if token else None
        if token and not named and (left is None or left.lost or left.kept is None):
            lost = UNKNOWN if left is None else DELETED if left.lost else STOPPED_AT_RELOAD
            again = left is not None and bool(left.slides)
            told: Changes = {
                page.left: left and dataclasses.replace(left, asked=None),
                page.lost: f"<p>{lost}</p>",
                page.reopen: gr.Button(visible=again),
            }
            yield told | self._give_asked_back(left)
            raise stop_unseen()
        if left is not None and left.slides:  # its chat comes back with its patches, and what was asked after it
            yield self.on_reopen(left, request) | (self._give_asked_back(left) if left.kept is None else {})
        elif named:
            yield self._open_examples(names, request, progress)
        else:
            raise stop_unseen()

    def on_reopen(self, left: Left | None, request: gr.Request) -> Changes:
        """Open again what a page before this one showed."""
        if left is None:
            raise stop_unseen()
        with self._opening(request):
            if any(self.desk.is_upload(one.path) and not Path(one.path).exists() for one in left.slides):
                raise ValueError("That slide was uploaded and had to make room for another: choose its file again.")
            return {self.page.asked: Asked(tuple(one.path for one in left.slides), left=left)}

    def _open_examples(
        self, names: Sequence[str], request: gr.Request, progress: gr.Progress, beside: bool = False
    ) -> Changes:
        paths = []
        with self._opening(request, "example"):  # which may wait for a network
            for name in dict.fromkeys(names):
                progress(None, desc=OPENING[name])
                paths.append(str(open_example(name)))
        return {self.page.asked: Asked(tuple(paths), beside)}

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
            mpp = asked.mpp if mpp is None else mpp
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
                        source = name_example(one.path) if one.slide_mpp is None else ""
                        props = slide_props("", slide, source)
                        bag = one.bag if one.bag and one.bag.slide == props["name"] else None
                        looked.append(dataclasses.replace(one, props=props, bag=bag))
                _require_different([*there, *looked])
                opens.pop_all()  # it stays open, for the viewer
            desk.slides.drop(*(one.token for one in again))
            before: Changes = {}
            if not beside and not desk.stays_aside(session, base):
                former = desk.set_aside(session, base.slides if base else coming or (), base)
                before = {page.left: former, page.back: offer_back(former)}
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
            **before,
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
        found.earlier = (*before.earlier, *read_exchanges(name_slides(before), take_waiting(chat)))
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
            facts = state_facts(desk, case, coming=len(rest))
        starters = choose_questions(truths)
        props: dict[str, Any] = bag_props(case.bag, case.selection) | {"unlike": sorted(case.unlike)}
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
            props |= dict.fromkeys(("map", "words", "foci", "evidence")) | {"whatif": "", "picks": picks_prop()}
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
        if opened is not None and (aside is None or opened is not aside.opened):
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
        return back | self._give_asked_back(left) | self._show_evidence_of(opened, chat, dict(answers))

    def _give_asked_back(self, left: Left | None) -> Changes:
        """The boxes with what was not answered any more."""
        if left is None or left.asked is None:
            return {}
        page, asked = self.page, left.asked
        gr.Info(NOT_ANSWERED, duration=8)
        boxes: Changes = {page.question: asked.text, page.impression: asked.impression}
        return boxes | {page.given_options: "\n".join(asked.options)}

    def on_shown(self, event: gr.EventData) -> Changes:
        """Another slide of the case is looked at: regions that are imported are of that one."""
        number = event._data.get("number") if isinstance(event._data, dict) else None
        return {self.page.number: number if isinstance(number, int) and number >= 0 else 0}

    def on_case(self, opened: Opened | None) -> Changes:
        """What to doubt in this slide's answers, and which patches belong together."""
        if opened is None:
            return {self.page.doubts: ""}
        if opened.closed:  # another one was opened meanwhile
            return gr.skip()
        case = opened.case
        samples = [sample for one in opened.slides if (sample := find_sample(one.path))]
        told = tell_doubts(case) + "".join(tell_about(sample.caption) for sample in samples)
        return {self.page.doubts: told, self.page.view: gr.HTML(foci=foci_props(case.foci, case.selection))}

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
            desk.wait_for_map(job)
            with desk.jobs.step(job):
                props = map_props(umap.map_features(case.bag.features, case.selection, look=look))
        return gr.skip() if opened.closed else {self.page.view: gr.HTML(map=props, words=words)}

    def on_cancel(self, request: gr.Request) -> None:
        """The slide that is being analysed is not wanted any more."""
        self.desk.cancel(str(request.session_hash))

    # ---- the viewer tells something

    def on_picks(self, event: gr.EventData, opened: Opened | None, before: dict[str, list[int]]) -> Changes:
        """Keep which patches were pinned and dropped in the viewer, and say how many."""
        if opened is None or opened.closed:  # another slide is opened, and what was picked of this one goes
            return {self.page.picks: {"pinned": [], "dropped": []}, self.page.picked: UNPICKED}
        with explain_errors():
            total = len(opened.case.bag.coords)
            told = {key: read_told(event._data, key) for key in ("pinned", "dropped")}
            picks = {key: [i for i in told[key] if isinstance(i, int) and 0 <= i < total] for key in told}
        if len(picks["pinned"]) > MOST or len(picks["dropped"]) > MOST_PICKS:
            gr.Warning(f"At most {MOST} patches can be pinned and {MOST_PICKS:,} dropped; it stays as it was.")
            return {self.page.view: gr.HTML(picks=picks_prop(before))}
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
        return picks | {self.page.view: gr.HTML(picks=picks_prop())}

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
                    found = find_regions(intake.require_upload(file, desk.uploads), bag, number)
            finally:
                desk.drop_upload(file)
        where = f"imported regions ({found.note})" if found.note else "imported regions"
        members = {"indices": found.rows.tolist(), "where": where, "nonce": uuid.uuid4().hex}
        return {self.page.view: gr.HTML(members=members)}


# ---- values


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
    return [(about, " · ".join(filter(None, question.splitlines())), answer) for question, answer in said]


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
