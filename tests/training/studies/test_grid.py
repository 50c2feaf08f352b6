"""The grid on a tiny real LLM: cells share what they may, a stopped grid goes on, tables count right."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import train.run as run
from sparsewsi.model.sparse_wsi import SparseWSI
from train.config import RECIPES
from train.eval.statistics import Estimate
from train.sparselearn import SparseLearn
from train.stage import choose_sparsity
from train.studies import cells, grid, grid_tables, rivals, seeds
from train.studies.cells import Cell, Plan, list_stages, split_stage
from train.studies.grid import run_grid, write_overview
from train.studies.grid_tables import describe_agreement, read_answers


def test_the_cut_recipe_is_the_whole_one_step_by_step() -> None:
    whole = RECIPES[cells.RECIPE[-1]]()
    dense, branch = split_stage(whole)
    assert dense.steps + branch.steps == whole.steps
    border = round((1 - whole.hard) * whole.steps)  # where the last bit of a share may decide
    for step in set(range(whole.steps)) - {border}:
        part, at = (dense, step) if step < dense.steps else (branch, step - dense.steps)
        assert part.is_hard(at) == whole.is_hard(step)
        assert part.patches_at(at) == pytest.approx(whole.patches_at(step), abs=2)
        tau, k = choose_sparsity(part, at, 100)
        whole_tau, whole_k = choose_sparsity(whole, step, 100)
        assert (k is None) == (whole_k is None)
        if k is not None:
            assert (tau, k) == (pytest.approx(whole_tau, abs=3e-3), pytest.approx(whole_k, rel=1e-2))
    with pytest.raises(ValueError, match="dense steps"):
        split_stage(RECIPES["stage2"]())


def test_cells_differ_from_the_learned_one_in_what_they_name_alone(plan: Plan, tmp_path: Path) -> None:
    *before, learned = list_stages(plan, cells.CELLS[0], 3, tmp_path)
    for cell in cells.CELLS:
        *shared, own = list_stages(plan, cell, 3, tmp_path) if cell.train else [*before, learned]
        if cell.scratch:
            assert shared == before[:-1]
            assert own.steps == before[-1].steps + learned.steps
        elif "slide_encoder" not in cell.changes:
            assert shared == before
        told = {name for name, value in asdict(own).items() if value != asdict(learned)[name]}
        schedule = {"steps", "patches_start", "checkpoint_every"} if cell.scratch else set()
        assert told <= {"out", "init", *cell.changes, *schedule}, cell.name
    assert len({cell.name for cell in cells.CELLS}) == len(cells.CELLS)


def test_the_tables_hold_every_cell(finished: Path, plan: Plan) -> None:
    which, ablations, paths = json.loads((finished / "tables.json").read_text())["tables"].values()
    assert {"learned top-K", "gumbel top-K", "random, LLM of dense", "kmeans, LLM tuned on it"} <= set(which)
    assert {"scale-gate", "k16", "no-slide-encoder"} <= set(ablations)
    assert "learned, asked with K = 8" not in ablations
    assert [line["needle_recall"] is None for line in paths.values()] == [False, False, True]
    scale, learned = ablations["scale-gate"], which["learned top-K"]
    assert scale["paper"] == pytest.approx(-2.92)
    assert scale["difference"][0] == pytest.approx(scale["overall"][0] - learned["overall"][0])
    text = (finished / "tables.md").read_text()
    assert "-2.9" in text
    assert "Table 3" in text
    found = read_answers(plan, finished, "learned", "learned")
    assert found is not None
    assert found.matrix().shape == (1, 10)
    assert found.matrix(families=grid_tables.DIAGNOSIS).shape == (1, 2)


def test_kept_answers_print_the_tables_of_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.eval.statistics.DRAWS", 50)  # intervals of several seeds are Student's
    answers = seeds.ANSWERS
    plan = grid.read_plan(answers / "grid")
    text = grid_tables.write_tables(plan, grid_tables.make_tables(plan, answers / "grid"))
    assert "| straight-through top-K | 45.7 (23.0 to 68.3) |" in text
    assert "-22.7 (-110.9 to +65.5)" in text
    assert "| 1 | 74.7 (68.6 to 79.9) | -0.4" in seeds.write_seeds(answers, [1, 2])
    assert "| learned | 71.1 % | 68.2 to 73.8 | 1020 |" in rivals.write_tables(
        rivals.find_answers(answers / "rivals-real" / "records.jsonl")
    )


def test_cells_start_from_one_checkpoint_with_one_scorer(finished: Path, few_cells: tuple[Cell, ...]) -> None:
    starts = {
        cell.name: SparseWSI.from_pretrained(finished / "seed-0" / cell.name / "start")
        for cell in few_cells
        if cell.train
    }
    learned, scale, other = starts["learned"], starts["scale-gate"], starts["k16"]
    for name, value in learned.trained_state().items():
        assert torch.equal(value, scale.trained_state()[name])
        assert "scorer" in name or torch.equal(value, other.trained_state()[name])
    assert (other.config.num_tokens, other.config.scorer_attention) == (4, "global")
    assert starts["no-slide-encoder"].config.slide_encoder == "none"
    kept = json.loads((finished / "seed-0" / "kmeans-tuned" / "metrics.jsonl").read_text().splitlines()[0])
    assert kept["n"] == 6  # what the selector kept is all that the LLM was trained on


def test_a_finished_grid_is_left_alone_and_a_stopped_one_goes_on(
    finished: Path,
    plan: Plan,
    few_cells: tuple[Cell, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    short_recipes: None,
) -> None:
    few = few_cells[2:3]
    real, calls = run.train_step, []

    def fail(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2 + 2 + 6:  # in the cell's own training, after its first checkpoints
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr(run, "train_step", fail)
    with pytest.raises(KeyboardInterrupt):
        run_grid(plan, few, [0], tmp_path)
    run_grid(plan, few, [0], tmp_path)
    whole, resumed = (
        [json.loads(line)["loss"] for line in (folder / "seed-0/gumbel/metrics.jsonl").read_text().splitlines()]
        for folder in (finished, tmp_path)
    )
    assert resumed[-2:] == whole[-2:]
    assert (tmp_path / "seed-0/gumbel/records.jsonl").read_text() == (
        finished / "seed-0/gumbel/records.jsonl"
    ).read_text()
    before = len(calls)
    run_grid(plan, few, [0], tmp_path)
    assert len(calls) == before
    with pytest.raises(ValueError, match="n was 64, is 65"):
        run_grid(replace(plan, n=65), few, [0], tmp_path)
    assert run.SparseLearn is SparseLearn


def test_given_checkpoints_replace_the_dense_part(
    finished: Path, plan: Plan, few_cells: tuple[Cell, ...], tmp_path: Path, short_recipes: None
) -> None:
    dense = next((finished / "seed-0").glob("dense-pointwise/1-*/checkpoints/last"))
    given = replace(plan, init=(str(dense),))
    run_grid(given, few_cells[4:5], [0], tmp_path)
    assert not list((tmp_path / "seed-0").glob("dense-*"))
    assert (tmp_path / "seed-0/scale-gate/records.jsonl").read_text() == (
        finished / "seed-0/scale-gate/records.jsonl"
    ).read_text()
    with pytest.raises(ValueError, match="seed is 1"):
        run_grid(given, few_cells[4:5], [1], tmp_path)


def test_a_dry_run_says_what_is_left(
    finished: Path, plan: Plan, few_cells: tuple[Cell, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_overview(plan, few_cells, [0, 1], finished)
    assert text.count("| done |") == len(few_cells)
    assert text.count("| to do |") == len(few_cells)
    argv = ["grid", "--banks", "bank", "--out", str(finished), "--dry-run", "--only", "learned", "k8"]
    monkeypatch.setattr(sys, "argv", argv)
    grid.main()


def test_agreement_is_said_in_words() -> None:
    assert describe_agreement(Estimate(*(-0.03, -0.05, -0.01)), -2.9) == (
        "same direction; the paper's figure is within our interval"
    )
    assert describe_agreement(Estimate(*(0.05, 0.01, 0.09)), -1.7) == (
        "the other direction; the paper's figure is outside our interval"
    )
    assert describe_agreement(Estimate(*(0.0, -0.01, 0.01)), -1.7).startswith("no clear difference here")
    assert describe_agreement(None, None) == ""
