"""Mosaics of an open world: any kind of tissue may be background, and what is a focus in one is background in another.

A closed mosaic (train/data/stream.py) has three kinds of background and foci of others, so that what a patch is tells
which role it plays. Here the background is 2 to 8 regions of any kinds, each of several slides, or real slides that are
known not to hold carcinoma; the foci are of any other kinds that can be asked for.

N patches, M patches in the bank, D feature dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from train.data.bank import Bank
from train.data.example import Example, Question
from train.data.kinds import NEEDLES, Facts, ask
from train.data.layout import LEAST_PATCHES, add_focus, lay_out_regions
from train.data.real import SlideStream
from train.data.stream import MosaicStream

GLASS = "background"
FEWEST, MOST = 2, 8  # kinds of background
WITHOUT = "slide:"  # before the name of a slide in place of a kind


@dataclass(frozen=True)
class Mosaic:
    """A mosaic of an open world.

    certain: whether its facts name all that can be asked for. Where real slides are background they do not: these hold
    other tissue too, though no carcinoma.
    """

    kinds: np.ndarray  # (n,) str
    features: torch.Tensor  # (n, D)
    needles: set[str]  # kinds of the foci
    facts: Facts
    certain: bool


@dataclass(frozen=True)
class OpenWorld:
    """An endless, seeded stream of examples: example(i) depends on (seed, i) and on nothing else.

    bank: labelled patches. slides: patches of real slides without any malignant tissue, their kind WITHOUT + name.
    """

    bank: Bank
    slides: Bank | None
    seed: int
    questions_per_bag: int = 4
    of_slides: float = 0.3  # share of the mosaics with a background of real slides

    def example(self, index: int, n: int, max_index: int = 4096) -> Example:
        """Example number `index` with n patches, spread over up to max_index places as in MosaicStream."""
        rng = np.random.default_rng((self.seed, 11, index))
        mosaic = self.draw(n, (max(2, min(4, n // 16)), max(3, min(12, n // 8))), rng)
        questions = self.questions(mosaic.facts, mosaic.certain, rng)
        num_patches = int(np.exp(rng.uniform(np.log(n), np.log(max(max_index, n)))))
        indices = np.sort(rng.choice(num_patches, n, replace=False))
        return Example(mosaic.features, torch.from_numpy(indices), num_patches, tuple(questions), tuple(mosaic.kinds))

    def draw(
        self, n: int, per_needle: tuple[int, int], rng: np.random.Generator, carcinoma: bool | None = None
    ) -> "Mosaic":
        """A mosaic of n patches.

        per_needle: least and most patches of a focus. carcinoma: whether it is to hold some; half of them do unless
        told.
        """
        askable = [kind for kind in NEEDLES[self.bank.origin] if len(self.bank.rows(kind))]
        wanted = bool(rng.integers(2)) if carcinoma is None else carcinoma
        real = self.slides is not None and rng.random() < self.of_slides
        if real:
            assert self.slides is not None
            names = sorted(set(map(str, self.slides.kinds)))
            background = [str(name) for name in rng.choice(names, min(len(names), rng.integers(1, 4)), replace=False)]
        else:
            possible = [kind for kind in sorted(set(map(str, self.bank.kinds))) if kind != GLASS]
            if not wanted:
                possible.remove("carcinoma")
            count = int(rng.integers(FEWEST, min(MOST, len(possible) - 4) + 1))
            background = [str(kind) for kind in rng.choice(possible, count, replace=False)]
        others = [kind for kind in askable if kind not in (*background, "carcinoma")]
        most = max(0, min(len(others) - 2, int(rng.integers(0, 3))))
        needles = [str(kind) for kind in rng.choice(others, most, replace=False)]
        if wanted and "carcinoma" not in background:
            needles.append("carcinoma")
        if not needles and others:
            needles.append(str(rng.choice(others)))
        kinds = lay_out_regions(background, n, rng)
        for kind in rng.permutation(needles):
            kinds = add_focus(kinds, str(kind), int(rng.integers(per_needle[0], per_needle[1] + 1)), background, rng)
        held = set(map(str, np.unique(kinds)))
        facts = Facts(self.bank.origin, "", tuple(sorted(held & set(askable))))
        planted = set(needles)
        return Mosaic(kinds, self.fill(kinds, planted, rng), planted, facts, not real)

    def fill(self, kinds: np.ndarray, needles: set[str], rng: np.random.Generator) -> torch.Tensor:
        """Features (n, D) of a layout: a focus is of one slide, a region of up to three."""
        found = torch.empty(len(kinds), self.bank.features.shape[1], dtype=self.bank.features.dtype)
        for kind in map(str, np.unique(kinds)):
            bank = self.slides if kind.startswith(WITHOUT) else self.bank
            assert bank is not None
            pool = bank.rows(kind)
            sources = np.unique(bank.sources[pool])
            some = rng.choice(
                sources, min(len(sources), 1 if kind in needles else int(rng.integers(1, 4))), replace=False
            )
            pool = pool[np.isin(bank.sources[pool], some)]
            places = np.flatnonzero(kinds == kind)
            rows = rng.choice(pool, len(places), replace=len(places) > len(pool))
            found[torch.from_numpy(places)] = bank.features[torch.from_numpy(rows)]
        return found

    def questions(self, facts: Facts, certain: bool, rng: np.random.Generator) -> list[Question]:
        """Some questions about a mosaic; yes and no, and every option, equally likely without it."""
        yes = "carcinoma" in facts.present
        found = [Question("Does this slide contain carcinoma?", "Yes" if yes else "No", ("Yes", "No"), "diagnosis")]
        if not certain:
            return found
        families = ("present", "absent", "contains", "contains", "present")
        drawn = [ask(facts, str(family), rng) for family in rng.permutation(families)]
        drawn = [
            question
            for question in drawn
            if question is not None and not (question.family == "contains" and "carcinoma" in question.question)
        ]
        found = [*drawn, *found] if rng.random() < 0.7 else [*found, *drawn]
        return list(dict.fromkeys(found))[: self.questions_per_bag]


def absent_slides(bank: Bank, slides: Sequence[str]) -> Bank:
    """The patches of these slides of a bank of slides (train/data/real.py) as background, a kind of its own each."""
    keep = np.isin(bank.sources, list(slides))
    kinds = np.array([WITHOUT + str(source) for source in bank.sources[keep]])
    return Bank(bank.features[torch.from_numpy(keep)], kinds, bank.sources[keep], "slides", bank.encoder)


@dataclass(frozen=True)
class Mixture:
    """Bags of three kinds in turn: closed mosaics, mosaics of an open world, real slides.

    open_world: share of the mosaics of labelled patches that are open at the end; none are at the start, so that words
    are learned before roles are mixed up. real_slides: share of all bags that are real slides.
    """

    closed: MosaicStream
    opened: OpenWorld | None
    real: SlideStream | None
    bags: int  # of the whole run
    open_world: float
    real_slides: float

    def example(self, index: int, n: int) -> Example:
        """Example number `index` with n patches, or as many as a real slide has."""
        rng = np.random.default_rng((self.closed.seed, 13, index))
        if n >= 8 and self.real is not None and rng.random() < self.real_slides:
            return self.real.example(index, n)
        progress = min(1.0, 1.5 * index / self.bags)
        if n >= LEAST_PATCHES // 2 and self.opened is not None and rng.random() < self.open_world * progress:
            return self.opened.example(index, n)
        return self.closed.example(index, n)
