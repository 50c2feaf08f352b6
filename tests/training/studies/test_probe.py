"""The probe of encoders: what is held out, what is measured, and with which interval."""

import csv
from pathlib import Path

import numpy as np
import pytest

from train.data.tiles import Tile
from train.studies import probe
from train.studies.probe import COPIES, Features, auc, bootstrap, macro_recall, read_slides, slide_rows, tile_rows


@pytest.fixture
def tiles() -> list[Tile]:
    """Two kinds on six slides, three of them held out."""
    return [
        Tile(Path(f"{number}.png"), kind, f"slide-{slide}", "train" if slide < 3 else "val")
        for slide in range(6)
        for kind in ("adipose", "carcinoma")
        for number in range(4)
    ]


@pytest.fixture
def slides(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "slides.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("slide", "case", "role", "malignant", "carcinoma_present", "neoplasm", "organ_group"))
        for number in range(12):
            fact = "yes" if number % 2 else "no"
            table.writerow(
                (
                    f"s{number}",
                    f"c{number}",
                    "train" if number < 6 else "val",
                    fact,
                    fact,
                    fact,
                    "liver" if fact == "yes" else "brain",
                )
            )
        table.writerow(("hodgkin-HE", "hodgkin", "train", "yes", "no", "yes", "lymph node"))
        table.writerow(("celiac-HE", "celiac-disease", "train", "no", "no", "no", "duodenum"))
    return read_slides(tmp_path)


def test_slides_with_held_out_tiles_are_held_out(slides: list[dict[str, str]]):
    split = {row["case"]: row["split"] for row in slides}
    assert (split["hodgkin"], split["celiac-disease"], split["c0"], split["c6"]) == ("val", "test", "train", "val")


def test_features_that_tell_the_kinds_are_read_and_noise_is_not(
    tiles: list[Tile], slides: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(probe, "DRAWS", 50)
    rng = np.random.default_rng(0)
    kind = np.array([[tile.kind == "carcinoma"] for tile in tiles], float)
    fact = np.array([[row["malignant"] == "yes"] for row in slides], float)
    copy = np.repeat(kind[[tile.split == "train" for tile in tiles]], COPIES, 0)
    told = Features(*(value + 0.01 * rng.normal(size=(len(value), 3)) for value in (kind, copy, fact)))
    noise = Features(*(rng.normal(size=(len(value), 3)) for value in (kind, copy, fact)))
    for accuracy in tile_rows([noise, told], tiles, "val")[0:4:2]:
        assert "2 kinds" in accuracy
        assert "24 of 3" in accuracy
        assert "1.000 (1.000-1.000)" in accuracy
    malignant = slide_rows([noise, told], slides, "val")[0]
    assert "7 of 7" in malignant
    assert "1.000 (1.000-1.000)" in malignant
    same = tile_rows([noise, noise], tiles, "val")[0]
    assert "+0.000 (+0.000 to +0.000)" in same


def test_measures_are_those_of_the_book():
    truth = np.array(["a", "a", "a", "b"])
    assert macro_recall(truth, np.array(["a", "a", "b", "b"])) == pytest.approx((2 / 3 + 1) / 2)
    assert auc(np.array([0, 0, 1]), np.array([0.1, 0.4, 0.3])) == 0.5
    assert np.isnan(auc(np.array([1, 1]), np.array([0.1, 0.4])))


def test_the_bootstrap_draws_groups():
    """All rows of a group are right or wrong together, so that its interval is as wide as that of as many rows."""
    truth = np.ones(40)
    said = np.repeat([1.0, 0.0, 1.0, 0.0], 10)
    drawn = bootstrap(lambda t, s: float((t == s).mean()), truth, [said], np.repeat(np.arange(4), 10))
    assert set(np.unique(drawn)) == {0.0, 0.25, 0.5, 0.75, 1.0}
