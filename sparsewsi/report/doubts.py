"""What a reader should know before believing an answer, in words: a slide unlike those of training, a guessed scale, a
cut between equals. sparsewsi/model/novelty.py has the numbers.
"""

import math

import torch

from sparsewsi.bags.bag import Bag, list_parts
from sparsewsi.model import novelty
from sparsewsi.model.selection import Selection

EQUAL = 0.1  # standard deviations of the scores: the paper's last temperature, below which training does not separate


def find_doubts(
    bag: Bag,
    selection: Selection,
    summary: novelty.Summary | None = None,
    mpp: float | None = None,
    ranked: bool = True,
) -> list[str]:
    """Every sentence that must stand beside an answer about this slide, gravest first.

    summary: what the model's training features looked like; None where the artefact does not say
    mpp: um/px of the patches that the model was trained on
    ranked: whether the highest scores were kept; else where they are cut says nothing
    """
    unlike = None if summary is None else doubt_slide(summary, bag)
    return [*filter(None, [unlike, _doubt_mpp(bag, mpp)]), *doubt_selection(bag, selection, ranked)]


def doubt_slide(summary: novelty.Summary, bag: Bag) -> str | None:
    """A sentence if the slide is unlike the training slides, else None. Raises ValueError for features of another D."""
    if bag.features.shape[1] != len(summary.mean):
        raise ValueError(
            f"{bag.slide} has features of dimension {bag.features.shape[1]}, the summary {len(summary.mean)}."
        )
    if len(bag.features) == 0:
        return None
    unlike = "This slide is unlike those the model was trained on, so expect wrong selections and answers: "
    distance = float(novelty.distances(summary, bag.features).median())
    if distance > summary.farthest:
        return (
            f"{unlike}its typical patch lies {distance:.3f} from the training patches (one of those: 1), farther than "
            f"that of all {summary.sources} training slides (at most {summary.farthest:.3f})."
        )
    own = novelty.spread(summary, bag.features) if len(bag.features) >= novelty.FEW else math.inf
    if own < summary.least_spread / 2:
        return (
            f"{unlike}its patches vary {own:.0%} as much as training patches do, and in every one of "
            f"{summary.sources} training slides at least {summary.least_spread:.0%}."
        )
    return None


def _doubt_mpp(bag: Bag, mpp: float | None) -> str | None:
    """A sentence if the patches were read at another resolution: 20x is 0.5 um/px for one tool, 0.46 for another."""
    if mpp is None or bag.mpp is None or abs(math.log(bag.mpp / mpp)) < math.log(1.2):
        return None
    return (
        f"The patches were read at {bag.mpp:.4g} µm/px, but the model was trained on patches of {mpp:.4g} µm/px: "
        "expect wrong selections and answers."
    )


def doubt_selection(bag: Bag, selection: Selection, ranked: bool = True) -> list[str]:
    """Sentences about the scale, about slides of few patches, and about the cut between kept and left-out ones.

    Two patches count as equal if their scores differ by less than EQUAL standard deviations of the slide's scores:
    training's soft top-K ends at that temperature, and gives both weights nearer to each other than to 0 or 1. On a
    slide of many patches the best one left out nearly always equals the last one kept; it is said where a quarter of
    the kept patches could be exchanged so, or where the scores are the same.
    """
    k, n = len(selection.indices), selection.num_patches
    out = []
    for number, part in enumerate(list_parts(bag), 1):
        scale = _SCALE.get(part.mpp_source if part.slide_mpp else "unknown")
        if scale is not None:
            out.append((f"Slide {number}: " if bag.parts else "") + scale.format(mpp=part.slide_mpp))
    what = "slides together have" if bag.parts else "slide has"
    if n <= k:
        out.append(f"The {what} only {n:,} patches with tissue, and all were kept: nothing was selected.")
        return out
    if n < 4 * k:
        out.append(f"The {what} only {n:,} patches with tissue, so that {k} of them are hardly a selection.")
    cut = _cut(selection) if ranked else None
    if cut is not None:
        out.append(cut)
    return out


_SCALE = {
    "argument": "The scale ({mpp:.4g} µm/px) was given by hand; if it is wrong, so are sizes and answers.",
    "objective power": "The scale ({mpp:.4g} µm/px) was guessed from the magnification; sizes may be off by a tenth.",
    "unknown": "The scale is unknown: the model may see the tissue at another magnification than it was trained on.",
}


def _cut(selection: Selection) -> str | None:
    """A sentence if the best patch that was left out is as good as the last kept one, or better."""
    k, scores = len(selection.indices), selection.scores.double()
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[selection.indices] = True
    last, best_out = float(scores[kept].min()), float(scores[~kept].max())
    equal = EQUAL * float(scores.std())
    if best_out > last:  # patches were drawn, dropped or pinned by hand
        more = int((scores[~kept] > last).sum())
        return f"{more:,} patches that were left out score higher than the last of the {k} kept."
    inside = int((scores[kept] <= best_out + equal).sum())  # kept, though equal to one that was not
    outside = int((scores[~kept] >= last - equal).sum())
    if last - best_out >= equal > 0 or (inside < k / 4 and last > best_out):
        return None
    if 2 * outside > len(scores) - k and inside < k:
        return (
            f"Rank {k + 1} is as good as rank {k}: only {k - inside:,} of the {k} kept patches stand out, the other "
            f"{inside:,} score like most of the slide."
        )
    left_out = f"{outside:,} patches that were left out score" if outside > 1 else "a patch that was left out scores"
    return (
        f"Rank {k + 1} is as good as rank {k}: {left_out} as high as the last "
        f"{inside:,} of the {k} kept. A larger K may change the answer."
    )
