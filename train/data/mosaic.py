"""Labelled patches -> bags and slides with known ground truth, and the questions one can ask of them.

A mosaic is a slide put together from labelled patches: contiguous regions of background tissue, and a few compact foci
("needles") of other kinds. Which patch is which is known, so needle recall, evidence and answers can be checked.

    python -m train.data.mosaic bank --tiles ../shared/data/tiles --out runs/bank.safetensors
    python -m train.data.mosaic bank --classes NCT-CRC-HE-100K --out runs/nct.safetensors
    python -m train.data.mosaic slides --tiles ../shared/data/tiles --slides 4 --n 4096 --out mosaics

`--tiles` is split by slide, as train/data/mosaic_split.json says. `--classes` takes any folder that has a folder of
images for each class, as Kather 2016 and NCT-CRC-HE-100K do. From which slide or patient an image is, is not known
there: it is split by file, so that patches of one patient lie in train and test alike: accuracies come out too high.

`slides` writes mosaics as pyramidal TIFF slides with <slide>.mosaic.json beside each and one questions.jsonl, which
sparsewsi.cohort.extract, train.data.questions and train.evaluate take as they take real slides and questions.

N patches, D feature dim, M patches in the bank. Kinds are tissue labels; one vocabulary for real tiles and phantoms.
"""

import argparse
import csv
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparsewsi import phantom
from sparsewsi.bags.bag import Bag
from train.command import run_command, write_whole
from train.data.packing import Example, Question

SPLIT_FILE = Path(__file__).with_name("mosaic_split.json")
WORDS = phantom.WORDS | {
    "gastric_mucosa": "gastric mucosa",
    "pancreas_acinar": "pancreas",
    "small_bowel_mucosa": "small bowel mucosa",
    "liver_parenchyma": "liver",
}
# Needle kinds live on two sources or more, so that a slide's stain never answers a question.
NEEDLES = {
    "real": (
        "carcinoma",
        "lymphoid",
        "mucin",
        "blood",
        "gastric_mucosa",
        "pancreas_acinar",
        "small_bowel_mucosa",
        "liver_parenchyma",
    ),
    "phantom": phantom.NEEDLES,
}
NEEDLE_KINDS = sorted({kind for kinds in NEEDLES.values() for kind in kinds})
# Real colon mucosa is neither: among the kinds asked for it has look-alikes, as background it would hide them.
BACKGROUNDS = {
    "real": ("stroma_fibrous", "smooth_muscle", "adipose"),
    "phantom": phantom.BACKGROUNDS,
}
CRC_LABELS = {
    "TUM": "carcinoma",
    "STR": "stroma_fibrous",
    "LYM": "lymphoid",
    "MUC": "mucin",
    "MUS": "smooth_muscle",
    "NORM": "normal_mucosa_colon",
    "ADI": "adipose",
    "BACK": "background",
}
# Folders of Kather 2016 and NCT-CRC-HE-100K. Debris may be necrosis, blood or mucus; complex stroma is left out. Their
# mucosa is asked for: what looks like it, mucosa of other organs, is not among them.
CLASSES = {
    **CRC_LABELS,
    "DEB": "debris",
    "NORM": "colon_mucosa",
    "01_TUMOR": "carcinoma",
    "02_STROMA": "stroma_fibrous",
    "03_COMPLEX": None,
    "04_LYMPHO": "lymphoid",
    "05_DEBRIS": "debris",
    "06_MUCOSA": "colon_mucosa",
    "07_ADIPOSE": "adipose",
    "08_EMPTY": "background",
}
IMAGES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
MOST_OTHERS = 4  # kinds of other tissue in a mosaic
FAMILIES = ("present", "absent", "dominant", "contains", "diagnosis")


@dataclass(frozen=True)
class Bank:
    """Features of labelled patches, grouped by kind, for one origin ("real" or "phantom") and one split."""

    features: torch.Tensor  # (M, D) float16
    kinds: np.ndarray  # (M,) str
    sources: np.ndarray  # (M,) str, the slide (or the cohort where slides are unknown) a patch came from
    origin: str  # key of NEEDLES
    encoder: str

    def rows(self, kind: str) -> np.ndarray:
        """Indices of one kind's patches."""
        return np.flatnonzero(self.kinds == kind)


@dataclass(frozen=True)
class Facts:
    """What is true of a mosaic or a phantom: enough to ask and to answer every question family."""

    origin: str  # key of NEEDLES
    dominant: str
    present: tuple[str, ...]  # needle kinds


