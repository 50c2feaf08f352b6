"""Damaged and lying inputs: each is read or refused with a sentence; nothing crashes, hangs or looks around.

    python -m benchmarks.fuzz [--seconds 3600] [--seed 0] [--only svs png ...] [--dicom FOLDER] [--strace] [--log FILE]

Slides are opened as the app opens a stranger's, in a child that sees their folder alone, and looked at on every level;
feature files, questions and regions are read in this process, in a worker that is started anew after a crash. The next
folder holds a file that the inputs try to name: that nobody opened it is seen by inotify (Linux), and with --strace
every file that a child opened is looked at. A case is a kind and a number; `--only KIND --case NUMBER` repeats it.
With --log every case is a line of that file, and a run that was stopped goes on where it was.
Prints a table, and what failed; exits with 1 if anything did.
"""

import argparse
import ctypes
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
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import make_image, make_inputs, pack, picture
from sparsewsi import Bag, load_bag
from sparsewsi.files import append_line, read_lines
from sparsewsi.report.qupath import read_regions
from sparsewsi.slides import confined
from sparsewsi.slides.confined import open_confined
from sparsewsi.slides.tissue import patch_coords
from sparsewsi.web.intake import unpack
from train.data import questions

SLOW = 20.0  # s of processor time for one input, of the worker and the child that reads a slide
PATIENCE = 900.0  # s of wall clock for one input; others may use the machine as well
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


# ---- damage


