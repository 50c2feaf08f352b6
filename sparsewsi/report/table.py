"""patches.csv: the kept patches as a table."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from sparsewsi.bags.bag import Bag
from sparsewsi.files import write_text
from sparsewsi.model.selection import Selection


def write_csv(path: str | Path, bag: Bag, selection: Selection, marks: Mapping[int, str] | None = None) -> None:
    """One row per kept patch, best first: rank, index, x, y, size (level-0 px), score, centre and size in um, mark.

    The columns in um are empty when the resolution of level 0 is unknown. marks: what the reader said of a patch, by
    its index: "agree" or "disagree".
    """
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["rank", "index", "x", "y", "size", "score", "centre_x_um", "centre_y_um", "size_um", "mark"])
    for place in selection.best_first.tolist():
        rank, index = int(selection.ranks[place]), int(selection.indices[place])
        x, y = bag.coords[index].tolist()
        in_um, mark = ["", "", ""], (marks or {}).get(index, "")
        if bag.slide_mpp:
            half = bag.patch_size / 2
            in_um = [f"{v * bag.slide_mpp:.2f}" for v in (x + half, y + half, bag.patch_size)]
        score = f"{float(selection.scores[index]):.6g}"
        rows.writerow([rank, index, x, y, bag.patch_size, score, *in_um, mark])
    write_text(path, text.getvalue())
