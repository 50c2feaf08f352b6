"""The folder of a run: one writer, one set of settings, lines that survive a kill."""

import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest

from train.run_folder import check_settings, claim, cut_metrics, hold, read_records

ROOT = Path(__file__).resolve().parents[2]


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom train.run_folder import hold\n"
    code += "with hold(Path(sys.argv[1])):\n    print(1, flush=True)\n    input()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None
        other.stdout.readline()  # it holds the folder
        with pytest.raises(ValueError, match="Another run is writing to"), hold(tmp_path):
            pass
        other.kill()
        other.wait()
        with hold(tmp_path):
            pass


def test_other_settings_are_refused_in_a_sentence(tmp_path: Path) -> None:
    claim(tmp_path, {"n": 64, "rows": ("a", "b")})
    claim(tmp_path, {"n": 64, "rows": ("a", "b")})
    with pytest.raises(ValueError, match=r"other settings: n was 64, is 65\. Choose another --out"):
        claim(tmp_path, {"n": 65, "rows": ("a", "b")})
    with pytest.raises(ValueError, match="new was None, is 1"):
        claim(tmp_path, {"n": 64, "rows": ("a", "b"), "new": 1})
    path = tmp_path / "settings.json"
    check_settings(path, {"n": 65, "new": 1}, may_change=("n",), may_be_new=True)
    check_settings(tmp_path / "none.json", {"n": 65})
    path.unlink()
    (tmp_path / "records.jsonl").touch()
    with pytest.raises(ValueError, match="holds answers, but not what was asked"):
        claim(tmp_path, {"n": 64})


def test_records_are_merged_by_number_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "records.jsonl"
    text = '{"number": 0, "a": 1}\n{"number": 1, "a": 2}\n{"number": 0, "b": 3}\n{"number": 2, "a'
    log.write_text(text)
    known = {0: {"number": 0, "a": 1, "b": 3}, 1: {"number": 1, "a": 2}}
    assert read_records(log) == known
    log.unlink()
    assert read_records(log) == {}
    whole = text.rpartition("\n")[0]
    log.with_name("records.jsonl.xz").write_bytes(lzma.compress(whole.encode()))
    assert read_records(log) == known


def test_metrics_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(5)) + '{"loss": 1.2')
    cut_metrics(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    cut_metrics(tmp_path / "none.jsonl", 3)
