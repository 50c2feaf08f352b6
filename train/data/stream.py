"""Mosaics as bags: training examples without end, and balanced test questions.

N patches, D feature dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from sparsewsi.bags.bag import Bag
from train.data.bank import Bank, list_other_kinds
from train.data.example import Example, Question
from train.data.kinds import BACKGROUNDS, NEEDLES, WORDS, ask, list_families, plan_facts, write_caption
from train.data.layout import add_other_tissue, draw_rows, lay_out

MOST_OTHERS = 4  # kinds of other tissue in a mosaic


def fill(bank: Bank, kinds: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Features (n, D) for a layout."""
    return bank.features[torch.from_numpy(draw_rows(kinds, bank.kinds, bank.sources, rng))]


def place_rows(bank: Bank, rows: np.ndarray, name: str = "mosaic") -> Bag:
    """A Bag of the bank's rows (n,); patches lie on a square raster of 224 px at 0.5 um/px."""
    side = int(np.ceil(np.sqrt(len(rows))))
    row, column = np.divmod(np.arange(len(rows)), side)
    coords = torch.from_numpy(np.stack([column, row], 1).astype(np.int32) * 224)
    return Bag(bank.features[torch.from_numpy(rows)], coords, 224, 0.5, bank.encoder, name)


def make_bag(bank: Bank, kinds: np.ndarray, rng: np.random.Generator, name: str = "mosaic") -> Bag:
    """A Bag of a layout."""
    return place_rows(bank, draw_rows(kinds, bank.kinds, bank.sources, rng), name)


def ask_in_turn(
    bank: Bank, n_questions: int, n: int, seed: int, per_needle: tuple[int, int] = (4, 12)
) -> Iterator[tuple[Bag, np.ndarray, Question]]:
    """Balanced test questions, one mosaic each: families in turn, answers uniform within a family.

    Only kinds that the bank has patches of are planted; options name any.
    """
    families = list_families(bank.origin)
    held = set(map(str, bank.kinds))
    for i in range(n_questions):
        rng = np.random.default_rng((seed, i))
        family = families[i % len(families)]
        facts = plan_facts(bank.origin, family, rng, held)
        kinds = lay_out(facts, n, per_needle, rng)
        question = ask(facts, family, rng)
        assert question is not None
        yield make_bag(bank, kinds, rng), kinds, question


@dataclass(frozen=True)
class MosaicStream:
    """An endless, seeded stream of training examples: example(i) depends on (seed, i) and on nothing else."""

    banks: tuple[Bank, ...]
    seed: int
    stage: int
    questions_per_bag: int = 4
    other_tissue: float = 0.0  # share of the mosaics with regions of tissue that is neither background nor asked about

    def example(self, index: int, n: int, max_index: int = 4096) -> Example:
        """Example number `index` with n patches.

        The n rows stand for a larger slide: their original indices are spread over up to max_index patches,
        so that the LLM meets the positions of long slides while it pays for short ones.
        """
        rng = np.random.default_rng((self.seed, index))
        bank = self.banks[index % len(self.banks)]
        if n < 8 or rng.random() < 0.1:
            kind = str(rng.choice((*BACKGROUNDS[bank.origin], *NEEDLES[bank.origin])))
            question = Question("Which tissue is this?", WORDS[kind], (), "name")
            return Example(fill(bank, np.full(n, kind), rng), torch.arange(n), n, (question,), (kind,) * n)
        possible = list_families(bank.origin)
        planned = str(rng.choice(possible))
        facts = plan_facts(bank.origin, planned, rng)
        # As many needles as a long slide has, so that a short bag looks like what a good selection of one would keep.
        kinds = lay_out(facts, n, (max(1, min(4, n // 8)), max(1, min(12, n // 4))), rng)
        others = list_other_kinds(bank) if self.other_tissue else []
        if others and rng.random() < self.other_tissue:
            added = rng.choice(others, rng.integers(1, min(MOST_OTHERS, len(others)) + 1), replace=False)
            kinds = add_other_tissue(bank.origin, kinds, added.tolist(), (1, max(1, n // 20)), rng)
        num_patches = int(np.exp(rng.uniform(np.log(n), np.log(max(max_index, n)))))
        indices = np.sort(rng.choice(num_patches, n, replace=False))
        if self.stage == 1:
            questions = [write_caption(facts)]
        else:
            # Carcinoma is in half of the slides only where diagnosis was planned; elsewhere "no" would be the safe bet.
            families = [family for family in possible if family != "diagnosis" or planned == "diagnosis"]
            drawn = [ask(facts, str(family), rng) for family in rng.permutation(families * 2)]
            most = max(1, self.questions_per_bag - 1)  # a caption comes last, where there is room for one
            questions = [_vary(question, rng) for question in drawn if question is not None][:most]
            questions = [*questions, write_caption(facts)][: self.questions_per_bag]
        return Example(fill(bank, kinds, rng), torch.from_numpy(indices), num_patches, tuple(questions), tuple(kinds))


def _vary(question: Question, rng: np.random.Generator) -> Question:
    """Sometimes the open form of a question: the same words without options, where only one answer is right."""
    open_form = question.family in ("dominant", "diagnosis") and rng.random() < 0.3
    return Question(question.question, question.answer, () if open_form else question.options, question.family)
