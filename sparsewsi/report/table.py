"""patches.csv: the kept patches as a table."""

import csv
import io
from pathlib import Path

from sparsewsi.bags.bag import Bag
from sparsewsi.files import write_text
from sparsewsi.model.selection import Selection


def write_csv(path: str | Path, bag: Bag, selection: Selection) -> None:
    """One row per kept patch, best first: rank, index, x, y, size (level-0 px), score, centre and size in um.

    The columns in um are empty when the resolution of level 0 is unknown.
    """
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["rank", "index", "x", "y", "size", "score", "centre_x_um", "centre_y_um", "size_um"])
    for place in selection.best_first.tolist():
        rank, index = int(selection.ranks[place]), int(selection.indices[place])
        x, y = bag.coords[index].tolist()
        in_um = ["", "", ""]
        if bag.slide_mpp:
            half = bag.patch_size / 2
            in_um = [f"{v * bag.slide_mpp:.2f}" for v in (x + half, y + half, bag.patch_size)]
        rows.writerow([rank, index, x, y, bag.patch_size, f"{float(selection.scores[index]):.6g}", *in_um])
    write_text(path, text.getvalue())
