"""What is asked: questions of files, on mosaics and on whole phantom slides, each with its bag.

N patches.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsewsi.bags.bag import Bag, check_bag
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.selection import Selection
from train.data.bank import load_bank
from train.data.example import Question, Record
from train.data.kinds import FAMILIES, Facts, ask
from train.data.phantoms import load_phantom, write_phantoms
from train.data.slides import FeatureFolder, evenly
from train.data.stream import ask_in_turn


@dataclass(frozen=True)
class Item:
    """One test question: a bag, the kinds of its patches, and what was asked."""

    bag: Bag  # without patches where the slide has no usable features
    kinds: np.ndarray  # (N,) str; (0,) where they are not known
    question: Question
    slide: str = ""  # as the file of questions names it; "": bag.slide
    detail: str = ""
    missing: str = ""  # why there are no features
    rows: Tensor | None = None  # (N,) ascending: the bag's patches among all num_patches; None: they are all there are
    num_patches: int = 0

    def place(self, selection: Selection) -> Selection:
        """A selection from the bag, with indices among all patches of the slide, as in training."""
        if self.rows is None or not len(selection.indices):
            return selection
        return replace(selection, indices=self.rows[selection.indices], num_patches=self.num_patches)


def read_items(
    records: Sequence[Record],
    features: FeatureFolder,
    config: SparseWSIConfig,
    max_patches: int | None = None,
    progress: Callable[[str], object] = print,
) -> Iterator[Item]:
    """Questions of a file about slides whose features lie in a folder; a slide at a time is in memory.

    Slides whose features are missing, broken or not the model's become items without patches; each is named once.
    """
    said: set[str] = set()
    loaded: tuple[str, ...] = ()
    bag, missing, rows, num_patches = None, "", None, 0
    for record in records:
        name = " + ".join(record.slides)
        if bag is None or record.slides != loaded:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # positions that a file does not hold
                    whole = features.load(record.slides)
                check_bag(whole, config.encoder, config.feature_dim)
                rows = evenly(len(whole.features), max_patches)
                bag = replace(whole, features=whole.features[rows], coords=whole.coords[rows])
                num_patches = len(whole.features)
                missing = "" if len(rows) else "it has no patches"
            except ValueError as error:
                empty = torch.empty(0, config.feature_dim).half()
                bag = Bag(empty, torch.empty(0, 2).int(), 1, None, config.encoder, name)
                missing, rows = str(error), None
            loaded = record.slides
        if missing and name not in said:
            said.add(name)
            progress(f"{name} counts as missing: {missing}")
        yield Item(bag, np.empty(0, str), record.question, name, record.detail, missing, rows, num_patches)


def make_mosaic_items(
    bank_file: Path, split: str, questions: int, n: int, seed: int, per_needle: tuple[int, int] = (4, 12)
) -> Iterator[Item]:
    """Balanced questions on mosaics of one split of a bank, one mosaic each; per_needle: patches of a focus."""
    asked = ask_in_turn(load_bank(bank_file, split), questions, n, seed, per_needle)
    for number, (bag, kinds, question) in enumerate(asked):
        named = f"mosaic {number} of {n} patches, seed {seed}"
        yield Item(Bag(bag.features, bag.coords, bag.patch_size, bag.mpp, bag.encoder, named), kinds, question)


def make_phantom_items(
    folder: Path, seeds: range, size: int, per_slide: int, encoder: str, progress: Callable[[str], None] = print
) -> Iterator[Item]:
    """Questions on whole phantom slides, written, opened and encoded as any slide is; bags are cached in folder.

    encoder: the name of the one that the model takes the features of

    Families come in random order. There are fewer facts than questions: a slide is asked some of them again, with the
    options in another order or with others.
    """
    for seed in seeds:
        write_phantoms(folder, [seed], encoder, size, progress)
        phantom = load_phantom(folder, seed)
        bag, kinds = phantom.bag, phantom.kinds
        facts = Facts("phantom", phantom.dominant, phantom.present)
        rng = np.random.default_rng((seed, 1))
        asked = 0
        for family in rng.permutation(FAMILIES * per_slide):
            question = ask(facts, str(family), rng)
            if question is not None and asked < per_slide:
                asked += 1
                yield Item(bag, kinds, question)
