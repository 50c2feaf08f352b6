"""SparseWSI on a tiny real LLM: what it selects, what the LLM is given, what it answers, what it saves.

N patches, K kept, L = K + T tokens.
"""

import dataclasses
import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from sparsewsi.bags.bag import Bag
from sparsewsi.model import novelty
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.llm import load_llm
from sparsewsi.model.prompt import build_prompt, end_of_turn, text_ids
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import ROWS, SELECTORS
from sparsewsi.model.sparse_wsi import SparseWSI

CONFIG = SparseWSIConfig(feature_dim=24, dim=32, num_tokens=8, heads=4)
CHAT = [{"role": "user", "content": "Which tissue is this?"}]
OPTIONS = ["liver", "a lymph node beside normal colon mucosa", "fat", "no"]


def make_model(folder: Path, config: SparseWSIConfig = CONFIG, lora: bool = False) -> SparseWSI:
    """A model in float32 whose every part has drawn weights, nothing zero or the identity."""
    llm, tokenizer = load_llm(str(folder), device="cpu", dtype=torch.float32)
    torch.manual_seed(0)
    if lora:
        llm = get_peft_model(llm, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    model = SparseWSI(dataclasses.replace(config, llm=str(folder)), llm, tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("llm.") or "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def model(tiny_llm: Path) -> SparseWSI:
    return make_model(tiny_llm)


def make_bag(n: int = 300, dim: int = 24, encoder: str = CONFIG.encoder, seed: int = 1) -> Bag:
    features = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)).half()
    place = torch.arange(n)
    return Bag(features, torch.stack([place % 20, place // 20], 1).int() * 224, 224, 0.5, encoder, "a slide")


def text_of(model: SparseWSI, selection: Selection, chat: list = CHAT, **settings) -> str:
    return "".join(model.answer(selection, chat, **{"max_new_tokens": 12, **settings}))


def words_of(llm: Any) -> Tensor:
    """The LLM's input vectors (V, H)."""
    return llm.get_input_embeddings().weight


def plain_llama(llm: Any, embeds: Tensor, positions: Tensor) -> Tensor:
    """Logits (L, V) of a Llama written out: causal attention over everything before, RoPE at the positions given."""
    config, core = llm.config, llm.model
    width, rate = config.head_dim, config.rope_parameters["rope_theta"]
    angles = positions[:, None].double() * rate ** (-torch.arange(0, width, 2).double() / width)  # (L, width / 2)
    cos, sin = angles.cos().float(), angles.sin().float()

    def normed(x: Tensor, norm: Any) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * norm.weight

    def turned(x: Tensor) -> Tensor:  # (heads, L, width)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = embeds
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    for layer in core.layers:
        y, attention = normed(x, layer.input_layernorm), layer.self_attn
        q, k, v = (
            (y @ p.weight.T).unflatten(-1, (-1, width)).transpose(0, 1)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        share = len(q) // len(k)
        k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
        weights = (turned(q) @ turned(k).transpose(-1, -2) * width**-0.5).masked_fill(future, -torch.inf).softmax(-1)
        x = x + (weights @ v).transpose(0, 1).flatten(1) @ attention.o_proj.weight.T
        y, mlp = normed(x, layer.post_attention_layernorm), layer.mlp
        x = x + (F.silu(y @ mlp.gate_proj.weight.T) * (y @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    return normed(x, core.norm) @ llm.lm_head.weight.T


def greedy_loop(model: SparseWSI, embeds: Tensor, positions: Tensor, steps: int) -> list[int]:
    """Greedy decoding by plain_llama, one whole computation a token, going on at the last position + 1."""
    embeds, positions, ids = embeds[0], positions[0], []
    for _ in range(steps):
        ids.append(int(plain_llama(model.llm, embeds, positions)[-1].argmax()))
        if ids[-1] == end_of_turn(model.tokenizer):
            break
        embeds = torch.cat([embeds, words_of(model.llm)[ids[-1:]]])
        positions = torch.cat([positions, positions.amax()[None] + 1])
    return ids


# ---- what the LLM is given


@torch.no_grad()
@pytest.mark.parametrize("position", ["original", "scaled", "compact"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_at_kept_positions_equal_a_plain_computation(tiny_llm: Path, position: str, attention: str) -> None:
    model = make_model(tiny_llm, dataclasses.replace(CONFIG, position=position, max_position=128))
    model.llm.set_attn_implementation(attention)
    selection = model.select(make_bag())
    prompt = build_prompt(model.tokenizer, CHAT, OPTIONS)
    embeds, positions, mask = model.inputs(selection.tokens, selection.indices, selection.num_patches, prompt)
    assert (positions[0].diff() > 1).any() == (position != "compact")
    logits = model.llm(inputs_embeds=embeds, position_ids=positions, attention_mask=mask).logits[0]
    plain = plain_llama(model.llm, embeds[0], positions[0])
    assert torch.allclose(logits, plain, atol=1e-4)
    moved = plain_llama(model.llm, embeds[0], torch.arange(embeds.shape[1]))
    assert (plain - moved).abs().max() > 1e-2 or position == "compact"  # the comparison can tell positions apart


@torch.no_grad()
def test_without_the_mask_tokens_would_not_see_each_other(model: SparseWSI) -> None:
    """Why inputs() returns a mask: this is what transformers makes of jumping positions without one."""
    selection = model.select(make_bag())
    prompt = build_prompt(model.tokenizer, CHAT)
    embeds, positions, _ = model.inputs(selection.tokens, selection.indices, selection.num_patches, prompt)
    unmasked = model.llm(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits[0]
    assert (unmasked - plain_llama(model.llm, embeds[0], positions[0])).abs().max() > 0.1


@torch.no_grad()
def test_inputs_hold_text_and_visual_tokens_in_their_places(model: SparseWSI) -> None:
    selection = model.select(make_bag())
    prompt = build_prompt(model.tokenizer, CHAT)
    embeds, positions, mask = model.inputs(selection.tokens, selection.indices, selection.num_patches, prompt)
    length, at = len(prompt.ids) + 8, prompt.at
    assert embeds.shape == (1, length, 64)
    assert mask.tolist() == [[1] * length]
    assert torch.equal(positions[0, at : at + 8], at + selection.indices)
    assert positions[0, at + 8] == at + 300
    assert (positions.diff() > 0).all()
    text = words_of(model.llm)[prompt.ids]
    assert torch.equal(torch.cat([embeds[0, :at], embeds[0, at + 8 :]]), text)
    assert torch.equal(embeds[0, at : at + 8], model.project(selection.tokens))


def test_without_any_visual_token_the_text_is_asked_alone(model: SparseWSI) -> None:
    """The text-only row of an evaluation."""
    nothing = Selection(torch.empty(0, dtype=torch.long), torch.zeros(300), torch.empty(0, 32), 300)
    assert text_of(model, nothing)
    found = model.option_probs(nothing, "Which tissue?", OPTIONS)
    assert torch.allclose(found, one_by_one(model, nothing, "Which tissue?", OPTIONS), atol=1e-5)


def test_visual_tokens_are_spread_like_text_embeddings(tiny_llm: Path) -> None:
    llm, tokenizer = load_llm(str(tiny_llm), device="cpu", dtype=torch.float32)
    model = SparseWSI(CONFIG, llm, tokenizer)
    visual = model.project(torch.randn(50, 32) * 9).detach()
    assert float(visual.std()) == pytest.approx(float(words_of(llm).std()), rel=0.02)


def test_trained_parts_stay_float32_in_front_of_a_bfloat16_llm(tiny_llm: Path) -> None:
    llm, tokenizer = load_llm(str(tiny_llm), device="cpu", dtype=torch.bfloat16)
    model = SparseWSI(CONFIG, llm, tokenizer)
    selection = model.select(make_bag())
    prompt = build_prompt(tokenizer, CHAT)
    embeds, *_ = model.inputs(selection.tokens, selection.indices, selection.num_patches, prompt)
    assert embeds.dtype == torch.bfloat16
    embeds.float().square().sum().backward()
    gradient: Any = model.projector[0].weight.grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert gradient.abs().sum() > 0
    assert {value.dtype for value in model.trained_state().values()} == {torch.float32}


# ---- selection


def test_a_selection_is_the_top_scores_and_their_tokens(model: SparseWSI) -> None:
    bag = make_bag()
    selection = model.select(bag)
    x = model.encode(bag.features)
    scores = model.score(x)
    assert torch.allclose(selection.scores, scores)
    assert selection.indices.tolist() == sorted(scores.topk(8).indices.tolist())
    assert torch.allclose(selection.tokens, x[selection.indices], atol=1e-6)
    assert selection.num_patches == 300
    assert not selection.tokens.requires_grad
    assert len(model.select(bag, k=20).indices) == 20
    assert len(model.select(make_bag(5)).indices) == 5


@pytest.mark.parametrize("kind", ["pointwise", "longnet", "none"])
@pytest.mark.parametrize("attention", ["local", "global"])
def test_every_architecture_selects_and_answers(tiny_llm: Path, kind: str, attention: str) -> None:
    model = make_model(tiny_llm, dataclasses.replace(CONFIG, slide_encoder=kind, scorer_attention=attention))
    selection = model.select(make_bag())
    assert selection.tokens.shape == (8, 32)
    assert text_of(model, selection) == text_of(model, model.select(make_bag()))


@pytest.mark.parametrize("selector", SELECTORS)
def test_other_selectors_keep_other_patches_beside_the_same_scores(model: SparseWSI, selector: str) -> None:
    bag = make_bag()
    learned, other = model.select(bag), model.select(bag, selector=selector, seed=3)
    assert other.indices.tolist() == SELECTORS[selector](bag.features, bag.coords, 8, 3).tolist()
    assert other.indices.tolist() != learned.indices.tolist()
    assert torch.equal(other.scores, learned.scores)
    assert torch.allclose(other.tokens, model.encode(bag.features)[other.indices], atol=1e-6)


def test_a_large_slide_goes_through_in_parts(model: SparseWSI) -> None:
    rows: list[int] = []
    hook = model.slide_encoder.register_forward_hook(lambda module, given, out: rows.append(len(given[0])))
    try:
        selection = model.select(make_bag(3 * ROWS + 5))
    finally:
        hook.remove()
    assert max(rows) <= ROWS
    assert selection.scores.shape == (3 * ROWS + 5,)
    assert selection.tokens.shape == (8, 32)


def test_bags_that_cannot_be_selected_from_are_refused_in_words(model: SparseWSI) -> None:
    with pytest.raises(ValueError, match="no patch to select from"):
        model.select(make_bag(0))
    with pytest.raises(ValueError, match="encoded with uni"):
        model.select(make_bag(encoder="uni"))
    with pytest.raises(ValueError, match="dimension 16"):
        model.select(make_bag(dim=16))
    with pytest.raises(ValueError, match="choose one of learned, random"):
        model.select(make_bag(), selector="attention")
    with pytest.raises(ValueError, match="k must be at least 1"):
        model.select(make_bag(), k=0)


# ---- answers


@torch.no_grad()
@pytest.mark.parametrize("position", ["original", "scaled", "compact"])
def test_an_answer_is_greedy_decoding_that_goes_on_at_the_last_position(tiny_llm: Path, position: str) -> None:
    model = make_model(tiny_llm, dataclasses.replace(CONFIG, position=position, max_position=128))
    selection = model.select(make_bag())
    prompt = build_prompt(model.tokenizer, CHAT)
    embeds, positions, _ = model.inputs(selection.tokens, selection.indices, 300, prompt, reserve=16)
    ids = greedy_loop(model, embeds, positions, 16)
    assert len(set(ids)) > 3  # not a loop that any computation would fall into
    assert text_of(model, selection, max_new_tokens=16) == model.tokenizer.decode(ids, skip_special_tokens=True)


@torch.no_grad()
def test_a_left_padded_batch_decodes_as_each_row_alone(model: SparseWSI) -> None:
    """Two chats of different length behind jumping positions, in one generate."""
    selection = model.select(make_bag())
    chats = [CHAT, [{"role": "user", "content": "Is there a carcinoma with necrosis beside normal glands?"}]]
    rows = [
        model.inputs(selection.tokens, selection.indices, 300, build_prompt(model.tokenizer, chat)) for chat in chats
    ]
    longest = max(embeds.shape[1] for embeds, _, _ in rows)
    assert len({embeds.shape[1] for embeds, _, _ in rows}) == 2
    batch = model.llm.generate(  # type: ignore[operator]
        inputs_embeds=torch.cat([F.pad(embeds, (0, 0, longest - embeds.shape[1], 0)) for embeds, _, _ in rows]),
        position_ids=torch.cat([F.pad(positions, (longest - positions.shape[1], 0)) for _, positions, _ in rows]),
        attention_mask=torch.cat([F.pad(mask, (longest - mask.shape[1], 0)) for _, _, mask in rows]),
        max_new_tokens=12,
        do_sample=False,
    )
    for ids, (embeds, positions, _) in zip(batch.tolist(), rows):
        alone = greedy_loop(model, embeds, positions, 12)
        assert ids[: len(alone)] == alone


def test_two_runs_give_the_same_indices_and_text(tiny_llm: Path) -> None:
    first, second = make_model(tiny_llm), make_model(tiny_llm)
    a, b = first.select(make_bag()), second.select(make_bag())
    assert torch.equal(a.indices, b.indices)
    assert text_of(first, a) == text_of(second, b) == text_of(first, first.select(make_bag()))


def test_pieces_come_while_the_rest_is_still_being_generated(model: SparseWSI) -> None:
    gate = threading.Event()

    class WaitForReader(StoppingCriteria):
        """Holds generation from the 20th token on until the reader has seen a piece."""

        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
            if input_ids.shape[1] >= 20:
                assert gate.wait(20)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    criteria = StoppingCriteriaList([WaitForReader()])
    pieces = model.answer(
        model.select(make_bag()), CHAT, max_new_tokens=40, min_new_tokens=40, stopping_criteria=criteria
    )
    first = next(pieces)
    gate.set()
    assert first
    assert len(list(pieces)) > 1


def test_closing_the_iterator_stops_generation_soon(model: SparseWSI) -> None:
    lengths: list[int] = []

    class Count(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
            lengths.append(input_ids.shape[1])
            return torch.zeros(len(input_ids), dtype=torch.bool)

    pieces = model.answer(
        model.select(make_bag()),
        CHAT,
        max_new_tokens=3000,
        min_new_tokens=3000,
        stopping_criteria=StoppingCriteriaList([Count()]),
    )
    next(pieces)
    start = time.perf_counter()
    pieces.close()  # type: ignore[attr-defined]
    assert time.perf_counter() - start < 5
    assert len(lengths) < 2000
    assert not [thread for thread in threading.enumerate() if thread.name == "sparsewsi-answer"]


def test_an_error_while_generating_reaches_the_caller(model: SparseWSI) -> None:
    class Fails(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] >= 3:
                raise ArithmeticError("it went wrong")
            return scores

    with pytest.raises(ArithmeticError, match="it went wrong"):
        text_of(model, model.select(make_bag()), logits_processor=LogitsProcessorList([Fails()]))


def test_bad_messages_are_refused_before_anything_is_generated(model: SparseWSI) -> None:
    with pytest.raises(ValueError, match="the last message must be the user's"):
        model.answer(model.select(make_bag()), [])


def test_a_stop_token_ends_the_answer_and_is_not_shown(model: SparseWSI) -> None:
    end = end_of_turn(model.tokenizer)

    class EndAfterFive(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] == 5:
                scores = torch.full_like(scores, -torch.inf)
                scores[:, end] = 0.0
            return scores

    selection = model.select(make_bag())
    short = text_of(model, selection, logits_processor=LogitsProcessorList([EndAfterFive()]))
    assert "<|im_end|>" not in short
    assert short == text_of(model, selection, max_new_tokens=5)


@torch.no_grad()
def test_every_turn_costs_the_kept_tokens_and_the_text(model: SparseWSI) -> None:
    selection = model.select(make_bag())
    first = text_of(model, selection)
    chat = [*CHAT, {"role": "assistant", "content": first}, {"role": "user", "content": "Sure?"}]
    prompt = build_prompt(model.tokenizer, chat)
    embeds, positions, _ = model.inputs(selection.tokens, selection.indices, 300, prompt, reserve=12)
    assert embeds.shape[1] == 8 + len(prompt.ids)
    ids = greedy_loop(model, embeds, positions, 12)
    assert text_of(model, selection, chat) == model.tokenizer.decode(ids, skip_special_tokens=True)


# ---- multiple choice


@torch.no_grad()
def one_by_one(model: SparseWSI, selection: Selection, question: str, options: list[str]) -> Tensor:
    """option_probs for the "text" scoring, without batch and padding, from the plain computation."""
    prompt = build_prompt(model.tokenizer, [{"role": "user", "content": question}], options)
    embeds, positions, _ = model.inputs(selection.tokens, selection.indices, selection.num_patches, prompt)
    means = []
    for option in options:
        ids = [*text_ids(model.tokenizer, option), end_of_turn(model.tokenizer)]
        answer = words_of(model.llm)[ids]
        going_on = positions[0, -1] + 1 + torch.arange(len(ids))
        logits = plain_llama(model.llm, torch.cat([embeds[0], answer]), torch.cat([positions[0], going_on]))
        likelihood = logits.log_softmax(-1)[-len(ids) - 1 : -1].gather(-1, torch.tensor(ids)[:, None])
        means.append(likelihood.mean())
    return torch.stack(means).softmax(0)


def test_option_probabilities_equal_a_loop_without_padding(model: SparseWSI) -> None:
    selection = model.select(make_bag())
    found = model.option_probs(selection, "Which tissue?", OPTIONS)
    assert found.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(found, one_by_one(model, selection, "Which tissue?", OPTIONS), atol=1e-5)
    assert torch.allclose(found, model.option_probs(selection, "Which tissue?", OPTIONS), atol=0)


def test_a_longer_option_changes_nothing_about_the_likelihood_of_the_others(model: SparseWSI) -> None:
    selection = model.select(make_bag())
    prompt = build_prompt(model.tokenizer, CHAT)
    short = model._mean_log_likelihoods(selection, prompt, ["liver", "fat"])
    padded = model._mean_log_likelihoods(selection, prompt, ["liver", "fat", "a lymph node " * 20])
    assert torch.allclose(short, padded[:2], atol=1e-5)


def test_an_empty_option_has_no_probability(model: SparseWSI) -> None:
    found = model.option_probs(model.select(make_bag()), "Which?", ["liver", "", "fat"])
    assert found[1] == 0
    assert found.sum().item() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="at least one option"):
        model.option_probs(model.select(make_bag()), "Which?", ["", " "])


@torch.no_grad()
def test_letters_are_scored_by_the_next_token(tiny_llm: Path) -> None:
    model = make_model(tiny_llm, dataclasses.replace(CONFIG, option_scoring="letter"))
    selection = model.select(make_bag())
    prompt = build_prompt(model.tokenizer, CHAT, ["liver", "", "fat"])
    embeds, positions, _ = model.inputs(selection.tokens, selection.indices, 300, prompt)
    letters = [model.tokenizer.convert_tokens_to_ids(letter) for letter in "AC"]
    expected = plain_llama(model.llm, embeds[0], positions[0])[-1, letters].softmax(0)
    found = model.option_probs(selection, CHAT[0]["content"], ["liver", "", "fat"])
    assert torch.allclose(found[[0, 2]], expected, atol=1e-5)
    assert found[1] == 0


# ---- files


@pytest.mark.parametrize("lora", [False, True])
def test_save_and_load_change_neither_indices_nor_text(tiny_llm: Path, tmp_path: Path, lora: bool) -> None:
    model = make_model(tiny_llm, lora=lora)
    model.save_pretrained(tmp_path / "model")
    base = load_llm(str(tiny_llm), device="cpu", dtype=torch.float32)
    loaded = SparseWSI.from_pretrained(tmp_path / "model", llm=base)
    assert (tmp_path / "model" / "adapter").is_dir() == lora
    a, b = model.select(make_bag()), loaded.select(make_bag())
    assert torch.equal(a.indices, b.indices)
    assert torch.equal(a.scores, b.scores)
    assert text_of(model, a) == text_of(loaded, b)
    assert torch.equal(model.option_probs(a, "Which?", OPTIONS), loaded.option_probs(b, "Which?", OPTIONS))
    again = SparseWSI.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)  # loads the base itself
    assert text_of(again, again.select(make_bag())) == text_of(model, a)


def test_the_adapter_matters_and_names_no_machine(tiny_llm: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, llm="smollm2-135m")
    model = make_model(tiny_llm, lora=True)
    model.config = config
    model.save_pretrained(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "smollm2-135m"
    assert sorted(path.name for path in (tmp_path / "model" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for path in tmp_path.rglob("*.json"):
        assert str(tiny_llm) not in path.read_text()
    with model.llm.disable_adapter():  # type: ignore[operator]
        without = model.option_probs(model.select(make_bag()), "Which?", OPTIONS)
    assert not torch.allclose(without, model.option_probs(model.select(make_bag()), "Which?", OPTIONS), atol=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_fp16_files_compute_in_float32(tiny_llm: Path, tmp_path: Path, lora: bool) -> None:
    model = make_model(tiny_llm, lora=lora)
    model.save_pretrained(tmp_path / "model", dtype=torch.float16)
    files = list((tmp_path / "model").rglob("*.safetensors"))
    assert len(files) == 1 + lora
    assert {value.dtype for file in files for value in load_file(file).values()} == {torch.float16}
    loaded = SparseWSI.from_pretrained(tmp_path / "model", llm=load_llm(str(tiny_llm), device="cpu"))
    dtypes = {p.dtype for n, p in loaded.named_parameters() if not n.startswith("llm.") or "lora_" in n}
    assert dtypes == {torch.float32}
    assert torch.allclose(loaded.select(make_bag()).scores, model.select(make_bag()).scores, atol=1e-2)


def test_an_artefact_holds_inference_weights_only(tiny_llm: Path, tmp_path: Path) -> None:
    make_model(tiny_llm, lora=True).save_pretrained(tmp_path / "model")
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert {name.split(".")[0] for name in names} == {"slide_encoder", "scorer", "projector"}
    assert not any("sparselearn" in name or "denoiser" in name for name in names)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "adapter",
        "config.json",
        "model.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no temporary folder is left


@pytest.mark.parametrize("extra", ["sparselearn.denoiser.block.out.weight", "denoiser.weight", "llm.lm_head.weight"])
def test_unexpected_weights_are_named(tiny_llm: Path, tmp_path: Path, extra: str) -> None:
    make_model(tiny_llm).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), extra: torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=f"unexpected: {extra}"):
        SparseWSI.from_pretrained(tmp_path / "model")


def test_missing_and_misshapen_weights_are_named(tiny_llm: Path, tmp_path: Path) -> None:
    make_model(tiny_llm, lora=True).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    head = state.pop("scorer.head.weight")
    save_file(state, file)
    with pytest.raises(ValueError, match=r"missing: scorer\.head\.weight"):
        SparseWSI.from_pretrained(tmp_path / "model")
    save_file({**state, "scorer.head.weight": head[:, :3].contiguous()}, file)
    with pytest.raises(ValueError, match=r"scorer\.head\.weight is \(1, 3\)"):
        SparseWSI.from_pretrained(tmp_path / "model")
    save_file({**state, "scorer.head.weight": head}, file)
    adapter = tmp_path / "model" / "adapter" / "adapter_model.safetensors"
    lora = load_file(adapter)
    gone = sorted(lora)[0]
    del lora[gone]
    save_file(lora, adapter)
    with pytest.raises(ValueError, match=f"missing: {gone}"):
        SparseWSI.from_pretrained(tmp_path / "model")


def test_an_adapter_that_was_lost_or_belongs_to_another_model_is_noticed(tiny_llm: Path, tmp_path: Path) -> None:
    make_model(tiny_llm, lora=True).save_pretrained(tmp_path / "model")
    base = load_llm(str(tiny_llm), device="cpu")
    SparseWSI.from_pretrained(tmp_path / "model", llm=base)
    with pytest.raises(ValueError, match="already holds another model's adapter"):
        SparseWSI.from_pretrained(tmp_path / "model", llm=base)
    shutil.rmtree(tmp_path / "model" / "adapter")
    with pytest.raises(ValueError, match="saved with an adapter of the LLM, but now it holds none"):
        SparseWSI.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "adapter/adapter_model.safetensors", "novelty.safetensors"])
def test_damaged_files_are_named(tiny_llm: Path, tmp_path: Path, name: str) -> None:
    model = make_model(tiny_llm, lora=True)
    model.trained_on = novelty.summarise(torch.randn(40, CONFIG.feature_dim), np.arange(40) % 5)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / name).write_bytes((tmp_path / "model" / name).read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        SparseWSI.from_pretrained(tmp_path / "model")


def test_weights_that_are_no_numbers_are_refused(tiny_llm: Path, tmp_path: Path) -> None:
    model = make_model(tiny_llm)
    model.projector[0].bias.data[0] = torch.nan  # type: ignore[index]
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"projector\.0\.bias .* NaN"):
        SparseWSI.from_pretrained(tmp_path / "model")


def test_what_training_features_looked_like_stays_with_the_model(tiny_llm: Path, tmp_path: Path) -> None:
    model = make_model(tiny_llm)
    model.trained_on = novelty.summarise(torch.randn(40, CONFIG.feature_dim), np.arange(40) % 5)
    model.save_pretrained(tmp_path / "model")
    SparseWSI.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / novelty.FILE)["mean"].equal(model.trained_on.mean)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "again").iterdir() if path.is_file()} == {0o644}


def test_a_rename_that_fails_leaves_the_old_model(tiny_llm: Path, tmp_path: Path, monkeypatch) -> None:
    model, rename, calls = make_model(tiny_llm), Path.rename, []
    model.save_pretrained(tmp_path / "model", card="the first")

    def failing(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError("no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path / "model", card="the second")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "README.md").read_text() == "the first"


def test_what_is_no_model_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        SparseWSI.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        SparseWSI.from_pretrained(tmp_path)
    CONFIG.save(tmp_path / "half")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        SparseWSI.from_pretrained(tmp_path / "half")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="owner/no-such-model is neither a folder nor could it be downloaded"):
        SparseWSI.from_pretrained("owner/no-such-model")


def test_a_card_is_kept_given_or_written(tiny_llm: Path, tmp_path: Path) -> None:
    model, card = make_model(tiny_llm), tmp_path / "model" / "README.md"
    model.save_pretrained(tmp_path / "model")
    assert "not for diagnosis" in card.read_text()
    card.write_text("by hand")
    model.save_pretrained(tmp_path / "model")
    assert card.read_text() == "by hand"
    model.save_pretrained(tmp_path / "model", card="given")
    assert card.read_text() == "given"


def test_saving_replaces_a_model_but_nothing_else(tiny_llm: Path, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.svs").touch()
    with pytest.raises(ValueError, match=r"not a model's folder \(it holds a\.svs\)"):
        make_model(tiny_llm).save_pretrained(tmp_path / "slides")
    make_model(tiny_llm, lora=True).save_pretrained(tmp_path / "model")
    make_model(tiny_llm).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "adapter").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "slides"]


def test_a_save_that_fails_leaves_the_old_model(tiny_llm: Path, tmp_path: Path) -> None:
    model = make_model(tiny_llm)
    model.save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(TypeError):
        model.save_pretrained(tmp_path / "model", card=3)  # type: ignore[arg-type]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- the hub


class StandInHub:
    """Stands in for the Hugging Face Hub: keeps repositories as folders, and does what HfApi would be asked to do."""

    root: Path
    private: dict[str, bool]

    def __init__(self, token: str | None = None):
        assert token == "a token"

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        self.private.setdefault(repo_id, private)

    def file_exists(self, repo_id: str, name: str) -> bool:
        return (self.root / repo_id / name).is_file()

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns, ignore_patterns):
        repo = self.root / repo_id
        for old in repo.glob(delete_patterns):
            old.unlink()
        for file in (file for file in Path(folder_path).rglob("*") if file.is_file()):
            if file.name not in (ignore_patterns or ()):
                (repo / file.relative_to(folder_path)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, repo / file.relative_to(folder_path))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(StandInHub, "root", tmp_path / "hub", raising=False)
    monkeypatch.setattr(StandInHub, "private", {}, raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", StandInHub)
    return tmp_path / "hub"


def test_what_is_pushed_is_what_is_loaded(tiny_llm: Path, hub: Path) -> None:
    model = make_model(tiny_llm, lora=True)
    with pytest.raises(ValueError, match="a folder of this machine"):
        model.push_to_hub("owner/name", token="a token")
    model.config = dataclasses.replace(model.config, llm="owner/llm")
    assert model.push_to_hub("owner/name", token="a token") == "https://huggingface.co/owner/name/commit/1"
    assert StandInHub.private == {"owner/name": True}
    assert "not for diagnosis" in (hub / "owner" / "name" / "README.md").read_text()
    loaded = SparseWSI.from_pretrained(hub / "owner" / "name", llm=load_llm(str(tiny_llm), device="cpu"))
    assert loaded.name == "name"
    assert torch.allclose(loaded.select(make_bag()).scores, model.select(make_bag()).scores, atol=1e-2), "fp16"


def test_a_card_written_at_the_hub_stays_and_an_old_adapter_goes(tiny_llm: Path, hub: Path) -> None:
    repo = hub / "owner" / "name"
    (repo / "adapter").mkdir(parents=True)
    (repo / "adapter" / "adapter_model.safetensors").touch()
    (repo / "README.md").write_text("by hand")
    model = make_model(tiny_llm)
    model.config = dataclasses.replace(model.config, llm="owner/llm")
    model.push_to_hub("owner/name", token="a token")
    assert (repo / "README.md").read_text() == "by hand"
    assert list((repo / "adapter").iterdir()) == []
    model.push_to_hub("owner/name", token="a token", card="given")
    assert (repo / "README.md").read_text() == "given"


# ---- the package


def test_public_names_are_where_the_package_says() -> None:
    import sparsewsi

    for name in sparsewsi.__all__:
        assert getattr(sparsewsi, name) is not None
    assert sparsewsi.SparseWSI is SparseWSI
    with pytest.raises(AttributeError, match="no attribute 'SparseLearn'"):
        sparsewsi.SparseLearn  # noqa: B018


# ---- the embedded default


def test_the_embedded_llm_repeats_itself_through_save_and_load(tmp_path: Path) -> None:
    try:
        base = load_llm("smollm2-135m", device="cpu")
    except RuntimeError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    config = SparseWSIConfig(feature_dim=24, dim=32, heads=4)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = SparseWSI(config, get_peft_model(base[0], lora), base[1]).eval()
    bag = make_bag(500)
    selection = model.select(bag)
    assert len(selection.indices) == 32
    text = text_of(model, selection)
    assert text == text_of(model, model.select(bag))
    model.save_pretrained(tmp_path / "model")
    loaded = SparseWSI.from_pretrained(tmp_path / "model", device="cpu")
    again = loaded.select(bag)
    assert torch.equal(again.indices, selection.indices)
    assert text_of(loaded, again) == text
