"""What a reader is warned of: a slide unlike those the model was trained on, a cut between equals, a guessed scale.

N patches, D feature dim, R axes, S sources (training slides).

How far a patch is from the training patches: its features are rotated onto the R axes along which training patches
vary most, every axis is measured in training standard deviations, and what no axis explains in those of the rest; the
distance is the root mean square of all of it, about 1 for a training patch (the Gaussian of Tipping and Bishop's
probabilistic PCA, 1999). How far a slide is: the median over its patches, so that a fold or a pen stroke does not
count. The threshold comes from training slides that the summary has not seen: sources are dealt to FOLDS folds, each
fold is measured with a summary of the others, and the threshold is the QUANTILE of these S distances.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsewsi.bag import Bag

if TYPE_CHECKING:  # model.py stands above this file
    from sparsewsi.model import Selection

FILE = "novelty.safetensors"
AXES, FOLDS, QUANTILE = 64, 4, 0.95
PER_SOURCE = 200  # patches of one source that are looked at, so that no source counts for more than another
ROWS = 8192  # patches measured at once
EQUAL = 0.1  # standard deviations of the scores: the paper's last temperature, below which training does not separate


@dataclass(frozen=True, eq=False)
class Summary:
    """What training features look like. CPU tensors, float32.

    mean: (D,); axes: (D, R), orthonormal; deviations: (R,); rest: standard deviation of every other direction
    threshold: distance of a slide beyond which it is called unlike, see the module
    sources: S, how many training slides the threshold rests on
    """

    mean: Tensor
    axes: Tensor
    deviations: Tensor
    rest: float
    threshold: float
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


def summarise(features: Tensor, sources: np.ndarray) -> Summary:
    """The summary that an artefact keeps, from the training split's features (M, D) and the slide (M,) each came from.

    Takes a few seconds. Raises ValueError for fewer sources than folds.
    """
    names = np.unique(sources)
    if len(names) < FOLDS:
        raise ValueError(f"a threshold needs patches of at least {FOLDS} slides, got {len(names)}.")
    rows = {name: _spread(np.flatnonzero(sources == name)) for name in names}
    held_out = np.empty(len(names))
    for fold in range(FOLDS):
        others = np.concatenate([rows[name] for i, name in enumerate(names) if i % FOLDS != fold])
        seen = _fit(features[torch.from_numpy(others)].float(), len(names))
        for i in range(fold, len(names), FOLDS):
            held_out[i] = float(distances(seen, features[torch.from_numpy(rows[names[i]])]).median())
    whole = _fit(features[torch.from_numpy(np.concatenate(list(rows.values())))].float(), len(names))
    return dataclasses.replace(whole, threshold=float(np.quantile(held_out, QUANTILE)))


def _spread(rows: np.ndarray) -> np.ndarray:
    """At most PER_SOURCE of them, evenly spaced."""
    return rows if len(rows) <= PER_SOURCE else rows[np.linspace(0, len(rows) - 1, PER_SOURCE, dtype=int)]


def _fit(x: Tensor, sources: int) -> Summary:
    """Mean, axes and deviations of features (m, D), as yet without a threshold."""
    mean = x.mean(0)
    centred = x - mean
    axes = min(AXES, x.shape[1] // 2, len(x) // 2)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))  # ascending
    kept = values[-axes:].clamp(min=1e-12)
    rest = float(values[:-axes].clamp(min=0).mean().clamp(min=1e-12).sqrt())
    return Summary(mean, vectors[:, -axes:].contiguous(), kept.sqrt(), rest, math.inf, sources)


def save(summary: Summary, folder: str | Path) -> None:
    """Write FILE into a model's folder; the axes in float16, the rest in float32."""
    numbers = torch.tensor([summary.rest, summary.threshold, summary.sources], dtype=torch.float64)
    tensors = {
        "mean": summary.mean,
        "axes": summary.axes.half(),
        "deviations": summary.deviations,
        "numbers": numbers,
    }
    save_file({name: value.contiguous() for name, value in tensors.items()}, Path(folder) / FILE)


def load(folder: str | Path) -> Summary | None:
    """The summary in a model's folder, None where there is none. Raises ValueError for a broken one."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    found = load_file(path)
    if set(found) != {"mean", "axes", "deviations", "numbers"}:
        raise ValueError(f"{path} holds {', '.join(sorted(found))}, which is no summary of features. Make it again.")
    rest, threshold, sources = found["numbers"].tolist()
    return Summary(found["mean"], found["axes"].float(), found["deviations"], rest, threshold, int(sources))


def warning(summary: Summary, bag: Bag) -> str | None:
    """A sentence if the slide is unlike the training slides, else None. Raises ValueError for features of another D."""
    if bag.features.shape[1] != len(summary.mean):
        raise ValueError(
            f"{bag.slide} has features of dimension {bag.features.shape[1]}, the summary {len(summary.mean)}."
        )
    if len(bag.features) == 0:
        return None
    distance = float(distances(summary, bag.features).median())
    if distance <= summary.threshold:
        return None
    return (
        "This slide is unlike those the model was trained on: the distance of its patches to the training patches is "
        f"{distance:.2f}, and {QUANTILE:.0%} of {summary.sources} training slides stay below {summary.threshold:.2f}. "
        "Expect wrong selections and answers."
    )


def warnings_about(bag: Bag, selection: Selection, summary: Summary | None = None) -> list[str]:
    """Every sentence that must stand beside an answer about this slide, gravest first."""
    unlike = None if summary is None else warning(summary, bag)
    return [*filter(None, [unlike]), *selection_warnings(bag, selection)]


def selection_warnings(bag: Bag, selection: Selection) -> list[str]:
    """Sentences about the scale, about the cut between kept and left-out patches, and about how little was kept.

    Rank K + 1 counts as good as rank K if their scores differ by less than EQUAL standard deviations of the slide's
    scores: training's soft top-K ends at that temperature, and gives both weights nearer to each other than to 0 or 1.
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
    share = f"{k:,} of {n:,} patches ({100 * k / n:.2g} % of the tissue)"
    out.append(f"The answer is read from {share}; the others were scored only.")
    return out


_SCALE = {
    "argument": "The scale ({mpp:.4g} µm/px) was given by hand; if it is wrong, so are sizes and answers.",
    "objective power": "The scale ({mpp:.4g} µm/px) was guessed from the magnification; sizes may be off by a tenth.",
    "tiff resolution": "The scale ({mpp:.4g} µm/px) is that of the TIFF tags, which some scanners leave at a default.",
    "unknown": "The scale is unknown: the model may see the tissue at another magnification than it was trained on.",
}


def _cut(selection: Selection) -> str | None:
    """A sentence if the best patch that was left out is as good as the last kept one, or better."""
    k, scores = len(selection.indices), selection.scores.double()
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[selection.indices] = True
    last, best_out = float(scores[kept].min()), float(scores[~kept].max())
    spread = float(scores.std())
    if best_out > last:  # patches were drawn, dropped or pinned by hand
        more = int((scores[~kept] > last).sum())
        return f"{more:,} patches that were left out score higher than the last of the {k} kept."
    if spread > 0 and (last - best_out) / spread >= EQUAL:
        return None
    inside = int((scores[kept] < best_out + EQUAL * spread).sum()) if spread > 0 else k
    outside = int((scores[~kept] > last - EQUAL * spread).sum()) if spread > 0 else len(scores) - k
    return (
        f"Rank {k + 1} is as good as rank {k}: {outside:,} patches that were left out score as high as the last "
        f"{inside:,} of the {k} kept (within {EQUAL:g} standard deviations). A larger K may change the answer."
    )
