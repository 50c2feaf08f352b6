"""patches.csv: a spreadsheet can read it, and its micrometres are true."""

import csv

from sparsewsi.bags.bag import Bag
from sparsewsi.report.table import write_csv


def test_csv_has_a_row_per_patch_with_true_micrometres(tmp_path, bag, selection):
    write_csv(tmp_path / "p.csv", bag, selection)
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert (rows[2]["index"], rows[2]["x"], rows[2]["y"], rows[2]["size"]) == ("4", "200", "100", "100")
    assert (float(rows[2]["centre_x_um"]), float(rows[2]["centre_y_um"]), float(rows[2]["size_um"])) == (62.5, 37.5, 25)


def test_csv_leaves_micrometres_empty_where_the_scale_is_unknown(tmp_path, bag, selection):
    write_csv(tmp_path / "p.csv", Bag(bag.features, bag.coords, 100, None, bag.encoder, bag.slide), selection)
    assert {row["size_um"] for row in csv.DictReader((tmp_path / "p.csv").open())} == {""}
