"""The learned top-K against its rivals, and each of its parts against the same without it: Tables 1, 2 and 3.

    python -m train.studies.grid --banks runs/real.safetensors runs/phantom.safetensors --out runs/grid
    python -m train.studies.grid ... --dry-run            # what would run, what is done, and about how long it takes
    python -m train.studies.grid ... --only learned scale-gate  # some cells
    python -m train.studies.grid --out results/grid --tables    # the tables again, from the answers that are there

A cell is a training run followed by an evaluation. All cells of a seed branch from one dense checkpoint (alpha = 1),
the dense part of the demo's recipe, and differ only in what follows; the few that need another slide encoder have a
dense part of their own. Every cell starts with the same new scorer. The questions are the same for all cells of a seed
and others for the next seed, one mosaic each, from the banks' test split in turn. Rows that show the LLM all N patches,
which cost ten times as much, and those of another K are asked of the first ones only (--long-questions).

Started again after a kill, the grid goes on where it was: trainings from their last checkpoint, evaluations from their
last question. The tables are written anew after every cell, from what there is by then.

Table 1: selectors. A selector without training is asked with the LLM of the dense checkpoint, which has met no
selection yet, and with an LLM tuned on its own selection for as many steps as the learned cell was trained ("tuned");
random choice and attention MIL also with the LLM of the learned cell. Table 2: ablations, as paired differences from
the learned cell. Table 3: the training path and the inference path of the learned cell. Intervals, 95 %, are
Student's t over the seeds; of a single seed, a bootstrap over its questions.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from sparsewsi.model.selector import SELECTORS, Scorer
from sparsewsi.model.sparse_wsi import SparseWSI
from train.checkpoint import latest
from train.command import run_command, write_whole
from train.config import RECIPES, TrainConfig
from train.data.mosaic import load_bank, mosaic_size
from train.eval.scoring import majority
from train.evaluate import Item, evaluate, mosaic_items, read_records
from train.run import train
from train.studies.rivals import (
    MIL,
    AttentionMIL,
    Contender,
    kept_by,
    load_contender,
    load_mil,
    save_mil,
    sparselearn_class,
    train_mil,
)

RECIPE = ("demo-stage1", "demo-stage2")  # the last one is cut in two where its dense steps end
FREE = tuple(SELECTORS)  # selectors without training
SWEEP = (8, 16, 64, 128)  # K other than 32
LONG = ("all", "soft")  # rows of N tokens
FEW = (*LONG, *(f"learned@{k}" for k in SWEEP))  # asked of the first questions only
PAPER_SCHEDULE = {"tau_start": 2.0, "tau_end": 0.1, "k_start": 0.0, "anneal": 1.0, "hard": 0.0}
MODEL_FIELDS = ("scorer_attention", "num_tokens")  # of the changes, those that the start of a cell is made with
DIAGNOSIS = ("diagnosis",)  # families of questions; all others are microscopy
DRAWS = 4000


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


def tuned(selector: str) -> Cell:
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
    *map(tuned, FREE),
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


# ---- training


def split(config: TrainConfig) -> tuple[TrainConfig, TrainConfig]:
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


def stages(plan: Plan, cell: Cell, seed: int, folder: Path) -> list[TrainConfig]:
    """The trainings behind a cell, in order: dense ones, shared by cells of the same slide encoder, then its own."""
    encoder = cell.changes.get("slide_encoder", RECIPES[plan.recipe[0]]().slide_encoder)
    base = folder / f"dense-{encoder}"
    common = {"banks": list(plan.banks), "seed": seed, "llm": plan.llm, "slide_encoder": encoder, **plan.changes}
    if plan.accumulation:
        common["accumulation"] = plan.accumulation
    recipe = [replace(RECIPES[name](), **common) for name in plan.recipe]
    dense, branch = split(recipe.pop())
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


def dense_model(plan: Plan, found: list[TrainConfig], cell: Cell, seed: int) -> Path:
    """Folder of the model that a cell starts from; trained if it is not there yet."""
    given = dict(enumerate(plan.init))
    if given and not cell.scratch and "slide_encoder" not in cell.changes:
        if seed not in given:
            raise ValueError(f"--init names {len(given)} checkpoints, for seeds 0 to {len(given) - 1}; seed is {seed}.")
        folder = Path(given[seed])
        return folder / "model" if (folder / "model").is_dir() else folder
    for config in found:
        run_stage(config)
    return Path(found[-1].out) / "checkpoints" / "last" / "model"


def run_stage(config: TrainConfig, selector: str | None = None) -> Path:
    """Train, or go on, or find it done; returns the last checkpoint and removes those before it."""
    out = Path(config.out)
    if not is_trained(config):
        keep = None if selector is None else partial(kept_by, selector)
        train(config, sparselearn_class(config.gate), keep)
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
        settings.dim, settings.scorer_layers, settings.scorer_dim, settings.heads, settings.scorer_attention
    )
    model.save_pretrained(folder)


# ---- evaluation


def items(plan: Plan, seed: int) -> Iterator[Item]:
    """The questions of a seed, from each bank in turn."""
    share = plan.questions // len(plan.banks)
    for together in zip(*(mosaic_items(Path(bank), "test", share, plan.n, seed) for bank in plan.banks)):
        yield from together


def asked(plan: Plan, row: str = "") -> int:
    """How many questions of a seed a row is asked."""
    everything = plan.questions // len(plan.banks) * len(plan.banks)
    return min(everything, plan.long_questions) if row in FEW else everything


def run_cell(plan: Plan, cell: Cell, seed: int, folder: Path) -> None:
    """Train a cell if it is not trained, and ask what has not been asked."""
    found = stages(plan, cell, seed, folder)
    own = found.pop() if cell.train else None
    dense = dense_model(plan, found, cell, seed)
    log = folder / cell.name / "records.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    if own is not None:
        make_start(dense, Path(own.init), own)
        checkpoint = run_stage(own, cell.keep)
        if is_answered(plan, cell, log):
            return
        model = load_contender(checkpoint)
    else:
        if is_answered(plan, cell, log):
            return
        model = Contender.from_pretrained(dense)
        assert isinstance(model, Contender)
    if MIL in cell.rows:
        model.add_selector(MIL, attention_mil(plan, seed, folder).select)
    for rows in (tuple(row for row in cell.rows if row not in FEW), tuple(row for row in cell.rows if row in FEW)):
        if rows:
            evaluate(model, islice(items(plan, seed), asked(plan, rows[0])), asked(plan, rows[0]), rows, None, log)


def attention_mil(plan: Plan, seed: int, folder: Path) -> AttentionMIL:
    """Attention MIL of a seed, trained on as many bags as the learned cell and its dense part together."""
    path = folder / f"{MIL}.safetensors"
    if not path.is_file():
        *_, dense, branch = stages(plan, CELLS[0], seed, folder)
        banks = [load_bank(Path(bank), "train") for bank in plan.banks]
        mil, loss = train_mil(banks, seed, dense.steps + branch.steps, branch.accumulation, branch.patches)
        save_mil(mil, path)
        print(f"{MIL}, seed {seed}: loss {loss:.3f}", flush=True)
    return load_mil(path)


def is_answered(plan: Plan, cell: Cell, log: Path) -> bool:
    """Whether all questions of a cell have been asked of all its rows."""
    records = read_records(log)
    return all(row in records.get(number, {}) for row in cell.rows for number in range(asked(plan, row)))


# ---- tables


def interval(values: np.ndarray, draws: int = DRAWS) -> tuple[float, float, float]:
    """Mean of values (S seeds, Q questions) and its 95 % interval.

    Of one seed: the questions resampled. Of several: Student's t over the means of the seeds, as resampling a few seeds
    gives intervals that are too narrow (of three, they cover the truth in 78 % of cases instead of 95), but no narrower
    than what the questions of these very seeds leave open, and within the values that there are.
    """
    seeds, questions = values.shape
    mean = float(values.mean())
    weights = np.random.default_rng(0).multinomial(questions, np.full(questions, 1 / questions), (draws, seeds))
    low, high = np.quantile(np.einsum("sq,dsq->d", values, weights / questions) / seeds, [0.025, 0.975])
    if seeds > 1:
        wide = float(stats.t.ppf(0.975, seeds - 1)) * values.mean(1).std(ddof=1) / np.sqrt(seeds)
        low = max(min(low, mean - wide), values.min())
        high = min(max(high, mean + wide), values.max())
    return mean, float(low), float(high)


@dataclass(frozen=True)
class Answers:
    """What one row of one cell answered, over the seeds that are complete."""

    right: dict[int, np.ndarray]  # seed -> (Q,) 0 or 1
    recall: dict[int, float]  # seed -> mean needle recall
    families: np.ndarray  # (Q,) str

    def matrix(self, families: Sequence[str] | None = None, but: Sequence[str] = ()) -> np.ndarray:
        """(S, Q) of the seeds, of some families of questions."""
        keep = ~np.isin(self.families, but) if families is None else np.isin(self.families, families)
        return np.stack([self.right[seed] for seed in sorted(self.right)])[:, keep]


def answers(plan: Plan, out: Path, cell: str, row: str) -> Answers | None:
    """What is known of a row of a cell; None before one seed is complete. "majority" is a row of every cell."""
    right, recall, families = {}, {}, np.empty(0, str)
    for folder in sorted(out.glob("seed-*")):
        known = read_records(folder / cell / "records.jsonl")
        records = [known[number] for number in sorted(known) if number < asked(plan, row)]
        if not records or len(records) < asked(plan, row):
            continue
        majority(records)
        if all(row in record for record in records):
            seed = int(folder.name.removeprefix("seed-"))
            right[seed] = np.array([float(record[row] == record["answer"]) for record in records])
            found = [record[f"{row} recall"] for record in records if f"{row} recall" in record]
            if found and row != "soft":  # it holds all patches, if only as noise
                recall[seed] = float(np.mean(found))
            families = np.array([record["family"] for record in records])
    return Answers(right, recall, families) if right else None


def entry(found: Answers) -> dict:
    """Accuracy overall, in microscopy and in diagnosis, each with its interval, and needle recall."""
    parts = {
        "overall": found.matrix(),
        "microscopy": found.matrix(but=DIAGNOSIS),
        "diagnosis": found.matrix(families=DIAGNOSIS),
    }
    result: dict = {name: interval(values) for name, values in parts.items() if values.size}
    result |= {"seeds": sorted(found.right), "questions": len(found.families)}
    result["by_seed"] = {seed: float(values.mean()) for seed, values in sorted(found.right.items())}
    if found.recall:
        result["needle_recall"] = float(np.mean(list(found.recall.values())))
    return result


def difference(one: Answers, other: Answers) -> dict | None:
    """Paired difference, one minus other, over the seeds and the first questions that both have."""
    seeds = sorted(set(one.right) & set(other.right))
    if not seeds:
        return None
    both = min(len(one.families), len(other.families))
    values = np.stack([one.right[seed][:both] - other.right[seed][:both] for seed in seeds])
    by_seed = {seed: float(value.mean()) for seed, value in zip(seeds, values)}
    return {"difference": interval(values), "seeds": seeds, "by_seed": by_seed}


Row = tuple[str, str, str, float | None]  # name of the line, cell, row, what the paper has


def table_rows() -> dict[int, list[Row]]:
    """The lines of each table."""
    one: list[Row] = [("learned top-K", "learned", "learned", None)]
    one += [(f"{cell} top-K", cell, "learned", None) for cell in ("straight-through", "gumbel")]
    for selector in (MIL, *FREE):
        one.append((f"{selector}, LLM of dense", "dense", selector, None))
        one += [(f"{selector}, LLM of learned", "learned", selector, None)] * (selector in CELLS[0].rows)
        one += [(f"{selector}, LLM tuned on it", f"{selector}-tuned", selector, None)] * (selector in FREE)
    for row in ("all", "text-only"):
        one += [(f"{row}, LLM of {cell}", cell, row, None) for cell in ("dense", "learned")]
    one.append(("majority", "learned", "majority", None))
    two: list[Row] = [(cell.name, cell.name, "learned", cell.paper) for cell in CELLS if cell.table == 2]
    two += [(f"learned, asked with K = {k}", "learned", f"learned@{k}", None) for k in SWEEP]
    three: list[Row] = [
        ("hard top-K, as at inference", "learned", "learned", None),
        ("hard top-K through the denoiser", "learned", "denoised", None),
        ("soft path at the last tau, all N tokens, noise and denoiser", "learned", "soft", None),
    ]
    return {1: one, 2: two, 3: three}


def write_tables(plan: Plan, out: Path) -> str:
    """Write tables.json and tables.md from the records that there are; returns the Markdown."""
    reference = answers(plan, out, "learned", "learned")
    record: dict = {"plan": asdict(plan)}
    sections = []
    titles = {
        1: "Table 1: which patches",
        2: "Table 2: ablations, as paired differences from the learned cell",
        3: "Table 3: training path and inference path of one checkpoint",
    }
    for number, lines in table_rows().items():
        entries = {}
        for name, cell, row, paper in lines:
            found = answers(plan, out, cell, row)
            if found is not None:
                entries[name] = entry(found) | {"paper": paper}
                if reference is not None and (cell, row) != ("learned", "learned"):
                    entries[name]["against_learned"] = difference(found, reference)
        record[f"table{number}"] = entries
        if entries:
            sections.append(f"## {titles[number]}\n\n{markdown(entries, with_paper=number == 2)}")
    sections.append(
        f"{asked(plan)} questions a seed ({asked(plan, 'all')} for rows of N tokens) on mosaics of {plan.n} patches, "
        "the same for all rows; points with 95 % intervals, Student's t over seeds (of one: questions resampled); "
        "differences are paired by question and seed."
    )
    text = "\n\n".join(sections) + "\n"
    for path, content in ((out / "tables.json", json.dumps(record, indent=2) + "\n"), (out / "tables.md", text)):
        write_whole(path, content)
    return text


def markdown(entries: dict[str, dict], with_paper: bool) -> str:
    """Lines of a table as Markdown."""
    head = ["row", "overall", "microscopy", "diagnosis", "needle recall", "minus learned", "seeds x questions"]
    head += ["the paper's", "agreement"] * with_paper
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, found in entries.items():
        cells = [name, *(points(found.get(part)) for part in ("overall", "microscopy", "diagnosis"))]
        cells.append(f"{100 * found['needle_recall']:.0f} %" if "needle_recall" in found else "")
        against = found.get("against_learned")
        cells += [
            points(against["difference"], "+") if against else "",
            f"{len(found['seeds'])} x {found['questions']}",
        ]
        if with_paper:
            paper = found["paper"]
            cells += [f"{paper:+.1f}" if paper is not None else "", agreement(against, paper)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def points(values: Sequence[float] | None, sign: str = "") -> str:
    """Mean and interval in points."""
    return "{:{s}.1f} ({:{s}.1f} to {:{s}.1f})".format(*(100 * v for v in values), s=sign) if values else ""


def agreement(against: dict | None, paper: float | None) -> str:
    """Whether our paired difference and the paper's say the same, in words."""
    if against is None or paper is None:
        return ""
    _, low, high = (100 * value for value in against["difference"])
    if low <= 0 <= high:
        clear = "no clear difference here"
    else:
        clear = "same direction" if (high < 0) == (paper < 0) else "the other direction"
    return f"{clear}; the paper's figure is {'within' if low <= paper <= high else 'outside'} our interval"


