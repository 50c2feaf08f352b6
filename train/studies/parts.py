"""What the noise gate and the diagonal denoiser are worth (the paper's Table 2), with seeds enough to tell.

    python -m train.studies.parts --bank runs/tiles.safetensors --out runs/parts --pilot   # how many seeds it takes
    python -m train.studies.parts --bank runs/tiles.safetensors --out runs/parts --seeds 20
    python -m train.studies.parts --out train/studies/answers/parts --tables

No language model: slide encoder, scorer, gate and denoiser as in the method, and a readout in its place. A learned
query for each kind attends to the visual tokens and says whether the kind is there, and a question is answered by that.
What is measured is thus what gate and denoiser do to what is selected and to what can be read of it, not to an LLM.

All arms of a seed start from one dense training (alpha = 1) and see the same bags, the same dropout and the same noise;
they differ in gate and denoiser alone. K and tau are annealed as in own-stage1, without hard steps at the end, which
the paper's training has not. Questions are about the hard top K without gate and denoiser, of mosaics of the tiles that
were trained on (`train`) and of those of other slides (`val`, by which the number of seeds is chosen, and `test`).
Pilot seeds are others than those that are counted.

B bags of a step, N patches, D width of a token, C kinds.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from sparsewsi.files import append_line, read_lines
from sparsewsi.model.selector import Scorer, hard_topk
from sparsewsi.model.slide_encoder import SlideEncoder
from train.config import own_stage1
from train.data.bank import Bank, load_bank
from train.data.example import Question
from train.data.kinds import NEEDLES, WORDS
from train.data.stream import MosaicStream, ask_in_turn
from train.eval.statistics import estimate_from_seeds
from train.eval.table import write_points, write_table
from train.flags import add_flag, make_parser, run_command
from train.run_folder import claim, digest_of
from train.sparselearn import SparseLearn, k_at, tau_at

ARMS = {  # gate, denoiser
    "all parts": ("vp", "local"),
    "scale gate": ("scale", "local"),
    "global denoiser": ("vp", "global"),
}
PAPER = {"scale gate": 70.40 - 73.32, "global denoiser": 71.62 - 73.32}
SPLITS = ("val", "train", "test")
ASKED = 10**6  # added to a seed: mosaics that are asked about are not those that are trained on
NOISE, DROPOUT = 0.3, 0.3  # of the features in training
PILOT = 1000  # the first seed of the pilot
Asked = tuple[Tensor, np.ndarray, Question]  # features (N, components) and kinds (N,) of a mosaic, and a question
EFFECT, POWER = 0.03, 0.8  # a difference of 3 points is to be found in 80 % of such studies


@dataclass(frozen=True)
class Plan:
    """What the numbers depend on; a folder holds those of one plan."""

    bank: str  # digest
    steps: int = 320
    bags: int = 12  # of a step
    patches: int = 64  # of a bag
    n: int = 256  # of a mosaic that is asked about
    k: int = 16
    components: int = 64  # of the features, those in which training tiles differ most
    dim: int = 64
    lr: float = 2e-3
    questions: int = 250  # of each seed and split, a fifth of them (about the background) not asked


class Readout(nn.Module):
    """Tokens (..., N, D) -> logits (..., C): is there a patch of this kind? A learned query a kind looks for it."""

    def __init__(self, dim: int, kinds: int, heads: int = 4):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(kinds, dim) * dim**-0.5)
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        queries = self.queries.expand(*x.shape[:-2], -1, -1)
        seen = self.attention(queries, x, x, need_weights=False)[0]  # (..., C, D)
        return self.head(queries + seen)[..., 0]


class Pupil(nn.Module):
    """What is trained: everything of the method but the LLM."""

    optimizer: torch.optim.Optimizer | None = None

    def __init__(self, plan: Plan, kinds: int, gate: str = "vp", denoiser: str = "local"):
        super().__init__()
        self.slide_encoder = SlideEncoder(plan.components, plan.dim)
        self.scorer = Scorer(plan.dim)
        self.sparselearn = SparseLearn(plan.dim, plan.k, gate=gate, denoiser=denoiser)
        self.readout = Readout(plan.dim, kinds)

    def forward(self, features: Tensor, tau: float, k: float | None, generator: torch.Generator) -> Tensor:
        """Logits (B, C) of bags (B, N, components) on the training path; k None: alpha = 1."""
        x = self.slide_encoder(features)
        if k is not None:
            x = self.sparselearn(x, self.scorer(x), tau, k=k, generator=generator)
        return self.readout(x)

    def keep(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) of the hard top K, as at inference, and which patches (B, K) these are."""
        with torch.no_grad():
            rows = torch.stack([hard_topk(scores, self.sparselearn.k) for scores in self.scorer(self.encode(features))])
        kept = features.gather(1, rows[..., None].expand(-1, -1, features.shape[-1]))
        return self.readout(self.slide_encoder(kept)), rows

    def encode(self, features: Tensor) -> Tensor:
        """Visual tokens (B, N, D)."""
        return self.slide_encoder(features)


