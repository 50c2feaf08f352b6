"""A slide's patches in two dimensions, patches that look alike near each other, and that map as a picture.

N patches, K kept, D feature dim, M points drawn. matplotlib and umap-learn are imported where they are used: the first
import of umap-learn takes seconds.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparsewsi.model.selection import Selection
from sparsewsi.report.plots import place_labels

UMAP_DIM = 50  # features are rotated onto so many principal axes before UMAP: the same map, found sooner


@dataclass(frozen=True)
class FeatureMap:
    """A slide's patches in two dimensions.

    xy:     (M, 2) float32
    rows:   (M,) int64, which patch of the bag each point is
    total:  N; more than M where only a part was drawn
    method: "UMAP" or "PCA"
    """

    xy: np.ndarray
    rows: np.ndarray
    total: int
    method: str

    @property
    def title(self) -> str:
        """What the map shows and leaves out, in words."""
        count = f"{self.total:,} patches" if self.total != 1 else "1 patch"
        if len(self.rows) < self.total:
            count = f"{len(self.rows):,} of {self.total:,} patches (a random part and every selected patch)"
        return f"{self.method} of the features of {count}" + (" (too few for UMAP)" if self.method == "PCA" else "")


def map_features(
    features: Tensor,
    selection: Selection,
    seed: int = 0,
    max_points: int = 20_000,
    look: Callable[[], object] | None = None,
) -> FeatureMap:
    """Map features (N, D) to two dimensions: UMAP, or PCA when there are fewer than 5 patches.

    max_points: of a larger slide a seeded random part is mapped, which holds every kept patch
    look: called a few times a second; what it raises ends the work
    The same input and seed give the same map. The first call imports umap-learn and compiles it, which takes seconds.
    """
    total = len(features)
    rows = np.arange(total)
    if total > max_points:
        kept = selection.indices.numpy()
        rest = np.random.default_rng(seed).choice(
            np.setdiff1d(rows, kept), max(0, max_points - len(kept)), replace=False
        )
        rows = np.sort(np.concatenate([kept, rest]))
    x = _principal(features[rows].float().numpy(), UMAP_DIM)  # (M, <= UMAP_DIM)
    if total < 5:
        return FeatureMap(_two_columns(x), rows, total, "PCA")
    import umap
    from umap import layouts

    layouts.tqdm = _look_at_each  # type: ignore[assignment]
    neighbours = min(15, len(rows) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "no transform with precomputed neighbours" and the like: not needed
        reducer = umap.UMAP(
            n_neighbors=neighbours,
            # Exact neighbours by matrix products: umap's own search for N < 4,096 is a Python loop over all pairs.
            precomputed_knn=find_neighbours(x, neighbours, look),
            force_approximation_algorithm=True,
            init=_start(x, seed),  # type: ignore[arg-type]  # an array is allowed
            random_state=seed,
            n_jobs=1,
            n_epochs=200,
            tqdm_kwds={"look": look},
        )
        xy = np.asarray(reducer.fit_transform(x), np.float32)
    return FeatureMap(xy, rows, total, "UMAP")


def compile_ahead(pause: Callable[[], object]) -> None:
    """Have umap-learn and matplotlib imported and compiled, so that no map waits: ten seconds on one core.

    pause: called before each of the compiler's passes; it may wait
    """
    few = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    selection = Selection(torch.arange(4), few[:, 0].clone(), few[:4], len(few))
    with pausing(pause):
        points = map_features(few, selection)
    draw_map(points, selection)


@contextmanager
def pausing(pause: Callable[[], object]) -> Iterator[None]:
    """Have something called before each pass that numba's compiler makes for this thread."""
    from numba.core import event

    mine = threading.get_ident()

    class Passes(event.Listener):
        def on_start(self, _event: event.Event) -> None:
            if threading.get_ident() == mine:
                pause()

        def on_end(self, _event: event.Event) -> None:
            pass

    with event.install_listener("numba:run_pass", Passes()):
        yield


def _look_at_each(epochs: Iterable[int], look: Callable[[], object] | None = None, **_: object) -> Iterator[int]:
    """umap-learn's epochs, each after a look: in place of tqdm's bar of them, its only way to be asked to end.

    What is raised while tqdm draws leaves its lock taken, and every later bar of the process, shown or not, waits.
    """
    for epoch in epochs:
        if look is not None:
            look()
        yield epoch


