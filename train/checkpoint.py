"""Checkpoints: the artefact as it would be released, and beside it what only training needs.

    python -m train.checkpoint runs/demo2/checkpoints/last assets/demo-model --demo --note "..." --card card.md \\
        --banks runs/real.safetensors runs/phantom.safetensors

writes a checkpoint's model as a release: weights in fp16, no SparseLearn, with its model card and a summary of the
training features, by which an unusual slide is known (sparsewsi/model/novelty.py).
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sparsewsi.files import replacing_folder
from sparsewsi.model import novelty
from sparsewsi.model.sparse_wsi import SparseWSI
from train.config import Ended
from train.data.bank import load_bank
from train.flags import make_parser, run_command
from train.sharding import gathered, load_optimizer_state, optimizer_state


def save_state(
    folder: Path,
    step: int,
    model: SparseWSI,
    sparselearn: nn.Module,
    optimizer: torch.optim.Optimizer,
    ended: Ended | None = None,
    keep: int = 0,
) -> Path:
    """Write checkpoints/<step>/{model,state} under a temporary name, rename it, then point checkpoints/last at it.

    A process killed at any moment leaves either the old `last` or the new one, never half a checkpoint. Of several
    processes all must call it, as sharded weights are gathered; the first one writes.
    ended: how the run selected, for a stage that starts from here; keep: older checkpoints than so many go, 0: none
    """
    final = folder / "checkpoints" / f"{step:06d}"
    moments = optimizer_state(optimizer)
    with gathered(model):
        if not dist.is_initialized() or dist.get_rank() == 0:
            _write(final, step, model, sparselearn, moments, ended)
            if keep:
                _remove_old(final.parent, keep)
    return final


def _write(
    final: Path, step: int, model: SparseWSI, sparselearn: nn.Module, moments: dict, ended: Ended | None
) -> None:
    """The files of a checkpoint. What a killed process left half written is removed first."""
    for leftover in final.parent.glob(".*.partial"):
        leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover)
    try:
        with replacing_folder(final) as folder:
            (folder / "state").mkdir()
            model.save_pretrained(folder / "model")
            weights = {name: value.contiguous() for name, value in sparselearn.state_dict().items()}
            save_file(weights, folder / "state" / "sparselearn.safetensors")
            _save_moments(moments, folder / "state" / "optimizer.safetensors")
            facts = {"step": step} | ({"ended": asdict(ended)} if ended else {})
            (folder / "state" / "step.json").write_text(json.dumps(facts))
    except (SafetensorError, RuntimeError, OSError) as error:  # three ways to say that the disk is full
        free = shutil.disk_usage(final.parent).free / 1e6
        raise OSError(
            f"the checkpoint of step {step} could not be written to {final.parent} ({free:,.0f} MB are free; "
            f"{str(error).splitlines()[0]}). Make room and run the command again: it goes on from the one before."
        ) from error
    last, link = final.with_name("last"), final.with_name(".last.partial")
    if last.is_dir() and not last.is_symlink():  # the run was copied by something that follows links
        shutil.rmtree(last)
    link.symlink_to(final.name)
    os.replace(link, last)


def _save_moments(moments: dict, path: Path) -> None:
    """Write an optimizer's state_dict but its rates, which flags give. The same moments give the same bytes."""
    tensors = {
        f"{number}.{name}": value.contiguous()
        for number, values in moments["state"].items()
        for name, value in values.items()
    }
    save_file(tensors, path, metadata={"params": json.dumps([group["params"] for group in moments["param_groups"]])})


def _load_moments(path: Path) -> dict:
    """Read what _save_moments wrote."""
    with safe_open(path, "pt") as file:
        params = json.loads(file.metadata()["params"])
    state: dict[int, dict] = {}
    for key, value in load_file(path).items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    return {"state": state, "param_groups": [{"params": numbers} for numbers in params]}


def _remove_old(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, and never the one that `last` points at."""
    last = (checkpoints / "last").resolve()
    complete = sorted(path for path in checkpoints.iterdir() if path.name.isdecimal())
    for path in complete[:-keep]:
        if path != last:
            shutil.rmtree(path)


def read_ended(checkpoint: Path) -> Ended | None:
    """How the stage behind a checkpoint selected; None for a model folder, and where an older program wrote it."""
    path = checkpoint / "state" / "step.json"
    facts = json.loads(path.read_text()) if path.is_file() else {}
    return Ended(**facts["ended"]) if "ended" in facts else None


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    last = folder / "checkpoints" / "last"
    return last.resolve() if (last / "state" / "step.json").is_file() else None


def load_state(checkpoint: Path, sparselearn: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Load what `save_state` wrote beside the model; returns the number of steps done.

    The model itself is read by SparseWSI.from_pretrained(checkpoint / "model").
    """
    sparselearn.load_state_dict(load_file(checkpoint / "state" / "sparselearn.safetensors"))
    if optimizer is not None:
        load_optimizer_state(optimizer, _load_moments(checkpoint / "state" / "optimizer.safetensors"))
    return json.loads((checkpoint / "state" / "step.json").read_text())["step"]


def release(
    checkpoint: Path, folder: Path, *, demo: bool, note: str, card: str | None, banks: Sequence[Path] = ()
) -> None:
    """Write the model of a checkpoint to a folder of its own, in fp16, with its card.

    banks: the feature banks it was trained on; their training split is summed up beside the model.
    """
    model = SparseWSI.from_pretrained(checkpoint / "model")
    model.config = replace(model.config, demo=demo, note=note)
    trained_on = [load_bank(path, "train") for path in banks]
    if trained_on:
        features = torch.cat([bank.features for bank in trained_on])
        model.trained_on = novelty.summarise(features, np.concatenate([bank.sources for bank in trained_on]))
    model.save_pretrained(folder, dtype=torch.float16, card=card)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--demo", action="store_true", help="say wherever answers are shown that this is a demo model")
    parser.add_argument("--note", default="", help="one sentence that is shown with the model")
    parser.add_argument("--card", type=Path, help="the model card, Markdown; default: keep the folder's")
    parser.add_argument("--banks", type=Path, nargs="*", default=[], help="feature banks it was trained on")
    given = parser.parse_args()
    card = given.card.read_text(encoding="utf-8") if given.card else None
    release(given.checkpoint, given.folder, demo=given.demo, note=given.note, card=card, banks=given.banks)


if __name__ == "__main__":
    run_command(main)
