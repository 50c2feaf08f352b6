"""python -m train.evaluate on a made-up SlideBench file: the table, what is missing, what is refused."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsewsi.bags.bag import Bag, save_bag
from sparsewsi.bags.foreign import load_bag
from sparsewsi.model.sparse_wsi import SparseWSI
from train.data.example import Question, Record
from train.data.slides import FeatureFolder, evenly
from train.eval.items import read_items
from train.eval.running import select_row
from train.evaluate import main
from train.flags import run_command

COHORT = {"TCGA-A7-A0CJ-01Z-00-DX2": 9, "TCGA-A7-A0CE-01Z-00-DX1": 200}


@pytest.fixture
def flags(model: SparseWSI, tmp_path: Path) -> list[str]:
    """Flags for a made-up SlideBench file of three slides, of which the third has no features."""
    (tmp_path / "features").mkdir()
    for number, (name, n) in enumerate(COHORT.items()):
        features = torch.randn(n, 12, generator=torch.Generator().manual_seed(number)).half()
        coords = torch.stack([torch.arange(n) % 10, torch.arange(n) // 10], 1).int() * 224
        save_bag(Bag(features, coords, 224, 0.5, "made-up", "x"), tmp_path / "features" / f"{name}.0123.safetensors")
    lines = ["ID,Slide,Tumor,Broad Category,Narrow Category,Question,A,B,C,D,Answer"]
    for number, slide in enumerate([*COHORT, "TCGA-A7-A0CD-01Z-00-DX1"] * 2):
        lines.append(f"{number},{slide},BRCA,Diagnosis,Grade,Which grade?,low,high,none,,B")
    lines.append("9,x,BRCA,Diagnosis,Grade,Which grade?,low,high,none,,D")
    (tmp_path / "tcga.csv").write_text("\n".join(lines))
    model.save_pretrained(tmp_path / "model")
    paths = {"model": "model", "data": "tcga.csv", "features": "features", "out": "out"}
    return [text for name, path in paths.items() for text in (f"--{name}", str(tmp_path / path))]


def command(patch: pytest.MonkeyPatch, *given: str) -> None:
    patch.setattr(sys, "argv", ["evaluate", *given])
    run_command(main)


def test_a_named_benchmark_from_its_file(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command(monkeypatch, "tcga-1494", *flags)
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(table["rows"]) == ["learned", "random", "uniform", "all", "text-only", "majority"]
    assert {entry["n"] for entry in table["rows"].values()} == {7}
    assert table["rows"]["learned"]["right"] <= 4  # two questions are about a slide without features, one row is bad
    assert table["rows"]["majority"]["right"] == 6
    assert table["rows"]["all"]["by_size"].keys() == {"8 to 15", "128 to 255"}
    assert table["rows"]["all"]["by_family"].keys() == {"Diagnosis", "unreadable"}
    assert table["rows"]["all"]["by_detail"].keys() == {"Grade"}
    notes = " ".join(table["notes"])
    for words in ("tcga.csv, row 7: the answer 'D'", "has 1,494 questions; these files have 7", "2 questions about 1"):
        assert words in notes
    assert (tmp_path / "out" / "table.md").read_text().startswith("| row |")
    assert (tmp_path / "out" / "table.png").exists()
    assert "TCGA-A7-A0CD-01Z-00-DX1 counts as missing" in capsys.readouterr().err

    log = tmp_path / "out" / "records.jsonl"
    lines = log.read_text().splitlines()
    command(monkeypatch, "tcga-1494", *flags, "--skip-missing")  # asks nothing again
    assert log.read_text().splitlines() == lines
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert {entry["n"] for entry in table["rows"].values()} == {4}

    bag = tmp_path / "features" / "TCGA-A7-A0CE-01Z-00-DX1.0123.safetensors"
    bag.rename(bag.with_name("TCGA-A7-A0CD-01Z-00-DX1.safetensors"))  # now it is there, and another one is not
    command(monkeypatch, "tcga-1494", *flags)
    assert len(log.read_text().splitlines()) == len(lines) + 2
    other = tmp_path / "features" / "TCGA-A7-A0CD-01Z-00-DX1.safetensors"
    bag = load_bag(other)
    save_bag(replace(bag, features=-bag.features), other)
    for more, match in (
        (("--prompt", "plain"), "prompt was 'slidechat', is 'plain'"),
        ((), "answers about other features of TCGA-A7-A0CD-01Z-00-DX1"),
        (("--rows", "learned@x"), "'learned@x' is no row"),
        (("--seed", "3"), "--seed is for mosaics"),
    ):
        with pytest.raises(SystemExit):
            command(monkeypatch, "tcga-1494", *flags, *more)
        assert match in capsys.readouterr().err
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(SystemExit):
        command(monkeypatch, "tcga-1494", *flags)
    assert "not what was asked" in capsys.readouterr().err


def test_patches_left_out_by_max_patches_keep_their_places(flags: list[str], tmp_path: Path) -> None:
    model = SparseWSI.from_pretrained(tmp_path / "model")
    slide, n = next((slide, n) for slide, n in COHORT.items() if n > 100)
    record = Record((slide,), Question("Which grade?", "high", ("low", "high")))
    [item] = read_items([record], FeatureFolder(tmp_path / "features"), model.config, max_patches=20)
    selection = select_row(model, item.bag, "learned", None, 0)
    placed = item.place(selection)
    assert len(item.bag.features) == 20
    assert placed.num_patches == n
    assert torch.equal(placed.indices, evenly(n, 20)[selection.indices])  # as in training


def test_written_answers_are_read_twice(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "file", *flags, "--rows", "learned", "--generate", "--max-patches", "50")
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(table["rows"]) == ["learned", "learned, strict", "learned, lenient", "majority"]
    assert {entry["n"] for entry in table["rows"].values()} == {7}
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert len(records) == 4
    assert all(isinstance(record["learned text"], str) for record in records)
    assert {record["n"] for record in records} == {9, 50}


def test_no_features_at_all_is_said(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for bag in (tmp_path / "features").iterdir():
        bag.unlink()
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, "tcga-1494", *flags)
    assert end.value.code == 2
    assert "none of the 3 slides has a feature file" in capsys.readouterr().err
