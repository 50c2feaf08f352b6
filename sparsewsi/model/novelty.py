"""What a reader is warned of: a slide unlike those the model was trained on, a cut between equals, a guessed scale.

N patches, D feature dim, R axes, S sources (training slides).

How far a patch is from the training patches: its features are rotated onto the R axes along which training patches
vary most, every axis is measured in training standard deviations, and what no axis explains in those of the rest; the
distance is the root mean square of all of it, about 1 for a training patch (the Gaussian of Tipping and Bishop's
probabilistic PCA, 1999). A slide is unlike the training slides if its median patch is farther than that of any of them,
or if its patches vary less than half as much as those of any of them (noise, an empty scan). Half, because training
patches were picked for variety, while one tissue may fill a slide.

Both limits come from training slides as if they were new: sources are dealt to FOLDS folds, and each fold is measured
with a summary of the others. So a slide that is like the S training slides stays within the largest of their S
distances with a chance of at least S / (S + 1).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsewsi.bags.bag import Bag, replacing

if TYPE_CHECKING:  # model.py stands above this file
    from sparsewsi.model.sparse_wsi import Selection

FILE = "novelty.safetensors"
AXES, FOLDS = 64, 4
FEW = 8  # patches, below which it means nothing that they are alike
PER_SOURCE = 200  # patches of one source that are looked at, so that no source counts for more than another
ROWS = 8192  # patches measured at once
EQUAL = 0.1  # standard deviations of the scores: the paper's last temperature, below which training does not separate


@dataclass(frozen=True, eq=False)
class Summary:
    """What training features look like. CPU tensors, float32.

    mean: (D,); axes: (D, R), orthonormal; deviations: (R,); rest: standard deviation of every other direction
    farthest: largest median distance of a training slide; least_spread: smallest spread of one
    sources: S, how many training slides these limits rest on
    """

    mean: Tensor
    axes: Tensor
    deviations: Tensor
    rest: float
    farthest: float
    least_spread: float
    sources: int


def distances(summary: Summary, features: Tensor) -> Tensor:
    """(N, D) of any float type -> (N,) float32, how far each patch is from the training patches; about 1 is usual."""
    out = []
    for part in features.split(ROWS):
        centred = part.float() - summary.mean
        along = centred @ summary.axes  # (n, R)
        across = (centred.square().sum(1) - along.square().sum(1)).clamp(min=0) / summary.rest**2
        out.append((((along / summary.deviations).square().sum(1) + across) / features.shape[1]).sqrt())
    return torch.cat(out) if out else torch.empty(0)


def spread(summary: Summary, features: Tensor) -> float:
    """Variance of the patches (N, D), N >= 2, about their own mean, as a share of that of all training patches."""
    whole = float(summary.deviations.square().sum()) + summary.rest**2 * (features.shape[1] - len(summary.deviations))
    sums, squares = torch.zeros(2, features.shape[1], dtype=torch.float64)
    for part in features.split(ROWS):
        sums, squares = sums + part.double().sum(0), squares + part.double().square().sum(0)
    n = len(features)
    return float((squares - sums.square() / n).sum() / (n - 1)) / whole


def summarise(features: Tensor, sources: np.ndarray) -> Summary:
    """The summary that an artefact keeps, from the training split's features (M, D) and the slide (M,) each came from.

    Takes a few seconds. Raises ValueError for fewer sources than folds.
    """
    names = np.unique(sources)
    if len(names) < FOLDS:
        raise ValueError(f"limits need patches of at least {FOLDS} slides, got {len(names)}.")
    slides = [features[torch.from_numpy(_some(np.flatnonzero(sources == name)))].float() for name in names]
    far, near = [], []
    for fold in range(FOLDS):
        others = _fit(torch.cat([x for i, x in enumerate(slides) if i % FOLDS != fold]), len(names))
        far += [float(distances(others, x).median()) for x in slides[fold::FOLDS]]
        near += [spread(others, x) for x in slides[fold::FOLDS] if len(x) >= FEW]
    whole = _fit(torch.cat(slides), len(names))
    return dataclasses.replace(whole, farthest=max(far), least_spread=min(near, default=0.0))


def _some(rows: np.ndarray) -> np.ndarray:
    """At most PER_SOURCE of them, evenly spaced."""
    return rows if len(rows) <= PER_SOURCE else rows[np.linspace(0, len(rows) - 1, PER_SOURCE, dtype=int)]


def _fit(x: Tensor, sources: int) -> Summary:
    """Mean, axes and deviations of features (m, D), as yet without limits."""
    mean = x.mean(0)
    centred = x - mean
    axes = min(AXES, x.shape[1] // 2, len(x) // 2)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))  # ascending
    kept = values[-axes:].clamp(min=1e-12)
    rest = float(values[:-axes].clamp(min=0).mean().clamp(min=1e-12).sqrt())
    return Summary(mean, vectors[:, -axes:].contiguous(), kept.sqrt(), rest, math.inf, 0.0, sources)


def save(summary: Summary, folder: str | Path) -> None:
    """Write FILE into a model's folder; the axes in float16, the rest in float32."""
    numbers = torch.tensor([summary.rest, summary.farthest, summary.least_spread, summary.sources], dtype=torch.float64)
    tensors = {
        "mean": summary.mean,
        "axes": summary.axes.half(),
        "deviations": summary.deviations,
        "numbers": numbers,
    }
    with replacing(Path(folder) / FILE) as partial:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial)


