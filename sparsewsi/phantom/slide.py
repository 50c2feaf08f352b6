"""Phantoms as files: a pyramidal tiled TIFF, as a scanner writes it, with its ground truth beside it."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile

from sparsewsi.files import cache_folder, replacing, write_text
from sparsewsi.phantom.paint import BLOCK, paint
from sparsewsi.phantom.plan import NATIVE_MPP, VERSION, PhantomMap
from sparsewsi.phantom.truth import GroundTruth, ground_truth, truth_path

EXAMPLE_SEED, EXAMPLE_SIZE = 133, 12_000
TILE = 256  # TIFF tile side, px
DOWNSAMPLE = 4  # between pyramid levels


class _Level:
    """One pyramid level being built: takes rows of pixels, gives encoded tiles, hands the shrunken rows on."""

    def __init__(self, size: int):
        self.size = size
        self.tiles: list[bytes] = []  # JPEG, tens of MB for the largest phantom
        self.pending = np.empty((0, size, 3), np.uint8)

    def add(self, rows: np.ndarray, pool: ThreadPoolExecutor, last: bool) -> None:
        self.pending = np.concatenate([self.pending, rows])
        while len(self.pending) >= TILE or (last and len(self.pending)):
            self.tiles += _encode_row(self.pending[:TILE], pool)
            self.pending = self.pending[TILE:]


def _encode_row(rows: np.ndarray, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """One row of TIFF tiles as JPEG streams; the last tiles are filled up with their edge."""

    def encode(left: int) -> bytes:
        tile = rows[:, left : left + TILE]
        gap = (0, TILE - tile.shape[0]), (0, TILE - tile.shape[1]), (0, 0)
        tile = np.ascontiguousarray(np.pad(tile, gap, mode="edge"))
        return bytes(
            imagecodecs.jpeg8_encode(tile, level=82, colorspace="rgb", outcolorspace="ycbcr", subsampling="420")
        )

    return pool.map(encode, range(0, rows.shape[1], TILE))


def _shrink(rows: np.ndarray, size: int) -> np.ndarray:
    """Mean over DOWNSAMPLE x DOWNSAMPLE px, cut to `size` columns; leftover rows are dropped."""
    height = len(rows) // DOWNSAMPLE
    block = rows[: height * DOWNSAMPLE, : size * DOWNSAMPLE].reshape(height, DOWNSAMPLE, size, DOWNSAMPLE, 3)
    return ((block.sum((1, 3), dtype=np.uint16) + DOWNSAMPLE**2 // 2) // DOWNSAMPLE**2).astype(np.uint8)


def _strips(phantom: PhantomMap, pool: ThreadPoolExecutor) -> Iterator[tuple[int, np.ndarray]]:
    """(rows done, strip) from top to bottom in strips of BLOCK rows, painted by all threads."""
    for top in range(0, phantom.size, BLOCK):
        strip = np.empty((min(BLOCK, phantom.size - top), phantom.size, 3), np.uint8)
        lefts = range(0, phantom.size, BLOCK)
        list(pool.map(lambda left: paint(phantom, left, top, strip[:, left : left + BLOCK]), lefts))  # noqa: B023
        yield top + len(strip), strip


def write_phantom(
    path: str | Path,
    seed: int = 7,
    size: int = EXAMPLE_SIZE,
    mpp: float = NATIVE_MPP,
    progress: Callable[[int, int], None] | None = None,
) -> GroundTruth:
    """Write the phantom of a seed as a pyramidal tiled JPEG TIFF, and <path>.truth.json beside it.

    size:     side, level-0 px; mpp: um per level-0 px, stated in the file
    progress: called with (rows done, rows in all)

    Written strip by strip in bounded memory to a temporary name and renamed, the truth first: a slide that is there is
    complete and has its truth. Raises ValueError for a size or mpp out of range, OSError if the folder is not writable.
    """
    path = Path(path)
    truth = ground_truth(seed, size, mpp)
    with replacing(path) as partial:
        _write_tiff(partial, truth.map, progress)
        write_text(truth_path(path), truth.to_json())
    return truth


def _write_tiff(path: Path, phantom: PhantomMap, progress: Callable[[int, int], None] | None) -> None:
    sizes = [phantom.size // DOWNSAMPLE]
    while len(sizes) < 2 or sizes[-1] > 1_024:
        sizes.append(sizes[-1] // DOWNSAMPLE)
    levels = [_Level(size) for size in sizes]
    left_over: list[np.ndarray] = [np.empty((0, phantom.size, 3), np.uint8)] + [level.pending for level in levels]

    def tiles(pool: ThreadPoolExecutor) -> Iterator[bytes]:
        for done, strip in _strips(phantom, pool):
            # The lower levels first: nobody resumes this generator once its last tile is taken.
            rows = strip
            for number, level in enumerate(levels):
                rows = np.concatenate([left_over[number], rows])
                whole = len(rows) // DOWNSAMPLE * DOWNSAMPLE
                left_over[number] = rows[whole:]
                rows = _shrink(rows[:whole], level.size)
                level.add(rows, pool, last=done == phantom.size)
            if progress is not None:
                progress(done, phantom.size)
            for top in range(0, len(strip), TILE):
                yield from _encode_row(strip[top : top + TILE], pool)

    description = {"sparsewsi_phantom": {"seed": phantom.seed, "size": phantom.size, "version": VERSION}}
    settings = {
        "dtype": np.uint8,
        "tile": (TILE, TILE),
        "photometric": "ycbcr",
        "compression": "jpeg",
        "compressionargs": {"level": 82},
        "subsampling": (2, 2),
        "metadata": None,
        "resolutionunit": "CENTIMETER",
    }
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, tifffile.TiffWriter(path, bigtiff=phantom.size > 30_000) as file:
        per_cm = 1e4 / phantom.mpp
        file.write(
            tiles(pool),
            shape=(phantom.size, phantom.size, 3),
            description=json.dumps(description),
            resolution=(per_cm, per_cm),
            software="sparsewsi phantom",
            **settings,
        )
        for level in levels:
            per_cm /= DOWNSAMPLE
            shape = (level.size, level.size, 3)
            file.write(iter(level.tiles), shape=shape, resolution=(per_cm, per_cm), subfiletype=1, **settings)


def example_slide(cache_dir: str | Path | None = None) -> Path:
    """The bundled example phantom, written on first use (some seconds).

    cache_dir: default $SPARSEWSI_CACHE, else ~/.cache/sparsewsi
    """
    path = Path(cache_dir or cache_folder()) / f"phantom-{EXAMPLE_SEED}-{EXAMPLE_SIZE}-v{VERSION}.tiff"
    if not (path.is_file() and truth_path(path).is_file()):
        write_phantom(path, EXAMPLE_SEED, EXAMPLE_SIZE)
    return path
