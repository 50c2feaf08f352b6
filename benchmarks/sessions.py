"""Many people at once: sessions that analyse the example, ask and leave, some at a time, against a running app.

    python app.py --port 7860 &
    python -m benchmarks.sessions http://127.0.0.1:7860 --sessions 20 --at-once 4 --pid $!

Prints the steps from opening the page to the first word of an answer, seconds per session, errors, and with --pid the
app's memory before and after and its processor seconds (Linux only).
"""

from __future__ import annotations

import argparse
import json
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
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
        body = {"data": data, "fn_index": self.handlers[name], "session_hash": self.session, "event_data": told}
        self.client.post(f"{self.address}/gradio_api/queue/join", json=body).raise_for_status()
        with self.client.stream(
            "GET", f"{self.address}/gradio_api/queue/data", params={"session_hash": self.session}
        ) as lines:
            for line in lines.iter_lines():
                event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if first and event.get("msg") == "process_generating":
                    return event["output"]["data"]
                if event.get("msg") == "process_completed":
                    if not event["success"]:
                        raise ValueError(event["output"].get("error"))
                    return event["output"]["data"]
        raise ValueError("The connection ended.")


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
    page.call("on_choose", told={"name": "phantom"})
    page.call("on_slide", None, "")
    say("slide on screen")
    page.call("on_slide_shown", None, None, "", None)
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
    options = parser.parse_args()
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
