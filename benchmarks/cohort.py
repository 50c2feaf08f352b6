"""A cohort by simulation: a thousand links to a few small phantoms, extracted by two ranks under torchrun.

    python -m benchmarks.cohort [--slides 1000] [--ranks 2] [--kills 5] [--work DIR]

Prints, as a Markdown table, how the work was shared, whether a slide was done twice, whether the files are what they
should be, and each process's resident memory over the slides it had done (Linux). With --kills all processes are killed
(SIGKILL) so many times, at moments drawn with seed 0, and the same command is started again. Every link to a phantom
must give the same bytes, so an interrupted slide is compared with one that was not.
"""

import argparse
import contextlib
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks.tables import Table, markdown
from sparsewsi.phantom import write_phantom

ROOT = Path(__file__).resolve().parents[1]
PHANTOMS = ((1, 1024), (2, 1024), (3, 1280), (4, 1536), (5, 2048))  # seed, side in px


@dataclass(frozen=True)
class Sample:
    """What a process held when so many slides were done. process: its command's rank and part."""

    process: str
    done: int
    mb: float


def make_links(folder: Path, count: int) -> dict[str, int]:
    """count links to the phantoms, in folders of 100: {stem: seed}."""
    made = {seed: folder.parent / f"phantom-{seed}.tiff" for seed, _ in PHANTOMS}
    for seed, size in PHANTOMS:
        if not made[seed].exists():
            write_phantom(made[seed], seed, size)
    stems = {f"slide {number:04d}": PHANTOMS[number % len(PHANTOMS)][0] for number in range(count)}
    for number, (stem, seed) in enumerate(stems.items()):
        link = folder / f"batch {number // 100}" / f"{stem}.tiff"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(made[seed])
    return stems


def lines(out: Path) -> list[list[dict]]:
    """The report's whole lines, rank by rank."""
    reports = []
    for path in sorted((out / "report").glob("*.jsonl")):
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # torn by a kill
                rows.append(json.loads(line))
        reports.append(rows)
    return reports


def family(process: subprocess.Popen) -> dict[str, psutil.Process]:
    """The ranks and the child of each, by name."""
    found: dict[str, psutil.Process] = {}
    with contextlib.suppress(psutil.Error):
        for rank in psutil.Process(process.pid).children():
            if "LOCAL_RANK" not in rank.environ():
                continue
            name = f"rank {rank.environ()['LOCAL_RANK']}"
            found[name] = rank
            for child in rank.children():
                if "spawn_main" in " ".join(child.cmdline()):
                    found[f"{name}, child"] = child
    return found


def run(command: list[str], out: Path, kill_after: float | None = None) -> list[Sample]:
    """Run to the end, or kill every process so many seconds after its first slide; memory every two seconds."""
    samples: list[Sample] = []
    process = subprocess.Popen(command, cwd=ROOT)
    before, first = sum(map(len, lines(out))), 0.0
    try:
        while process.poll() is None:
            done = [len(rows) for rows in lines(out)]
            if not first and sum(done) > before:
                first = time.monotonic()
            if first and kill_after is not None and time.monotonic() - first > kill_after:
                break
            for name, one in family(process).items():
                with contextlib.suppress(psutil.Error, IndexError):
                    samples.append(Sample(name, done[int(name.split()[1].strip(","))], one.memory_info().rss / 2**20))
            time.sleep(2 if kill_after is None else 0.1)
    finally:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                with contextlib.suppress(psutil.Error):
                    one.kill()
        process.wait()
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description="A thousand slides, two ranks.")
    parser.add_argument("--slides", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--max-patches", type=int, default=8, help="per slide")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where slides and features lie; default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = options.work or Path(name)
        stems, out = make_links(work / "slides", options.slides), work / "features"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
        command += ["-m", "sparsewsi", "extract", str(work / "slides"), "--out", str(out), "--part-seconds", "0"]
        command += ["--max-patches", str(options.max_patches)]
        rng, began, usage = random.Random(0), time.monotonic(), psutil.Process()
        for _ in range(options.kills):
            run(command, out, kill_after=rng.uniform(0, 10))
            print(f"killed with {sum(map(len, lines(out)))} slides done", file=sys.stderr)
        samples = run(command, out)
        wall, cpu = time.monotonic() - began, usage.cpu_times()
        report(options, stems, out, samples, wall, cpu.children_user + cpu.children_system)


def report(options, stems: dict[str, int], out: Path, samples: list[Sample], wall: float, cpu: float) -> None:
    reports = lines(out)
    times = Counter(row["slide"] for rows in reports for row in rows)
    files = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.safetensors")}
    kinds = {(stems[stem], digest) for stem, digest in files.items()}
    print(f"\n`{' '.join(['python', '-m', 'benchmarks.cohort', *sys.argv[1:]])}`\n")
    left = [path for path in out.iterdir() if path.name.startswith(".")]
    counts = Counter(times.values())
    more = sum(number for repeats, number in counts.items() if repeats > 1)
    missing = len(stems.keys() - times.keys())
    columns = [
        "slides reported once",
        "twice or more",
        "not at all",
        "files",
        "kinds of file",
        "phantoms",
        "left behind",
    ]
    numbers = (counts[1], more, missing, len(files), len(kinds), len(PHANTOMS), len(left))
    note = f"{len(stems)} links to {len(PHANTOMS)} phantoms, {options.ranks} ranks, {options.kills} times killed.\n"
    note += f"Wall {wall:.0f} s, CPU {cpu:.0f} s without what killed processes had used."
    print(markdown(Table("cohort", columns, [[str(number) for number in numbers]], note)))
    memory = []
    for name in sorted({sample.process for sample in samples}):
        rows = reports[int(name.split()[1].strip(","))]
        mine = [sample for sample in samples if sample.process == name and sample.mb > 0]  # 0: it is just ending
        settled = [sample for sample in mine if sample.done > 0.1 * len(rows)] or mine  # libraries are loaded
        slope = float(np.polyfit([s.done for s in settled], [s.mb for s in settled], 1)[0]) if len(settled) > 2 else 0.0
        patches, seconds = (sum(row[key] for row in rows) for key in ("patches", "seconds"))
        first, last, most = settled[0].mb, settled[-1].mb, max(sample.mb for sample in settled)
        whole = (f"{number:.0f}" for number in (len(rows), patches, seconds, first, last, most))
        memory.append([name, *whole, f"{1024 * slope:+.1f}"])
    columns = ["process", "slides", "patches", "seconds", "MB at first", "at the end", "most", "KB per slide (fitted)"]
    print(markdown(Table("cohort", columns, memory, "Resident memory.")))


if __name__ == "__main__":
    main()