# ---- command


def seconds(plan: Plan, cell: Cell, seed: int, folder: Path) -> float:
    """About what is left of a cell without its shared dense part, on one core with the embedded LLM."""
    left = 0.0
    if cell.train:
        *_, own = stages(plan, cell, seed, folder)
        if not is_trained(own):
            for step in range(own.steps):
                tokens = own.num_tokens if own.is_hard(step) else own.patches_at(step)
                left += own.accumulation * (0.3 + 0.005 * tokens)
    known = read_records(folder / cell.name / "records.jsonl").values()
    for row in cell.rows:
        left += (0.3 + 0.002 * plan.n * (row in LONG)) * max(0, asked(plan, row) - sum(row in one for one in known))
    return left


def overview(plan: Plan, cells: Sequence[Cell], seeds: Sequence[int], out: Path) -> str:
    """What a run would do, as Markdown."""
    lines = ["| seed | cell | changes | state | hours left, about |", "|---|---|---|---|---|"]
    total = 0.0
    for seed in seeds:
        folder = out / f"seed-{seed}"
        for cell in cells:
            left = seconds(plan, cell, seed, folder)
            total += left
            trained = not cell.train or is_trained(stages(plan, cell, seed, folder)[-1])
            done = is_answered(plan, cell, folder / cell.name / "records.jsonl")
            state = "done" if trained and done else "trained" if trained and cell.train else "to do"
            changes = ", ".join(f"{name} {value}" for name, value in cell.changes.items())
            lines.append(f"| {seed} | {cell.name} | {changes} | {state} | {left / 3600:.1f} |")
    lines.append(f"\nAbout {total / 3600:.0f} hours on one core, and the dense parts of each seed.")
    return "\n".join(lines)


