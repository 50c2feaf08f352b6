"""Hostile files and requests against the real app, on this machine, while somebody else keeps asking.

    python -m benchmarks.hostile [--model assets/demo-model] [--rounds 2] [--seed 0] [--only NAME ...]

Starts the app in its own process and attacks it in random order, as often as --rounds says. Files are opened as the
page does (path field, then the slide, then its analysis) and, unless large, uploaded through the API; requests are sent
as a program would. A second session asks about the example every few seconds meanwhile. Prints a row for each: what,
the sentence or status, seconds, highest memory of the app with all its children, and the longest wait of the second
session; then whether the app still lives and answers. Linux; needs psutil. It talks to 127.0.0.1 alone.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import tifffile
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


def huge_middle_level(path: Path) -> None:
    """Levels of 720,000, 90,000 and 1,000 px; the first two are one tile each, which no memory holds."""
    pixels, rng = np.full((64, 64, 3), 200, np.uint8), np.random.default_rng(0)
    with tifffile.TiffWriter(path) as tiff:
        for i, level in enumerate((pixels, pixels, rng.integers(150, 256, (1000, 1000, 3), dtype=np.uint8))):
            kind = {"photometric": "rgb", "tile": (64, 64), "compression": "zlib", "metadata": None}
            tiff.write(level, subfiletype=1 if i else 0, resolution=(2e4, 2e4), resolutionunit="CENTIMETER", **kind)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        pages: Any = tiff.pages
        for page, side in ((0, 720_000), (1, 90_000)):
            for tag in ("ImageWidth", "ImageLength", "TileWidth", "TileLength"):
                pages[page].tags[tag].overwrite(side, dtype="I")


def leads_out(path: Path, kind: str) -> None:
    """A zip of a slide whose text names a file outside."""
    if kind == "vms":
        parts = {"a.vms": b"[Virtual Microscope Specimen]\nNoLayers=1\nImageFile=../../../private.jpg\nMapFile=m.jpg\n"}
    else:
        text = (
            b"[GENERAL]\nSLIDE_ID = 1\n[HIERARCHICAL]\nINDEXFILE = ../../../private.dat\n[DATAFILE]\nFILE_COUNT = 1\n"
        )
        parts = {"a.mrxs": b"\xff\xd8\xff", "a/Slidedat.ini": text + b"FILE_0 = /etc/hostname\n"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


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
        "PNG of 13,000 px": ("large.png", lambda path: png_bomb(path, 13_000)),
        "middle level of 90,000 px": ("middle.tiff", huge_middle_level),
        "VMS that leads out": ("vms.zip", lambda path: leads_out(path, "vms")),
        "MRXS that leads out": ("mrxs.zip", lambda path: leads_out(path, "mrxs")),
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
        page.call("on_typed_path", str(path))
        page.call("on_slide", None, "")
        return str(page.call("on_slide_shown", None, None, "")[2])
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


# ---- requests


def post(address: str, path: str, **body: Any) -> str:
    answer = httpx.post(f"{address}/gradio_api/{path}", timeout=60, **body)
    return f"{answer.status_code} {answer.text[:120]}"


def get(address: str, path: str, **headers: str) -> str:
    answer = httpx.get(f"{address}/{path}", timeout=60, headers=headers)
    return f"{answer.status_code} {answer.text[:60].strip()}"


def asked(address: str, name: str, *given: Any) -> str:
    """What the API answers to a call."""
    client = Client(address, verbose=False)
    try:
        return str(client.predict(*given, api_name=name))
    except Exception as error:
        return str(error)
    finally:
        client.close()


def named(address: str, path: str) -> str:
    """A file of the server named as if it had been uploaded."""
    try:
        return str(
            Page(address).call("analyze", "", {"path": path, "meta": {"_type": "gradio.FileData"}}, 0, "learned")
        )
    except ValueError as error:
        return str(error)


def queued(address: str) -> str:
    """A thousand events of one session at once."""
    body = {"data": ["phantom", None, 0, "learned"], "fn_index": handler(address, "analyze"), "session_hash": "many"}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: post(address, "queue/join", json=body)[:3], range(1000)))
    return ", ".join(f"{count} times {status}" for status, count in Counter(answers).items())


def gone(address: str) -> str:
    """Who asks for an analysis and leaves; the seconds until the next one's has begun."""
    page = Page(address)
    body = {
        "data": ["phantom", None, 0.3, "learned"],
        "fn_index": page.handlers["analyze"],
        "session_hash": page.session,
    }
    page.client.post(f"{address}/gradio_api/queue/join", json=body)
    try:
        with page.client.stream(
            "GET", f"{address}/gradio_api/queue/data", params={"session_hash": page.session}, timeout=3
        ) as stream:
            list(stream.iter_lines())
    except httpx.TimeoutException:
        pass
    began = time.perf_counter()
    asked(address, "/ask", "nothing", "Which?")
    return f"the next caller was answered after {time.perf_counter() - began:.1f} s"


