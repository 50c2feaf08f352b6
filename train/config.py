"""Training recipes: one dataclass of flags, and functions that return the settings of a stage."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsewsi.model.config import OPTION_SCORINGS, SparseWSIConfig

MOST_PATCHES = 10_240  # of a slide, in training and in evaluation; a larger one gives so many, evenly spaced

# What stage 1 decides, and stage 2 takes over.
OF_THE_MODEL = ("llm", "dim", "slide_encoder", "scorer_attention", "scorer_relative", "diversity")
OF_THE_MODEL += ("position", "max_position", "num_tokens")
# What a checkpoint's scorer was trained with, and what goes on from it must have.
OF_THE_SELECTION = ("kernel", "gate", "denoiser")
# What may change when a run goes on: how fast it learns, how long it lasts, how many processes share a step's bags, and
# what decides no result.
MAY_CHANGE = (
    *("out", "steps", "epochs", "accumulation", "lr", "lr_encoder", "lr_lora", "warmup", "weight_decay", "clip"),
    *("checkpoint_every", "keep", "tokens_per_pass", "fsdp", "trackio"),
)
_AT_LEAST_ONE = ("steps", "accumulation", "questions_per_bag", "dim", "num_tokens", "lora_rank", "patches")
_AT_LEAST_ONE += ("patches_hard", "checkpoint_every")
_SHARES = ("other_tissue", "real_slides", "open_world", "lora_dropout", "warmup", "dense", "anneal", "k_start")
_SHARES += ("curriculum", "hard")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training stage. Raises ValueError for values that no run can have."""

    stage: int = 1  # 1: captions, LLM frozen; 2: questions, slide encoder frozen, LoRA on the LLM
    out: str = "runs/stage1"
    banks: list[str] = field(default_factory=list)  # feature banks (python -m train.data.mosaic bank)
    slides: str = ""  # feature bank of real slides with published facts (python -m train.data.real bank)
    data: list[str] = field(default_factory=list)  # or files of questions about slides (train/data/questions.py)
    features: str = ""  # with data: folder of the slides' feature files
    init: str = ""  # stage 2: a stage-1 checkpoint folder or its model folder
    llm: str = "smollm2-135m"
    steps: int = 1000
    epochs: float = 0.0  # with data: so many passes over the questions in place of `steps`
    accumulation: int = 8  # bags of a step
    questions_per_bag: int = 4
    other_tissue: float = 0.0  # banks: share of the mosaics with tissue that is neither background nor asked about
    real_slides: float = 0.0  # slides: share of the bags that are real slides
    open_world: float = 0.0  # banks: share of the labelled mosaics that end with any tissue as background; from 0 on
    seed: int = 0
    # model
    dim: int = 512
    slide_encoder: str = "pointwise"
    scorer_attention: str = "local"
    scorer_relative: bool = False
    diversity: float = 0.0  # of the model's selection, which hard steps show the LLM
    position: str = "scaled"  # the paper's original positions wherever they fit
    max_position: int | None = None
    num_tokens: int = 32
    load_in_4bit: bool = False  # the LLM's weights in a quarter of the memory (QLoRA; pip install "sparsewsi[4bit]")
    lora_rank: int = 64
    lora_alpha: int = 128
    lora_dropout: float = 0.0
    targets: str = "text"  # what the answer to a question with options is taught as: its text, or its letter
    # optimiser
    lr: float = 1e-3  # scorer, denoiser, projector
    # A frozen LLM is steered by any constant prefix: at the projector's rate the slide encoder soon emits nearly the
    # same token for every patch (98 % of its power constant after 100 steps), and the noise gate drowns what is left.
    lr_encoder: float = 1e-4
    lr_lora: float = 2e-4
    warmup: float = 0.03  # share of the steps
    weight_decay: float = 0.01
    clip: float = 1.0
    # sparsification; dense steps, K annealing and the length curriculum are ours, the paper has tau only
    kernel: str = "laplace"
    gate: str = "vp"
    denoiser: str = "local"
    tau_start: float = 2.0  # 0: where the stage before ended
    tau_end: float = 0.1
    dense: float = 0.0  # share of the steps with alpha = 1 at the start
    anneal: float = 1.0  # share of the steps over which tau and K then move; the rest holds their last values
    k_start: float = 0.0  # K at the start of the annealing as a share of N; 0: K is num_tokens throughout
    patches_start: int = 0  # patches a bag at the first step; 0: `patches` throughout
    patches: int = 1024  # patches a bag once the curriculum is over
    curriculum: float = 0.0  # share of the steps over which bags grow from patches_start to patches, geometrically
    # ours too: before stage 1, teach slide encoder and projector the LLM's own words for the tissues (train/align.py)
    align: int = 0  # steps
    keep_aligned: float = 0.0  # weight of the same loss in every step of the stage
    # ours too: the last steps show the LLM what inference will, the hard top-K without gate and denoiser
    hard: float = 0.0  # share of the steps
    patches_hard: int = 1024  # patches a bag in these steps
    # house-keeping
    checkpoint_every: int = 50
    keep: int = 2  # checkpoints, the newest; 0: all
    tokens_per_pass: int = 768  # bags share a pass of the LLM up to this length
    fsdp: bool = False  # under torchrun: shard an LLM that does not fit over the processes; then one bag a pass
    trackio: str = ""  # name of a trackio project that gets the metrics too (pip install trackio)
    contents: str = ""  # fingerprint of the files of banks and data, filled in by the run

    def __post_init__(self) -> None:
        if self.stage not in (1, 2):
            raise ValueError(f"stage is 1 or 2, got {self.stage!r}.")
        if self.targets not in OPTION_SCORINGS:
            raise ValueError(f"--targets is {' or '.join(OPTION_SCORINGS)}, got {self.targets!r}.")
        for name in ("epochs", "keep", "tau_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}.")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is a share from 0 to 1, got {getattr(self, name)}.")

    def with_model(self, model: SparseWSIConfig) -> "TrainConfig":
        """These settings of a stage 2, with those of the model that it starts from.

        Raises ValueError for a setting that was changed to something else than the model has.
        """
        return self._take_over({name: getattr(model, name) for name in OF_THE_MODEL})

    def with_selection(self, ended: "Ended") -> "TrainConfig":
        """These settings of a stage that begins where another one ended.

        Raises ValueError for a kernel, gate or denoiser that was changed to something else.
        """
        config = self._take_over({name: getattr(ended, name) for name in OF_THE_SELECTION})
        return config if config.tau_start else dataclasses.replace(config, tau_start=ended.tau)

    def _take_over(self, has: dict[str, Any]) -> "TrainConfig":
        usual = TrainConfig()
        for name, value in has.items():
            if getattr(self, name) not in (value, getattr(usual, name)):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but the model that stage {self.stage} starts from has "
                    f"{value!r}. Leave out --{name}, or train the stage before with it."
                )
        return dataclasses.replace(self, **has)

    def patches_at(self, step: int) -> int:
        """Patches a bag at this step."""
        if self.is_hard(step):
            return self.patches_hard
        over = self.curriculum * self.steps
        if not self.patches_start or step >= over:
            return self.patches
        return round(self.patches_start * (self.patches / self.patches_start) ** (step / over))

    def is_hard(self, step: int) -> bool:
        """Whether this step trains on the hard top-K."""
        return step >= (1 - self.hard) * self.steps

    def phase(self, step: int) -> float | None:
        """How far the annealing of tau and K has come, in [0, 1]; None while training is dense or hard."""
        begin, over = self.dense * self.steps, max(1.0, self.anneal * self.steps)
        return None if step < begin or self.is_hard(step) else min(1.0, (step - begin) / over)


