"""Training loop of both stages.

    python -m train.run demo-stage1 --banks runs/real.safetensors runs/phantom.safetensors --out runs/demo1
    python -m train.run demo-stage2 --banks ... --init runs/demo1/checkpoints/last --out runs/demo2
    python -m train.run stage1 --data captions.json --features features/ --out runs/stage1

The recipe named first gives the settings (train/config.py); flags change them. A run that finds checkpoints in its
folder goes on from the last one and continues as if it had not been interrupted, whatever killed it. Under `torchrun
--nproc_per_node=P -m train.run ...` each of P processes, on a GPU of its own where there are any, takes --accumulation
bags a step, and gradients are summed over all bags of all processes: two processes equal one with twice the
accumulation. --fsdp shards an LLM that does not fit (train/sharding.py).

metrics.jsonl gets a line a step: loss, tau, K and N of the first process's first bag, answer tokens, tokens the LLM saw
and tokens a second over all processes, gradient norm, seconds, peak memory of the first process (GB; of the GPU where
there is one), and every tenth step hardness and needle recall. --trackio PROJECT shows the same in trackio.
"""

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import HfArgumentParser

from sparsewsi.bags.bag import UNKNOWN_ENCODER
from sparsewsi.bags.extract import read_ahead
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.llm import default_device, default_dtype, load_llm
from sparsewsi.model.selector import hard_topk
from sparsewsi.model.sparse_wsi import SparseWSI
from train.align import align
from train.checkpoint import latest, load_state, save_state
from train.command import alone_in, fingerprint, run_command, write_whole
from train.config import RECIPES, TrainConfig
from train.data.mosaic import NEEDLE_KINDS, Bank, MosaicStream, load_bank
from train.data.packing import Example, Packed, SlideVQADataset, answer_logits, join, pack, passes
from train.data.questions import training_set
from train.sharding import clip_gradients, is_sharded, shard
from train.sparselearn import SparseLearn, hardness, k_at, soft_topk, tau_at, zscore

LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


Keep = Callable[[SparseWSI, Example], Example]  # the example with the patches that are kept


class StageModule(nn.Module):
    """Bags in, the summed loss of their answer tokens out: the training path of the paper (eq. 1)."""

    def __init__(self, model: SparseWSI, sparselearn: SparseLearn):
        super().__init__()
        self.model, self.sparselearn = model, sparselearn

    def forward(
        self,
        bags: list[Example],
        packed: Packed,
        tau: float,
        ks: list[float | None],
        generators: list[torch.Generator],
    ) -> Tensor:
        """ks: K of each bag; None trains densely, alpha = 1. Returns the summed NLL, a float32 scalar."""
        model = self.model
        visual = []
        for bag, k, generator in zip(bags, ks, generators):
            x = model.slide_encoder(bag.features.to(model.device, torch.float32))  # (N, D_v)
            if bag.rows is not None:
                x = x[bag.rows.to(x.device)]  # (K, D_v)
            if k is not None:
                x = self.sparselearn(x, model.scorer(x), tau, k=k, generator=generator)
            visual.append(model.project(x))
        return answer_loss(model, torch.cat(visual), packed)


def answer_loss(model: SparseWSI, visual: Tensor, packed: Packed) -> Tensor:
    """Summed NLL of the answer tokens, given the projected visual tokens; logits only where an answer is."""
    logits = answer_logits(model, visual, packed)
    return F.cross_entropy(logits, packed.targets.to(logits.device), reduction="sum")


def build(
    config: TrainConfig, feature_dim: int, encoder: str, sparselearn_class: type[SparseLearn] = SparseLearn
) -> tuple[SparseWSI, SparseLearn]:
    """Model and SparseLearn at the start of a stage, with the stage's parts frozen (table in method.md).

    An LLM that is to be sharded is left in the CPU's memory.
    """
    device = default_device()
    half = default_dtype(device) == torch.float16  # of older GPUs: its gradients would need scaling
    dtype = torch.float32 if half else default_dtype(device)
    place = torch.device("cpu") if config.fsdp else device
    if config.stage == 1:
        llm, tokenizer = load_llm(config.llm, device=place, dtype=dtype)
        settings = SparseWSIConfig(
            llm=config.llm,
            encoder=encoder,
            feature_dim=feature_dim,
            dim=config.dim,
            slide_encoder=config.slide_encoder,
            scorer_attention=config.scorer_attention,
            position=config.position,
            max_position=config.max_position,
            num_tokens=config.num_tokens,
            multi_turn=False,  # every question is trained on alone, whatever its data
        )
        model = SparseWSI(settings, llm, tokenizer)
    else:
        model = SparseWSI.from_pretrained(artefact(config.init), device=place, dtype=dtype)
        model.trained_on = None  # other features are to come
    sparselearn = sparselearn_class(
        model.config.dim, model.config.num_tokens, kernel=config.kernel, gate=config.gate, denoiser=config.denoiser
    )
    if config.stage == 2:
        state = Path(config.init) / "state"
        if state.is_dir():
            load_state(state.parent, sparselearn)
        lora = LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=LORA_LAYERS, task_type="CAUSAL_LM"
        )
        if not (artefact(config.init) / "adapter").is_dir():
            model.llm = get_peft_model(model.llm, lora, autocast_adapter_dtype=True)  # type: ignore[assignment]
    freeze(model, config)
    return model, sparselearn


