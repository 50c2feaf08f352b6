"""How much a caller may ask for. What is too much is said, never cut without a word."""

import json
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

MOST_CHARS = 2000  # of a question; of its options together; of an answer whose evidence is asked for
MOST_OPTIONS = len(ascii_uppercase)
MOST_TOLD = 64 << 10  # bytes of what the viewer tells at a time


def check_question(question: str, options: Sequence[str] = (), answer: str = "") -> None:
    """Raise ValueError for a question, options or an answer that are none or longer than people write."""
    if not all(isinstance(text, str) for text in (question, answer, *options)):
        raise ValueError("The question, its options and the answer must be texts.")
    if len(options) > MOST_OPTIONS:
        raise ValueError(f"A question has at most {MOST_OPTIONS} options, got {len(options)}; leave some out.")
    for what, size in (("question", len(question)), ("answer", len(answer)), ("options", sum(map(len, options)))):
        if size > MOST_CHARS:
            verb = "have together" if what == "options" else "has"
            raise ValueError(f"The {what} {verb} {size:,} characters, more than the {MOST_CHARS:,} allowed; shorten.")


def check_told(told: Any) -> None:
    """Raise ValueError for an event of the viewer that is longer than a viewer's."""
    if len(json.dumps(told)) > MOST_TOLD:
        raise ValueError(f"The viewer tells {MOST_TOLD >> 10} kB at most at a time; this was not written down.")
