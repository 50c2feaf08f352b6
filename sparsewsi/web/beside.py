"""Side by side: two selections of a case, or two of its slides, and one question to both. One button leaves it.

Of two selections the left one is what the page shows: the model's own patches, or a what-if's; the right one is chosen
as a what-if is. Of two slides each is a case of its own, with the patches that the model keeps of it alone.
"""

from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import gradio as gr

from sparsewsi.web import chat as words
from sparsewsi.web.chat import Question, Questions, show_both, show_evidence, show_question, shows_both
from sparsewsi.web.desk import Opened
from sparsewsi.web.errors import explain_errors
from sparsewsi.web.handlers import (
    BROKEN_OFF,
    STOPPED,
    UNWEIGHED,
    Answers,
    Aside,
    Changes,
    Handlers,
    ask_for_question,
    check_size,
    evidence_props,
    name_selection,
    number_kept,
    wait_for_answer,
    whole_props,
)
from sparsewsi.web.jobs import Halted
from sparsewsi.web.limits import check_turns

NOTHING = ("slides", "bag", "kept", "foci", "evidence", "compared")  # of a viewer that shows nothing


@dataclass(frozen=True, eq=False)
class Right:
    """What stands on the right.

    label: what it is called. left: what the other one is called, "" where its selection says it. answers: its own, by
    their place in the chat
    """

    opened: Opened
    label: str
    left: str = ""
    answers: Answers = field(default_factory=dict)


