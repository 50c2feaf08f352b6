"""Files that are no slides, or no harmless ones, opened in the real app while somebody else keeps asking.

    python -m benchmarks.hostile [--model assets/demo-model] [--only NAME ...]

Starts the app in its own process. Every file is opened as the page does (path field, then the slide, then its analysis)
and, unless it is large, uploaded through the API. A second session asks about the example every few seconds meanwhile.
Prints a table: seconds until the sentence, processor seconds of the process that looked first, highest memory of the
app with all its children, and the longest wait of the second session. Linux; needs psutil.
"""

from __future__ import annotations

import argparse
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from gradio_client import Client, handle_file

from benchmarks.sessions import QUESTION, Page
from sparsewsi import phantom

ROOT = Path(__file__).resolve().parents[1]
PAUSE = 3  # s between two questions of the second session
UPLOAD_LIMIT = 100 << 20  # bytes; larger files are opened by their path only


# ---- the files


def tiff_bomb(path: Path, side: int = 20_000, tile: int = 512, mpp: float | None = None) -> None:
    """A one-level TIFF of side x side px in some 20 kB: every tile is the same piece of the file."""
    count = -(-side // tile)
    grain = np.random.default_rng(0).integers(0, 40, (32, 32, 3), np.uint8)
    pixels = (np.tile(grain, (tile // 32, tile // 32, 1)) + np.array([180, 90, 140], np.uint8)).astype(np.uint8)
    data = zlib.compress(pixels.tobytes(), 9)
    per_cm = round(1e4 / mpp) if mpp else 1
    entries = [(256, 3, [side]), (257, 3, [side]), (258, 3, [8, 8, 8]), (259, 3, [8]), (262, 3, [2]), (277, 3, [3])]
    entries += [(282, 5, [per_cm, 1]), (283, 5, [per_cm, 1]), (296, 3, [3 if mpp else 1])]
    entries += [(322, 3, [tile]), (323, 3, [tile])]
    entries += [(324, 4, [8] * count**2), (325, 4, [len(data)] * count**2)]
    places, extra, end = [], b"", 8 + len(data) + len(data) % 2
    for tag, kind, values in entries:
        number = 1 if kind == 5 else len(values)
        packed = struct.pack("<" + {3: "H", 4: "I", 5: "I"}[kind] * len(values), *values)
        if len(packed) > 4:
            packed, extra = struct.pack("<I", end + len(extra)), extra + packed
        places.append(struct.pack("<HHI", tag, kind, number) + packed.ljust(4, b"\0"))
    directory = struct.pack("<H", len(places)) + b"".join(places) + struct.pack("<I", 0)
    body = data + b"\0" * (len(data) % 2) + extra
    path.write_bytes(b"II*\0" + struct.pack("<I", end + len(extra)) + body + directory)


def png_bomb(path: Path, side: int = 50_000) -> None:
    """A grey PNG of side x side px: 2.5 GB in 2.5 MB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def zipped(path: Path, name: str, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)


def damaged(path: Path, good: bytes, first: float, last: float) -> None:
    """The slide with a part of its bytes zeroed; its headers stand at the end of the file and stay."""
    first_byte, last_byte = int(first * len(good)), int(last * len(good))
    path.write_bytes(good[:first_byte] + bytes(last_byte - first_byte) + good[last_byte:])


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(4 << 30)


def files(folder: Path) -> dict[str, tuple[str, Callable[[Path], object]]]:
    """name -> (file name, what writes it)."""
    phantom.write_phantom(folder / "good.tiff", seed=3, size=4096)
    good = (folder / "good.tiff").read_bytes()
    for made in folder.glob("good*"):
        made.unlink()
    return {
        "junk": ("junk.svs", lambda path: path.write_bytes(os.urandom(200_000))),
        "empty": ("empty.svs", lambda path: path.write_bytes(b"")),
        "truncated": ("truncated.tiff", lambda path: path.write_bytes(good[: len(good) // 2])),
        "zeroed tiles": ("zeroed.tiff", lambda path: damaged(path, good, 0.2, 0.6)),
        "TIFF bomb": ("bomb.tiff", tiff_bomb),
        "TIFF bomb, 0.5 um/px": ("bomb_mpp.tiff", lambda path: tiff_bomb(path, mpp=0.5)),
        "PNG bomb": ("bomb.png", png_bomb),
        "zip with ..": ("escape.zip", lambda path: zipped(path, "../../escape.svs", b"junk")),
        "zip bomb": ("bomb.zip", lambda path: zipped(path, "slide.svs", bytes(400 << 20))),
        "4 GB sparse": ("sparse.svs", sparse),
    }


# ---- the app and its visitors


@contextmanager
def served(model: str, home: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The app in its own process: its address and the process."""
    environment = {**os.environ, "TMPDIR": str(home), "PYTHONUNBUFFERED": "1"}
    environment.pop("GRADIO_TEMP_DIR", None)
    command = [sys.executable, "app.py", "--model", model]
    with (home / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:
        while process.poll() is None and "served at" not in (home / "out").read_text():
            time.sleep(0.2)
        found = re.search(r"served at (\S+)", (home / "out").read_text())
        assert found, (home / "out").read_text()
        yield found[1].rstrip("/"), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def opened(page: Page, path: Path) -> str:
    """The sentence about a slide: what is wrong with it, or what the page says of it."""
    try:
        page.call("open_path", str(path))
        page.call("show", None, "")
        return str(page.call("look", None, None, "")[2])
    except ValueError as error:
        return str(error)


def uploaded(address: str, path: Path) -> str:
    client = Client(address, verbose=False)
    try:
        found = client.predict(file=handle_file(str(path)), api_name="/analyze")
        return " ".join([found["summary"], *found["doubts"]])
    except Exception as error:
        return str(error)
    finally:
        client.close()


@dataclass
class Watch:
    """Memory of the app and the second session's waits, both since `clear`."""

    process: psutil.Process
    peak: int = 0  # bytes
    waits: tuple[float, ...] = ()  # s
    asking_since: float = 0.0
    errors: int = 0
    over: bool = False

    def clear(self) -> None:
        self.peak, self.waits = 0, ()

    def longest(self) -> float:
        now = time.perf_counter() - self.asking_since if self.asking_since else 0.0
        return max([now, *self.waits])

    def weigh(self) -> None:
        while not self.over:
            total = 0
            for process in [self.process, *self.process.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total)
            time.sleep(0.05)

    def ask(self, client: Client, case: str) -> None:
        while not self.over:
            self.asking_since = time.perf_counter()
            try:
                client.predict(case, *QUESTION, api_name="/ask")
            except Exception as error:
                self.errors += 1
                print(f"second session: {error}", file=sys.stderr)
            self.waits = (*self.waits, time.perf_counter() - self.asking_since)
            self.asking_since = 0.0
            time.sleep(PAUSE)

    def children_seconds(self) -> float:
        """Processor seconds of the app's children that have ended."""
        times = self.process.cpu_times()
        return times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description="Hostile files against the real app.")
    parser.add_argument("--model", default="assets/demo-model")
    parser.add_argument("--only", nargs="*", help="names of files, as in the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with served(options.model, folder) as (address, process):
            second = Client(address, verbose=False)
            case = second.predict(api_name="/analyze")["case"]
            second.predict(case, *QUESTION, api_name="/ask")
            watch = Watch(process)
            threads = [threading.Thread(target=watch.weigh), threading.Thread(target=watch.ask, args=(second, case))]
            for thread in threads:
                thread.start()
            try:
                time.sleep(4 * PAUSE)
                print(f"at rest: {watch.peak / 1e9:.2f} GB, longest wait {watch.longest():.1f} s")
                print("| file | opened by | s | CPU s of the look | peak GB | longest wait, s | sentence |")
                print("|---|---|---|---|---|---|---|")
                for kind, (file, make) in files(folder).items():
                    if options.only and kind not in options.only:
                        continue
                    path = folder / file
                    make(path)
                    ways = {"path": lambda path=path: opened(Page(address), path)}
                    if path.stat().st_size < UPLOAD_LIMIT:
                        ways["upload"] = lambda path=path: uploaded(address, path)
                    for way, deed in ways.items():
                        watch.clear()
                        before, began = watch.children_seconds(), time.perf_counter()
                        sentence = deed()
                        took = time.perf_counter() - began
                        cells = f"{took:.1f} | {watch.children_seconds() - before:.1f} | {watch.peak / 1e9:.2f}"
                        print(f"| {kind} | {way} | {cells} | {watch.longest():.1f} | {sentence} |", flush=True)
                    path.unlink()
            finally:
                watch.over = True
                for thread in threads:
                    thread.join()
            print(f"errors of the second session: {watch.errors}")


if __name__ == "__main__":
    main()
