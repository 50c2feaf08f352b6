"""What gate and denoiser are worth: arms share all but these, power is counted, a stopped run goes on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from train.data.example import Question
from train.data.kinds import NEEDLES, WORDS
from train.studies import parts
from train.studies.parts import ARMS, Data, Plan, Pupil, answer, branch, count_seeds, run_seed, write_tables

PLAN = Plan("", steps=10, bags=2, patches=20, n=64, k=6, components=8, dim=16, questions=10)


def test_so_many_seeds_find_the_difference_that_often() -> None:
    rng, seeds = np.random.default_rng(0), count_seeds(0.05)
    draws = rng.normal(0.03, 0.05, (4000, seeds))
    found = np.asarray(stats.ttest_1samp(draws, 0, axis=1)[1]) < 0.05
    assert 0.78 < found.mean() < 0.84
    assert count_seeds(0.01) < seeds < count_seeds(0.1)


def test_a_branch_goes_on_where_the_dense_training_ended() -> None:
    torch.manual_seed(0)
    dense = Pupil(PLAN, 5)
    features, generator = torch.randn(2, 20, 8), torch.Generator().manual_seed(0)
    dense.optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-2)
    dense(features, 1.0, None, generator).sum().backward()
    dense.optimizer.step()
    pupils = [branch(dense, PLAN, 5, gate, denoiser, 0) for gate, denoiser in ARMS.values()]
    for pupil in pupils:
        assert torch.equal(pupil(features, 1.0, None, generator), dense(features, 1.0, None, generator))
        assert pupil.optimizer is not None
        assert pupil.optimizer.state[pupil.readout.queries]["step"] == 1
    one, other = (pupil(features, 0.5, 6, torch.Generator().manual_seed(0)) for pupil in pupils[:2])
    assert not torch.allclose(one, other)


def test_the_likeliest_option_is_the_answer() -> None:
    kinds = NEEDLES["phantom"]
    logits, words = torch.tensor([5.0, -3.0, *[0.0] * (len(kinds) - 2)]), [WORDS[kind] for kind in kinds]
    options = (words[2], words[0], words[1])
    asked = [Question("Which?", "", options, family) for family in ("present", "absent")]
    assert [answer(logits, question, kinds) for question in asked] == [words[0], words[1]]
    text = "Does this slide contain {}?"
    said = [answer(logits, Question(text.format(word), "", ("Yes", "No"), "contains"), kinds) for word in words[:2]]
    assert said == ["Yes", "No"]


def test_a_seed_has_a_line_for_each_arm_and_the_tables_say_so(
    bank_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "SPLITS", ("test", "train"))
    data = Data(PLAN, bank_file)
    for seed in (0, 1):
        run_seed(replace(PLAN), data, seed, tmp_path / "seeds.jsonl")
    records = list(parts.read_lines(tmp_path / "seeds.jsonl"))
    assert [(record["seed"], record["arm"]) for record in records] == [(s, arm) for s in (0, 1) for arm in ARMS]
    text = write_tables(records)
    assert "| test | scale gate | 2 |" in text
    assert "-2.9" in text
