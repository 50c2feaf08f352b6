"""Hostile files and requests against the real app, on this machine, while somebody else keeps asking.

    python -m benchmarks.hostile [--model assets/demo-model] [--rounds 2] [--seed 0] [--only NAME ...]

Starts the app in its own process and attacks it in random order, as often as --rounds says. Files are opened as the
page does (path field, then the slide, then its analysis) and, unless large, uploaded through the API; requests are sent
as a program would; logins are tried on a second app, which asks for one and serves MCP. A second session asks about the
example every few seconds meanwhile. Prints a row for each: what, seconds, highest memory of the app with all its
children (shared pages once: PSS), how much longer than at rest the second session had to wait for an answer, and the
sentence or status; then what was over the limits, and whether the app still lives and answers. Linux; needs psutil. It
talks to 127.0.0.1 alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
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
PAUSE = 1  # s between two questions of the second session
LIMITS = (10.0, 1.5, 2.0)  # s, GB, s of wait
JSON = {"Content-Type": "application/json"}
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


def archive(path: Path, kind: str) -> None:
    """A zip that asks for more than a slide does."""
    if kind == "link":
        link = zipfile.ZipInfo("slide.svs")
        link.external_attr = 0o120777 << 16
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr(link, "/etc/passwd")
    elif kind == "entries":
        with zipfile.ZipFile(path, "w") as packed:
            for i in range(200_000):
                packed.writestr(zipfile.ZipInfo(f"{i:060d}"), b"")
    else:  # a dictionary of LZMA may take gigabytes
        with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as packed:
            packed.writestr("slide.svs", bytes(50 << 20))


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
        "PNG of 8,000 px": ("fair.png", lambda path: png_bomb(path, 8_000)),
        "middle level of 90,000 px": ("middle.tiff", huge_middle_level),
        "VMS that leads out": ("vms.zip", lambda path: leads_out(path, "vms")),
        "MRXS that leads out": ("mrxs.zip", lambda path: leads_out(path, "mrxs")),
        "zip with ..": ("escape.zip", lambda path: zipped(path, "../../escape.svs", b"junk")),
        "zip with a link": ("link.zip", lambda path: archive(path, "link")),
        "zip of 200,000 files": ("entries.zip", lambda path: archive(path, "entries")),
        "zip by LZMA": ("lzma.zip", lambda path: archive(path, "lzma")),
        "zip bomb": ("bomb.zip", lambda path: zipped(path, "slide.svs", bytes(400 << 20))),
        "4 GB sparse": ("sparse.svs", sparse),
    }


# ---- the app and its visitors


def launch(model: str, home: Path, *flags: str) -> tuple[subprocess.Popen, str]:
    """The app in its own process, and its address."""
    environment = {**os.environ, "TMPDIR": str(home), "PYTHONUNBUFFERED": "1"}
    environment.pop("GRADIO_TEMP_DIR", None)
    command = [sys.executable, "app.py", "--model", model, *flags]
    with (home / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    while process.poll() is None and "served at" not in (home / "out").read_text():
        time.sleep(0.2)
    found = re.search(r"served at (\S+)", (home / "out").read_text())
    assert found, (home / "out").read_text()
    return process, found[1].rstrip("/")


@contextmanager
def served(model: str, home: Path, *flags: str) -> Iterator[tuple[str, psutil.Process]]:
    """The app in its own process: its address and the process."""
    home.mkdir(exist_ok=True)
    process, address = launch(model, home, *flags)
    try:
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def opened(page: Page, path: Path) -> str:
    """The sentence about a slide: what is wrong with it, or what the page says of it."""
    try:
        page.call("on_typed_path", str(path), False)
        page.call("on_slide", None, "", None, None, None)
        return str(page.call("on_slide_shown", None, None, [])[2])
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
            Page(address).call(
                "analyze", "", {"path": path, "meta": {"_type": "gradio.FileData"}}, 0, "learned", None, None
            )
        )
    except ValueError as error:
        return str(error)


def queued(address: str, sessions: int) -> str:
    """A thousand events at once, of one session or of many."""
    body = {"data": ["phantom", None, 0, "learned", None, None], "fn_index": handler(address, "analyze")}
    names = [uuid.uuid4().hex for _ in range(sessions)]
    with ThreadPoolExecutor(16) as pool, httpx.Client(timeout=60) as sender:

        def join(i: int) -> int:
            named = {**body, "session_hash": names[i % sessions]}
            return sender.post(f"{address}/gradio_api/queue/join", json=named).status_code

        answers = list(pool.map(join, range(1000)))
    return ", ".join(f"{count} times {status}" for status, count in Counter(answers).items())


def sent(address: str, count: int, threads: int, send: Callable[[int], int | str]) -> str:
    """What came back, how often, when many do it at once."""
    with ThreadPoolExecutor(threads) as pool:
        answers = Counter(pool.map(send, range(count)))
    return ", ".join(f"{times} times {answer}" for answer, times in answers.items())


def crowded(address: str, what: str) -> str:
    """Many requests, each of which is small work for the sender and could be much for the server."""
    work = handler(address, "analyze")

    def join(i: int) -> int:
        name = uuid.uuid4().hex + "s" * (900_000 if what == "names" else 0)
        data = (
            "[" + ",".join(["[]"] * 300_000) + "]" if what == "lists" else '["phantom", null, 0, "learned", null, null]'
        )
        content = f'{{"data": {data}, "fn_index": {work}, "session_hash": "{name}"}}'
        where = f"{address}/gradio_api/queue/join"
        return httpx.post(where, content=content, headers=JSON, timeout=60).status_code

    if what == "pages":
        return sent(address, 100, 16, lambda _: httpx.get(address, timeout=60).status_code)
    return sent(address, 100 if what == "names" else 20, 8, join)


@contextmanager
def lines(address: str, count: int, said: bytes = b"") -> Iterator[list[socket.socket]]:
    """Connections on which so much was said, and which read next to nothing."""
    host, port = address.removeprefix("http://").split(":")
    opened: list[socket.socket] = []
    try:
        for _ in range(count):
            opened.append(socket.create_connection((host, int(port)), timeout=10))
            opened[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            opened[-1].sendall(said)
        yield opened
    finally:
        for line in opened:
            line.close()


def silent(address: str, kind: str) -> str:
    """Connections that are held and not used, and what a request is answered beside them."""
    head = b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    if kind == "pages":
        head = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    if kind == "uploads":
        head = (
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        )
        head += b"Content-Length: 1000000\r\n\r\n--x\r\n"
    with lines(address, {"requests": 900, "pages": 40, "uploads": 40}[kind], head):
        time.sleep(2)
        return get(address, "gradio_api/app_id")


def deaf(address: str) -> str:
    """Analyses whose pages are open and whose answers nobody reads."""
    body = {"data": ["phantom", None, 0, "learned", None, None], "fn_index": handler(address, "analyze")}
    with ExitStack() as kept:
        for _ in range(8):
            name = uuid.uuid4().hex
            for path in (f"heartbeat/{name}", f"queue/data?session_hash={name}"):
                said = f"GET /gradio_api/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
                kept.enter_context(lines(address, 1, said))
            answer = httpx.post(f"{address}/gradio_api/queue/join", json={**body, "session_hash": name}, timeout=60)
        time.sleep(3)
    return str(answer.status_code)


class Visitor(Page):
    """Somebody who opens the phantom and asks about it, as the page does."""

    def __init__(self, address: str, mpp: str = ""):
        super().__init__(address)
        self.call("on_choose", False, told={"name": "phantom"})
        self.call("on_slide", None, mpp, None, None, None)

    def join(self, name: str, *data: object, told: dict | None = None) -> None:
        body = {"data": data, "fn_index": self.handlers[name], "session_hash": self.session, "event_data": told}
        self.client.post(f"{self.address}/gradio_api/queue/join", json=body).raise_for_status()

    def leave_after(self, seconds: float) -> None:
        """Listen for so long, then go."""
        try:
            where = f"{self.address}/gradio_api/queue/data"
            with self.client.stream("GET", where, params={"session_hash": self.session}, timeout=seconds) as stream:
                ends = time.monotonic() + seconds
                for _ in stream.iter_lines():
                    if time.monotonic() > ends:
                        break
        except httpx.TimeoutException:
            pass

    def asked(self) -> list:
        """The chat with a question that calls for a long answer."""
        self.call("on_slide_shown", None, None, [])
        return self.call(
            "on_question", "Describe everything that you see in great detail.", "", "", None, None, [], None
        )[0]


def gone(address: str, process: psutil.Process, doing: str) -> str:
    """Who asks for something and leaves in the middle of it; what the app still does three seconds later."""
    visitor = Visitor(address, "0.3" if doing == "analysing" else "")  # at another resolution nothing is cached
    if doing == "analysing":
        visitor.join("on_slide_shown", None, None, [])
        visitor.leave_after(4)
    else:
        chat = visitor.asked()
        visitor.join(*{"answering": ("on_asked", None, chat, None, None), "mapping": ("on_map_wanted", None)}[doing])
        visitor.leave_after(1.5)
    time.sleep(2)
    before = busy_seconds(process)
    time.sleep(1)
    return f"{busy_seconds(process) - before:.1f} processor seconds in the third second after"


def busy_seconds(process: psutil.Process) -> float:
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.cpu_times().user + one.cpu_times().system
        except psutil.NoSuchProcess:
            continue
    return total


def told(address: str, event: str, data: dict, times: int = 1) -> str:
    """Events of the viewer."""
    visitor = Visitor(address)
    if event == "on_picks":
        visitor.call("on_slide_shown", None, None, [])
    answers: Counter[str] = Counter()
    for _ in range(times):
        try:
            visitor.join(event, *([None] if event == "on_picks" else []), told=data)
            with visitor.client.stream(
                "GET", f"{address}/gradio_api/queue/data", params={"session_hash": visitor.session}
            ) as lines:
                said = [json.loads(line[5:]) for line in lines.iter_lines() if line.startswith("data:")]
            done = next(message for message in said if message["msg"] == "process_completed")
            answers[str(done["output"].get("error") or "taken")] += 1
        except httpx.HTTPStatusError as error:
            answers[f"{error.response.status_code} {error.response.text[:80]}"] += 1
    return ", ".join(f"{count} times: {words}" for words, count in answers.items())


def chatted(address: str, turns: int) -> str:
    """A question at the end of a chat that no page has written."""
    visitor = Visitor(address)
    visitor.call("on_slide_shown", None, None, [])
    chat = [{"role": ("user", "assistant")[i % 2], "content": ""} for i in range(turns)]
    try:
        return str(visitor.call("on_question", "Which tissue is this?", "", "", None, None, chat, None))
    except (ValueError, httpx.HTTPStatusError) as error:
        return str(error)


def regions(address: str, folder: Path, kind: str) -> str:
    """GeoJSON of more than anybody draws."""
    square = [[0, 0], [0, 9e3], [9e3, 9e3], [0, 0]]
    geometry = {
        "points": {"type": "MultiPoint", "coordinates": [[i % 4000, i % 3989] for i in range(1_000_000)]},
        "polygons": {"type": "MultiPolygon", "coordinates": [[square]] * 60_000},
        "lines": {"type": "LineString", "coordinates": [[i, i] for i in range(1_000_000)]},
    }[kind]
    path = folder / f"{kind}.geojson"
    path.write_text(json.dumps({"type": "Feature", "geometry": geometry}))
    visitor = Visitor(address)
    visitor.call("on_slide_shown", None, None, [])
    with path.open("rb") as file:
        sent = visitor.client.post(f"{address}/gradio_api/upload", files={"files": (path.name, file)})
    try:
        visitor.call("on_regions", {"path": sent.json()[0], "meta": {"_type": "gradio.FileData"}}, None, None)
        return "taken"
    except ValueError as error:
        return str(error)


def at_once(address: str, path: Path, count: int) -> str:
    """The same file uploaded and looked at by many."""
    with ThreadPoolExecutor(count) as pool:
        said = Counter(pool.map(lambda _: uploaded(address, path)[:90], range(count)))
    return "; ".join(f"{times} times {sentence}" for sentence, times in said.items())


def upload(address: str, how: str) -> str:
    """An upload that is no upload."""
    host, port = address.removeprefix("http://").split(":")
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    part = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.svs"\r\n\r\n'
    if how == "a field of 200 MB":
        return post(address, "upload", files={"files": ("a.svs", b"x")}, data={"note": "x" * (200 << 20)})
    length = {"half a slide": 1 << 20, "of 50 GB": 50 << 30}[how]
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(f"{head}Content-Length: {length}\r\n\r\n{part}half a slide".encode())
        if how == "half a slide":
            time.sleep(0.5)
            return "broken off"
        return line.recv(300).decode().replace("\r\n", " ")[-120:]


def named_auth(value: str) -> str:
    """What the app says that is started with such a login."""
    command = [sys.executable, "app.py", "--auth", value]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return f"exit status {ended.returncode}: {ended.stderr.strip()[-120:]}"


def guessed(address: str) -> str:
    """Fifty wrong passwords at once."""
    with ThreadPoolExecutor(16) as pool:
        tries = pool.map(
            lambda i: httpx.post(f"{address}/login", data={"username": "me", "password": f"{i}"}).status_code, range(50)
        )
        return ", ".join(f"{count} times {status}" for status, count in Counter(tries).items())


def unlogged(address: str, path: str) -> str:
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    return f"{get(address, f'gradio_api/{path}')}; POST {post(address, path, json=body)}"


def handler(address: str, name: str) -> int:
    return Page(address).handlers[name]


def requests(
    address: str, case: str, guarded: str, process: psutil.Process, folder: Path
) -> dict[str, Callable[[], str]]:
    """name -> what sends it and says what came back. guarded: the app that asks for a login."""
    longest, options = "Which of these is it? " * 90, [f"{i} " + "carcinoma " * 7 for i in range(26)]
    tile = f"gradio_api/slide/{case}"
    url = {"path": "http://127.0.0.1:9/secret", "meta": {"_type": "gradio.FileData"}}
    body = {
        "data": ["", url, 0, "learned", None, None],
        "session_hash": "files",
        "fn_index": handler(address, "analyze"),
    }
    return {
        "tile of level 999999999": lambda: get(address, f"{tile}/999999999/0_0.jpg"),
        "tile of level 99": lambda: get(address, f"{tile}/99/0_0.jpg"),
        "tile far outside": lambda: get(address, f"{tile}/0/9999999_9999999.jpg"),
        "patch of 9,999,999 px": lambda: get(address, f"{tile}/patch/0_0_9999999_9999999.jpg"),
        "1e-5 um/px": lambda: asked(address, "/analyze", "phantom", None, 1e-5),
        "32 um/px": lambda: asked(address, "/analyze", "phantom", None, 32),
        "NaN um/px": lambda: post(
            address, "call/analyze", content='{"data": ["phantom", null, NaN, "learned", null, null]}', headers=JSON
        ),
        "question of 5,000 characters": lambda: asked(address, "/ask", case, "x" * 5000),
        "question of 3 MB": lambda: asked(address, "/ask", case, "x" * (3 << 20)),
        "100 options": lambda: asked(address, "/ask", case, "Which?", ["x"] * 100),
        "answer of 100,000 characters": lambda: asked(address, "/evidence", case, "Which?", "x" * 100_000),
        "26 long options": lambda: asked(address, "/ask", case, longest, options),
        "evidence of 26 long options": lambda: asked(address, "/evidence", case, longest, options[0], options),
        "evidence of 2,000 characters": lambda: asked(address, "/evidence", case, longest, "carcinoma " * 100),
        "half a character and U+2028": lambda: asked(address, "/ask", case, "Which\u2028tissue\ud800?"),
        "10,000 pins": lambda: told(address, "on_picks", {"pinned": list(range(10_000)), "dropped": []}),
        "log event of 5 MB": lambda: told(address, "on_journal", {"views": ["x" * 1000] * 5000}),
        "log events of 60 kB, 30 times": lambda: told(address, "on_journal", {"views": ["x" * 600] * 100}, 30),
        "GeoJSON of a million points": lambda: regions(address, folder, "points"),
        "GeoJSON of 60,000 polygons": lambda: regions(address, folder, "polygons"),
        "GeoJSON of a line of a million points": lambda: regions(address, folder, "lines"),
        "upload that breaks off": lambda: upload(address, "half a slide"),
        "upload of 50 GB": lambda: upload(address, "of 50 GB"),
        "upload with a field of 200 MB": lambda: upload(address, "a field of 200 MB"),
        "lists in lists": lambda: told(address, "on_journal", {"views": json.loads("[" * 800 + "]" * 800)}),
        "chat of 5,000 turns": lambda: chatted(address, 5000),
        "chat of 50,000 turns": lambda: chatted(address, 50_000),
        "20 requests of 300,000 lists": lambda: crowded(address, "lists"),
        "100 sessions with names of 1 MB": lambda: crowded(address, "names"),
        "100 pages at once": lambda: crowded(address, "pages"),
        "900 requests that are not finished": lambda: silent(address, "requests"),
        "40 pages that are not read": lambda: silent(address, "pages"),
        "40 uploads that stand still": lambda: silent(address, "uploads"),
        "8 answers that nobody reads": lambda: deaf(address),
        "5,000 ranges of a file": lambda: get(
            address, "favicon.ico", Range="bytes=" + ",".join(f"{i}-{i}" for i in range(5000))
        ),
        "function that is not there": lambda: post(
            address, "queue/join", json={"data": [], "fn_index": 10**9, "session_hash": "x"}
        ),
        "origin that is none": lambda: post(address, "queue/join", json=body, headers={"Origin": "http://[::1"}),
        "another name": lambda: get(address, "", Host="evil.example"),
        "file= with a URL": lambda: get(address, "gradio_api/file=http://127.0.0.1:9/secret"),
        "FileData with a URL": lambda: post(address, "queue/join", json=body),
        "FileData with a folder": lambda: named(address, tempfile.gettempdir()),
        "FileData with /etc/hostname": lambda: named(address, "/etc/hostname"),
        "1,000 events of one at once": lambda: queued(address, 1),
        "1,000 events of 500 at once": lambda: queued(address, 500),
        "leaves while its slide is encoded": lambda: gone(address, process, "analysing"),
        "leaves while it is answered": lambda: gone(address, process, "answering"),
        "leaves while its map is made": lambda: gone(address, process, "mapping"),
        "login ''": lambda: named_auth(""),
        "login 'me:'": lambda: named_auth("me:"),
        "50 wrong passwords": lambda: guessed(guarded),
        "MCP without a login": lambda: unlogged(guarded, "mcp/"),
        "heartbeat without a login": lambda: unlogged(guarded, "heartbeat/a"),
        "page of another origin": lambda: post(
            address, "queue/join", json=body, headers={"Origin": "https://evil.example"}
        ),
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
    rest: float = 0.0  # s that an answer takes at rest

    def clear(self) -> None:
        self.peak, self.waits = 0, ()

    def longest(self) -> float:
        """How much longer than at rest an answer took, or takes already."""
        now = time.perf_counter() - self.asking_since if self.asking_since else 0.0
        return max(0.0, max([now, *self.waits]) - self.rest)

    def weigh(self) -> None:
        while not self.over:
            total = 0
            for process in [self.process, *self.process.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.ZombieProcess, ProcessLookupError):
                    continue
            self.peak = max(self.peak, total)
            time.sleep(0.1)

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
        login = ("--auth", "me:secret", *(["--mcp"] if find_spec("mcp") else []))
        with (
            served(options.model, folder / "app") as (address, process),
            served(options.model, folder / "guarded", *login) as (guarded, _),
        ):
            second = Client(address, verbose=False)
            case = second.predict(api_name="/analyze")["case"]
            second.predict(case, *QUESTION, api_name="/ask")
            watch = Watch(process)
            threads = [threading.Thread(target=watch.weigh), threading.Thread(target=watch.ask, args=(second, case))]
            for thread in threads:
                thread.start()
            over: list[str] = []
            try:
                time.sleep(20)
                watch.rest = statistics.median(watch.waits)
                print(f"at rest: {watch.peak / 1e9:.2f} GB, an answer takes {watch.rest:.1f} s")
                print("| what | s | peak GB | wait, s | sentence or status |\n|---|---|---|---|---|")
                attacks = dict(requests(address, case, guarded, process, folder))
                for kind, (file, make) in files(folder).items():
                    if options.only and not any(one.startswith((kind, file)) for one in options.only):
                        continue
                    path = folder / file
                    make(path)
                    attacks[f"{kind}, by path"] = lambda path=path: opened(Page(address), path)
                    if path.stat().st_size < UPLOAD_LIMIT:
                        attacks[f"{kind}, upload"] = lambda path=path: uploaded(address, path)
                for kind in ("fair.png", "large.png", "bomb_mpp.tiff"):
                    attacks[f"{kind}, ten at once"] = lambda path=folder / kind: at_once(address, path, 10)
                rng = random.Random(options.seed)
                for _ in range(options.rounds):
                    for kind in rng.sample(list(attacks), len(attacks)):
                        if options.only and kind.split(", ")[0] not in options.only and kind not in options.only:
                            continue
                        watch.clear()
                        began = time.perf_counter()
                        try:
                            sentence = " ".join(attacks[kind]().split())[:200]
                        except (httpx.HTTPError, OSError, ValueError) as error:  # the connection was closed on us
                            sentence = f"{type(error).__name__}: {error}"[:200]
                        took, wait = time.perf_counter() - began, watch.longest()
                        print(f"| {kind} | {took:.1f} | {watch.peak / 1e9:.2f} | {wait:.1f} | {sentence} |", flush=True)
                        if any(value > limit for value, limit in zip((took, watch.peak / 1e9, wait), LIMITS)):
                            over.append(kind)
                        time.sleep(PAUSE)
            finally:
                watch.over = True
                for thread in threads:
                    thread.join()
            print(f"over {LIMITS[0]:.0f} s, {LIMITS[1]} GB or {LIMITS[2]:.0f} s of wait: {', '.join(over) or 'none'}")
            print(f"errors of the second session: {watch.errors}; the app lives: {process.is_running()}")


if __name__ == "__main__":
    main()
