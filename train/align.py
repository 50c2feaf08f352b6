"""Before stage 1 (ours, not in the paper): teach slide encoder and projector the LLM's own words for what is seen.

A visual token that lies where the LLM keeps the word for its tissue is read much sooner than one that starts anywhere:
what is left to learn is to look among the visual tokens. Costs seconds, as the LLM itself is not run.

Labelled patches of every kind are turned towards the word of their kind and away from all others, each word judged for
itself, so that tissue that has no word may lie near none. Real slides add what no patch of them shows alone: the mean
over a few patches of a slide is turned towards its organ, and towards "malignant" or "benign".

A word's place is the mean of its pieces' input embeddings less the mean of all embeddings. D feature dim, H the LLM's
width, C words, B bags of P patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsewsi.model.sparse_wsi import SparseWSI
from train.data.bank import Bank
from train.data.kinds import WORDS
from train.data.open_world import GLASS
from train.data.real import SlideStream

PER_BANK = 128  # patches of each bank in a step
BAGS, PATCHES = 16, 16  # of real slides in a step
NOISE = 0.3  # added to the unit-variance tokens between encoder and projector, so that these are not learned by heart
DROPOUT = 0.5  # of the features
SHARPNESS = 15.0  # cosines are multiplied by this before they are compared
SLIDES = 0.3  # weight of the real slides' loss
POLES = {"malignant": ("malignant", "benign"), "neoplasm": ("neoplasm", "normal"), "carcinoma": ("carcinoma", "benign")}


def word_of(kind: str) -> str:
    """The word for a kind, also for those that are not asked for."""
    return WORDS.get(kind, kind.replace("_", " "))


@dataclass
class Alignment:
    """What a step of the alignment compares, and the loss of one."""

    model: SparseWSI
    banks: Sequence[Bank]
    real: SlideStream | None = None
    words: dict[str, Tensor] = field(default_factory=dict)  # word -> (H,) of unit length

    def __post_init__(self) -> None:
        self.kinds = sorted({str(kind) for bank in self.banks for kind in bank.kinds} - {GLASS})
        organs = {slide.facts["organ"] for slide in self.real.slides} - {""} if self.real else set()
        self.organs = sorted(organs)
        wanted = {*map(word_of, self.kinds), *self.organs, *(word for pair in POLES.values() for word in pair)}
        self.words = dict(zip(sorted(wanted), self.model.place_words(sorted(wanted))))
        self.pools = [
            {kind: _by_source(bank, kind) for kind in self.kinds if len(bank.rows(kind))} for bank in self.banks
        ]

    def loss(self, generator: np.random.Generator) -> Tensor:
        """Loss of PER_BANK patches of each bank and, where there are real slides, of BAGS of these."""
        table = torch.stack([self.words[word_of(kind)] for kind in self.kinds])  # (C, H)
        features, kinds = [], []
        for bank, pools in zip(self.banks, self.pools):
            for kind in generator.choice(sorted(pools), PER_BANK):
                sources = pools[str(kind)]
                rows = sources[int(generator.integers(len(sources)))]
                features.append(bank.features[int(generator.choice(rows))])
                kinds.append(self.kinds.index(str(kind)))
        target = self.place(torch.tensor(kinds))
        cosine = self.see(torch.stack(features)) @ table.T  # (B, C)
        own = cosine.gather(1, target[:, None])[:, 0]
        # Two kinds may share a word: neither is then wrong for the other.
        wrong = (table @ table.T < 0.99)[target].float()
        away = (F.softplus(SHARPNESS * (cosine - 0.4)) * wrong).sum() / wrong.sum()
        loss = (1 - own).mean() + 0.3 * F.cross_entropy(SHARPNESS * cosine, target) + away
        return loss if self.real is None else loss + SLIDES * self.slide_loss(generator)

    def slide_loss(self, generator: np.random.Generator) -> Tensor:
        """Loss of the mean over some patches of BAGS real slides: organ, and the poles of each fact."""
        assert self.real is not None
        bags, slides = [], []
        for _ in range(BAGS):
            slide = self.real.draw(generator)
            bags.append(self.real.draw_features(slide, PATCHES, generator)[0])
            slides.append(slide)
        patches = self.see(torch.cat(bags)).split([len(bag) for bag in bags])  # a small slide has fewer than PATCHES
        seen = torch.stack([some.mean(0) for some in patches])  # (B, H)
        loss = seen.new_zeros(())
        for kind, (high, low) in POLES.items():
            told = [number for number, slide in enumerate(slides) if slide.facts[kind]]
            if told:
                answer = self.place(torch.tensor([float(slides[i].facts[kind] == "Yes") for i in told]))
                leaning = SHARPNESS * (seen[self.place(torch.tensor(told))] @ (self.words[high] - self.words[low]))
                loss = loss + F.binary_cross_entropy_with_logits(leaning, answer)
        told = [number for number, slide in enumerate(slides) if slide.facts["organ"]]
        if told:
            organs = torch.stack([self.words[organ] for organ in self.organs])
            answer = self.place(torch.tensor([self.organs.index(slides[i].facts["organ"]) for i in told]))
            loss = loss + F.cross_entropy(SHARPNESS * seen[self.place(torch.tensor(told))] @ organs.T, answer)
        return loss

    def place(self, values: Tensor) -> Tensor:
        """Values on the model's device, for which nothing waits."""
        return values.to(self.model.device, non_blocking=True)

    def see(self, features: Tensor) -> Tensor:
        """Directions (n, H) of patches (n, D) after encoder and projector, with dropout and noise on the way."""
        features = self.place(features).float()
        mean = features.mean(0)
        x = self.model.slide_encoder(mean + F.dropout(features - mean, DROPOUT))
        return F.normalize(self.model.projector(x + NOISE * torch.randn_like(x)), dim=-1)


