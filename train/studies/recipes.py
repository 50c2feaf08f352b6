"""The paper's literal schedule beside the own recipe without a language model, at 3 % of the patches, with many seeds.

    python -m train.studies.recipes --bank runs/tiles.safetensors --out runs/recipes --pilot   # what seeds can tell
    python -m train.studies.recipes --bank runs/tiles.safetensors --out runs/recipes --seeds 12
    python -m train.studies.recipes --out train/studies/answers/schedules/without-llm --tables

Slide encoder, scorer, gate and denoiser are the method's, and a readout stands for the LLM (train/studies/parts.py).
Stage 1 learns which kinds a mosaic holds, as a caption tells; stage 2, the slide encoder frozen, what its questions
tell of the kinds that they name. Both schedules take the same steps on the same data from the same weights, with the
rates of their recipes; only what schedule() takes of a recipe differs. Mosaics are asked about after each stage: those
of slides that nothing was trained on (`val`) and new ones of the tiles that were (`train`). Nothing is chosen by them.

A run that was stopped goes on with the training that it was at. B bags of a step, N patches, C kinds.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sparsewsi.files import append_line, read_lines
from sparsewsi.model.selector import hard_topk
from train.config import RECIPES, Ended, TrainConfig
from train.data.example import Example
from train.data.kinds import WORDS
from train.data.stream import MosaicStream
from train.eval.statistics import estimate_from_seeds, estimate_mean
from train.eval.table import write_percent, write_points, write_table
from train.flags import add_flag, make_parser, run_command
from train.run_folder import claim, digest_of
from train.sparselearn import hardness, soft_topk, zscore
from train.stage import choose_sparsity, learning_rate
from train.studies import parts
from train.studies.parts import PILOT, Asked, Data, Pupil, count_seeds, disturb, find_effect, make_optimizer, mark
from train.studies.schedules import SCHEDULES, schedule

SPLITS = ("val", "train")
WHAT = ("accuracy", "recall", "kinds")
EFFECT = 0.1  # a difference that such a study is to find in four of five cases


@dataclass(frozen=True)
class Plan(parts.Plan):
    """What the numbers depend on; a folder holds those of one plan."""

    second: int = 160  # steps of stage 2; `steps` are those of stage 1
    patches: int = 256  # of a bag, once it has grown
    k: int = 8


def list_stages(plan: Plan, name: str) -> list[TrainConfig]:
    """The settings of both stages; `name` is one of SCHEDULES. Stage 2 begins at the tau that its recipe says."""
    stages: list[TrainConfig] = []
    for recipe, steps in zip(SCHEDULES[name], (plan.steps, plan.second)):
        settings = schedule(RECIPES[recipe](), plan.patches, plan.patches)
        config = replace(RECIPES[recipe](), **settings, num_tokens=plan.k, steps=steps)
        if stages:
            before = stages[-1]
            config = config.with_selection(Ended(before.kernel, before.gate, before.denoiser, before.tau_end))
        stages.append(config)
    return stages


def list_told(examples: Sequence[Example], kinds: Sequence[str]) -> Tensor:
    """(B, C): how many of a bag's questions tell whether a kind is there; a caption tells of all."""
    told = torch.zeros(len(examples), len(kinds))
    for row, example in zip(told, examples):
        for question in example.questions:
            text = " ".join((question.question, *question.options))
            named = torch.tensor([WORDS[kind] in text for kind in kinds])
            row += torch.ones(len(kinds)) if question.family in ("caption", "name") else named
    return told


