"""The commands of docs/train.md for slides and questions of one's own, on made-up files in SlideChat's formats."""

import csv
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import train.checkpoint
import train.data.questions
import train.evaluate
import train.run
from train.flags import run_command

ROOT = Path(__file__).resolve().parents[2]
MAIN = {module.__name__: module.main for module in (train.checkpoint, train.data.questions, train.evaluate, train.run)}
SLIDES = [f"TCGA-A7-A0{name}-01Z-00-DX1" for name in ("CD", "CE", "CF", "CG")]
WIDTH = 512  # of CONCH's features, in SlideChat's files
TISSUES = ("liver", "fat", "colon mucosa", "a lymph node")


def read_commands() -> list[list[str]]:
    """The words of each command, in order."""
    section = (ROOT / "docs" / "train.md").read_text().partition("## On slides and questions of your own")[2]
    block = re.search(r"```sh\n(.*?)```", section, re.S)
    assert block is not None
    return [shlex.split(line) for line in block[1].replace("\\\n", " ").splitlines()]


@pytest.fixture
def folder(tmp_path: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with captions, questions, a benchmark and features."""
    (tmp_path / "features").mkdir()
    captions, questions, benchmark = [], [], []
    for number, slide in enumerate(SLIDES):
        rng = np.random.default_rng(number)
        rows = rng.normal(number, 1, (70 + 9 * number, WIDTH))
        with (tmp_path / "features" / f"{slide}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([[f"{value:.3f}" for value in row] for row in rows])
        tissue, image = TISSUES[number], f"TCGA-BRCA/{slide}.csv"
        told = [("Describe this slide.", f"The slide shows {tissue}.")]
        asked = [("Which tissue is this?\nA. liver\nB. fat\nC. colon mucosa\nD. a lymph node", "ABCD"[number])]
        for where, turns in ((captions, told), (questions, asked)):
            talk = [{"from": "human", "value": f"<image>\n{turns[0][0]}"}, {"from": "gpt", "value": turns[0][1]}]
            where.append({"id": slide, "image": [image], "conversations": talk})
        benchmark.append(
            [number, slide, "BRCA", "Microscopy", "Tissue", "Which tissue is this?", *TISSUES, "ABCD"[number]]
        )
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "qa.json").write_text(json.dumps(questions))
    with (tmp_path / "SlideBench-VQA-TCGA.csv").open("w", newline="") as file:
        head = ["ID", "Slide", "Tumor", "Broad Category", "Narrow Category", "Question", *"ABCD", "Answer"]
        csv.writer(file).writerows([head, *benchmark])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(llm: Path, stage: int) -> list[str]:
    """Flags that make a stage small enough for a test."""
    flags = {"steps": 8, "accumulation": 2, "checkpoint_every": 2, "keep": 0, "lora_rank": 2, "lora_alpha": 4}
    flags |= {"llm": llm, "dim": 16, "num_tokens": 6} if stage == 1 else {}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert words[:2] == ["python", "-m"]
    monkeypatch.setattr(sys, "argv", words[2:])
    run_command(MAIN[words[2]])


def kill(words: list[str], out: Path) -> None:
    """Start a training and kill it between two checkpoints."""
    import torch

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *words[1:]], env=environment, **quiet)  # type: ignore[call-overload]
    log = out / "metrics.jsonl"
    while not (log.is_file() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(log.read_text().splitlines()) < 8, "it ended before it was killed"


def digests(checkpoint: Path) -> dict[str, str]:
    """Of all that the last checkpoint holds."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    return {str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_from_captions_to_a_benchmark_with_a_kill_in_each_stage(
    folder: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    check, first, second, release, evaluate = read_commands()
    with pytest.raises(SystemExit) as end:
        run(check, monkeypatch)
    assert not end.value.code, capsys.readouterr().out
    for stage, words in ((1, first), (2, second)):
        words += small(tiny_llm, stage)
        out = Path(words[words.index("--out") + 1])
        kill(words, out)
        run(words, monkeypatch)  # goes on
        whole = [word if word != str(out) else f"{out}-whole" for word in words]
        run(whole, monkeypatch)
        resumed, never_killed = (
            digests((folder / run_folder / "checkpoints/last").resolve()) for run_folder in (out, f"{out}-whole")
        )
        assert resumed == never_killed
        assert len((out / "metrics.jsonl").read_text().splitlines()) == 8
    assert (folder / "features" / f"{SLIDES[0]}.safetensors").is_file()  # CSV was converted once
    run(release, monkeypatch)
    run(evaluate, monkeypatch)
    table = json.loads(Path("runs/tcga/table.json").read_text())
    assert table["rows"]["learned"]["n"] == 4
    assert "Hardness at the end is" in capsys.readouterr().out


def test_two_processes_train_on_files_as_one_does(
    folder: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*read_commands()[1], *small(tiny_llm, 1), "--tokens_per_pass", "1", "--steps", "2"]
    run(words, monkeypatch)
    two = [word if word != "runs/stage1" else "runs/two" for word in words]
    two[two.index("--accumulation") + 1] = "1"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *two[1:]], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (
        [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        for out in ("runs/stage1", "runs/two")
    )
    assert other[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-4)
    assert [step["loss"] for step in other] == pytest.approx([step["loss"] for step in one], rel=5e-3)
