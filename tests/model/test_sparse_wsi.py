"""SparseWSI on a tiny real LLM: what it selects, what the LLM is given, what it answers.

N patches, K kept, L = K + T tokens.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from sparsewsi.bags.bag import Bag
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.limits import Limits
from sparsewsi.model.llm import load_llm
from sparsewsi.model.prompt import build_prompt, end_of_turn, text_ids
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import ROWS, SELECTORS, hard_topk, weigh_by_question
from sparsewsi.model.sparse_wsi import SparseWSI
from sparsewsi.model.words import pick_words

CONFIG = SparseWSIConfig(feature_dim=24, dim=32, num_tokens=8, heads=4)
CHAT = [{"role": "user", "content": "Which tissue is this?"}]
OPTIONS = ["liver", "a lymph node beside normal colon mucosa", "fat", "no"]
MakeModel = Callable[..., SparseWSI]


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> SparseWSI:
    return make_model()


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
def test_logits_at_kept_positions_equal_a_plain_computation(
    make_model: MakeModel, position: str, attention: str
) -> None:
    model = make_model(dataclasses.replace(CONFIG, position=position, max_position=128))
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
def test_every_architecture_selects_and_answers(make_model: MakeModel, kind: str, attention: str) -> None:
    model = make_model(dataclasses.replace(CONFIG, slide_encoder=kind, scorer_attention=attention))
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
    with pytest.raises(ValueError, match="choose one of learned, topk, mmr, random"):
        model.select(make_bag(), selector="attention")
    with pytest.raises(ValueError, match="k must be at least 1"):
        model.select(make_bag(), k=0)


# ---- answers


@torch.no_grad()
@pytest.mark.parametrize("position", ["original", "scaled", "compact"])
def test_an_answer_is_greedy_decoding_that_goes_on_at_the_last_position(make_model: MakeModel, position: str) -> None:
    model = make_model(dataclasses.replace(CONFIG, position=position, max_position=128))
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


def test_two_runs_give_the_same_indices_and_text(make_model: MakeModel) -> None:
    first, second = make_model(), make_model()
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


def test_a_merged_adapter_answers_as_it_did_beside_the_weights(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(lora=True)
    selection = model.select(make_bag())
    plain = make_model().option_probs(selection, "Which tissue?", OPTIONS)
    text, probs = text_of(model, selection), model.option_probs(selection, "Which tissue?", OPTIONS)
    assert not torch.allclose(probs, plain, atol=1e-3)
    model.save_pretrained(tmp_path / "beside")
    base = model.llm.get_base_model().model.layers[0].self_attn.q_proj.weight.clone()  # type: ignore[operator, union-attr]
    assert model.merge().merge().merged  # once, however often it is said
    assert not torch.equal(base, model.llm.get_base_model().model.layers[0].self_attn.q_proj.weight)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(model.option_probs(selection, "Which tissue?", OPTIONS), probs, rtol=0, atol=1e-5)
    assert text_of(model, selection) == text
    model.save_pretrained(tmp_path / "merged")
    files = [path.relative_to(tmp_path / "beside") for path in (tmp_path / "beside").rglob("*") if path.is_file()]
    assert all((tmp_path / "merged" / file).read_bytes() == (tmp_path / "beside" / file).read_bytes() for file in files)
    loaded = SparseWSI.from_pretrained(tmp_path / "merged", merge=True, dtype=torch.float32)
    assert loaded.merged
    for dtype, merge, merged in (
        (torch.float32, None, True),
        (torch.float32, False, False),
        (torch.bfloat16, None, False),  # whose sums are rounded
    ):
        again = SparseWSI.from_pretrained(tmp_path / "merged", dtype=dtype, device="cpu", merge=merge)
        assert again.merged == merged
    torch.testing.assert_close(loaded.option_probs(selection, "Which tissue?", OPTIONS), probs, rtol=0, atol=1e-5)
    assert not make_model().merge().merged  # there is nothing to merge


def test_a_static_cache_gives_the_same_text(model: SparseWSI) -> None:
    selection = model.select(make_bag())
    assert text_of(model, selection, cache_implementation="static") == text_of(model, selection)


def test_option_probabilities_equal_a_loop_without_padding(model: SparseWSI) -> None:
    selection = model.select(make_bag())
    found = model.option_probs(selection, "Which tissue?", OPTIONS)
    assert found.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(found, one_by_one(model, selection, "Which tissue?", OPTIONS), atol=1e-5)
    assert torch.allclose(found, model.option_probs(selection, "Which tissue?", OPTIONS), atol=0)


def test_a_longer_option_changes_nothing_about_the_likelihood_of_the_others(model: SparseWSI) -> None:
    selection = model.select(make_bag())
    prompt = build_prompt(model.tokenizer, CHAT)
    short = model.mean_log_likelihoods(selection, prompt, ["liver", "fat"])
    padded = model.mean_log_likelihoods(selection, prompt, ["liver", "fat", "a lymph node " * 20])
    assert torch.allclose(short, padded[:2], atol=1e-5)


def test_an_empty_option_has_no_probability(model: SparseWSI) -> None:
    found = model.option_probs(model.select(make_bag()), "Which?", ["liver", "", "fat"])
    assert found[1] == 0
    assert found.sum().item() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="at least one option"):
        model.option_probs(model.select(make_bag()), "Which?", ["", " "])


@torch.no_grad()
def test_letters_are_scored_by_the_next_token(make_model: MakeModel) -> None:
    model = make_model(dataclasses.replace(CONFIG, option_scoring="letter"))
    selection = model.select(make_bag())
    prompt = build_prompt(model.tokenizer, CHAT, ["liver", "", "fat"])
    embeds, positions, _ = model.inputs(selection.tokens, selection.indices, 300, prompt)
    letters = [model.tokenizer.convert_tokens_to_ids(letter) for letter in "AC"]
    expected = plain_llama(model.llm, embeds[0], positions[0])[-1, letters].softmax(0)
    found = model.option_probs(selection, CHAT[0]["content"], ["liver", "", "fat"])
    assert torch.allclose(found[[0, 2]], expected, atol=1e-5)
    assert found[1] == 0


def test_with_options_the_answer_is_the_likeliest_of_them(model: SparseWSI) -> None:
    selection = model.select(make_bag())
    probs = model.option_probs(selection, CHAT[0]["content"], OPTIONS)
    assert "".join(model.answer(selection, [CHAT[0]], OPTIONS)) == OPTIONS[int(probs.argmax())]
    assert torch.equal(probs, model.option_probs(selection, [CHAT[0]], OPTIONS))
    found = set()
    for earlier in ("Fat?", "Is there a liver here, and is it normal?", "no"):  # also after other questions
        chat = [{"role": "user", "content": earlier}, {"role": "assistant", "content": earlier}, CHAT[0]]
        after = model.option_probs(selection, chat, OPTIONS)
        assert "".join(model.answer(selection, chat, OPTIONS)) == OPTIONS[int(after.argmax())]
        found.add(tuple(after.tolist()))
    assert len(found | {tuple(probs.tolist())}) == 4


def test_the_models_own_selection_is_mmr_where_it_has_a_diversity(make_model: MakeModel) -> None:
    model = make_model(dataclasses.replace(CONFIG, diversity=2.0, scorer_relative=True))
    bag = make_bag()
    own, top = model.select(bag), model.select(bag, selector="topk")
    assert torch.equal(own.indices, model.select(bag, selector="mmr").indices)
    assert not torch.equal(own.indices, top.indices)
    assert torch.equal(top.indices, hard_topk(own.scores, 8))


def test_every_patch_gets_its_nearest_word(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="no words for patches"):
        model.words(make_bag())
    model.limits = Limits(vocabulary=("liver", "fat"), alike=-1.0)
    words = model.words(make_bag())
    assert set(words.nearest.tolist()) <= {0, 1}
    model.limits = Limits(vocabulary=("liver", "fat"), alike=1.1)
    assert set(model.words(make_bag()).nearest.tolist()) == {-1}


def test_a_question_chooses_among_patches_of_high_score(make_model: MakeModel) -> None:
    model, bag = make_model(), make_bag()
    assert pick_words("Which of the following is likely: Fat, or the fat of a gland?") == ("fat", "gland")
    likeness = model.relate(bag, "Is this fat or liver?")
    table = model.place_words(("fat", "liver"))
    directions = torch.nn.functional.normalize(model.projector(model.encode(bag.features)), dim=1)
    assert torch.allclose(likeness, (directions @ table.T).max(1).values.detach(), atol=1e-5)
    selection = model.select(bag, selector="question", question="Is this fat or liver?")
    values = weigh_by_question(selection.scores, likeness)
    assert torch.equal(selection.indices, hard_topk(values, 8))
    assert torch.equal(selection.scores, model.select(bag).scores)
    with pytest.raises(ValueError, match="needs a question with words"):
        model.select(bag, selector="question", question="Which of these?")
