"""The paper's literal schedule beside the own recipe, at equal steps on the same bags: what each learns.

    python -m train.studies.schedules --banks runs/tiles.safetensors --out runs/schedules
    python -m train.studies.schedules --out train/studies/answers/schedules --tables  # the table again

Both train stage 1 and stage 2 of the demonstration at a tenth of its size, on mosaics of real tiles, from the same
words (train/align.py) and with the same rates; only what schedule() takes of a recipe differs: tau, K, the dense start,
the growth of bags, the hard end. Both are asked about mosaics of unseen slides at the same K, and about how hard their
soft top-K is there at the last tau; the same about mosaics of training tiles. Of the split `val`, which has tiles of
three of the eight kinds of foci, only these are planted; options name all.

Started again after a kill it goes on where it was. Differences are paired by seed and mosaic.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsewsi.files import write_json
from sparsewsi.model.sparse_wsi import SparseWSI
from train.checkpoint import latest, read_ended
from train.config import RECIPES, TrainConfig
from train.eval.items import Item, make_mosaic_items
from train.eval.running import Way, evaluate
from train.eval.scoring import Record, add_majority, average, is_right
from train.eval.statistics import estimate_mean, estimate_share
from train.eval.table import write_percent, write_points, write_table
from train.flags import add_flag, make_parser, run_command
from train.run import train
from train.run_folder import claim, digest_of, read_records
from train.sparselearn import hardness, soft_topk, zscore

SCHEDULES = {"literal": ("stage1", "stage2"), "own": ("own-stage1", "own-stage2")}
ROWS = ("learned", "random")
SPLITS = ("val", "train")
ASKED = 10**6  # added to the seed of mosaics of training tiles: they are others than those that were trained on


@dataclass(frozen=True)
class Plan:
    """What the numbers depend on; a folder holds those of one plan."""

    bank: str  # digest
    steps: tuple[int, int] = (90, 48)
    accumulation: int = 6
    k: int = 16
    patches: int = 80  # of a bag while the LLM sees all
    n: int = 320  # of a bag in hard steps, and of a mosaic that is asked about
    questions: int = 120
    llm: str = "smollm2-135m"


def schedule(recipe: TrainConfig, patches: int, n: int) -> dict[str, Any]:
    """The settings of a recipe that make its schedule, bags scaled to `patches` and, where hard, to n."""
    names = ("tau_start", "tau_end", "dense", "anneal", "k_start", "curriculum", "hard")
    start = max(8, patches // 12) if recipe.patches_start else 0
    return {name: getattr(recipe, name) for name in names} | {
        "patches_start": start,
        "patches": patches,
        "patches_hard": n,
    }


def list_stages(plan: Plan, banks: Sequence[str], name: str, seed: int, folder: Path) -> list[TrainConfig]:
    """Both stages of a training; `name` is one of SCHEDULES."""
    common = {"banks": list(banks), "seed": seed, "llm": plan.llm, "accumulation": plan.accumulation}
    found: list[TrainConfig] = []
    for demo, recipe, steps in zip(("demo-stage1", "demo-stage2"), SCHEDULES[name], plan.steps):
        config = replace(
            RECIPES[demo](),
            **common,
            **schedule(RECIPES[recipe](), plan.patches, plan.n),  # type: ignore[arg-type]
            questions_per_bag=2,
            keep_aligned=0.3,
            real_slides=0.0,
            open_world=0.0,
            num_tokens=plan.k,
            diversity=0.0,
            steps=steps,
            out=str(folder / demo.removeprefix("demo-")),
            init=str(folder / "stage1" / "checkpoints" / "last") if found else "",
            checkpoint_every=20,
            keep=1,
        )
        found.append(config)
    return found


@torch.no_grad()
def measure_hardness(checkpoint: Path, model: SparseWSI, items: Iterator[Item]) -> dict[str, float]:
    """The last tau, and the mean share of alpha's mass that lies on the hard top K of the items' bags."""
    ended = read_ended(checkpoint)
    assert ended is not None
    found = []
    for item in items:
        scores = model.scorer(model.encode(item.bag.features))
        alpha = soft_topk(zscore(scores), model.config.num_tokens, ended.tau, kernel=ended.kernel)
        found.append(float(hardness(alpha, scores, model.config.num_tokens)))
    return {"tau": ended.tau, "hardness": float(np.mean(found))}


def run_training(plan: Plan, banks: Sequence[str], name: str, seed: int, splits: Sequence[str], out: Path) -> None:
    """Train what is not trained of a schedule and a seed, and ask what has not been asked."""
    folder = out / f"{name}-{seed}"
    checkpoint = Path()
    for config in list_stages(plan, banks, name, seed, folder):
        last = latest(Path(config.out))
        done = last is not None and json.loads((last / "state" / "step.json").read_text())["step"] == config.steps
        checkpoint = last if last is not None and done else train(config)
    model = SparseWSI.from_pretrained(checkpoint / "model")
    for split in splits:

        def items(split: str = split) -> Iterator[Item]:
            asked = seed + ASKED if split == "train" else seed
            return make_mosaic_items(Path(banks[0]), split, plan.questions, plan.n, asked)

        evaluate(model, items(), plan.questions, Way(ROWS), folder / split / "records.jsonl")
        measured = measure_hardness(checkpoint, model, items())
        write_json(folder / split / "hardness.json", measured)


def list_right(records: Mapping[int, Record], row: str) -> np.ndarray:
    """(Q,) 0 or 1."""
    return np.array([float(is_right(records[number], row)) for number in sorted(records)])


def write_tables(plan: Plan, out: Path) -> str:
    """A table for each split: every training, and the paired difference of the schedules."""
    return "\n\n".join(
        text
        for split in SPLITS
        if (text := write_split(plan, out, split))
    )  # fmt: skip


def write_split(plan: Plan, out: Path, split: str) -> str:
    """The table of a split in Markdown; empty where no training was asked all its questions."""
    head = ("schedule", "seed", "accuracy", "random patches", "majority", "needle recall", "by chance")
    head += ("kinds found", "by chance", "hardness", "last tau")
    lines, answered = [], {}
    for name in SCHEDULES:
        for folder in sorted(out.glob(f"{name}-*")):
            records = read_records(folder / split / "records.jsonl")
            found = [records[number] for number in sorted(records)]
            if len(found) < plan.questions or any(row not in record for record in found for row in ROWS):
                continue
            add_majority(found)
            seed = int(folder.name.rpartition("-")[2])
            answered[name, seed] = records
            measured = json.loads((folder / split / "hardness.json").read_text())
            right = list_right(records, "learned")
            cells = [name, seed, write_points(estimate_share(int(right.sum()), len(right)))]
            cells += [f"{100 * list_right(records, row).mean():.1f}" for row in ("random", "majority")]
            for what in ("recall", "kinds"):
                cells += [write_percent(average(found, f"{row} {what}")) for row in ("learned", "random")]
            lines.append([*cells, f"{measured['hardness']:.2f}", f"{measured['tau']:.2f}"])
    if not lines:
        return ""
    seeds = sorted({seed for name, seed in answered if all((other, seed) in answered for other in SCHEDULES)})
    text = f"Bags of {plan.patches} patches in training, mosaics of {plan.n} of the split {split}, K = {plan.k}, "
    text += f"{plan.questions} questions a training.\n\n"
    text += write_table(head, lines)
    if seeds:
        literal, own = (np.stack([list_right(answered[name, seed], "learned") for seed in seeds]) for name in SCHEDULES)
        text += (
            f"\n\nOwn minus literal, in points, {len(seeds)} seeds: {write_points(estimate_mean(own - literal), '+')}."
        )
    return text


def read_plan(out: Path) -> Plan:
    """The plan of the numbers in a folder. Raises ValueError if there is none."""
    path = out / "plan.json"
    if not path.is_file():
        raise ValueError(f"{path} is not there; --out is the folder of schedules that were run.")
    told = json.loads(path.read_text())
    return Plan(**told | {"steps": tuple(told["steps"])})


def main() -> None:
    parser = make_parser(__doc__)
    add_flag(parser, "--banks")
    add_flag(parser, "--out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--steps", type=int, nargs=2, default=Plan.steps, help="of stage 1 and of stage 2")
    parser.add_argument("--k", type=int, default=Plan.k, help="patches kept")
    parser.add_argument("--patches", type=int, default=Plan.patches, help="of a bag while the LLM sees all")
    add_flag(parser, "--n", default=Plan.n, help="patches of a mosaic that is asked about, and of a bag in hard steps")
    add_flag(parser, "--questions", default=Plan.questions, help="of each training")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS, help="whose tiles are asked about")
    add_flag(parser, "--tables")
    given = parser.parse_args()
    if not given.tables:
        if not given.banks:
            raise ValueError("--banks is missing: the feature banks of python -m train.data.mosaic bank.")
        digest = digest_of(*map(Path, given.banks))
        sizes = {"k": given.k, "patches": given.patches, "n": given.n, "questions": given.questions}
        plan = Plan(digest, steps=tuple(given.steps), **sizes)
        claim(given.out, asdict(plan), "plan.json")
        for seed in given.seeds:
            for name in given.only:
                run_training(plan, given.banks, name, seed, given.splits, given.out)
                print(write_tables(plan, given.out), flush=True)
    print(write_tables(read_plan(given.out), given.out))


if __name__ == "__main__":
    run_command(main)
