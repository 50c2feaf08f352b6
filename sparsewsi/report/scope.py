"""What a model can be asked: the kinds of question it was validated on, in words that a reader can tap, and what it
says where it is not sure. Nothing here loads a model; sparsewsi/model/limits.py has the numbers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparsewsi.model.limits import BEYOND, Limit, Limits
from sparsewsi.report.answer import Answer

YES_NO = ("Yes", "No")
WORDINGS = {  # of the kinds that limits.json may name: one that training used
    "malignant": ("Is this slide malignant?", YES_NO),
    "carcinoma": ("Does this slide contain carcinoma?", YES_NO),
    "neoplasm": ("Is there a neoplasm in this slide?", YES_NO),
    "organ": ("Which organ is this slide from?", ()),
    "category": (
        "What kind of disease does this slide show?",
        (
            "inflammation or infection",
            "another non-neoplastic change",
            "benign tumour or precursor",
            "carcinoma",
            "another malignant tumour",
        ),
    ),
}
WHERE = re.compile(r"^\s*(where|show me|point (to|at)|find|locate)\b", re.IGNORECASE)
FREE = re.compile(r"\b(describe|description|caption|what (do you|can be) see)", re.IGNORECASE)
NO_MATTER = re.compile(
    r"\b(where|is|are|the|a|an|any|show|me|point|to|at|find|locate|there|in|this|slide|of)\b|[^\w\s]"
)


@dataclass(frozen=True)
class Suggestion:
    """A question that a reader can tap. told: how often such answers were right; "" where nobody measured it."""

    text: str
    options: tuple[str, ...]
    told: str = ""


def suggest(limits: Limits) -> list[Suggestion]:
    """A question of every kind that the model was validated on."""
    found = []
    for limit in limits.kinds:
        if limit.kind in WORDINGS:
            text, options = WORDINGS[limit.kind]
            told = f"right in {limit.right:.0%} ({limit.low:.0%} to {limit.high:.0%})"
            found.append(Suggestion(text, options, told))
    return found


def within(limits: Limits, question: str, options: Sequence[str] = ()) -> bool:
    """Whether a question is one that the model was trained for: of a validated kind, a description, or about its words.

    A model that states no limits sets no scope.
    """
    if not limits.kinds or limits.find(question) is not None:
        return True
    if BEYOND.search(question):
        return False
    if FREE.search(question):
        return True
    asked = " ".join([question, *options]).lower()
    return any(re.search(rf"\b{re.escape(word)}\b", asked) for word in limits.vocabulary)


def find_target(question: str) -> str:
    """What a "where is ...?" asks for, in lower case; "" for any other question."""
    if not WHERE.search(question) or re.search(r"\b(from|taken|come)\b", question.lower()):
        return ""
    return " ".join(NO_MATTER.sub(" ", question.lower()).split())


def put_as_presence(limits: Limits, target: str) -> Suggestion | None:
    """The question whose "Yes" is pointed at for a target; None for one that the model has no word for."""
    found = limits.find(f"Is there {target}?")
    if found is not None and WORDINGS.get(found.kind, ("", ()))[1] == YES_NO:
        return Suggestion(WORDINGS[found.kind][0], YES_NO)
    if any(word in target for word in limits.vocabulary):
        return Suggestion(f"Does this slide contain {target}?", YES_NO)
    return None


def word_answer(answer: Answer, limits: Limits) -> str:
    """The first line of an answer: the answer itself or, where the model was not often right when so unsure, the two
    likeliest options; of yes and no the likelier, as both tell nothing."""
    found = limits.find(answer.question, answer.options)
    if found is None or not answer.text:
        return answer.text
    if _unsure(answer, found):
        if len(answer.probs) > 1 and set(answer.options) != set(YES_NO):
            best = sorted(zip(answer.probs, answer.options), key=lambda pair: -pair[0])[:2]
            return f"Not sure: {best[0][1]} or {best[1][1]}"
        return f"Not sure; perhaps: {answer.text}"
    return answer.text


def _unsure(answer: Answer, found: Limit) -> bool:
    if answer.probs:
        return max(answer.probs) < found.least
    return (
        found.right < 0.5 or found.sure < 0.5
    )  # in words, without a probability: as good, as sure as such answers are
