"""After stage 2 (ours, not in the paper): the scorer alone goes on learning what to keep, and checkpoints are averaged.

    python -m train.sharpen runs/demo2 runs/demo2/sharp --banks runs/tiles.safetensors runs/phantom.safetensors \\
        --slides runs/slides.safetensors --phantoms runs/phantoms

Stage 1 puts a patch where the LLM keeps its word, so that what the kept patches tell can be read without the LLM: a
kind is told if any kept token lies near its word, a slide's facts by the mean of the kept tokens. The scorer is trained
through the same soft top-K and noise gate as in stage 2, on large mosaics of an open world, on whole phantoms and on
real slides, so that as much as possible of what is there is still told. A step costs a fraction of a second.

Projector and adapter become the mean of the last checkpoints of the run: a single one answers now more often Yes, now
more often No.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from sparsewsi.model.sparse_wsi import SparseWSI
from train.align import POLES, SHARPNESS, one_cycle, word_of
from train.checkpoint import latest, load_state
from train.data.bank import Bank, load_bank
from train.data.open_world import GLASS, WITHOUT, OpenWorld, absent_slides
from train.data.phantoms import PhantomStream, load_phantoms
from train.data.real import SlideStream, load_slides
from train.data.stream import MosaicStream
from train.flags import add_flag, make_parser, run_command
from train.sparselearn import SparseLearn, k_at, tau_at

MOSAICS, SLIDES = 4, 4  # bags of a step
MOST = 1024  # patches of a phantom
NEAR = 0.4  # cosine to a word at which a kind counts as half told


def tell_kinds(model: SparseWSI, kept: Tensor, table: Tensor) -> Tensor:
    """How clearly each word (C, H) is told by tokens (N, D_v): (C,) logits, of the nearest token or nearly so."""
    cosine = F.normalize(model.projector(kept), dim=-1) @ table.T  # (N, C)
    return (SHARPNESS * 2 * (cosine - NEAR)).logsumexp(0) / 2


def sharpen(
    model: SparseWSI,
    sparselearn: SparseLearn,
    world: OpenWorld,
    closed: MosaicStream,
    real: SlideStream,
    steps: int,
    patches: int,
    seed: int = 0,
    lr: float = 5e-4,
    phantoms: PhantomStream | None = None,
) -> float:
    """Train model.scorer in place; returns the mean loss of the last tenth of the steps."""
    kinds = sorted({str(kind) for bank in (world.bank, *closed.banks) for kind in bank.kinds} - {GLASS})
    table = model.place_words([word_of(kind) for kind in kinds])
    poles = {kind: model.place_words(pair) for kind, pair in POLES.items()}
    model.requires_grad_(False)
    sparselearn.requires_grad_(False)
    model.scorer.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.scorer.parameters(), lr=lr, weight_decay=0.01)
    schedule = one_cycle(optimizer, lr, steps)
    k, losses, began = model.config.num_tokens, [], time.time()
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rng = np.random.default_rng((seed, 23, step))
        tau = tau_at(step, round(0.8 * steps), 0.7, 0.05)
        progress = min(1.0, step / (0.6 * steps))
        gate = functools.partial(_gate, model, sparselearn, tau, progress, generator)
        loss = torch.zeros(())
        for number in range(MOSAICS):
            if number % 2:
                stream = phantoms if phantoms is not None and number == 1 else closed
                example = stream.example(step * MOSAICS + number, patches if stream is closed else MOST)
                features, held = example.features, set(example.kinds) - {GLASS}
            else:
                mosaic = world.draw(patches, (3, 12), rng)
                features, held = mosaic.features, set(mosaic.kinds.tolist())
            told = tell_kinds(model, gate(features), table)
            there = torch.tensor([kind in held for kind in kinds])
            # Of a real slide in the background only malignant tissue is known not to be there.
            open_ended = any(kind.startswith(WITHOUT) for kind in held)
            asked = torch.tensor([kind in held or not open_ended or kind == "carcinoma" for kind in kinds])
            for some, sign in ((there, -1), (asked & ~there, 1)):
                loss = loss + F.softplus(sign * told[some]).sum() / max(1, int(some.sum()))
        for _ in range(SLIDES):
            slide = real.draw(rng)
            features, _, _ = real.draw_features(slide, patches, rng)
            seen = F.normalize(model.projector(gate(features)), dim=-1).sum(0) / k  # noise adds little
            for kind, pair in poles.items():
                if slide.facts[kind]:
                    leaning = SHARPNESS * (seen @ (pair[0] - pair[1]))
                    answer = torch.tensor(float(slide.facts[kind] == "Yes"))
                    loss = loss + 0.1 * F.binary_cross_entropy_with_logits(leaning, answer)
        loss = loss / MOSAICS
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.scorer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {np.mean(losses[-20:]):.3f}, {time.time() - began:.0f} s", flush=True)
    return float(np.mean(losses[-max(1, steps // 10) :]))


def _gate(
    model: SparseWSI,
    sparselearn: SparseLearn,
    tau: float,
    progress: float,
    generator: torch.Generator,
    features: Tensor,
) -> Tensor:
    """Tokens (N, D_v) of features (N, D) after soft top-K and noise; the budget falls from N / 2 to K."""
    with torch.no_grad():
        x = model.slide_encoder(features.float())
    k = model.config.num_tokens
    budget = k_at(round(1000 * progress), 1000, max(0.5 * len(x), k), k)
    return sparselearn(x, model.scorer(x), tau, k=budget, generator=generator)


def average(model: SparseWSI, folders: Sequence[Path]) -> None:
    """Give the model's projector and adapter the mean of those of the models in these folders."""
    projectors = [load_file(folder / "model.safetensors") for folder in folders]
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders]
    mean = {name: sum(each[name].float() for each in projectors) / len(folders) for name in projectors[0]}
    projector = {name: value for name, value in mean.items() if name.startswith("projector.")}
    model.load_state_dict(projector, strict=False)  # type: ignore[arg-type]
    adapter = {name: sum(each[name].float() for each in adapters) / len(folders) for name in adapters[0]}
    set_peft_model_state_dict(model.llm, adapter)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a stage 2")
    parser.add_argument("folder", type=Path, help="of the model that is written")
    add_flag(parser, "--banks", required=True, type=Path)
    parser.add_argument("--slides", type=Path, required=True, help="bank of python -m train.data.real bank")
    parser.add_argument("--phantoms", type=Path, help="folder of python -m train.data.phantoms")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--patches", type=int, default=320)
    parser.add_argument("--average", type=int, default=7, help="number of last checkpoints that are averaged")
    parser.add_argument("--diversity", type=float, default=8.0, help="of the model's selection")
    add_flag(parser, "--seed")
    given = parser.parse_args()
    checkpoint = latest(given.run)
    if checkpoint is None:
        raise ValueError(f"{given.run} holds no checkpoint. Name the folder of a run of stage 2.")
    model = SparseWSI.from_pretrained(checkpoint / "model", merge=False)  # its adapter is averaged below
    sparselearn = SparseLearn(model.config.dim, model.config.num_tokens)
    load_state(checkpoint, sparselearn)
    banks = tuple(load_bank(path, "train") for path in given.banks)
    bank, slides = load_slides(given.slides, "train")
    slides = tuple(slide for slide in slides if any(slide.facts.values()))
    clean = [slide.slide for slide in slides if slide.facts["carcinoma"] == slide.facts["malignant"] == "No"]
    real_banks: list[Bank] = [each for each in banks if each.origin == "real"]
    if not real_banks:
        raise ValueError("--banks holds no bank of labelled tiles; sharpening needs one (python -m train.data.mosaic).")
    world = OpenWorld(real_banks[0], absent_slides(bank, clean), given.seed)
    closed = MosaicStream(banks, given.seed, 2)
    real = SlideStream(bank, slides, given.seed)
    whole = PhantomStream(load_phantoms(given.phantoms, "train"), given.seed) if given.phantoms else None
    sharpen(model, sparselearn, world, closed, real, given.steps, given.patches, given.seed, phantoms=whole)
    checkpoints = sorted(path for path in checkpoint.parent.iterdir() if path.is_dir() and not path.is_symlink())
    average(model, [path / "model" for path in checkpoints[-given.average :]])
    model.config = replace(model.config, diversity=given.diversity)
    model.save_pretrained(given.folder, dtype=torch.float32)


if __name__ == "__main__":
    run_command(main)
