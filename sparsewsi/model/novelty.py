"""How unlike a slide is to those that the model was trained on, in numbers; report/doubts.py says it in words.

N patches, D feature dim, R axes, S sources (training slides).

How far a patch is from the training patches: its features are rotated onto the R axes along which training patches
vary most, every axis is measured in training standard deviations, and what no axis explains in those of the rest; the
distance is the root mean square of all of it, about 1 for a training patch (the Gaussian of Tipping and Bishop's
probabilistic PCA, 1999). A slide is unlike the training slides if its median patch is farther than that of any of them,
or if its patches vary less than half as much as those of any of them (noise, an empty scan). Half, because training
patches were picked for variety, while one tissue may fill a slide.

Both limits come from training slides as if they were new: sources are dealt to FOLDS folds, and each fold is measured
with a summary of the others. So a slide that is like the S training slides stays within the largest of their S
distances with a chance of at least S / (S + 1). That is all: tissue of an organ that training has not seen is no
farther than tissue of one that it has (train/studies/novelty.py), and no warning does not mean that it is known.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsewsi.files import replacing

FILE = "novelty.safetensors"
AXES, FOLDS = 64, 4
FEW = 8  # patches; that fewer than these are alike means nothing
PER_SOURCE = 200  # patches of one source that are looked at, so that no source counts for more than another
ROWS = 8192  # patches measured at once


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
    whole, far, near = measure_sources(features, sources)
    return dataclasses.replace(whole, farthest=max(far), least_spread=min(near, default=0.0))


def measure_sources(features: Tensor, sources: np.ndarray) -> tuple[Summary, list[float], list[float]]:
    """A summary that has no limits yet, and the median distance and the spread of each source as if it were new."""
    names = np.unique(sources)
    if len(names) < FOLDS:
        raise ValueError(f"limits need patches of at least {FOLDS} slides, got {len(names)}.")
    slides = [features[torch.from_numpy(_some(np.flatnonzero(sources == name)))].float() for name in names]
    far, near = [], []
    for fold in range(FOLDS):
        others = _fit(torch.cat([x for i, x in enumerate(slides) if i % FOLDS != fold]), len(names))
        far += [float(distances(others, x).median()) for x in slides[fold::FOLDS]]
        near += [spread(others, x) for x in slides[fold::FOLDS] if len(x) >= FEW]
    return _fit(torch.cat(slides), len(names)), far, near


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