class Data:
    """Bags of a bank in its first principal components, whose variance is 1 on average."""

    def __init__(self, plan: Plan, path: Path):
        self.plan, self.path = plan, path
        train = load_bank(path, "train")
        features = train.features.float()
        self.mean = features.mean(0)
        _, values, vectors = torch.linalg.svd(features - self.mean, full_matrices=False)
        spread = values[: plan.components].square().mean().sqrt() / math.sqrt(len(features))
        self.axes = vectors[: plan.components].T / spread
        self.train = self.reduce(train)
        self.kinds = NEEDLES[train.origin]

    def reduce(self, bank: Bank) -> Bank:
        """The bank with features (M, components)."""
        reduced = (bank.features.float() - self.mean) @ self.axes
        return Bank(reduced, bank.kinds, bank.sources, bank.origin, bank.encoder)

    def batch(self, stream: MosaicStream, step: int, n: int) -> tuple[Tensor, Tensor]:
        """Features (B, N, components) of a step's bags, and which kinds (B, C) they hold."""
        examples = [stream.example(step * self.plan.bags + number, n) for number in range(self.plan.bags)]
        present = [[float(kind in example.kinds) for kind in self.kinds] for example in examples]
        return torch.stack([example.features for example in examples]).float(), torch.tensor(present)

    def questions(self, split: str, seed: int) -> list[Asked]:
        """Features (N, components), kinds (N,) and a question of each mosaic of a split."""
        bank = self.reduce(load_bank(self.path, split))
        asked = ask_in_turn(bank, self.plan.questions, self.plan.n, ASKED + seed)
        return [
            (bag.features.float(), kinds, question) for bag, kinds, question in asked if question.family != "dominant"
        ]


def answer(logits: Tensor, question: Question, kinds: Sequence[str]) -> str:
    """The option that the logits (C,) of the kinds speak for."""
    told = {WORDS[kind]: float(logit) for kind, logit in zip(kinds, logits)}
    if question.options == ("Yes", "No"):
        [logit] = [told[word] for word in told if question.question == f"Does this slide contain {word}?"]
        return "Yes" if logit > 0 else "No"
    choose = min if question.family == "absent" else max
    return choose(question.options, key=lambda option: told[option])


def mark(truth: np.ndarray, question: Question, told: Tensor, kept: np.ndarray, kinds: Sequence[str]) -> list[float]:
    """Of a mosaic of kinds (N,): is the answer right, and the shares of needle patches and of needle kinds kept."""
    needles = np.isin(truth, kinds)
    right = float(answer(told, question, kinds) == question.answer)
    found = len(set(truth[kept][needles[kept]])) / len(set(truth[needles]))
    return [right, float(needles[kept].sum() / needles.sum()), found]


@torch.no_grad()
def examine(pupil: Pupil, asked: Sequence[Asked], kinds: Sequence[str]) -> dict:
    """Shares of right answers, of needle patches kept, and of needle kinds of which one is."""
    pupil.eval()
    marks = []
    for start in range(0, len(asked), 50):
        part = asked[start : start + 50]
        logits, rows = pupil.keep(torch.stack([features for features, _, _ in part]))
        for (_, truth, question), told, kept in zip(part, logits, rows.numpy()):
            marks.append(mark(truth, question, told, kept, kinds))
    pupil.train()
    return dict(zip(("accuracy", "recall", "kinds"), np.mean(marks, 0)))


