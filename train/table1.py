"""The paper's Table 1 (2606.08641) with what was measured here under each of its rows, and which rows ran.

    python -m train.table1 --tcga runs/eval-tcga --bcnb runs/eval-bcnb --wsi-vqa runs/eval-wsivqa

Each folder is the --out of a `python -m train.evaluate`; without any the paper's figures stand alone. The paper's rows
of patch readers are SlideChat's figures (2410.11761v3: 30 random patches a slide, each asked alone, the majority
counts; patch size, seed, ties and how an answer is read are not stated there), on questions of which not all were
released, so that ours are not expected to reproduce them. Ours are shares of all questions of the file in percent, with
95 % intervals; what was written is read strictly, then leniently (train/eval/reading.py).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.eval.statistics import Estimate, estimate_share
from train.eval.table import write_points, write_table
from train.flags import make_parser, run_command

SETS = ("tcga", "bcnb", "wsi_vqa")
HEAD = ("system", "FLOPs", "Micros.", "Diagnos.", "SlideBench (TCGA)", "SlideBench (BCNB)", "WSI-VQA*")


@dataclass(frozen=True)
class PaperRow:
    """A row of Table 1.

    paper: FLOPs, then accuracies in % (microscopy, diagnosis, overall, BCNB, WSI-VQA*)
    ours:  rows of train.evaluate that are the same system; () where it is not one
    """

    system: str
    paper: tuple[str, float, float, float, float, float]
    ours: tuple[str, ...]


TABLE = (
    PaperRow("SlideChat", ("133.3T", 87.64, 73.27, 81.17, 54.14, 60.18), ("slidechat",)),
    PaperRow("Random baseline", ("", 24.44, 24.91, 25.02, 24.40, 24.14), ()),
    PaperRow("GPT-4o", ("", 62.89, 46.69, 57.91, 41.43, 30.41), ("gpt-4o:random@30",)),
    PaperRow("LLaVA-Med", ("1.70T", 47.34, 32.78, 42.00, 30.10, 26.31), ("llava-med:random@30",)),
    PaperRow("Quilt-LLaVA", ("1.70T", 57.76, 35.96, 48.07, 32.19, 44.43), ("quilt-llava:random@30",)),
    PaperRow("MedDr", ("1.70T", 73.30, 57.78, 67.70, 33.67, 54.36), ("meddr:random@30",)),
    PaperRow("SparseLearn", ("1.73T", 81.68, 70.09, 73.32, 56.89, 60.76), ("learned",)),
)


def read_table(folder: Path) -> dict[str, Any]:
    """The rows of a table.json. Raises ValueError for a folder without one."""
    path = folder / "table.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no table.json. Run python -m train.evaluate with --out {folder}.")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Run python -m train.evaluate again.") from error


def find_rows(name: str, tables: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row's names in the tables: itself, or the readings of what it wrote."""
    names = (name, f"{name}, strict", f"{name}, lenient")
    return [name for name in names if any(name in table for table in tables.values())]


def write_cells(name: str, tables: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was measured of a row, in the columns of the paper."""
    cells = []
    for family in ("Microscopy", "Diagnosis"):
        right, n = tables.get("tcga", {}).get(name, {}).get("by_family", {}).get(family, (0, 0))
        cells.append(f"{write_points(estimate_share(right, n))}, n = {n:,}" if n else "")
    for questions in SETS:
        score = tables.get(questions, {}).get(name)
        if not score or not score["n"]:
            cells.append("")
            continue
        ends = [score["wilson"], score["slide_bootstrap"] or score["wilson"]]
        low, high = min(end[1] for end in ends), max(end[2] for end in ends)
        cells.append(f"{write_points(Estimate(score['right'] / score['n'], low, high))}, n = {score['n']:,}")
    return cells


def write_table1(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """The table in Markdown, and which rows ran here."""
    lines, ran, missing = [], [], []
    for row in TABLE:
        flops, *accuracies = row.paper
        lines.append([f"{row.system} (paper)", flops, *(f"{value:.2f}" for value in accuracies)])
        names = [found for name in row.ours for found in find_rows(name, tables)]
        lines += [[f"{row.system}, here: {name}", "", *write_cells(name, tables)] for name in names]
        ran += names
        missing += [name for name in row.ours if not find_rows(name, tables)]
    known = {name for row in TABLE for part in row.ours for name in (part, f"{part}, strict", f"{part}, lenient")}
    others = sorted({name for table in tables.values() for name in table} - known)
    lines += [[f"not in the paper: {name}", "", *write_cells(name, tables)] for name in others]
    said = [f"Ran here: {', '.join(ran) or 'none of them'}."]
    if missing:
        said.append(f"Did not run here: {', '.join(missing)}.")
    return "\n\n".join([write_table(HEAD, lines), " ".join(said)])


def main() -> None:
    parser = make_parser(__doc__)
    for name in SETS:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag, type=Path, metavar="DIR", help="folder of a python -m train.evaluate of these questions"
        )
    given = vars(parser.parse_args())
    print(write_table1({name: read_table(given[name]) for name in SETS if given[name]}))


if __name__ == "__main__":
    run_command(main)
