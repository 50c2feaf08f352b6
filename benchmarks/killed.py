"""What is left of a stranger when the app is killed in the middle of something and started again: nothing.

    python -m benchmarks.killed [--model assets/demo-model] [--state NAME ...]

Starts the app, brings it to a state (idle with a slide open, uploading, analysing, answering, evidence, report), kills
it with SIGKILL, starts it again and looks ten seconds after that start: at the files below its temporary folder and the
cache that hold the stranger's marker, at folders with uploads, and at processes of the killed app. Prints a row for
each state; exits with 1 if anything is left. Linux; needs psutil. It talks to 127.0.0.1 alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from benchmarks.hostile import launch
from benchmarks.sessions import Page
from sparsewsi import phantom

STATES = ("idle", "uploading", "analysing", "answering", "evidence", "report")
MARKER = b"MUSTERMANN-1950-12-24"
LOOK_AFTER = 10  # s after the second start


def strange_slide(path: Path) -> None:
    """A slide of some hundred patches whose bytes hold the marker."""
    phantom.write_phantom(path, seed=5, size=4096)
    with path.open("ab") as file:
        file.write(MARKER)


class Stranger(Page):
    """Somebody who uploads a slide and works with it."""

    def upload(self, path: Path) -> str:
        with path.open("rb") as file:
            sent = self.client.post(f"{self.address}/gradio_api/upload", files={"files": ("Mustermann.tiff", file)})
        return sent.raise_for_status().json()[0]

    def open(self, path: Path) -> str:
        """Upload and show a slide; returns its token."""
        self.call("on_upload", [{"path": self.upload(path), "meta": {"_type": "gradio.FileData"}}], False)
        return self.call("on_slide", None, "0.5", None, None, None)[1]["props"]["slides"][0]["token"]

    def begin(self, name: str, *data: object) -> None:
        """Start something and listen to it, for ever, in a thread."""
        body = {"data": data, "fn_index": self.handlers[name], "session_hash": self.session}
        httpx.post(f"{self.address}/gradio_api/queue/join", json=body).raise_for_status()

        def listen() -> None:
            where, session = f"{self.address}/gradio_api/queue/data", {"session_hash": self.session}
            with suppress(httpx.HTTPError), httpx.stream("GET", where, params=session, timeout=None) as stream:
                list(stream.iter_lines())

        threading.Thread(target=listen, daemon=True).start()


def half_upload(address: str, path: Path) -> socket.socket:
    """An upload of which the second half has not come."""
    host, port = address.removeprefix("http://").split(":")
    data = path.read_bytes()
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {2 * len(data)}\r\n"
    head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    part = '--x\r\nContent-Disposition: form-data; name="files"; filename="Mustermann.tiff"\r\n\r\n'
    line = socket.create_connection((host, int(port)))
    line.sendall((head + part).encode() + data)
    return line


def ask_in_vain(where: str) -> None:
    """For what is not answered, as the app is killed meanwhile."""
    with suppress(httpx.HTTPError):
        httpx.get(where, timeout=60)


@contextmanager
def brought_to(state: str, address: str, slide: Path) -> Iterator[None]:
    """The app in one of STATES."""
    if state == "uploading":
        with half_upload(address, slide):
            time.sleep(1)
            yield
        return
    stranger = Stranger(address)
    token = stranger.open(slide)
    if state == "analysing":
        stranger.begin("on_slide_shown", None, None, [])
        time.sleep(3)
    else:
        stranger.call("on_slide_shown", None, None, [])
        question = ("Does this slide contain carcinoma?", "Yes\nNo") if state == "evidence" else ("Describe it.", "")
        chat = stranger.call("on_question", *question, "", None, None, [], None)[0]
        if state in ("answering", "evidence"):
            stranger.begin("on_asked", None, chat, None, None)
            time.sleep(0.5 if state == "answering" else 2)
        if state == "report":
            stranger.call("on_asked", None, chat, None, None)
            stranger.call("on_analysed", None, None)
            where = f"{address}/gradio_api/slide/{token}/report.html"
            threading.Thread(target=ask_in_vain, args=(where,), daemon=True).start()
            time.sleep(0.3)
    yield


def left(home: Path, before: set[int]) -> list[str]:
    """Files that hold the marker or are named as those of sessions are, and processes that are still there."""
    found = []
    for path in home.rglob("*"):
        named = path.name.startswith(("slide", "report", "log.jsonl"))
        if path.is_file() and (named or MARKER in path.read_bytes()):
            found.append(f"file {path.relative_to(home)}")
    for number in before:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
                found.append(f"process {number}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/demo-model")
    parser.add_argument("--state", nargs="*", default=STATES, choices=STATES)
    options = parser.parse_args()
    failed = False
    print("| state | files and processes at the kill | left 10 s after the next start |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        slide = Path(name) / "stranger.tiff"
        strange_slide(slide)
        for state in options.state:
            home, cache = Path(name) / state, Path(name) / state / "cache"
            cache.mkdir(parents=True)
            os.environ["SPARSEWSI_CACHE"] = str(cache)
            process, address = launch(options.model, home)
            with brought_to(state, address, slide):
                numbers = {one.pid for one in psutil.Process(process.pid).children(recursive=True)} | {process.pid}
                there = left(home, numbers)
                process.send_signal(signal.SIGKILL)
                process.wait()
            began = time.monotonic()
            again, _ = launch(options.model, home)
            time.sleep(max(0.0, LOOK_AFTER - (time.monotonic() - began)))
            remains = left(home, numbers)
            again.terminate()
            again.wait(30)
            failed |= bool(remains)
            print(f"| {state} | {len(there)} | {', '.join(remains) or 'nothing'} |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
