"""Many people at once: sessions that analyse the example, ask and leave, some at a time, against a running app.

    python app.py --port 7860 &
    python -m benchmarks.sessions http://127.0.0.1:7860 --sessions 20 --at-once 4 --pid $!

Prints the steps from opening the page to the first word of an answer, seconds per session, errors, and with --pid the
app's memory before and after and its processor seconds (Linux only).

    python -m benchmarks.sessions http://127.0.0.1:7860 --beside-encoding --pid $!

One session encodes 4,000 patches while three others chat: when each question's first word came; then the first one
leaves: when its processor time is free again. Run it on the two cores that it is about, and nothing else on them.
"""

from __future__ import annotations

import argparse
import json
import re
import threading
import time
import uuid
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import httpx
import psutil
from gradio_client import Client

QUESTION = ("Does this slide contain carcinoma?", ["Yes", "No"])


class Page:
    """What the page does when a slide is opened, without a browser: the same handlers, in the same order."""

    def __init__(self, address: str):
        self.address, self.session = address, uuid.uuid4().hex
        self.client = httpx.Client(timeout=300)
        config = self.client.get(f"{address}/config").json()
        self.handlers = {item["api_name"]: item["id"] for item in config["dependencies"]}

    def call(self, name: str, *data: object, first: bool = False, told: dict | None = None) -> list:
        """Run a handler; returns its outputs, or the first of those that it streams. told: what the event says.

        Raises ValueError with the sentence that the page would show.
        """
        with closing(self.listen(name, *data, told=told)) as said:
            for line in said:
                event = json.loads(line)
                if first and event.get("msg") == "process_generating":
                    return event["output"]["data"]
                if event.get("msg") == "process_completed":
                    if not event["success"]:
                        raise ValueError(event["output"].get("error"))
                    return event["output"]["data"]
        raise ValueError("The connection ended.")

    def listen(self, name: str, *data: object, told: dict | None = None) -> Generator[str]:
        """What the server says of a handler, as JSON, until the caller has heard enough and closes the connection."""
        body = {"data": data, "fn_index": self.handlers[name], "session_hash": self.session, "event_data": told}
        self.client.post(f"{self.address}/gradio_api/queue/join", json=body).raise_for_status()
        with self.client.stream(
            "GET", f"{self.address}/gradio_api/queue/data", params={"session_hash": self.session}
        ) as lines:
            yield from (line.removeprefix("data:") for line in lines.iter_lines() if line.startswith("data:"))


class Chat(Page):
    """Somebody who has opened the phantom and asks about it, one question after the other."""

    def __init__(self, address: str):
        super().__init__(address)
        self.call("on_choose", False, told={"name": "phantom"})
        self.call("on_slide", None, "", None, None, None)
        self.call("on_slide_shown", None, None, [])

    def first_word(self) -> float:
        """Seconds from a question to the first word of its answer, which is then read to its end."""
        began = time.perf_counter()
        chat = self.call("on_question", QUESTION[0], "\n".join(QUESTION[1]), "", None, None, [], None)[0]
        heard = 0.0
        with closing(self.listen("on_asked", None, chat, None, None)) as said:
            for line in said:
                event = json.loads(line)
                if event.get("msg") == "process_generating" and not heard:
                    heard = time.perf_counter() - began
                if event.get("msg") == "process_completed":
                    break
        self.call("on_answered")
        return heard


def first_word(address: str, pid: int | None) -> None:
    """Print when what is on the page, from opening it to the first streamed word about the phantom."""

    def clocks() -> tuple[float, float]:
        spent = psutil.Process(pid).cpu_times() if pid else None
        return time.perf_counter(), spent.user + spent.system if spent else 0.0

    began = clocks()

    def say(words: str) -> None:
        now = clocks()
        print(f"  {now[0] - began[0]:6.1f} s, {now[1] - began[1]:6.1f} CPU s: {words}")

    page = Page(address)
    say("page open")
    page.call("on_choose", False, told={"name": "phantom"})
    page.call("on_slide", None, "", None, None, None)
    say("slide on screen")
    page.call("on_slide_shown", None, None, [])
    say("patches selected")
    chat = page.call("on_question", QUESTION[0], "\n".join(QUESTION[1]), "", None, None, [], None)[0]
    page.call("on_asked", None, chat, None, None, first=True)
    say("first word")


