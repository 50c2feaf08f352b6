"""What is said of a phantom, whose content is known; and the questions that a reader is offered to start with."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sparsewsi import phantom
from sparsewsi.bags.bag import Bag, list_parts, number_slides, own_coords
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


def describe_truths(truths: Sequence[phantom.GroundTruth | None], bag: Bag, selection: Selection) -> str:
    """The ground truths of a bag's slides in a few lines of Markdown, and what the selected patches show of them.

    None and "" of a real slide, whose truth nobody knows.
    """
    told = [describe_truth(truth, bag, selection, number) for number, truth in enumerate(truths) if truth is not None]
    return "\n\n".join(told)


def describe_truth(truth: phantom.GroundTruth, bag: Bag, selection: Selection, number: int = 0) -> str:
    """The ground truth of a slide, of several the one of that number, and what its selected patches show of it."""
    kept = selection.indices[number_slides(bag)[selection.indices] == number]
    foci = Counter(needle.kind for needle in truth.needles)
    labels = truth.label_at(own_coords(bag)[kept].numpy(), list_parts(bag)[number].patch_size)
    found = Counter(labels.tolist())
    hidden = ", ".join(f"{name_kind(kind)} ({count})" for kind, count in sorted(foci.items()))
    shown = ", ".join(f"{count} {name_kind(kind)}" for kind, count in found.most_common())
    head = [f"**Slide {number + 1}**", ""] if bag.parts else []
    return "\n".join(
        [
            *head,
            f"- Most of the tissue: **{name_kind(truth.dominant)}**",
            f"- Hidden foci: **{hidden}**",
            f"- The model's own {len(kept)} patches: {shown or 'none'}",
        ]
    )


def choose_questions(truths: Sequence[phantom.GroundTruth | None]) -> list[tuple[str, tuple[str, ...]]]:
    """Questions to start with; of a case of phantoms also which of four tissues it holds: one of them."""
    present = [kind for truth in truths if truth is not None for kind in truth.present]
    if not present or None in truths:
        return list(QUESTIONS)
    absent = [kind for kind in phantom.NEEDLES if kind not in present][:3]
    if not absent:
        return list(QUESTIONS)
    return [*QUESTIONS, (PRESENT_QUESTION, tuple(sorted(name_kind(kind) for kind in (present[0], *absent))))]