@dataclass(frozen=True)
class Ended:
    """How the stage behind a checkpoint selected when it was saved."""

    kernel: str
    gate: str
    denoiser: str
    tau: float


def read_config(path: Path) -> TrainConfig:
    """The settings in a train_config.json; those that only an older program knew are left out."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in json.loads(path.read_text()).items() if name in known})


def stage1() -> TrainConfig:
    """The paper's stage 1: LLM frozen, all else trained, literal temperature schedule."""
    return TrainConfig(stage=1, out="runs/stage1", lr=1e-3, warmup=0.1)


def stage2() -> TrainConfig:
    """The paper's stage 2: slide encoder frozen, LoRA on the LLM, literal temperature schedule."""
    return TrainConfig(stage=2, out="runs/stage2", lr=2e-4, lr_lora=2e-4)


def own_stage1() -> TrainConfig:
    """Stage 1 that learned in our trials: dense, then K and tau annealed together while bags grow, then hard."""
    return TrainConfig(
        stage=1, out="runs/stage1", lr=1e-3, warmup=0.1, dense=0.4, anneal=0.4, hard=0.2, tau_start=1.0, tau_end=0.05,
        k_start=0.75, patches_start=64, patches=MOST_PATCHES, patches_hard=MOST_PATCHES, curriculum=0.8,
    )  # fmt: skip


