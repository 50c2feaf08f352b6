"""A stage of training: its modules, what of them is trained, and one step.

N patches, K kept, D_v width of a visual token.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm

from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.llm import default_device, default_dtype, load_llm
from sparsewsi.model.selector import hard_topk, pick_diverse
from sparsewsi.model.sparse_wsi import SparseWSI
from train.align import Alignment
from train.attention import take_blocks
from train.checkpoint import load_state
from train.config import TrainConfig
from train.data.example import Example
from train.data.kinds import NEEDLE_KINDS
from train.data.packing import Packed, answer_logits, join, pack, passes
from train.processes import rank, sum_gradients, sum_over_processes, world_size
from train.sharding import share_embedding
from train.sparselearn import SparseLearn, hardness, k_at, soft_topk, tau_at, zscore

CHECKPOINT_ABOVE = 2048  # tokens of a pass
LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Keep = Callable[[SparseWSI, Example], Example]  # the example with the patches that are kept
Metrics = dict[str, float | Tensor]  # tensors of no axes, on the device


class StageModule(nn.Module):
    """Bags in, the summed loss of their answer tokens out: the training path of the paper (eq. 1)."""

    def __init__(self, model: SparseWSI, sparselearn: SparseLearn):
        super().__init__()
        self.model, self.sparselearn = model, sparselearn
        self.alignment: Alignment | None = None  # what every step is to keep of the alignment

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
            x = model.slide_encoder(bag.features.to(model.device, non_blocking=True).float())  # (N, D_v)
            if bag.rows is not None:
                x = x[bag.rows.to(x.device, non_blocking=True)]  # (K, D_v)
            if k is not None:
                x = self.sparselearn(x, model.scorer(x), tau, k=k, generator=generator)
            visual.append(model.project(x))
        return answer_loss(model, torch.cat(visual), packed)


def answer_loss(model: SparseWSI, visual: Tensor, packed: Packed) -> Tensor:
    """Summed NLL of the answer tokens, given the projected visual tokens; logits only where an answer is."""
    logits = answer_logits(model, visual, packed)
    return F.cross_entropy(logits, packed.targets.to(logits.device, non_blocking=True), reduction="sum")


def build(
    config: TrainConfig, feature_dim: int, encoder: str, sparselearn_class: type[SparseLearn] = SparseLearn
) -> tuple[SparseWSI, SparseLearn]:
    """Model and SparseLearn at the start of a stage, with the stage's parts frozen (table in method.md).

    An LLM that is to be sharded is left in the CPU's memory of the first process; the others have its input vectors.
    """
    if config.fsdp and config.load_in_4bit:
        raise ValueError("--load_in_4bit fits the LLM into one GPU, --fsdp shards it over several. Pass one of them.")
    device = default_device()
    half = default_dtype(device) == torch.float16  # of older GPUs: its gradients would need scaling
    dtype = torch.float32 if half else default_dtype(device)
    start = None if config.stage == 1 else find_model_folder(config.init)
    named = SparseWSIConfig(llm=config.llm) if start is None else SparseWSIConfig.load(start)
    whole = not config.fsdp or rank() == 0
    place = torch.device("cpu") if config.fsdp else device
    llm, tokenizer = load_llm(named.llm, named.llm_revision, place, dtype, config.load_in_4bit, weights=whole)
    if config.fsdp and world_size() > 1:
        share_embedding(llm, device)
    if start is None:
        settings = SparseWSIConfig(
            llm=config.llm,
            encoder=encoder,
            feature_dim=feature_dim,
            dim=config.dim,
            slide_encoder=config.slide_encoder,
            scorer_attention=config.scorer_attention,
            scorer_relative=config.scorer_relative,
            diversity=config.diversity,
            position=config.position,
            max_position=config.max_position,
            num_tokens=config.num_tokens,
            multi_turn=False,  # every question is trained on alone, whatever its data
            option_scoring=config.targets,
        )
        model = SparseWSI(settings, llm, tokenizer)
    else:
        model = SparseWSI.from_pretrained(start, llm=(llm, tokenizer))
        model.trained_on = None  # other features are to come
        model.config = replace(model.config, option_scoring=config.targets)
    sparselearn = sparselearn_class(
        model.config.dim, model.config.num_tokens, kernel=config.kernel, gate=config.gate, denoiser=config.denoiser
    )
    if config.stage == 2:
        state = Path(config.init) / "state"
        if state.is_dir():
            load_state(state.parent, sparselearn)
        assert start is not None
        if not (start / "adapter").is_dir():
            add_lora(model, config)
    freeze(model, config)
    if device.type == "cuda":
        take_blocks(model.llm)
    return model, sparselearn


def add_lora(model: SparseWSI, config: TrainConfig) -> None:
    """Put LoRA on all linear layers of the LLM's blocks, in float32."""
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=LORA_LAYERS,
        task_type="CAUSAL_LM",
    )
    model.llm = get_peft_model(model.llm, lora, autocast_adapter_dtype=True)  # type: ignore[assignment]


def find_model_folder(path: str | Path) -> Path:
    """The model folder of a checkpoint, or the folder itself if it is one."""
    folder = Path(path)
    return folder / "model" if (folder / "model").is_dir() else folder


def freeze(model: SparseWSI, config: TrainConfig) -> None:
    """Stage 1 trains all but the LLM; stage 2 all but the slide encoder, and of the LLM only LoRA."""
    model.requires_grad_(True)
    model.slide_encoder.requires_grad_(config.stage == 1)
    for name, parameter in model.llm.named_parameters():
        parameter.requires_grad_(config.stage == 2 and "lora_" in name)
    for part in model.llm.modules():
        if isinstance(part, BaseTunerLayer):
            # Autocast does it; PEFT's own cast would keep a copy in float32.
            part.cast_input_dtype_enabled = False  # type: ignore[arg-type, assignment]


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