def artefact(path: str) -> Path:
    """The model folder of a checkpoint, or the folder itself if it is one."""
    folder = Path(path)
    return folder / "model" if (folder / "model").is_dir() else folder


def freeze(model: SparseWSI, config: TrainConfig) -> None:
    """Stage 1 trains all but the LLM; stage 2 all but the slide encoder, and of the LLM only LoRA."""
    model.requires_grad_(True)
    model.slide_encoder.requires_grad_(config.stage == 1)
    for name, parameter in model.llm.named_parameters():
        parameter.requires_grad_(config.stage == 2 and "lora_" in name)


def parameter_groups(stage: StageModule, config: TrainConfig) -> list[dict]:
    """A learning rate each for LoRA, the slide encoder and the rest; no weight decay on vectors."""
    groups = {}
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad:
            rate = config.lr_lora if "lora_" in name else config.lr_encoder if "slide_encoder" in name else config.lr
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": params, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), params in groups.items()
    ]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Factor on the base rates: linear warm-up, then cosine down to a tenth."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


def sparsity(config: TrainConfig, step: int, n: int) -> tuple[float, float | None]:
    """(tau, K) of a step for bags of n patches; K is None while training is dense."""
    phase = config.phase(step)
    if phase is None:
        return config.tau_end if config.is_hard(step) else config.tau_start, None
    tau = tau_at(round(phase * 1000), 1000, config.tau_start, config.tau_end)
    if not config.k_start:
        return tau, config.num_tokens
    return tau, k_at(round(phase * 1000), 1000, max(config.k_start * n, config.num_tokens), config.num_tokens)


def train_step(
    stage: StageModule, examples: list[Example], config: TrainConfig, step: int, keep: Keep | None = None
) -> dict[str, float]:
    """Accumulate the gradient of one step; the loss is normalised over all answer tokens of all processes.

    examples: this process's bags. keep: what a hard step keeps of them; default `kept`. The noise of a bag is seeded by
    its number among all bags of the step.
    """
    model = stage.model
    if config.is_hard(step):
        examples = [(keep or kept)(model, example) for example in examples]
    packed = [pack(model.tokenizer, example, model.config.position, model.max_position) for example in examples]
    total, tokens = summed(sum(len(item.targets) for item in packed), sum(len(item.order) for item in packed))
    loss = 0.0
    n = len(examples[0].indices)
    tau, k = sparsity(config, step, n)
    bags = max(1009, world_size() * len(examples))  # a step, at most
    first = config.seed * 1_000_003 + step * bags + rank() * len(examples)
    # Sharded weights are fetched in every pass by all processes together: the number of passes must not depend on bags.
    for group in passes(packed, 0 if config.fsdp else config.tokens_per_pass):
        generators = [torch.Generator(model.device).manual_seed(first + number) for number in group]
        bags = [examples[number] for number in group]
        ks = [sparsity(config, step, len(bag.indices))[1] for bag in bags]
        part = stage(bags, join([packed[number] for number in group]), tau, ks, generators) / total
        part.backward()
        loss += part.item()
    sum_gradients(stage)
    (loss,) = summed(loss)
    return {"loss": loss, "tau": tau, "k": k or n, "n": n, "answer_tokens": total, "tokens": tokens}


@torch.no_grad()
def kept(model: SparseWSI, example: Example) -> Example:
    """The example with the patches that inference would keep."""
    x = model.encode(example.features)
    return example.keep(hard_topk(model.score(x), model.config.num_tokens).cpu())  # where features and indices are


def rank() -> int:
    """Number of this process among those of the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def seat(environment: Mapping[str, str], gpus: int) -> tuple[str, torch.device]:
    """Backend and device of this process, given torchrun's environment and the GPUs of the machine.

    Raises ValueError for more processes on a machine than it has GPUs.
    """
    if not gpus:
        return "gloo", torch.device("cpu")
    local = int(environment.get("LOCAL_RANK", "0"))
    if local >= gpus:
        raise ValueError(f"process {local} of this machine has no GPU: there are {gpus}. Lower --nproc_per_node.")
    return "nccl", torch.device("cuda", local)


def summed(*values: float) -> list[float]:
    """Sums of numbers over all processes."""
    if not dist.is_initialized():
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def agree(stage: nn.Module) -> None:
    """Give all processes the first one's trained weights: GPUs that computed the same may differ in the last bit."""
    if dist.is_initialized():
        for parameter in stage.parameters():
            if parameter.requires_grad and not is_sharded(parameter):
                dist.broadcast(parameter.data, 0)


