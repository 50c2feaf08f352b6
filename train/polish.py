"""The last stage of the demonstration (ours, not in the paper): reading bags that are hard to know again.

    python -m train.polish runs/sharp/model runs/polish --banks runs/tiles.safetensors runs/phantom.safetensors \\
        --slides runs/slides.safetensors --unseen runs/unseen/unseen.safetensors --phantoms runs/phantoms

Fifty slides are soon known by heart: the slide encoder has learned their facts, and at the end of stage 2 the loss on
them is near zero while unseen slides are answered no better than before. Here projector and adapter go on with the
patches that inference would keep, and

- half of the slides' bags are encoded by an encoder that has not seen the slide (train/unseen.py);
- every feature vector loses half of its numbers (dropout), every patch comes in one of several restained, scaled and
  blurred views, and half of the slides' bags hold several views of every patch, so that 32 are kept of as many as a
  whole slide has;
- some bags are a slide without a malignant tumour with patches of one that has some;
- whole phantoms take the place of mosaics of their patches;
- whether there is a tumour is asked, in all wordings, wherever the kinds of all patches are known.

The written model is the mean of the last checkpoints. A run that was stopped goes on from its last checkpoint.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsewsi.model.selector import SELECTORS, mmr
from sparsewsi.model.sparse_wsi import SparseWSI
from train.checkpoint import latest, save_state
from train.config import Ended, TrainConfig
from train.data.bank import Bank, load_bank
from train.data.example import Example, Question
from train.data.open_world import WITHOUT, OpenWorld, absent_slides
from train.data.phantoms import PhantomStream, load_phantoms
from train.data.real import SlideFacts, SlideStream, describe, load_slides
from train.data.stream import MosaicStream
from train.data.tumours import ask_tumours
from train.flags import add_flag, make_parser, run_command
from train.run import complete_settings, prepare, read_metrics, record_metrics, take_step
from train.run_folder import hold
from train.sharpen import average

SHARES = {"slides": 0.4, "phantoms": 0.25, "open": 0.25, "closed": 0.1}  # of the bags
DROPOUT = 0.5  # of the features, as when slide encoder and projector learned the words (train/align.py)
UNSEEN = 0.5  # share of the slides' bags of encoders that have not seen the slide
VIEWS = 0.5  # share of the slides' bags that hold several views of every patch
MIXED = 0.25  # share of the bags of slides without a malignant tumour that get patches of one with some
OTHER = 0.3  # share of the slides' bags of which random patches, or farthest-point ones, are kept
SIZES = (256, 1024)  # patches of a mosaic
# Of the questions that Yes answers so many are asked: as many as of those that No does.
YES_KEPT = {"slides": {"malignant": 0.6, "neoplasm": 0.25}, "open": {"malignant": 0.75, "neoplasm": 0.1}}


@dataclass(frozen=True)
class HardToKnow:
    """An endless, seeded stream of bags of four sorts: example(i) depends on (seed, i) and on nothing else."""

    slides: SlideStream
    unseen: SlideStream
    phantoms: PhantomStream
    opened: OpenWorld
    closed: MosaicStream
    seed: int
    questions_per_bag: int = 3

    def example(self, index: int) -> Example:
        """Example number `index`."""
        rng = np.random.default_rng((self.seed, 31, index))
        sort = str(rng.choice(list(SHARES), p=list(SHARES.values())))
        if sort == "slides":
            return self.of_slide(rng)
        n = int(np.exp(rng.uniform(*np.log(SIZES))))
        if sort == "phantoms":
            return self.phantoms.example(index, n)
        return self.closed.example(index, n) if sort == "closed" else self.of_mosaic(n, rng)

    def of_slide(self, rng: np.random.Generator) -> Example:
        """A slide, or one without a malignant tumour with patches of one with some, in one view or in several."""
        slide = self.slides.draw(rng)
        features = self.views(slide, rng, rng.uniform(0.5, 1))
        if slide.facts["malignant"] == "No" and rng.random() < MIXED:
            other = self.slides.draw(rng)
            while other.facts["malignant"] != "Yes":
                other = self.slides.draw(rng)
            added = self.views(other, rng, rng.uniform(0.3, 0.8))
            features = torch.cat([features[: max(1, int(len(features) * rng.uniform(0.3, 1)))], added])
            facts = dict.fromkeys(slide.facts, "") | {"malignant": "Yes", "neoplasm": "Yes"}
            if other.facts["carcinoma"] == "Yes" or slide.facts["carcinoma"] == "No":
                facts["carcinoma"] = other.facts["carcinoma"]
            slide = replace(slide, facts=facts)
        questions = self.even(self.slides.questions(slide, rng), "slides", rng) or [describe(slide)]
        order = torch.from_numpy(rng.permutation(len(features)))
        return Example(features[order], torch.arange(len(order)), len(order), tuple(questions))

    def even(self, questions: Sequence[Question], sort: str, rng: np.random.Generator) -> list[Question]:
        """The questions, less some that Yes answers; and no diagnoses, which tell training slides apart best of all."""
        kept = YES_KEPT[sort]
        return [
            question
            for question in questions
            if question.family != "diagnosis"
            and (question.answer != "Yes" or rng.random() < kept.get(question.family, 1.0))
        ]

    def views(self, slide: SlideFacts, rng: np.random.Generator, share: float) -> Tensor:
        """Features of a share of a slide's patches, each in a view of its own or in several."""
        source = self.unseen if slide.slide in self.unseen.rows and rng.random() < UNSEEN else self.slides
        rows = source.rows[slide.slide]  # (C, N)
        copies, n = rows.shape
        kept = rng.choice(n, max(1, round(share * n)), replace=False)
        if rng.random() < VIEWS:
            some = rng.choice(copies, int(rng.integers(2, copies + 1)), replace=False) if copies > 1 else np.arange(1)
            found = rows[np.ix_(some, kept)].ravel()
        else:
            found = rows[rng.integers(copies, size=len(kept)), kept]
        return source.bank.features[torch.from_numpy(found)]

    def of_mosaic(self, n: int, rng: np.random.Generator) -> Example:
        """A mosaic of an open world, asked for tumours in all wordings too."""
        mosaic = self.opened.draw(n, (4, 12), rng)
        kinds = set(mosaic.kinds.tolist())
        # Slides in the background hold no malignant tumour; of a benign one, and of other tissue, nothing is known.
        known = {kind for kind in kinds if not kind.startswith(WITHOUT)}
        possible = [q for q in ask_tumours(known, rng) if mosaic.certain or q.family != "neoplasm"]
        tumours = self.even(possible, "open", rng) or possible
        others = [
            question
            for question in self.opened.questions(mosaic.facts, mosaic.certain, rng)
            if question.family != "diagnosis"
        ]
        asked = [tumours[i] for i in rng.permutation(len(tumours))][: 3 if not others else 1]
        return Example(
            mosaic.features,
            torch.arange(n),
            n,
            tuple([*asked, *others][: self.questions_per_bag]),
            tuple(mosaic.kinds.tolist()),
        )


