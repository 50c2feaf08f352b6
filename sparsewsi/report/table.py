"""patches.csv: the kept patches as a table."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from sparsewsi.bags.bag import Bag, locate
from sparsewsi.files import write_text
from sparsewsi.model.selection import Selection


def write_csv(path: str | Path, bag: Bag, selection: Selection, marks: Mapping[int, str] | None = None) -> None:
    """A row per kept patch, best first: rank, index, x, y, size (level-0 px), score, centre, size in um, mark, slide.

    Positions are those on the patch's own slide, if the bag is of several; slides are numbered from 1. The columns in
    um are empty when the resolution of level 0 is unknown. marks: what the reader said of a patch, by its index:
    "agree" or "disagree".
    """
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    head = ["rank", "index", "x", "y", "size", "score", "centre_x_um", "centre_y_um", "size_um", "mark"]
    rows.writerow([*head, "slide", "slide_number"])
    for place in selection.best_first.tolist():
        rank, index = int(selection.ranks[place]), int(selection.indices[place])
        at = locate(bag, index)
        in_um, mark = ["", "", ""], (marks or {}).get(index, "")
        if at.slide_mpp:
            half = at.patch_size / 2
            in_um = [f"{v * at.slide_mpp:.2f}" for v in (at.x + half, at.y + half, at.patch_size)]
        score = f"{float(selection.scores[index]):.6g}"
        rows.writerow([rank, index, at.x, at.y, at.patch_size, score, *in_um, mark, at.slide, at.number + 1])
    write_text(path, text.getvalue())
