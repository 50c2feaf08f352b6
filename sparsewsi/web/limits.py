"""How much a caller may ask for. What is too much is said, never cut without a word."""

import json
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

MOST_CALLED = 80  # characters of the name that a reader gives a case
MOST_CHARS = 2000  # of a question; of its options together
MOST_ANSWERED = 1000  # characters of an answer whose evidence is asked for; the model's own have 128 tokens at most
MOST_OPTIONS = len(ascii_uppercase)
# Characters of question, options and answer whose evidence is weighed: the LLM reads them once for each kept patch.
MOST_WEIGHED = 1000
TOO_LONG = f"With more than {MOST_WEIGHED:,} characters in question, options and answer, its evidence is not weighed."
MOST_SAID, MOST_TURNS = 8000, 200  # characters and turns of a chat, earlier ones and all
MOST_SLIDES = 12  # of a case
MOST_TOLD = 64 << 10  # bytes of what the viewer tells at a time


def check_question(question: str, options: Sequence[str] = (), answer: str = "") -> None:
    """Raise ValueError for a question, options or an answer that are none or longer than people write."""
    if not all(isinstance(text, str) for text in (question, answer, *options)):
        raise ValueError("The question, its options and the answer must be texts.")
    if any(is_broken(text) for text in (question, answer, *options)):
        raise ValueError("The text holds half a character (a lone surrogate); write it again.")
    if len(options) > MOST_OPTIONS:
        raise ValueError(f"A question has at most {MOST_OPTIONS} options, got {len(options)}; leave some out.")
    if options and len({option.strip().casefold() for option in options if option.strip()}) < 2:
        raise ValueError("Give at least two different options, one a line, or none.")
    sizes = {"question": len(question), "answer": len(answer), "options": sum(map(len, options))}
    for what, size in sizes.items():
        most = MOST_ANSWERED if what == "answer" else MOST_CHARS
        if size > most:
            verb = "have together" if what == "options" else "has"
            raise ValueError(f"The {what} {verb} {size:,} characters, more than the {most:,} allowed; shorten.")


def check_slides(count: int) -> None:
    """Raise ValueError for a case of more slides than are read together."""
    if count > MOST_SLIDES:
        raise ValueError(f"A case has at most {MOST_SLIDES} slides, and this would be {count}; leave some out.")


def is_broken(text: str) -> bool:
    """Whether a text holds what no file can: half of a character."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def check_turns(turns: Sequence[Mapping[str, str]], options: Sequence[str] = ()) -> None:
    """Raise ValueError for a chat that is longer than a model reads: it comes back from the browser."""
    check_question(turns[-1]["content"], options)
    if len(turns) > MOST_TURNS:
        raise ValueError(f"The chat has {len(turns):,} turns, more than the {MOST_TURNS} that are read; clear it.")
    if (size := sum(len(turn["content"]) for turn in turns)) > MOST_SAID:
        raise ValueError(f"The chat has {size:,} characters, more than the {MOST_SAID:,} that are read; clear it.")


def read_told(told: Any, key: str) -> list:
    """A list that the viewer tells. Raises ValueError for what no viewer tells, and for more than it does at a time."""
    try:
        size = len(json.dumps(told, default=str))
    except RecursionError:
        raise ValueError(f"The viewer tells lists of {key}, not lists of lists of lists; this was not taken.") from None
    if size > MOST_TOLD:
        raise ValueError(f"The viewer tells {MOST_TOLD >> 10} kB at most at a time; this was not taken.")
    if not isinstance(told, dict) or not isinstance(told.get(key), list):
        raise ValueError(f"The viewer tells a list of {key}; something else came.")
    return told[key]
