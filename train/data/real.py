"""Real slides with published diagnoses -> bags, and the questions that the published facts answer.

    python -m train.data.real bank --slides atlas_slides --out runs/slides.safetensors
    python -m train.data.real whole --slides atlas_slides --deep-zoom repositories --out runs/whole

The folder holds slides.csv (a row a slide) and patches/<slide>.zip (`<x>_<y>.jpg`, the top-left corner in level-0 px).
The split is by case: column `role`, but for the slides whose labelled tiles train/data/mosaic_split.json keeps for
testing: nothing trains on those either.

`whole` reads whole slides instead, as far as their repositories lie under --deep-zoom, and writes a feature file for
each: all patches of the level of about 0.5 um/px, one from the middle of each Deep Zoom tile, with 60 % tissue or more.

A fact that was not published is not asked. Facts are never taken from the column `list_note`, which holds textbook
sentences. Every kind of question comes in several wordings, so that a reader's own words work.

N patches, D feature dim.
"""

import csv
import functools
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from sparsewsi.bags.bag import Bag, save_bag
from sparsewsi.bags.efficientnet import HE
from sparsewsi.bags.patch_encoder import PatchEncoder
from train.data.bank import Bank, load_bank, write_bank
from train.data.example import Example, Question
from train.data.stream import place_rows
from train.data.tiles import SPLIT_FILE, augment_tile
from train.flags import make_parser, run_command

ORIGIN = "slides"
UNCLEAR = ("", "unclear")
MPP, SIDE = 0.5, 224  # um/px and px of a patch
TINTED, TISSUE = 15, 0.6  # a pixel is tissue if its channels differ by more; so many of a patch's must be
YES_NO = {
    "malignant": (
        "Is there a malignant tumour in this slide?",
        "Does this slide show a malignant tumour?",
        "Is this slide malignant?",
        "Is there any malignancy in this slide?",
        "Does this slide contain cancer?",
    ),
    "carcinoma": (
        "Does this slide contain carcinoma?",
        "Is there carcinoma in this slide?",
        "Is this a carcinoma?",
        "Is carcinoma present in this slide?",
    ),
    "neoplasm": (
        "Is there a neoplasm in this slide?",
        "Does this slide show a tumour, benign or malignant?",
        "Is this slide neoplastic?",
    ),
}
CHOICES = {
    "organ": (
        "Which organ is this slide from?",
        "What organ does this tissue come from?",
        "Which organ is this?",
        "Where was this tissue taken from?",
    ),
    "category": (
        "What kind of disease does this slide show?",
        "Which category of disease is this?",
        "What sort of process is seen in this slide?",
    ),
    "diagnosis": (
        "What is the diagnosis?",
        "Which of these is the most likely diagnosis?",
        "What does this slide show?",
    ),
}
WORDINGS = YES_NO | CHOICES
KINDS = tuple(WORDINGS)
CATEGORIES = {
    "inflammatory or infectious": "inflammation or infection",
    "other non-neoplastic": "another non-neoplastic change",
    "benign neoplasm or precursor": "benign tumour or precursor",
    "malignant epithelial": "carcinoma",
    "other malignant": "another malignant tumour",
}
ORGANS = {"female genital": "endometrium", "gastrointestinal tract": "bowel", "peritoneum": "peritoneum"}
# How often training asks each kind first; the diagnoses of so few cases can only be learned by heart.
ASKED = {"malignant": 3, "carcinoma": 3, "neoplasm": 2, "organ": 3, "category": 1, "diagnosis": 1}
OPEN = 0.25  # share of the questions that are asked without their options
DESCRIBED = 0.2  # share of the bags that are to be described
FOUR = 4  # options of a choice
# How often training sees a slide of each stratum: halves malignant, and carcinoma and benign neoplasms not rare.
STRATA = {"carcinoma": 0.3, "other malignant": 0.2, "benign neoplasm": 0.2, "not neoplastic": 0.2, "unclear": 0.1}


