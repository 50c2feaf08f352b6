"""What a GPU does with training and inference at full size: one script, at most ten minutes, nothing to fetch.

    python -m benchmarks.gpu                    # Qwen2.5-7B's architecture with random weights, on the GPU
    python -m benchmarks.gpu --size tiny        # the same rows with a tiny LLM, on any machine; CI runs it

Rows: a training step (forward, backward, AdamW) of both stages for N patches with one question and with several, its
peak memory, tokens per second, how near it comes to the card's own matmul, and the kernel that attention ran in (flash
for one question, FlexAttention's blocks for several); encoder images per second; time to the first token and a
leave-one-out pass at K and at many tokens; and the tests that need a GPU, or two of them. Sizes that do not fit are
reported as such and stop nothing.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

from sparsewsi.files import write_json
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.sparse_wsi import SparseWSI
from train.attention import take_blocks
from train.config import TrainConfig
from train.data.example import Example, Question
from train.data.packing import lay_out
from train.eval.table import write_table
from train.sparselearn import SparseLearn
from train.stage import StageModule, add_lora, checkpoint_activations, computes_again, freeze, make_optimizer
from train.studies.flops import QWEN, architecture, llm_layers

PREFIX, QUESTION, ANSWER = 6, 76, 16  # tokens; 98 in all, as in train.studies.flops
ROOT = Path(__file__).resolve().parents[1]


def choose_architecture(size: str) -> PreTrainedConfig:
    """Qwen2.5-7B's shape, or one of the same kind that any machine can train."""
    if size == "full":
        return architecture(QWEN)
    return Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32_768,
    )  # fmt: skip