def own_stage2() -> TrainConfig:
    """The stage 2 to it: tau, K and kernel stay where stage 1 ended, and the last quarter is hard."""
    return TrainConfig(
        stage=2, out="runs/stage2", init="runs/stage1/checkpoints/last", lr=2e-4, lr_lora=2e-4, lora_dropout=0.05,
        hard=0.25, tau_start=0.0, tau_end=0.05, patches_start=256, patches=MOST_PATCHES, patches_hard=MOST_PATCHES,
        curriculum=0.5,
    )  # fmt: skip


def demo_stage1() -> TrainConfig:
    """Our stage 1 of the embedded default: words of the tissues without the LLM, then through it on tiny bags."""
    return TrainConfig(
        stage=1, out="runs/demo1", steps=30, accumulation=32, questions_per_bag=1, dim=256, lr=1e-3, lr_encoder=1e-4,
        warmup=0.1, align=150, keep_aligned=0.3, dense=1.0, patches_start=1, patches=8, curriculum=1.0,
        position="compact", scorer_relative=True, diversity=1.0,
    )  # fmt: skip


def demo_stage2() -> TrainConfig:
    """Our stage 2 of the embedded default: dense, then K from 3/4 N to 32 together with tau 1 -> 0.05, then hard.

    Two bags in five are real slides, and of the mosaics of real tiles ever more have any tissue as background.
    """
    return TrainConfig(
        stage=2, out="runs/demo2", init="runs/demo1/checkpoints/last", steps=280, accumulation=12, questions_per_bag=3,
        lr=1e-3, lr_lora=1e-3, lora_rank=16, lora_alpha=32, dense=0.25, anneal=0.35, hard=0.4, tau_start=1.0,
        tau_end=0.05, k_start=0.75, patches_start=12, patches=80, patches_hard=384, curriculum=0.6, real_slides=0.4,
        open_world=0.5, keep_aligned=0.3, checkpoint_every=20, keep=8,
    )  # fmt: skip


RECIPES = {
    "stage1": stage1,
    "stage2": stage2,
    "own-stage1": own_stage1,
    "own-stage2": own_stage2,
    "demo-stage1": demo_stage1,
    "demo-stage2": demo_stage2,
}

# Said when a recipe starts.
NOTES = dict.fromkeys(
    ("stage1", "stage2"),
    "This is the paper's literal schedule: K fixed, tau from 2.0 to 0.1, no dense start. Where it kept 3 % of the "
    "patches it did not learn to answer (3 of 3 runs, and 8 of 8 without a language model), and it found 28 % of the "
    "kinds, the own recipe 91 %; own-stage1 and own-stage2 are what learned there. Keeping 20 %, two short runs of "
    "each were alike.",
)
