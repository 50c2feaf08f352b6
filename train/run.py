"""Training loop of both stages.

    python -m train.run demo-stage1 --banks runs/real.safetensors runs/phantom.safetensors --out runs/demo1
    python -m train.run demo-stage2 --banks ... --init runs/demo1/checkpoints/last --out runs/demo2
    python -m train.run own-stage1 --data captions.json --features features/ --out runs/stage1
    python -m train.run own-stage2 --data qa.json --features features/ --out runs/stage2 \\
        --init runs/stage1/checkpoints/last

The recipe named first gives the settings (train/config.py); flags change them. A run that finds checkpoints in its
folder goes on from the last one and continues as if it had not been interrupted, whatever killed it. Under `torchrun
--nproc_per_node=P -m train.run ...` each of P processes, on a GPU of its own where there are any, takes --accumulation
bags a step, and gradients are summed over all bags of all processes: two processes equal one with twice the
accumulation. --fsdp shards an LLM that does not fit (train/sharding.py).

metrics.jsonl gets a line for each step: loss, tau, K and N of the first process's first bag, answer tokens, tokens the
LLM saw and tokens a second over all processes, gradient norm, whether the step was skipped because it was not finite,
seconds, peak memory of the first process (GB; of the GPU where there is one), and every tenth step and at the end
hardness and needle recall. On a GPU lines come ten at a time, as every look at it makes it wait. --trackio PROJECT
shows the same in trackio.
"""

import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm
from transformers import HfArgumentParser

from sparsewsi.bags.bag import UNKNOWN_ENCODER
from sparsewsi.bags.extract import read_ahead
from sparsewsi.files import append_line, write_json
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.llm import default_device
from sparsewsi.model.sparse_wsi import SparseWSI
from train.align import Alignment, align
from train.checkpoint import latest, load_state, read_ended, save_state
from train.config import MAY_CHANGE, NOTES, RECIPES, Ended, TrainConfig, read_config
from train.data.bank import Bank, load_bank
from train.data.example import Example
from train.data.open_world import Mixture, OpenWorld, absent_slides
from train.data.questions import open_training_set
from train.data.real import SlideStream, load_slides
from train.data.slides import SlideVQADataset
from train.data.stream import MosaicStream
from train.flags import run_command
from train.processes import choose_device, rank, share_weights, world_size
from train.run_folder import check_settings, cut_metrics, digest_of, hold
from train.sharding import clip_gradients, shard
from train.sparselearn import SparseLearn
from train.stage import (
    Keep,
    Metrics,
    StageModule,
    build,
    choose_sparsity,
    find_model_folder,
    freeze,
    learning_rate,
    make_optimizer,
    probe,
    step_if,
    train_step,
)

LOOK_EVERY = 10  # steps: how often hardness is measured, and a GPU is asked for metrics
MOST_SKIPPED = 3  # steps one after another without a finite loss and gradient
COUNTS = ("answer_tokens", "tokens", "skipped")
HARD_ENOUGH = 0.95
TEXT_ROOM = 512  # tokens of prompt, question and answer


def open_data(config: TrainConfig) -> tuple[MosaicStream | Mixture | SlideVQADataset, tuple[Bank, ...], int, str]:
    """What to train on, the banks if it comes from these, feature dim and encoder."""
    banks = tuple(load_bank(Path(path), "train") for path in config.banks)
    if bool(banks) == bool(config.data):
        raise ValueError(
            "Pass training data: either --banks (python -m train.data.mosaic bank) or --data with --features."
        )
    if config.data and not config.features:
        raise ValueError("--data needs --features, the folder that holds the slides' feature files.")
    if config.data and config.align:
        raise ValueError("--align needs the labelled patches of --banks. Pass --align 0 with --data.")
    if banks:
        kinds = {(bank.encoder, bank.features.shape[1]) for bank in banks}
        if len(kinds) > 1:
            found = ", ".join(f"{name} ({dim})" for name, dim in sorted(kinds))
            raise ValueError(f"the banks hold features of different encoders: {found}. Pass banks of one.")
        stream = MosaicStream(banks, config.seed, config.stage, config.questions_per_bag, config.other_tissue)
        if config.slides or config.open_world:
            stream = mix(config, stream, banks)
        return stream, banks, banks[0].features.shape[1], banks[0].encoder
    stream = open_training_set(config.data, config.features, config.seed, config.questions_per_bag)
    return stream, (), stream.feature_dim, stream.encoder


