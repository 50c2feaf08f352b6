"""How often the novelty warning is given for slides of organs that training has seen, and of organs that it has not.

    python -m train.studies.novelty --banks runs/tiles.safetensors runs/phantom.safetensors runs/slides.safetensors

Training slides, each measured with a summary (sparsewsi/model/novelty.py) of the others: without the cases of its fold
(seen, where another case is of the same organ), and without all slides of its organ (unseen). The last bank is that of
slides (train/data/real.py). A line per quantile of the training distances that could be the limit.
"""

from pathlib import Path

import numpy as np
import torch

from sparsewsi.files import write_text
from sparsewsi.model import novelty
from train.data.bank import Bank, load_bank
from train.data.real import SlideFacts, load_slides, slide_rows
from train.eval.statistics import estimate_share
from train.eval.table import write_table
from train.flags import add_flag, make_parser, run_command

FOLDS = 5
QUANTILES = (0.8, 0.9, 0.95, 1.0)


def measure(
    banks: list[Bank], bank: Bank, left_out: list[SlideFacts], slides: list[SlideFacts]
) -> tuple[list[float], list[float]]:
    """Distances of the training sources but these slides' cases, and of these slides."""
    gone = {slide.case for slide in left_out} | {slide.slide for slide in left_out}
    parts = [(each, np.flatnonzero(~np.isin(each.sources, list(gone)))) for each in banks]
    features = torch.cat([each.features[torch.from_numpy(rows)] for each, rows in parts])
    summary, far, _ = novelty.measure_sources(features, np.concatenate([each.sources[rows] for each, rows in parts]))
    return far, [
        float(novelty.distances(summary, bank.features[torch.from_numpy(slide_rows(bank, slide.slide))]).median())
        for slide in slides
    ]


def main() -> None:
    parser = make_parser(__doc__)
    add_flag(parser, "--banks", required=True, type=Path)
    parser.add_argument("--out", type=Path, help="file for the table")
    given = parser.parse_args()
    bank, known = load_slides(given.banks[-1], "train")
    banks = [load_bank(path, "train") for path in given.banks]
    slides = [slide for slide in known if slide.facts["organ"]]
    organs = sorted({slide.facts["organ"] for slide in slides})
    cases_of = {organ: {slide.case for slide in slides if slide.facts["organ"] == organ} for organ in organs}
    order = np.random.default_rng(0).permutation(sorted({slide.case for slide in slides})).tolist()
    warned: dict[str, dict[float, list[bool]]] = {"seen": {}, "unseen": {}}
    groups = [("unseen", [slide for slide in slides if slide.facts["organ"] == organ]) for organ in organs]
    groups += [("seen", [s for s in slides if order.index(s.case) % FOLDS == fold]) for fold in range(FOLDS)]
    for name, group in groups:
        measured = [slide for slide in group if name == "unseen" or len(cases_of[slide.facts["organ"]]) > 1]
        far, found = measure(banks, bank, group, measured)
        for quantile in QUANTILES:
            limit = float(np.quantile(far, quantile))
            warned[name].setdefault(quantile, []).extend(distance > limit for distance in found)
    lines = []
    for quantile in QUANTILES:
        cells = [f"{quantile:.2f}" + (" (the limit)" if quantile == 1 else "")]
        for name in ("seen", "unseen"):
            flags = warned[name][quantile]
            share = estimate_share(sum(flags), len(flags))
            cells.append(f"{sum(flags)} of {len(flags)}: {np.mean(flags):.0%} ({share.low:.0%} to {share.high:.0%})")
        lines.append(cells)
    table = write_table(["limit, quantile of training distances", "organ seen: warned", "organ unseen: warned"], lines)
    print(table)
    if given.out:
        write_text(given.out, table + "\n")


if __name__ == "__main__":
    run_command(main)
