"""Evaluation: the score of an option is the model's own, tables count right, a stopped run goes on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsewsi.bag import Bag
from sparsewsi.config import SparseWSIConfig
from sparsewsi.llm import load_llm
from sparsewsi.model import SparseWSI
from train.data import Question
from train.evaluate import Item, evaluate, majority, markdown, option_log_likelihoods, summary, wilson


@pytest.fixture(scope="module")
def model(tiny_llm: Path) -> SparseWSI:
    torch.manual_seed(0)
    llm, tokenizer = load_llm(str(tiny_llm), dtype=torch.float32)
    config = SparseWSIConfig(llm=str(tiny_llm), encoder="made-up", feature_dim=12, dim=16, num_tokens=4, heads=4)
    return SparseWSI(config, llm, tokenizer).eval()


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


def test_packed_option_scores_are_the_models_own(model: SparseWSI, items: list[Item]) -> None:
    selection = model.select(items[0].bag)
    question = items[0].question
    packed = option_log_likelihoods(
        model, selection.tokens, selection.indices, selection.num_patches, question
    ).softmax(0)
    torch.testing.assert_close(packed, model.option_probs(selection, question.question, question.options))
    assert packed.max() - packed.min() > 1e-4


def test_wilson_interval_is_the_known_one() -> None:
    low, high = wilson(48, 79)  # the starred WSI-VQA set: 60.76 %, interval 50 to 71
    assert low == pytest.approx(0.497, abs=2e-3)
    assert high == pytest.approx(0.708, abs=2e-3)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(10, 10)[1] == pytest.approx(1)


def test_a_stopped_evaluation_goes_on_and_counts_once(model: SparseWSI, items: list[Item], tmp_path: Path) -> None:
    rows = ("learned", "random", "all", "text-only")
    whole = evaluate(model, iter(items), 6, rows, None, tmp_path / "whole.jsonl")
    evaluate(model, iter(items[:2]), 6, rows, None, tmp_path / "broken.jsonl")
    evaluate(model, iter(items), 6, ("learned",), None, tmp_path / "broken.jsonl")
    assert evaluate(model, iter(items), 6, rows, None, tmp_path / "broken.jsonl") == whole
    assert len((tmp_path / "broken.jsonl").read_text().splitlines()) == 2 + 4 + 4  # whole, learned only, the rest
    table = summary(majority_of(whole), rows)
    assert table["majority"]["right"] == 6
    assert table["learned"]["right"] == sum(record["learned"] == "mucin" for record in whole)
    assert table["learned"]["slides"] == 3
    assert "| learned |" in markdown(table)


def majority_of(records: list[dict]) -> list[dict]:
    majority(records)
    return records


def test_text_only_sees_no_patch(model: SparseWSI, items: list[Item], tmp_path: Path) -> None:
    other = [replace(item, bag=replace(item.bag, features=item.bag.features * -3)) for item in items]
    one = evaluate(model, iter(items), 6, ("text-only",), None, tmp_path / "a.jsonl")
    two = evaluate(model, iter(other), 6, ("text-only",), None, tmp_path / "b.jsonl")
    assert [r["text-only"] for r in one] == [r["text-only"] for r in two]
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["n"] == 9