def synchronise(device: torch.device) -> None:
    """Wait until the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The fastest of several runs, after one that warms up."""
    work()
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure_matmul(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOPs per second of a large matrix product: what the card itself reaches."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / measure_seconds(lambda: a @ a, device, 5)


def build_stage(number: int, llm: nn.Module, device: torch.device) -> tuple[StageModule, torch.optim.Optimizer]:
    """Modules and optimizer of a stage around an LLM with random weights; no tokenizer is needed."""
    config = TrainConfig(stage=number)
    settings = SparseWSIConfig(llm=QWEN, encoder="conch", feature_dim=512, dim=512)
    model = SparseWSI(settings, llm, None)  # type: ignore[arg-type]  # token ids are drawn, no text is read
    if number == 2:
        add_lora(model, config)
    freeze(model, config)
    if device.type == "cuda":
        take_blocks(model.llm)
    stage = StageModule(model, SparseLearn(512, settings.num_tokens).to(device)).train()
    return stage, make_optimizer(stage, config)


def take_step(stage: StageModule, optimizer: torch.optim.Optimizer, n: int, questions: int) -> int:
    """One step on one bag of n patches; returns the length of the sequence."""
    model = stage.model
    generator = torch.Generator().manual_seed(n)
    vocabulary = int(model.llm.config.vocab_size)
    segments = [torch.randint(vocabulary, (QUESTION + ANSWER,), generator=generator) for _ in range(questions)]
    packed = lay_out(torch.arange(PREFIX), PREFIX + torch.arange(n), PREFIX + n, segments, [ANSWER] * questions)
    features = torch.randn(n, 512, generator=generator).half()
    example = Example(features, torch.arange(n), n, (Question("", ""),))
    checkpoint_activations(model.llm, len(packed.order))
    noise = torch.Generator(model.device).manual_seed(0)
    (stage([example], packed, 0.5, [32.0], [noise]) / len(packed.targets)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return len(packed.order)


def measure_step(
    stage: StageModule, optimizer: torch.optim.Optimizer, n: int, questions: int, matmul: float, repeats: int
) -> dict[str, Any]:
    """Seconds, peak memory, tokens per second and share of the card's matmul of one training step."""
    device = stage.model.device
    row: dict[str, Any] = {"N": n, "questions": questions}
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        length = 0

        def work() -> None:
            nonlocal length
            length = take_step(stage, optimizer, n, questions)

        seconds = measure_seconds(work, device, repeats)
        again = computes_again(stage.model.llm)
        # Forward, gradients of activations, and the forward pass again where activations were not kept.
        flops = llm_layers(stage.model.llm.config, length).flops * (3 if again else 2)
        row |= {"seconds": seconds, "tokens_per_second": length / seconds, "of_matmul": flops / seconds / matmul}
        row["activations"] = "computed again" if again else "kept"
        row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        row["kernel"] = name_kernel(work) if device.type == "cuda" else None
    except torch.cuda.OutOfMemoryError as error:
        row["error"] = str(error).splitlines()[0]
        optimizer.zero_grad()
    return row


def name_kernel(work: Callable[[], object]) -> str:
    """What attention ran in: the flash kernel, FlexAttention's blocks, or another one."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
    names = " ".join(event.key for event in seen.key_averages())
    return "flash" if "flash_attention" in names else "flex" if "flex_attention" in names else "other"


@torch.inference_mode()
def measure_first_token(llm: nn.Module, tokens: int, repeats: int) -> dict[str, Any]:
    """Prefill of so many visual tokens and the text, and the same for 8 rows at once, as evidence asks it."""
    weight = llm.get_input_embeddings().weight  # type: ignore[operator]
    length, device = tokens + PREFIX + QUESTION + ANSWER, weight.device
    row: dict[str, Any] = {"tokens": tokens}
    try:
        for name, batch in (("first_token_seconds", 1), ("evidence_rows_8_seconds", 8)):
            inputs = torch.randn(batch, length, weight.shape[1], dtype=weight.dtype, device=device)
            row[name] = measure_seconds(lambda x=inputs: llm(inputs_embeds=x, logits_to_keep=1), device, repeats)
    except torch.cuda.OutOfMemoryError as error:
        row["error"] = str(error).splitlines()[0]
    return row


def measure_encoder(device: torch.device, batch: int, repeats: int) -> dict[str, Any]:
    """Images per second of a ViT-B/16 with random weights, the shape of CONCH's trunk."""
    from transformers import ViTConfig, ViTModel

    shape: dict[str, Any] = {}  # that of ViT-B/16
    if device.type != "cuda":
        shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vit: nn.Module = ViTModel(ViTConfig(**shape), add_pooling_layer=False)
    vit = vit.to(device=device, dtype=dtype).eval()  # type: ignore[call-arg]  # transformers wraps it
    pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8).to(device)
    with torch.inference_mode():
        seconds = measure_seconds(lambda: vit(pixel_values=pixels.to(dtype) / 255), device, repeats)
    return {"encoder": "ViT-B/16" if device.type == "cuda" else "tiny ViT", "images_per_second": batch / seconds}


def run_gpu_tests() -> str:
    """The last line of the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return (done.stdout.strip().splitlines() or ["no output"])[-1]


def write_rows(rows: list[dict[str, Any]]) -> str:
    """Rows with the same columns as a Markdown table."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    return write_table(head, ([write_cell(row.get(name)) for name in head] for row in rows))


def write_cell(value: Any) -> str:
    """A figure with three digits."""
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "tiny"), default="full" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--patches", type=int, nargs="+", help="default: 1842 4096 10240; tiny: 64 256")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests that need a GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for gpu.json and gpu.md")
    given = parser.parse_args()
    full = given.size == "full"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matmul = measure_matmul(device, dtype, 8192 if full else 256)
    steps = []
    for number in (1, 2):
        with torch.device(device):
            llm = AutoModelForCausalLM.from_config(choose_architecture(given.size), dtype=dtype)
        stage, optimizer = build_stage(number, llm, device)
        for n in given.patches or ([1842, 4096, 10_240] if full else [64, 256]):
            for questions in given.questions:
                row = measure_step(stage, optimizer, n, questions, matmul, given.repeats)
                steps.append({"stage": number} | row)
                print(json.dumps(steps[-1]), file=sys.stderr, flush=True)
        llm = stage = optimizer = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
    with torch.device(device):
        llm = AutoModelForCausalLM.from_config(choose_architecture(given.size), dtype=dtype).eval()
    tokens = [measure_first_token(llm, count, given.repeats) for count in (32, 4096 if full else 256)]
    encoder = [measure_encoder(device, 64 if full else 2, given.repeats)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    tests = "left out" if given.no_tests else run_gpu_tests()
    where = f"{name}, torch {torch.__version__}, {given.size} size, matmul {matmul / 1e12:.3g} TFLOP/s; tests: {tests}"
    text = "\n\n".join([where, *(write_rows(rows) for rows in (steps, tokens, encoder))])
    record = {"where": where, "steps": steps, "tokens": tokens, "encoder": encoder}
    write_json(given.out / "gpu.json", record)
    (given.out / "gpu.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
