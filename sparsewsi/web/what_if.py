"""What if: the last question once more, of other patches of the slide; a state that one button leaves."""

import dataclasses
import uuid
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from types import MappingProxyType
from typing import Any

import gradio as gr
import numpy as np

from sparsewsi.report.case import Case
from sparsewsi.web import chat as words
from sparsewsi.web.answering import (
    Answering,
    Answers,
    Changes,
    ask_for_question,
    break_off,
    evidence_props,
    point,
    show_known,
    show_told,
    wait_for_answer,
)
from sparsewsi.web.chat import Question, Questions, inert, show_answer, show_question, text_of
from sparsewsi.web.desk import Opened
from sparsewsi.web.errors import explain_errors, stop_unseen
from sparsewsi.web.jobs import Halted
from sparsewsi.web.layout import FEWEST, MOST, state_facts
from sparsewsi.web.limits import check_turns
from sparsewsi.web.turns import Turn
from sparsewsi.web.viewer import bag_props, foci_props, packed

WHAT_IF = "what if"  # the turn of one
UNPICKED = "Pinned: 0 · dropped: 0"


def picks_prop(before: Mapping[str, Sequence[int]] | None = None) -> dict[str, Any]:
    """The viewer's prop "picks": nothing is pinned or dropped any more, or what was before it became too much."""
    return {"pinned": [], "dropped": [], **(before or {}), "refused": before is not None, "nonce": uuid.uuid4().hex}


@dataclasses.dataclass(frozen=True, eq=False)
class Aside:
    """What a what-if has taken the place of, until it is left."""

    opened: Opened
    chat: list
    questions: Questions
    answers: Answers


class WhatIf(Answering):
    """The handlers of what-ifs."""

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
                    with turns.telling(session, turn) as wanted:
                        if not wanted or aside.opened.closed:
                            break
                        yield changes
            if aside.opened.closed:
                yield {self.page.compare: ""}
            elif turns.get(session) is not turn:
                yield gr.skip()  # Gradio sends what was yielded last once more at the end
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
        question = aside.questions.get(last - 1, Question(first.heading, given))
        answer = self._begin_answer(dataclasses.replace(question, impression=""), turns, given)
        which = f"The last question that was answered, asked again: <b>{inert(question.text)}</b>"
        heading = f"<p class='small'>{which}</p>"
        with explain_errors(), desk.jobs.run(session, "question", aside.opened.token) as job:
            other, label = choose(case, job.name)
            if other.selection.indices.tolist() == case.selection.indices.tolist():
                yield {page.compare: tell_unchanged(case)}
                return
            mine = aside.opened.beside(other)

            def beside(message: dict[str, Any]) -> Changes:
                text, lines = text_of(message), message["content"][1:]
                return {
                    page.compare: heading + words.compare([left, (f"What if: {label}", text, lines)]),
                    page.chat: [show_question(question), message],
                }

            view = gr.HTML(**selection_props(other), whatif=label)
            state: Changes = {page.opened: mine, page.aside: aside, page.questions: {0: question}, page.answers: {}}
            state[page.facts] = state_facts(desk, other)
            yield {**beside(show_answer("…")), **state, page.view: view, page.question: wait_for_answer()}
            try:
                with explain_errors(), suppress(Halted), closing(self._tell(answer, other, turns, job)) as steps:
                    for answer, whole in steps:
                        if not whole:
                            yield beside(show_told(answer, other))
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
            page.facts: state_facts(self.desk, case),
            page.view: gr.HTML(**props, whatif="", picks=picks_prop()),
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


def tell_unchanged(case: Case) -> str:
    """HTML in place of a what-if of the patches that were kept anyway."""
    return (
        f"<p class='small' role='status'>Nothing changed: these are the same {len(case.selection.indices)} patches, so "
        "the question was not asked again. Choose another number or way, or pin and drop patches.</p>"
    )


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


def selection_props(case: Case) -> dict[str, Any]:
    """The viewer's props of a selection that no answer rests on yet."""
    kept = packed(case.selection.indices, np.int32)
    foci = foci_props(case.foci, case.selection)
    return {"kept": kept, "unlike": sorted(case.unlike), "foci": foci, "evidence": None}
