"""Features of a cohort: one <slide>.safetensors for every slide of a folder, a pattern or a CSV.

    python -m sparsewsi extract slides/ --out features
    python -m sparsewsi extract cohort.csv --out features --encoder uni   # columns: slide, mpp (may be empty)
    torchrun --nproc_per_node=2 -m sparsewsi extract slides/ --out features       # one rank per GPU
    sbatch --array=0-9 ... python -m sparsewsi extract '/data/*.svs' --out features

    OUT/extract.json         the settings: a folder holds features of one kind only
    OUT/<stem>.safetensors   a Bag, whole or absent; <stem> is the slide's file name without its suffix
    OUT/.<stem>.parts/       what is done of a slide that is not finished
    OUT/report/<rank>.jsonl  a line for every slide worked on; OUT/report.csv: the last line of every slide

A run that was stopped in any way goes on where it was when it is started again, and ends with the same files. Slides
are read and encoded in a child process: a decoder that crashes takes the child along, not the batch.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from sparsewsi.cohort.child import Show, extract_in_child
from sparsewsi.cohort.find import Job, find_rank, find_slides, share_jobs
from sparsewsi.cohort.on_ray import extract_on_ray
from sparsewsi.cohort.report import Report, Row
from sparsewsi.cohort.slide import Order, Settings, look_up
from sparsewsi.files import allow_any_text, write_json


def check_settings(out: Path, settings: Settings) -> None:
    """Claim OUT for features of these settings. Raises ValueError if it holds features of others."""
    path = out / "extract.json"
    in_use = any(out.glob("*.safetensors")) or any(out.glob(".*.parts"))
    if not (path.is_file() and in_use):  # a run that failed at once, over a misspelt encoder say, has claimed nothing
        write_json(path, asdict(settings), indent=2)
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged; delete it if the features beside it have these settings.") from error
    wrong = [
        f"{key} {stored.get(key)} (now {value})" for key, value in asdict(settings).items() if stored.get(key) != value
    ]
    if wrong:
        raise ValueError(f"{out} holds features made with {', '.join(wrong)}; choose another --out.")


def extract_all(
    jobs: list[Job], out: Path, work: Callable[[list[Job], Show], Generator[tuple[Job, Row]]], rank: int = 0
) -> list[Row]:
    """Do what is not done yet by `work` (extract_in_child or extract_on_ray); report every slide as it is done."""
    report, rows, behind = Report(out, rank), {}, 0

    def record(job: Job, row: Row) -> None:
        nonlocal behind
        rows[job.path], behind = row, behind + max(1, job.bytes)
        report.add_if_new(row)
        if row.outcome == "failed":
            tqdm.write(f"{job.stem}: {row.warnings}", file=sys.stderr)

    for job in jobs:
        if (row := look_up(job, out)) is not None:
            record(job, row)
    # Bytes of slides, with the time that is left at the pace of what this run does; in a log, a line now and then.
    bar = tqdm(
        total=sum(max(1, job.bytes) for job in jobs),
        initial=behind,
        unit="B",
        unit_scale=True,
        smoothing=0.05,
        mininterval=0.5 if sys.stderr.isatty() else 60.0,
        desc=f"rank {rank}" if "WORLD_SIZE" in os.environ else None,
        position=int(os.environ.get("LOCAL_RANK", 0)),
    )

    def show(job: Job, done: int, total: int) -> None:
        bar.update(behind + round(job.bytes * done / max(1, total)) - bar.n)
        bar.set_postfix_str(f"{len(rows)}/{len(jobs)} slides, {job.stem[:24]} {done}/{total}", refresh=False)

    todo = [job for job in jobs if job.path not in rows]
    with bar, closing(work(todo, show)) as results:
        for job, row in results if todo else ():
            record(job, row)
            bar.update(behind - bar.n)
            bar.set_postfix_str(f"{len(rows)}/{len(jobs)} slides", refresh=False)
    report.finish()
    return [rows[job.path] for job in jobs]


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 1 if slides failed (they are in the report); 2 with a sentence if the input is at fault."""
    parser = argparse.ArgumentParser(
        prog="sparsewsi extract", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slides", nargs="+", help="folders, patterns, CSV files (slide, mpp), slides")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", default="efficientnet-lite0")
    parser.add_argument("--mpp", type=float, default=0.5, help="um/px to read at")
    parser.add_argument("--patch-size", type=int, default=224, help="px at that mpp")
    parser.add_argument("--max-patches", type=int, help="per slide, evenly spaced")
    parser.add_argument("--slide-mpp", type=float, help="um/px of level 0 of all slides (a CSV states it per slide)")
    parser.add_argument("--device", help="default: this rank's GPU, or the CPU")
    parser.add_argument(
        "--engine", choices=("processes", "ray"), default="processes", help="ray: of RAY_ADDRESS, or here"
    )
    parser.add_argument("--encoders", type=int, help="with --engine ray: how many encode; default one per GPU")
    parser.add_argument("--part-seconds", type=float, default=20.0, help="put what is encoded on disk that often")
    parser.add_argument("--stall-seconds", type=float, default=1800.0, help="give a slide up that stands still so long")
    options = parser.parse_args(argv)
    allow_any_text()
    settings = Settings(options.encoder, options.mpp, options.patch_size, options.max_patches)
    device = options.device
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))  # torchrun's, srun's
    if device is None and local is not None and torch.cuda.is_available():
        device = f"cuda:{int(local) % torch.cuda.device_count()}"  # srun may show each task its own GPU alone
    try:
        rank, ranks = find_rank(os.environ)
        if options.engine == "ray" and ranks > 1:
            raise ValueError(
                "--engine ray shares the slides out itself: start it once, not with torchrun or in an array."
            )
        jobs = share_jobs(find_slides(options.slides, options.slide_mpp), rank, ranks)
        options.out.mkdir(parents=True, exist_ok=True)
        check_settings(options.out, settings)
        order = Order(settings, options.out, options.part_seconds, options.stall_seconds)
        if options.engine == "ray":
            work = functools.partial(extract_on_ray, order=order, encoders=options.encoders)
        else:
            work = functools.partial(extract_in_child, order=order, device=device)
        rows = extract_all(jobs, options.out, work, rank)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on where this one was.", file=sys.stderr)
        return 130
    failed = sum(row.outcome == "failed" for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} slides are done, {failed} failed; see {options.out / 'report.csv'}.")
    # torchrun ends all ranks as soon as one exits with another status, and the others may have slides left.
    return 1 if failed and "LOCAL_RANK" not in os.environ else 0


if __name__ == "__main__":
    raise SystemExit(main())
