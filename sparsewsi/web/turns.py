"""Questions that are being answered: one of each session at a time, until Stop is pressed.

Stop is a flag that an answer looks at, not Gradio's `cancels`: of a cancelled event, what was on its way still comes,
what follows it is started, and the next question may find it not ended yet and never be asked.
"""

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SENT_WITHIN = 5.0  # s until Gradio has sent what a generator yielded, and asks it for more; its caller may be gone


@dataclass(eq=False)
class Turn:
    """A question that is being answered.

    asked: which one, of which slide: an answer that waited in the queue finds out whether it is still wanted
    question: the same, as it can be put into its boxes again
    next:  the question that is asked once this one is answered
    told:  set unless something that it shows has yet to be sent: whatever is sent then would come before that
    """

    asked: Hashable
    stopped: bool = False
    started: bool = False
    done: bool = False
    question: Any = None
    next: Any = None
    told: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.told.set()


class Turns:
    """The turn of each session, by its name, while there is one. Threads may share it."""

    def __init__(self) -> None:
        self._turns: dict[str, Turn] = {}
        self._early: dict[str, Any] = {}
        self._lock = threading.Lock()

    def keep_early(self, session: str, question: Any) -> None:
        """A question waits for a slide, or, with None, does so no longer."""
        with self._lock:
            self._early.pop(session, None)
            if question is not None:
                self._early[session] = question

    def unanswered(self, session: str) -> Any:
        """The question that is being answered, or waits for a slide."""
        turn = self._turns.get(session)
        return turn.question if turn and turn.question is not None else self._early.get(session)

    def begin(self, session: str, asked: Hashable, question: Any = None) -> None:
        """A question was asked; an answer to it will be taken up. What waits for the one before waits for this one."""
        with self._lock:
            before = self._turns.get(session)
            self._turns[session] = Turn(asked, question=question, next=before and before.next)

    def get(self, session: str) -> Turn | None:
        return self._turns.get(session)

    def busy(self, session: str) -> bool:
        """Is an answer coming?"""
        turn = self._turns.get(session)
        return turn is not None and not turn.done

    def let_wait(self, session: str, question: Any) -> bool:
        """Have a question asked once the answer that is coming is there; False if none is coming, or one waits."""
        with self._lock:
            turn = self._turns.get(session)
            if turn is None or turn.next is not None:
                return False
            turn.next = question
            return True

    def take_next(self, session: str) -> Any:
        """The question that waits, which does so no longer; None if none does."""
        with self._lock:
            turn = self._turns.get(session)
            if turn is None:
                return None
            question, turn.next = turn.next, None
            return question

    def take(self, session: str, asked: Hashable) -> Turn | None:
        """Start to answer, unless it is not wanted any more: the chat was cleared, another slide opened."""
        with self._lock:
            turn = self._turns.get(session)
            if turn is None or turn.started or turn.asked != asked:
                return None
            turn.started = True
            return turn

    def stop(self, session: str) -> Turn | None:
        """Stop was pressed: a turn that has not started never will, another one looks. Returns it."""
        with self._lock:
            turn = self._turns.get(session)
            if turn is not None:
                turn.stopped = True
                if not turn.started or turn.done:
                    del self._turns[session]
            return turn

    def end(self, session: str) -> bool:
        """The answer has come, or will not. False if the next question was asked already."""
        with self._lock:
            if self.busy(session):
                return False
            self._turns.pop(session, None)
            return True

    @contextmanager
    def telling(self, session: str, turn: Turn) -> Iterator[bool]:
        """While a generator yields what it has to show. False if that is not wanted any more."""
        with self._lock:
            wanted = self._turns.get(session) is turn
            if wanted:
                turn.told.clear()
        try:
            yield wanted
        finally:
            turn.told.set()

    def drop(self, session: str) -> None:
        """Whatever is being answered is not wanted any more; what it is just showing is sent before this returns."""
        turn = self.forget(session)
        if turn is not None:
            turn.told.wait(SENT_WITHIN)

    def forget(self, session: str) -> Turn | None:
        """Nobody sees any more what is being answered. Returns its turn."""
        with self._lock:
            self._early.pop(session, None)
            return self._turns.pop(session, None)
