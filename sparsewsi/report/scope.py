"""What a model can be asked: the kinds of question it was validated on, in words that a reader can tap, and what it
says where it is not sure. Nothing here loads a model; sparsewsi/model/limits.py has the numbers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparsewsi.model.limits import Limits, asks_beyond, is_unsure
from sparsewsi.report.answer import Answer, FocusEffect

YES_NO = ("Yes", "No")
UNDECIDED = "the slide does not decide it"
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
CANCER = re.compile(
    r"carcino|cancer|malignan|sarcom|lymphom|melanom|metasta|leuk(a?)emi|myelom|blastom|gliom|seminom|"
    r"mesotheliom|invasive",
    re.IGNORECASE,
)
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
            told = f"right in {limit.right:.0%} by case ({limit.low:.0%} to {limit.high:.0%})"
            found.append(Suggestion(text, options, told))
    return found


def offer_options(limits: Limits, question: str) -> tuple[str, ...]:
    """The options that belong to a question which was asked without any: Yes and No, if its kind was validated so."""
    found = limits.find(question)
    return WORDINGS.get(found.kind, ("", ()))[1] if found is not None and found.found is not None else ()


def within(limits: Limits, question: str, options: Sequence[str] = ()) -> bool:
    """Whether a question is one that the model was trained for: of a validated kind, a description, or about its words.

    A model that states no limits sets no scope.
    """
    if not limits.kinds or limits.find(question) is not None:
        return True
    if asks_beyond(question):
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


def word_answer(answer: Answer, limits: Limits, ranks: Sequence[int] = (), begun: bool = False) -> str:
    """The first line of an answer: whatever speaks against it first, then the answer, or the two likeliest options; of
    yes and no the likelier, as both tell nothing. Unsure or a guess, and not decided by the slide, is no answer.

    What speaks against it: the model was not often right when so unsure, or on such questions at all; the answer does
    not rest on the slide; or what it rests on is not known (yet). Of another reader nobody knows how often it is right.
    ranks: Selection.ranks, by which an answer to "where is ...?" names a patch
    begun: more of it is to come, so that nobody knows what it will name
    """
    if not answer.text:
        return ""
    unsure, guess = _doubt(answer, limits)
    if (unsure or guess) and answer.rests == "not":
        return f"No answer: {'not sure' if unsure else 'a guess'}, and {UNDECIDED}"
    if answer.asked:
        return _word_place(answer, unsure, guess, ranks)
    doubts = [*(["not sure"] if unsure else []), *_word_rest(answer, unsure)]
    warned = "a guess, no finding" if begun or CANCER.search(answer.text) else "a guess"
    if not doubts:
        return f"{_begin(warned)}: {answer.text}" if guess else answer.text
    head = _begin(", and ".join(doubts))
    if unsure and len(answer.probs) > 1 and set(answer.options) != set(YES_NO):
        return f"{head}: {' or '.join(option for _, option in _likeliest(answer))}"
    return f"{head}; {warned if guess else 'perhaps'}: {answer.text}"


def word_tendency(answer: Answer, limits: Limits) -> str:
    """What stands in smaller print under a first line that gives no answer: what the model tends to; else ""."""
    if not answer.text or not any(_doubt(answer, limits)) or answer.rests != "not":
        return ""
    if not answer.probs:
        finding = ", which is no finding" if CANCER.search(answer.text) else ""
        return f"What the model wrote{finding}: {answer.text}"
    best = _likeliest(answer)[: 1 if set(answer.options) == set(YES_NO) else 2]
    return f"Likelier: {', '.join(f'{option} ({prob:.0%})' for prob, option in best)}"


def is_guess(answer: Answer, limits: Limits) -> bool:
    """Whether nobody knows how often such answers are right: their first line is not to stand out."""
    return answer.unvalidated or _doubt(answer, limits)[1]


def _doubt(answer: Answer, limits: Limits) -> tuple[bool, bool]:
    """Whether the model is not sure, and whether the question is of no validated kind."""
    if answer.reader or not limits.kinds:
        return False, False
    found = limits.find(answer.question, answer.options)
    return found is not None and is_unsure(found, answer.probs), found is None


def _likeliest(answer: Answer) -> list[tuple[float, str]]:
    """The two likeliest options, each after its probability."""
    return sorted(zip(answer.probs, answer.options), key=lambda pair: -pair[0])[:2]


def find_place(answer: Answer, ranks: Sequence[int]) -> FocusEffect | int | None:
    """What an answer to "where is ...?" points at: a focus or the number of a patch, whichever it rests on more.

    None where it is no Yes, does not rest on the slide, or was not weighed; 0 for a patch whose number is not told.
    """
    if not answer.effects or answer.probs[0] <= 0.5 or answer.rests == "not":
        return None
    focus = max(answer.foci, key=lambda one: one.effect, default=None)
    best = max(range(len(answer.effects)), key=lambda place: answer.effects[place])
    if focus is not None and focus.effect >= answer.effects[best]:
        return focus
    return ranks[best] if ranks else 0


def _word_place(answer: Answer, unsure: bool, guess: bool, ranks: Sequence[int]) -> str:
    target, yes = find_target(answer.asked), answer.probs[0]
    if yes <= 0.5:
        told = f"the model does not find {target} (Yes: {yes:.0%})"
        if doubts := [*(["not sure"] if unsure else []), *_word_rest(answer, unsure)]:
            return f"{_begin(', and '.join(doubts))}; {told}"
        return _begin(told)
    place = find_place(answer, ranks)
    if place is None:
        why = _begin(UNDECIDED) if answer.rests == "not" else "Not weighed"
        return f"{why} (Yes: {yes:.0%}), so nothing is pointed at"
    named = f"focus {place.name}" if isinstance(place, FocusEffect) else f"#{place}" if place else "one patch"
    if unsure:
        return f"Not sure (Yes: {yes:.0%}), if anywhere: {named}"
    return f"A guess, no finding (Yes: {yes:.0%}): {named}" if guess else f"Here: {named}"


def _begin(text: str) -> str:
    """A sentence's beginning."""
    return text[:1].upper() + text[1:]


def _word_rest(answer: Answer, doubted: bool = False) -> list[str]:
    """What is to be said first of what the answer rests on. doubted: something is said already"""
    if answer.rests == "not":
        return [UNDECIDED]
    return ["not weighed"] if answer.unweighed and not doubted else []
