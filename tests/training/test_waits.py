"""A step of training never waits for its GPU: nothing in it reads what lies there or sends what it then waits for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.align import Alignment
from train.attention import set_attention
from train.config import TrainConfig
from train.data import packing
from train.data.bank import Bank, load_bank
from train.data.example import Example, Question
from train.data.real import SlideFacts, SlideStream
from train.run import read_metrics, take_step
from train.stage import StageModule, build, make_optimizer

READS = {  # operators whose result has a size or a value that the host must know
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount"),
    *("unique_consecutive", "repeat_interleave"),
}
MAKERS = ("tensor", "as_tensor")  # from values of the host, which a GPU has to be sent


class Gpu(TorchDispatchMode):
    """The CPU as a GPU that is watched: it holds what was sent to it, and what comes of that; `waits` tells of what
    lets the host wait. Memory is told by its storage, which is held so that no other one gets its name.
    """

    def __init__(self, module: nn.Module, patch: pytest.MonkeyPatch):
        super().__init__()
        self.held: dict[int, Any] = {}
        self.waits: list[str] = []
        for tensor in (*module.parameters(), *module.buffers()):
            self.take(tensor)
        for name in ("cpu", "numpy", "tolist"):
            patch.setattr(Tensor, name, self.watch_read(name, getattr(Tensor, name)))
        patch.setattr(Tensor, "to", self.watch_sent(Tensor.to))
        for name in MAKERS:
            patch.setattr(torch, name, self.watch_made(name, getattr(torch, name)))

    def take(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.held[storage._cdata] = storage
        return tensor

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.held

    def watch_read(self, name: str, real: Callable) -> Callable:
        def read(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
            if self.holds(tensor):
                self.waits.append(name)
            return real(tensor, *arguments, **keywords)

        return read

    def watch_sent(self, real: Callable) -> Callable:
        def send(tensor: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            found = real(tensor, *arguments, **keywords)
            places = [each for each in (*arguments, *keywords.values()) if isinstance(each, torch.device)]
            if not places or self.holds(tensor):
                return found
            if not keywords.get("non_blocking"):
                self.waits.append("to(device)")
            return self.take(found.clone() if found is tensor else found)

        return send

    def watch_made(self, name: str, real: Callable) -> Callable:
        def make(*arguments: Any, **keywords: Any) -> Tensor:
            if keywords.get("device") is not None:
                self.waits.append(f"{name}(device=)")
            return real(*arguments, **keywords)

        return make

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        here = any(self.holds(each) for each in given)
        name = func.overloadpacket.__name__
        if here and name in READS:
            self.waits.append(name)
        if here and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            for index in tree_leaves(args[1]):
                if isinstance(index, Tensor) and (index.dtype in (torch.bool, torch.uint8) or not self.holds(index)):
                    self.waits.append(f"{name} by a mask or from the host")
        found = func(*args, **(kwargs or {}))
        if here:
            for each in tree_leaves(found):
                if isinstance(each, Tensor):
                    self.take(each)
        return found


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], Gpu]:
    return lambda module: Gpu(module, monkeypatch)


def make_examples(settings: TrainConfig) -> list[Example]:
    generator, examples = torch.Generator().manual_seed(0), []
    for n in (40, 30):
        asked = (Question("Which tissue?", "mucin", ("mucin", "blood")), Question("Which organ?", "colon"))
        features = torch.randn(n, 24, generator=generator).half()
        examples.append(Example(features, torch.arange(n), n, asked[: settings.questions_per_bag]))
    return examples


def make_alignment(stage: StageModule, bank_file: Path) -> Alignment:
    """All that a step may have beside its loss: labelled patches, and real slides with facts."""
    labelled = load_bank(bank_file, "train")
    facts = {"organ": "colon", "malignant": "Yes", "neoplasm": "Yes", "carcinoma": "No"}
    slides = tuple(SlideFacts(name, name, "train", facts) for name in ("one", "two"))
    sources, kinds = np.repeat(["one", "two"], 40), np.full(80, "0")
    bank = Bank(torch.randn(80, 24).half(), kinds, sources, "real", labelled.encoder)
    return Alignment(stage.model, (labelled,), SlideStream(bank, slides, 0, 1))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("step", [0, 2, 7], ids=["dense", "annealing", "hard"])
@pytest.mark.parametrize("one", [False, True], ids=["several questions", "one question"])
def test_a_step_waits_for_nothing(
    settings: TrainConfig,
    bank_file: Path,
    tmp_path: Path,
    watched: Callable[[nn.Module], Gpu],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    step: int,
    one: bool,
) -> None:
    config = replace(settings, steps=8, hard=0.25, diversity=1.0, scorer_relative=True, kernel="laplace")
    config = replace(config, stage=1, questions_per_bag=1 if one else 2, tokens_per_pass=1 if one else 768)
    model, sparselearn = build(config, 24, "made-up")
    if number == 2:
        model.save_pretrained(tmp_path / "start")
        config = replace(config, stage=2, init=str(tmp_path / "start"), keep_aligned=0.0)
        model, sparselearn = build(config, 24, "made-up")
    stage = StageModule(model, sparselearn).train()
    if number == 1:
        config = replace(config, keep_aligned=0.3)
        stage.alignment = make_alignment(stage, bank_file)
    assert set_attention(model.llm)
    real = packing.attention_mask
    # One question as on a GPU; several with a dense mask, as a BlockMask is compiled there.
    monkeypatch.setattr(packing, "attention_mask", lambda packed, device, *_: real(packed, device, one, one))
    optimizer, examples = make_optimizer(stage, config), make_examples(config)
    assert model.text_std > 0  # found once
    before = model.projector[0].weight.clone()  # type: ignore[union-attr, index, operator]
    gpu = watched(stage)
    if stage.alignment is not None:
        for word in stage.alignment.words.values():
            gpu.take(word)
    with gpu:
        metrics = take_step(stage, optimizer, examples, config, step, None)
    assert gpu.waits == []
    assert not torch.equal(before, model.projector[0].weight)  # type: ignore[arg-type, union-attr, index]
    with gpu:
        [found] = read_metrics([metrics])
    assert found["skipped"] == 0
    assert found["loss"] > 0
    assert gpu.waits == ["tolist"]  # the one look at a log step


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (lambda x, _: float(x.detach().sum()), "_local_scalar_dense"),
        (lambda x, _: x.sum().item(), "_local_scalar_dense"),
        (lambda x, _: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x, _: (x * 2).tolist(), "tolist"),
        (lambda x, _: (x * 2).cpu(), "cpu"),
        (lambda x, _: x.detach().numpy(), "numpy"),
        (lambda x, _: (x > 0).nonzero(), "nonzero"),
        (lambda x, _: x[x > 0], "index by a mask or from the host"),
        (lambda x, host: x[host], "index by a mask or from the host"),
        (lambda x, host: host.to(x.device), "to(device)"),
        (lambda x, _: torch.tensor([1.0], device=x.device), "tensor(device=)"),
        (lambda x, host: x[host.to(x.device, non_blocking=True)].sum(), None),
        (lambda _, host: (host[host > 0].tolist(), float(host.sum())), None),
        (lambda x, _: torch.where(x > 0, x, 0.0).sum(), None),
    ],
)
def test_what_waits_is_seen(watched: Callable[[nn.Module], Gpu], what: Callable, told: str | None) -> None:
    module = nn.Linear(4, 3)
    host = torch.tensor([2, 0, 1])
    gpu = watched(module)
    with gpu:
        what(module(torch.ones(4).to(torch.device("cpu"), non_blocking=True)), host)
    assert gpu.waits == ([] if told is None else [told])


def test_a_step_on_the_way_back_is_watched_too(watched: Callable[[nn.Module], Gpu]) -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * (2 if float(gradient.sum()) else 0)

    module = nn.Linear(4, 3)
    gpu = watched(module)
    with gpu:
        Reads.apply(module(torch.ones(4))).sum().backward()  # type: ignore[union-attr]
    assert gpu.waits == ["_local_scalar_dense"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("step", [0, 2, 7], ids=["dense", "annealing", "hard"])
def test_a_step_waits_for_nothing_on_a_gpu(settings: TrainConfig, step: int) -> None:
    """CUDA's own word for it; the first step compiles and allocates."""
    config = replace(settings, steps=8, hard=0.25, diversity=1.0, scorer_relative=True)
    model, sparselearn = build(config, 24, "made-up")
    stage = StageModule(model, sparselearn.to(model.device)).train()
    optimizer, examples = make_optimizer(stage, config), make_examples(config)
    examples = [replace(example, features=example.features.pin_memory()) for example in examples]
    take_step(stage, optimizer, examples, config, step, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_step(stage, optimizer, examples, config, step, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
