"""What a model was validated on, and how far its answers can be believed: limits.json of an artefact.

A kind of question is known by the words in it. Nothing here loads a model.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsewsi.files import write_json

FILE = "limits.json"
WHETHER = re.compile(  # what Yes or No answers: a verb first, "whether", or no more than two words
    r"(^|[,:;.] *)(is|are|was|were|do|does|did|has|have|can|could|any|evidence|signs?)\b|\bwhether\b|"
    r"^\W*\w+\W*(\w+\W*)?$"
)
UNVALIDATED = "Answers to this kind of question were not validated: take this one as no more than a guess."
SITE = re.compile(  # where a slide is from, which is no question: "cancer in this lymph node", not "in the nodes"
    r"\b((in|of|from|on|within) )?((this|the|an?) ((lymph|sentinel|axillary) )*node|these ((lymph|axillary) )*nodes)\b|"
    r"\b(in|of|from|on|within) (this|the|an?|these) (adrenal|appendix|artery|biopsy|"
    r"bladder|bone( marrow)?|bowel|brain|breast|cervix|colon|kidney|larynx|liver|lungs?|muscle|organ|ovary|pancreas|"
    r"parathyroid|patient|placenta|prostate|rectum|salivary gland|section|skin|slide|specimen|spleen|stomach|testis|"
    r"thymus|thyroid|tissue|tonsil|uterus)\b",
    re.IGNORECASE,
)
BEYOND = re.compile(  # asked of a tumour, and another question than whether there is one, unless a kind names it
    r"\b(grad(e|ed|es|ing)|gleason|nottingham|stag(e|ed|es|ing)|(sub)?types?|margins?|nodes?|inva[ds]\w*|metasta\w*|"
    r"mitos[ei]s|mitotic|how (many|much|large|big|deep)|ki-?67|her2|prognosis|survival|treatment|therapy|"
    r"free of|rule out|exclude)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Limit:
    """How a model did on questions of one kind about slides that it had not seen.

    words: regular expressions, one of which a question of this kind matches
    right, low, high: share of right answers and its 95 % interval, over the cases asked
    least: probability of the likeliest option below which the answer counts as not sure; 1: it always does
    right_when_sure, sure: share of right answers among the others, and share of these
    found: share of the slides with Yes to which it said Yes; None where Yes is no answer
    """

    kind: str
    words: tuple[str, ...]
    slides: int
    cases: int
    right: float
    low: float
    high: float
    least: float = 0.0
    right_when_sure: float = 0.0
    sure: float = 1.0
    found: float | None = None


def is_unsure(limit: Limit, probs: Sequence[float]) -> bool:
    """Whether an answer of this kind counts as not sure; one in words, which has no probs, where most of them would."""
    return max(probs) < limit.least if probs else limit.right < 0.5 or limit.sure < 0.5


def _tells(limit: Limit, text: str, options: Sequence[str]) -> bool:
    """Whether what was validated of a kind tells anything of a question that holds its words."""
    if asks_beyond(text) and not BEYOND.search(" ".join([limit.kind, *limit.words])):
        return False
    yes_no = not options or {option.lower() for option in options} == {"yes", "no"}
    return limit.found is None or (yes_no and WHETHER.search(SITE.sub("", text)) is not None)


def asks_beyond(question: str) -> bool:
    """Whether something is asked of a tumour that is another question than whether there is one."""
    return BEYOND.search(SITE.sub(" ", question)) is not None


@dataclass(frozen=True)
class Limits:
    """The kinds of question a model was validated on, and the words it has for patches.

    vocabulary: words for tissue. alike: cosine to the nearest word below which a patch has none.
    """

    kinds: tuple[Limit, ...] = ()
    vocabulary: tuple[str, ...] = ()
    alike: float = 0.0

    def find(self, question: str, options: Sequence[str] = ()) -> Limit | None:
        """The kind of a question, None where it is of no validated one.

        Of a kind that was validated with Yes and No are only questions that these answer: "What grade is the tumour?"
        is not of the kind of "Is there a tumour?".
        """
        text = question.lower().strip()
        kinds = [limit for limit in self.kinds if any(re.search(word, text) for word in limit.words)]
        return next((limit for limit in kinds if _tells(limit, text, options)), None)

    def judge(self, question: str, probs: Sequence[float] = (), options: Sequence[str] = ()) -> str:
        """A sentence that belongs beside an answer: not sure, how often such answers were right, or not validated.

        probs: of the options, where there are any.
        """
        if not self.kinds:
            return ""
        found = self.find(question, options)
        if found is None:
            return UNVALIDATED
        asked = f"{found.slides} slides of {found.cases} cases that the model had not seen"
        if found.found is not None:
            asked += f"; where Yes was right it said Yes in {found.found:.0%}"
        if is_unsure(found, probs):
            why = f"no option has {found.least:.0%} or more" if probs else "few answers of this kind are sure enough"
            if found.least >= 1:
                why = "likely answers of this kind were wrong as often as unlikely ones"
            return (
                f"Not sure: {why}. Of all answers of this kind {found.right:.0%} "
                f"were right, by case ({found.low:.0%} to {found.high:.0%}, {asked})."
            )
        if probs and found.least:
            return (
                f"An option has {found.least:.0%} or more, as in {found.sure:.0%} of such questions: of these answers "
                f"{found.right_when_sure:.0%} were right, by case, on {asked}."
            )
        return f"Of such answers {found.right:.0%} were right, by case, on {asked}."

    def save(self, folder: str | Path) -> None:
        """Write FILE into a model's folder."""
        write_json(Path(folder) / FILE, dataclasses.asdict(self), indent=2)


def load(folder: str | Path) -> Limits:
    """The limits in a model's folder, empty where there are none. Raises ValueError for a broken file."""
    path = Path(folder) / FILE
    if not path.is_file():
        return Limits()
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        kinds = tuple(Limit(**kind | {"words": tuple(kind["words"])}) for kind in told["kinds"])
        for limit in kinds:
            for word in limit.words:
                re.compile(word)
        return Limits(kinds, tuple(told["vocabulary"]), float(told["alike"]))
    except (ValueError, TypeError, KeyError, re.error) as error:
        raise ValueError(f"{path} is damaged ({error}). Copy or download it again.") from error
