"""What is said of a phantom, whose content is known; and the questions that a reader is offered to start with."""

from collections import Counter
from pathlib import Path

from sparsewsi import phantom
from sparsewsi.bags.bag import Bag
from sparsewsi.model.selection import Selection

# Text and options, in the wording that the demonstration model was trained on. Which tissue makes up most of a slide is
# left out: 32 chosen patches do not tell.
QUESTIONS = (
    ("Describe this slide.", ()),
    (f"Does this slide contain {phantom.WORDS['carcinoma']}?", ("Yes", "No")),
)
PRESENT_QUESTION = "Which of these tissues is present in this slide?"


def find_truth(path: str | Path) -> phantom.GroundTruth | None:
    """What the generator planted, for a phantom; None for a real slide."""
    return phantom.load_truth(path) if phantom.truth_path(path).is_file() else None


def name_kind(kind: str) -> str:
    """A kind of tissue as people write it."""
    return phantom.WORDS.get(kind, "glass" if kind == "background" else kind.replace("_", " "))


def describe_truth(truth: phantom.GroundTruth | None, bag: Bag, selection: Selection) -> str:
    """The ground truth in a few lines of Markdown, and what the selected patches show of it; "" where there is none."""
    if truth is None:
        return ""
    foci = Counter(needle.kind for needle in truth.needles)
    found = Counter(truth.label_at(bag.coords[selection.indices].numpy(), bag.patch_size).tolist())
    hidden = ", ".join(f"{name_kind(kind)} ({count})" for kind, count in sorted(foci.items()))
    shown = ", ".join(f"{count} {name_kind(kind)}" for kind, count in found.most_common())
    return "\n".join(
        [
            f"- Most of the tissue: **{name_kind(truth.dominant)}**",
            f"- Hidden foci: **{hidden}**",
            f"- The {len(selection.indices)} selected patches: {shown}",
        ]
    )


def choose_questions(truth: phantom.GroundTruth | None) -> list[tuple[str, tuple[str, ...]]]:
    """Questions to start with; of a phantom also which of four tissues it holds."""
    if truth is None or not truth.present:
        return list(QUESTIONS)
    absent = [kind for kind in phantom.NEEDLES if kind not in truth.present][:3]
    return [*QUESTIONS, (PRESENT_QUESTION, tuple(sorted(name_kind(kind) for kind in (truth.present[0], *absent))))]
