"""The demonstration's commands one after another, on made-up features: each takes what the one before has written."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train.checkpoint
import train.polish
import train.run
import train.sharpen
from sparsewsi.bags.bag import Bag, save_bag
from sparsewsi.model.sparse_wsi import SparseWSI
from sparsewsi.phantom import write_phantom
from train.data.kinds import BACKGROUNDS, NEEDLES
from train.data.phantoms import phantom_files
from train.data.real import KINDS, SlideFacts
from train.flags import run_command

ROOT = Path(__file__).resolve().parents[2]
WIDTH, VIEWS, PATCHES = 24, 3, 14
FACTS = {
    "a": {"malignant": "Yes", "carcinoma": "Yes", "neoplasm": "Yes", "organ": "liver"},
    "b": {"malignant": "No", "carcinoma": "No", "neoplasm": "No", "organ": "colon"},
    "c": {"malignant": "No", "carcinoma": "No", "neoplasm": "Yes", "organ": "pancreas"},
    "d": {"malignant": "Yes", "carcinoma": "No", "neoplasm": "Yes", "organ": "stomach"},
}


def draw_features(kinds: np.ndarray, seed: int) -> torch.Tensor:
    """(N, WIDTH) float16: every kind has its place, a patch lies near it."""
    places = {kind: np.random.default_rng(list(kind.encode())).normal(0, 1, WIDTH) for kind in set(kinds.tolist())}
    noise = np.random.default_rng(seed).normal(0, 0.3, (len(kinds), WIDTH))
    return torch.tensor(np.stack([places[kind] for kind in kinds.tolist()]) + noise).half()


def write_tiles(path: Path, origin: str) -> None:
    """A bank as of python -m train.data.mosaic bank."""
    kinds = np.repeat([*BACKGROUNDS[origin], *NEEDLES[origin]], 24)
    metadata = {
        "kinds": json.dumps(kinds.tolist()),
        "sources": json.dumps([f"{origin}-{i % 3}" for i in range(len(kinds))]),
        "splits": json.dumps(["test" if i % 4 == 3 else "train" for i in range(len(kinds))]),
        "encoder": "made-up",
        "origin": origin,
    }
    save_file({"features": draw_features(kinds, 0)}, path, metadata)


def write_slides(path: Path, seed: int) -> None:
    """A bank as of python -m train.data.real bank, or of python -m train.unseen."""
    names = np.repeat(list(FACTS), VIEWS * PATCHES)
    copies = np.tile(np.repeat(np.arange(VIEWS).astype(str), PATCHES), len(FACTS))
    facts = [SlideFacts(name, name, "train", dict.fromkeys(KINDS, "") | told) for name, told in FACTS.items()]
    metadata = {
        "kinds": json.dumps(copies.tolist()),
        "sources": json.dumps(names.tolist()),
        "splits": json.dumps(["train"] * len(names)),
        "encoder": "made-up",
        "origin": "slides",
        "facts": json.dumps([asdict(slide) for slide in facts]),
    }
    save_file({"features": draw_features(names, seed)}, path, metadata)


def write_phantoms(folder: Path) -> None:
    """Two of train and their made-up features."""
    folder.mkdir()
    for seed in (1000, 1003):
        slide, cached = phantom_files(folder, seed)
        truth = write_phantom(slide, seed=seed, size=2048)
        coords = torch.tensor([[x, y] for y in range(0, 1800, 224) for x in range(0, 1800, 224)], dtype=torch.int32)
        kinds = np.asarray(truth.label_at(coords.numpy(), 224))
        save_bag(Bag(draw_features(kinds, seed), coords, 224, 0.5, "made-up", f"phantom-{seed}"), cached)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with all that is encoded before training begins."""
    for origin in ("real", "phantom"):
        write_tiles(tmp_path / f"{origin}.safetensors", origin)
    write_slides(tmp_path / "slides.safetensors", 1)
    write_slides(tmp_path / "unseen.safetensors", 2)
    write_phantoms(tmp_path / "phantoms")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(module: object, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *words.split()])  # type: ignore[attr-defined]
    run_command(module.main)  # type: ignore[attr-defined]


def kill(words: str, log: Path) -> None:
    """Start polishing and kill it between two checkpoints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "train.polish", *words.split()]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (log.is_file() and len(log.read_text().splitlines()) > 10):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_from_banks_to_a_release_with_a_kill_in_the_last_stage(
    folder: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    banks = "--banks real.safetensors phantom.safetensors --slides slides.safetensors"
    small = "--steps 4 --accumulation 1 --checkpoint_every 2 --patches 20"
    first = f"{small} --align 10 --llm {tiny_llm} --dim 16 --num_tokens 6"
    run(train.run, f"demo-stage1 {banks} --out demo1 {first}", monkeypatch)
    run(train.run, f"demo-stage2 {banks} --out demo2 {small} --init demo1/checkpoints/last", monkeypatch)
    run(train.sharpen, f"demo2 sharp {banks} --phantoms phantoms --steps 4 --patches 40 --average 2", monkeypatch)

    few = "--steps 20 --accumulation 1 --checkpoint_every 4 --average 2"
    rest = f"{banks} --unseen unseen.safetensors --phantoms phantoms {few}"
    kill(f"sharp polish {rest}", folder / "polish" / "metrics.jsonl")
    run(train.polish, f"sharp polish {rest}", monkeypatch)
    run(train.polish, f"sharp whole {rest}", monkeypatch)
    resumed, never_killed = (load_file(folder / name / "model" / "model.safetensors") for name in ("polish", "whole"))
    assert all(torch.equal(value, never_killed[name]) for name, value in resumed.items())
    steps = [json.loads(line) for line in (folder / "polish" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(20))
    assert all(np.isfinite(step["loss"]) and step["n"] == 6 for step in steps)

    before = load_file(folder / "sharp" / "model.safetensors")
    changed = {name.split(".")[0] for name, value in resumed.items() if not torch.equal(value, before[name])}
    assert changed == {"projector"}, "polishing leaves alone what is kept"
    run(
        train.checkpoint,
        "polish release --demo --note Small. --banks real.safetensors phantom.safetensors",
        monkeypatch,
    )
    assert SparseWSI.from_pretrained(folder / "release").config.diversity == 30