def drop(features: Tensor, mean: Tensor, generator: torch.Generator) -> Tensor:
    """Features (n, D) of which a share DROPOUT of the numbers is replaced by the mean (D,), the rest drawn apart."""
    x = features.float()
    kept = torch.rand(x.shape, generator=generator) >= DROPOUT
    return mean + (x - mean) * kept / (1 - DROPOUT)


@torch.no_grad()
def keep_some(model: SparseWSI, example: Example, generator: torch.Generator) -> Example:
    """The example with the patches that inference would keep; of slides sometimes others, which tell the same facts."""
    k = model.config.num_tokens
    draw = float(torch.rand(1, generator=generator))
    seed = int(torch.randint(2**31, (1,), generator=generator))
    features = example.features
    if not example.kinds and draw < OTHER:
        name = "random" if draw < OTHER / 2 else "farthest"
        rows = SELECTORS[name](features, torch.zeros(len(features), 2), k, seed)
    else:
        rows = mmr(model.score(model.encode(features)).cpu(), features, k, model.config.diversity)
    kept = example.keep(rows)
    # Dropout only on what the LLM sees: the selection is that of inference.
    shown = drop(features[rows], features.float().mean(0), generator)
    return replace(kept, features=shown, rows=torch.arange(len(rows)))


def polish(config: TrainConfig, data: HardToKnow, banks: Sequence[Bank]) -> Path:
    """Run or resume the stage; returns the last checkpoint's folder."""
    out = Path(config.out)
    bank = data.slides.bank
    config = complete_settings(config, bank.features.shape[1], bank.encoder)
    stage, optimizer, done = prepare(config, tuple(banks), bank.features.shape[1], bank.encoder, real=data.slides)
    with hold(out), record_metrics(config, done) as record:
        for step in range(done, config.steps):
            began = time.perf_counter()
            examples = [data.example(step * config.accumulation + i) for i in range(config.accumulation)]
            noise = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            keep = functools.partial(keep_some, generator=noise)
            (metrics,) = read_metrics([{"step": step} | take_step(stage, optimizer, examples, config, step, keep)])
            record(metrics | {"seconds": time.perf_counter() - began})
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                ended = Ended(config.kernel, config.gate, config.denoiser, config.tau_end)
                save_state(out, step + 1, stage.model, stage.sparselearn, optimizer, ended, config.keep)
    found = latest(out)
    assert found is not None
    return found


