"""What the command line says of every slide in some folders: N, seconds, peak memory, outcome, as a Markdown table.

    python -m benchmarks.slides SLIDES [SLIDES ...] [--model DIR] [--out runs/slides]

Each slide is one process, `python -m sparsewsi SLIDE`, as a user would run it; peak memory is that process's resident
set (the wait4 system call). A slide that is refused for want of a resolution is tried again with --slide-mpp 0.5, on a
line of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".dcm", ".png", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class Run:
    """One run of the command line."""

    status: int
    seconds: float
    peak_mb: float
    out: str
    err: str


def slides(folders: list[Path]) -> list[Path]:
    """Every file a user might try to open; a DICOM slide is its folder."""
    found = []
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                found.append(path.parent if path.suffix == ".dcm" else path)
    return list(dict.fromkeys(found))


def run(command: list[str]) -> Run:
    """Run a command and wait for it; peak memory from the kernel's account of that one process."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, text=True)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        return Run(process.returncode, seconds, usage.ru_maxrss / 1024, out.read(), err.read())


def outcome(result: Run, folder: Path) -> tuple[str, str]:
    """(N, what was said): the answer, or the sentence of the refusal."""
    if result.status == 0:
        selection = json.loads(next(folder.glob("**/selection.json")).read_text())
        answers = [line[3:] for line in result.out.splitlines() if line.startswith("A: ")]
        return str(selection["patches"]["count"]), " / ".join(answers)
    return "", f"exit {result.status}: " + " ".join(result.err.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--model", default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/slides"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = ["| slide | N | seconds | peak MB | outcome |", "|---|---|---|---|---|"]
    for path in slides(arguments.folders):
        for extra in ([], ["--slide-mpp", "0.5"]):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "sparsewsi", str(path), "--out", folder, *extra]
                result = run([*command, *(["--model", arguments.model] if arguments.model else [])])
                n, said = outcome(result, Path(folder))
            name = f"{path.name} {' '.join(extra)}".strip()
            rows.append(f"| {name} | {n} | {result.seconds:.0f} | {result.peak_mb:.0f} | {said} |")
            print(rows[-1], flush=True)
            if "--slide-mpp" not in result.err:
                break
    (arguments.out / "table.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
