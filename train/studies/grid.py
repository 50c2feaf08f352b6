"""The learned top-K against its rivals, and each of its parts against the same without it: Tables 1, 2 and 3.

    python -m train.studies.grid --banks runs/real.safetensors runs/phantom.safetensors --out runs/grid
    python -m train.studies.grid ... --dry-run            # what would run, what is done, and about how long it takes
    python -m train.studies.grid ... --only learned scale-gate  # some cells
    python -m train.studies.grid --out train/studies/answers/grid --tables  # the tables again, from the answers there

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

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from sparsewsi.files import write_json, write_text
from train.config import RECIPES
from train.data.bank import load_bank
from train.eval.items import Item, make_mosaic_items
from train.eval.running import Way, evaluate
from train.eval.table import write_table
from train.flags import add_flag, make_parser, run_command
from train.run_folder import claim, read_records
from train.studies.cells import (
    CELLS,
    FEW,
    LONG,
    RECIPE,
    Cell,
    Plan,
    count_asked,
    is_trained,
    list_stages,
    make_start,
    run_stage,
    train_dense,
)
from train.studies.contenders import Contender, load_contender
from train.studies.grid_tables import make_tables, write_tables
from train.studies.mil import MIL, AttentionMIL, load_mil, save_mil, train_mil


def make_items(plan: Plan, seed: int) -> Iterator[Item]:
    """The questions of a seed, from each bank in turn."""
    share = plan.questions // len(plan.banks)
    for together in zip(*(make_mosaic_items(Path(bank), "test", share, plan.n, seed) for bank in plan.banks)):
        yield from together


def run_cell(plan: Plan, cell: Cell, seed: int, folder: Path) -> None:
    """Train a cell if it is not trained, and ask what has not been asked."""
    found = list_stages(plan, cell, seed, folder)
    own = found.pop() if cell.train else None
    dense = train_dense(plan, found, cell, seed)
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
        model.add_selector(MIL, load_or_train_mil(plan, seed, folder).select)
    for rows in (tuple(row for row in cell.rows if row not in FEW), tuple(row for row in cell.rows if row in FEW)):
        if rows:
            total = count_asked(plan, rows[0])
            evaluate(model, islice(make_items(plan, seed), total), total, Way(rows), log)


def load_or_train_mil(plan: Plan, seed: int, folder: Path) -> AttentionMIL:
    """Attention MIL of a seed, trained on as many bags as the learned cell and its dense part together."""
    path = folder / f"{MIL}.safetensors"
    if not path.is_file():
        *_, dense, branch = list_stages(plan, CELLS[0], seed, folder)
        banks = [load_bank(Path(bank), "train") for bank in plan.banks]
        mil, loss = train_mil(banks, seed, dense.steps + branch.steps, branch.accumulation, branch.patches)
        save_mil(mil, path)
        print(f"{MIL}, seed {seed}: loss {loss:.3f}", flush=True)
    return load_mil(path)


def is_answered(plan: Plan, cell: Cell, log: Path) -> bool:
    """Whether all questions of a cell have been asked of all its rows."""
    records = read_records(log)
    return all(row in records.get(number, {}) for row in cell.rows for number in range(count_asked(plan, row)))


def estimate_seconds(plan: Plan, cell: Cell, seed: int, folder: Path) -> float:
    """About what is left of a cell without its shared dense part, on one core with the embedded LLM."""
    left = 0.0
    if cell.train:
        *_, own = list_stages(plan, cell, seed, folder)
        if not is_trained(own):
            for step in range(own.steps):
                tokens = own.num_tokens if own.is_hard(step) else own.patches_at(step)
                left += own.accumulation * (0.3 + 0.005 * tokens)
    known = read_records(folder / cell.name / "records.jsonl").values()
    for row in cell.rows:
        each = 0.3 + 0.002 * plan.n if row in LONG else 0.3
        left += each * max(0, count_asked(plan, row) - sum(row in one for one in known))
    return left


def write_overview(plan: Plan, cells: Sequence[Cell], seeds: Sequence[int], out: Path) -> str:
    """What a run would do, as Markdown."""
    rows, total = [], 0.0
    for seed in seeds:
        folder = out / f"seed-{seed}"
        for cell in cells:
            left = estimate_seconds(plan, cell, seed, folder)
            total += left
            trained = not cell.train or is_trained(list_stages(plan, cell, seed, folder)[-1])
            done = is_answered(plan, cell, folder / cell.name / "records.jsonl")
            state = "done" if trained and done else "trained" if trained and cell.train else "to do"
            changes = ", ".join(f"{name} {value}" for name, value in cell.changes.items())
            rows.append([seed, cell.name, changes, state, f"{left / 3600:.1f}"])
    table = write_table(["seed", "cell", "changes", "state", "hours left, about"], rows)
    return f"{table}\n\nAbout {total / 3600:.0f} hours on one core, and the dense parts of each seed."


def read_plan(out: Path) -> Plan:
    """The plan of the numbers in a folder. Raises ValueError if there is none."""
    path = out / "plan.json"
    if not path.is_file():
        raise ValueError(f"{path} is not there; --out is the folder of a grid that was run.")
    return Plan(**json.loads(path.read_text()))


def run_grid(plan: Plan, cells: Sequence[Cell], seeds: Sequence[int], out: Path) -> str:
    """Run what is left of the grid, seed by seed, and write the tables after every cell; returns them as Markdown.

    Raises ValueError if the folder holds another plan's numbers.
    """
    claim(out, asdict(plan), "plan.json")
    text = ""
    for seed in seeds:
        for cell in cells:
            run_cell(plan, cell, seed, out / f"seed-{seed}")
            tables = make_tables(plan, out)
            text = write_tables(plan, tables)
            record = {title: {name: asdict(entry) for name, entry in table.items()} for title, table in tables.items()}
            write_json(out / "tables.json", {"plan": asdict(plan), "tables": record})
            write_text(out / "tables.md", text + "\n")
    return text


def main() -> None:
    parser = make_parser(__doc__)
    add_flag(parser, "--banks")
    add_flag(parser, "--out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[cell.name for cell in CELLS], metavar="CELL")
    parser.add_argument("--init", nargs="+", default=[], help="a dense checkpoint for each seed 0, 1, ...")
    parser.add_argument("--recipe", nargs="+", default=list(RECIPE), choices=RECIPES, help="ends with the one to cut")
    parser.add_argument("--llm", default=Plan.llm)
    parser.add_argument("--dense-steps", type=int, default=0, help="default: the recipe's")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of a cell; 0: the recipe's")
    parser.add_argument("--accumulation", type=int, default=0, help="bags of a step; default: the recipe's")
    add_flag(parser, "--n", default=Plan.n)
    add_flag(parser, "--questions", default=Plan.questions, help="of each seed")
    parser.add_argument(
        "--long-questions", type=int, default=Plan.long_questions, help="for rows of N tokens and of other K"
    )
    parser.add_argument("--dry-run", action="store_true")
    add_flag(parser, "--tables")
    given = parser.parse_args()
    if given.tables:
        plan = read_plan(given.out)
        print(write_tables(plan, make_tables(plan, given.out)))
        return
    if not given.banks:
        raise ValueError("--banks is missing: the feature banks of python -m train.data.mosaic bank.")
    plan = Plan(
        tuple(given.banks), tuple(given.recipe), tuple(given.init), given.llm, given.dense_steps, given.steps,
        given.accumulation, given.n, given.questions, given.long_questions,
    )  # fmt: skip
    cells = [cell for cell in CELLS if not given.only or cell.name in given.only]
    if given.dry_run:
        print(write_overview(plan, cells, given.seeds, given.out))
    else:
        print(run_grid(plan, cells, given.seeds, given.out))


if __name__ == "__main__":
    run_command(main)
