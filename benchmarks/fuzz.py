"""Damaged and lying inputs: each is read or refused with a sentence; nothing crashes, hangs or looks around.

    python -m benchmarks.fuzz [--seconds 3600] [--seed 0] [--only svs png ...] [--dicom FOLDER] [--strace]

Slides are opened as the app opens a stranger's, in a child that sees their folder alone, and looked at on every level;
feature files, questions and regions are read in this process, in a worker that is started anew after a crash. The next
folder holds a file that the inputs try to name: that nobody opened it is seen by inotify (Linux), and with --strace
every file that a child opened is looked at. A case is a kind and a number; `--only KIND --case NUMBER` repeats it.
Prints a table, and what failed; exits with 1 if anything did.
"""

import argparse
import ctypes
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tifffile
import torch
from PIL import Image

from sparsewsi import Bag, load_bag, save_bag
from sparsewsi.report.qupath import read_regions
from sparsewsi.slides import confined
from sparsewsi.slides.confined import open_confined
from sparsewsi.slides.tissue import patch_coords
from sparsewsi.web.intake import unpack
from train.data import questions

SLOW = 20.0  # s for one input, on a machine that does nothing else
MEMORY = 6 << 30  # bytes of address space of a worker: what asks for more than this fails
LIES = (0, 1, 2, 3, 255, 256, 65_535, 65_536, 90_000, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
WORDS = (
    "NaN",
    "-1",
    "1e308",
    "0",
    "99999999999999999999",
    "../../private/secret.jpg",
    "..",
    "\u2028",
    '"',
    "\0",
    "[" * 3000,
)
WORDS += ("/etc/hostname", "private/secret.jpg", "'", ",", "\n", "=CMD()", "\ud83d\ude00", "A" * 100_000)


# ---- good inputs


def picture(side: int) -> np.ndarray:
    """Noise in the colours of tissue on white: uint8 (side, side, 3)."""
    pixels = np.full((side, side, 3), 240, np.uint8)
    middle = slice(side // 4, 3 * side // 4)
    grain = np.random.default_rng(0).integers(0, 60, (*pixels[middle, middle].shape[:2], 1), np.uint8)
    pixels[middle, middle] = np.array([170, 90, 150], np.uint8) + grain
    return pixels


def tiff(compression: str, description: str | None = None, bigtiff: bool = False) -> bytes:
    out, pixels = io.BytesIO(), picture(768)
    with tifffile.TiffWriter(out, bigtiff=bigtiff) as file:
        for i, step in enumerate((1, 4)):
            file.write(
                pixels[::step, ::step],
                photometric="rgb",
                tile=(128, 128),
                compression=compression,
                description=description,
                metadata=None,
                subfiletype=1 if i else 0,
                resolution=(20_000 / step, 20_000 / step),
                resolutionunit="CENTIMETER",
            )
    return out.getvalue()


def image(kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(300)).save(out, kind)
    return out.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def mrxs() -> dict[str, bytes]:
    """The files of an MRXS slide as far as its text goes."""
    text = "[GENERAL]\nSLIDE_VERSION = 01.02\nSLIDE_ID = 1F\nIMAGENUMBER_X = 4\nIMAGENUMBER_Y = 4\n"
    text += "OBJECTIVE_MAGNIFICATION = 20\nCameraImageDivisionsPerSide = 1\n[HIERARCHICAL]\nHIER_COUNT = 1\n"
    text += "NONHIER_COUNT = 0\nINDEXFILE = Index.dat\nHIER_0_NAME = Slide zoom level\nHIER_0_COUNT = 1\n"
    text += "HIER_0_VAL_0_SECTION = LAYER_0_LEVEL_0_SECTION\n[DATAFILE]\nFILE_COUNT = 1\nFILE_0 = Data0000.dat\n"
    text += "[LAYER_0_LEVEL_0_SECTION]\nOVERLAP_X = 0\nOVERLAP_Y = 0\nMICROMETER_PER_PIXEL_X = 0.5\n"
    text += (
        "MICROMETER_PER_PIXEL_Y = 0.5\nIMAGE_FORMAT = JPEG\nIMAGE_FILL_COLOR_BGR = 16777215\nDIGITIZER_WIDTH = 256\n"
    )
    text += "DIGITIZER_HEIGHT = 256\nIMAGE_CONCAT_FACTOR = 0\n"
    index = b"01.021F" + bytes(30) + struct.pack("<8I", 41, 0, 53, 0, 0, 1, 0, 0)
    data = image("JPEG")
    return {
        "a.mrxs": data,
        "a/Slidedat.ini": b"\xef\xbb\xbf" + text.encode(),
        "a/Index.dat": index,
        "a/Data0000.dat": data,
    }


def vms() -> dict[str, bytes]:
    text = (
        "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\nImageFile=a.jpg\nMapFile=map.jpg\n"
    )
    text += (
        "OptimisationFile=a.opt\nMacroImage=macro.jpg\nPhysicalWidth=1000000\nPhysicalHeight=1000000\nSourceLens=20\n"
    )
    return {"a.vms": text.encode(), "a.jpg": image("JPEG"), "map.jpg": image("JPEG"), "macro.jpg": image("JPEG")}


def features(folder: Path, kind: str) -> bytes:
    """A file of 40 patches with 16 features each, in the layout of others or ours."""
    path = folder / f"made.{kind}"
    rows = np.random.default_rng(0).random((40, 16), dtype=np.float32)
    coords = np.stack([np.arange(40) % 8 * 224, np.arange(40) // 8 * 224], 1).astype(np.int32)
    if kind == "h5":
        with h5py.File(path, "w") as file:
            file["features"], file["coords"] = rows, coords
            file["coords"].attrs["patch_size_level0"] = 224
    elif kind == "npy":
        np.save(path, rows)
    else:
        save_bag(Bag(torch.from_numpy(rows), torch.from_numpy(coords), 224, 0.5, "x", "slide 1"), path)
    return path.read_bytes()


REGION = {"type": "Polygon", "coordinates": [[[0, 0], [900, 0], [900, 900], [0, 900], [0, 0]]]}
ROWS = [
    {"slide": "s", "question": "Which tissue?", "options": ["liver", "skin"], "answer": "skin", "category": "tissue"}
]
TABLE = (
    "Slide,Question,A,B,C,D,Answer,Broad Category\ns1,Which?,liver,skin,lung,bone,B,Organ\ns2,Which?,a,b,c,d,A,Organ\n"
)


def seeds(folder: Path, dicom: Path | None) -> dict[str, tuple[str, bytes]]:
    """kind -> (name of the file, a good one)."""
    aperio = "Aperio Image Library v11.2.1\r\n768x768 [0,0 768x768] (128x128) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
    made = {
        "svs": ("slide.svs", tiff("jpeg", aperio)),
        "tiff": ("slide.tiff", tiff("zlib")),
        "bigtiff": ("slide.tif", tiff("jpeg", bigtiff=True)),
        "png": ("slide.png", image("PNG")),
        "jpeg": ("slide.jpg", image("JPEG")),
        "mrxs": ("slide.zip", b""),  # packed once its parts are damaged
        "vms": ("slide.zip", b""),
        "h5": ("bag.h5", features(folder, "h5")),
        "npy": ("bag.npy", features(folder, "npy")),
        "safetensors": ("bag.safetensors", features(folder, "safetensors")),
        "geojson": ("regions.geojson", json.dumps({"type": "Feature", "geometry": REGION}).encode()),
        "csv": ("questions.csv", TABLE.encode()),
        "json": ("questions.json", json.dumps(ROWS).encode()),
    }
    if dicom is not None:
        files = {file.name: file.read_bytes() for file in sorted(dicom.iterdir())}
        made["dicom"] = ("slide.zip", zipped(files))
    return made


# ---- damage


def damage(data: bytes, rng: random.Random, text: bool) -> bytes:
    """One to four changes: bits, pieces, numbers that lie, words."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not out:
            break
        at = _place(out, rng)
        piece = out[at : at + rng.choice((1, 4, 64, 4096))]
        match rng.choice(("bits", "lie", "cut", "swap", "zeros", "again", *(["word"] * 6 if text else ["lie"] * 3))):
            case "bits":
                for _ in range(rng.randint(1, 30)):
                    out[_place(out, rng)] ^= 1 << rng.randrange(8)
            case "lie":
                size, order = rng.choice((2, 4, 4, 8)), rng.choice("<<>")
                lie = rng.choice(LIES) % 2 ** (8 * size)
                at = at // 2 * 2
                out[at : at + size] = struct.pack(order + {2: "H", 4: "I", 8: "Q"}[size], lie)
            case "cut":
                del out[at:]
            case "swap":
                other = _place(out, rng)
                out[at : at + len(piece)], out[other : other + len(piece)] = out[other : other + len(piece)], piece
            case "zeros":
                out[at : at + len(piece)] = bytes(len(piece))
            case "again":
                out[at:at] = piece
            case "word":
                tokens = list(re.finditer(rb"[^\s,:=\[\]{}\"]+", bytes(out)))
                if tokens:
                    found = rng.choice(tokens)
                    out[found.start() : found.end()] = rng.choice(WORDS).encode("utf-8", "surrogatepass")
    return bytes(out)


def _place(data: bytes | bytearray, rng: random.Random) -> int:
    """Somewhere, mostly where headers stand: at the beginning and the end."""
    size, near = len(data), min(len(data), 1024)
    return rng.choice((rng.randrange(size), rng.randrange(near), size - 1 - rng.randrange(near)))


def make_input(kind: str, good: tuple[str, bytes], number: int, seed: int, folder: Path) -> Path:
    """The damaged input of a case, in a new folder; number 0 is a good one."""
    rng = random.Random(f"{seed} {kind} {number}")
    folder.mkdir(mode=0o700)
    name, data = good
    if not number and kind not in ("mrxs", "vms"):  # of these the text alone is right
        pass
    elif kind in ("mrxs", "vms"):
        files = mrxs() if kind == "mrxs" else vms()
        broken = rng.choice([part for part in files if part != "a.mrxs"])
        files[broken] = damage(files[broken], rng, broken.endswith((".ini", ".vms")))
        data = zipped(files) if rng.random() < 0.9 else damage(zipped(files), rng, False)
    elif kind == "dicom" and rng.random() < 0.8:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            data = zipped({part: damage(archive.read(part), rng, False) for part in archive.namelist()})
    else:
        data = damage(data, rng, kind in ("geojson", "csv", "json", "svs"))
        if kind == "png" and rng.random() < 0.5:
            data = _mend_checksums(data)
    (folder / name).write_bytes(data)
    return folder / name


def _mend_checksums(data: bytes) -> bytes:
    """A PNG whose chunks are believed."""
    out, at = data[:8], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + min(length, len(data))]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return out + data[at:]


# ---- reading


def read_slide(path: Path) -> None:
    """All that the app does with a stranger's slide. Raises ValueError for what is refused."""
    root = path.parent
    if path.suffix == ".zip":
        path = unpack(path, root / "unpacked")
    with open_confined(path, root=root) as slide:
        assert slide.name.startswith(("slide ", "phantom ")), slide.name
        reads: list[Callable[[], Any]] = [lambda: slide.thumbnail(512)]
        for level in range(min(len(slide.level_sizes), 8)):
            for part in (0.0, 0.5, 0.99):
                corner = (slide.size[0] * part, slide.size[1] * part)
                reads.append(lambda level=level, corner=corner: slide.read_level(level, corner, (64, 64)))
        if slide.mpp is not None:
            reads.append(lambda: slide.read_batch([(0, 0), (200, 200)], (64, 64), slide.require_mpp()))
            reads.append(lambda: patch_coords(slide, max(0.5, slide.require_mpp()), 224))
        for read in reads:
            try:
                read()
            except ValueError as error:
                check_sentence(str(error), path)


BAG = Bag(
    torch.zeros(9, 4), torch.arange(18).reshape(9, 2) * 100, 224, 0.5, "x", "slide 1", 0.5, "openslide", (2000, 2000)
)


def read_input(kind: str, path: Path) -> None:
    """Raises ValueError for what is refused."""
    if kind in ("h5", "npy", "safetensors"):
        load_bag(path)
    elif kind == "geojson":
        read_regions(path, BAG)
    elif kind in ("csv", "json"):
        questions.read([path])
    else:
        read_slide(path)


def check_sentence(text: str, path: Path) -> None:
    assert text.strip(), "an empty sentence"
    assert len(text) < 2000, f"a sentence of {len(text)} characters"
    assert str(path.parent) not in text, f"the sentence tells the path: {text}"


def _work(tasks: Any, results: Any) -> None:
    """A worker: does cases until there are none."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while True:
        kind, good, number, seed, folder = tasks.recv()
        path = make_input(kind, good, number, seed, folder)
        began, what = time.monotonic(), "read"
        try:
            read_input(kind, path)
        except ValueError as error:
            what = "refused"
            try:
                check_sentence(str(error), path)
            except AssertionError as wrong:
                what = f"failed: {wrong}"
        except BaseException as error:
            what = f"failed: {type(error).__name__}: {error}"
        shutil.rmtree(folder, ignore_errors=True)
        results.send((what, time.monotonic() - began))


@dataclass
class Outcome:
    """What came of the cases of one kind."""

    read: int = 0
    refused: int = 0
    longest: float = 0.0
    failed: list[str] = field(default_factory=list)


class Worker:
    """A process that reads inputs, and the next one after a crash or a hang."""

    def __init__(self) -> None:
        self._process: Any = None

    def do(self, task: tuple) -> tuple[str, float]:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            (ours, theirs), (results, give) = context.Pipe(), context.Pipe()
            self._process = context.Process(target=_work, args=(theirs, give), daemon=True)
            self._process.start()
            theirs.close()
            give.close()
            self._tasks, self._results = ours, results
        self._tasks.send(task)
        try:
            if self._results.poll(3 * confined.PATIENCE):
                return self._results.recv()
            what = "failed: it hangs"
        except EOFError:
            self._process.join()
            what = f"failed: the process ended with {self._process.exitcode}"
        self.close()
        return what, 0.0

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


class Watch:
    """Whether a folder's files are opened, by whatever process: Linux's inotify. Elsewhere it sees nothing."""

    def __init__(self, folder: Path) -> None:
        self._events = -1
        if sys.platform == "linux":
            libc = ctypes.CDLL(None, use_errno=True)
            self._events = libc.inotify_init1(os.O_NONBLOCK)
            libc.inotify_add_watch(self._events, os.fsencode(folder), 0x20)  # IN_OPEN

    def saw(self) -> bool:
        try:
            return self._events >= 0 and bool(os.read(self._events, 4096))
        except BlockingIOError:
            return False


def fuzz(
    kinds: dict[str, tuple[str, bytes]],
    folder: Path,
    seconds: float,
    seed: int,
    first: int = 0,
    most: int = sys.maxsize,
) -> dict[str, Outcome]:
    """Cases of all kinds in turn, from number `first` on, until the time is over or each has had `most`."""
    private = folder / "private"
    private.mkdir()
    (private / "secret.jpg").write_bytes(image("JPEG"))
    watch, worker = Watch(private), Worker()
    outcomes = {kind: Outcome() for kind in kinds}
    ends, number = time.monotonic() + seconds, first
    try:
        while time.monotonic() < ends and number < first + most:
            for kind, good in kinds.items():
                if time.monotonic() > ends:
                    break
                found = outcomes[kind]
                what, took = worker.do((kind, good, number, seed, folder / "session"))
                shutil.rmtree(folder / "session", ignore_errors=True)
                what = "failed: the file beside its folder was opened" if watch.saw() else what
                if not number and what == "refused" and kind not in ("mrxs", "vms"):
                    what = "failed: the good one was refused"
                what = f"failed: it took {took:.0f} s" if took > SLOW and "failed" not in what else what
                found.longest = max(found.longest, took)
                found.read += what == "read"
                found.refused += what == "refused"
                if what.startswith("failed"):
                    found.failed.append(f"{kind} {number}: {what}")
            number += 1
    finally:
        worker.close()
    return outcomes


def opened_outside(log: Path, folder: Path) -> Iterator[str]:
    """Files that processes opened, by strace's log, after they had been walled in, and that are not theirs."""
    libraries = tuple(str(path) for path in confined.sandbox._libraries())
    walled: set[str] = set()
    for line in log.read_text(errors="replace").splitlines():
        process, _, call = line.partition(" ")
        if "landlock_restrict_self(" in call and call.endswith("= 0"):
            walled.add(process)
        found = re.search(r'open(?:at2?)?\((?:AT_FDCWD, )?"([^"]*)".*= \d+', call)
        if process in walled and found and not found[1].startswith((str(folder / "session"), *libraries)):
            yield found[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--dicom", type=Path, help="folder of a DICOM slide, which we cannot write")
    parser.add_argument("--strace", action="store_true", help="look at every file that is opened; slow")
    flags = parser.parse_args()
    if flags.strace and "SPARSEWSI_TRACED" not in os.environ:
        with tempfile.TemporaryDirectory() as name:
            log, environment = Path(name) / "log", {**os.environ, "SPARSEWSI_TRACED": name}
            trace = ["strace", "-f", "-qq", "-e", "trace=open,openat,openat2,landlock_restrict_self", "-o", str(log)]
            status = subprocess.run([*trace, sys.executable, "-m", "benchmarks.fuzz", *sys.argv[1:]], env=environment)
            outside = set(opened_outside(log, Path(name)))
            print(f"opened by children outside of their folder and libraries: {sorted(outside) or 'nothing'}")
            return status.returncode or bool(outside)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(os.environ.get("SPARSEWSI_TRACED", name))
        kinds = seeds(folder, flags.dicom)
        kinds = {kind: good for kind, good in kinds.items() if not flags.only or kind in flags.only}
        one = flags.case is not None
        outcomes = fuzz(kinds, folder, flags.seconds, flags.seed, flags.case if one else 0, 1 if one else sys.maxsize)
    print("| kind | cases | read | refused | failed | longest, s |\n|---|---|---|---|---|---|")
    for kind, found in outcomes.items():
        counts = f"{found.read} | {found.refused} | {len(found.failed)} | {found.longest:.1f}"
        print(f"| {kind} | {found.read + found.refused + len(found.failed)} | {counts} |")
    for line in [line for found in outcomes.values() for line in found.failed]:
        print(line)
    return any(found.failed for found in outcomes.values())


if __name__ == "__main__":
    sys.exit(main())
