"""Whether the kept patches lie at the margin of the feature space, as a number (the paper shows a picture, Figure 5).

    python -m train.studies.margin --model assets/demo-model --bags a.safetensors b.safetensors --out runs/margin

A patch lies at the margin where its neighbours are far. The number is the mean distance of the kept patches to their
10 nearest neighbours over that of the discarded ones (geometric means): 1 is no difference, 2 is twice as far. The
interval is that of as many patches drawn at random from the same slide. Rare tissue has few neighbours that are like
it, so that keeping it raises the ratio as well.

N patches, K kept, d dimensions.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsewsi.bags.foreign import load_bag
from sparsewsi.files import write_json, write_text
from sparsewsi.model.sparse_wsi import SparseWSI
from sparsewsi.report.umap import map_features
from train.eval.table import write_table
from train.flags import add_flag, make_parser, run_command

NEIGHBOURS = 10
DRAWS = 2000
PART = 1024  # points whose distances to all others are held at once


@dataclass(frozen=True)
class Margin:
    """How far the kept patches lie from their neighbours, over how far the discarded ones do."""

    ratio: float
    low: float  # 95 % of as many random patches lie between low and high
    high: float
    p: float  # share of random draws at least as far from 1, two-sided
    kept: int
    discarded: int


def neighbour_distance(points: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Mean Euclidean distance (N,) of each of the points (N, d) to its nearest others."""
    points = points.float()
    most = min(neighbours, len(points) - 1)
    found = []
    for start in range(0, len(points), PART):
        distance = torch.cdist(points[start : start + PART], points)
        here = torch.arange(len(distance))
        distance[here, start + here] = torch.inf  # a point is not its own neighbour, its twin is
        found.append(distance.topk(most, largest=False).values.mean(-1))
    return torch.cat(found)


def measure_margin(
    points: Tensor, kept: Tensor, neighbours: int = NEIGHBOURS, draws: int = DRAWS, seed: int = 0
) -> Margin:
    """Compare kept (K,) with all other points (N, d), and with random choices of K of them.

    Raises ValueError where nothing is kept or nothing discarded.
    """
    n, k = len(points), len(kept)
    if not 0 < k < n:
        raise ValueError(f"{k} of {n} patches are kept; a comparison needs some that are kept and some that are not.")
    distance = neighbour_distance(points, neighbours).double()
    logs = distance.clamp(min=distance[distance > 0].min() if (distance > 0).any() else 1.0).log().numpy()

    def log_ratio(chosen: np.ndarray) -> np.ndarray:  # (..., K) rows
        inside = logs[chosen].sum(-1)
        return inside / k - (logs.sum() - inside) / (n - k)

    rng = np.random.default_rng(seed)
    random = log_ratio(np.stack([rng.choice(n, k, replace=False) for _ in range(draws)]))
    found = float(log_ratio(kept.numpy()))
    low, high = np.exp(np.quantile(random, [0.025, 0.975]))
    beyond = int((np.abs(random) >= abs(found) - 1e-12).sum())
    return Margin(float(np.exp(found)), float(low), float(high), (1 + beyond) / (1 + draws), k, n - k)


def measure_margins(
    model: SparseWSI, bag_file: Path, selectors: tuple[str, ...], seed: int = 0
) -> dict[str, dict[str, Margin]]:
    """Of each selector the margin in feature space (unit vectors) and on the UMAP."""
    bag = load_bag(bag_file)
    selections = {selector: model.select(bag, selector=selector, seed=seed) for selector in selectors}
    everything = torch.cat([selection.indices for selection in selections.values()]).unique()
    drawn = map_features(bag.features, replace(next(iter(selections.values())), indices=everything), seed)
    unit, xy = F.normalize(bag.features.float(), dim=-1), torch.from_numpy(drawn.xy)
    found = {}
    for selector, selection in selections.items():
        place = torch.from_numpy(np.flatnonzero(np.isin(drawn.rows, selection.indices.numpy())))
        found[selector] = {"features": measure_margin(unit, selection.indices), drawn.method: measure_margin(xy, place)}
    return found


def write_margins(found: dict[str, dict[str, dict[str, Margin]]]) -> str:
    """Slides, selectors and spaces as a Markdown table."""
    head = ["slide", "selector", "space", "kept / discarded", "ratio", "95 % of random choices", "p"]
    rows = []
    for slide, selectors in found.items():
        for selector, spaces in selectors.items():
            for space, m in spaces.items():
                count, ends = f"{m.kept} / {m.discarded:,}", f"{m.low:.2f} to {m.high:.2f}"
                rows.append([slide, selector, space, count, f"{m.ratio:.2f}", ends, f"{m.p:.2g}"])
    return write_table(head, rows)


def main() -> None:
    parser = make_parser(__doc__)
    add_flag(parser, "--model")
    parser.add_argument("--bags", type=Path, nargs="+", required=True, help="feature files of slides")
    parser.add_argument("--selectors", nargs="+", default=["learned", "random", "farthest"])
    add_flag(parser, "--out", help="folder for margin.json and margin.md")
    given = parser.parse_args()
    model = SparseWSI.from_pretrained(given.model)
    found = {path.stem: measure_margins(model, path, tuple(given.selectors)) for path in given.bags}
    record = {
        slide: {selector: {space: asdict(m) for space, m in spaces.items()} for selector, spaces in selectors.items()}
        for slide, selectors in found.items()
    }
    write_json(given.out / "margin.json", record)
    write_text(given.out / "margin.md", write_margins(found) + "\n")
    print(write_margins(found))


if __name__ == "__main__":
    run_command(main)