def make_optimizer(pupil: Pupil, plan: Plan) -> torch.optim.Optimizer:
    """AdamW over all of the pupil."""
    return torch.optim.AdamW(pupil.parameters(), lr=plan.lr, weight_decay=0.01)


def disturb(features: Tensor, generator: torch.Generator) -> Tensor:
    """Features (B, N, components) without some components of each bag, and with noise."""
    seen = torch.rand(len(features), 1, features.shape[-1], generator=generator) > DROPOUT
    return features * seen / (1 - DROPOUT) + NOISE * torch.randn(features.shape, generator=generator)


def train_steps(pupil: Pupil, plan: Plan, data: Data, seed: int, steps: range) -> None:
    """Train on these steps of the schedule of own-stage1: dense, annealed, then held."""
    schedule = own_stage1()
    stream = MosaicStream((data.train,), seed, 1)
    optimizer = pupil.optimizer = pupil.optimizer or make_optimizer(pupil, plan)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / plan.steps))
        features, present = data.batch(stream, step, plan.patches)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        features = disturb(features, generator)
        over = step - round(schedule.dense * plan.steps)
        total = round(schedule.anneal * plan.steps)
        tau = tau_at(over, total, schedule.tau_start, schedule.tau_end)
        k = None if over < 0 else k_at(over, total, schedule.k_start * plan.patches, plan.k)
        logits = pupil(features, tau, k, generator)
        loss = F.binary_cross_entropy_with_logits(logits, present)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()


def branch(dense: Pupil, plan: Plan, kinds: int, gate: str, denoiser: str, seed: int) -> Pupil:
    """A copy of the dense pupil, its optimizer's moments included, with another gate and denoiser."""
    torch.manual_seed(seed)
    pupil = Pupil(plan, kinds, gate, denoiser)
    own = pupil.sparselearn.state_dict()
    pupil.load_state_dict(dense.state_dict() | {f"sparselearn.{name}": value for name, value in own.items()}, False)
    optimizer = pupil.optimizer = make_optimizer(pupil, plan)
    assert dense.optimizer is not None
    moments = dense.optimizer.state
    old = dict(dense.named_parameters())
    for name, parameter in pupil.named_parameters():
        if name in old and old[name] in moments:
            optimizer.state[parameter] = copy.deepcopy(moments[old[name]])
    return pupil


def run_seed(plan: Plan, data: Data, seed: int, log: Path) -> None:
    """Train all arms of a seed and write a line for each."""
    torch.manual_seed(seed)
    asked = {split: data.questions(split, seed) for split in SPLITS}
    dense, first = Pupil(plan, len(data.kinds)), round(own_stage1().dense * plan.steps)
    train_steps(dense, plan, data, seed, range(first))
    for arm, (gate, denoiser) in ARMS.items():
        pupil = branch(dense, plan, len(data.kinds), gate, denoiser, seed)
        train_steps(pupil, plan, data, seed, range(first, plan.steps))
        append_line(
            log, {"seed": seed, "arm": arm} | {split: examine(pupil, asked[split], data.kinds) for split in SPLITS}
        )


# ------------------------------------------------------------------------------------------------------------- tables


def count_seeds(spread: float, effect: float = EFFECT, power: float = POWER) -> int:
    """How many seeds find a paired difference with this standard deviation between seeds, by a t test at 5 %."""
    for seeds in range(3, 10_000):
        if find_power(spread, seeds, effect) >= power:
            return seeds
    raise ValueError(f"a spread of {spread:.3f} between seeds needs more than 10,000 of them.")


def find_power(spread: float, seeds: int, effect: float) -> float:
    """In which share of such studies the difference is found."""
    edge, centre = stats.t.ppf(0.975, seeds - 1), effect / spread * math.sqrt(seeds)
    return float(stats.nct.sf(edge, seeds - 1, centre) + stats.nct.cdf(-edge, seeds - 1, centre))


def find_effect(spread: float, seeds: int, power: float = POWER) -> float:
    """The difference that so many seeds find with this power, to a tenth of a point."""
    return next(effect / 1000 for effect in range(1, 1000) if find_power(spread, seeds, effect / 1000) >= power)