def train_stage(pupil: Pupil, plan: Plan, data: Data, config: TrainConfig, seed: int) -> None:
    """Train a stage with the schedule and the rates of its settings."""
    stream = MosaicStream((data.train,), seed * 2 + config.stage, config.stage)
    pupil.train()
    pupil.slide_encoder.requires_grad_(config.stage == 1)
    optimizer, rate = make_optimizer(pupil, plan), plan.lr * config.lr / RECIPES["stage1"]().lr
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * learning_rate(step, config)
        n = config.patches_at(step)
        examples = [stream.example(step * plan.bags + number, n) for number in range(plan.bags)]
        present = torch.tensor([[float(kind in example.kinds) for kind in data.kinds] for example in examples])
        generator = torch.Generator().manual_seed((seed * 2 + config.stage) * 1_000_003 + step)
        features = disturb(torch.stack([example.features for example in examples]).float(), generator)
        if config.is_hard(step):
            logits, _ = pupil.keep(features)
        else:
            logits = pupil(features, *choose_sparsity(config, step, n), generator)
        told = list_told(examples, data.kinds)
        loss = F.binary_cross_entropy_with_logits(logits, present, told, reduction="sum") / told.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def examine(pupil: Pupil, asked: Sequence[Asked], kinds: Sequence[str], tau: float, seed: int) -> dict:
    """Marks of the hard top K, of as many random patches and of all; hardness at the last tau; and what was right."""
    pupil.eval()
    generator, k = torch.Generator().manual_seed(seed), pupil.sparselearn.k
    marks: dict[str, list[list[float]]] = {"learned": [], "random": [], "all": []}
    hard = []
    for start in range(0, len(asked), 50):
        part = asked[start : start + 50]
        features = torch.stack([features for features, _, _ in part])
        x = pupil.encode(features)
        scores = pupil.scorer(x)
        hard.append(hardness(soft_topk(zscore(scores), k, tau), scores, k))
        shown = {
            "learned": torch.stack([hard_topk(row, k) for row in scores]),
            "random": torch.rand(scores.shape, generator=generator).topk(k).indices,
            "all": torch.arange(x.shape[1]).expand(scores.shape),
        }
        for name, rows in shown.items():
            logits = pupil.readout(x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1])))
            for (_, truth, question), told, kept in zip(part, logits, rows.numpy()):
                marks[name].append(mark(truth, question, told, kept, kinds))
    found = {name: dict(zip(WHAT, map(float, np.mean(each, 0)))) for name, each in marks.items()}
    right = "".join(str(int(each[0])) for each in marks["learned"])
    return found | {"hardness": float(torch.cat(hard).mean()), "tau": tau, "right": right}


def run_seed(plan: Plan, data: Data, seed: int, name: str, log: Path) -> None:
    """Train both stages with a schedule and write a line about each."""
    asked = {split: data.questions(split, seed) for split in SPLITS}
    torch.manual_seed(seed)
    pupil = Pupil(plan, len(data.kinds))
    lines = []
    for config in list_stages(plan, name):
        train_stage(pupil, plan, data, config, seed)
        found = {split: examine(pupil, asked[split], data.kinds, config.tau_end, seed) for split in SPLITS}
        lines.append({"seed": seed, "schedule": name, "stage": config.stage} | found)
    for line in lines:
        append_line(log, line)


def run_study(plan: Plan, bank: Path, seeds: Sequence[int], log: Path) -> None:
    """Train what is not trained of some seeds."""
    data, lines = Data(plan, bank), list(read_lines(log))
    done = {(line["seed"], line["schedule"]) for line in lines if line["stage"] == 2}
    for seed in tqdm(seeds, desc="seeds", disable=None):
        for name in SCHEDULES:
            if (seed, name) not in done:
                run_seed(plan, data, seed, name, log)


# ------------------------------------------------------------------------------------------------------------- tables


def read_study(log: Path) -> list[dict]:
    """A record for each seed, schedule and stage. Raises ValueError where nothing was trained."""
    if not log.exists():
        raise ValueError(f"{log} is not there; --out is the folder of seeds that were trained.")
    # A training that was cut off is done again: of its lines the last ones count.
    return list({(line["seed"], line["schedule"], line["stage"]): line for line in read_lines(log)}.values())


def list_pairs(records: Sequence[dict], stage: int, split: str) -> list[tuple[dict, dict]]:
    """(literal, own) of each seed that has both after a stage."""
    found = {(each["seed"], each["schedule"]): each[split] for each in records if each["stage"] == stage}
    seeds = sorted({seed for seed, _ in found if all((seed, name) in found for name in SCHEDULES)})
    return [(found[seed, "literal"], found[seed, "own"]) for seed in seeds]


def read_right(found: Sequence[dict]) -> np.ndarray:
    """(S, Q) 0 or 1: what was right with the learned patches."""
    return np.array([[float(letter) for letter in each["right"]] for each in found])


