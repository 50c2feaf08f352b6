"""A measurement in a process of its own: what it printed as JSON, and its peak memory by the kernel's account."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def run_child(
    arguments: list[str], python: str = sys.executable, task: Any = None, threads: int | None = None
) -> tuple[Any, float]:
    """Run `python arguments...` with `task` as JSON on stdin: (the JSON of its last line, peak resident MB).

    threads: of torch and of what else uses OpenMP; None leaves it as it is
    sparsewsi is importable for our own interpreter alone. Raises RuntimeError with the last line of a child that failed
    or was killed.
    """
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    if python == sys.executable:
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        json.dump(task, given)
        given.seek(0)
        # -P: a script's folder is not searched, where chat.py or tables.py might be taken for a library.
        process = subprocess.Popen([python, "-P", *arguments], stdin=given, stdout=out, stderr=err, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            lines = err.read().strip().splitlines() or [f"exit status {process.returncode}"]
            raise RuntimeError(lines[-1])
        return json.loads(out.read().splitlines()[-1]), usage.ru_maxrss / 1024