def _principal(x: np.ndarray, most: int) -> np.ndarray:
    """Centred x (M, D) on its first principal axes, at most `most` of them."""
    x = x - x.mean(0)
    if len(x) < x.shape[1]:  # the smaller of the two Gram matrices is the cheaper one
        _, vectors = np.linalg.eigh(x @ x.T)
        axes = x.T @ vectors[:, ::-1][:, :most]
        axes /= np.linalg.norm(axes, axis=0).clip(1e-12)
    else:
        _, vectors = np.linalg.eigh(x.T @ x)
        axes = vectors[:, ::-1][:, :most]
    # The sign of an axis is arbitrary: fix it, so that maps do not flip between machines.
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])] + 1e-30)
    return np.ascontiguousarray(x @ axes, np.float32)


def find_neighbours(x: np.ndarray, k: int, look: Callable[[], object] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Indices and distances (M, k) of the k nearest points of x (M, d) to each of its points, itself first."""
    points, parts = torch.from_numpy(x), []
    for start in range(0, len(x), 1024):
        if look is not None:
            look()
        distance = torch.cdist(points[start : start + 1024], points)
        here = torch.arange(len(distance))
        distance[here, start + here] = -1.0  # a twin at distance 0 must not come before the point itself
        near = distance.topk(k, largest=False)
        parts.append((near.indices.numpy().astype(np.int32), near.values.clamp_min(0).numpy()))
    return np.concatenate([i for i, _ in parts]), np.concatenate([d for _, d in parts])


def _two_columns(x: np.ndarray) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, max(0, 2 - x.shape[1]))))[:, :2].astype(np.float32)


def _start(x: np.ndarray, seed: int) -> np.ndarray:
    """UMAP's starting points (M, 2): the first two principal axes, with a little noise for patches that are equal."""
    xy = _two_columns(x)
    xy = 10 * xy / max(float(np.abs(xy).max()), 1e-6)
    return xy + np.random.default_rng(seed).normal(0, 1e-2, xy.shape).astype(np.float32)


def draw_map(points: FeatureMap, selection: Selection) -> Image.Image:
    """The map as a picture with a legend: discarded patches small and grey, selected ones numbered by rank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.6), dpi=150, layout="constrained")
    drawing = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rank_of = dict(zip(selection.indices.tolist(), selection.ranks.tolist()))
    kept = np.array([int(row) in rank_of for row in points.rows], bool)
    dot = float(np.clip(9000 / max(len(kept), 1), 3, 30))
    axes.scatter(*points.xy[~kept].T, s=dot, c="#8a8f98", alpha=0.55, linewidths=0)
    axes.scatter(*points.xy[kept].T, s=42, c="#e69f00", marker="D", edgecolors="black", linewidths=0.8, zorder=3)
    legend = [
        axes.plot([], [], linestyle="", marker="D", markersize=7, color="#e69f00", markeredgecolor="black")[0],
        axes.plot([], [], linestyle="", marker="o", markersize=5, color="#8a8f98")[0],
    ]
    words = [f"{len(rank_of):,} selected (number: rank)", f"{points.total - len(rank_of):,} discarded"]
    axes.legend(legend, words, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, frameon=False)
    axes.set_title(points.title, fontsize=10)
    axes.set(xlabel=f"{points.method} 1", ylabel=f"{points.method} 2", xticks=[], yticks=[])
    drawing.draw()  # settles the layout, so that places in px are known
    if kept.any():
        _number_points(axes, points.xy[kept], [rank_of[row] for row in points.rows[kept].tolist()])
        drawing.draw()
    return Image.fromarray(np.asarray(drawing.buffer_rgba())).convert("RGB")


def _number_points(axes: Any, xy: np.ndarray, numbers: list[int]) -> None:
    """Write each number beside its point, clear of the other points and numbers, tied to it by a line."""
    from matplotlib import patheffects

    pixels = axes.transData.transform(xy)
    boxes = [(x - 10, y - 10, x + 10, y + 10) for x, y in pixels]
    extents = [(-8.0 * len(f"{n}"), -9.0, 8.0 * len(f"{n}"), 9.0) for n in numbers]
    width, height = axes.figure.canvas.get_width_height()
    halo = [patheffects.withStroke(linewidth=2, foreground="white")]
    order = np.argsort(numbers)
    places = place_labels([boxes[i] for i in order], [extents[i] for i in order], (width, height))
    for i, place in zip(order, places):
        axes.annotate(
            f"{numbers[i]}",
            xy=(float(xy[i, 0]), float(xy[i, 1])),
            xytext=place,
            textcoords="figure pixels",
            ha="center",
            va="center",
            fontsize=8,
            path_effects=halo,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "#444444", "shrinkA": 0, "shrinkB": 0},
        )
