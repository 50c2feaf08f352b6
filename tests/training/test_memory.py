"""The memory that is counted without computing is what a real step allocates, and the full size fits."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

import train.stage as stages
from benchmarks.gpu import build_stage, take_step
from benchmarks.memory import GIB, estimate_step
from train.studies.flops import QWEN, architecture

N, QUESTIONS = 400, 2


def small(layers: int = 3) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip


def allocate(work: Callable[[], object]) -> int:
    """The most bytes that work holds at a time, by the allocations that torch's profiler saw."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    waiting = list(seen.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    found = []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag.name == "Allocation":
            size = event.extra_fields.alloc_size  # type: ignore[union-attr]
            found.append((event.start_time_ns, size))
    held = most = 0
    for _, size in sorted(found):
        held += size
        most = max(most, held)
    return most


@pytest.mark.parametrize("stage_number", [1, 2])
@pytest.mark.parametrize("again", [False, True])
def test_the_count_is_what_a_step_allocates(stage_number: int, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "CHECKPOINT_ABOVE", 10 if again else 10_000)
    llm = AutoModelForCausalLM.from_config(small(), dtype=torch.float32)
    stage, optimizer = build_stage(stage_number, llm, torch.device("cpu"))
    take_step(stage, optimizer, N, QUESTIONS)
    kept = [*stage.parameters(), *stage.buffers()]
    kept += [value for values in optimizer.state.values() for value in values.values()]
    measured = sum(tensor.nbytes for tensor in kept) + allocate(lambda: take_step(stage, optimizer, N, QUESTIONS))
    counted = estimate_step(small(), stage_number, N, QUESTIONS, torch.float32)
    assert counted["again"] is again
    assert counted["bytes"] == pytest.approx(measured, rel=0.05)


@dataclass(frozen=True)
class Card:
    stage: int
    gb: int


@pytest.mark.parametrize("card", [Card(1, 48), Card(2, 80)], ids=["stage 1", "stage 2"])
def test_qwen_of_7_billion_fits_with_the_usual_flags(card: Card) -> None:
    """Of two numbers of layers the rest follows: layers are alike."""
    found = []
    for layers in (1, 2):
        shape = architecture(QWEN)
        shape.num_hidden_layers = layers
        shape.layer_types = shape.layer_types[:layers]
        found.append(estimate_step(shape, card.stage, 10_240, 4)["bytes"])
    whole = found[0] + (architecture(QWEN).num_hidden_layers - 1) * (found[1] - found[0])
    assert 14 * GIB < whole < 0.9 * card.gb * 1e9  # a tenth for what the count leaves out
