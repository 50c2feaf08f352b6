"""Labelled patches -> bags with known ground truth, and the questions one can ask of them.

A mosaic is a slide put together from labelled patches: contiguous regions of background tissue, and a few compact foci
("needles") of other kinds. Which patch is which is known, so needle recall, evidence and answers can be checked.

    python -m train.mosaic bank --tiles ../shared/data/tiles --out runs/bank.safetensors

N patches, D feature dim, M patches in the bank. Kinds are tissue labels; one vocabulary for real tiles and phantoms.
"""

import argparse
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors import safe_open
from safetensors.torch import save_file

from sparsewsi import phantom
from sparsewsi.bag import Bag
from train.data import Example, Question

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
FAMILIES = ("present", "absent", "dominant", "contains", "diagnosis")


@dataclass(frozen=True)
class Bank:
    """Features of labelled patches, grouped by kind, for one origin ("real" or "phantom") and one split."""

    features: torch.Tensor  # (M, D) float16
    kinds: np.ndarray  # (M,) str
    sources: np.ndarray  # (M,) str, the slide (or the cohort where slides are unknown) a patch came from
    origin: str
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


# --------------------------------------------------------------------------------------------------- questions


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


def lay_out(facts: Facts, n: int, per_needle: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Kinds of n patches on a near-square raster: regions of background tissue, then one compact focus per needle kind.

    The dominant kind covers more than half of the patches. per_needle: least and most patches of a focus.
    Returns (n,) str in raster order.
    """
    side = int(np.ceil(np.sqrt(n)))
    yx = np.stack(np.divmod(np.arange(n), side), 1).astype(np.float32)  # (n, 2)
    others = [kind for kind in BACKGROUNDS[facts.origin] if kind != facts.dominant]
    kinds = np.full(n, facts.dominant, dtype="<U24")
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


def fill(bank: Bank, kinds: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Features (n, D) for a layout: each kind's patches come from one source where that source has it."""
    rows = np.empty(len(kinds), np.int64)
    for kind in np.unique(kinds):
        pool = bank.rows(str(kind))
        if len(pool) == 0:
            raise ValueError(
                f"the {bank.origin} bank has no patch of kind {kind!r}; leave the kind out or add such tiles"
            )
        source = rng.choice(np.unique(bank.sources[pool]))
        pool = pool[bank.sources[pool] == source]
        want = int((kinds == kind).sum())
        rows[kinds == kind] = rng.choice(pool, want, replace=want > len(pool))
    return bank.features[torch.from_numpy(rows)]


def make_bag(bank: Bank, kinds: np.ndarray, rng: np.random.Generator, name: str = "mosaic") -> Bag:
    """A Bag of a layout; patches lie on a square raster of 224 px at 0.5 um/px."""
    side = int(np.ceil(np.sqrt(len(kinds))))
    rows, columns = np.divmod(np.arange(len(kinds)), side)
    coords = torch.from_numpy(np.stack([columns, rows], 1).astype(np.int32) * 224)
    return Bag(fill(bank, kinds, rng), coords, 224, 0.5, bank.encoder, name)


def balanced_set(
    bank: Bank, n_questions: int, n: int, seed: int, per_needle: tuple[int, int] = (4, 12)
) -> Iterator[tuple[Bag, np.ndarray, Question]]:
    """Balanced test questions, one mosaic each: families in turn, answers uniform within a family."""
    for i in range(n_questions):
        rng = np.random.default_rng((seed, i))
        family = FAMILIES[i % len(FAMILIES)]
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
        planned = str(rng.choice(FAMILIES))
        facts = plan(bank.origin, planned, rng)
        # As many needles as a long slide has, so that a short bag looks like what a good selection of one would keep.
        kinds = lay_out(facts, n, (max(1, min(4, n // 8)), max(1, min(12, n // 4))), rng)
        num_patches = int(np.exp(rng.uniform(np.log(n), np.log(max(max_index, n)))))
        indices = np.sort(rng.choice(num_patches, n, replace=False))
        if self.stage == 1:
            questions = [caption(facts)]
        else:
            # Carcinoma is in half of the slides only where diagnosis was planned; elsewhere "no" would be the safe bet.
            families = [family for family in FAMILIES if family != "diagnosis" or planned == "diagnosis"]
            drawn = [ask(facts, str(family), rng) for family in rng.permutation(families * 2)]
            questions = [_vary(question, rng) for question in drawn if question is not None][
                : self.questions_per_bag - 1
            ]
            questions.append(caption(facts))
        return Example(fill(bank, kinds, rng), torch.from_numpy(indices), num_patches, tuple(questions), tuple(kinds))


def _vary(question: Question, rng: np.random.Generator) -> Question:
    """Sometimes the open form of a question: the same words without options, where only one answer is right."""
    open_form = question.family in ("dominant", "diagnosis") and rng.random() < 0.3
    return Question(question.question, question.answer, () if open_form else question.options, question.family)


# -------------------------------------------------------------------------------------------- the feature bank


def labelled_tiles(folder: Path) -> list[tuple[Path, str, str, str]]:
    """(file, kind, source, split) of every usable tile under folder/atlas and folder/crc_tissue.

    Sources are slides; in crc_tissue, where slides are not told, the data set a tile came from stands for them.
    """
    split = json.loads(SPLIT_FILE.read_text())
    tiles = []
    with (folder / "atlas" / "labels.csv").open() as file:
        for row in csv.DictReader(file):
            path = folder / "atlas" / row["file"]
            tiles.append((path, row["label"], row["slide"], split["atlas"][row["slide"]]))
    for path in sorted((folder / "crc_tissue").glob("*/*")):
        source = path.name.split("__")[0]
        if path.parent.name in CRC_LABELS:
            tiles.append((path, CRC_LABELS[path.parent.name], f"crc-{source}", split["crc_tissue"][source]))
    return tiles


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
    """The centre of a tile in its eight orientations, colours untouched: uint8 (size, size, 3) each."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    turns = [np.rot90(pixels, k) for k in range(4)]
    return [np.ascontiguousarray(view) for turn in turns for view in (turn, turn[:, ::-1])]


def real_patches(folder: Path, copies: int) -> Iterator[tuple[np.ndarray, str, str, str]]:
    """(pixels, kind, source, split): train tiles augmented `copies` times, val and test tiles in eight orientations."""
    for number, (path, kind, source, split) in enumerate(labelled_tiles(folder)):
        image = Image.open(path).convert("RGB")
        rng = np.random.default_rng((0, number))
        views = [augment(image, rng) for _ in range(copies)] if split == "train" else dihedral(image)
        yield from ((view, kind, source, split) for view in views)


def phantom_patches(
    seeds: int, per_kind: int, splits: tuple[str, ...] = ("train", "val", "test")
) -> Iterator[tuple[np.ndarray, str, str, str]]:
    """(pixels, kind, source, split) from `seeds` phantoms of each split, `per_kind` patches of every kind of each."""
    ranges = json.loads(SPLIT_FILE.read_text())["phantom"]
    for split in splits:
        for seed in range(ranges[split][0], ranges[split][0] + (seeds if split == "train" else max(4, seeds // 5))):
            for kind in phantom.KINDS:
                for pixels in phantom.patches(seed, kind, per_kind, mixed=0.4):
                    yield pixels, kind, f"phantom-{seed}", split


def write_bank(
    path: Path,
    patches: Iterator[tuple[np.ndarray, str, str, str]],
    encode: Callable[[np.ndarray], torch.Tensor],
    encoder: str,
    origin: str,
) -> None:
    """Encode patches and write features (M, D) fp16 with their kinds, sources and splits as one safetensors file."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    save_file({"features": torch.cat(features)}, temporary, metadata)
    temporary.replace(path)


def load_bank(path: Path, split: str) -> Bank:
    """The part of a bank file that belongs to a split. Raises ValueError if there is none."""
    with safe_open(path, "pt") as file:
        metadata, features = file.metadata(), file.get_tensor("features")
    keep = np.array(json.loads(metadata["splits"])) == split
    if not keep.any():
        raise ValueError(
            f"{path} holds no patch of split {split!r}; write the bank again with python -m train.mosaic bank"
        )
    kinds, sources = (np.array(json.loads(metadata[name]))[keep] for name in ("kinds", "sources"))
    return Bank(features[torch.from_numpy(keep)], kinds, sources, metadata["origin"], metadata["encoder"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Encode labelled tiles and phantom patches once, for training and evaluation."
    )
    parser.add_argument("command", choices=["bank"])
    parser.add_argument("--tiles", type=Path, help="folder with atlas/ and crc_tissue/; without it, phantoms")
    parser.add_argument("--phantoms", type=int, default=60, help="number of training phantoms")
    parser.add_argument("--copies", type=int, default=6, help="augmented copies of a real training tile")
    parser.add_argument("--encoder", default="efficientnet-lite0")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    from sparsewsi.encoders import load_encoder

    encoder = load_encoder(arguments.encoder)
    if arguments.tiles:
        patches, origin = real_patches(arguments.tiles, arguments.copies), "real"
    else:
        patches, origin = phantom_patches(arguments.phantoms, 12), "phantom"
    write_bank(arguments.out, patches, encoder, encoder.name, origin)


if __name__ == "__main__":
    main()