@dataclass(frozen=True)
class SlideFacts:
    """What was published about a slide. Each fact is its answer in words, "" where it was not told."""

    slide: str
    case: str
    role: str  # train, val or test
    facts: dict[str, str]  # kind of question -> answer

    @property
    def stratum(self) -> str:
        """Which of STRATA the slide is in."""
        if self.facts["carcinoma"] == "Yes":
            return "carcinoma"
        if self.facts["malignant"] == "Yes":
            return "other malignant"
        if not self.facts["malignant"]:
            return "unclear"
        return "benign neoplasm" if self.facts["neoplasm"] == "Yes" else "not neoplastic"


def read_facts(folder: Path) -> list[SlideFacts]:
    """The published facts of every slide of a folder, in the order of slides.csv."""
    held_out = {name for name, split in json.loads(SPLIT_FILE.read_text())["atlas"].items() if split == "test"}
    found = []
    with (folder / "slides.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            facts = {
                "malignant": _yes_no(row["malignant"]),
                "carcinoma": _yes_no(row["carcinoma_present"]),
                "neoplasm": _yes_no(row["neoplasm"]),
                "organ": _told(ORGANS.get(row["organ_group"], row["organ_group"])),
                "category": CATEGORIES.get(row["category"], ""),
                "diagnosis": _told(row["diagnosis"])
                if row["category"] in CATEGORIES or row["neoplasm"] == "yes"
                else "",
            }
            role = "test" if row["case"] in held_out else row["role"]
            found.append(SlideFacts(row["slide"], row["case"], role, facts))
    return found


def _told(text: str) -> str:
    return "" if text in UNCLEAR else text


def _yes_no(text: str) -> str:
    return {"yes": "Yes", "no": "No"}.get(text, "")


# ------------------------------------------------------------------------------------------------------ questions


def ask(
    slide: SlideFacts, kind: str, others: Sequence[SlideFacts], rng: np.random.Generator, wording: int | None = None
) -> Question | None:
    """One question of a kind about a slide, or None where its answer was not published.

    others: slides whose facts give the wrong options, in the order in which they are tried; options are shuffled.
    For a diagnosis those of the same organ come first.
    """
    answer = slide.facts[kind]
    if not answer:
        return None
    texts = WORDINGS[kind]
    text = texts[int(rng.integers(len(texts))) if wording is None else wording]
    if kind in YES_NO:
        return Question(text, answer, ("Yes", "No"), kind)
    if kind == "diagnosis" and slide.facts["organ"]:
        others = sorted(others, key=lambda other: other.facts["organ"] != slide.facts["organ"])  # stable
    wrong = dict.fromkeys(other.facts[kind] for other in others if other.facts[kind] not in ("", answer))
    options = [answer, *list(wrong)[: FOUR - 1]]
    return Question(text, answer, tuple(str(option) for option in rng.permutation(options)), kind)


def describe(slide: SlideFacts) -> Question:
    """A request to describe a slide and what was published of it in a sentence."""
    facts = slide.facts
    if facts["carcinoma"] == "Yes":
        what = " with carcinoma"
    elif facts["malignant"] == "Yes":
        what = " with a malignant tumour"
    elif facts["neoplasm"] == "Yes":
        what = " with a benign tumour" if facts["malignant"] == "No" else " with a tumour"
    else:
        what = " without a tumour" if facts["neoplasm"] == "No" else ""
    where = f"Tissue of the {facts['organ']}" if facts["organ"] else "Tissue"
    return Question("Describe this slide.", f"{where}{what}.", (), "caption")


# ----------------------------------------------------------------------------------------------------------- bags


def slide_rows(bank: Bank, slide: str, copy: int = 0) -> np.ndarray:
    """Rows of a slide's patches in the bank, in raster order; copy 0 is the slide as it is."""
    return np.flatnonzero((bank.sources == slide) & (bank.kinds == str(copy)))


def patch_names(archive: zipfile.ZipFile) -> list[str]:
    """The patches of a slide in raster order."""
    return sorted(archive.namelist(), key=lambda name: _corner(name)[::-1])


def _corner(name: str) -> tuple[int, int]:
    x, y = name.rsplit(".", 1)[0].split("_")
    return int(x), int(y)