def make_optimizer(stage: StageModule, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW: fused, or one parameter after another where sharded ones lie beside whole ones."""
    how = {"foreach": False} if config.fsdp else {"fused": True}  # not yet run on a GPU
    return torch.optim.AdamW(parameter_groups(stage, config), betas=(0.9, 0.98), **how)


def step_if(fine: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take the optimizer's step, or change nothing. A fused one does not wait for the device that `fine` lies on."""
    if optimizer.defaults["fused"]:
        optimizer.found_inf = (~fine).float()  # type: ignore[attr-defined]  # what torch.amp.GradScaler tells it
        optimizer.step()
    elif fine:
        optimizer.step()


def learning_rate(step: int, config: TrainConfig) -> float:
    """Factor on the base rates: linear warm-up, then cosine down to a tenth."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


def choose_sparsity(config: TrainConfig, step: int, n: int) -> tuple[float, float | None]:
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
) -> Metrics:
    """Accumulate the gradient of one step; the loss is normalised over all answer tokens of all processes.

    examples: this process's bags. keep: what a hard step keeps of them, keep_selected unless given. The noise of a bag
    is seeded by its number among all bags of the step. Nothing waits for the GPU: what only it knows of the metrics
    stays there.
    """
    model = stage.model
    if config.is_hard(step):
        examples = [(keep or keep_selected)(model, example) for example in examples]
    settings = model.config
    packed = [
        pack(model.tokenizer, example, settings.position, model.max_position, config.targets) for example in examples
    ]
    counts = torch.tensor([sum(len(part.targets) for part in packed), sum(len(part.order) for part in packed)])
    total, tokens = sum_over_processes(counts.to(model.device, non_blocking=True)).unbind()
    loss = torch.zeros((), dtype=torch.float64, device=model.device)
    n = len(examples[0].indices)
    tau, k = choose_sparsity(config, step, n)
    most = max(1009, world_size() * len(examples))  # bags of a step
    first = config.seed * 1_000_003 + step * most + rank() * len(examples)
    # Sharded weights are fetched in every pass by all processes together: the number of passes must not depend on bags.
    groups = passes(packed, 0 if config.fsdp else config.tokens_per_pass)
    checkpoint_activations(model.llm, max(sum(len(packed[number].order) for number in group) for group in groups))
    for group in groups:
        generators = [torch.Generator(model.device).manual_seed(first + number) for number in group]
        bags = [examples[number] for number in group]
        ks = [choose_sparsity(config, step, len(bag.indices))[1] for bag in bags]
        part = stage(bags, join([packed[number] for number in group]), tau, ks, generators) / total
        part.backward()
        loss += part.detach()
    if stage.alignment is not None:
        extra = config.keep_aligned * stage.alignment.loss(np.random.default_rng((config.seed, 17, step, rank())))
        (extra / world_size()).backward()
    sum_gradients(stage)
    return {
        "loss": sum_over_processes(loss),
        "tau": tau,
        "k": k or n,
        "n": n,
        "answer_tokens": total,
        "tokens": tokens,
    }


def computes_again(llm: nn.Module) -> bool:
    """Whether an LLM computes its activations again on the way back."""
    return any(getattr(part, "gradient_checkpointing", False) for part in llm.modules())


def checkpoint_activations(llm: nn.Module, tokens: int) -> None:
    """Compute activations again on the way back, or keep them, by the longest pass of a step; says when it changes."""
    wanted = tokens > CHECKPOINT_ABOVE
    if wanted == computes_again(llm):
        return
    if wanted:
        llm.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    else:
        llm.gradient_checkpointing_disable()  # type: ignore[operator]
    if rank() == 0:
        how = "computes activations again on the way back, to save memory" if wanted else "keeps activations"
        tqdm.write(f"A pass of {tokens:,} tokens {how}.", file=sys.stderr)


@torch.no_grad()
def keep_selected(model: SparseWSI, example: Example) -> Example:
    """The example, on the model's device, with the patches that inference would keep."""
    features = example.features.to(model.device, non_blocking=True)
    scores = model.score(model.encode(features))
    rows = pick_diverse(scores, features, model.config.num_tokens, model.config.diversity)
    return replace(example, features=features).keep(rows)


@torch.no_grad()
def probe(stage: StageModule, example: Example, config: TrainConfig, step: int) -> dict[str, float]:
    """What the scorer does to one bag: hardness, and needle recall of the hard top-K where the truth is known.

    Hardness is that of the soft top-K at this step's tau and K; in hard steps at the last ones, in dense steps K / N.
    """
    n = len(example.indices)
    tau, k = choose_sparsity(config, step, n)
    scores = stage.model.scorer(stage.model.encode(example.features))
    keep = hard_topk(scores, stage.model.config.num_tokens)
    needles = [i for i, kind in enumerate(example.kinds) if kind in NEEDLE_KINDS]
    result = {}
    if needles:
        result["recall"] = len(set(keep.tolist()) & set(needles)) / len(needles)
        result["recall_chance"] = min(1.0, stage.model.config.num_tokens / n)
    if k is not None:
        alpha = soft_topk(zscore(scores), k, tau, kernel=config.kernel)
    elif config.is_hard(step):
        alpha = soft_topk(zscore(scores), stage.model.config.num_tokens, config.tau_end, kernel=config.kernel)
    else:
        alpha = torch.ones_like(scores, dtype=torch.float32)
    result["hardness"] = float(hardness(alpha, scores, stage.model.config.num_tokens))
    return result