def sum_gradients(stage: nn.Module) -> None:
    """Sum the gradients over all processes in one message.

    DistributedDataParallel would average and would want every parameter used; in dense steps the scorer is not.
    Gradients of sharded parameters have been summed on their way back.
    """
    gradients = [parameter.grad for parameter in stage.parameters() if parameter.grad is not None]
    gradients = [gradient for gradient in gradients if not is_sharded(gradient)]
    if dist.is_initialized() and gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def probe(stage: StageModule, example: Example, config: TrainConfig, step: int) -> dict[str, float]:
    """What the scorer does to one bag: hardness, and needle recall of the hard top-K where the truth is known."""
    n = len(example.indices)
    tau, k = sparsity(config, step, n)
    scores = stage.model.scorer(stage.model.encode(example.features))
    keep = hard_topk(scores, stage.model.config.num_tokens)
    needles = [i for i, kind in enumerate(example.kinds) if kind in NEEDLE_KINDS]
    found = len(set(keep.tolist()) & set(needles)) / len(needles) if needles else float("nan")
    result = {"recall": found, "recall_chance": min(1.0, stage.model.config.num_tokens / n)}
    if k is not None:
        alpha = soft_topk(zscore(scores), k, tau, kernel=config.kernel)
        result["hardness"] = float(hardness(alpha, scores, stage.model.config.num_tokens))
    return result


def peak_memory(device: torch.device) -> float:
    """The most memory this process has held, GB: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def cut_metrics(path: Path, done: int) -> None:
    """Drop the lines of steps that will be done again, and one that a killed process left half written."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] < done:
                kept.append(line + "\n")
        except ValueError:
            continue
    write_whole(path, "".join(kept))


@contextmanager
def recording(config: TrainConfig, done: int) -> Iterator[Callable[[dict[str, float]], None]]:
    """A function that writes a step's metrics to metrics.jsonl and to trackio, if asked for; the first process alone.

    metrics.jsonl is the record and holds every step once; trackio keeps the steps that a killed run did twice, twice.
    """
    path, board = Path(config.out) / "metrics.jsonl", None
    if rank() == 0:
        config.save(Path(config.out) / "train_config.json")
        cut_metrics(path, done)
        if config.trackio:
            import trackio as board  # type: ignore[import-not-found]

            board.init(project=config.trackio, name=Path(config.out).name, config=asdict(config), resume="allow")

    def record(metrics: dict[str, float]) -> None:
        if rank() == 0:
            with path.open("a") as log:
                log.write(json.dumps(metrics) + "\n")
            if board is not None:
                board.log({name: value for name, value in metrics.items() if name != "step"}, step=int(metrics["step"]))

    try:
        yield record
    finally:
        if board is not None:
            board.finish()


def training_data(config: TrainConfig) -> tuple[MosaicStream | SlideVQADataset, tuple[Bank, ...], int, str]:
    """What to train on, the banks if it comes from these, feature dim and encoder."""
    banks = tuple(load_bank(Path(path), "train") for path in config.banks)
    if bool(banks) == bool(config.data):
        raise ValueError(
            "pass training data: either --banks (python -m train.data.mosaic bank) or --data with --features"
        )
    if config.data and not config.features:
        raise ValueError("--data needs --features, the folder that holds the slides' feature files")
    if config.data and config.align:
        raise ValueError("--align needs the labelled patches of --banks; pass --align 0 with --data")
    if banks:
        kinds = {(bank.encoder, bank.features.shape[1]) for bank in banks}
        if len(kinds) > 1:
            found = ", ".join(f"{name} ({dim})" for name, dim in sorted(kinds))
            raise ValueError(f"the banks hold features of different encoders: {found}. Pass banks of one.")
        stream = MosaicStream(banks, config.seed, config.stage, config.questions_per_bag, config.other_tissue)
        return stream, banks, banks[0].features.shape[1], banks[0].encoder
    stream = training_set(config.data, config.features, config.seed, config.questions_per_bag)
    return stream, (), stream.feature_dim, stream.encoder