def write_power(pilot: Sequence[dict], seeds: int) -> str:
    """What the pilot's spread of own minus literal lets seeds tell of accuracy after stage 2."""
    lines = []
    for split in SPLITS:
        differences = [
            own["learned"]["accuracy"] - lit["learned"]["accuracy"] for lit, own in list_pairs(pilot, 2, split)
        ]
        if len(differences) > 2:
            spread = float(np.std(differences, ddof=1))
            told = f"{100 * find_effect(spread, seeds):.1f}" if seeds > 2 else ""
            lines.append([split, len(differences), f"{100 * spread:.1f}", count_seeds(spread, EFFECT), told])
    head = ("tiles", "pilot seeds", "sd of the difference, points", f"seeds for {100 * EFFECT:.0f} points")
    return write_table((*head, f"points that {seeds} seeds tell"), lines)


def write_schedules(records: Sequence[dict]) -> str:
    """A row for each schedule and stage, and own minus literal."""
    lines = []
    for split in SPLITS:
        for stage in (1, 2):
            pairs = list_pairs(records, stage, split)
            if len(pairs) < 2:
                continue
            columns = dict(zip(SCHEDULES, zip(*pairs)))
            for name, found in columns.items():
                right = read_right(found)
                cells = [split, stage, name, len(found), write_points(estimate_mean(right))]
                cells += [
                    f"{100 * np.mean([each[row]['accuracy'] for each in found]):.1f}" for row in ("random", "all")
                ]
                for what in ("recall", "kinds"):
                    cells.append(write_points(estimate_from_seeds([each["learned"][what] for each in found])))
                    cells.append(write_percent(float(np.mean([each["random"][what] for each in found]))))
                hard = [each["hardness"] for each in found]
                lines.append([*cells, f"{np.mean(hard):.2f} ({min(hard):.2f} to {max(hard):.2f})", found[0]["tau"]])
            literal, own = columns.values()
            cells = [split, stage, "own minus literal", len(pairs)]
            cells += [write_points(estimate_mean(read_right(own) - read_right(literal)), "+"), "", ""]
            for what in ("recall", "kinds"):
                pair = zip(literal, own)
                differences = [two["learned"][what] - one["learned"][what] for one, two in pair]
                cells += [write_points(estimate_from_seeds(differences), "+"), ""]
            lines.append([*cells, "", ""])
    head = ("tiles", "after stage", "schedule", "seeds", "accuracy", "random patches", "all patches", "needle recall")
    return write_table((*head, "by chance", "kinds found", "by chance", "hardness", "last tau"), lines)


def write_tables(records: Sequence[dict]) -> str:
    """The power that the pilot promises, then the schedules by the seeds that count."""
    pilot = [record for record in records if record["seed"] >= PILOT]
    counted = [record for record in records if record["seed"] < PILOT]
    seeds = len({record["seed"] for record in counted})
    found = [write_power(pilot, seeds)] if pilot else []
    return "\n\n".join([*found, write_schedules(counted)] if counted else found)


def main() -> None:
    parser = make_parser(__doc__)
    add_flag(parser, "--bank")
    add_flag(parser, "--out")
    parser.add_argument("--pilot", action="store_true", help="train the pilot's seeds: what can be told")
    parser.add_argument("--seeds", type=int, default=3, help="how many; of the pilot, too")
    parser.add_argument("--steps", type=int, nargs=2, default=(Plan.steps, Plan.second), help="of stage 1 and stage 2")
    add_flag(parser, "--questions", default=Plan.questions, help="of each seed and split")
    add_flag(parser, "--tables")
    given = parser.parse_args()
    log = given.out / "seeds.jsonl"
    if not given.tables:
        if given.bank is None:
            raise ValueError("--bank is missing, a file of python -m train.data.mosaic bank.")
        steps, second = given.steps
        plan = Plan(digest_of(given.bank), steps=steps, second=second, questions=given.questions)
        claim(given.out, asdict(plan), "plan.json")
        first = PILOT if given.pilot else 0
        run_study(plan, given.bank, range(first, first + given.seeds), log)
    print(write_tables(read_study(log)))


if __name__ == "__main__":
    run_command(main)