def open_stream(
    banks: Sequence[Bank], slides: Path, unseen: Path, phantoms: Path, seed: int, questions_per_bag: int
) -> HardToKnow:
    """The stream over the train parts of banks, slides and whole phantoms."""
    bank, known = load_slides(slides, "train")
    known = tuple(slide for slide in known if any(slide.facts.values()))
    clean = [slide.slide for slide in known if slide.facts["carcinoma"] == slide.facts["malignant"] == "No"]
    real = [each for each in banks if each.origin == "real"]
    if not real:
        raise ValueError("--banks holds no bank of labelled tiles; polishing needs one (python -m train.data.mosaic).")
    unseen_bank, _ = load_slides(unseen, "train")
    encoded = set(map(str, unseen_bank.sources))
    return HardToKnow(
        SlideStream(bank, known, seed, questions_per_bag),
        SlideStream(unseen_bank, tuple(slide for slide in known if slide.slide in encoded), seed, questions_per_bag),
        PhantomStream(load_phantoms(phantoms, "train"), seed, questions_per_bag),
        OpenWorld(real[0], absent_slides(bank, clean), seed, questions_per_bag, of_slides=0.5),
        MosaicStream(tuple(banks), seed, 2, questions_per_bag),
        seed,
        questions_per_bag,
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("start", type=Path, help="model folder or checkpoint to start from")
    parser.add_argument("folder", type=Path, help="of the run; the model is written into its folder model")
    add_flag(parser, "--banks", required=True, type=Path)
    parser.add_argument("--slides", type=Path, required=True, help="bank of python -m train.data.real bank")
    parser.add_argument("--unseen", type=Path, required=True, help="bank of python -m train.unseen")
    parser.add_argument("--phantoms", type=Path, required=True, help="folder of python -m train.data.phantoms")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--accumulation", type=int, default=12, help="bags of a step")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--checkpoint_every", type=int, default=10, help="steps")
    parser.add_argument("--average", type=int, default=5, help="number of last checkpoints that are averaged")
    parser.add_argument("--diversity", type=float, default=30.0, help="of the written model's selection")
    add_flag(parser, "--seed")
    given = parser.parse_args()
    config = TrainConfig(
        stage=2, out=str(given.folder), init=str(given.start), steps=given.steps, accumulation=given.accumulation,
        questions_per_bag=3, seed=given.seed, banks=list(map(str, given.banks)), slides=str(given.slides),
        lr=given.lr, lr_lora=given.lr, lora_rank=16, lora_alpha=32, dense=0.0, anneal=0.0, hard=1.0, tau_start=0.05,
        tau_end=0.05, warmup=0.1, keep_aligned=0.3, checkpoint_every=given.checkpoint_every, keep=given.average,
    )  # fmt: skip
    banks = [load_bank(path, "train") for path in given.banks]
    data = open_stream(banks, given.slides, given.unseen, given.phantoms, given.seed, config.questions_per_bag)
    last = polish(config, data, banks)
    model = SparseWSI.from_pretrained(last / "model", merge=False)  # whose adapter is averaged
    checkpoints = sorted(path for path in last.parent.iterdir() if path.is_dir() and not path.is_symlink())
    average(model, [path / "model" for path in checkpoints[-given.average :]])
    model.config = replace(model.config, diversity=given.diversity)
    model.save_pretrained(given.folder / "model", dtype=torch.float32)


if __name__ == "__main__":
    run_command(main)
