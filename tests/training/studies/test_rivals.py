"""The commands that ask one model about the patches of each selector, and a checkpoint on each of its paths."""

import json
import sys
from pathlib import Path

import pytest

from sparsewsi.model.selector import SELECTORS
from train.run_folder import read_records
from train.studies import mil, rivals
from train.studies.cells import Plan


def test_the_gap_command_asks_all_paths_the_same(
    finished: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = finished / "seed-0" / "learned" / "checkpoints" / "last"
    argv = ["rivals", "--checkpoint", str(checkpoint), "--bank", plan.banks[0], "--n", "64", "--questions", "5"]
    monkeypatch.setattr(sys, "argv", [*argv, "--out", str(tmp_path)])
    rivals.main()
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [rows[row]["n"] for row in ("learned", "denoised", "soft")] == [5, 5, 5]
    same = list(read_records(finished / "seed-0/learned/records.jsonl").values())[:5]
    mine = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [record["soft"] for record in mine] == [record["soft"] for record in same]


def test_one_model_is_asked_about_the_patches_of_each_selector(
    finished: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = finished / "seed-0" / "learned" / "checkpoints" / "last" / "model"
    argv = ["rivals", "--model", str(model), "--bank", plan.banks[0], "--n", "64", "--questions", "5"]
    argv += ["--seed", "0", "1"]
    monkeypatch.setattr(mil, "train_mil", lambda banks, *_: (mil.AttentionMIL(banks[0].features.shape[1]), 0.0))
    monkeypatch.setattr(sys, "argv", [*argv, "--mil-banks", *plan.banks, "--out", str(tmp_path)])
    rivals.main()
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert set(rows) == {"learned", *SELECTORS, "text-only", "attention-mil", "majority"}
    assert {entry["n"] for entry in rows.values()} == {10}
    lines = (tmp_path / "table.md").read_text().splitlines()
    [head] = [number for number, line in enumerate(lines) if "the same without dominant" in line]
    assert [line.split(" | ")[0] for line in lines[head + 2 : head + 4]] == ["| learned", "| random"]


def test_differences_from_learned_are_paired() -> None:
    records = [{"answer": "a", "learned": "a", "random": "a" if i % 4 else "b"} for i in range(400)]
    found = rivals.compare(records, "random")
    assert found is not None
    mean, low, high = found
    assert mean == pytest.approx(-0.25)
    assert -0.30 < low < -0.25 < high < -0.20
