"""Slides with features in files: found by the names that files of questions give them, and trained on.

N patches.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sparsewsi.bags.bag import FEATURE_SUFFIXES, Bag, check_bag, join, save_bag
from sparsewsi.bags.foreign import load_bag
from sparsewsi.files import as_path, walk
from sparsewsi.slides.find import IMAGE_SUFFIXES, SLIDE_SUFFIXES
from train.data.example import Example, Question, Record

_ALL_ENDINGS = (*FEATURE_SUFFIXES, *SLIDE_SUFFIXES, *IMAGE_SUFFIXES)
_TCGA = re.compile(r"(TCGA-\w{2}-\w{4})(-\w+)*")  # a case, and a slide of it; a UUID may follow after a dot


def slide_name(file: str) -> str:
    """The name of a slide or feature file without folder and endings: x/12.jpg.h5 -> 12."""
    name = re.split(r"[\\/]", str(as_path(file)))[-1] if file.strip() else ""
    while ending := next((end for end in _ALL_ENDINGS if name.lower().endswith(end)), ""):
        name = name[: -len(ending)]
    return name


def barcode_of(name: str) -> str:
    """A TCGA slide's name without the UUID behind its barcode; any other name as it is."""
    barcode = _TCGA.match(name)
    return barcode[0] if barcode else name


class FeatureFolder:
    """The feature files under a folder, found by the names that files of questions give to slides.

    A name is that of the file without its endings. TCGA slides are found with and without the UUID after their barcode,
    and a TCGA case (TCGA-AR-A1AI) stands for all its slides.
    """

    def __init__(self, folder: str | Path):
        self.folder = as_path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is not a folder. Pass the folder that holds the slides' feature files.")
        self._files: dict[str, dict[str, list[Path]]] = {}  # name, barcode or case -> name -> files
        for path in sorted(where / name for where, names in walk(self.folder) for name in names):
            if path.suffix.lower() in FEATURE_SUFFIXES and not path.name.startswith("."):
                name = slide_name(path.name)
                barcode = _TCGA.match(name)
                for key in {name, *((barcode[0], barcode[1]) if barcode else ())}:
                    self._files.setdefault(key, {}).setdefault(name, []).append(path)

    def find(self, slide: str) -> list[Path]:
        """The feature file of a slide; of a case, one file for each of its slides; empty where there is none.

        Raises ValueError where two files could be meant.
        """
        barcode = _TCGA.match(slide)
        found = self._files.get(slide) or self._files.get(barcode[0] if barcode else slide, {})
        if slide in found:
            found = {slide: found[slide]}
        files = []
        for paths in found.values():
            best = min(FEATURE_SUFFIXES.index(path.suffix.lower()) for path in paths)
            files += [path for path in paths if FEATURE_SUFFIXES.index(path.suffix.lower()) == best]
        is_case = barcode is not None and barcode[1] == slide
        if len(files) > len(found) or (len(files) > 1 and not is_case):
            names = ", ".join(str(path.relative_to(self.folder)) for path in files[:3])
            raise ValueError(f"several feature files could be slide {slide}: {names}. Pass a folder that holds one.")
        return files

    def convert_csv(self, slides: Iterable[str]) -> None:
        """Write a safetensors file beside the CSV file of each slide, once: it is read in a hundredth of the time.

        A folder that cannot be written to stays as it is. Raises ValueError for a CSV file that cannot be read.
        """
        slow = sorted({file for slide in slides for file in self.find(slide) if file.suffix.lower() == ".csv"})
        for file in tqdm(slow, desc="CSV features to safetensors", disable=None if slow else True):
            target = file.with_suffix(".safetensors")
            try:
                save_bag(load_bag(file), target)
            except OSError:
                return
            for paths in (paths for named in self._files.values() for paths in named.values() if file in paths):
                paths.append(target)

    def load(self, slides: Sequence[str]) -> Bag:
        """The bag of a slide, or of several as one, in any format of load_bag.

        Raises ValueError for a slide without features, and for a file that cannot be read.
        """
        bags = []
        for slide in slides:
            files = self.find(slide)
            if not files:
                raise ValueError(f"no feature file for slide {slide} under {self.folder}. Extract its features.")
            bags += [load_bag(file) for file in files]
        return join(bags)


def evenly(n: int, most: int | None) -> Tensor:
    """Rows of n that are kept when at most `most` may be: evenly spaced, first and last among them (as SlideChat)."""
    if most is None or n <= most:
        return torch.arange(n)
    return torch.from_numpy(np.linspace(0, n - 1, most).astype(np.int64))


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order (n,) in which an epoch visits n examples; depends on its arguments alone."""
    return np.random.default_rng((seed, epoch)).permutation(n)


class SlideVQADataset:
    """Epoch after epoch of questions about slides; only the bag that is asked for is read.

    Consecutive questions about the same slides share an example, `questions_per_bag` at most. All bags must be of the
    encoder and dimension of the first one. Raises ValueError for no records, and for bags that cannot be trained on.
    """

    def __init__(self, records: Sequence[Record], features: FeatureFolder, seed: int = 0, questions_per_bag: int = 4):
        if not records:
            raise ValueError("there is no question to train on. python -m train.data.questions check FILE says why.")
        by_slides: dict[tuple[str, ...], list[Question]] = {}
        for record in records:
            by_slides.setdefault(record.slides, []).append(record.question)
        self.groups = [
            (slides, tuple(questions[start : start + questions_per_bag]))
            for slides, questions in by_slides.items()
            for start in range(0, len(questions), questions_per_bag)
        ]
        self.features, self.seed = features, seed
        first = features.load(self.groups[0][0])
        self.encoder, self.feature_dim = first.encoder, first.features.shape[1]

    def __len__(self) -> int:
        """Examples of one epoch."""
        return len(self.groups)

    def example(self, index: int, n: int) -> Example:
        """Example number `index` of the endless sequence, with at most n patches, evenly spaced over the slide's."""
        epoch, place = divmod(index, len(self))
        slides, questions = self.groups[epoch_order(len(self), self.seed, epoch)[place]]
        bag = self.features.load(slides)
        if not len(bag.features):
            raise ValueError(f"slide {', '.join(slides)} has no patches. Leave its questions out.")
        try:
            check_bag(bag, self.encoder, self.feature_dim)
        except ValueError as error:
            raise ValueError(f"The features of {', '.join(slides)}: {error}") from error
        rows = evenly(len(bag.features), n)
        return Example(bag.features[rows], rows, len(bag.features), questions)