def optimizer_of(stage: StageModule, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW: fused on a GPU; one parameter after another where sharded ones lie beside whole ones."""
    fused = True if stage.model.device.type == "cuda" and not config.fsdp else None
    foreach = False if config.fsdp else None
    return torch.optim.AdamW(parameter_groups(stage, config), betas=(0.9, 0.98), fused=fused, foreach=foreach)


def settled(config: TrainConfig, feature_dim: int, encoder: str) -> TrainConfig:
    """The settings as they count: those of the model too, in stage 2.

    Raises ValueError for features of another kind than the model's, and for an output folder with another run in it.
    """
    if config.stage == 2:
        start = str(latest(Path(config.out)) or config.init)
        if not start:
            raise ValueError("stage 2 starts from a model: pass --init, the last checkpoint of stage 1")
        model = SparseWSIConfig.load(artefact(start))
        same = model.encoder in (encoder, UNKNOWN_ENCODER) or encoder == UNKNOWN_ENCODER
        if model.feature_dim != feature_dim or not same:
            raise ValueError(
                f"the features are of {encoder} (dimension {feature_dim}), but the model that stage 2 starts from "
                f"takes those of {model.encoder} ({model.feature_dim}). Train stage 1 on the same features."
            )
        config = config.with_model(model)
    config = replace(config, contents=fingerprint(map(Path, config.banks + config.data)))
    config.check_same(Path(config.out) / "train_config.json")
    return config


def train(config: TrainConfig, sparselearn_class: type[SparseLearn] = SparseLearn, keep: Keep | None = None) -> Path:
    """Run or resume a stage; returns the last checkpoint's folder.

    sparselearn_class, keep: rivals take the places of SparseLearn and of what hard steps keep (studies/rivals.py).
    """
    out = Path(config.out)
    if config.trackio and importlib.util.find_spec("trackio") is None:
        raise ValueError("--trackio needs trackio. pip install trackio, or leave it out: metrics.jsonl holds the same.")
    stream, banks, feature_dim, encoder = training_data(config)
    torch.manual_seed(config.seed)
    checkpoint = latest(out)
    config = settled(config, feature_dim, encoder)
    source = replace(config, init=str(checkpoint)) if checkpoint and config.stage == 2 else config
    model, sparselearn = build(source, feature_dim, encoder, sparselearn_class)
    if checkpoint and config.stage == 1:
        model = SparseWSI.from_pretrained(checkpoint / "model", llm=(model.llm, model.tokenizer))  # type: ignore[arg-type]
        freeze(model, config)
    if config.align and not checkpoint:
        align(model, banks, config.align, config.seed)
    if config.fsdp:
        shard(model.llm, default_device())
    stage = StageModule(model, sparselearn).train()
    for part in (model.slide_encoder, model.scorer, model.projector, sparselearn):
        part.to(model.device)
    agree(stage)
    if config.activation_checkpointing:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = optimizer_of(stage, config)
    done = load_state(checkpoint, sparselearn, optimizer) if checkpoint else 0
    if done >= config.steps and rank() == 0:
        print(f"Nothing is left to train: {out} has its {done} steps. Choose another --out to train anew.")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def examples_of(step: int) -> list[Example]:
        first = (step * world_size() + rank()) * config.accumulation
        return [stream.example(first + i, config.patches_at(step)) for i in range(config.accumulation)]

    steps = range(done, config.steps)
    bar = tqdm(steps, initial=done, total=config.steps, desc=f"stage {config.stage}", disable=rank() > 0 or None)
    held = alone_in(out) if rank() == 0 else nullcontext()
    with held, recording(config, done) as record, closing(read_ahead(examples_of, steps, most=2)) as loaded:
        start = time.perf_counter()
        for step, examples in zip(bar, loaded):
            torch.manual_seed(config.seed * 1_000_003 + step)  # dropout, if any: the same after a resume
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * learning_rate(step, config)
            metrics = train_step(stage, examples, config, step, keep)
            clip = clip_gradients if config.fsdp else nn.utils.clip_grad_norm_
            norm = float(clip(parameters, config.clip))
            if not math.isfinite(norm) or not math.isfinite(metrics["loss"]):
                state = f"step {step} has loss {metrics['loss']} and gradient norm {norm}"
                held_at = latest(out) or "the start"
                raise ValueError(f"{state}. Lower --lr and run the command again: it goes on from {held_at}.")
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
            metrics |= {"step": step, "grad_norm": norm, "seconds": seconds}
            metrics |= {"tokens_per_second": metrics["tokens"] / seconds, "peak_memory_gb": peak_memory(model.device)}
            if step % 10 == 0:
                metrics |= probe(stage, examples[0], config, step)
            record(metrics)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                save_state(out, step + 1, model, sparselearn, optimizer)
            start = time.perf_counter()
    if dist.is_initialized():
        dist.barrier()
    last = latest(out)
    assert last is not None
    return last


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
    backend, device = seat(os.environ, torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    last = train(config)
    if rank() == 0:
        print(last)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
