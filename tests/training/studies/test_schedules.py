"""The schedules' study on a tiny real LLM: only the schedule differs, what was answered is not asked again."""

from dataclasses import asdict
from pathlib import Path

import pytest

from sparsewsi.files import write_json
from train.studies import schedules
from train.studies.schedules import Plan, list_stages, run_training, write_tables


@pytest.fixture
def plan(tiny_llm: Path) -> Plan:
    return Plan("", (2, 2), accumulation=1, k=6, patches=12, n=64, questions=4, llm=str(tiny_llm))


def test_trainings_differ_in_their_schedule_alone(plan: Plan, tmp_path: Path) -> None:
    pairs = zip(*(list_stages(plan, ["bank"], name, 3, tmp_path) for name in ("literal", "own")))
    schedule = {"tau_start", "tau_end", "dense", "anneal", "k_start", "curriculum", "hard", "patches_start"}
    for literal, own in pairs:
        changed = {name for name, value in asdict(own).items() if value != asdict(literal)[name]}
        assert changed <= schedule
        assert (literal.steps, literal.hard, literal.k_start) == (own.steps, 0.0, 0.0)
        assert own.hard > 0


def test_a_finished_training_is_not_asked_again(
    plan: Plan, bank_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_recipes: None
) -> None:
    write_json(tmp_path / "plan.json", asdict(plan))
    for name in ("literal", "own"):
        run_training(plan, [str(bank_file)], name, 0, ["train"], tmp_path)
    text = write_tables(schedules.read_plan(tmp_path), tmp_path)
    assert "| literal | 0 |" in text
    assert "Own minus literal, in points, 1 seeds" in text
    monkeypatch.setattr(schedules, "train", lambda config: pytest.fail("it was trained"))
    run_training(plan, [str(bank_file)], "own", 0, ["train"], tmp_path)
    assert write_tables(plan, tmp_path) == text