def align(
    model: SparseWSI,
    banks: Sequence[Bank],
    steps: int,
    seed: int = 0,
    lr: float = 1e-3,
    real: SlideStream | None = None,
) -> float:
    """Turn patches towards the words for them; returns the last loss.

    Kinds, and within a kind the slides a patch may come from, are drawn with equal chances.
    """
    everything = torch.cat([bank.features for bank in (*banks, *([real.bank] if real else []))])
    everything = everything[:: max(1, len(everything) // 20_000)].to(model.device, torch.float32)
    inlet = model.slide_encoder.inlet
    assert isinstance(inlet, nn.Linear), "the slide encoder of another architecture is not aligned"
    _standardise(inlet, everything.mean(0), everything.std(0) + 1e-3)
    alignment, generator = Alignment(model, banks, real), np.random.default_rng(seed)
    torch.manual_seed(seed)
    parameters = [*model.slide_encoder.parameters(), *model.projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    schedule = one_cycle(optimizer, lr, steps)
    loss = torch.zeros(())
    for _ in range(steps):
        loss = alignment.loss(generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return loss.item()


def one_cycle(optimizer: torch.optim.Optimizer, lr: float, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """The rate rises for a tenth of the steps, two at least, then falls. Raises ValueError for fewer than three."""
    if steps < 3:
        raise ValueError(f"the rate rises and falls again, which takes 3 steps at least, not {steps}.")
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=max(0.1, 2 / steps))


@torch.no_grad()
def _standardise(inlet: nn.Linear, mean: Tensor, spread: Tensor) -> None:
    """Change the first layer so that it does to raw features what it did to standardised ones."""
    inlet.weight.div_(spread)
    inlet.bias.sub_(inlet.weight @ mean)


def _by_source(bank: Bank, kind: str) -> list[np.ndarray]:
    """The rows of a kind, of each of its slides."""
    rows = bank.rows(kind)
    return [rows[bank.sources[rows] == source] for source in np.unique(bank.sources[rows])]
