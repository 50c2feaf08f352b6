"""How much memory a training step takes at full size, by arithmetic: nothing is computed, no GPU is needed.

    python -m benchmarks.memory                    # Qwen2.5-7B's architecture, both stages, default flags
    python -m benchmarks.memory --patches 10240 --questions 4

A step (forward, backward, AdamW) of train.stage runs on tensors without content (torch's FakeTensorMode), and what they
would hold is counted, at the worst moment. tests/training/test_memory.py holds the count against the allocations of a
real step of a small model.

What a card needs beyond that: the CUDA context (about 0.5 GiB), what the allocator cannot use (some per cent), and the
workspace of kernels. Here several questions see the bag through a dense mask of L x L entries, which takes more than
the blocks that a GPU is given.
"""

import argparse
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PreTrainedConfig

from benchmarks.gpu import build_stage, take_step
from sparsewsi.files import write_json
from train.eval.table import write_table
from train.stage import computes_again
from train.studies.flops import QWEN, architecture

GIB = 2**30


class Held(TorchDispatchMode):
    """Bytes of these tensors and of all that are made within and still there: now, and at most. Views count once."""

    def __init__(self, kept: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = WeakIdKeyDictionary()
        for tensor in kept:
            self._add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        weakref.finalize(storage, self._drop, size)
        self.now += size
        self.most = max(self.most, self.now)

    def _drop(self, size: int) -> None:
        self.now -= size


class NoStep:
    """In the place of an optimizer, whose step reads numbers that tensors without content have not."""

    def __init__(self, stage: nn.Module) -> None:
        self.stage = stage

    def step(self) -> None:
        """AdamW's moments are counted by their size."""

    def zero_grad(self) -> None:
        self.stage.zero_grad()


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors)


def estimate_step(
    shape: PreTrainedConfig, number: int, n: int, questions: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Bytes at the worst moment of a step of stage `number` on n patches, and what of them lasts: nothing is held.

    weights, moments (AdamW's, of what is trained); the rest are gradients, activations and what passes.
    """
    # Modules are made on the CPU in the dtype that they are to have; torch cannot move those without content.
    stays = patch.object(nn.Module, "to", lambda module, *_, **__: module)
    with FakeTensorMode(), stays:
        llm = AutoModelForCausalLM.from_config(shape, dtype=dtype)
        stage, _ = build_stage(number, llm, torch.device("cpu"))
        stage.model.text_std = 1.0
        kept = [*stage.parameters(), *stage.buffers()]
        with Held(kept) as held:
            length = take_step(stage, NoStep(stage), n, questions)  # type: ignore[arg-type]
    weights = count_bytes(kept)
    moments = 2 * count_bytes(parameter for parameter in stage.parameters() if parameter.requires_grad)
    again, most = computes_again(stage.model.llm), held.most + moments
    return {"tokens": length, "again": again, "bytes": most, "weights": weights, "moments": moments}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, nargs="+", default=[1842, 4096, 10_240])
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path, help="file for the same as JSON")
    given = parser.parse_args()
    rows = []
    for number in (1, 2):
        for n in given.patches:
            for questions in given.questions:
                found = estimate_step(architecture(QWEN), number, n, questions)
                rows.append({"stage": number, "N": n, "questions": questions} | found)
    head = ("stage", "N", "questions", "tokens", "GiB", "of these weights", "AdamW", "activations")
    print(write_table(head, (write_row(row) for row in rows)))
    if given.out:
        write_json(given.out, {"llm": QWEN, "rows": rows})


def write_row(row: dict[str, Any]) -> list[str]:
    """The cells of a row, bytes in GiB."""
    counts = [f"{row[name]:,}" for name in ("stage", "N", "questions", "tokens")]
    sizes = [f"{row[name] / GIB:.1f}" for name in ("bytes", "weights", "moments")]
    return [*counts, *sizes, "computed again" if row["again"] else "kept"]


if __name__ == "__main__":
    main()
