"""Kinds of tissue, the words for them, and the questions that can be asked of a slide whose content is known.

One vocabulary for real tiles and phantoms. A kind is a needle (planted as a focus and asked about) or background.
"""

from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from sparsewsi import phantom
from train.data.example import Question

WORDS = phantom.WORDS | {
    "gastric_mucosa": "gastric mucosa",
    "pancreas_acinar": "pancreas",
    "small_bowel_mucosa": "small bowel mucosa",
    "liver_parenchyma": "liver",
}
# Needle kinds live on two sources or more, so that a slide's stain never answers a question.
NEEDLES = {
    "real": (
        "carcinoma",
        "lymphoid",
        "mucin",
        "blood",
        "gastric_mucosa",
        "pancreas_acinar",
        "small_bowel_mucosa",
        "liver_parenchyma",
    ),
    "phantom": phantom.NEEDLES,
}
NEEDLE_KINDS = sorted({kind for kinds in NEEDLES.values() for kind in kinds})
# Real colon mucosa is neither: among the kinds asked for it has look-alikes, as background it would hide them.
BACKGROUNDS = {
    "real": ("stroma_fibrous", "smooth_muscle", "adipose"),
    "phantom": phantom.BACKGROUNDS,
}
FAMILIES = ("present", "absent", "dominant", "contains", "diagnosis")


@dataclass(frozen=True)
class Facts:
    """What is true of a mosaic or a phantom: enough to ask and to answer every question family."""

    origin: str  # key of NEEDLES
    dominant: str
    present: tuple[str, ...]  # needle kinds


@dataclass(frozen=True)
class Vocabulary:
    """The kinds of a folder of classes and the words for them."""

    origin: str
    needles: dict[str, str]  # kind -> word
    backgrounds: dict[str, str]

    def register(self) -> None:
        """Make the origin known to everything that plans and asks. Raises ValueError if it means something else."""
        for known, kinds in ((NEEDLES, tuple(self.needles)), (BACKGROUNDS, tuple(self.backgrounds))):
            if known.setdefault(self.origin, kinds) != kinds:
                raise ValueError(
                    f"two sets of classes are called {self.origin!r} but differ: {', '.join(known[self.origin])} and "
                    f"{', '.join(kinds)}. Rename one folder and write its bank again."
                )
        WORDS.update({kind: word for kind, word in (self.needles | self.backgrounds).items() if kind not in WORDS})
        NEEDLE_KINDS.extend(kind for kind in self.needles if kind not in NEEDLE_KINDS)


# ---- questions


def list_families(origin: str) -> tuple[str, ...]:
    """The families of questions that an origin's kinds allow: diagnosis asks for carcinoma."""
    return tuple(family for family in FAMILIES if family != "diagnosis" or "carcinoma" in NEEDLES[origin])


def _list_words(kinds: list[str]) -> str:
    names = sorted(WORDS[kind] for kind in kinds)
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def write_caption(facts: Facts) -> Question:
    """The stage-1 pair: a request to describe the slide and its description.

    It names the foci alone: K patches do not tell which background tissue most of the other N - K are.
    """
    foci = f"Foci of {_list_words(list(facts.present))}." if facts.present else "No foci."
    return Question("Describe this slide.", foci, (), "caption")


def ask(facts: Facts, family: str, rng: np.random.Generator) -> Question | None:
    """One question of a family about the facts, or None where the family does not apply.

    Options are drawn and shuffled so that no option is likelier than another without the slide: the answer is uniform
    over what is true, the distractors uniform over what is false, and plan_facts balances yes and no.
    """
    absent = [kind for kind in NEEDLES[facts.origin] if kind not in facts.present]
    if family == "present" and facts.present:
        answer = str(rng.choice(facts.present))
        options = [answer, *rng.choice(absent, 3, replace=False)] if len(absent) >= 3 else [answer, *absent]
        text = "Which of these tissues is present in this slide?"
    elif family == "absent" and len(facts.present) >= 2 and absent:
        answer = str(rng.choice(absent))
        options = [answer, *rng.permutation(facts.present)[:3]]
        text = "Which of these tissues is absent from this slide?"
    elif family == "dominant":
        answer, options = facts.dominant, list(BACKGROUNDS[facts.origin])
        text = "Which tissue makes up most of this slide?"
    elif family in ("contains", "diagnosis"):
        pool = facts.present if rng.integers(2) else absent
        kind = "carcinoma" if family == "diagnosis" else str(rng.choice(pool)) if pool else None
        if kind is None:
            return None
        yes = kind in facts.present
        return Question(f"Does this slide contain {WORDS[kind]}?", "Yes" if yes else "No", ("Yes", "No"), family)
    else:
        return None
    shuffled = tuple(WORDS[str(kind)] for kind in rng.permutation(options))
    return Question(text, WORDS[answer], shuffled, family)


def plan_facts(origin: str, family: str, rng: np.random.Generator, held: Container[str] | None = None) -> Facts:
    """Facts of a slide about which a question of this family can be asked, every answer equally likely.

    held: the kinds that there are patches of; None: all. Raises ValueError for fewer than 3 needles among them.
    """
    needles = [kind for kind in NEEDLES[origin] if held is None or kind in held]
    if len(needles) < 3:
        raise ValueError(f"of {', '.join(NEEDLES[origin])} there are patches of {len(needles)} kinds; 3 are needed.")
    count = int(rng.integers(2, 4)) if family == "absent" else int(rng.integers(1, 4))
    if family == "diagnosis":  # carcinoma in half of them, whatever else is there
        others = [kind for kind in needles if kind != "carcinoma"]
        yes = bool(rng.integers(2))
        present = ["carcinoma"] if yes else []
        present += list(rng.choice(others, min(count - yes, len(others)), replace=False))
    else:
        present = list(rng.choice(needles, count, replace=False))
    return Facts(origin, str(rng.choice(BACKGROUNDS[origin])), tuple(sorted(str(kind) for kind in present)))