def slide_bag(bank: Bank, slide: str) -> Bag:
    """The bag of a slide as it is. Where its patches lie is not told: they are put on a raster, in their order."""
    return place_rows(bank, slide_rows(bank, slide), slide)


@dataclass(frozen=True)
class SlideStream:
    """An endless, seeded stream of bags of real training slides: example(i) depends on (seed, i) and on nothing else.

    Strata are drawn as STRATA says, cases with equal chances within. An augmentation is one of the bank's restained
    copies, mixed patch by patch with the slide as it is, and a random part of the patches.
    """

    bank: Bank
    slides: tuple[SlideFacts, ...]
    seed: int
    questions_per_bag: int = 4
    least: float = 0.5  # share of the patches at least

    def example(self, index: int, n: int) -> Example:
        """Example number `index`: at most n patches of a slide and questions about it."""
        rng = np.random.default_rng((self.seed, 7, index))
        slide = self.draw(rng)
        features, kept, whole = self.draw_features(slide, n, rng)
        return Example(features, torch.from_numpy(kept), whole, tuple(self.questions(slide, rng)))

    def draw_features(
        self, slide: SlideFacts, n: int, rng: np.random.Generator
    ) -> tuple[torch.Tensor, np.ndarray, int]:
        """Features of at most n patches of a slide, their places, and how many the slide has."""
        rows = self.rows[slide.slide]  # (C, N)
        copies, whole = rows.shape
        count = min(n, int(whole * rng.uniform(self.least, 1)))
        kept = np.sort(rng.choice(whole, count, replace=False))
        return self.bank.features[torch.from_numpy(rows[rng.integers(copies), kept])], kept, whole

    @functools.cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """Of each slide the rows (C, N) of its copies in the bank."""
        copies = sorted(map(int, np.unique(self.bank.kinds)))
        return {
            slide.slide: np.stack([slide_rows(self.bank, slide.slide, copy) for copy in copies])
            for slide in self.slides
        }

    def draw(self, rng: np.random.Generator) -> SlideFacts:
        """A slide: a stratum, a case of it, a slide of that."""
        strata = [name for name in STRATA if any(slide.stratum == name for slide in self.slides)]
        weights = np.array([STRATA[name] for name in strata])
        stratum = rng.choice(strata, p=weights / weights.sum())
        pool = [slide for slide in self.slides if slide.stratum == stratum]
        case = rng.choice(sorted({slide.case for slide in pool}))
        pool = [slide for slide in pool if slide.case == case]
        return pool[int(rng.integers(len(pool)))]

    def questions(self, slide: SlideFacts, rng: np.random.Generator) -> list[Question]:
        """Some of the questions about a slide, so that without the slide no answer is likelier than another.

        Wrong options are facts of slides drawn as this one was; of two answers the commoner one is asked for less.
        """
        found = []
        keep = {("carcinoma", "No"): 0.52, ("neoplasm", "Yes"): 0.4}
        weights = np.array([ASKED[kind] for kind in KINDS], float)
        for kind in rng.choice(KINDS, len(KINDS), replace=False, p=weights / weights.sum()):
            others = [self.draw(rng) for _ in range(12)]
            question = ask(slide, str(kind), others, rng)
            if question is None or len(question.options) < 2:
                continue
            if rng.random() < keep.get((question.family, question.answer), 1.0):
                open_form = question.family != "diagnosis" and rng.random() < OPEN
                found.append(replace(question, options=()) if open_form else question)
        found = found[: self.questions_per_bag]
        if not found or rng.random() < DESCRIBED:
            found[-1:] = [describe(slide)]
        return found


# ------------------------------------------------------------------------------------------------------- the bank


def load_slides(path: Path, split: str) -> tuple[Bank, tuple[SlideFacts, ...]]:
    """The patches and the published facts of a split's slides. Raises ValueError for a bank without facts."""
    bank = load_bank(path, split)
    with safe_open(path, "pt") as file:
        told = file.metadata().get("facts")
    if told is None:
        raise ValueError(f"{path} holds no published facts. Write it with python -m train.data.real bank.")
    slides = [SlideFacts(**slide) for slide in json.loads(told)]
    return bank, tuple(slide for slide in slides if slide.role == split)