def load(folder: str | Path) -> Summary | None:
    """The summary in a model's folder, None where there is none. Raises ValueError for a broken one."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Copy or download it again.") from error
    if set(found) != {"mean", "axes", "deviations", "numbers"}:
        raise ValueError(f"{path} holds {', '.join(sorted(found))}, which is no summary of features. Make it again.")
    rest, farthest, least_spread, sources = found["numbers"].tolist()
    return Summary(
        found["mean"], found["axes"].float(), found["deviations"], rest, farthest, least_spread, int(sources)
    )


def warning(summary: Summary, bag: Bag) -> str | None:
    """A sentence if the slide is unlike the training slides, else None. Raises ValueError for features of another D."""
    if bag.features.shape[1] != len(summary.mean):
        raise ValueError(
            f"{bag.slide} has features of dimension {bag.features.shape[1]}, the summary {len(summary.mean)}."
        )
    if len(bag.features) == 0:
        return None
    unlike = "This slide is unlike those the model was trained on, so expect wrong selections and answers: "
    distance = float(distances(summary, bag.features).median())
    if distance > summary.farthest:
        return (
            f"{unlike}its typical patch lies {distance:.3f} from the training patches (one of those: 1), farther than "
            f"that of all {summary.sources} training slides (at most {summary.farthest:.3f})."
        )
    own = spread(summary, bag.features) if len(bag.features) >= FEW else math.inf
    if own < summary.least_spread / 2:
        return (
            f"{unlike}its patches vary {own:.0%} as much as training patches do, and in every one of "
            f"{summary.sources} training slides at least {summary.least_spread:.0%}."
        )
    return None


def warnings_about(
    bag: Bag, selection: Selection, summary: Summary | None = None, mpp: float | None = None
) -> list[str]:
    """Every sentence that must stand beside an answer about this slide, gravest first.

    mpp: um/px of the patches that the model was trained on
    """
    unlike = None if summary is None else warning(summary, bag)
    return [*filter(None, [unlike, _other_scale(bag, mpp)]), *selection_warnings(bag, selection)]


def _other_scale(bag: Bag, mpp: float | None) -> str | None:
    """A sentence if the patches were read at another resolution: 20x is 0.5 um/px for one tool, 0.46 for another."""
    if mpp is None or bag.mpp is None or abs(math.log(bag.mpp / mpp)) < math.log(1.2):
        return None
    return (
        f"The patches were read at {bag.mpp:.4g} µm/px, but the model was trained on patches of {mpp:.4g} µm/px: "
        "expect wrong selections and answers."
    )


def selection_warnings(bag: Bag, selection: Selection) -> list[str]:
    """Sentences about the scale, about slides of few patches, and about the cut between kept and left-out ones.

    Two patches count as equal if their scores differ by less than EQUAL standard deviations of the slide's scores:
    training's soft top-K ends at that temperature, and gives both weights nearer to each other than to 0 or 1. On a
    slide of many patches the best one left out nearly always equals the last one kept; it is said where a quarter of
    the kept patches could be exchanged so, or where the scores are the same.
    """
    k, n = len(selection.indices), selection.num_patches
    out = []
    scale = _SCALE.get(bag.mpp_source if bag.slide_mpp else "unknown")
    if scale is not None:
        out.append(scale.format(mpp=bag.slide_mpp))
    if n <= k:
        out.append(f"The slide has only {n:,} patches with tissue, and all were kept: nothing was selected.")
        return out
    if n < 4 * k:
        out.append(f"The slide has only {n:,} patches with tissue, so that {k} of them are hardly a selection.")
    cut = _cut(selection)
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
