"""Both schedules without a language model: only they differ, power is told, a stopped study goes on."""

from pathlib import Path

import pytest
import torch

from train.config import RECIPES
from train.data.example import Example, Question
from train.data.kinds import NEEDLES, WORDS
from train.stage import choose_sparsity
from train.studies import recipes
from train.studies.parts import PILOT, Data, Pupil
from train.studies.recipes import Plan, list_stages, list_told, read_study, run_study, train_stage, write_tables

PLAN = Plan("", steps=10, second=8, bags=2, patches=64, n=64, k=4, components=8, dim=16, questions=10)


def test_the_schedules_are_those_of_the_recipes() -> None:
    for name in ("literal", "own"):
        first, second = list_stages(PLAN, name)
        assert (first.steps, second.steps, first.num_tokens, second.num_tokens) == (10, 8, 4, 4)
        assert (first.lr, second.lr) == (RECIPES["stage1"]().lr, RECIPES["stage2"]().lr)
    literal, own = (list_stages(PLAN, name) for name in ("literal", "own"))
    assert [choose_sparsity(config, 0, 64) for config in literal] == [(2.0, 4), (2.0, 4)]
    assert [choose_sparsity(config, 0, 64) for config in own] == [(1.0, None), (own[0].tau_end, 4)]
    assert own[1].is_hard(7)
    assert not any(config.is_hard(config.steps - 1) for config in literal)


def test_a_question_tells_of_the_kinds_that_it_names() -> None:
    kinds = NEEDLES["phantom"]
    words = [WORDS[kind] for kind in kinds]
    asked = (
        Question("Which of these?", words[0], (words[0], words[1])),
        Question(f"Does this slide contain {words[1]}?", "No", ("Yes", "No")),
        Question("Describe this slide.", "", (), "caption"),
    )
    [told] = list_told([Example(torch.empty(3, 2), torch.arange(3), 3, asked)], kinds)
    assert told.tolist() == [2, 3, *[1] * (len(kinds) - 2)]


def test_stage_2_leaves_the_slide_encoder_as_it_is(bank_file: Path) -> None:
    data = Data(PLAN, bank_file)
    torch.manual_seed(0)
    pupil = Pupil(PLAN, len(data.kinds))
    before = {name: value.clone() for name, value in pupil.state_dict().items()}
    train_stage(pupil, PLAN, data, list_stages(PLAN, "own")[1], 0)
    changed = {name.split(".")[0] for name, value in pupil.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"scorer", "sparselearn", "readout"}


def test_a_study_that_was_stopped_goes_on_and_its_tables_compare_the_schedules(
    bank_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "SPLITS", ("test", "train"))
    log = tmp_path / "seeds.jsonl"
    with pytest.raises(ValueError, match="is not there"):
        read_study(log)
    run_study(PLAN, bank_file, range(2), log)
    table = write_tables(read_study(log))
    assert "| train | 2 | own minus literal | 2 |" in table
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * 2 * 2
    log.write_text("".join(lines[:5]))  # killed between the two lines of a training
    run_study(PLAN, bank_file, range(2), log)
    assert write_tables(read_study(log)) == table
    monkeypatch.setattr(recipes, "run_seed", lambda *_: pytest.fail("it was trained again"))
    run_study(PLAN, bank_file, range(2), log)


def test_the_pilot_says_what_seeds_can_tell() -> None:
    def line(seed: int, schedule: str, accuracy: float) -> dict:
        found = {"learned": {"accuracy": accuracy}, "right": "01"}
        return {"seed": seed, "schedule": schedule, "stage": 2, "val": found, "train": found}

    differences = (0.1, 0.2, 0.0, 0.1)
    pilot = [line(PILOT + n, "literal", 0.5) for n in range(4)]
    pilot += [line(PILOT + n, "own", 0.5 + more) for n, more in enumerate(differences)]
    text = recipes.write_power(pilot, 10)
    assert "| val | 4 | 8.2 | 8 | 8.2 |" in text
