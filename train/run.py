"""Training loop of both stages.

    python -m train.run demo-stage1 --banks runs/real.safetensors runs/phantom.safetensors --out runs/demo1
    python -m train.run demo-stage2 --banks ... --init runs/demo1/checkpoints/last --out runs/demo2
    python -m train.run stage1 --data captions.json --features features/ --out runs/stage1

The recipe named first gives the settings (train/config.py); flags change them. A run that finds checkpoints in its
folder goes on from the last one and continues as if it had not been interrupted. Under `torchrun --nproc_per_node=P -m
train.run ...` each of P processes takes --accumulation bags a step, and gradients are summed over all bags of all
processes: two processes equal one with twice the accumulation.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import HfArgumentParser

from sparsewsi.config import SparseWSIConfig
from sparsewsi.llm import load_llm
from sparsewsi.model import SparseWSI
from sparsewsi.selector import hard_topk
from train.align import align
from train.benchmarks import training_set
from train.checkpoint import latest, load_state, save_state
from train.config import RECIPES, TrainConfig
from train.data import Example, Packed, answer_logits, join, pack, passes
from train.mosaic import NEEDLE_KINDS, MosaicStream, load_bank
from train.sparselearn import SparseLearn, k_at, tau_at

LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


Keep = Callable[[SparseWSI, Example], Example]  # the example with the patches that are kept


class StageModule(nn.Module):
    """Bags in, the summed loss of their answer tokens out: the training path of the paper (eq. 1)."""

    def __init__(self, model: SparseWSI, sparselearn: SparseLearn):
        super().__init__()
        self.model, self.sparselearn = model, sparselearn

    def forward(
        self, bags: list[Tensor], packed: Packed, tau: float, k: float | None, generators: list[torch.Generator]
    ) -> Tensor:
        """bags: (N, D) features each. k = None trains densely, alpha = 1. Returns the summed NLL, a float32 scalar."""
        model = self.model
        visual = []
        for features, generator in zip(bags, generators):
            x = model.slide_encoder(features.to(model.device, torch.float32))  # (N, D_v)
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
    """Model and SparseLearn at the start of a stage, with the stage's parts frozen (table in method.md)."""
    if config.stage == 1:
        llm, tokenizer = load_llm(config.llm)
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
        )
        model = SparseWSI(settings, llm, tokenizer)
    else:
        model = SparseWSI.from_pretrained(artefact(config.init))
    sparselearn = sparselearn_class(
        model.config.dim, model.config.num_tokens, kernel=config.kernel, gate=config.gate, denoiser=config.denoiser
    )
    if config.stage == 2:
        state = Path(config.init) / "state"
        if state.is_dir():
            load_state(state.parent, sparselearn)
        freeze(model, config)
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
        return config.tau_start, None
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
    total = summed(sum(len(item.targets) for item in packed))
    loss = 0.0
    n = len(examples[0].indices)
    tau, k = sparsity(config, step, n)
    first = config.seed * 1_000_003 + step * 1009 + rank() * len(examples)
    for group in passes(packed, config.tokens_per_pass):
        generators = [torch.Generator(model.device).manual_seed(first + number) for number in group]
        bags = [examples[number].features for number in group]
        part = stage(bags, join([packed[number] for number in group]), tau, k, generators) / total
        part.backward()
        loss += part.item()
    sum_gradients(stage)
    return {"loss": summed(loss), "tau": tau, "k": k or n, "n": n, "answer_tokens": total}


@torch.no_grad()
def kept(model: SparseWSI, example: Example) -> Example:
    """The example with the patches that inference would keep."""
    x = model.encode(example.features)
    keep = hard_topk(model.score(x), model.config.num_tokens)
    kinds = tuple(example.kinds[i] for i in keep.tolist()) if example.kinds else ()
    return replace(example, features=example.features[keep], indices=example.indices[keep], kinds=kinds)


