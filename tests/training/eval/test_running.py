"""Asking a model: the same scores however questions are packed, and a stopped evaluation goes on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsewsi.bags.bag import Bag
from sparsewsi.model.sparse_wsi import SparseWSI
from train.data.example import Question
from train.data.packing import visible
from train.eval.items import Item
from train.eval.running import Prefix, Way, evaluate, option_log_likelihoods, select_row, word_question
from train.eval.scoring import add_majority, score_rows, write_scores


@pytest.fixture
def items() -> list[Item]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(6):
        coords = torch.stack([torch.arange(9) % 3, torch.arange(9) // 3], 1).int() * 224
        bag = Bag(torch.randn(9, 12, generator=generator).half(), coords, 224, 0.5, "made-up", f"slide {i // 2}")
        kinds = np.array(["adipose"] * 8 + ["mucin"])
        made.append(Item(bag, kinds, Question("Which tissue?", "mucin", ("fat", "mucin", "a lymph node"), "present")))
    return made


def test_questions_that_share_a_prefix_score_as_alone(model: SparseWSI, items: list[Item]) -> None:
    x = model.encode(items[0].bag.features)
    prefix = Prefix()
    for question in (items[0].question, Question("Does it?", "No", ("Yes", "No")), items[0].question):
        alone = option_log_likelihoods(model, x, torch.arange(9), 9, question)
        shared = option_log_likelihoods(model, x, torch.arange(9), 9, question, prefix=prefix)
        torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    assert prefix.cache.get_seq_length() == len(prefix.position_ids)


def test_packed_option_scores_are_the_models_own(model: SparseWSI, items: list[Item]) -> None:
    selection = model.select(items[0].bag)
    question = items[0].question
    packed = option_log_likelihoods(
        model, selection.tokens, selection.indices, selection.num_patches, question
    ).softmax(0)
    torch.testing.assert_close(packed, model.option_probs(selection, question.question, question.options))
    assert packed.max() - packed.min() > 1e-4


def test_a_stopped_evaluation_goes_on_and_counts_once(model: SparseWSI, items: list[Item], tmp_path: Path) -> None:
    rows = ("learned", "random", "all", "text-only")
    whole = evaluate(model, iter(items), 6, Way(rows), tmp_path / "whole.jsonl")
    broken = tmp_path / "broken.jsonl"
    evaluate(model, iter(items[:2]), 6, Way(rows), broken)
    with broken.open("a") as log:
        log.write('{"number": 2, "lear')  # killed while it wrote
    evaluate(model, iter(items), 6, Way(("learned",)), broken)
    assert evaluate(model, iter(items), 6, Way(rows), broken) == whole
    assert len(broken.read_text().splitlines()) == 2 + 1 + 4 + 4  # whole, cut off, learned only, the rest
    add_majority(whole)
    table = score_rows(whole, rows)
    assert table["majority"].right == 6
    assert table["learned"].right == sum(record["learned"] == "mucin" for record in whole)
    assert table["learned"].slides == 3
    assert "| learned |" in write_scores(table)


def test_text_only_sees_no_patch(model: SparseWSI, items: list[Item], tmp_path: Path) -> None:
    other = [replace(item, bag=replace(item.bag, features=item.bag.features * -3)) for item in items]
    one = evaluate(model, iter(items), 6, Way(("text-only",)), tmp_path / "a.jsonl")
    two = evaluate(model, iter(other), 6, Way(("text-only",)), tmp_path / "b.jsonl")
    assert [r["text-only"] for r in one] == [r["text-only"] for r in two]
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["n"] == 9
    assert select_row(model, items[0].bag, "text-only", None, 0).num_patches == 0  # the same positions for any N


def test_a_question_after_a_prefix_needs_only_its_own_rows_of_the_mask() -> None:
    bag, question = torch.tensor([0] * 6 + [1] * 4), torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 1, 2])
    whole = visible(bag, question)
    assert torch.equal(visible(bag, question, slice(4, None)), whole[4:])
    assert whole[5].tolist() == [True, True, False, False, True, True, False, False, False, False]


def test_presets_word_the_question_differently(model: SparseWSI, items: list[Item]) -> None:
    question = replace(items[0].question, options=("fat", "", "mucin"))
    assert word_question(question, "slidechat") == question
    assert word_question(question, "plain").question == "Which tissue?\nfat\nmucin"
    selection = model.select(items[0].bag)
    scores = [
        option_log_likelihoods(model, selection.tokens, selection.indices, selection.num_patches, question, preset)
        for preset in ("slidechat", "plain")
    ]
    assert all(score[1] == -torch.inf and score[[0, 2]].isfinite().all() for score in scores)
    assert not torch.equal(*scores)


def test_a_row_may_have_its_own_k(model: SparseWSI, items: list[Item], tmp_path: Path) -> None:
    records = evaluate(model, iter(items), 6, Way(("random@9", "random@2", "all")), tmp_path / "a.jsonl")
    assert [record["random@9"] for record in records] == [record["all"] for record in records]
    assert all(record["random@9 recall"] == 1.0 and record["random@2 recall"] <= 1.0 for record in records)
    assert all(record["random@9 kinds"] == 1.0 and record["random@2 kinds"] <= 1.0 for record in records)
    assert all(record["random@2 kinds"] >= record["random@2 recall"] for record in records)
