"""Checkpoints are whole whatever killed the run, and a release is a model with its card."""

import itertools
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsewsi.model import novelty
from sparsewsi.model.sparse_wsi import SparseWSI
from train.checkpoint import latest, load_state, release, save_state
from train.config import TrainConfig
from train.data.bank import load_bank
from train.run import train


class Saved(torch.nn.Linear):
    """As much of a model as a checkpoint needs."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        save_file(self.state_dict(), folder / "model.safetensors")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    part = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(part.parameters())

    def save(step: int) -> None:
        torch.nn.init.constant_(part.weight, step)
        save_state(tmp_path, step, Saved(2, 2), part, optimizer)  # type: ignore[arg-type]

    def newest() -> int:
        checkpoint = latest(tmp_path)
        assert checkpoint is not None
        step = load_state(checkpoint, part, optimizer)
        assert (part.weight == step).all()
        assert (checkpoint / "model" / "model.safetensors").is_file()
        return step

    save(1)
    for operation in itertools.count(1):
        before = newest()
        child = os.fork()
        if child == 0:
            left = itertools.count(operation - 1, -1)

            def kill(event: str, arguments: tuple, left: itertools.count = left) -> None:
                if event.split(".")[0] in ("open", "os", "shutil") and str(tmp_path) in str(arguments):  # noqa: SIM102
                    if next(left) == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            try:
                sys.addaudithook(kill)
                save(before + 1)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        assert newest() in (before, before + 1), operation
    assert newest() == before + 1
    assert operation > 10
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_release_knows_the_slides_it_was_trained_on(settings: TrainConfig, bank_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "released"
    checkpoint = train(replace(settings, steps=1, dense=1.0))
    bank = load_bank(bank_file, "train")
    with pytest.raises(ValueError, match="at least 4 slides, got 3"):
        release(checkpoint, folder, demo=True, note="A note.", card="# Card", banks=[bank_file])
    assert not folder.exists()
    release(checkpoint, folder, demo=True, note="A note.", card="# Card")
    assert novelty.load(folder) is None
    novelty.save(novelty.summarise(bank.features, np.arange(len(bank.kinds)) % 5), folder)
    release(checkpoint, folder, demo=True, note="Another.", card=None)  # the folder is replaced, summary and all
    model = SparseWSI.from_pretrained(folder)
    assert model.config.note == "Another."
    assert novelty.load(folder) is None