@dataclass(frozen=True)
class Vocabulary:
    """The kinds of a folder of classes and the words for them."""

    origin: str
    needles: dict[str, str]  # kind -> word
    backgrounds: dict[str, str]

    def register(self) -> None:
        """Make the origin known to everything that plans and asks. Raises ValueError if it means something else."""
        for known, kinds in ((NEEDLES, tuple(self.needles)), (BACKGROUNDS, tuple(self.backgrounds))):
            if known.setdefault(self.origin, kinds) != kinds:
                raise ValueError(
                    f"two sets of classes are called {self.origin!r} but differ: {', '.join(known[self.origin])} and "
                    f"{', '.join(kinds)}. Rename one folder and write its bank again."
                )
        WORDS.update({kind: word for kind, word in (self.needles | self.backgrounds).items() if kind not in WORDS})
        NEEDLE_KINDS.extend(kind for kind in self.needles if kind not in NEEDLE_KINDS)


# --------------------------------------------------------------------------------------------------- questions


def families_of(origin: str) -> tuple[str, ...]:
    """The families of questions that an origin's kinds allow: diagnosis asks for carcinoma."""
    return tuple(family for family in FAMILIES if family != "diagnosis" or "carcinoma" in NEEDLES[origin])


def _article_free(kinds: list[str]) -> str:
    names = sorted(WORDS[kind] for kind in kinds)
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def caption(facts: Facts) -> Question:
    """The stage-1 pair: a request to describe the slide and its description.

    It names the foci alone: K patches do not tell which background tissue most of the other N - K are.
    """
    foci = f"Foci of {_article_free(list(facts.present))}." if facts.present else "No foci."
    return Question("Describe this slide.", foci, (), "caption")


def ask(facts: Facts, family: str, rng: np.random.Generator) -> Question | None:
    """One question of a family about the facts, or None where the family does not apply.

    Options are drawn and shuffled so that no option is likelier than another without the slide:
    the answer is uniform over what is true, the distractors uniform over what is false, and `plan` balances yes and no.
    """
    absent = [kind for kind in NEEDLES[facts.origin] if kind not in facts.present]
    if family == "present" and facts.present:
        answer = str(rng.choice(facts.present))
        options = [answer, *rng.choice(absent, 3, replace=False)] if len(absent) >= 3 else [answer, *absent]
        text = "Which of these tissues is present in this slide?"
    elif family == "absent" and len(facts.present) >= 2 and absent:
        answer = str(rng.choice(absent))
        options = [answer, *rng.permutation(facts.present)[:3]]
        text = "Which of these tissues is absent from this slide?"
    elif family == "dominant":
        answer, options = facts.dominant, list(BACKGROUNDS[facts.origin])
        text = "Which tissue makes up most of this slide?"
    elif family in ("contains", "diagnosis"):
        pool = facts.present if rng.integers(2) else absent
        kind = "carcinoma" if family == "diagnosis" else str(rng.choice(pool)) if pool else None
        if kind is None:
            return None
        yes = kind in facts.present
        return Question(f"Does this slide contain {WORDS[kind]}?", "Yes" if yes else "No", ("Yes", "No"), family)
    else:
        return None
    shuffled = tuple(WORDS[str(kind)] for kind in rng.permutation(options))
    return Question(text, WORDS[answer], shuffled, family)


def plan(origin: str, family: str, rng: np.random.Generator) -> Facts:
    """Facts of a slide about which a question of this family can be asked, every answer equally likely."""
    needles = NEEDLES[origin]
    count = int(rng.integers(2, 4)) if family == "absent" else int(rng.integers(1, 4))
    if family == "diagnosis":  # carcinoma in half of them, whatever else is there
        others = [kind for kind in needles if kind != "carcinoma"]
        yes = bool(rng.integers(2))
        present = ["carcinoma"] * yes + list(rng.choice(others, count - yes, replace=False))
    else:
        present = list(rng.choice(needles, count, replace=False))
    return Facts(origin, str(rng.choice(BACKGROUNDS[origin])), tuple(sorted(str(kind) for kind in present)))


# ----------------------------------------------------------------------------------------------------- mosaics

LEAST_PATCHES = 64  # of a mosaic that is asked about: in smaller ones foci may outgrow the tissue that should dominate


