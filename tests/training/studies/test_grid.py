"""The grid on a tiny real LLM: cells share what they may, a stopped grid goes on, tables count right; the rivals."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import train.run as run
from sparsewsi.bags.bag import Bag, save_bag
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.selector import SELECTORS
from sparsewsi.model.sparse_wsi import SparseWSI
from train.checkpoint import load_state
from train.config import RECIPES, TrainConfig
from train.data.mosaic import BACKGROUNDS, NEEDLE_KINDS, NEEDLES, load_bank
from train.data.packing import Example, Question
from train.evaluate import read_records
from train.sparselearn import SparseLearn
from train.studies import grid, margin, rivals
from train.studies.grid import Cell, Plan, answers, interval, run_grid, split, stages
from train.studies.rivals import StraightThrough, kept_by, load_contender, load_mil, save_mil, train_mil


@pytest.fixture(scope="module")
def bank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of well separated made-up kinds with a train and a test part."""
    kinds = np.repeat([*BACKGROUNDS["phantom"], *NEEDLES["phantom"]], 24)
    order = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    centres = np.random.default_rng(0).normal(0, 1, (len(order), 24))
    noise = np.random.default_rng(1).normal(0, 0.3, (len(kinds), 24))
    features = torch.tensor(np.stack([centres[order[kind]] for kind in kinds]) + noise).half()
    path = tmp_path_factory.mktemp("bank") / "phantom.safetensors"
    splits = ["test" if i % 2 else "train" for i in range(len(kinds))]
    metadata = {"kinds": kinds.tolist(), "sources": [f"phantom-{split}" for split in splits], "splits": splits}
    save_file(
        {"features": features},
        path,
        {name: json.dumps(value) for name, value in metadata.items()} | {"encoder": "made-up", "origin": "phantom"},
    )
    return path


@pytest.fixture(scope="module")
def plan(bank_file: Path, tiny_llm: Path) -> Plan:
    changes = {"dim": 16, "lora_rank": 2, "lora_alpha": 4, "patches": 20, "patches_hard": 24, "questions_per_bag": 2}
    changes |= {"num_tokens": 6, "align": 0}
    return Plan(
        (str(bank_file),), llm=str(tiny_llm), dense_steps=2, steps=8, accumulation=2, n=64, questions=10,
        long_questions=5, changes={**changes},
    )  # fmt: skip


CELLS = (
    replace(grid.CELLS[0], rows=("learned", "text-only", "random", grid.MIL, "soft", "denoised", "learned@3", "all")),
    Cell("dense", 1, {}, ("random", grid.MIL, "all"), train=False),
    Cell("gumbel", 1, {"gate": "gumbel"}),
    grid.tuned("kmeans"),
    Cell("scale-gate", 2, {"gate": "scale"}, paper=-2.9),
    Cell("k16", 2, {"num_tokens": 4, "scorer_attention": "global"}),
    Cell("paper-schedule-from-scratch", 2, grid.PAPER_SCHEDULE, scratch=True),
    Cell("no-slide-encoder", 2, {"slide_encoder": "none"}),
)


