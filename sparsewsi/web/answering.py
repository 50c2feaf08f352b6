"""Questions and their answers on the page: asked, queued, streamed, judged before they are shown, weighed, stopped.

Every handler returns the parts of the page that change, with their new values.
"""

import dataclasses
import functools
import html
import tempfile
import uuid
import zipfile
from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import gradio as gr

from sparsewsi.model.limits import Limits
from sparsewsi.model.prompt import format_question
from sparsewsi.model.selection import Selection
from sparsewsi.report.answer import NOT_VALIDATED, Answer, FocusEffect
from sparsewsi.report.case import ANNOTATIONS, Case
from sparsewsi.report.contradictions import word_against
from sparsewsi.report.scope import (
    find_place,
    find_target,
    offer_options,
    put_as_presence,
    suggest,
    within,
    word_answer,
    word_tendency,
)
from sparsewsi.slides.slide import Slide
from sparsewsi.web import chat as words
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
from sparsewsi.web.desk import CaseSlide, Desk, Messages, Opened
from sparsewsi.web.errors import explain_errors, refuse, stop_unseen
from sparsewsi.web.jobs import Halted, Job
from sparsewsi.web.layout import Page
from sparsewsi.web.limits import check_question, check_turns
from sparsewsi.web.turns import Turn
from sparsewsi.web.viewer import BY_SLIDE

COMING = "The answer is coming; what it rests on is weighed after it."
STOPPED = "Stopped; the evidence was not weighed."
UNWEIGHED = "The evidence could not be weighed."
BROKEN_OFF = "The answer broke off here; ask again."
WEIGHING = "Weighing the evidence: the answer is scored again without each of the patches …"
WAITS = "A question waits already, so this one stays in the box: wait for the answer or press Stop."
WAITS_TOO = "A question waits for the slide already, so this one stays in the box; Cancel gives the other one back."
IN_BOX = "The question is in the box: Enter asks it, once the slide is ready."
OUTSIDE = "This model cannot answer that; it can answer:"
ENGLISH = "Ask in English: questions in other languages are not understood."
AT_READY = "It will be asked when the slide is ready."
NO_WORD = "This model has no word for that, so it cannot point at it."

Changes = dict[Any, Any]  # part of the page -> new value; gr.skip() where nothing changes
Answers = dict[int, Answer]  # by their place in the chat