def rank() -> int:
    """Number of this process among those of the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(value: float) -> float:
    """Sum of a number over all processes."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def sum_gradients(stage: nn.Module) -> None:
    """Sum the gradients over all processes in one message.

    DistributedDataParallel would average and would want every parameter used; in dense steps the scorer is not.
    """
    gradients = [parameter.grad for parameter in stage.parameters() if parameter.grad is not None]
    if dist.is_initialized() and gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def probe(stage: StageModule, example: Example, config: TrainConfig, step: int) -> dict[str, float]:
    """What the scorer does to one bag: hardness, and needle recall of the hard top-K where the truth is known."""
    from train.sparselearn import hardness, soft_topk, zscore

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


def train(config: TrainConfig, sparselearn_class: type[SparseLearn] = SparseLearn, keep: Keep | None = None) -> Path:
    """Run or resume a stage; returns the last checkpoint's folder.

    sparselearn_class, keep: rivals take the places of SparseLearn and of what hard steps keep (train/rivals.py).
    """
    out = Path(config.out)
    banks = tuple(load_bank(Path(path), "train") for path in config.banks)
    if bool(banks) == bool(config.data):
        raise ValueError("pass training data: either --banks (python -m train.mosaic bank) or --data with --features")
    if config.data and config.align:
        raise ValueError("--align needs the labelled patches of --banks; pass --align 0 with --data")
    if banks:
        stream = MosaicStream(banks, config.seed, config.stage, config.questions_per_bag)
        feature_dim, encoder = banks[0].features.shape[1], banks[0].encoder
    else:
        stream = training_set(config.data, config.features, config.seed, config.questions_per_bag)
        feature_dim, encoder = stream.feature_dim, stream.encoder
    torch.manual_seed(config.seed)
    checkpoint = latest(out)
    source = TrainConfig(**{**asdict(config), "init": str(checkpoint)}) if checkpoint and config.stage == 2 else config
    model, sparselearn = build(source, feature_dim, encoder, sparselearn_class)
    if checkpoint and config.stage == 1:
        model = SparseWSI.from_pretrained(checkpoint / "model")
        freeze(model, config)
    if config.align and not checkpoint:
        align(model, banks, config.align, config.seed)
    stage = StageModule(model, sparselearn.to(model.device)).train()
    if config.activation_checkpointing:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(parameter_groups(stage, config), betas=(0.9, 0.98))
    done = load_state(checkpoint, sparselearn, optimizer) if checkpoint else 0
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if rank() == 0:
        config.save(out / "train_config.json")
    steps = range(done, config.steps)
    for step in tqdm(steps, initial=done, total=config.steps, desc=f"stage {config.stage}", disable=rank() > 0 or None):
        start = time.perf_counter()
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout, if any: the same after a resume
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * learning_rate(step, config)
        first = (step * world_size() + rank()) * config.accumulation
        n = config.patches_at(step)
        examples = [stream.example(first + i, n) for i in range(config.accumulation)]
        metrics = train_step(stage, examples, config, step, keep)
        norm = float(nn.utils.clip_grad_norm_(parameters, config.clip))
        if not math.isfinite(norm) or not math.isfinite(metrics["loss"]):
            state = f"step {step} has loss {metrics['loss']} and gradient norm {norm}"
            raise RuntimeError(f"{state}. Lower --lr; the run resumes from {latest(out)}.")
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {"step": step, "grad_norm": norm, "seconds": time.perf_counter() - start}
        if step % 10 == 0:
            metrics |= probe(stage, examples[0], config, step)
        if rank() == 0:
            with (out / "metrics.jsonl").open("a") as log:
                log.write(json.dumps(metrics) + "\n")
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                save_state(out, step + 1, model, sparselearn, optimizer)
    if dist.is_initialized():
        dist.barrier()
    last = latest(out)
    assert last is not None
    return last


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in RECIPES:
        raise SystemExit(f"usage: python -m train.run {{{','.join(RECIPES)}}} [--flag value ...]; got {name!r}")
    parser = HfArgumentParser(TrainConfig)  # type: ignore[arg-type]
    parser.set_defaults(**asdict(RECIPES[name]()))
    (config,) = parser.parse_args_into_dataclasses(sys.argv[2:])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    last = train(config)
    if rank() == 0:
        print(last)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
