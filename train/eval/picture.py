"""A picture of a summary: accuracy against the number of tokens K and against the number of patches N."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.eval.scoring import Score, list_sizes
from train.eval.statistics import estimate_share


def draw_scores(scores: dict[str, Score], k: int, path: Path) -> None:
    """Draw accuracy against the number of tokens K and against the number of patches N, with Wilson intervals.

    k: K of the rows that name none. Rows without a K of their own ("all", "text-only", "majority") are dashed lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    by_k, by_n = figure.subplots(1, 2, sharey=True)
    curves: dict[str, list[tuple[int, Score]]] = defaultdict(list)
    colours: dict[str, str] = {}
    for row, score in scores.items():
        selector, _, rest = row.partition("@")
        tokens = re.match(r"\d*", rest)
        own = int(tokens[0]) if tokens and tokens[0] else None
        base = re.sub(r"@\d+", "", row)
        colours.setdefault(base, f"C{len(colours) % 10}")
        alone = selector.split(",")[0]
        if own is None and (alone in ("all", "text-only", "majority", "slidechat") or ":" in alone):
            by_k.axhline(100 * score.accuracy, color=colours[base], linestyle="--", linewidth=1, label=base)
        else:
            curves[base].append((own or k, score))
    for base, points in curves.items():
        points.sort(key=lambda point: point[0])
        _draw_curve(by_k, [x for x, _ in points], [(s.right, s.n) for _, s in points], base, colours[base])
    sizes = list_sizes(scores)
    for number, (row, score) in enumerate(scores.items()):
        if "@" not in row and score.by_size:
            shift = 0.3 * (number / len(scores) - 0.5)  # so that intervals at the same N lie side by side
            places = [sizes.index(size) + shift for size in score.by_size]
            _draw_curve(by_n, places, list(score.by_size.values()), row, colours[row])
    by_k.set(xlabel="tokens K the language model sees", ylabel="accuracy, %", xscale="log")
    ticks = sorted({x for points in curves.values() for x, _ in points})
    by_k.set_xticks(ticks, [str(tick) for tick in ticks])
    by_k.minorticks_off()
    by_n.set(xlabel="patches N of the slide")
    by_n.set_xticks(range(len(sizes)), sizes, rotation=30, ha="right")
    for axes in (by_k, by_n):
        axes.grid(alpha=0.3)
    figure.legend(*by_k.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path)


def _draw_curve(axes, x: Sequence[float], counts: list[tuple[int, int]], label: str, colour: str) -> None:
    """A curve of shares in % with Wilson intervals."""
    share, *ends = 100 * np.array([estimate_share(right, n) for right, n in counts]).T
    errors = np.abs(np.array(ends) - share)
    axes.errorbar(x, share, yerr=errors, marker="o", markersize=4, capsize=2, label=label, color=colour)
