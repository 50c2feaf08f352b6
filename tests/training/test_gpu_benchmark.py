"""The script for a GPU runs on any machine with a tiny LLM, and its rows hold what they promise."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu


def test_the_gpu_script_runs_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--size", "tiny", "--patches", "16", "--questions", "2", "--repeats", "1", "--no-tests"]
    monkeypatch.setattr(sys, "argv", ["gpu", *flags, "--out", str(tmp_path)])
    gpu.main()
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert [(row["stage"], row["N"], row["questions"]) for row in record["steps"]] == [(1, 16, 2), (2, 16, 2)]
    for row in record["steps"]:
        length = 6 + 16 + 2 * (76 + 16)
        assert row["tokens_per_second"] == pytest.approx(length / row["seconds"])
        assert row["activations"] == "kept"
    assert [row["tokens"] for row in record["tokens"]] == [32, 256]
    assert record["encoder"][0]["images_per_second"] > 0
    assert "| stage | N | questions |" in (tmp_path / "gpu.md").read_text()