@pytest.fixture(scope="module")
def short_recipes() -> Iterator[None]:
    """The recipes with as few steps as still have all phases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "demo-stage1", lambda real=RECIPES["demo-stage1"]: replace(real(), steps=2))
        yield


@pytest.fixture(scope="module")
def finished(plan: Plan, tmp_path_factory: pytest.TempPathFactory, short_recipes: None) -> Path:
    out = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "DRAWS", 200)
        run_grid(plan, CELLS, [0], out)
    return out


# ---- recipes


def test_the_cut_recipe_is_the_whole_one_step_by_step() -> None:
    whole = RECIPES[grid.RECIPE[-1]]()
    dense, branch = split(whole)
    assert dense.steps + branch.steps == whole.steps
    border = round((1 - whole.hard) * whole.steps)  # where the last bit of a share may decide
    for step in set(range(whole.steps)) - {border}:
        part, at = (dense, step) if step < dense.steps else (branch, step - dense.steps)
        assert part.is_hard(at) == whole.is_hard(step)
        assert part.patches_at(at) == pytest.approx(whole.patches_at(step), abs=2)
        tau, k = run.sparsity(part, at, 100)
        whole_tau, whole_k = run.sparsity(whole, step, 100)
        assert (k is None) == (whole_k is None)
        if k is not None:
            assert (tau, k) == (pytest.approx(whole_tau, abs=3e-3), pytest.approx(whole_k, rel=1e-2))
    with pytest.raises(ValueError, match="dense steps"):
        split(RECIPES["stage2"]())


def test_cells_differ_from_the_learned_one_in_what_they_name_alone(plan: Plan, tmp_path: Path) -> None:
    *before, learned = stages(plan, grid.CELLS[0], 3, tmp_path)
    for cell in grid.CELLS:
        *shared, own = stages(plan, cell, 3, tmp_path) if cell.train else [*before, learned]
        if cell.scratch:
            assert shared == before[:-1]
            assert own.steps == before[-1].steps + learned.steps
        elif "slide_encoder" not in cell.changes:
            assert shared == before
        told = {name for name, value in asdict(own).items() if value != asdict(learned)[name]}
        schedule = {"steps", "patches_start", "checkpoint_every"} if cell.scratch else set()
        assert told <= {"out", "init", *cell.changes, *schedule}, cell.name
    assert len({cell.name for cell in grid.CELLS}) == len(grid.CELLS)


# ---- the grid


def test_the_tables_hold_every_cell(finished: Path, plan: Plan) -> None:
    tables = json.loads((finished / "tables.json").read_text())
    assert {"learned top-K", "gumbel top-K", "random, LLM of dense", "kmeans, LLM tuned on it"} <= set(tables["table1"])
    assert {"scale-gate", "k16", "no-slide-encoder", "learned, asked with K = 8"} & set(tables["table2"]) == {
        "scale-gate", "k16", "no-slide-encoder",
    }  # fmt: skip
    assert ["needle_recall" in line for line in tables["table3"].values()] == [True, True, False]
    scale = tables["table2"]["scale-gate"]
    assert scale["paper"] == pytest.approx(-2.92)
    learned = tables["table1"]["learned top-K"]
    assert scale["against_learned"]["difference"][0] == pytest.approx(scale["overall"][0] - learned["overall"][0])
    text = (finished / "tables.md").read_text()
    assert "-2.9" in text
    assert "Table 3" in text
    found = answers(plan, finished, "learned", "learned")
    assert found is not None
    assert found.matrix().shape == (1, 10)
    assert found.matrix(families=grid.DIAGNOSIS).shape == (1, 2)


def test_cells_start_from_one_checkpoint_with_one_scorer(finished: Path) -> None:
    starts = {
        cell.name: SparseWSI.from_pretrained(finished / "seed-0" / cell.name / "start") for cell in CELLS if cell.train
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
    finished: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_recipes: None
) -> None:
    monkeypatch.setattr(grid, "DRAWS", 200)
    few = CELLS[2:3]
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
    finished: Path, plan: Plan, tmp_path: Path, short_recipes: None
) -> None:
    dense = next((finished / "seed-0").glob("dense-pointwise/1-*/checkpoints/last"))
    given = replace(plan, init=(str(dense),))
    run_grid(given, CELLS[4:5], [0], tmp_path)
    assert not list((tmp_path / "seed-0").glob("dense-*"))
    assert (tmp_path / "seed-0/scale-gate/records.jsonl").read_text() == (
        finished / "seed-0/scale-gate/records.jsonl"
    ).read_text()
    with pytest.raises(ValueError, match="seed is 1"):
        run_grid(given, CELLS[4:5], [1], tmp_path)


def test_a_dry_run_says_what_is_left(finished: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    text = grid.overview(plan, CELLS, [0, 1], finished)
    assert text.count("| done |") == len(CELLS)
    assert text.count("| to do |") == len(CELLS)
    argv = ["grid", "--banks", "bank", "--out", str(finished), "--dry-run", "--only", "learned", "k8"]
    monkeypatch.setattr(sys, "argv", argv)
    grid.main()


# ---- numbers


def test_the_interval_is_of_the_questions_of_one_seed_and_of_the_means_of_several() -> None:
    generator = np.random.default_rng(1)
    values = (generator.random((1, 1000)) < 0.7).astype(float)
    mean, low, high = interval(values)
    assert mean == values.mean()
    assert (mean - low, high - mean) == (pytest.approx(0.0284, rel=0.1), pytest.approx(0.0284, rel=0.1))  # 1.96 sigma
    _, low, high = interval(np.repeat(values, 3, 0))  # three times the questions, none of them asked twice
    assert (mean - low, high - mean) == (pytest.approx(0.0164, rel=0.1), pytest.approx(0.0164, rel=0.1))
    apart = np.stack([np.zeros(1000), np.ones(1000), np.ones(1000)])
    assert interval(apart)[1:] == (pytest.approx(0), pytest.approx(1))


def test_the_interval_of_three_seeds_covers_the_truth() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        means = np.clip(0.5 + 0.13 * generator.standard_normal(3), 0, 1)  # seeds differ as our short trainings do
        _, low, high = interval((generator.random((3, 340)) < means[:, None]).astype(float), draws=200)
        covered += low <= 0.5 <= high
    assert 0.91 < covered / 300 < 0.99  # a bootstrap over seeds: 0.78


def test_agreement_is_said_in_words() -> None:
    assert grid.agreement({"difference": (-0.03, -0.05, -0.01)}, -2.9) == (
        "same direction; the paper's figure is within our interval"
    )
    assert grid.agreement({"difference": (0.05, 0.01, 0.09)}, -1.7) == (
        "the other direction; the paper's figure is outside our interval"
    )
    assert grid.agreement({"difference": (0.0, -0.01, 0.01)}, -1.7).startswith("no clear difference here")
    assert grid.agreement(None, None) == ""


# ---- rivals


def test_straight_through_keeps_or_drops_and_still_teaches_the_scorer() -> None:
    generator = torch.Generator().manual_seed(0)
    x, scores = torch.randn(30, 16, generator=generator), torch.randn(30, generator=generator, requires_grad=True)
    module = StraightThrough(16, 5, heads=4, gate="ste", denoiser="none")
    out = module(x, scores, 0.5)
    kept = out.abs().sum(-1) > 0
    assert torch.equal(kept.nonzero()[:, 0], scores.topk(5).indices.sort().values)
    torch.testing.assert_close(out[kept], x[kept])
    out.square().sum().backward()
    assert scores.grad is not None
    assert (scores.grad.abs() > 0).sum() > 5
    with pytest.raises(ValueError, match="ste, gumbel"):
        StraightThrough(16, 5, gate="vp")


def test_gumbel_draws_and_repeats_with_its_generator() -> None:
    x, scores = torch.ones(30, 16), torch.zeros(30)
    module = StraightThrough(16, 5, heads=4, gate="gumbel", denoiser="local")
    one, again, other = (
        module(x, scores, 1.0, k=7.9, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert int((one.abs().sum(-1) > 0).sum()) == 7


def test_a_selector_keeps_patches_with_their_places_and_kinds(finished: Path) -> None:
    model = SparseWSI.from_pretrained(finished / "seed-0" / "learned" / "start")
    features = torch.arange(17.0)[:, None].expand(17, 24)
    example = Example(features, torch.arange(17) * 3, 60, (Question("?", "!"),), tuple("abcdefghijklmnopq"))
    kept = kept_by("norm", model, example)
    assert kept.indices.tolist() == [33, 36, 39, 42, 45, 48]
    assert "".join(kept.kinds) == "lmnopq"
    assert len(kept_by("uniform", model, example).indices) == 6


def test_attention_mil_learns_where_the_needles_are(bank_file: Path, tmp_path: Path) -> None:
    bank = load_bank(bank_file, "train")
    mil, loss = train_mil([bank], 0, steps=60, accumulation=8, n=60, lr=2e-3)
    assert loss < 0.25
    test = load_bank(bank_file, "test")
    needles = np.isin(test.kinds, NEEDLE_KINDS)
    rows = np.concatenate([np.flatnonzero(~needles), np.flatnonzero(needles)[::12]])  # 48 background, 5 needles
    kept = mil.select(test.features[rows], torch.zeros(len(rows), 2), 10)
    assert needles[rows][kept.numpy()].sum() >= 4
    save_mil(mil, tmp_path / "mil.safetensors")
    assert torch.equal(
        load_mil(tmp_path / "mil.safetensors").select(test.features, torch.zeros(1, 2), 7),
        mil.select(test.features, torch.zeros(1, 2), 7),
    )


def test_the_soft_path_is_that_of_training(finished: Path) -> None:
    checkpoint = (finished / "seed-0" / "learned" / "checkpoints" / "last").resolve()
    config = TrainConfig(**json.loads((finished / "seed-0" / "learned" / "train_config.json").read_text()))
    model = load_contender(checkpoint)
    features = torch.randn(30, 24, generator=torch.Generator().manual_seed(0)).half()
    bag = Bag(features, torch.zeros(30, 2).int(), 224, 0.5, "made-up", "slide")
    soft, hard, denoised = (model.select(bag, selector=name, seed=4) for name in ("soft", "learned", "denoised"))
    assert soft.tokens.shape == (30, 16)
    assert torch.equal(denoised.indices, hard.indices)
    x = model.encode(features)
    sparselearn = SparseLearn(16, 6, kernel=config.kernel, gate=config.gate, denoiser=config.denoiser)
    load_state(checkpoint, sparselearn)
    expected = sparselearn(x, model.scorer(x), config.tau_end, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(soft.tokens, expected)
    assert sparselearn.denoiser is not None
    torch.testing.assert_close(denoised.tokens, sparselearn.denoiser(hard.tokens))
    assert torch.equal(soft.tokens, model.select(bag, selector="soft", seed=4).tokens)


def test_the_gap_command_asks_all_paths_the_same(
    finished: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = finished / "seed-0" / "learned" / "checkpoints" / "last"
    argv = ["rivals", "--checkpoint", str(checkpoint), "--bank", plan.banks[0], "--n", "64", "--questions", "5"]
    monkeypatch.setattr(sys, "argv", [*argv, "--out", str(tmp_path)])
    rivals.main()
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [rows[row]["n"] for row in ("learned", "denoised", "soft")] == [5, 5, 5]
    same = list(read_records(finished / "seed-0/learned/records.jsonl").values())[:5]
    mine = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [record["soft"] for record in mine] == [record["soft"] for record in same]


def test_one_model_is_asked_about_the_patches_of_each_selector(
    finished: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = finished / "seed-0" / "learned" / "checkpoints" / "last" / "model"
    argv = [
        "rivals",
        "--model",
        str(model),
        "--bank",
        plan.banks[0],
        "--n",
        "64",
        "--questions",
        "5",
        "--seed",
        "0",
        "1",
    ]
    monkeypatch.setattr(rivals, "train_mil", lambda banks, *_: (rivals.AttentionMIL(banks[0].features.shape[1]), 0.0))
    monkeypatch.setattr(sys, "argv", [*argv, "--mil-banks", *plan.banks, "--out", str(tmp_path)])
    rivals.main()
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert set(rows) == {"learned", *SELECTORS, "text-only", "attention-mil", "majority"}
    assert {entry["n"] for entry in rows.values()} == {10}
    lines = (tmp_path / "table.md").read_text().splitlines()
    [head] = [number for number, line in enumerate(lines) if "the same without dominant" in line]
    assert [line.split(" | ")[0] for line in lines[head + 2 : head + 4]] == ["| learned", "| random"]


def test_differences_from_learned_are_paired() -> None:
    records = [{"answer": "a", "learned": "a", "random": "a" if i % 4 else "b"} for i in range(400)]
    mean, low, high = rivals.against_learned(records, "random")
    assert mean == pytest.approx(-0.25)
    assert -0.30 < low < -0.25 < high < -0.20


# ---- margin


def test_patches_at_the_margin_are_told_from_others() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([torch.randn(400, 6, generator=generator), 4 * torch.randn(20, 6, generator=generator)])
    outside = margin.margin(points, torch.arange(400, 420))
    assert outside.ratio > 1.5
    assert outside.ratio > outside.high
    assert outside.p < 0.002
    inside = margin.margin(points, torch.arange(0, 400, 20))
    assert inside.p > 0.01
    assert (inside.kept, inside.discarded) == (20, 400)
    assert margin.margin(points, torch.arange(400, 420)) == outside
    with pytest.raises(ValueError, match="0 of 420"):
        margin.margin(points, torch.arange(0))


def test_p_is_uniform_where_nothing_is_special() -> None:
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(150, 3, generator=generator)
    found = [
        margin.margin(points, torch.randperm(150, generator=generator)[:12], draws=200, seed=i).p for i in range(40)
    ]
    assert 0.3 < np.mean(found) < 0.7


def test_neighbour_distance_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(margin, "PART", 7)
    points = torch.randn(25, 4, generator=torch.Generator().manual_seed(0))
    points[3] = points[11]  # a twin is a neighbour at distance 0
    plain = (points[:, None] - points).norm(dim=-1).fill_diagonal_(torch.inf).sort(-1).values[:, :5].mean(-1)
    torch.testing.assert_close(margin.neighbour_distance(points, 5), plain, rtol=1e-3, atol=1e-3)
    assert len(margin.neighbour_distance(points[:2], 5)) == 2


def test_the_margin_command_writes_a_table(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(4, 24, generator=torch.Generator().manual_seed(0)).half()  # few enough for no UMAP
    model = SparseWSI.from_pretrained(finished / "seed-0" / "learned" / "start")
    model.config = SparseWSIConfig(**{**asdict(model.config), "num_tokens": 2})
    model.save_pretrained(tmp_path / "model")
    save_bag(Bag(features, torch.zeros(4, 2).int(), 224, 0.5, "made-up", "slide"), tmp_path / "slide.safetensors")
    argv = ["margin", "--model", str(tmp_path / "model"), "--bags", str(tmp_path / "slide.safetensors")]
    monkeypatch.setattr(sys, "argv", [*argv, "--out", str(tmp_path / "out")])
    margin.main()
    record = json.loads((tmp_path / "out" / "margin.json").read_text())
    assert set(record["slide"]) == {"learned", "random", "farthest"}
    assert record["slide"]["learned"]["PCA"]["kept"] == 2
    assert "| slide | farthest | features | 2 / 2 |" in (tmp_path / "out" / "margin.md").read_text()
