"""The cells of the grid (train/studies/grid.py): what each changes, and the trainings behind it."""

import json
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from sparsewsi.model.selector import SELECTORS, Scorer
from sparsewsi.model.sparse_wsi import SparseWSI
from train.checkpoint import latest
from train.config import RECIPES, TrainConfig
from train.run import train
from train.stage import find_model_folder
from train.studies.contenders import choose_sparselearn, keep_by
from train.studies.mil import MIL

RECIPE = ("demo-stage1", "demo-stage2")  # the last one is cut in two where its dense steps end
FREE = tuple(SELECTORS)  # selectors without training
SWEEP = (8, 16, 64, 128)  # K other than 32
LONG = ("all", "soft")  # rows of N tokens
FEW = (*LONG, *(f"learned@{k}" for k in SWEEP))  # asked of the first questions only
PAPER_SCHEDULE = {"tau_start": 2.0, "tau_end": 0.1, "k_start": 0.0, "anneal": 1.0, "hard": 0.0}
MODEL_FIELDS = ("scorer_attention", "num_tokens")  # of the changes, those that the start of a cell is made with


@dataclass(frozen=True)
class Cell:
    """A training run and the rows that are asked of what it gives."""

    name: str
    table: int
    changes: dict = field(default_factory=dict)  # fields of TrainConfig that differ from the learned cell's
    rows: tuple[str, ...] = ("learned",)
    scratch: bool = False  # start before the dense part and take its steps too
    train: bool = True  # False: ask the dense checkpoint itself
    keep: str | None = None  # train on this selector's hard top-K
    paper: float | None = None  # the difference in points that the paper reports


def tune(selector: str) -> Cell:
    """An LLM that learns to live with a selector that does not learn."""
    return Cell(f"{selector}-tuned", 1, {"hard": 1.0}, (selector,), keep=selector)


