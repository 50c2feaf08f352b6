"""One slide being read by somebody: its patches, what was selected, what to doubt, other selections, files about it.

N patches, K kept.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsewsi import phantom
from sparsewsi.bags.bag import Bag
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.selector import SELECTORS, hard_topk
from sparsewsi.model.sparse_wsi import Selection, SparseWSI
from sparsewsi.report import evidence, export, plots
from sparsewsi.slides.slide import open_slide


@dataclass(frozen=True, eq=False)
class Case:
    """What a session keeps of its slide.

    token:     name of the slide for the browser
    slide_mpp: um/px given by hand, else None
    selection: the model's own; a what-if makes others and keeps none
    """

    token: str
    path: str
    slide_mpp: float | None
    bag: Bag
    selection: Selection


def choose(
    model: SparseWSI, case: Case, k: int, selector: str, pinned: Sequence[int], dropped: Sequence[int]
) -> Selection:
    """Another selection of the same patches: pinned ones stay, dropped ones go, the selector fills up to k.

    Raises ValueError if nothing is left to answer from.
    """
    bag, scores, pinned = case.bag, case.selection.scores, sorted(set(pinned))
    free = torch.ones(len(scores), dtype=torch.bool)
    free[[*pinned, *dropped]] = False
    rest, room = free.nonzero()[:, 0], max(0, k - len(pinned))
    if not len(pinned) and not len(rest):
        raise ValueError("Every patch was dropped. Keep at least one.")
    taken = rest[:0]
    if room and len(rest) and selector == "learned":
        taken = rest[hard_topk(scores[rest], room)]
    elif room and len(rest):
        taken = rest[SELECTORS[selector](bag.features[rest], bag.coords[rest], room, 0)]
    indices = torch.cat([torch.tensor(pinned, dtype=torch.int64), taken]).sort().values
    return dataclasses.replace(case.selection, indices=indices, tokens=evidence.tokens_of(model, bag, indices))


def numbers(selection: Selection) -> np.ndarray:
    """(K,) int64: the number of each kept patch on the page, its rank by score among all N patches.

    For the model's own selection it is the rank in the files; of other selections it still names the same patch.
    """
    order = np.argsort(-selection.scores.double().numpy(), kind="stable")
    return np.argsort(order, kind="stable")[selection.indices.numpy()] + 1


def measure(
    model: SparseWSI,
    selection: Selection,
    turns: list[dict[str, str]],
    options: list[str],
    text: str,
    progress: Callable[[int, int], None] | None = None,
) -> export.Answer:
    """What is known of an answer: its options' probabilities, and what it loses without each patch.

    progress: see evidence.leave_one_out.
    """
    question = turns[-1]["content"]
    probs = model.option_probs(selection, question, options).tolist() if options else ()
    if not text.strip():
        return export.Answer(question, "", tuple(options), tuple(probs))
    found = evidence.leave_one_out(model, selection, turns, text, options or None, progress)
    found = dataclasses.replace(found, score_ranks=torch.from_numpy(numbers(selection)))
    return export.Answer(question, text, tuple(options), tuple(probs), tuple(found.effects.tolist()), found.sentence)


def write_file(
    name: str,
    path: Path,
    case: Case,
    config: SparseWSIConfig,
    *,
    model: str,
    weights_sha256: str | None,
    answers: Sequence[export.Answer] = (),
    warnings: Sequence[str] = (),
) -> None:
    """Write patches.csv, patches.geojson, selection.json or report.html of a case. Raises KeyError for another name."""
    bag, selection = case.bag, case.selection
    run: dict[str, Any] = {"model": model, "weights_sha256": weights_sha256, "answers": answers}
    if name == "patches.csv":
        export.write_csv(path, bag, selection)
    elif name == "patches.geojson":
        export.write_geojson(path, bag, selection)
    elif name == "selection.json":
        export.write_selection(path, bag, selection, config, **run)
    elif name == "report.html":
        with open_slide(case.path, slide_mpp=case.slide_mpp) as slide:
            overview = plots.overlay(*slide.thumbnail(1400), bag, selection)
            pictures = plots.patch_pictures(slide, bag, selection)
        export.write_report(path, bag, selection, config, overview=overview, patches=pictures, warnings=warnings, **run)
    else:
        raise KeyError(name)


# ---- phantoms, whose content is known

# Questions to start with: text, options. The wording is the one the demo model was trained on.
# Not which tissue makes up most of a slide: 32 chosen patches do not tell, and nobody is to be led to ask.
QUESTIONS = (
    ("Describe this slide.", ()),
    (f"Does this slide contain {phantom.WORDS['carcinoma']}?", ("Yes", "No")),
)
PRESENT_QUESTION = "Which of these tissues is present in this slide?"


def truth_of(path: str) -> phantom.GroundTruth | None:
    """What the generator planted, for a phantom; None for a real slide."""
    return phantom.load_truth(path) if phantom.truth_path(path).is_file() else None


def words(kind: str) -> str:
    """A kind of tissue as people write it."""
    return phantom.WORDS.get(kind, "glass" if kind == "background" else kind.replace("_", " "))


def planted(truth: phantom.GroundTruth | None, bag: Bag, selection: Selection) -> str:
    """The ground truth in a few lines, and what the selected patches show of it."""
    if truth is None:
        return ""
    foci = Counter(needle.kind for needle in truth.needles)
    found = Counter(truth.label_at(bag.coords[selection.indices].numpy(), bag.patch_size).tolist())
    lines = [
        f"- Most of the tissue: **{words(truth.dominant)}**",
        f"- Hidden foci: **{', '.join(f'{words(kind)} ({count})' for kind, count in sorted(foci.items()))}**",
        f"- The {len(selection.indices)} selected patches: "
        + ", ".join(f"{count} {words(kind)}" for kind, count in found.most_common()),
    ]
    return "\n".join(lines)


def questions_for(truth: phantom.GroundTruth | None) -> list[tuple[str, tuple[str, ...]]]:
    """Questions to start with; of a phantom also which of four tissues it holds."""
    if truth is None or not truth.present:
        return list(QUESTIONS)
    absent = [kind for kind in phantom.NEEDLES if kind not in truth.present][:3]
    return [*QUESTIONS, (PRESENT_QUESTION, tuple(sorted(words(kind) for kind in (truth.present[0], *absent))))]
