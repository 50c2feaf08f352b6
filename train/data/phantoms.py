"""Whole phantom slides as bags: written, opened and encoded as any slide is.

    python -m train.data.phantoms --split train --count 24 --out runs/phantoms

A bag of single labelled patches is not a slide: there foci are small, and most of their patches lie on a border. The
folder gets a feature file and the truth of every phantom; those that are there are left alone.

N patches, D feature dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sparsewsi.bags.bag import Bag, save_bag
from sparsewsi.bags.efficientnet import HE
from sparsewsi.bags.extract import extract_bag
from sparsewsi.bags.foreign import load_bag
from sparsewsi.phantom import load_truth, write_phantom
from train.data.bank import list_phantom_seeds
from train.data.example import Example, Question
from train.data.kinds import Facts, ask, write_caption
from train.data.tumours import ask_tumours
from train.flags import add_flag, make_parser, run_command

SIZE = 10_000  # px of a side
LEFT_OUT = 0.25  # how often each kind of focus but carcinoma is left out of a training bag
DESCRIBED = 0.25  # share of the bags that are to be described


@dataclass(frozen=True, eq=False)
class Phantom:
    """The bag of a phantom and what is true of it."""

    bag: Bag
    kinds: np.ndarray  # (N,) str
    dominant: str
    present: tuple[str, ...]  # kinds of its foci
    near: dict[str, np.ndarray]  # of each of these (N,) bool, the patches that reach into the box of such a focus


def write_phantoms(
    folder: Path, seeds: Sequence[int], encoder: str, size: int = SIZE, progress: Callable[[str], object] = print
) -> None:
    """Write the feature file and the truth of each seed's phantom into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        slide, cached = phantom_files(folder, seed)
        if not cached.exists():
            write_phantom(slide, seed=seed, size=size)
            save_bag(extract_bag(slide, encoder), cached)
            slide.unlink()  # the truth stays beside it, and the features are all that is asked about
            progress(f"phantom {seed}: {len(load_bag(cached).features)} patches")


def phantom_files(folder: Path, seed: int) -> tuple[Path, Path]:
    """Where a phantom is written and where its features lie."""
    return folder / f"phantom-{seed}.tiff", folder / f"phantom-{seed}.safetensors"


def load_phantom(folder: Path, seed: int) -> Phantom:
    """A phantom that write_phantoms wrote."""
    slide, cached = phantom_files(folder, seed)
    bag, truth = load_bag(cached), load_truth(slide)
    low = bag.coords.numpy()
    high = low + bag.patch_size
    near = {kind: np.zeros(len(low), bool) for kind in truth.present}
    for focus in truth.needles:
        box = np.array([[focus.x, focus.y], [focus.x + focus.w, focus.y + focus.h]])
        near[focus.kind] |= (low < box[1]).all(1) & (high > box[0]).all(1)
    kinds = np.asarray(truth.label_at(low, bag.patch_size))
    return Phantom(bag, kinds, truth.dominant, tuple(truth.present), near)


def load_phantoms(folder: Path, split: str) -> tuple[Phantom, ...]:
    """The phantoms of a split that lie in a folder. Raises ValueError if there is none."""
    written = {int(file.stem.split("-")[1]) for file in folder.glob("phantom-*.safetensors")}
    seeds = sorted(written & set(list_phantom_seeds(split, 1000)))
    if not seeds:
        raise ValueError(f"{folder} holds no phantom of split {split!r}. Write some: python -m train.data.phantoms.")
    return tuple(load_phantom(folder, seed) for seed in seeds)


@dataclass(frozen=True)
class PhantomStream:
    """An endless, seeded stream of bags of whole phantoms: example(i) depends on (seed, i) and on nothing else.

    Half of the bags hold carcinoma: where they are not to, a phantom is shown without the patches around it. Foci of
    other kinds are left out now and then, and of the background any part.
    """

    phantoms: tuple[Phantom, ...]
    seed: int
    questions_per_bag: int = 3

    def example(self, index: int, n: int) -> Example:
        """Example number `index`: a phantom's foci and at most n patches in all."""
        rng = np.random.default_rng((self.seed, 29, index))
        phantom, rows, facts = self.draw(n, rng)
        features, kinds = phantom.bag.features[torch.from_numpy(rows)], tuple(phantom.kinds[rows].tolist())
        questions = tuple(self.questions(facts, rng))
        return Example(features, torch.from_numpy(rows), len(phantom.kinds), questions, kinds)

    def draw(self, n: int, rng: np.random.Generator) -> tuple[Phantom, np.ndarray, Facts]:
        """A phantom, the rows (at most n, ascending) of it that are shown, and what is true of these."""
        wanted = bool(rng.integers(2))
        pool = [phantom for phantom in self.phantoms if "carcinoma" in phantom.present or not wanted]
        phantom = pool[int(rng.integers(len(pool)))]
        kept = [kind for kind in phantom.present if (wanted if kind == "carcinoma" else rng.random() >= LEFT_OUT)]
        gone = [phantom.near[kind] for kind in phantom.present if kind not in kept]
        shown = ~np.any(gone, 0) if gone else np.ones(len(phantom.kinds), bool)
        # Foci may lie near one another: of one that was cut, at least half is to be left for it to count as there.
        focus = shown & np.any([phantom.near[kind] for kind in kept], 0) if kept else np.zeros(len(shown), bool)
        there = [k for k in kept if (shown & (phantom.kinds == k)).sum() >= max(1, (phantom.kinds == k).sum() / 2)]
        rest = np.flatnonzero(shown & ~focus)
        count = min(len(rest), max(1, n - int(focus.sum())), round(len(rest) * rng.uniform(0.3, 1)))
        rows = np.sort(np.concatenate([np.flatnonzero(focus), rng.choice(rest, count, replace=False)]))
        return phantom, rows, Facts("phantom", phantom.dominant, tuple(sorted(there)))

    def questions(self, facts: Facts, rng: np.random.Generator) -> list[Question]:
        """Some of the questions about a phantom, tumours first half of the time."""
        found = [*rng.permutation(np.array(ask_tumours(facts.present, rng), object))][:2]
        drawn = [ask(facts, str(family), rng) for family in rng.permutation(["present", "absent", "contains"] * 2)]
        other = [question for question in drawn if question is not None and "carcinoma?" not in question.question]
        asked = [*found, *other] if rng.random() < 0.5 else [*found[:1], *other, *found[1:]]
        asked = list(dict.fromkeys(asked))[: self.questions_per_bag]
        if rng.random() < DESCRIBED:
            asked[-1:] = [write_caption(facts)]
        return asked


def main() -> None:
    parser = make_parser(__doc__)
    add_flag(parser, "--split", default="train")
    parser.add_argument("--count", type=int, default=24, help="how many")
    parser.add_argument("--encoder", default=HE)
    parser.add_argument("--size", type=int, default=SIZE, help="side of a slide in px")
    add_flag(parser, "--out", help="folder")
    given = parser.parse_args()
    write_phantoms(given.out, list_phantom_seeds(given.split, given.count), given.encoder, given.size)


if __name__ == "__main__":
    run_command(main)