def handler(address: str, name: str) -> int:
    return Page(address).handlers[name]


def requests(address: str, case: str) -> dict[str, Callable[[], str]]:
    """name -> what sends it and says what came back."""
    tile = f"gradio_api/slide/{case}"
    url = {"path": "http://127.0.0.1:9/secret", "meta": {"_type": "gradio.FileData"}}
    body = {"data": ["", url, 0, "learned"], "session_hash": "files", "fn_index": handler(address, "analyze")}
    return {
        "tile of level 999999999": lambda: get(address, f"{tile}/999999999/0_0.jpg"),
        "tile of level 99": lambda: get(address, f"{tile}/99/0_0.jpg"),
        "tile far outside": lambda: get(address, f"{tile}/0/9999999_9999999.jpg"),
        "patch of 9,999,999 px": lambda: get(address, f"{tile}/patch/0_0_9999999_9999999.jpg"),
        "1e-5 um/px": lambda: asked(address, "/analyze", "phantom", None, 1e-5),
        "32 um/px": lambda: asked(address, "/analyze", "phantom", None, 32),
        "NaN um/px": lambda: asked(address, "/analyze", "phantom", None, float("nan")),
        "question of 5,000 characters": lambda: asked(address, "/ask", case, "x" * 5000),
        "question of 3 MB": lambda: asked(address, "/ask", case, "x" * (3 << 20)),
        "100 options": lambda: asked(address, "/ask", case, "Which?", ["x"] * 100),
        "answer of 100,000 characters": lambda: asked(address, "/evidence", case, "Which?", "x" * 100_000),
        "another name": lambda: get(address, "", Host="evil.example"),
        "file= with a URL": lambda: get(address, "gradio_api/file=http://127.0.0.1:9/secret"),
        "FileData with a URL": lambda: post(address, "queue/join", json=body),
        "FileData with a folder": lambda: named(address, tempfile.gettempdir()),
        "FileData with /etc/hostname": lambda: named(address, "/etc/hostname"),
        "1,000 events at once": lambda: queued(address),
        "a caller who leaves": lambda: gone(address),
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/demo-model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names, as in the table")
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
                print("| what | s | peak GB | longest wait, s | sentence or status |\n|---|---|---|---|---|")
                attacks = dict(requests(address, case))
                for kind, (file, make) in files(folder).items():
                    path = folder / file
                    make(path)
                    attacks[f"{kind}, by path"] = lambda path=path: opened(Page(address), path)
                    if path.stat().st_size < UPLOAD_LIMIT:
                        attacks[f"{kind}, upload"] = lambda path=path: uploaded(address, path)
                rng = random.Random(options.seed)
                for _ in range(options.rounds):
                    for kind in rng.sample(list(attacks), len(attacks)):
                        if options.only and kind.split(", ")[0] not in options.only and kind not in options.only:
                            continue
                        watch.clear()
                        began = time.perf_counter()
                        sentence = " ".join(attacks[kind]().split())[:200]
                        took, wait = time.perf_counter() - began, watch.longest()
                        print(f"| {kind} | {took:.1f} | {watch.peak / 1e9:.2f} | {wait:.1f} | {sentence} |", flush=True)
            finally:
                watch.over = True
                for thread in threads:
                    thread.join()
            print(f"errors of the second session: {watch.errors}; the app lives: {process.is_running()}")


if __name__ == "__main__":
    main()