def mosaic_size(text: str) -> int:
    """N of a mosaic from the command line. Raises argparse.ArgumentTypeError for less than LEAST_PATCHES."""
    if not text.isdecimal() or int(text) < LEAST_PATCHES:
        raise argparse.ArgumentTypeError(f"a mosaic has {LEAST_PATCHES} patches or more, got {text}")
    return int(text)


def lay_out(facts: Facts, n: int, per_needle: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Kinds of n patches on a near-square raster: regions of background tissue, then one compact focus per needle kind.

    The dominant kind is the commonest from LEAST_PATCHES on (in 4,000 of 4,000), and covers more than half of 225
    patches or more. per_needle: least and most patches of a focus, of 12 at most for that. Returns (n,) str in raster
    order.
    """
    side = int(np.ceil(np.sqrt(n)))
    yx = np.stack(np.divmod(np.arange(n), side), 1).astype(np.float32)  # (n, 2)
    others = [kind for kind in BACKGROUNDS[facts.origin] if kind != facts.dominant]
    width = max(24, *map(len, (*others, *facts.present, facts.dominant)))
    kinds = np.full(n, facts.dominant, dtype=f"<U{width}")
    left = int(n * rng.uniform(0.1, 0.45))  # what other background kinds may cover together
    for kind in rng.permutation(others)[: rng.integers(1, 3)]:
        cover = left // 2 if left > 4 else left
        wobble = rng.normal(0, 0.15 * side, n)  # a ragged border
        near = np.argsort(np.hypot(*(yx - rng.uniform(0, side, 2)).T) + wobble)[:cover]
        kinds[near] = kind
        left -= cover
    free = np.ones(n, bool)
    for kind in facts.present:
        size = int(rng.integers(per_needle[0], per_needle[1] + 1))
        far = np.hypot(*(yx - yx[rng.choice(np.flatnonzero(free))]).T) + np.where(free, rng.uniform(0, 1, n), 1e6)
        focus = np.argsort(far)[:size]
        kinds[focus], free[focus] = kind, False
    return kinds


def other_kinds(bank: Bank) -> list[str]:
    """Kinds that are neither asked about nor background: real slides hold such tissue, too."""
    return sorted(set(map(str, bank.kinds)) - {*NEEDLES[bank.origin], *BACKGROUNDS[bank.origin]})


def with_other_tissue(
    origin: str, kinds: np.ndarray, added: Sequence[str], size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """The layout (n,) with a ragged region of each added kind in place of background, of size[0] to size[1] patches."""
    side = int(np.ceil(np.sqrt(len(kinds))))
    yx = np.stack(np.divmod(np.arange(len(kinds)), side), 1)  # (n, 2)
    kinds = kinds.astype(f"<U{max(map(len, (*added, *map(str, np.unique(kinds)))))}")
    for kind in added:
        distance = np.hypot(*(yx - rng.uniform(0, side, 2)).T) + rng.normal(0, 0.1 * side, len(kinds))
        free = np.flatnonzero(np.isin(kinds, BACKGROUNDS[origin]))
        kinds[free[distance[free].argsort()][: rng.integers(size[0], size[1] + 1)]] = kind
    return kinds


def draw(kinds: np.ndarray, held: np.ndarray, sources: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows (n,) of held (M,) for a layout (n,): each kind's from one source where that source has it.

    Raises ValueError for a kind that nothing held is of.
    """
    rows = np.empty(len(kinds), np.int64)
    for kind in np.unique(kinds):
        pool = np.flatnonzero(held == kind)
        if len(pool) == 0:
            raise ValueError(f"there is no patch of kind {str(kind)!r}; leave the kind out or add such tiles")
        source = rng.choice(np.unique(sources[pool]))
        pool = pool[sources[pool] == source]
        want = int((kinds == kind).sum())
        rows[kinds == kind] = rng.choice(pool, want, replace=want > len(pool))
    return rows


def fill(bank: Bank, kinds: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Features (n, D) for a layout."""
    return bank.features[torch.from_numpy(draw(kinds, bank.kinds, bank.sources, rng))]


def bag_of(bank: Bank, rows: np.ndarray, name: str = "mosaic") -> Bag:
    """A Bag of the bank's rows (n,); patches lie on a square raster of 224 px at 0.5 um/px."""
    side = int(np.ceil(np.sqrt(len(rows))))
    row, column = np.divmod(np.arange(len(rows)), side)
    coords = torch.from_numpy(np.stack([column, row], 1).astype(np.int32) * 224)
    return Bag(bank.features[torch.from_numpy(rows)], coords, 224, 0.5, bank.encoder, name)


def make_bag(bank: Bank, kinds: np.ndarray, rng: np.random.Generator, name: str = "mosaic") -> Bag:
    """A Bag of a layout."""
    return bag_of(bank, draw(kinds, bank.kinds, bank.sources, rng), name)


def balanced_set(
    bank: Bank, n_questions: int, n: int, seed: int, per_needle: tuple[int, int] = (4, 12)
) -> Iterator[tuple[Bag, np.ndarray, Question]]:
    """Balanced test questions, one mosaic each: families in turn, answers uniform within a family."""
    families = families_of(bank.origin)
    for i in range(n_questions):
        rng = np.random.default_rng((seed, i))
        family = families[i % len(families)]
        facts = plan(bank.origin, family, rng)
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
        possible = families_of(bank.origin)
        planned = str(rng.choice(possible))
        facts = plan(bank.origin, planned, rng)
        # As many needles as a long slide has, so that a short bag looks like what a good selection of one would keep.
        kinds = lay_out(facts, n, (max(1, min(4, n // 8)), max(1, min(12, n // 4))), rng)
        others = other_kinds(bank) if self.other_tissue else []
        if others and rng.random() < self.other_tissue:
            added = rng.choice(others, rng.integers(1, min(MOST_OTHERS, len(others)) + 1), replace=False)
            kinds = with_other_tissue(bank.origin, kinds, added.tolist(), (1, max(1, n // 20)), rng)
        num_patches = int(np.exp(rng.uniform(np.log(n), np.log(max(max_index, n)))))
        indices = np.sort(rng.choice(num_patches, n, replace=False))
        if self.stage == 1:
            questions = [caption(facts)]
        else:
            # Carcinoma is in half of the slides only where diagnosis was planned; elsewhere "no" would be the safe bet.
            families = [family for family in possible if family != "diagnosis" or planned == "diagnosis"]
            drawn = [ask(facts, str(family), rng) for family in rng.permutation(families * 2)]
            most = max(1, self.questions_per_bag - 1)  # a caption comes last, where there is room for one
            questions = [_vary(question, rng) for question in drawn if question is not None][:most]
            questions = [*questions, caption(facts)][: self.questions_per_bag]
        return Example(fill(bank, kinds, rng), torch.from_numpy(indices), num_patches, tuple(questions), tuple(kinds))


def _vary(question: Question, rng: np.random.Generator) -> Question:
    """Sometimes the open form of a question: the same words without options, where only one answer is right."""
    open_form = question.family in ("dominant", "diagnosis") and rng.random() < 0.3
    return Question(question.question, question.answer, () if open_form else question.options, question.family)


# ----------------------------------------------------------------------------------------------- labelled tiles


@dataclass(frozen=True)
class Tile:
    """A labelled image. source: the slide it is from, or what stands for it where that is not told."""

    file: Path
    kind: str
    source: str
    split: str


def labelled_tiles(folder: Path) -> list[Tile]:
    """Every usable tile under folder/atlas and folder/crc_tissue.

    Sources are slides; in crc_tissue, where slides are not told, the data set a tile came from stands for them.
    """
    split = json.loads(SPLIT_FILE.read_text())
    tiles = []
    with (folder / "atlas" / "labels.csv").open() as file:
        for row in csv.DictReader(file):
            path = folder / "atlas" / row["file"]
            if row["slide"] not in split["atlas"]:
                raise ValueError(f"{row['slide']} of {file.name} is in no split: {SPLIT_FILE.name} does not name it.")
            tiles.append(Tile(path, row["label"], row["slide"], split["atlas"][row["slide"]]))
    for path in sorted((folder / "crc_tissue").glob("*/*")):
        source = path.name.split("__")[0]
        if path.parent.name in CRC_LABELS:
            kind = CRC_LABELS[path.parent.name]
            tiles.append(Tile(path, kind, f"crc-{source}", split["crc_tissue"][source]))
    return tiles


def split_of(name: str, seed: int = 0) -> str:
    """train, val or test (70, 15, 15 %) for a file; depends on its name and the seed alone, not on other files."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if place < 0.7 else "val" if place < 0.85 else "test"


def class_tiles(
    folder: Path, labels: Mapping[str, Any] | None = None, most: int | None = None, seed: int = 0
) -> tuple[list[Tile], Vocabulary]:
    """The images of a folder that has a folder for each class, and what the classes are called.

    labels: class folder -> kind, None to leave it out, or {"kind": ..., "word": ..., "role": "needle" or "background"}
            for a kind that is not known here; default CLASSES
    most:   images of a class at most, drawn by the seed; it also draws the split, by file (see the module's docstring)
    Raises ValueError for class folders that have no label, and for fewer than 4 kinds of needles or 2 of background.
    """
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    labels = CLASSES if labels is None else labels
    unknown = [path.name for path in folders if path.name not in labels]
    if unknown or not folders:
        problem = f"folders without a label: {', '.join(unknown)}" if unknown else "it holds no folder of a class"
        raise ValueError(f"{folder}: {problem}. Say what each is with --labels map.json, null for what to leave out.")
    needles, backgrounds, tiles = {}, {}, []
    for path in folders:
        label = labels[path.name]
        if label is None:
            continue
        if isinstance(label, dict) and (wanting := {"kind", "word", "role"} - set(label)):
            raise ValueError(f"the label of {path.name} lacks {' and '.join(sorted(wanting))}.")
        kind = label["kind"] if isinstance(label, dict) else label
        word = label["word"] if isinstance(label, dict) else WORDS.get(kind, kind.replace("_", " "))
        role = label["role"] if isinstance(label, dict) else "background" if kind in BACKGROUNDS["real"] else "needle"
        if role not in ("needle", "background"):
            raise ValueError(f"the role of {path.name} is {role!r}; it must be needle or background.")
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES)
        if most is not None and len(files) > most:
            chosen = np.random.default_rng((seed, len(tiles))).choice(len(files), most, replace=False)
            files = [files[i] for i in np.sort(chosen)]
        tiles += [Tile(file, kind, folder.name, split_of(f"{path.name}/{file.name}", seed)) for file in files]
        if kind != "background":  # glass is nothing to ask for
            (needles if role == "needle" else backgrounds)[kind] = word
    if len(needles) < 4 or len(backgrounds) < 2:
        raise ValueError(
            f"{folder} has the needles {', '.join(needles) or 'none'} and the backgrounds "
            f"{', '.join(backgrounds) or 'none'}; questions need 4 kinds of needles and 2 of background, or more."
        )
    return tiles, Vocabulary(folder.name, needles, backgrounds)


def augment(image: Image.Image, rng: np.random.Generator, size: int = 224) -> np.ndarray:
    """A random square of the tile (60 to 100 % of its side: magnification differs), turned, blurred, restained.

    Restaining scales and shifts the optical densities of the red, green and blue channels (Beer-Lambert); now and then
    the hue goes altogether, so that a kind is not known by its slide's colour.
    Returns uint8 (size, size, 3).
    """
    side = int(min(image.size) * rng.uniform(0.6, 1.0))
    x, y = (int(rng.integers(0, full - side + 1)) for full in image.size)
    crop = image.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < 0.3:
        crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    pixels = np.rot90(np.asarray(crop, np.float32), int(rng.integers(4)))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    density = -np.log((pixels + 1) / 256)
    if rng.random() < 0.25:
        density = density.mean(-1, keepdims=True) * rng.uniform(0.6, 1.4, 3)
    density = density * np.exp(rng.normal(0, 0.35)) * np.exp(rng.normal(0, 0.2, 3)) + rng.normal(0, 0.03, 3)
    return np.clip(256 * np.exp(-density) - 1, 0, 255).astype(np.uint8)


def dihedral(image: Image.Image, size: int = 224) -> list[np.ndarray]:
    """The centre of a tile in its eight orientations, colours untouched: uint8 (size, size, 3) each.

    A smaller tile (Kather 2016 has 150 px) is enlarged, and its magnification with it.
    """
    if min(image.size) < size:
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    turns = [np.rot90(pixels, k) for k in range(4)]
    return [np.ascontiguousarray(view) for turn in turns for view in (turn, turn[:, ::-1])]


# -------------------------------------------------------------------------------------------- the feature bank


def tile_patches(tiles: Sequence[Tile], copies: int) -> Iterator[tuple[np.ndarray, str, str, str]]:
    """(pixels, kind, source, split): train tiles augmented `copies` times, val and test tiles in eight orientations."""
    for number, tile in enumerate(tiles):
        image = Image.open(tile.file).convert("RGB")
        rng = np.random.default_rng((0, number))
        views = [augment(image, rng) for _ in range(copies)] if tile.split == "train" else dihedral(image)
        yield from ((view, tile.kind, tile.source, tile.split) for view in views)


def phantom_seeds(split: str, count: int) -> range:
    """The first `count` seeds of a split's phantoms. Raises ValueError for more than the split has."""
    first, last = json.loads(SPLIT_FILE.read_text())["phantom"][split]
    if count > last + 1 - first:
        raise ValueError(f"the {split} split has {last + 1 - first} phantoms, {count} were asked for.")
    return range(first, first + count)


def phantom_patches(
    seeds: int, per_kind: int, splits: tuple[str, ...] = ("train", "val", "test")
) -> Iterator[tuple[np.ndarray, str, str, str]]:
    """(pixels, kind, source, split) from `seeds` phantoms of each split, `per_kind` patches of every kind of each."""
    for split in splits:
        for seed in phantom_seeds(split, seeds if split == "train" else max(4, seeds // 5)):
            for kind in phantom.KINDS:
                for pixels in phantom.patches(seed, kind, per_kind, mixed=0.4):
                    yield pixels, kind, f"phantom-{seed}", split


def write_bank(
    path: Path,
    patches: Iterator[tuple[np.ndarray, str, str, str]],
    encode: Callable[[np.ndarray], torch.Tensor],
    encoder: str,
    origin: str,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Encode patches and write features (M, D) fp16 with their kinds, sources and splits as one safetensors file.

    vocabulary: of an origin that is not known everywhere.
    """
    features, rows, batch = [], [], []

    def flush() -> None:
        if batch:
            features.append(encode(np.stack(batch)).half())
            batch.clear()

    for pixels, kind, source, split in patches:
        batch.append(pixels)
        rows.append((kind, source, split))
        if len(batch) == 64:
            flush()
        if len(rows) % 1024 == 0:
            print(f"{origin}: {len(rows)} patches", flush=True)
    flush()
    kinds, sources, splits = zip(*rows)
    metadata = {
        "kinds": json.dumps(kinds),
        "sources": json.dumps(sources),
        "splits": json.dumps(splits),
        "encoder": encoder,
        "origin": origin,
    }
    if vocabulary is not None:
        metadata["vocabulary"] = json.dumps(asdict(vocabulary))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    save_file({"features": torch.cat(features)}, temporary, metadata)
    temporary.replace(path)


AGAIN = "Write the bank again with python -m train.data.mosaic bank"


def load_bank(path: Path, split: str) -> Bank:
    """The part of a bank file that belongs to a split; its vocabulary, if it has its own, is registered.

    Raises ValueError if there is no patch of the split.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata, features = file.metadata(), file.get_tensor("features")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no feature bank, or a damaged one ({error}). {AGAIN}.") from error
    if not metadata or not {"splits", "kinds", "sources", "origin", "encoder"} <= set(metadata):
        raise ValueError(f"{path} is safetensors, but no feature bank. {AGAIN}.")
    keep = np.array(json.loads(metadata["splits"])) == split
    if not keep.any():
        raise ValueError(f"{path} holds no patch of split {split!r}. {AGAIN}.")
    if "vocabulary" in metadata:
        Vocabulary(**json.loads(metadata["vocabulary"])).register()
    kinds, sources = (np.array(json.loads(metadata[name]))[keep] for name in ("kinds", "sources"))
    return Bank(features[torch.from_numpy(keep)], kinds, sources, metadata["origin"], metadata["encoder"])


# ------------------------------------------------------------------------------------------------------ slides

SIDE = 224  # px of a patch, which is also a tile of the TIFF
MPP = 0.5
MARGIN = 2  # patches of glass around the tissue
GLASS = 244
SHRINK = 4  # between pyramid levels


def truth_path(slide: str | Path) -> Path:
    """Where the ground truth of a mosaic slide lies."""
    return Path(f"{slide}.mosaic.json")


def kinds_at(truth: Mapping[str, Any], coords: np.ndarray) -> np.ndarray:
    """The kinds (N,) of the patches of a mosaic slide, "background" beside the tissue.

    truth: what <slide>.mosaic.json says; coords: (N, 2) top-left corners in level-0 px, on the grid or not: a patch is
    called by the cell its centre lies in.
    """
    column, row = ((np.asarray(coords) + SIDE // 2) // SIDE - MARGIN).T
    place = row * truth["columns"] + column
    inside = (row >= 0) & (column >= 0) & (column < truth["columns"]) & (place < len(truth["kinds"]))
    return np.where(inside, np.array(truth["kinds"])[np.where(inside, place, 0)], "background")


def slide_truth(origin: str, kinds: np.ndarray, facts: Facts, about: dict[str, Any], rng: np.random.Generator) -> dict:
    """What <slide>.mosaic.json says: as a phantom's truth, and the kind of every patch and a question a family."""
    columns = int(np.ceil(np.sqrt(len(kinds))))
    row, column = np.divmod(np.arange(len(kinds)), columns)
    needles = []
    for kind in facts.present:
        x, y = ((np.stack([column, row])[:, kinds == kind] + MARGIN) * SIDE).astype(int)
        left, top = int(x.min()), int(y.min())
        size = (int(x.max()) + SIDE - left, int(y.max()) + SIDE - top)
        needles.append(phantom.Needle(kind, left, top, *size))
    asked = [question for family in families_of(origin) if (question := ask(facts, family, rng)) is not None]
    return {
        "sparsewsi_mosaic": about,
        "mpp": MPP,
        "patch_size": SIDE,
        "dominant": facts.dominant,
        "others": sorted({str(kind) for kind in kinds} & set(BACKGROUNDS[origin]) - {facts.dominant}),
        "present": list(facts.present),
        "needles": [asdict(needle) for needle in needles],
        "label_rule": "a patch of the grid is one labelled tile",
        "columns": columns,
        "first": [MARGIN * SIDE, MARGIN * SIDE],
        "kinds": kinds.tolist(),
        "questions": [asdict(question) for question in asked],
    }


def write_slide(
    path: Path, tiles: Sequence[Tile], origin: str, n: int, seed: int, per_needle: tuple[int, int] = (4, 12)
) -> dict:
    """Write a mosaic of n patches as a pyramidal tiled JPEG TIFF at 0.5 um/px, and its truth beside it.

    The tissue starts MARGIN patches from the corner, on the grid that patches are cut on. Written under temporary names
    and renamed, the truth first; memory holds a sixteenth of the pixels. The seed decides everything.
    Raises ValueError for a kind that the tiles lack. Returns the truth.
    """
    rng = np.random.default_rng((seed, 7))
    families = families_of(origin)
    facts = plan(origin, families[seed % len(families)], rng)
    kinds = lay_out(facts, n, per_needle, rng)
    rows = draw(kinds, np.array([tile.kind for tile in tiles]), np.array([tile.source for tile in tiles]), rng)
    turns = rng.integers(8, size=n)
    truth = slide_truth(origin, kinds, facts, {"seed": seed, "n": n, "split": tiles[0].split, "version": 1}, rng)
    files = [tiles[row].file for row in rows]

    def pixels(number: int) -> np.ndarray:
        return dihedral(Image.open(files[number]).convert("RGB"), SIDE)[turns[number]]

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        slide, record = Path(folder) / "slide.tiff", Path(folder) / "truth.json"
        _write_pyramid(slide, n, truth["columns"], pixels, {"sparsewsi_mosaic": truth["sparsewsi_mosaic"]})
        record.write_text(json.dumps(truth))
        os.replace(record, truth_path(path))
        os.replace(slide, path)
    return truth


def _write_pyramid(path: Path, n: int, columns: int, pixels: Callable[[int], np.ndarray], description: dict) -> None:
    """pixels(i): uint8 (SIDE, SIDE, 3) of patch i in raster order, asked for once each."""
    import tifffile

    wide, high = columns + 2 * MARGIN, -(-n // columns) + 2 * MARGIN
    small = SIDE // SHRINK
    level = np.full((high * small, wide * small, 3), GLASS, np.uint8)
    glass = np.full((SIDE, SIDE, 3), GLASS, np.uint8)

    def cells() -> Iterator[np.ndarray]:
        for row, column in np.ndindex(high, wide):
            number = (row - MARGIN) * columns + column - MARGIN
            if row < MARGIN or not MARGIN <= column < MARGIN + columns or number >= n:
                yield glass
                continue
            patch = pixels(number)
            y, x = row * small, column * small
            level[y : y + small, x : x + small] = _shrunk(patch)
            yield patch

    settings = {
        "dtype": np.uint8,
        "tile": (SIDE, SIDE),
        "photometric": "rgb",  # stored as YCbCr, because it is subsampled
        "subsampling": (2, 2),
        "compression": "jpeg",
        "compressionargs": {"level": 85},
        "metadata": None,
        "resolutionunit": "CENTIMETER",
    }
    per_cm = 1e4 / MPP
    with tifffile.TiffWriter(path, bigtiff=n > 20_000) as file:
        file.write(
            cells(),
            shape=(high * SIDE, wide * SIDE, 3),
            description=json.dumps(description),
            resolution=(per_cm, per_cm),
            software="sparsewsi mosaic",
            **settings,
        )
        while True:
            per_cm /= SHRINK
            file.write(level, resolution=(per_cm, per_cm), subfiletype=1, **settings)
            if max(level.shape) <= 1_024:
                break
            level = _shrunk(level)


def _shrunk(pixels: np.ndarray) -> np.ndarray:
    """Mean over SHRINK x SHRINK px; leftover rows and columns are dropped."""
    high, wide = (side // SHRINK for side in pixels.shape[:2])
    block = pixels[: high * SHRINK, : wide * SHRINK].reshape(high, SHRINK, wide, SHRINK, 3)
    return ((block.sum((1, 3), dtype=np.uint16) + SHRINK**2 // 2) // SHRINK**2).astype(np.uint8)


def write_slides(
    folder: Path, tiles: Sequence[Tile], origin: str, split: str, count: int, n: int, seed: int = 0
) -> list[Path]:
    """Write `count` mosaics of a split's tiles, those that are there already left alone.

    questions.jsonl then asks of all mosaics of the folder, those of earlier calls too.
    """
    tiles = [tile for tile in tiles if tile.split == split]
    if not tiles:
        raise ValueError(f"there is no tile of split {split!r}.")
    slides = [folder / f"mosaic-{split}-{n}-{number}.tiff" for number in range(seed, seed + count)]
    for number, slide in enumerate(slides, seed):
        if not slide.is_file():
            write_slide(slide, tiles, origin, n, number)
            print(f"{slide}", flush=True)
    lines = []
    for slide in sorted(folder.glob("mosaic-*.tiff")):
        for asked in json.loads(truth_path(slide).read_text())["questions"]:
            record = {"slide": slide.stem, "category": asked.pop("family"), **asked}
            lines.append(json.dumps(record) + "\n")
    write_whole(folder / "questions.jsonl", "".join(lines))
    return slides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["bank", "slides"])
    parser.add_argument("--tiles", type=Path, help="folder with atlas/ and crc_tissue/; without it, phantoms")
    parser.add_argument("--classes", type=Path, help="folder with a folder of images for each class")
    parser.add_argument("--labels", type=Path, help="JSON: what each class folder is; default those of Kather, NCT-CRC")
    parser.add_argument("--per-class", type=int, help="images of a class at most")
    parser.add_argument("--phantoms", type=int, default=60, help="number of training phantoms")
    parser.add_argument("--copies", type=int, default=6, help="augmented copies of a real training tile")
    parser.add_argument("--encoder", default="efficientnet-lite0")
    parser.add_argument("--slides", type=int, default=1, help="number of slides")
    parser.add_argument("--n", type=mosaic_size, default=4096, help="patches of a slide")
    parser.add_argument("--split", default="test", help="slides: whose tiles to use")
    parser.add_argument("--seed", type=int, default=0, help="of the first slide; the next ones count on")
    parser.add_argument("--split-seed", type=int, default=0, help="of the split of --classes")
    parser.add_argument("--out", type=Path, required=True, help="bank: a file; slides: a folder")
    arguments = parser.parse_args()
    vocabulary, origin, tiles = None, "phantom", []
    if arguments.classes:
        labels = json.loads(arguments.labels.read_text()) if arguments.labels else None
        tiles, vocabulary = class_tiles(arguments.classes, labels, arguments.per_class, arguments.split_seed)
        vocabulary.register()
        origin = vocabulary.origin
    elif arguments.tiles:
        tiles, origin = labelled_tiles(arguments.tiles), "real"
    if arguments.command == "slides":
        if not tiles:
            parser.error("slides needs --tiles or --classes; for phantom slides see python -m sparsewsi phantom")
        write_slides(arguments.out, tiles, origin, arguments.split, arguments.slides, arguments.n, arguments.seed)
        return
    from sparsewsi.bags.encoders import load_encoder

    encoder = load_encoder(arguments.encoder)
    patches = tile_patches(tiles, arguments.copies) if tiles else phantom_patches(arguments.phantoms, 12)
    write_bank(arguments.out, patches, encoder, encoder.name, origin, vocabulary)


if __name__ == "__main__":
    run_command(main)
