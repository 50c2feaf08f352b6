"""Questions that are being answered: one of each session at a time, until Stop is pressed.

Stop is a flag that an answer looks at, not Gradio's `cancels`: of a cancelled event, what was on its way still comes,
what follows it is started, and the next question may find it not ended yet and never be asked.
"""

import threading
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(eq=False)
class Turn:
    """A question that is being answered.

    asked: which one, of which slide: an answer that waited in the queue finds out whether it is still wanted
    """

    asked: Hashable
    stopped: bool = False
    started: bool = False
    done: bool = False


class Turns:
    """The turn of each session, by its name, while there is one. Threads may share it."""

    def __init__(self) -> None:
        self._turns: dict[str, Turn] = {}
        self._lock = threading.Lock()

    def begin(self, session: str, asked: Hashable) -> None:
        """A question was asked; an answer to it will be taken up."""
        with self._lock:
            self._turns[session] = Turn(asked)

    def get(self, session: str) -> Turn | None:
        return self._turns.get(session)

    def busy(self, session: str) -> bool:
        """Is an answer coming?"""
        turn = self._turns.get(session)
        return turn is not None and not turn.done

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

    def drop(self, session: str) -> None:
        """Whatever is being answered is not wanted any more."""
        with self._lock:
            self._turns.pop(session, None)