def mix(config: TrainConfig, closed: MosaicStream, banks: Sequence[Bank]) -> Mixture:
    """The stream with mosaics of an open world and real slides, as the settings say."""
    real, without = None, None
    if config.slides:
        bank, slides = load_slides(Path(config.slides), "train")
        if (bank.encoder, bank.features.shape[1]) != (banks[0].encoder, banks[0].features.shape[1]):
            raise ValueError(
                f"{config.slides} holds features of {bank.encoder}, the banks those of {banks[0].encoder}."
            )
        slides = tuple(slide for slide in slides if any(slide.facts.values()))
        real = SlideStream(bank, slides, config.seed, config.questions_per_bag)
        clean = [slide.slide for slide in slides if slide.facts["carcinoma"] == slide.facts["malignant"] == "No"]
        without = absent_slides(bank, clean)
    labelled = [bank for bank in banks if bank.origin == "real"]
    opened = OpenWorld(labelled[0], without, config.seed, config.questions_per_bag) if labelled else None
    total = config.steps * config.accumulation * world_size()
    return Mixture(closed, opened, real, total, config.open_world, config.real_slides)


def complete_settings(config: TrainConfig, feature_dim: int, encoder: str) -> TrainConfig:
    """The settings with the fingerprint of the data and, in stage 2, with those of the model it starts from.

    Raises ValueError for features of another kind than the model's, and for an output folder with another run in it.
    """
    if config.stage == 2:
        start = str(latest(Path(config.out)) or config.init)
        if not start:
            raise ValueError("Stage 2 starts from a model. Pass --init, the last checkpoint of stage 1.")
        model = SparseWSIConfig.load(find_model_folder(start))
        same = model.encoder in (encoder, UNKNOWN_ENCODER) or encoder == UNKNOWN_ENCODER
        if model.feature_dim != feature_dim or not same:
            raise ValueError(
                f"the features are of {encoder} (dimension {feature_dim}), but the model that stage 2 starts from "
                f"takes those of {model.encoder} ({model.feature_dim}). Train stage 1 on the same features."
            )
        config = config.with_model(model)
        ended = read_ended(Path(start))
        saved = Path(config.out) / "train_config.json"
        if ended is not None and saved.is_file() and latest(Path(config.out)):  # it goes on: tau began where it began
            ended = replace(ended, tau=read_config(saved).tau_start)
        if ended is not None:
            config = config.with_selection(ended)
        elif not config.tau_start:
            config = replace(config, tau_start=config.tau_end)
    config = replace(
        config, contents=digest_of(*map(Path, [*config.banks, *config.data, *filter(None, [config.slides])]))
    )
    check_settings(Path(config.out) / "train_config.json", asdict(config), MAY_CHANGE, may_be_new=True)
    return config


