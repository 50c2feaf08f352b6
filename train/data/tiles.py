"""Labelled images of tissue on disk, how they are split, and how a training tile is varied."""

import csv
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from sparsewsi.slides.find import IMAGE_SUFFIXES
from train.data.kinds import BACKGROUNDS, WORDS, Vocabulary

SPLIT_FILE = Path(__file__).with_name("mosaic_split.json")
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
IMAGES = (*IMAGE_SUFFIXES, ".tif", ".tiff")


@dataclass(frozen=True)
class Tile:
    """A labelled image. source: the slide it is from, or what stands for it where that is not told."""

    file: Path
    kind: str
    source: str
    split: str


def find_tiles(folder: Path) -> list[Tile]:
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


def choose_split(name: str, seed: int = 0) -> str:
    """train, val or test (70, 15, 15 %) for a file; depends on its name and the seed alone, not on other files."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if place < 0.7 else "val" if place < 0.85 else "test"


def find_class_tiles(
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
        tiles += [Tile(file, kind, folder.name, choose_split(f"{path.name}/{file.name}", seed)) for file in files]
        if kind != "background":  # glass is nothing to ask for
            (needles if role == "needle" else backgrounds)[kind] = word
    if len(needles) < 4 or len(backgrounds) < 2:
        raise ValueError(
            f"{folder} has the needles {', '.join(needles) or 'none'} and the backgrounds "
            f"{', '.join(backgrounds) or 'none'}; questions need 4 kinds of needles and 2 of background, or more."
        )
    return tiles, Vocabulary(folder.name, needles, backgrounds)


def augment_tile(image: Image.Image, rng: np.random.Generator, size: int = 224) -> np.ndarray:
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


def turn_tile(image: Image.Image, size: int = 224) -> list[np.ndarray]:
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