def slide_patches(folder: Path, copies: int) -> Iterator[tuple[np.ndarray, str, str, str]]:
    """(pixels, copy, slide, split): every slide as it is, and training slides restained `copies` times."""
    for number, slide in enumerate(read_facts(folder)):
        with zipfile.ZipFile(folder / "patches" / f"{slide.slide}.zip") as archive:
            names = patch_names(archive)
            images = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
        rng = np.random.default_rng((1, number))
        for copy in range(1 + (copies if slide.role == "train" else 0)):
            for image in images:
                pixels = np.asarray(image) if copy == 0 else augment_tile(image, rng)
                yield pixels, str(copy), slide.slide, slide.role


def deep_zoom_patches(pyramid: Path, level: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(column, row, pixels uint8 (224, 224, 3)) of the tiles of a level with tissue, in raster order."""
    tiles = [tuple(map(int, file.stem.split("_"))) for file in (pyramid / str(level)).glob("*.jp*g")]
    for row, column in sorted((row, column) for column, row in tiles):
        [file] = (pyramid / str(level)).glob(f"{column}_{row}.jp*g")
        pixels = np.asarray(Image.open(file).convert("RGB"))
        top, left = ((side - SIDE) // 2 for side in pixels.shape[:2])
        if min(top, left) < 0:  # at the right and the lower border of the slide
            continue
        pixels = pixels[top : top + SIDE, left : left + SIDE]
        spread = pixels.max(-1).astype(int) - pixels.min(-1)
        if (spread > TINTED).mean() >= TISSUE:
            yield column, row, pixels


def write_whole(folder: Path, deep_zoom: Path, encoder: PatchEncoder, out: Path) -> None:
    """A feature file for each slide of the folder whose repository is there; those written already are left alone."""
    with (folder / "slides.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        image = deep_zoom / row["repo"].split("/")[-1] / row["dzi"]
        pyramid, path = image.with_name(f"{image.stem}_files"), out / f"{row['slide']}.safetensors"
        if row["role"] == "train" or path.exists() or not (pyramid / row["patch_level"]).is_dir():
            continue
        places, batch, features = [], [], []
        for column, line, pixels in deep_zoom_patches(pyramid, int(row["patch_level"])):
            places.append((column * int(row["tile_size"]), line * int(row["tile_size"])))
            batch.append(pixels)
            if len(batch) == 64:
                features.append(encoder(np.stack(batch)).half())
                batch.clear()
        if batch:
            features.append(encoder(np.stack(batch)).half())
        if features:
            coords = torch.tensor(places, dtype=torch.int32)
            save_bag(Bag(torch.cat(features), coords, SIDE, MPP, encoder.name, row["slide"]), path)
            print(f"{row['slide']}: {len(coords)} patches", flush=True)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("command", choices=["bank", "whole"])
    parser.add_argument("--slides", type=Path, required=True, help="folder with slides.csv and patches/")
    parser.add_argument("--encoder", default=HE)
    parser.add_argument("--copies", type=int, default=3, help="restained copies of a training slide")
    parser.add_argument("--deep-zoom", type=Path, help="whole: folder with the slides' repositories")
    parser.add_argument("--out", type=Path, required=True, help="bank: a file; whole: a folder")
    arguments = parser.parse_args()
    from sparsewsi.bags.encoders import load_encoder

    encoder = load_encoder(arguments.encoder)
    if arguments.command == "whole":
        if arguments.deep_zoom is None:
            parser.error("whole needs --deep-zoom")
        write_whole(arguments.slides, arguments.deep_zoom, encoder, arguments.out)
        return
    patches = slide_patches(arguments.slides, arguments.copies)
    facts = json.dumps([asdict(slide) for slide in read_facts(arguments.slides)])
    write_bank(arguments.out, patches, encoder, arguments.encoder, ORIGIN, more={"facts": facts})


if __name__ == "__main__":
    run_command(main)