def read_differences(records: Sequence[dict], arm: str, split: str, what: str) -> np.ndarray:
    """(S,) of an arm minus all parts, by seed."""
    found = {(record["seed"], record["arm"]): record[split][what] for record in records}
    seeds = sorted(seed for seed, name in found if name == arm and (seed, "all parts") in found)
    return np.array([found[seed, arm] - found[seed, "all parts"] for seed in seeds])


def write_power(records: Sequence[dict], seeds: int) -> str:
    """What the pilot says: the spread of each difference, how many seeds tell EFFECT, and what those trained tell."""
    lines = []
    for arm in PAPER:
        for split in SPLITS:
            differences = read_differences(records, arm, split, "accuracy")
            if len(differences) > 2:
                spread = float(differences.std(ddof=1))
                told = f"{100 * find_effect(spread, seeds):.1f}" if seeds > 2 else ""
                lines.append([arm, split, len(differences), f"{100 * spread:.1f}", count_seeds(spread), told])
    head = ("without", "tiles", "pilot seeds", "sd of the difference, points", f"seeds for {100 * EFFECT:.0f} points")
    return write_table((*head, f"points that {seeds} seeds tell"), lines)


def write_differences(records: Sequence[dict]) -> str:
    """Accuracy, recall and kinds found of every arm, and its paired differences, with Student's t over seeds."""
    lines = []
    for split in SPLITS:
        for arm in ARMS:
            mine = [record[split] for record in records if record["arm"] == arm]
            if len(mine) < 2:
                continue
            cells = [split, arm, len(mine)]
            for what in ("accuracy", "recall", "kinds"):
                cells.append(write_points(estimate_from_seeds([each[what] for each in mine])))
            for what in ("accuracy", "recall"):
                differences = read_differences(records, arm, split, what)
                cells.append(write_points(estimate_from_seeds(differences), "+") if arm in PAPER else "")
            cells.append(f"{PAPER[arm]:+.1f}" if arm in PAPER else "")
            lines.append(cells)
    head = ("tiles", "arm", "seeds", "accuracy", "needle recall", "kinds found", "accuracy minus all parts")
    return write_table((*head, "recall minus all parts", "the paper's"), lines)


def write_tables(records: Sequence[dict]) -> str:
    """The power that the pilot promises, then the differences of the seeds that count."""
    pilot = [record for record in records if record["seed"] >= PILOT]
    counted = [record for record in records if record["seed"] < PILOT]
    seeds = len({record["seed"] for record in counted})
    parts = [write_power(pilot, seeds)] if pilot else []
    return "\n\n".join([*parts, write_differences(counted)] if counted else parts)


def main() -> None:
    parser = make_parser(__doc__)
    add_flag(parser, "--bank")
    add_flag(parser, "--out")
    parser.add_argument("--pilot", action="store_true", help="train the pilot's seeds: how many are needed")
    parser.add_argument("--seeds", type=int, default=8, help="how many; of the pilot, too")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    add_flag(parser, "--questions", default=Plan.questions, help="of each seed and split")
    add_flag(parser, "--tables")
    given = parser.parse_args()
    log = given.out / "seeds.jsonl"
    if not given.tables:
        if given.bank is None:
            raise ValueError("--bank is missing, a file of python -m train.data.mosaic bank.")
        plan = Plan(digest_of(given.bank), steps=given.steps, questions=given.questions)
        claim(given.out, asdict(plan), "plan.json")
        data, lines = Data(plan, given.bank), list(read_lines(log)) if log.exists() else []
        done = [line["seed"] for line in lines]
        first = PILOT if given.pilot else 0
        for seed in tqdm(range(first, first + given.seeds), desc="seeds", disable=None):
            if done.count(seed) < len(ARMS):
                run_seed(plan, data, seed, log)
    if not log.exists():
        raise ValueError(f"{log} is not there; --out is the folder of seeds that were trained.")
    # A seed that was cut off is trained again: of its lines the last ones count.
    records = {(line["seed"], line["arm"]): line for line in read_lines(log)}
    print(write_tables(list(records.values())))


if __name__ == "__main__":
    run_command(main)
