"""A finished grid of a few cells on a tiny real LLM."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from train.config import RECIPES
from train.studies import cells
from train.studies.cells import Cell, Plan, tune
from train.studies.grid import run_grid
from train.studies.mil import MIL


@pytest.fixture(scope="session")
def plan(bank_file: Path, tiny_llm: Path) -> Plan:
    changes = {"dim": 16, "lora_rank": 2, "lora_alpha": 4, "patches": 20, "patches_hard": 24, "questions_per_bag": 2}
    changes |= {"num_tokens": 6, "align": 0}
    return Plan(
        (str(bank_file),), llm=str(tiny_llm), dense_steps=2, steps=8, accumulation=2, n=64, questions=10,
        long_questions=5, changes={**changes},
    )  # fmt: skip


CELLS = (
    replace(cells.CELLS[0], rows=("learned", "text-only", "random", MIL, "soft", "denoised", "learned@3", "all")),
    Cell("dense", 1, {}, ("random", MIL, "all"), train=False),
    Cell("gumbel", 1, {"gate": "gumbel"}),
    tune("kmeans"),
    Cell("scale-gate", 2, {"gate": "scale"}, paper=-2.9),
    Cell("k16", 2, {"num_tokens": 4, "scorer_attention": "global"}),
    Cell("paper-schedule-from-scratch", 2, cells.PAPER_SCHEDULE, scratch=True),
    Cell("no-slide-encoder", 2, {"slide_encoder": "none"}),
)


@pytest.fixture(scope="session")
def few_cells() -> tuple[Cell, ...]:
    """The cells that `finished` holds, one of each sort."""
    return CELLS


@pytest.fixture(scope="session")
def short_recipes() -> Iterator[None]:
    """The recipes with as few steps as still have all phases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "demo-stage1", lambda real=RECIPES["demo-stage1"]: replace(real(), steps=2, align=5))
        yield


@pytest.fixture(scope="session")
def finished(plan: Plan, tmp_path_factory: pytest.TempPathFactory, short_recipes: None) -> Path:
    out = tmp_path_factory.mktemp("grid")
    run_grid(plan, CELLS, [0], out)
    return out
