"""Side by side: two selections of a case, or two of its slides, and one question to both. One button leaves it.

Of two selections the left one is what the page shows: the model's own patches, or a what-if's; the right one is chosen
as a what-if is. Of two slides each is a case of its own, with the patches that the model keeps of it alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import gradio as gr

from sparsewsi.report.answer import Answer
from sparsewsi.report.case import Case
from sparsewsi.report.scope import word_answer
from sparsewsi.web import chat as words
from sparsewsi.web.answering import (
    Answers,
    Changes,
    ask_for_question,
    break_off,
    evidence_props,
    point,
    show_known,
    wait_for_answer,
)
from sparsewsi.web.chat import Column, Question, Questions, show_both, show_question, shows_both
from sparsewsi.web.desk import Opened
from sparsewsi.web.errors import explain_errors
from sparsewsi.web.jobs import Halted
from sparsewsi.web.limits import check_turns
from sparsewsi.web.what_if import Aside, WhatIf, check_size, name_selection, require_whole, whole_props

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


def lay_column(title: str, answer: Answer, case: Case, both: str, earlier: Sequence[Answer] = ()) -> Column:
    """An answer as it stands beside another one. both: the limit that holds for both and stands below them

    earlier: answers before it about the same patches
    """
    alone = replace(answer, impression="", limit="" if answer.limit == both else answer.limit, sent="")
    known = show_known(alone, case, earlier=earlier)
    return title, word_answer(answer, case.limits, case.selection.ranks.tolist()), known


class Comparing(WhatIf):
    """The handlers of comparisons."""

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
            require_whole(opened, aside)
            aside = aside or Aside(opened, chat, questions, answers)
            with desk.jobs.run(session, "question", opened.token) as job:
                case = desk.choose(aside.opened.case, int(k), selector, picks["pinned"], picks["dropped"], job.name)
            if case.selection.indices.tolist() == aside.opened.case.selection.indices.tolist():
                kept = len(case.selection.indices)
                raise ValueError(f"Both would be the same {kept} patches: choose another number or way, or pin some.")
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
            require_whole(opened, aside)
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
        case, question = right.opened.case, questions.get(place - 1, Question(answers[place].heading))
        first, named = answers[place], right.left or name_selection(opened.case)
        said = {at: one.text for at, one in right.answers.items()}
        turns, given = words.turns_of(chat[:place], questions, desk.config.multi_turn, said)
        answer, failure, whole = self._begin_answer(question, turns, given), None, False
        desk.turns.begin(session, asked)
        turn = desk.turns.take(session, asked)
        assert turn is not None

        def both(answer: Answer) -> list:
            limit = first.limit if answer.limit in ("", first.limit) and not first.unvalidated else ""
            before = [[told for at, told in own.items() if at < place] for own in (answers, right.answers)]
            columns = (
                lay_column(named, first, opened.case, limit, before[0]),
                lay_column(right.label, answer, case, limit, [replace(one, beside="") for one in before[1]]),
            )
            first_said, said = (one.text.strip().rstrip(".").casefold() for one in (first, answer))
            return [*chat[:place], show_both(*columns, whole, question.impression, limit, first_said == said)]

        yield {page.question: wait_for_answer()}
        try:
            with explain_errors(), suppress(Halted), desk.jobs.run(session, "question", right.opened.token) as job:
                check_turns(turns, given)
                if turn.stopped:
                    raise Halted
                with closing(self._tell(answer, case, turns, job)) as steps:
                    for answer, whole in steps:
                        if not whole:
                            yield {page.chat: both(answer)}
        except gr.Error as error:  # no half answer may stand as a whole one
            failure = error
        finally:
            turn.done = True
        known = {place: replace(answer, beside=right.label)} if whole else {}
        props: dict[str, Any] = {"evidence": None}
        if whole:
            props = {"evidence": evidence_props(case.selection, answer)}
            pointed = point(answer, case)
            props |= {} if pointed is None else {"focus": pointed}
            desk.record(session, event="ask", slide=case.bag.slide, **asdict(known[place]))
        else:
            answer = break_off(answer, failure is not None)
        if desk.turns.get(session) is turn:  # else it was cleared, or another slide opened
            earlier = {at: one for at, one in right.answers.items() if at < place}
            mine = earlier | known
            pairs = ((one, mine.get(at)) for at, one in answers.items())
            self._offer(opened, [one for pair in pairs for one in pair if one is not None], request)
            yield {
                page.chat: both(answer),
                page.right: replace(right, answers=mine),
                page.other: gr.HTML(**props),
                page.question: ask_for_question(),
            }
        else:
            yield gr.skip()  # Gradio sends what was yielded last once more at the end
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
