"""Mosaics on disk: pyramidal TIFF slides put together from labelled tiles, each with its truth, and their questions.

<slide>.mosaic.json lies beside each slide, one questions.jsonl beside all: what sparsewsi extract, train.data.questions
and train.evaluate take as they take real slides and questions.

N patches.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparsewsi import phantom
from sparsewsi.files import write_text
from train.data.kinds import BACKGROUNDS, Facts, ask, list_families, plan_facts
from train.data.layout import draw_rows, lay_out
from train.data.tiles import Tile, turn_tile

SIDE = 224  # px of a patch, which is also a tile of the TIFF
MPP = 0.5
MARGIN = 2  # patches of glass around the tissue
GLASS = 244
SHRINK = 4  # between pyramid levels


def truth_path(slide: str | Path) -> Path:
    """Where the ground truth of a mosaic slide lies."""
    return Path(f"{slide}.mosaic.json")


def look_up_kinds(truth: Mapping[str, Any], coords: np.ndarray) -> np.ndarray:
    """The kinds (N,) of the patches of a mosaic slide, "background" beside the tissue.

    truth: what <slide>.mosaic.json says; coords: (N, 2) top-left corners in level-0 px, on the grid or not: a patch is
    called by the cell its centre lies in.
    """
    column, row = ((np.asarray(coords) + SIDE // 2) // SIDE - MARGIN).T
    place = row * truth["columns"] + column
    inside = (row >= 0) & (column >= 0) & (column < truth["columns"]) & (place < len(truth["kinds"]))
    return np.where(inside, np.array(truth["kinds"])[np.where(inside, place, 0)], "background")


def make_truth(origin: str, kinds: np.ndarray, facts: Facts, about: dict[str, Any], rng: np.random.Generator) -> dict:
    """What <slide>.mosaic.json says: as a phantom's truth, and the kind of every patch and a question a family."""
    columns = int(np.ceil(np.sqrt(len(kinds))))
    row, column = np.divmod(np.arange(len(kinds)), columns)
    needles = []
    for kind in facts.present:
        x, y = ((np.stack([column, row])[:, kinds == kind] + MARGIN) * SIDE).astype(int)
        left, top = int(x.min()), int(y.min())
        size = (int(x.max()) + SIDE - left, int(y.max()) + SIDE - top)
        needles.append(phantom.Needle(kind, left, top, *size))
    asked = [question for family in list_families(origin) if (question := ask(facts, family, rng)) is not None]
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
    families = list_families(origin)
    facts = plan_facts(origin, families[seed % len(families)], rng)
    kinds = lay_out(facts, n, per_needle, rng)
    rows = draw_rows(kinds, np.array([tile.kind for tile in tiles]), np.array([tile.source for tile in tiles]), rng)
    turns = rng.integers(8, size=n)
    truth = make_truth(origin, kinds, facts, {"seed": seed, "n": n, "split": tiles[0].split, "version": 1}, rng)
    files = [tiles[row].file for row in rows]

    def pixels(number: int) -> np.ndarray:
        return turn_tile(Image.open(files[number]).convert("RGB"), SIDE)[turns[number]]

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
            level[y : y + small, x : x + small] = _shrink(patch)
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
            level = _shrink(level)


def _shrink(pixels: np.ndarray) -> np.ndarray:
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
    write_text(folder / "questions.jsonl", "".join(lines))
    return slides