Good = tuple[str, bytes | dict[str, bytes]]  # name of a file, and its content or its parts in a zip


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
                _lie(out, at // 2 * 2, rng)
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


def _lie(out: bytearray, at: int, rng: random.Random) -> None:
    size, order = rng.choice((2, 4, 4, 8)), rng.choice("<<>")
    out[at : at + size] = struct.pack(order + {2: "H", 4: "I", 8: "Q"}[size], rng.choice(LIES) % 2 ** (8 * size))


def lie_in_tiff(data: bytes, rng: random.Random) -> bytes:
    """A TIFF of little endian with one to three entries of its directories changed: tag, type, count or value."""
    out, big = bytearray(data), data[2] == 43
    width, entry, number = (8, 20, "<Q") if big else (4, 12, "<I")
    at, entries = struct.unpack_from(number, data, 8 if big else 4)[0], []
    while 0 < at < len(data) - 8:
        count = struct.unpack_from("<Q" if big else "<H", data, at)[0]
        first = at + (8 if big else 2)
        entries += range(first, first + entry * count, entry)
        at = struct.unpack_from(number, data, first + entry * count)[0]
    for _ in range(rng.randint(1, 3)):
        place = rng.choice(entries) + rng.choice((0, 2, 4, 4 + width, 4 + width))
        _lie(out, place, rng)
    return bytes(out)


def swap_chunks(data: bytes, rng: random.Random) -> bytes:
    """A PNG whose chunks are swapped, repeated, dropped or damaged, and whose checksums fit all the same."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    i, j = rng.randrange(len(chunks)), rng.randrange(len(chunks))
    match rng.choice(("swap", "again", "drop", "damage", "damage", "damage")):
        case "swap":
            chunks[i], chunks[j] = chunks[j], chunks[i]
        case "again":
            chunks.insert(j, chunks[i])
        case "drop":
            del chunks[i]
        case "damage":
            chunks[i] = (chunks[i][0], damage(chunks[i][1] or b"0", rng, False))
    body = [
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in chunks
    ]
    return data[:8] + b"".join(body)


def make_input(kind: str, good: Good, number: int, seed: int, folder: Path) -> Path:
    """The damaged input of a case, in a new folder; number 0 is the good one."""
    rng = random.Random(f"{seed} {kind} {number}")
    folder.mkdir(mode=0o700)
    name, content = good
    if isinstance(content, dict):
        files = dict(content)
        parts = [part for part in files if not part.endswith(".mrxs")]  # what a .mrxs itself holds is not read
        for part in rng.sample(parts, rng.randint(1, len(parts)) if kind == "dicom" else 1) if number else ():
            files[part] = damage(files[part], rng, part.endswith((".ini", ".vms")))
        data = pack(files)
        if number and rng.random() < 0.1:
            data = damage(data, rng, False)
    elif number and kind in ("svs", "tiff", "bigtiff") and rng.random() < 0.5:
        data = lie_in_tiff(content, rng)
    elif number and kind == "png" and rng.random() < 0.5:
        data = swap_chunks(content, rng)
    else:
        data = damage(content, rng, kind in ("geojson", "csv", "json", "svs")) if number else content
    (folder / name).write_bytes(data)
    return folder / name


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
        for row in questions.read([path])[1]:
            check_sentence(str(row), path)
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

    def used() -> float:
        both = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    while True:
        kind, good, number, seed, folder = tasks.recv()
        path = make_input(kind, good, number, seed, folder)
        began, what = used(), "read"
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
        results.send((what, used() - began))


@dataclass
class Outcome:
    """What came of the cases of one kind."""

    read: int = 0
    refused: int = 0
    longest: float = 0.0
    failed: list[str] = field(default_factory=list)

    def add(self, case: dict[str, Any]) -> None:
        self.read += case["what"] == "read"
        self.refused += case["what"] == "refused"
        self.longest = max(self.longest, case["took"])
        if case["what"].startswith("failed"):
            self.failed.append(f"{case['kind']} {case['number']}: {case['what']}")


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
            if self._results.poll(PATIENCE):
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
    kinds: dict[str, Good],
    folder: Path,
    seconds: float,
    seed: int,
    first: int = 0,
    most: int = sys.maxsize,
    log: Path | None = None,
) -> dict[str, Outcome]:
    """Cases of all kinds in turn, from number `first` on, until the time is over or each has had `most`.

    log: cases that are in it, with their seconds, are not done again
    """
    private = folder / "private"
    private.mkdir()
    (private / "secret.jpg").write_bytes(make_image(picture(300), "JPEG"))
    watch, worker = Watch(private), Worker()
    outcomes, done, spent = {kind: Outcome() for kind in kinds}, set(), 0.0
    for line in read_lines(log) if log is not None else ():
        if line["kind"] in outcomes:
            outcomes[line["kind"]].add(line)
            done.add((line["kind"], line["number"]))
            spent = max(spent, line["spent"])
    began, number = time.monotonic() - spent, first
    try:
        while time.monotonic() - began < seconds and number < first + most:
            for kind, good in kinds.items():
                if (kind, number) in done:
                    continue
                if time.monotonic() - began > seconds:
                    break
                what, took = worker.do((kind, good, number, seed, folder / "session"))
                shutil.rmtree(folder / "session", ignore_errors=True)
                if watch.saw():  # some other program may have looked around: it will not do so again just now
                    worker.do((kind, good, number, seed, folder / "session"))
                    shutil.rmtree(folder / "session", ignore_errors=True)
                    what = "failed: the file beside its folder was opened, twice" if watch.saw() else what
                what = "failed: the good one was refused" if not number and what == "refused" else what
                what = f"failed: it took {took:.0f} s" if took > SLOW and "failed" not in what else what
                line = {"kind": kind, "number": number, "what": what, "took": took, "spent": time.monotonic() - began}
                outcomes[kind].add(line)
                if log is not None:
                    append_line(log, line)
            number += 1
    finally:
        worker.close()
    return outcomes


def opened_outside(trace: Iterable[str], folder: Path) -> Iterator[str]:
    """Files that processes opened, by strace -y, after they had been walled in, and that are not theirs.

    A number is another process's or thread's when its first one has ended, which strace may tell before it tells that
    it began.
    """
    inside = (f"{folder / 'session'}/", *(f"{path}/" for path in confined.sandbox._libraries()))
    walled: set[str] = set()  # processes and their threads
    ended: dict[str, int] = {}  # when, by line
    for line_number, line in enumerate(trace):
        process, _, call = line.strip().partition(" ")
        call = call.strip()
        begun = re.search(r"\b(?:clone3?|v?fork)\b.* = (\d+)", call)
        if call.startswith("+++") or re.search(r"\bexecve\b", call):  # who is walled in starts no program
            walled.discard(process)
            ended[process] = line_number
        elif re.search(r"landlock_restrict_self\b.* = 0$", call):
            walled.add(process)
        elif begun and process not in walled:
            walled.discard(begun[1])
        elif begun and line_number - ended.get(begun[1], -1000) >= 1000:
            walled.add(begun[1])
        elif process in walled:
            found = re.search(r"\bopen(?:at2?)?\b.* = \d+<(.*)>$", call)
            if found and not f"{found[1]}/".startswith(inside):
                yield found[1]


def run_traced() -> int:
    """This program again, with every open of its processes looked at; the exit status."""
    with tempfile.TemporaryDirectory() as name:
        ours, theirs = os.pipe()
        command = [
            "strace",
            "-f",
            "--seccomp-bpf",
            "-y",
            "-q",
            "-e",
            "signal=KILL,XCPU,SEGV,ABRT,BUS,FPE,ILL",
            "-o",
            f"/dev/fd/{theirs}",
        ]
        command += ["-e", "trace=open,openat,openat2,clone,clone3,fork,vfork,execve,landlock_restrict_self"]
        command += [sys.executable, "-m", "benchmarks.fuzz", *sys.argv[1:]]
        process = subprocess.Popen(command, env={**os.environ, "SPARSEWSI_TRACED": name}, pass_fds=[theirs])
        os.close(theirs)
        with open(ours, errors="replace") as trace:
            outside = set(opened_outside(trace, Path(name)))
        print(f"opened by children outside of their folder and libraries: {sorted(outside) or 'nothing'}")
        return process.wait() or bool(outside)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--dicom", type=Path, help="folder of a DICOM slide, which we cannot write")
    parser.add_argument("--strace", action="store_true", help="look at every file that is opened; slow")
    parser.add_argument("--log", type=Path, help="where every case is written, and found again")
    flags = parser.parse_args()
    if flags.strace and "SPARSEWSI_TRACED" not in os.environ:
        return run_traced()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(os.environ.get("SPARSEWSI_TRACED", name))
        kinds = make_inputs(folder, flags.dicom)
        kinds = {kind: good for kind, good in kinds.items() if not flags.only or kind in flags.only}
        first, most = (0, sys.maxsize) if flags.case is None else (flags.case, 1)
        outcomes = fuzz(kinds, folder, flags.seconds, flags.seed, first, most, flags.log)
    print("| kind | cases | read | refused | failed | longest, CPU s |\n|---|---|---|---|---|---|")
    for kind, found in outcomes.items():
        counts = f"{found.read} | {found.refused} | {len(found.failed)} | {found.longest:.1f}"
        print(f"| {kind} | {found.read + found.refused + len(found.failed)} | {counts} |")
    for line in [line for found in outcomes.values() for line in found.failed]:
        print(line)
    return any(found.failed for found in outcomes.values())


if __name__ == "__main__":
    sys.exit(main())