def session(address: str) -> float:
    """One visit; returns its seconds. Whatever goes wrong is raised."""
    began = time.perf_counter()
    client = Client(address, verbose=False)
    found = client.predict(api_name="/analyze")
    said = client.predict(found["case"], *QUESTION, api_name="/ask")
    assert abs(sum(said["probabilities"]) - 1) < 1e-3, said
    client.close()
    return time.perf_counter() - began


ENCODED = "0.96"  # um/px: at this resolution the example has 4,000 patches, and none of them is cached
CHATS, QUESTIONS = 3, 5


def beside_encoding(address: str, pid: int) -> None:
    """Print how long three sessions wait for first words while a fourth one encodes, and how soon that one is gone."""
    process = psutil.Process(pid)
    chats = [Chat(address) for _ in range(CHATS)]
    encoder = Page(address)
    encoder.call("on_choose", False, told={"name": "phantom"})
    encoder.call("on_slide", None, ENCODED, None, None, None)
    alive = threading.Event()
    alive.set()
    patches: list[str] = []

    def encode() -> None:
        for event in encoder.listen("on_slide_shown", None, None, []):
            patches.extend(re.findall(r'"done"(?:\]?, ?|: ?)([0-9]+)', event)[-1:])  # whole, then as what changed
            if not alive.is_set():
                return  # which closes the connection, as a closed tab does

    work = threading.Thread(target=encode, daemon=True)
    work.start()
    while not any(map(int, patches)) and work.is_alive():
        time.sleep(0.1)
    with ThreadPoolExecutor(CHATS) as pool:
        waits = list(pool.map(lambda chat: [chat.first_word() for _ in range(QUESTIONS)], chats))
    for number, waited in enumerate(waits, 1):
        print(f"session {number}: first words after {', '.join(f'{one:.1f}' for one in waited)} s")
    every = sorted(one for waited in waits for one in waited)
    print(f"{len(every)} questions: median {every[len(every) // 2]:.1f} s, longest {every[-1]:.1f} s (limit 5 s)")
    print(f"encoded meanwhile: {patches[-1] if patches else 'nothing'} patches; still at it: {work.is_alive()}")
    alive.clear()
    work.join(10)  # it hears of that with the next line of the server's
    left = time.perf_counter()
    print(f"left: processor free after {seconds_until_idle(process, left):.1f} s (limit 2 s)")


def seconds_until_idle(process: psutil.Process, since: float, most: float = 30) -> float:
    """Until the app spends less than a tenth of a processor, over half a second; the time that this began."""
    while time.perf_counter() - since < most:
        began, before = time.perf_counter(), busy_seconds(process)
        time.sleep(0.5)
        if busy_seconds(process) - before < 0.1 * 0.5:
            return began - since
    return float("inf")


def busy_seconds(process: psutil.Process) -> float:
    """Processor seconds of the app and of the processes that read slides for it."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            total += sum(one.cpu_times()[:2])
    return total


def resident(pid: int) -> float:
    """MB of memory that a process holds."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found, "no VmRSS"
    return int(found[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulated sessions against a running app.")
    parser.add_argument("address")
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--pid", type=int)
    parser.add_argument("--beside-encoding", action="store_true", help="three sessions chat while one encodes")
    options = parser.parse_args()
    if options.beside_encoding:
        if not options.pid:
            parser.error("--beside-encoding needs --pid, the app's process.")
        return beside_encoding(options.address, options.pid)
    for which in ("first visit", "second visit"):
        print(f"from opening the page, {which}:")
        first_word(options.address, options.pid)
    if not options.sessions:
        return
    print(f"first session: {session(options.address):.1f} s (loads the model)")
    before = resident(options.pid) if options.pid else 0.0
    with ThreadPoolExecutor(options.at_once) as pool:
        visits = [pool.submit(session, options.address) for _ in range(options.sessions)]
    errors = [visit.exception() for visit in visits if visit.exception()]
    seconds = sorted(visit.result() for visit in visits if not visit.exception())
    if seconds:
        print(f"{len(seconds)} sessions: median {seconds[len(seconds) // 2]:.1f} s, longest {seconds[-1]:.1f} s")
    print(f"errors: {len(errors)} {errors[:1] or ''}")
    if options.pid:
        time.sleep(20)  # sessions are forgotten when their connection ends
        after = resident(options.pid)
        print(f"memory: {before:.0f} MB before, {after:.0f} MB after ({after / before - 1:+.1%})")


if __name__ == "__main__":
    main()