def check_plan(plan: Plan, out: Path) -> None:
    """Write the plan, or raise ValueError if the folder holds another one's numbers."""
    path = out / "plan.json"
    mine = json.loads(json.dumps(asdict(plan)))
    if path.is_file():
        other = json.loads(path.read_text())
        changed = [f"{name} was {other.get(name)}, is {mine[name]}" for name in mine if other.get(name) != mine[name]]
        if changed:
            raise ValueError(f"{out} belongs to another plan ({'; '.join(changed)}). Choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(mine, indent=2) + "\n")


def read_plan(out: Path) -> Plan:
    """The plan of the numbers in a folder. Raises ValueError if there is none."""
    path = out / "plan.json"
    if not path.is_file():
        raise ValueError(f"{path} is not there; --out is the folder of a grid that was run.")
    return Plan(**json.loads(path.read_text()))


def run_grid(plan: Plan, cells: Sequence[Cell], seeds: Sequence[int], out: Path) -> str:
    """Run what is left of the grid, seed by seed, and write the tables after every cell; returns them as Markdown."""
    check_plan(plan, out)
    text = ""
    for seed in seeds:
        for cell in cells:
            run_cell(plan, cell, seed, out / f"seed-{seed}")
            text = write_tables(plan, out)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--banks", nargs="+", default=[], help="feature banks of python -m train.data.mosaic bank")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[cell.name for cell in CELLS], metavar="CELL")
    parser.add_argument("--init", nargs="+", default=[], help="a dense checkpoint for each seed 0, 1, ...")
    parser.add_argument("--recipe", nargs="+", default=list(RECIPE), choices=RECIPES, help="ends with the one to cut")
    parser.add_argument("--llm", default=Plan.llm)
    parser.add_argument("--dense-steps", type=int, default=0, help="default: the recipe's")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of a cell; 0: the recipe's")
    parser.add_argument("--accumulation", type=int, default=0, help="bags a step; default: the recipe's")
    parser.add_argument("--n", type=mosaic_size, default=Plan.n, help="patches of a test mosaic")
    parser.add_argument("--questions", type=int, default=Plan.questions, help="of each seed")
    parser.add_argument(
        "--long-questions", type=int, default=Plan.long_questions, help="for rows of N tokens and of other K"
    )
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--tables", action="store_true", help="train and ask nothing, write the tables of --out")
    given = parser.parse_args()
    if given.tables:
        print(write_tables(read_plan(given.out), given.out))
        return
    if not given.banks:
        raise ValueError("--banks is missing: the feature banks of python -m train.data.mosaic bank.")
    plan = Plan(
        tuple(given.banks), tuple(given.recipe), tuple(given.init), given.llm, given.dense_steps, given.steps,
        given.accumulation, given.n, given.questions, given.long_questions,
    )  # fmt: skip
    cells = [cell for cell in CELLS if not given.only or cell.name in given.only]
    if given.dry_run:
        print(overview(plan, cells, given.seeds, given.out))
    else:
        print(run_grid(plan, cells, given.seeds, given.out))


if __name__ == "__main__":
    run_command(main)
