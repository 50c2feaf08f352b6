"""Evidence: leaving a patch out is what it says, whatever the batch, and is told in words that do not mislead.

K kept, V vocabulary.
"""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsewsi.bags.bag import Bag
from sparsewsi.model import evidence
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.evidence import Evidence
from sparsewsi.model.llm import load_llm
from sparsewsi.model.prompt import build_prompt, text_ids
from sparsewsi.model.selection import Selection
from sparsewsi.model.sparse_wsi import SparseWSI

# In mode "original" a patch keeps its position whichever others are there: a smaller selection is the reference.
CONFIG = SparseWSIConfig(feature_dim=24, dim=32, num_tokens=5, heads=4, position="original")
CHAT = [{"role": "user", "content": "Which tissue is this?"}]
OPTIONS = ["liver", "a lymph node beside colon mucosa", "", "fat"]


def make_model(folder: Path, **changes) -> SparseWSI:
    """Float32, every weight drawn, so that every patch has an effect."""
    llm, tokenizer = load_llm(str(folder), device="cpu", dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SparseWSI(dataclasses.replace(CONFIG, llm=str(folder), **changes), llm, tokenizer)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith("llm."):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def model(tiny_llm: Path) -> SparseWSI:
    return make_model(tiny_llm)


@pytest.fixture(scope="module")
def bag() -> Bag:
    features = torch.randn(40, 24, generator=torch.Generator().manual_seed(1)).half()
    place = torch.arange(40)
    return Bag(features, torch.stack([place % 8, place // 8], 1).int() * 224, 224, 0.5, CONFIG.encoder, "a slide")


@pytest.fixture(scope="module")
def selection(model: SparseWSI, bag: Bag) -> Selection:
    return model.select(bag)


@torch.no_grad()
def log_likelihood(model: SparseWSI, selection: Selection, answer: str) -> float:
    """Of an answer, one sequence at a time: the plain computation."""
    prompt = build_prompt(model.tokenizer, CHAT)
    embeds, positions, _ = model.inputs(selection.tokens, selection.indices, selection.num_patches, prompt)
    ids = torch.tensor(text_ids(model.tokenizer, answer))
    text: Tensor = model.llm.get_input_embeddings()(ids)
    logits = model.llm(
        inputs_embeds=torch.cat([embeds, text[None]], 1),
        position_ids=torch.cat([positions, positions[:, -1:] + 1 + torch.arange(len(ids))], 1),
        attention_mask=torch.ones(1, embeds.shape[1] + len(ids)),
        use_cache=False,
    ).logits[0, -len(ids) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, ids[:, None]).sum())


def log_odds(model: SparseWSI, selection: Selection, option: int) -> float:
    return float(model.option_probs(selection, CHAT[0]["content"], OPTIONS)[option].double().logit())


def test_an_effect_is_what_the_answer_loses_when_the_patch_is_not_there(model, selection):
    found = model.leave_one_out(selection, CHAT, " It is liver or fat. ")
    whole = log_likelihood(model, selection, "It is liver or fat.")
    assert found.baseline == pytest.approx(whole, abs=1e-4)
    for place, rank in enumerate(found.score_ranks.tolist()):
        fewer = selection.without([rank])
        assert selection.indices[place] not in fewer.indices
        assert float(found.effects[place]) == pytest.approx(
            whole - log_likelihood(model, fewer, "It is liver or fat."), abs=1e-4
        )
    assert found.effects.abs().min() > 1e-3, "else the test would show nothing"
    nothing = dataclasses.replace(selection, indices=selection.indices[:0], tokens=selection.tokens[:0])
    assert found.without_any == pytest.approx(whole - log_likelihood(model, nothing, "It is liver or fat."), abs=1e-4)
    assert not found.option


def test_an_option_that_reads_like_a_letter_is_meant_by_its_text():
    offered = [("A", "B"), ("B", "A"), ("C", "none")]
    assert [evidence.find_option(said, offered) for said in ("A", "b.", "C", "B. A", "D")] == [1, 0, 2, 1, None]


@pytest.mark.parametrize("scoring", ["text", "letter"])
def test_of_an_option_the_log_odds_are_compared(tiny_llm, bag, scoring):
    model = make_model(tiny_llm, option_scoring=scoring)
    selection = model.select(bag)
    for said, option in (("Fat.", 3), ("B", 1), ("A. liver", 0)):
        found = model.leave_one_out(selection, CHAT, said, OPTIONS)
        assert found.option
        assert found.baseline == pytest.approx(log_odds(model, selection, option), abs=1e-3)
        for place, rank in enumerate(found.score_ranks.tolist()):
            other = log_odds(model, selection.without([rank]), option)
            assert float(found.effects[place]) == pytest.approx(found.baseline - other, abs=2e-3)
    assert not model.leave_one_out(selection, CHAT, "It is fat, I think", OPTIONS).option
    assert not model.leave_one_out(selection, CHAT, "fat", ["fat"]).option, "one option has no odds"


def test_the_size_of_a_pass_changes_nothing(model, selection, monkeypatch):
    one = model.leave_one_out(selection, CHAT, "fat", OPTIONS)
    seen = []
    monkeypatch.setattr(evidence, "TOKENS", {"cpu": 1})
    other = model.leave_one_out(selection, CHAT, "fat", OPTIONS, progress=lambda *at: seen.append(at))
    torch.testing.assert_close(one.effects, other.effects, atol=1e-4, rtol=0)
    assert seen == [(i, len(selection.indices) + 2) for i in range(len(selection.indices) + 2)]


def test_what_comes_before_the_first_patch_that_is_left_out_is_read_once():
    begins, most = torch.tensor([3, 30, 4, 17, 18, 3, 41]), 64
    passes = evidence.plan_passes(begins, 48, most)
    assert sorted(int(number) for numbers, _ in passes for number in numbers) == list(range(len(begins)))
    for numbers, start in passes:
        assert start <= int(begins[numbers].min())
        assert (48 - start) % evidence.ROUND == 0
        assert len(numbers) * (48 - start) <= most
    assert sum(len(numbers) * (48 - start) for numbers, start in passes) < 0.8 * len(begins) * 48


@pytest.mark.parametrize("scoring", ["text", "letter"])
@pytest.mark.parametrize("head", ["plain", "rescaled"])
def test_a_long_prompt_is_read_in_parts_between_which_others_may_have_their_turn(
    tiny_llm, bag, monkeypatch, scoring, head
):
    model = make_model(tiny_llm, option_scoring=scoring)
    if head == "rescaled":  # as in LLMs whose logits are not the last layer's alone
        monkeypatch.setattr(evidence, "RESCALED", ("vocab_size",))
    selection, looks = model.select(bag), []
    chat = [{"role": "user", "content": "Which of these tissues is it? " * 5}]
    options = [f"{word} tissue of the kind that is seen here" for word in ("liver", "fat", "bone")]
    whole, weighed = model.option_probs(selection, chat, options), model.leave_one_out(selection, chat, "B", options)
    for length in (7, 32, 50):
        monkeypatch.setattr(evidence, "TOKENS", {"cpu": 0})
        monkeypatch.setattr(evidence, "PART", {"cpu": length})
        looks.clear()
        found = model.option_probs(selection, chat, options, progress=lambda *at: looks.append(at))
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
        assert len(looks) >= 100 // length
        again = model.leave_one_out(selection, chat, "B", options)
        torch.testing.assert_close(again.effects, weighed.effects, atol=1e-4, rtol=0)
    assert whole.max() - whole.min() > 1e-3, "else the test would show nothing"


def test_who_stops_between_two_parts_has_stopped(model, selection, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    monkeypatch.setattr(evidence, "TOKENS", {"cpu": 0})
    monkeypatch.setattr(evidence, "PART", {"cpu": 32})
    with pytest.raises(Stopped):
        model.option_probs(selection, CHAT, OPTIONS, progress=stop)


def test_a_group_of_patches_is_left_out_as_a_whole(model, selection):
    found = model.leave_one_out(selection, CHAT, "fat", groups=[[2], [0, 3], range(len(selection.indices))])
    assert float(found.group_effects[0]) == pytest.approx(float(found.effects[2]), abs=1e-4)
    assert float(found.group_effects[2]) == pytest.approx(found.without_any, abs=1e-4)
    fewer = selection.without(found.score_ranks[[0, 3]].tolist())
    rest = found.baseline - log_likelihood(model, fewer, "fat")
    assert float(found.group_effects[1]) == pytest.approx(rest, abs=1e-4)
    assert len(model.leave_one_out(selection, CHAT, "fat").group_effects) == 0


def test_parts_of_the_vocabulary_give_the_likelihoods_of_the_whole(monkeypatch):
    hidden, head = torch.randn(3, 4, 8), torch.nn.Linear(8, 50)
    targets = torch.tensor([0, 49, 7, 7])
    whole = head(hidden).log_softmax(-1).gather(-1, targets.expand(3, -1)[..., None])[..., 0]
    monkeypatch.setattr(evidence, "WORDS", 7)
    torch.testing.assert_close(evidence.log_likelihoods(hidden, head, targets), whole)


def test_long_answers_of_a_rounding_llm_must_show_more(tiny_llm, selection):
    model = make_model(tiny_llm)
    assert model.leave_one_out(selection, CHAT, "fat " * 40).limit == evidence.MATTERS
    torch.nn.Module.to(model.llm, torch.bfloat16)
    assert model.leave_one_out(selection, CHAT, "fat").limit == evidence.MATTERS
    assert model.leave_one_out(selection, CHAT, "fat " * 40).limit > evidence.MATTERS
    assert model.leave_one_out(selection, CHAT, "fat", OPTIONS).limit == evidence.MATTERS


def test_an_answer_without_a_word_has_no_evidence(model, selection):
    with pytest.raises(ValueError, match="no answer"):
        model.leave_one_out(selection, CHAT, " \n")


# ---- in words


def made(*effects: float, without_any: float = 0.0, option: bool = False) -> Evidence:
    """Evidence of patches whose ranks by score are 3, 1, 2, ..."""
    ranks = torch.tensor([3, 1, 2, 4, 5][: len(effects)])
    return Evidence(torch.tensor(effects), without_any, -5.0, ranks, option)


def test_patches_are_ranked_by_evidence():
    found = made(math.log(8), math.log(2.5), -1.0, math.log(3.5), 0.1)
    assert found.order.tolist() == [0, 3, 1, 4, 2]
    assert made(0.5, 0.5, 0.5).order.tolist() == [1, 2, 0], "ties go to the better score"


@pytest.mark.parametrize(
    ("found", "parts"),
    [
        (made(math.log(8), math.log(3), 0.1), ("#3", "8 times less likely", "1 more of the 3")),
        (made(math.log(8), 0.2, 0.1, option=True), ("#3", "against the other options", "no other patch matters")),
        (made(20.0, 0.0, 0.0), ("over 1000 times less likely", "Without all 3 it would be hardly less likely")),
        (
            made(0.1, math.log(1.5), 0.1, without_any=math.log(12)),
            ("No patch matters much", "#1", "1.5 times", "all 3", "12 times", "repeat each other"),
        ),
        (
            made(0.1, 0.2, 0.1, without_any=math.log(1.72)),  # seen: "as readily without any patch"
            ("No patch matters much", "Without all 3 it would be 1.72 times less likely: the slide does not decide it"),
        ),
        (made(-0.1, -0.2, -0.1, without_any=-3.0), ("1.11 times more likely", "20.1 times more likely", "not decide")),
    ],
)
def test_the_sentence_says_what_the_numbers_mean(found, parts):
    for part in parts:
        assert part in found.sentence
    assert found.sentence.endswith(".")
    assert bool((found.effects >= found.limit).any()) == ("No patch" not in found.sentence)


# ---- what if


def test_other_patches_have_the_tokens_that_select_would_give(tiny_llm, bag):
    for kind in ("pointwise", "longnet"):
        model = make_model(tiny_llm, slide_encoder=kind)
        eight = model.select(bag, 8)
        five = model.select(bag, 5)
        fewer = eight.without([6, 7, 8])
        assert fewer.indices.tolist() == five.indices.tolist()
        torch.testing.assert_close(fewer.tokens, five.tokens)
        torch.testing.assert_close(model.tokens_of(bag, eight.indices), eight.tokens)


def test_what_cannot_be_kept_is_refused(model, bag):
    with pytest.raises(ValueError, match="40 patches"):
        model.tokens_of(bag, torch.tensor([40]))
    with pytest.raises(ValueError, match="was encoded with"):
        model.tokens_of(dataclasses.replace(bag, encoder="uni"), torch.tensor([0]))
