"""What a written answer chose among the options; the right answer is never looked at."""

import re
from collections.abc import Iterable, Sequence
from string import ascii_uppercase

from train.data.questions import same_text


def strict_choice(text: str, options: Sequence[str]) -> str | None:
    """The option a text states and nothing else: its letter, its whole text, or both; else None."""
    plain, found = same_text(text), set()
    for letter, option in zip(ascii_uppercase, options):
        if option.strip():
            letters = (letter, f"{letter}.", f"{letter})", f"({letter})", f"{letter}:")
            if text.strip() in letters or plain in (same_text(option), *(same_text(f"{m} {option}") for m in letters)):
                found.add(option)
    return found.pop() if len(found) == 1 else None


# A number with what changes its meaning (<50 %, 3+, 2.5), or a word with a sign behind it (HER2-, but not well-known).
_WORD = re.compile(r"(?:[<>≤≥]=?\s*)?\d+(?:\.\d+)*(?:\s*%|[+-]+(?!\w))?|\w+(?:[+-]+(?!\w))?")
# A letter on its own; "A" and "I" not where they are words ("the answer is A biopsy", but "option A is right").
_LETTER = r"(?:[B-HJ-Z](?![\w'’-])|[AI](?![\w'’-])(?!\s+(?!is\b|was\b|because\b)[a-z]))"
_ALONE = r"(?:[A-Za-z](?=\s*(?:[.):,;]|$)))"  # a letter of either case with nothing but punctuation behind it
_ANNOUNCED = re.compile(
    rf"(?i:\b(?:answer|option|choice)(?:\s+is)?|\bit(?:['’]s|\s+is))\s*[:\s]\s*\(?({_LETTER}|{_ALONE})"
)
_OPENING = re.compile(r"\s*\(?([A-Z])\)?\s*(?:[.):,;]|$|(?=is\b))")  # not the article in "A biopsy shows ..."
_LISTED = re.compile(r"(?:^|\n|,|\band\b|\bor\b)\s*\(?([A-Z])(?=[.):,;]|\s*(?:$|\n|and\b|or\b))")
_NEGATIONS = (" not", " no", " without")


def lenient_choice(text: str, options: Sequence[str]) -> str | None:
    """The option a text can be read to mean, or None where it means none or more than one.

    In this order: what strict_choice reads; the only letter that is all of the text, follows "answer", "option",
    "choice" or "it is", or opens the text set off by punctuation, unless the text of another option occurs as well; the
    only option whose text occurs and is not negated (an option inside another's text counts only by itself).
    """
    found = strict_choice(text, options)
    if found is not None:
        return found
    plain = re.sub(r"\\boxed\s*\{([^}]*)\}", r"\1", text)
    plain = re.sub(r"[*`\"“”\[\]]", "", plain).strip()
    letters = _letters(plain)
    contained = _contained(plain, options)
    if len(letters) > 1:
        return None
    for letter in letters:
        number = ascii_uppercase.index(letter)
        if number < len(options) and options[number].strip():
            return options[number] if contained <= {options[number]} else None
    return contained.pop() if len(contained) == 1 else None


def _letters(text: str) -> set[str]:
    """The letters that a text names as its answer, upper case."""
    if re.fullmatch(r"\(?[A-Za-z]\)?[.:]?", text):
        return {text.strip("().:").upper()}
    found = {letter.upper() for letter in _ANNOUNCED.findall(text)}
    opening, listed = _OPENING.match(text), set(_LISTED.findall(text))
    if opening:
        found |= {opening[1], *listed}
    return found | listed if len(listed) > 1 else found


def _contained(text: str, options: Sequence[str]) -> set[str]:
    """The options whose words occur in a text, unless two have the same words or the word before says "not"."""
    rest, found = _words(text), set()
    words = {option: _words(option) for option in options if option.strip()}
    for option in sorted(words, key=len, reverse=True):  # the longer first, so that it hides those inside it
        if words[option].strip() and words[option] in rest and list(words.values()).count(words[option]) == 1:
            if not any(negation + words[option] in rest for negation in _NEGATIONS):
                found.add(option)
            rest = rest.replace(words[option], " | ")
    return found


def _words(text: str) -> str:
    """The words of a text, with a space around each."""
    words = ("".join(word.split()) for word in _WORD.findall(text.casefold()))
    return f" {' '.join(words)} "


READINGS = {"strict": strict_choice, "lenient": lenient_choice}


def add_readings(records: list[dict], rows: Iterable[str]) -> list[str]:
    """Read what each row wrote, add the readings to the records, and return the names of the rows that this gives."""
    added = []
    for row in rows:
        written = [record for record in records if f"{row} text" in record]
        for reading, choice in READINGS.items():
            for record in written:
                record[f"{row}, {reading}"] = choice(record[f"{row} text"], record["options"])
            if written:
                added.append(f"{row}, {reading}")
    return added