class Comparing(Handlers):
    """The handlers of a page, with those of a comparison."""

    def on_both(
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
    ) -> Changes:
        """Show another selection of the slide on the right; the last answer, if there is one, stays on the left."""
        desk, page, session = self.desk, self.page, str(request.session_hash)
        self._refuse_while_busy(chat, request)
        with explain_errors():
            if opened is None:
                raise ValueError("Open a slide first: two selections of it are shown side by side.")
            check_size(k)
            self._require_whole(opened, aside)
            aside = aside or Aside(opened, chat, questions, answers)
            with desk.jobs.run(session, "question", opened.token) as job:
                case = desk.choose(aside.opened.case, int(k), selector, picks["pinned"], picks["dropped"], job.name)
            right = Right(aside.opened.beside(case), name_selection(case, picks))
            props = whole_props(right.opened)
        last = max(answers, default=0)
        question = questions.get(last - 1, Question(answers[last].question, answers[last].options)) if last else None
        return {
            page.aside: aside,
            page.right: right,
            page.other: gr.HTML(**props, compared=right.label, visible=True),
            page.view: gr.HTML(compared=name_selection(opened.case)),
            page.chat: [show_question(question), chat[last]] if question else [],
            page.questions: {0: question} if question else {},
            page.answers: {1: answers[last]} if question else {},
        }

    def on_two(
        self,
        event: gr.EventData,
        opened: Opened | None,
        chat: list,
        questions: Questions,
        answers: Answers,
        aside: Aside | None,
        request: gr.Request,
    ) -> Changes:
        """Show the slide that the viewer names on the left and the one after it on the right, each on its own.

        The last question, which was put to the whole case, goes back to its box: it can be put to both.
        """
        desk, page, session = self.desk, self.page, str(request.session_hash)
        self._refuse_while_busy(chat, request)
        with explain_errors():
            self._require_whole(opened, aside)
            whole = aside.opened if aside else opened
            if whole is None or len(whole.slides) < 2:
                raise ValueError("Add a second slide to the case first: two of its slides are shown side by side.")
            aside = aside or Aside(whole, chat, questions, answers)
            told = event._data.get("number") if isinstance(event._data, dict) else 0
            first = told if isinstance(told, int) and 0 <= told < len(whole.slides) else 0
            numbers = (first, (first + 1) % len(whole.slides))
            with desk.jobs.run(session, "question", whole.token) as job:
                alone = [desk.select([whole.slides[number]], job=job.name) for number in numbers]
            left, other = (whole.beside(one.case, one.slides) for one in alone)
            names = [f"Slide {number + 1}" for number in numbers]
        question = aside.questions.get(max(aside.answers, default=0) - 1, Question(""))
        return {
            page.aside: aside,
            page.opened: left,
            page.right: Right(other, names[1], names[0]),
            page.view: gr.HTML(**whole_props(left), map=None, words=None, whatif="", compared=names[0]),
            page.other: gr.HTML(**whole_props(other), compared=names[1], visible=True),
            page.chat: [],
            page.questions: {},
            page.answers: {},
            page.question: question.text,
            page.given_options: "\n".join(question.options),
        }

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
        with explain_errors():
            self._require_whole(opened, aside)
        yield from super().on_ask_again(opened, chat, questions, answers, aside, k, selector, picks, request)

    def _require_whole(self, opened: Opened | None, aside: Aside | None) -> None:
        """Raise ValueError where two slides of the case stand side by side."""
        if opened is not None and aside is not None and opened.slides != aside.opened.slides:
            raise ValueError("Leave the comparison of two slides first.")

    def on_asked_too(
        self,
        opened: Opened | None,
        right: Right | None,
        chat: list,
        questions: Questions,
        answers: Answers,
        request: gr.Request,
    ) -> Iterator[Changes]:
        """The question that the left one has answered is put to the right one; both answers stand side by side."""
        place, session = len(chat) - 1, str(request.session_hash)
        asked = ("beside", right and right.opened.token, place)
        if opened is None or right is None or place not in answers or shows_both(chat[place]):
            yield gr.skip()
            return
        desk, page = self.desk, self.page
        desk.turns.begin(session, asked)
        turn = desk.turns.take(session, asked)
        assert turn is not None
        case, question = right.opened.case, questions.get(place - 1, Question(answers[place].question))
        shown, _ = self._put_first(answers[place], question, opened.case)
        first = replace(answers[place], impression="", limit="")
        numbers = number_kept(opened.case)
        known_left = show_evidence(first, opened.case.selection, numbers=numbers)
        left = (right.left or name_selection(opened.case), shown, known_left)
        told = (question.impression, answers[place].limit)
        text, lines, failure, if_it_fails = "", [STOPPED], None, BROKEN_OFF
        known: Answers = {}
        props: dict[str, Any] = {"evidence": None}

        def both(*lines: str) -> list:
            return [*chat[:place], show_both(left, (right.label, text, lines), *told)]

        yield {page.question: wait_for_answer()}
        try:
            with explain_errors(), suppress(Halted), desk.jobs.run(session, "question", right.opened.token) as job:
                said = {at: one.text for at, one in right.answers.items()}
                turns, given = words.turns_of(chat[:place], questions, desk.config.multi_turn, said)
                check_turns(turns, given)
                if turn.stopped:
                    raise Halted
                with closing(desk.answer(case, turns, given, job.name)) as pieces:  # type: ignore[type-var]
                    for piece in pieces:
                        text += piece
                        yield {page.chat: both()}
                if_it_fails = UNWEIGHED
                answer = desk.measure(case, turns, text.strip(), given, job.name)
                known = {place: replace(answer, impression=question.impression)}
                text, pointed = self._put_first(answer, question, case)
                lines = show_evidence(replace(answer, limit=""), case.selection, numbers=number_kept(case))
                props = {"evidence": evidence_props(case.selection, answer)}
                props |= {} if pointed is None else {"focus": pointed}
                desk.record(session, event="ask", slide=case.bag.slide, beside=right.label, **asdict(known[place]))
        except gr.Error as error:  # no half answer may stand as a whole one
            failure, lines = error, [if_it_fails]
        finally:
            turn.done = True
        if desk.turns.get(session) is turn:  # else it was cleared, or another slide opened
            earlier = {at: one for at, one in right.answers.items() if at < place}
            yield {
                page.chat: both(*lines),
                page.right: replace(right, answers=earlier | known),
                page.other: gr.HTML(**props),
                page.question: ask_for_question(),
            }
        if failure:
            raise failure

    def on_left(self) -> Changes:
        """The right one goes."""
        page = self.page
        return {
            page.right: None,
            page.other: gr.HTML(**dict.fromkeys(NOTHING), visible=False),
            page.view: gr.HTML(compared=""),
        }