def peak_memory(device: torch.device) -> float:
    """The most memory this process has held, GB: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@contextmanager
def record_metrics(config: TrainConfig, done: int) -> Iterator[Callable[[dict[str, float]], None]]:
    """A function that writes a step's metrics to metrics.jsonl and to trackio, if asked for; the first process alone.

    metrics.jsonl is the record and holds every step once; trackio keeps the steps that a killed run did twice, twice.
    """
    path, board = Path(config.out) / "metrics.jsonl", None
    if rank() == 0:
        write_json(Path(config.out) / "train_config.json", asdict(config), indent=2)
        cut_metrics(path, done)
        if config.trackio:
            import trackio as board  # type: ignore[import-not-found]

            board.init(project=config.trackio, name=Path(config.out).name, config=asdict(config), resume="allow")

    def record(metrics: dict[str, float]) -> None:
        if rank() == 0:
            append_line(path, metrics)
            if board is not None:
                board.log({name: value for name, value in metrics.items() if name != "step"}, step=int(metrics["step"]))

    try:
        yield record
    finally:
        if board is not None:
            board.finish()


def prepare(
    config: TrainConfig,
    banks: tuple[Bank, ...],
    feature_dim: int,
    encoder: str,
    sparselearn_class: type[SparseLearn] = SparseLearn,
    real: SlideStream | None = None,
) -> tuple[StageModule, torch.optim.Optimizer, int]:
    """Modules and optimizer as they are at the start of a run or after its last checkpoint; and the steps done."""
    checkpoint = latest(Path(config.out))
    torch.manual_seed(config.seed)
    source = replace(config, init=str(checkpoint)) if checkpoint and config.stage == 2 else config
    model, sparselearn = build(source, feature_dim, encoder, sparselearn_class)
    if checkpoint and config.stage == 1:
        model = SparseWSI.from_pretrained(checkpoint / "model", llm=(model.llm, model.tokenizer))  # type: ignore[arg-type]
        freeze(model, config)
    if config.align and not checkpoint:
        align(model, banks, config.align, config.seed, real=real)
    if config.fsdp:
        shard(model.llm, default_device())
    stage = StageModule(model, sparselearn).train()
    if config.keep_aligned:
        stage.alignment = Alignment(model, banks, real)
    for part in (model.slide_encoder, model.scorer, model.projector, sparselearn):
        part.to(model.device)
    share_weights(stage)
    optimizer = make_optimizer(stage, config)
    return stage, optimizer, load_state(checkpoint, sparselearn, optimizer) if checkpoint else 0


def train(config: TrainConfig, sparselearn_class: type[SparseLearn] = SparseLearn, keep: Keep | None = None) -> Path:
    """Run or resume a stage; returns the last checkpoint's folder.

    sparselearn_class, keep: for comparison, what takes the place of SparseLearn, and what hard steps keep
    """
    out = Path(config.out)
    if config.trackio and importlib.util.find_spec("trackio") is None:
        raise ValueError("--trackio needs trackio. pip install trackio, or leave it out: metrics.jsonl holds the same.")
    stream, banks, feature_dim, encoder = open_data(config)
    if config.epochs:
        if not isinstance(stream, SlideVQADataset):
            raise ValueError("--epochs needs --data: mosaics have no end. Pass --steps.")
        bags = config.accumulation * world_size()
        config = replace(config, steps=max(1, math.ceil(config.epochs * len(stream) / bags)))
    config = complete_settings(config, feature_dim, encoder)
    stage, optimizer, done = prepare(
        config, banks, feature_dim, encoder, sparselearn_class, getattr(stream, "real", None)
    )
    if done >= config.steps and rank() == 0:
        print(f"Nothing is left to train: {out} has its {done} steps. Choose another --out to train anew.")

    most = count_room(stage.model)
    if config.patches > most and rank() == 0:
        print(f"Bags have at most {most:,} patches where the LLM sees all of them: its positions hold no more.")

    def load_examples(step: int) -> list[Example]:
        first = (step * world_size() + rank()) * config.accumulation
        n = config.patches_at(step)
        n = n if config.is_hard(step) else min(n, most)
        examples = [stream.example(first + i, n) for i in range(config.accumulation)]
        if stage.model.device.type == "cuda":
            # From pinned memory a copy does not wait for what the GPU does (not yet run on a GPU).
            examples = [replace(example, features=example.features.pin_memory()) for example in examples]
        return examples

    steps = range(done, config.steps)
    bar = tqdm(steps, initial=done, total=config.steps, desc=f"stage {config.stage}", disable=rank() > 0 or None)
    held = hold(out) if rank() == 0 else nullcontext()
    with held, record_metrics(config, done) as record, closing(read_ahead(load_examples, steps, most=2)) as loaded:
        start, skipped, taken, hard = time.perf_counter(), 0, [], {}
        for step, examples in zip(bar, loaded):
            taken.append({"step": step} | take_step(stage, optimizer, examples, config, step, keep))
            saved = (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
            look = step % LOOK_EVERY == 0 or step + 1 == config.steps
            if not look and not saved and stage.model.device.type == "cuda":
                continue
            found, taken = read_metrics(taken), []
            seconds = (time.perf_counter() - start) / len(found)
            if look:
                hard = probe(stage, examples[0], config, step)
                found[-1] |= hard
            for metrics in found:
                skipped = skipped + 1 if metrics["skipped"] else 0
                if skipped > MOST_SKIPPED:
                    state = f"loss {metrics['loss']} and gradient norm {metrics['grad_norm']}"
                    begin = latest(out) or "the start"
                    raise ValueError(
                        f"{skipped} steps one after another were skipped, as step {metrics['step']} has {state}. Lower "
                        f"--lr and run the command again: it goes on from {begin}."
                    )
                speed = {"seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}
                record(metrics | speed | {"peak_memory_gb": peak_memory(stage.model.device)})
            if saved:
                ended = Ended(config.kernel, config.gate, config.denoiser, choose_sparsity(config, step, 1)[0])
                save_state(out, step + 1, stage.model, stage.sparselearn, optimizer, ended, config.keep)
            start = time.perf_counter()
    if rank() == 0 and hard:
        print(describe_end(config, hard["hardness"]))
    if dist.is_initialized():
        dist.barrier()
    last = latest(out)
    assert last is not None
    return last


def count_room(model: SparseWSI) -> int:
    """How many patches fit into the LLM's positions beside TEXT_ROOM tokens of text; where there is no end, a lot."""
    if model.config.position == "original" or model.max_position is None:
        return sys.maxsize
    return max(1, model.max_position - TEXT_ROOM)


