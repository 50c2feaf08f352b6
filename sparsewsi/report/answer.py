"""An answer, and what is said wherever one is shown. Nothing here loads a model or writes a file."""

from dataclasses import dataclass
from pathlib import Path

from sparsewsi.bags.bag import Bag, Part, list_parts
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.evidence import WORTH, grade, tell_effect
from sparsewsi.model.limits import UNVALIDATED
from sparsewsi.model.selection import Selection

NOT_VALIDATED = "This reader was not validated here: how often it is right on such questions is unknown."
OTHER_QUESTION = "whether it is right is another question"  # beside every word on what an answer depends on


@dataclass(frozen=True)
class FocusEffect:
    """What an answer loses without a whole focus, in nats. ranks: the numbers of its patches, best first."""

    name: str
    ranks: tuple[int, ...]
    effect: float


@dataclass(frozen=True)
class Answer:
    """A question that was put and what came back.

    options:  empty for an open question
    probs:    one per option, sums to 1
    effects:  Evidence.effects, one per selection.indices; empty where no evidence was asked for
    evidence: Evidence.sentence, what the effects mean: measured
    limit:    Limits.judge, how far such answers can be believed
    reader:   who read the patches as pictures, "" for the model's own LLM, which reads them as tokens
    sent:     what left this program for it and where to, "" for nothing
    without_all: what it loses without all kept patches, in nats; None where that was not measured
    foci:     the same for each focus (model/foci.py)
    slides:   the same for each slide of a case of several, named by its number from 1
    impression: what the reader wrote before the answer was shown
    cited:    numbers of the patches that the reader says it rests on: its own words, not measured
    asked:    the reader's words where the model was asked something else: of "where is it?" whether there is any
    beside:   what the patches are called where they are others than the case's: of an answer that stood beside one of
              these in a comparison; effects, foci and cited are of those patches
    unweighed: why nobody knows what it rests on although that was wanted: it is being weighed, it was stopped ...
    refused:  why the question was not put to the model or, beside a text, why that is no whole answer; else ""
    """

    question: str
    text: str
    options: tuple[str, ...] = ()
    probs: tuple[float, ...] = ()
    effects: tuple[float, ...] = ()
    evidence: str = ""
    limit: str = ""
    reader: str = ""
    sent: str = ""
    cited: tuple[int, ...] = ()
    without_all: float | None = None
    foci: tuple[FocusEffect, ...] = ()
    impression: str = ""
    asked: str = ""
    beside: str = ""
    unweighed: str = ""
    slides: tuple[FocusEffect, ...] = ()
    refused: str = ""

    @property
    def rests(self) -> str:
        """How far the answer depends on the patches, right or wrong: "strongly", "partly", "not", or "" where that was
        not measured."""
        if self.without_all is None:
            return ""
        return grade([self.without_all, *self.effects, *(group.effect for group in (*self.foci, *self.slides))])

    @property
    def weighed(self) -> str:
        """What it loses without all patches, without the focus that weighs most and without each slide: the same
        figures wherever the answer is shown; "" where that was not measured."""
        if self.without_all is None:
            return ""
        told = f"Without all {len(self.effects)} patches it would be {tell_effect(self.without_all)}"
        best = max(self.foci, key=lambda focus: focus.effect, default=None)
        if best is not None and best.effect >= WORTH and self.rests != "not":
            told += f", without focus {best.name} {tell_effect(best.effect)}"
        for one in sorted(self.slides, key=lambda slide: -slide.effect):
            told += f", without slide {one.name} {tell_effect(one.effect)}"
        return f"{told}."

    @property
    def dependence(self) -> str:
        """Both of these, where no title can say what they mean."""
        return f"Depends on the patches: {self.rests} ({OTHER_QUESTION}). {self.weighed}" if self.rests else ""

    @property
    def unvalidated(self) -> bool:
        """Whether nobody knows how often such answers are right."""
        return self.limit in (UNVALIDATED, NOT_VALIDATED)

    @property
    def heading(self) -> str:
        """The question in the words of who asked it."""
        return self.asked or self.question

    @property
    def grounds(self) -> list[str]:
        """How sure the model is and what the answer rests on, in sentences; of each what is known."""
        order = sorted(zip(self.probs, self.options), key=lambda pair: -pair[0])
        sure = ", ".join(f"{option} {prob:.0%}" for prob, option in order)
        known = [sure and f"{sure}.", self.dependence or self.unweighed]
        known.insert(0 if self.unvalidated else len(known), self.limit)
        return [text for text in known if text]

    @property
    def citation(self) -> str:
        """Which patches the reader cites, marked as its own words; "" if none."""
        if not self.cited:
            return ""
        return f"Cited by the reader, not measured: {', '.join(f'#{rank}' for rank in self.cited)}."


def word_notice(config: SparseWSIConfig) -> str:
    """What stands wherever answers of this model are shown: the use it is for, and the model's own note."""
    use = f"{'Demo model, research' if config.demo else 'Research'} use only, not for diagnosis."
    return f"{use} {config.note}".strip()


def name_llm(config: SparseWSIConfig) -> str:
    """The base LLM as people are told: a hub id, or the last part of a folder's path."""
    return Path(config.llm).name if Path(config.llm).is_dir() else config.llm


_KNOWN_FROM = {
    "argument": "given by hand",
    "openslide": "stated in the file",
    "ome": "stated in the file's OME-XML",
    "tiff resolution": "from the TIFF's resolution tags",
    "objective power": "guessed from the magnification",
}


def word_scan(part: Part) -> str:
    """A slide's resolution and where it is known from."""
    if not part.slide_mpp:
        return "resolution unknown"
    return f"{part.slide_mpp:.4g} µm/px ({_KNOWN_FROM.get(str(part.mpp_source), part.mpp_source)})"


def summarise(bag: Bag, selection: Selection, config: SparseWSIConfig, model: str) -> str:
    """One line for people: model, encoder, K of N, share of the tissue, resolution and where it is known from."""
    kept, total = len(selection.indices), selection.num_patches
    at = f"{bag.mpp:.4g} µm/px" if bag.mpp else "an unknown resolution"
    scan = ", ".join(dict.fromkeys(f"scan {word_scan(part)}" for part in list_parts(bag)))
    return (
        f"{bag.slide} · model {model} ({name_llm(config)}) · encoder {bag.encoder} · {kept:,} of {total:,} patches "
        f"({100 * kept / max(total, 1):.2g} % of the tissue) read at {at} · {scan}"
    )
