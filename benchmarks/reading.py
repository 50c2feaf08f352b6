"""Patches per CPU-second: sparsewsi's reading beside a plain OpenSlide loop and other readers, as ratios.

    python -m benchmarks.reading SLIDE [--half SLIDE_40X] [--patches 1000] [--runs 5] [--peers tiffslide fastslide]
    python -m benchmarks.reading SLIDE --confined      # what a stranger's slide costs, read in a process of its own

Cases, all with the same places on the slide's tissue, in raster order, one process, one thread:
    on the grid    256 px of level 0 that are whole tiles
    off the grid   224 px of level 0, which cut tiles
    half           512 px of level 0 as 256 px (a 40x slide read at 20x, of SLIDE_40X if one is given)

Every reader runs in a process of its own, in turn, and prints its CPU time and a digest of all px; a peer runs in its
venv (benchmarks/peers.py). Printed: the median of the runs, the ratio to the OpenSlide loop (the median of the ratios
within a round), and whether every px equals the loop's. With --confined: our reading in this process and in the child,
32 patches at a time as they are encoded, one at a time, and as the page's tiles (512 px, as JPEG); the child's CPU time
is included.
"""

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np  # nothing of ours up here: peers run this file without it
from PIL import Image

PEERS_OF_READING = ("openslide-python", "fastslide", "tiffslide", "lazyslide", "tiatoolbox")
TILE = 512  # px, of the page
CASES = {"on the grid": (256, 256), "off the grid": (224, 224), "half": (512, 256)}  # level-0 px, px of the patch
# reader -> in a child of its own, patches at a time; TILES: what the page shows
TILES = 0
OURS = {
    "32 at a time": (False, 32),
    "32 at a time, confined": (True, 32),
    "one at a time": (False, 1),
    "one at a time, confined": (True, 1),
    "tiles of the page": (False, TILES),
    "tiles of the page, confined": (True, TILES),
}
Read = Callable[[int, int, int], np.ndarray]  # (x, y, side), level-0 px -> uint8 (side, side, 3)


def ours(path: str, side: int, px: int) -> Callable[[int, int], np.ndarray]:
    from sparsewsi.slides.slide import open_slide

    slide = open_slide(path)
    return lambda x, y: slide.read_scaled((x, y), (px, px), side / px)


