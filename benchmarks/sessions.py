"""Many people at once: sessions that analyse the example, ask and leave, some at a time, against a running app.

    python app.py --port 7860 &
    python -m benchmarks.sessions http://127.0.0.1:7860 --sessions 20 --at-once 4 --pid $!

Prints seconds per session, errors, and with --pid the app's memory and files before and after (Linux only).
"""

from __future__ import annotations

import argparse
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gradio_client import Client

QUESTION = ("Does this slide contain carcinoma?", ["Yes", "No"])


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