CELLS = (
    Cell(
        "learned", 1, {},
        ("learned", "text-only", "random", MIL, "soft", "denoised", *(f"learned@{k}" for k in SWEEP), "all"),
    ),
    Cell("dense", 1, {}, ("text-only", *FREE, MIL, "all"), train=False),
    Cell("straight-through", 1, {"gate": "ste"}),
    Cell("gumbel", 1, {"gate": "gumbel"}),
    *map(tune, FREE),
    Cell("scale-gate", 2, {"gate": "scale"}, paper=70.40 - 73.32),
    Cell("global-denoiser", 2, {"denoiser": "global"}, paper=71.62 - 73.32),
    Cell("no-denoiser", 2, {"denoiser": "none"}),
    Cell("global-scorer", 2, {"scorer_attention": "global"}),
    Cell("logistic-kernel", 2, {"kernel": "logistic"}),
    Cell("paper-tau", 2, {"tau_start": 2.0, "tau_end": 0.1}),
    Cell("constant-tau", 2, {"tau_start": 0.05, "tau_end": 0.05}),
    Cell("fixed-k", 2, {"k_start": 0.0}),
    Cell("no-hard-steps", 2, {"hard": 0.0}),
    Cell("paper-schedule", 2, PAPER_SCHEDULE),
    Cell("paper-schedule-from-scratch", 2, PAPER_SCHEDULE, scratch=True),
    *(Cell(f"k{k}", 2, {"num_tokens": k}) for k in SWEEP),
    Cell("other-tissue", 2, {"other_tissue": 0.5}),
    Cell("longnet", 2, {"slide_encoder": "longnet"}),
    Cell("no-slide-encoder", 2, {"slide_encoder": "none"}),
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What the numbers depend on; a folder holds those of one plan."""

    banks: tuple[str, ...]
    recipe: tuple[str, ...] = RECIPE
    init: tuple[str, ...] = ()  # a dense checkpoint per seed, instead of the recipe's dense part
    llm: str = "smollm2-135m"
    dense_steps: int = 0  # 0: the recipe's
    steps: int = 60  # of a cell; 0: the recipe's
    accumulation: int = 0  # 0: the recipe's
    n: int = 1024  # patches of a test mosaic
    questions: int = 1000  # of each seed
    long_questions: int = 200  # of which the rows of FEW are asked
    changes: dict = field(default_factory=dict)  # further fields of TrainConfig, for all stages and cells


def split_stage(config: TrainConfig) -> tuple[TrainConfig, TrainConfig]:
    """A stage cut in two where its dense steps end; bags grow, tau and K fall as they would in one run.

    Raises ValueError if it has no dense steps or nothing but these.
    """
    first = round(config.dense * config.steps)
    rest, grow = config.steps - first, config.curriculum * config.steps
    if not first or not rest:
        raise ValueError(f"dense is {config.dense}; the grid needs a recipe with dense steps and others after them.")
    between = config.patches_at(first)
    dense = replace(
        config, steps=first, dense=1.0, anneal=0.0, hard=0.0, patches=between, curriculum=min(1.0, grow / first)
    )
    branch = replace(
        config, steps=rest, dense=0.0, anneal=config.anneal * config.steps / rest,
        hard=config.hard * config.steps / rest, patches_start=between if grow > first else 0,
        curriculum=max(0.0, grow - first) / rest,
    )  # fmt: skip
    return dense, branch


def list_stages(plan: Plan, cell: Cell, seed: int, folder: Path) -> list[TrainConfig]:
    """The trainings behind a cell, in order: dense ones, shared by cells of the same slide encoder, then its own."""
    encoder = cell.changes.get("slide_encoder", RECIPES[plan.recipe[0]]().slide_encoder)
    base = folder / f"dense-{encoder}"
    common = {"banks": list(plan.banks), "seed": seed, "llm": plan.llm, "slide_encoder": encoder, **plan.changes}
    if plan.accumulation:
        common["accumulation"] = plan.accumulation
    recipe = [replace(RECIPES[name](), **common) for name in plan.recipe]
    dense, branch = split_stage(recipe.pop())
    whole = dense.steps + branch.steps
    if plan.dense_steps:
        dense = replace(dense, steps=plan.dense_steps)
    if plan.steps:
        branch = replace(branch, steps=plan.steps)
        whole = dense.steps + plan.steps
    found: list[TrainConfig] = []
    for number, config in enumerate([*recipe, dense]):
        init = f"{found[-1].out}/checkpoints/last" if found else ""
        found.append(replace(config, out=str(base / f"{number}-{'dense' if config is dense else 'before'}"), init=init))
    own = {name: value for name, value in cell.changes.items() if name != "slide_encoder"}
    out = folder / cell.name
    branch = replace(branch, out=str(out), init=str(out / "start"), checkpoint_every=max(1, branch.steps // 4))
    if cell.scratch:
        branch = replace(branch, steps=whole, patches_start=0, checkpoint_every=max(1, whole // 8))
        del found[-1]
    return [*found, replace(branch, **own)] if cell.train else found


def train_dense(plan: Plan, found: list[TrainConfig], cell: Cell, seed: int) -> Path:
    """Folder of the model that a cell starts from; trained if it is not there yet."""
    given = dict(enumerate(plan.init))
    if given and not cell.scratch and "slide_encoder" not in cell.changes:
        if seed not in given:
            raise ValueError(f"--init names {len(given)} checkpoints, for seeds 0 to {len(given) - 1}; seed is {seed}.")
        return find_model_folder(given[seed])
    for config in found:
        run_stage(config)
    return Path(found[-1].out) / "checkpoints" / "last" / "model"


def run_stage(config: TrainConfig, selector: str | None = None) -> Path:
    """Train, or go on, or find it done; returns the last checkpoint and removes those before it."""
    out = Path(config.out)
    if not is_trained(config):
        keep = None if selector is None else partial(keep_by, selector)
        train(config, choose_sparselearn(config.gate), keep)
    last = latest(out)
    assert last is not None
    for other in last.parent.iterdir():
        if other.is_dir() and not other.is_symlink() and other != last:
            shutil.rmtree(other)
    return last


def is_trained(config: TrainConfig) -> bool:
    """Whether the last step's checkpoint is there."""
    last = latest(Path(config.out))
    return last is not None and json.loads((last / "state" / "step.json").read_text())["step"] == config.steps


def make_start(dense: Path, folder: Path, config: TrainConfig) -> None:
    """The dense model with a scorer that knows nothing yet, of the kind and for the K that the cell asks for."""
    if folder.is_dir():
        return
    model = SparseWSI.from_pretrained(dense)
    settings = replace(model.config, **{name: getattr(config, name) for name in MODEL_FIELDS})
    torch.manual_seed(config.seed)
    model.config = settings
    model.scorer = Scorer(
        settings.dim,
        settings.scorer_layers,
        settings.scorer_dim,
        settings.heads,
        settings.scorer_attention,
        settings.scorer_relative,
    )
    model.save_pretrained(folder)


def count_asked(plan: Plan, row: str = "") -> int:
    """How many questions of a seed a row is asked."""
    everything = plan.questions // len(plan.banks) * len(plan.banks)
    return min(everything, plan.long_questions) if row in FEW else everything
