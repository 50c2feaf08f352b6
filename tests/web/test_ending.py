"""The app is ended, by a service or from the keyboard, whatever it is doing: at once, quietly, with its folder."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gradio_client
import pytest

from sparsewsi import phantom

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide that takes seconds to encode."""
    path = tmp_path_factory.mktemp("large") / "large.tiff"
    phantom.write_phantom(path, seed=4, size=4096)
    return path


def keep_busy(address: str, large: Path, state: str) -> None:
    """Encode a slide, or open a small one and ask about it again and again, until nobody answers any more."""
    with contextlib.suppress(Exception):  # the app is gone
        client = gradio_client.Client(address, verbose=False)
        if state == "encoding":
            client.predict(file=gradio_client.handle_file(str(large)), api_name="/analyze")
        else:
            found = client.predict(file=gradio_client.handle_file(str(large)), slide_mpp=0.99, api_name="/analyze")
            case = found["case"]
            while True:
                client.predict(case, "Describe this slide.", [], api_name="/ask")
                client.predict(case, "Fat?", "Yes", ["Yes", "No"], api_name="/evidence")


@pytest.mark.parametrize(
    ("given", "status", "state"),
    [(signal.SIGTERM, 0, "encoding"), (signal.SIGTERM, 0, "answering"), (signal.SIGINT, 130, "answering")],
)
def test_seen_the_app_aborted_when_it_was_stopped(given, status, state, tiny_model, large, tmp_path):
    """Threads that were in C++ when the interpreter ended brought "terminate called without an active exception"."""
    environ = {**os.environ, "TMPDIR": str(tmp_path), "SPARSEWSI_CACHE": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    environ.pop("GRADIO_TEMP_DIR", None)
    command = [sys.executable, "app.py", "--model", str(tiny_model)]
    app = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert app.stdout is not None
        lines = iter(app.stdout.readline, "")
        address = next(found[1] for line in lines if (found := re.search(r"served at (\S+)", line)))
        if state != "idle":
            threading.Thread(target=keep_busy, args=(address, large, state), daemon=True).start()
            time.sleep(6)
        app.send_signal(given)
        said, _ = app.communicate(timeout=30)
    finally:
        app.kill()
    assert (app.returncode, said) == (status, "")
    assert not list(tmp_path.glob("sparsewsi-*")), "what was private is gone with it"