class Answering:
    """The handlers of questions, of one page of one desk."""

    def __init__(self, desk: Desk, page: Page) -> None:
        self.desk, self.page = desk, page

    def on_analysed(self, opened: Opened | None, answers: Answers, request: gr.Request) -> None:
        """From now on the downloads hold these answers, unless the slide has been closed meanwhile."""
        if opened is not None and not opened.closed:
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
            if name.startswith("figure"):  # which holds the map
                desk.wait_for_map(job)
            names, where = ([name], folder) if name != BY_SLIDE else (["patches.geojson"], Path(beside))
            if name == BY_SLIDE and not any(desk.is_upload(one.path) for one in opened.slides):
                names.append(ANNOTATIONS)  # whose writer reads the slide's files in this process

            def opening(path: Path, slide_mpp: float | None) -> Slide:
                return desk.open_slide(path, slide_mpp, job)

            written = case.write(where, [*answers, *list_refused(opened)], names, opening, opened.marks, opened.called)
            if name == BY_SLIDE:
                with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
                    for one in written:
                        archive.write(where / one, one)
        if not written:
            raise ValueError(f"{name} could not be drawn on this server.")
        return folder / name

    # ---- a question is asked

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
        self.desk.turns.keep_early(str(request.session_hash), None)
        if opened is None or coming is None:
            box = {page.question: waiting.text, page.given_options: "\n".join(waiting.options)}
            return {page.waiting: None, page.chat: take_waiting(chat), **box}
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
        return {self.page.impression: ""} | self._ask_or_wait(opened, chat, tapped, questions, request)

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
            if take_waiting(chat) != chat:
                raise refuse(WAITS_TOO)
            return self._let_wait(put, chat, str(request.session_hash))
        changes = self._ask_or_wait(opened, chat, put, questions, request)
        waits = self.page.chat not in changes or self.desk.turns.busy(str(request.session_hash))
        box = wait_for_answer if waits else ask_for_question
        emptied = {self.page.given_options: "", self.page.impression: ""}  # unless it was refused
        return emptied | changes | {self.page.question: box(value="")}

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

    def _give_next_back(self, session: str, coming: bool = False) -> Changes:
        """The boxes, ready for the next question; the one that waited, if one did, is in them again.

        coming: the answer has not ended yet, and makes them ready itself
        """
        page, question = self.page, self.desk.turns.take_next(session)
        box = gr.Textbox if coming else ask_for_question
        if question is None:
            return {} if coming else {page.question: box()}
        boxes: Changes = {page.question: box(value=question.text), page.next_line: ""}
        return boxes | {page.given_options: "\n".join(question.options), page.impression: question.impression}

    def _let_wait(self, question: Question, before: list, session: str) -> Changes:
        page = self.page
        with explain_errors():
            check_question(question.text, question.options)
        self.desk.turns.keep_early(session, question)
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
        with explain_errors():
            offered = suggest(self._limits(opened.case))
        number = event._data.get("number") if isinstance(event._data, dict) else None
        if not isinstance(number, int) or not 0 <= number < len(offered):
            raise stop_unseen()
        one = offered[number]
        tapped = Question(one.text, one.options, impression=impression.strip())
        changes = self._ask_or_wait(opened, chat, tapped, questions, request)
        changes.pop(self.page.given_options, None)
        return {self.page.impression: ""} | changes

    def _limits(self, case: Case) -> Limits:
        """What who answers was validated on: of another reader than the model's own LLM nothing is known."""
        return case.limits if self.desk.reader is None else Limits()

    def on_retry(self, opened: Opened, chat: list, request: gr.Request) -> Changes:
        """Ask the last question again."""
        self._refuse_while_busy(chat, request)
        asked = back_to_question(chat)
        if chat and text_of(chat[-1]) in (OUTSIDE, NO_WORD):
            raise refuse("This question was refused; ask another one.")
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
        if not question.options and not target:  # answered and measured as where it is tapped
            question = dataclasses.replace(question, options=offer_options(limits, question.text))
        presence = put_as_presence(limits, target) if target else None
        if presence is not None:
            question = dataclasses.replace(question, options=presence.options, put=presence.text)
        elif (target and limits.kinds) or not within(limits, question.text, question.options):
            why, offered = NO_WORD if target else OUTSIDE, show_suggestions(suggest(limits))
            said = show_answer(why, [f"{offered}<p class='small'>{ENGLISH}</p>"])
            question = dataclasses.replace(question, refused=why.partition(";")[0].rstrip(".") + ".")
            told = {"question": question.text, "options": question.options, "why": question.refused}
            told |= {"impression": question.impression}
            self.desk.record(request.session_hash, event="refused", slide=opened.case.bag.slide, **told)
            return {
                self.page.chat: [*before, show_question(question), said],
                self.page.questions: earlier | {len(before): question},
                self.page.question: ask_for_question(),
                self.page.given_options: "\n".join(question.options),
                self.page.impression: question.impression,
            }
        asked = [*before, show_question(question)]
        self.desk.turns.begin(str(request.session_hash), name_question(opened, asked), question)
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
        before = list(answers.values())
        question, failure, whole = questions.get(len(chat) - 1, Question("")), None, False
        turn.question = question
        answer = self._begin_answer(question, turns, given)
        try:
            with explain_errors(), suppress(Halted), desk.jobs.run(session, "question", opened.token) as job:
                if turn.stopped:
                    raise Halted
                with closing(self._tell(answer, case, turns, job)) as steps:
                    for answer, whole in steps:
                        if not whole:
                            yield {page.chat: [*chat, show_told(answer, case, before)]}
        except gr.Error as error:  # no half answer may stand as a whole one
            failure = error
        turn.done = True
        if whole:
            answers[len(chat)] = answer
        else:
            answer = break_off(answer, failure is not None)
        why, said_so_far = ("", "") if whole else (answer.unweighed, answer.text)
        if whole or answer.text:
            asked = dataclasses.replace(question, refused=why, said=said_so_far)
            questions = {**questions, len(chat) - 1: asked}
        if opened.closed:  # by a slide that was added or removed
            yield gr.skip()
        elif desk.turns.get(session) is turn:
            chat = chat if failure and not answer.text else [*chat, show_told(answer, case, before)]
            if not failure:
                desk.record(request.session_hash, event="ask", slide=case.bag.slide, **dataclasses.asdict(answer))
            self.on_analysed(opened, answers, request)
            changes = {page.chat: chat, page.questions: questions, page.answers: answers}
            changes[page.question] = ask_for_question()
            yield changes | self._show_evidence_of(opened, chat, answers, point(answer, case) if whole else None)
        elif desk.turns.get(session) is None:  # cleared, or another slide: a word may have come after that
            yield {page.chat: [], page.answers: {}}
        else:
            yield gr.skip()  # Gradio sends what was yielded last once more at the end
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

    def _tell(self, begun: Answer, case: Case, turns: Messages, job: Job) -> Generator[tuple[Answer, bool]]:
        """An answer as far as it has come, at every step judged as far as it can be, and whether that is all of it.

        One of several options is told once it is known how sure the model is; what it rests on, at the end.
        """
        desk, text = self.desk, ""
        if begun.options and desk.reader is None:  # the likeliest option is the answer: asked for once, not twice
            judged = desk.judge(case, turns, None, begun.options, job.name)
        else:
            with closing(desk.answer(case, turns, begun.options, job.name)) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    text += piece
                    if not begun.options:
                        limit = NOT_VALIDATED if begun.reader else case.limits.judge(begun.question)
                        yield dataclasses.replace(begun, text=text.lstrip(), limit=limit), False
            judged = desk.judge(case, turns, text, begun.options, job.name)
        known = {"asked": begun.asked, "impression": begun.impression}
        judged = dataclasses.replace(judged, unweighed=WEIGHING if desk.weighs else "", **known)
        yield judged, False
        with closing(desk.jobs.watch(job, lambda: desk.weigh(case, turns, judged, job.name))) as steps:
            done = 0
            for doing in steps:
                if doing.result is not None:
                    yield doing.result, True
                elif doing.done > done:
                    done = doing.done
                    yield dataclasses.replace(judged, unweighed=f"{WEIGHING} {done} of {doing.total}"), False

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
        turn = self.desk.turns.get(session)
        coming = turn is not None and turn.started and not turn.done
        changes = self._give_next_back(session, coming)
        self.desk.turns.stop(session)
        self.desk.jobs.end(session, "question")
        if turn is not None and not turn.started:
            changes[self.page.chat] = [*chat, show_answer("", [STOPPED])]
        return changes or gr.skip()

    def on_answer_shown(self, opened: Opened | None, chat: list, answers: Answers) -> Changes:
        """The viewer shows the evidence of the answer that the chat ends with, never that of another one."""
        return self._show_evidence_of(opened, chat, answers)

    def _show_evidence_of(
        self, opened: Opened | None, chat: list, answers: Answers, pointed: dict[str, Any] | None = None
    ) -> Changes:
        answer = answers.get(len(chat) - 1)
        evidence = None
        if opened and answer and not opened.closed:
            evidence = evidence_props(opened.case.selection, answer)
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
        return {self.page.questions: {}, self.page.answers: {}, self.page.waiting: None, **boxes}


