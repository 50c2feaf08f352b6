"""Tissue and coordinates of a large slide: CPU-seconds, peak memory, precision and recall against a known mask.

    python -m benchmarks.tissue SLIDE MASK [--one-level] [--runs 5] [--peers hs2p lazyslide]

SLIDE and MASK (a PNG, white where there is tissue, of any scale) come from a generator of slides with pen strokes, dust
and holes. --one-level also measures a copy of the slide's finest level alone. Every run is a process of its own, a peer
in its venv (benchmarks/peers.py) with its own defaults: CPU time from opening the slide to the coordinates, without
imports at the top; peak memory of the whole process, with libraries. "Again" is the same once more in the same process,
as for the next slides of a cohort: codecs are loaded then and memory is at hand. Patches are judged on the grid that
each program chose.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np  # nothing of ours up here: peers run this file without it
from PIL import Image

MPP, PATCH_SIZE, MIN_TISSUE = 0.5, 224, 0.1
SLOW = 5.0  # CPU-s; what takes longer is not asked again
PEERS_OF_TISSUE = ("hs2p", "lazyslide")
Found = tuple[list[list[int]], float, tuple[int, int]]  # corners (x, y), side, size of the slide; level-0 px


def ours(slide: str) -> Found:
    from sparsewsi.slides.slide import open_slide
    from sparsewsi.slides.tissue import patch_coords, patch_side

    with open_slide(slide) as opened:
        coords = patch_coords(opened, MPP, PATCH_SIZE, MIN_TISSUE)
        return coords.tolist(), patch_side(opened, MPP, PATCH_SIZE), opened.size


def with_hs2p(slide: str) -> Found:
    from hs2p import SegmentationConfig, SlideSpec, TilingConfig, tile_slide

    tiling = TilingConfig(requested_spacing_um=MPP, requested_tile_size_px=PATCH_SIZE, tolerance=0.05, overlap=0.0)
    spec = SlideSpec(sample_id="slide", image_path=Path(slide))
    tiles = tile_slide(spec, tiling=tiling, segmentation=SegmentationConfig(method="hsv")).tiles
    return np.stack([tiles.x, tiles.y], 1).tolist(), tiles.tile_size_lv0, tuple(tiles.slide_dimensions)


def with_lazyslide(slide: str) -> Found:
    import lazyslide
    import wsidata

    opened = wsidata.open_wsi(slide)
    lazyslide.pp.find_tissues(opened)
    lazyslide.pp.tile_tissues(opened, PATCH_SIZE, mpp=MPP)
    corners = opened.shapes["tiles"].bounds.to_numpy()
    height, width = opened.properties.shape
    return corners[:, :2].astype(int).tolist(), float(corners[0, 2] - corners[0, 0]), (width, height)


PROGRAMS = {"sparsewsi": ours, "hs2p": with_hs2p, "lazyslide": with_lazyslide}
LIBRARIES = {"sparsewsi": "sparsewsi.slides.tissue", "hs2p": "hs2p", "lazyslide": "lazyslide"}


def measure(slide: str, program: str) -> None:
    """In a child: print CPU-seconds of a first and a second time, the coordinates and the side of a patch."""
    __import__(LIBRARIES[program])

    def timed() -> tuple[float, Found]:
        start = time.process_time()
        found = PROGRAMS[program](slide)
        return time.process_time() - start, found

    seconds, (coords, side, size) = timed()
    again = timed()[0] if seconds < SLOW else None
    print(json.dumps({"seconds": seconds, "again": again, "coords": coords, "side": side, "size": size}))


def true_shares(mask: np.ndarray, coords: np.ndarray, side: int, size: tuple[int, int]) -> np.ndarray:
    """True share of tissue of each patch (N, 2), level-0 px: (N,)."""
    running = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    running[1:, 1:] = mask.cumsum(0).cumsum(1)
    scale = np.array(size) / mask.shape[::-1]

    def below(xy: np.ndarray) -> np.ndarray:
        """Integral of the mask from the origin to xy, bilinear within a px."""
        place = np.clip(xy / scale, 0, np.array(mask.shape[::-1]) - 1e-9)
        x, y = place.astype(int).T
        fx, fy = (place % 1).T
        top = running[y, x] * (1 - fx) + running[y, x + 1] * fx
        bottom = running[y + 1, x] * (1 - fx) + running[y + 1, x + 1] * fx
        return top * (1 - fy) + bottom * fy

    corners = [coords + np.array(step) * side for step in ((0, 0), (1, 0), (0, 1), (1, 1))]
    a, b, c, d = map(below, corners)
    return (d - b - c + a) / (side**2 / scale.prod())


def one_level(slide: Path, copy: Path) -> None:
    """The finest level of a tiled JPEG TIFF alone, its tiles as they are."""
    import tifffile

    with tifffile.TiffFile(slide) as tiff, tifffile.TiffWriter(copy, bigtiff=True) as writer:
        page = next(page for page in tiff.pages if isinstance(page, tifffile.TiffPage) and page.is_tiled)

        def tiles():
            for offset, length in zip(page.dataoffsets, page.databytecounts):
                tiff.filehandle.seek(offset)
                yield tiff.filehandle.read(length)

        writer.write(
            tiles(),
            shape=page.shape,
            dtype=page.dtype,
            tile=(page.tilelength, page.tilewidth),
            photometric="rgb",
            compression="jpeg",
            subsampling=page.subsampling,
            metadata=None,
            description=page.description,
        )


def judged(found: dict, mask: np.ndarray) -> list[str]:
    """Patches, precision, recall, patches off all tissue, as texts.

    A patch is right if MIN_TISSUE of it is tissue. Recall: of the right places of a grid from the origin, the share
    whose middle lies in a patch, as programs start their grids where they like.
    """
    coords, side, size = np.array(found["coords"]), found["side"], found["size"]
    shares = true_shares(mask, coords, side, size)
    reach = round(size[0] / mask.shape[1])  # the mask is no finer than that
    far = true_shares(mask, coords - reach, side + 2 * reach, size) < 1e-9
    covered = np.zeros(mask.shape, bool)
    scale = size[0] / mask.shape[1]
    for x, y in coords / scale:
        covered[int(y) : int(np.ceil(y + side / scale)), int(x) : int(np.ceil(x + side / scale))] = True
    grid = np.stack(np.meshgrid(np.arange(0, size[0], side), np.arange(0, size[1], side)), -1).reshape(-1, 2)
    wanted = true_shares(mask, grid, side, size) >= MIN_TISSUE
    middles = np.minimum(((grid + side / 2) / scale).astype(int), np.array(mask.shape[::-1]) - 1)
    got = covered[middles[:, 1], middles[:, 0]]
    precision, recall = (shares >= MIN_TISSUE).mean(), (got & wanted).sum() / wanted.sum()
    return [f"{len(coords)}", f"{precision:.4f}", f"{recall:.4f}", f"{int(far.sum())}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("mask", type=Path, nargs="?")
    parser.add_argument("--one-level", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=PEERS_OF_TISSUE, choices=PEERS_OF_TISSUE)
    parser.add_argument("--peers-in", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(str(options.slide), options.child)
        return
    if options.mask is None:
        parser.error("a mask is needed")

    from benchmarks.child import run_child
    from benchmarks.peers import FOLDER, PEERS, installed
    from benchmarks.tables import OUT, Table, report

    Image.MAX_IMAGE_PIXELS = None
    mask = np.asarray(Image.open(options.mask).convert("L")) > 127
    pythons, missing = installed(options.peers, options.peers_in or FOLDER)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tasks = [(program, "pyramid", options.slide) for program in ("sparsewsi", *pythons)]
        if options.one_level:
            tasks.append(("sparsewsi", "one level", Path(folder) / "one.svs"))
            one_level(options.slide, Path(folder) / "one.svs")
        runs: dict[tuple[str, str], list] = {(program, name): [] for program, name, _ in tasks}
        for _ in range(options.runs):  # by turns: a busy minute of the machine hits all alike
            for program, name, slide in tasks:
                if program in missing:
                    continue
                try:
                    child = [__file__, str(slide), "--child", program]
                    runs[program, name].append(run_child(child, pythons.get(program, sys.executable)))
                except RuntimeError as reason:
                    missing[program] = str(reason)
        for (program, name), made in runs.items():
            if program in missing:
                continue
            seconds = [found["seconds"] for found, _ in made]
            again = [found["again"] for found, _ in made if found["again"] is not None]
            spent = [f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f}"]
            spent.append(f"{statistics.median(again):.3f}" if len(again) == len(made) else "")
            spent.append(f"{max(mb for _, mb in made):.0f}")
            rows.append([program, name, *spent, *judged(made[0][0], mask)])
    versions = ", ".join(requirement for name in pythons for requirement in PEERS[name].named)
    note = f"Tissue and coordinates of one slide, {options.runs} runs; {versions}."
    note += "".join(f" Without {name}: {reason}" for name, reason in missing.items())
    columns = ["program", "slide", "CPU-s, median", "lowest", "again, median", "peak MB", "patches", "precision"]
    report(Table("tissue", [*columns, "recall", "patches off tissue"], rows, note), options.out or OUT)


if __name__ == "__main__":
    main()
