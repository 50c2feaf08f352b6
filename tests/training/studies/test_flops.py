"""The cost formulas equal torch's counter on the meta device, the paper's 1.70T comes out, latency is measured."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.llm import load_llm
from sparsewsi.model.selector import Scorer
from sparsewsi.model.slide_encoder import SlideEncoder
from sparsewsi.model.sparse_wsi import SparseWSI
from train.sparselearn import Denoiser
from train.studies import flops
from train.studies.flops import QWEN, SMOLLM2, architecture, claims, linear_tera, lines, total


def counted(module: nn.Module, *arguments, **keywords) -> float:
    """MACs of a forward pass by torch's counter, which knows the plain kernel of attention on every device."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*arguments, **keywords)
    return counter.get_total_flops() / 2


def on_meta(llm: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(llm, attn_implementation="eager").eval()


def given(llm: PreTrainedConfig, tokens: int, seen: int) -> dict[str, torch.Tensor]:
    """Tokens and a mask over all that they see; without one the model would look at values, which meta has not."""
    return {
        "inputs_embeds": torch.empty(1, tokens, llm.hidden_size, device="meta"),
        "attention_mask": torch.zeros(1, 1, tokens, seen, device="meta"),
    }


@pytest.mark.parametrize("name", [QWEN, SMOLLM2])
def test_llm_prefill_is_what_the_counter_finds(name: str) -> None:
    llm = architecture(name)
    expected = flops.llm_layers(llm, 130) + flops.llm_head(llm, 1)
    found = counted(on_meta(llm), **given(llm, 130, 130), logits_to_keep=1, use_cache=False)
    assert found == pytest.approx(expected.flops / 2, rel=1e-5)  # the counter also sees RoPE's small outer product


def test_llm_decode_is_what_the_counter_finds() -> None:
    llm = architecture(SMOLLM2)
    model, cache = on_meta(llm), DynamicCache()
    with torch.no_grad():
        model(**given(llm, 130, 130), past_key_values=cache, use_cache=True)
    found = sum(counted(model, **given(llm, 1, 131 + i), past_key_values=cache, use_cache=True) for i in range(3))
    assert found == pytest.approx(flops.llm_decode(llm, 130, answer=4).flops / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "n"), [("pointwise", 100), ("none", 100), *itertools.product(["longnet"], [5, 1000, 3000])]
)
def test_slide_encoder_is_what_the_counter_finds(kind: str, n: int) -> None:
    config = SparseWSIConfig(feature_dim=48, dim=32, slide_encoder=kind, heads=16)
    with torch.device("meta"):
        encoder = SlideEncoder(48, 32, 2, kind, heads=16)
        x = torch.empty(n, 48)
    assert counted(encoder, x) == flops.cost_slide_encoder(config, n).flops / 2


@pytest.mark.parametrize("attention", ["local", "global"])
def test_scorer_and_denoiser_are_what_the_counter_finds(attention: str) -> None:
    config = SparseWSIConfig(dim=64, scorer_dim=32, scorer_attention=attention)
    scorer, denoiser, x = Scorer(64, hidden=32, attention=attention), Denoiser(64, 8, attention), torch.zeros(70, 64)
    assert counted(scorer, x[None]) == flops.cost_scorer(config, 70).flops / 2
    assert counted(denoiser, x[None]) == flops.block(64, 70, attention).flops / 2


def test_projector_is_what_the_counter_finds(tiny_llm: Path) -> None:
    llm, tokenizer = load_llm(str(tiny_llm), dtype=torch.float32)
    config = SparseWSIConfig(llm=str(tiny_llm), encoder="made-up", feature_dim=12, dim=16, heads=4)
    model = SparseWSI(config, llm, tokenizer)
    assert counted(model.projector, torch.empty(9, 16)) == flops.cost_projector(config, llm.config, 9).flops / 2


def test_patch_encoders_cost_what_is_published() -> None:
    assert flops.vit_base().flops / 2 == pytest.approx(17.6e9, rel=0.01)
    assert flops.efficientnet_lite0().flops / 2 == pytest.approx(0.39e9, rel=0.06)


def test_the_papers_convention_is_found_and_what_differs_is_said() -> None:
    assert [t for t in range(500) if round(linear_tera(32 + t), 2) == 1.70] == [98]
    verdicts = {(claim.figure, claim.reproduced) for claim in claims()}
    assert verdicts >= {("1.70T", True), ("1.73T", False), ("133.3T", False)}
    assert all(
        claim.reproduced == (f"{claim.ours:.2f}T" == claim.figure) for claim in claims() if "1.70" in claim.figure
    )
    assert all(abs(claim.ours - 133.3) > 0.5 for claim in claims() if claim.figure == "133.3T")
    assert round(linear_tera(10_240 + 98), 1) == 134.9
    assert flops.encoder_share(1842) > flops.encoder_share(10_240) > 50


def test_lines_add_up_and_sparse_inference_hardly_grows() -> None:
    config, llm = SparseWSIConfig(feature_dim=512, dim=512), architecture(QWEN)
    short, long = (lines(config, llm, n, flops.vit_base()) for n in (64, 100_000))
    sparse, full, training = flops.PATHS
    assert total(short, sparse) == sum(
        (line.cost for line in short if line.path == sparse and line.part != "patch encoder"), flops.Cost()
    )
    assert total(long, sparse).flops < 4 * total(short, sparse).flops
    assert total(long, full).flops > 1000 * total(short, full).flops
    assert total(long, training).flops > total(long, full).flops * 0.99
    few = lines(config, llm, 8, None)
    assert [line.cost for line in few if line.path == sparse and "layers" in line.part] == [
        flops.llm_layers(llm, 8 + 98)
    ]


def test_latency_is_measured_and_memory_is_the_caches(tiny_llm: Path) -> None:
    llm, _ = load_llm(str(tiny_llm), dtype=torch.float32)
    short, long = flops.measure_latency(llm, (1500,), repeats=2)
    assert (short.tokens, short.seconds_ratio, short.kv_ratio) == (32, 1.0, 1.0)
    assert long.kv_bytes == 2 * 2 * (1500 + 98) * 2 * 16 * 4  # keys and values, layers, tokens, KV heads, width, bytes
    assert long.kv_ratio == (1500 + 98) / (32 + 98)
    assert long.seconds_ratio > 2


def test_the_command_writes_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SparseWSIConfig(dim=256).save(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["flops", "--out", str(tmp_path), "--model", str(tmp_path / "model")])
    flops.main()
    record, text = json.loads((tmp_path / "flops.json").read_text()), (tmp_path / "flops.md").read_text()
    assert len(record["systems"]) == 2
    assert all(set(system) == {str(n) for n in flops.PATCHES} for system in record["systems"].values())
    for part in ("patch encoder", "scorer", "denoiser", "projector", "LLM prefill, layers", "LLM decode"):
        assert part in text


@pytest.mark.parametrize(
    ("number", "text"), [(1.6966e12, "1.70T"), (133.3e12, "133T"), (0.39e9, "390M"), (12, "12"), (17.58e9, "17.6G")]
)
def test_numbers_are_readable(number: float, text: str) -> None:
    assert flops.shorten(number) == text
