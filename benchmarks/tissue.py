"""Tissue and coordinates of a large slide: CPU-seconds, peak memory, precision and recall against a known mask.

    python -m benchmarks.tissue SLIDE MASK [--one-level] [--runs 5]

SLIDE and MASK (a PNG, white where there is tissue, of any scale) come from a generator of slides with pen strokes, dust
and holes. --one-level also measures a copy of the slide's finest level alone. Every run is a process of its own: CPU
time from opening the slide to the coordinates, without imports; peak memory of the whole process, with libraries.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

MPP, PATCH_SIZE, MIN_TISSUE = 0.5, 224, 0.1


def measure(slide: str) -> None:
    """In a child: print CPU-seconds, the coordinates and the side of a patch."""
    from sparsewsi.slide import open_slide
    from sparsewsi.tissue import patch_coords, patch_side

    start = time.process_time()
    with open_slide(slide) as opened:
        coords = patch_coords(opened, MPP, PATCH_SIZE, MIN_TISSUE)
        seconds = time.process_time() - start
        side, size = patch_side(opened, MPP, PATCH_SIZE), opened.size
    print(json.dumps({"seconds": seconds, "coords": coords.tolist(), "side": side, "size": size}))


def run(slide: Path) -> tuple[dict, float]:
    """(what the child printed, peak resident memory in MB)."""
    with tempfile.TemporaryFile("w+") as out:
        command = [sys.executable, "-m", "benchmarks.tissue", str(slide), "--child"]
        process = subprocess.Popen(command, stdout=out, cwd=Path(__file__).resolve().parents[1])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(process.returncode)
        out.seek(0)
        return json.load(out), usage.ru_maxrss / 1024


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("mask", type=Path, nargs="?")
    parser.add_argument("--one-level", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(str(options.slide))
        return
    if options.mask is None:
        parser.error("a mask is needed")
    Image.MAX_IMAGE_PIXELS = None
    mask = np.asarray(Image.open(options.mask).convert("L")) > 127
    print("| slide | CPU-s, median | lowest | peak MB | patches | precision | recall | patches off tissue |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        slides = {"pyramid": options.slide}
        if options.one_level:
            slides["one level"] = Path(folder) / "one.svs"
            one_level(options.slide, slides["one level"])
        for name, slide in slides.items():
            runs = [run(slide) for _ in range(options.runs)]
            found, side, size = runs[0][0]["coords"], runs[0][0]["side"], runs[0][0]["size"]
            grid = np.stack(np.meshgrid(np.arange(0, size[0], side), np.arange(0, size[1], side)), -1).reshape(-1, 2)
            shares = true_shares(mask, grid, side, size)
            wanted = shares >= MIN_TISSUE
            reach = round(size[0] / mask.shape[1])  # the mask is no finer than that
            far = true_shares(mask, grid - reach, side + 2 * reach, size) < 1e-9
            kept = {tuple(xy) for xy in found}
            got = np.array([tuple(xy) in kept for xy in grid.tolist()])
            seconds = [result["seconds"] for result, _ in runs]
            print(
                f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | {max(mb for _, mb in runs):.0f} "
                f"| {len(found)} | {(got & wanted).sum() / got.sum():.4f} | {(got & wanted).sum() / wanted.sum():.4f} "
                f"| {int((got & far).sum())} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