# ---- values


def name_question(opened: Opened, chat: list) -> Hashable:
    """Which question the chat ends with, of which slide: the same after it has been to the page and back."""
    return opened.token, len(chat), " ".join(text_of(chat[-1]).split())


def break_off(answer: Answer, failed: bool) -> Answer:
    """An answer that was stopped, or that failed, before it was weighed."""
    why = STOPPED if not failed else UNWEIGHED if answer.unweighed.startswith(WEIGHING) else BROKEN_OFF
    return dataclasses.replace(answer, unweighed=why)


def list_refused(opened: Opened) -> list[Answer]:
    """The questions of a case that were not put to the model, or not answered in whole, for its files."""
    asked = opened.talk[1].values()
    return [
        Answer(one.text, one.said, one.options, impression=one.impression, refused=one.refused)
        for one in asked
        if one.refused
    ]


def show_told(answer: Answer, case: Case, earlier: Sequence[Answer] = ()) -> dict[str, Any]:
    """An answer as the chat shows it, however far it has come. earlier: those before it about the same patches"""
    said = word_answer(answer, case.limits, case.selection.ranks.tolist())
    return show_answer(said, show_known(answer, case, earlier=earlier))


def show_known(answer: Answer, case: Case, foci: bool = True, earlier: Sequence[Answer] = ()) -> list[str]:
    """What stands under an answer; of one whose reader cannot be measured also what it can be asked again without."""
    beneath = [word_against(answer, earlier), word_tendency(answer, case.limits)]
    blocks = show_evidence(answer, case.selection, answer.impression, number_kept(case), foci, beneath)
    kept = len(case.selection.indices)
    parts = [focus for focus in case.foci if len(focus.places) < kept]
    again = answer.sent and answer.evidence and foci and parts
    return [*blocks, show_without(parts, kept, answer.sent)] if again else blocks


def point(answer: Answer, case: Case) -> dict[str, Any] | None:
    """Where the viewer is to go, of an answer to "where is ...?": its prop "focus"."""
    place = find_place(answer, case.selection.ranks.tolist()) if answer.asked else None
    if place is None:
        return None
    where: dict[str, Any] = {"rank": place}
    if isinstance(place, FocusEffect):
        where = {"name": place.name, "rank": words.find_heaviest(place, answer, case.selection)}
    return {**where, "nonce": uuid.uuid4().hex}


def number_kept(case: Case) -> list[int]:
    """The numbers, from 1, of the slides that the kept patches are of; nothing of a case of one slide."""
    return [number + 1 for number in case.numbers.tolist()] if case.bag.parts else []


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


def take_waiting(chat: list) -> list:
    """The chat without a question that waits for a slide."""
    return chat[:-2] if chat and text_of(chat[-1]) == AT_READY else chat