def take_step(
    stage: StageModule,
    optimizer: torch.optim.Optimizer,
    examples: list[Example],
    config: TrainConfig,
    step: int,
    keep: Keep | None,
) -> Metrics:
    """One step of the optimizer; returns its metrics. A step whose loss or gradient is not finite changes nothing.

    Nothing in it waits for a GPU, but for a sharded LLM's one question whether all was finite.
    """
    # Dropout, if any: the same after a resume, another on every process.
    torch.manual_seed((config.seed * 1_000_003 + step) * world_size() + rank())
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * learning_rate(step, config)
    metrics = train_step(stage, examples, config, step, keep)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    clip = clip_gradients if config.fsdp else nn.utils.clip_grad_norm_
    norm, loss = clip(parameters, config.clip), metrics["loss"]
    assert isinstance(loss, torch.Tensor)
    fine = norm.isfinite() & loss.isfinite()  # the same on all processes
    step_if(fine, optimizer)
    optimizer.zero_grad()
    return metrics | {"grad_norm": norm, "skipped": ~fine}


def read_metrics(taken: Sequence[Metrics]) -> list[dict[str, float]]:
    """The metrics of steps as numbers, counts whole; what lies on a device comes from it in one message."""
    tensors = [value.double() for step in taken for value in step.values() if isinstance(value, torch.Tensor)]
    values = iter(torch.stack(tensors).tolist() if tensors else ())
    found: list[dict[str, float]] = []
    for step in taken:
        found.append({name: next(values) if isinstance(value, torch.Tensor) else value for name, value in step.items()})
        found[-1].update({name: int(found[-1][name]) for name in COUNTS})
    return found


def describe_end(config: TrainConfig, hardness: float) -> str:
    """How hard the selection became, in a sentence."""
    reached = f"Hardness at the end is {hardness:.2f}"
    if hardness >= HARD_ENOUGH:
        return f"{reached}: training and inference show the LLM the same tokens."
    if config.dense + config.hard >= 1:
        return f"{reached}: the stage was dense, and the scorer learned nothing in it."
    return (
        f"{reached}, below {HARD_ENOUGH}: in training the LLM saw a softer mixture than it will see at inference. "
        "Lower --tau_end or lengthen --anneal."
    )


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in RECIPES:
        usage = f"usage: python -m train.run {{{','.join(RECIPES)}}} [--flag value ...]"
        if name in ("-h", "--help"):
            print(f"{usage}\n\npython -m train.run stage1 --help lists the flags with their defaults in that recipe.")
            return
        raise SystemExit(f"{usage}; got {name!r}")
    parser = HfArgumentParser(TrainConfig)  # type: ignore[arg-type]
    parser.set_defaults(**asdict(RECIPES[name]()))
    (config,) = parser.parse_args_into_dataclasses(sys.argv[2:])
    backend, device = choose_device(os.environ, torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    if rank() == 0 and name in NOTES:
        print(NOTES[name], file=sys.stderr)
    last = train(config)
    if rank() == 0:
        print(last)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
