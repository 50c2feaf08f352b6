"""Answers about one selection that cannot all be right. Nothing here loads a model.

An answer says of each of three things whether it is there: carcinoma, which is malignant, which is a neoplasm.
"""

import re
import textwrap
from collections.abc import Sequence

from sparsewsi.model.limits import WHETHER, asks_beyond
from sparsewsi.report.answer import Answer

LADDER = ("carcinoma", "malignant", "neoplasm")  # who says yes to one says yes to those after it
NAMED = {  # in what order a word is looked for: "malignant tumour" is no mere tumour
    "carcinoma": r"carcinom",
    "malignant": r"malignan|\bcancer|sarcoma|lymphoma|melanoma|blastoma|glioma|myeloma|leuka?emia|mesothelioma",
    "neoplasm": r"(?<!non-)(?<!non)neoplas|\btumou?r|adenoma|papilloma|na?evus|lipoma|myoma|fibroma",
}
PLAIN = re.compile(  # a No to these denies them; one to "squamous cell carcinoma" leaves the other carcinomas
    r"(^|\b(an?|any|there|contains?|shows?|have|has|holds?|of|for|this|the|is|it) )(carcinom|cancer|neoplas|tumou?r)|"
    r"malignan(?!t (\w*oma|\w*emia)\b)"
)
BENIGN = r"\bbenign\b|adenoma|papilloma|na?evus|lipoma|leiomyoma|fibroma"
UNCLEAR = r"\bbenign\b.*\bmalignan|\bmalignan.*\bbenign\b|\bno\b|\bwithout\b|(?<!or )\bnot\b"  # what Yes would mean
CLEAR = r"non-?neoplastic|\bnormal\b|\bhealthy\b"
OTHER = r"\binflamm|\binfection"  # of a category: it is that, and no tumour; in a description it may lie beside one
DENIED = r"\b(no|not|without|free of|negative for|absence of|lacks?|rather than)\b[^.;,]*"
LONGEST = 70  # characters of a question or an answer that are told


def find_claims(answer: Answer) -> dict[str, bool]:
    """Which of LADDER an answer says is there, and which is not; of others it says nothing."""
    said = answer.text.strip().lower()
    word = re.match(r"(yes|no)\b", said)
    told = _read_word(answer.question.lower().strip(), word[0] == "yes") if word else {}
    return told or _read(said, bool(answer.options))


def contradict(one: Answer, other: Answer) -> bool:
    """Whether two answers about the same patches cannot both be right."""
    mine, theirs = find_claims(one), find_claims(other)
    return any(theirs.get(name, there) != there for name, there in mine.items())


def word_contradictions(answers: Sequence[Answer]) -> str:
    """A sentence that names all answers about the case's own patches that contradict another; "" if none does."""
    own = [answer for answer in answers if answer.text and not answer.beside and not answer.refused]
    found = [one for one in own if any(contradict(one, other) for other in own)]
    named = dict.fromkeys(f'"{_shorten(one.heading)}" {_shorten(one.text.strip().rstrip("."))}' for one in found)
    if not named:
        return ""
    return f"These answers contradict each other, so not all of them can be right: {'; '.join(named)}."


def word_against(answer: Answer, earlier: Sequence[Answer]) -> str:
    """The same of one answer and those before it that it contradicts."""
    return word_contradictions([*(one for one in earlier if not answer.beside and contradict(one, answer)), answer])


def _read_word(question: str, yes: bool) -> dict[str, bool]:
    """What Yes or No to a question claims; nothing where they do not answer it."""
    if asks_beyond(question) or not WHETHER.search(question) or re.search(UNCLEAR, question):
        return {}
    if re.search(r"\bbenign\b", question):
        return _climb("malignant", False) if yes else {}
    named = _name(question)
    if named is not None:
        return _climb(named, yes) if yes or PLAIN.search(question) else {}
    return _climb("neoplasm", False) if yes and re.search(CLEAR, question) else {}


def _read(said: str, chosen: bool) -> dict[str, bool]:
    """What words claim: the gravest tumour that they name and do not deny. chosen: they are one of several options"""
    affirmed = re.sub(DENIED, " ", said)
    named = _name(affirmed)
    if named is not None:
        benign = named == "neoplasm" and re.search(BENIGN, affirmed)
        return _climb(named, True) | (_climb("malignant", False) if benign else {})
    denied = next((name for name in reversed(LADDER) if re.search(NAMED[name], said)), None)
    if denied is not None:
        return _climb(denied, False)
    return _climb("neoplasm", False) if re.search(f"{CLEAR}|{OTHER}" if chosen else CLEAR, said) else {}


def _name(text: str) -> str | None:
    """The first of LADDER that a text names."""
    return next((name for name in LADDER if re.search(NAMED[name], text)), None)


def _climb(name: str, there: bool) -> dict[str, bool]:
    """What follows: a carcinoma is malignant; where nothing is malignant there is no carcinoma."""
    at = LADDER.index(name)
    return dict.fromkeys(LADDER[at:] if there else LADDER[: at + 1], there)


def _shorten(text: str) -> str:
    return textwrap.shorten(text, LONGEST, placeholder=" …")