def in_batches(path: str, side: int, px: int, places: list[tuple[int, int]], confined: bool, batch: int) -> dict:
    """Speed and a digest of the px of all places, by CPU seconds, also the child's."""
    from sparsewsi.slides.confined import ConfinedSlide, open_confined
    from sparsewsi.slides.slide import open_slide

    page: Any = None
    if batch == TILES:
        from sparsewsi.web.viewer import Slides  # it takes seconds to import

        page, places = Slides(), sorted({(x // TILE, y // TILE) for x, y in places})  # column, row
    with (open_confined if confined else open_slide)(path) as slide:
        mpp, digest, seconds = slide.require_mpp() * side / px, hashlib.sha256(), 0.0
        child = slide.process.pid if isinstance(slide, ConfinedSlide) else None
        step = max(1, batch)
        token = page.add(path, "reader", slide) if page else ""

        def read(first: int) -> Any:
            if batch == TILES:
                return page.tile(token, 0, *places[first])
            if batch == 1:
                return slide.read_scaled(places[first], (px, px), side / px)
            return slide.read_batch(places[first : first + batch], (px, px), mpp)[0]

        for first in range(0, min(len(places), 8 * step), step):  # libraries, tables and memory come with the first
            digest.update(read(first))
        start = time.process_time() + used_by(child)
        for first in range(8 if batch == TILES else 0, len(places), step):  # the page keeps the tiles it has shown
            read(first)
        seconds = time.process_time() + used_by(child) - start
    return {"speed": len(places) / seconds, "digest": digest.hexdigest()}


def used_by(process: int | None) -> float:
    """CPU seconds of all threads of another process, by its clock (Linux, macOS has none)."""
    return 0.0 if process is None else time.clock_gettime(~process << 3 | 2)


def with_openslide(path: str) -> Read:
    import openslide

    slide = openslide.OpenSlide(path)
    return lambda x, y, side: np.asarray(slide.read_region((x, y), 0, (side, side)).convert("RGB"))


def with_tiffslide(path: str) -> Read:
    import tiffslide

    slide = tiffslide.TiffSlide(path)
    return lambda x, y, side: slide.read_region((x, y), 0, (side, side), as_array=True)


def with_fastslide(path: str) -> Read:
    import fastslide

    slide = fastslide.FastSlide.from_file_path(path)
    return lambda x, y, side: slide.read_region((x, y), 0, (side, side)).numpy()[..., :3]


def with_tiatoolbox(path: str) -> Read:
    from tiatoolbox.wsicore.wsireader import WSIReader

    slide = WSIReader.open(path)
    return lambda x, y, side: slide.read_rect((x, y), (side, side), resolution=0, units="level")


def with_lazyslide(path: str) -> Read:
    import wsidata

    reader = wsidata.open_wsi(path).reader
    return lambda x, y, side: reader.get_region(x, y, side, side, level=0)


def scaled(read: Read, side: int, px: int) -> Callable[[int, int], np.ndarray]:
    """Patches as a plain loop makes them: a region of level 0, reduced if need be."""
    if side == px:
        return lambda x, y: read(x, y, side)
    return lambda x, y: np.asarray(Image.fromarray(read(x, y, side)).reduce(side // px))


READERS: dict[str, Callable[[str], Read]] = {
    "openslide-python": with_openslide,
    "tiffslide": with_tiffslide,
    "fastslide": with_fastslide,
    "tiatoolbox": with_tiatoolbox,
    "lazyslide": with_lazyslide,
}


def measure(reader: str, path: str, places: list[tuple[int, int]], side: int, px: int) -> dict[str, object]:
    """Read every place; the first one is not counted, as libraries and tables are loaded with it."""
    if reader in OURS:
        return in_batches(path, side, px, places, *OURS[reader])
    if reader == "sparsewsi":
        patch = ours(path, side, px)
    else:
        patch = scaled(READERS[reader](path), side, px)
    patch(*places[0])
    digest, seconds = hashlib.sha256(), 0.0
    for x, y in places[1:]:
        start = time.process_time()
        pixels = patch(x, y)
        seconds += time.process_time() - start
        digest.update(np.ascontiguousarray(pixels).tobytes())
    return {"speed": (len(places) - 1) / seconds, "digest": digest.hexdigest()}


def tissue_places(path: str, side: int, shift: int, count: int) -> list[tuple[int, int]]:
    """Corners of patches of `side` level-0 px on tissue, (x, y) level 0, in raster order, moved by `shift` px."""
    from sparsewsi.slides.slide import open_slide
    from sparsewsi.slides.tissue import patch_coords

    with open_slide(path) as slide:
        coords = patch_coords(slide, slide.require_mpp(), side)
        inside = ((coords + shift >= 0) & (coords + shift + side <= np.array(slide.size))).all(1)
    coords = coords[inside]
    first = max(0, (len(coords) - count) // 2)
    return [(x + shift, y + shift) for x, y in coords[first : first + count].tolist()]


def compare_confined(options: argparse.Namespace) -> Iterator[list[str]]:
    """Rows: our reading in a child against that in this process, in turn."""
    from benchmarks.child import run_child

    for case in options.cases:
        side, px = CASES[case]
        slide = options.half or options.slide if case == "half" else options.slide
        task = (tissue_places(slide, side, 100 if case == "off the grid" else 0, options.patches + 1), side, px)
        runs: dict[str, list[dict]] = {reader: [] for reader in OURS}
        for _ in range(options.runs):
            for reader in OURS:
                runs[reader].append(run_child([__file__, slide, "--reader", reader], sys.executable, task, 1)[0])
        for reader, (confined, _) in OURS.items():
            plain = runs[reader.removesuffix(", confined")]
            ratios = sorted(run["speed"] / other["speed"] for run, other in zip(runs[reader], plain))
            speed = statistics.median(run["speed"] for run in runs[reader])
            spread = f"{ratios[0]:.2f}, {ratios[-1]:.2f}" if confined else ""
            equal = "yes" if runs[reader][0]["digest"] == plain[0]["digest"] else "no"
            yield [case, reader, f"{speed:.0f}", f"{statistics.median(ratios):.3f}", spread, equal]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide")
    parser.add_argument("--half", help="a slide scanned at 40x")
    parser.add_argument("--patches", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--confined", action="store_true", help="our reading in this process and in a confined child")
    parser.add_argument("--peers", nargs="*", default=PEERS_OF_READING[1:], choices=PEERS_OF_READING[1:])
    parser.add_argument("--peers-in", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--reader", help=argparse.SUPPRESS)  # in the child: read the places on stdin
    options = parser.parse_args()
    if options.reader:
        print(json.dumps(measure(options.reader, options.slide, *json.load(sys.stdin))))
        return

    from benchmarks.child import run_child
    from benchmarks.peers import FOLDER, PEERS, installed
    from benchmarks.tables import OUT, Table, report

    if options.confined:
        columns = ["case", "patches", "patches per CPU-second", "ratio", "lowest, highest", "px equal"]
        note = f"{options.patches} patches, one thread, median of {options.runs} runs; the ratio is confined to not."
        report(Table("confined", columns, list(compare_confined(options)), note), options.out or OUT)
        return
    pythons, missing = installed(("openslide-python", *options.peers), options.peers_in or FOLDER)
    pythons["sparsewsi"] = sys.executable
    rows = []
    for case in options.cases:
        side, px = CASES[case]
        slide = options.half or options.slide if case == "half" else options.slide
        task = (tissue_places(slide, side, 100 if case == "off the grid" else 0, options.patches + 1), side, px)
        results: dict[str, list[dict]] = {reader: [] for reader in pythons}
        for _ in range(options.runs):
            for reader, python in pythons.items():
                try:
                    results[reader].append(run_child([__file__, slide, "--reader", reader], python, task, 1)[0])
                except RuntimeError as reason:
                    missing[reader] = str(reason)
        loop = results["openslide-python"]
        found = {reader: runs for reader, runs in results.items() if len(runs) == options.runs}
        medians = {reader: statistics.median(run["speed"] for run in runs) for reader, runs in found.items()}
        for reader, speed in sorted(medians.items(), key=lambda item: -item[1]):
            ratio = statistics.median(run["speed"] / plain["speed"] for run, plain in zip(results[reader], loop))
            equal = results[reader][0]["digest"] == loop[0]["digest"]
            rows.append([case, reader, f"{speed:.0f}", f"{ratio:.2f}", "yes" if equal else "no"])
    versions = ", ".join(
        requirement for name in pythons if name in PEERS for requirement in PEERS[name].named if name not in missing
    )
    note = f"{options.patches} patches, one thread, median of {options.runs} runs; {versions}."
    note += "".join(f" Without {name}: {reason}" for name, reason in missing.items())
    columns = ["case", "reader", "patches per CPU-second", "ratio", "px equal"]
    report(Table("reading", columns, rows, note), options.out or OUT)


if __name__ == "__main__":
    main()
