"""Features of a cohort: one <slide>.safetensors for every slide of a folder, a pattern or a CSV.

    python -m sparsewsi.cohort.extract slides/ --out features
    python -m sparsewsi.cohort.extract cohort.csv --out features --encoder uni   # columns: slide, mpp (may be empty)
    torchrun --nproc_per_node=2 -m sparsewsi.cohort.extract slides/ --out features       # one rank per GPU
    sbatch --array=0-9 ... python -m sparsewsi.cohort.extract '/data/*.svs' --out features

    OUT/extract.json         the settings: a folder holds features of one kind only
    OUT/<stem>.safetensors   a Bag, whole or absent; <stem> is the slide's file name without its suffix
    OUT/.<stem>.parts/       what is done of a slide that is not finished
    OUT/report/<rank>.jsonl  a line for every slide worked on; OUT/report.csv: the last line of every slide

A run that was stopped in any way goes on where it was when it is started again, and ends with the same files. Slides
are read and encoded in a child process: a decoder that crashes takes the child along, not the batch.
"""

from __future__ import annotations

import argparse
import csv
import errno
import functools
import glob
import hashlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from sparsewsi.bags.bag import bag_of, choose_coords, encode_patches, read_patches, replacing, save_bag
from sparsewsi.bags.encoders import PatchEncoder, load_encoder, stated_name
from sparsewsi.files import IMAGE_SUFFIXES, SLIDE_SUFFIXES, walk
from sparsewsi.slides.slide import Slide, open_slide

Show = Callable[["Job", int, int], None]  # what to do with news of a slide: patches done, patches in all


@dataclass(frozen=True)
class Settings:
    """What the features of a folder have in common."""

    encoder: str
    mpp: float  # um/px at which patches are read
    patch_size: int  # px at that mpp
    max_patches: int | None = None


@dataclass(frozen=True)
class Job:
    """One slide to do. stem: the name of its output; slide_mpp: um/px of level 0, where the user states it."""

    path: Path
    stem: str
    slide_mpp: float | None = None
    bytes: int = 0
    problem: str = ""  # why it cannot be done, as far as its path tells


@dataclass(frozen=True)
class Row:
    """What the report says of one slide. outcome: "done" | "empty" (no tissue) | "failed" (warnings say why)."""

    slide: str
    outcome: str
    patches: int = 0
    slide_mpp: float | None = None
    mpp_source: str = ""
    seconds: float = 0.0
    resumed_at: int = 0  # patches that an earlier run had done
    warnings: str = ""
    unreadable: list[list[int]] = field(default_factory=list)  # (x, y) of patches left out, level-0 px
    time: str = ""


# ---- which slides


def find_slides(sources: Iterable[str], slide_mpp: float | None = None) -> list[Job]:
    """The slides of folders (searched deeply), glob patterns, CSV files (`slide, mpp`) and single files, by stem.

    In a folder a PNG or JPEG counts unless a slide has the same stem, and a DICOM slide is its folder. A path in a CSV
    is relative to the CSV. slide_mpp applies where a CSV states none.
    Raises ValueError for a source that names nothing, or a CSV that cannot be read.
    """
    jobs: list[Job] = []
    for source in sources:
        path = Path(source)
        if path.suffix.lower() == ".csv" and path.is_file():
            found = _slides_of_csv(path, slide_mpp)
        elif path.is_dir():
            found = _slides_of_folder(path, slide_mpp)
        else:
            paths = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(source, recursive=True))]
            if not paths:
                raise ValueError(f"There is no slide, folder or CSV at {source}, and no file matches it as a pattern.")
            found = []
            for match in paths:
                is_slide = match.is_file() or any(match.glob("*.dcm"))
                found += [_job(match, slide_mpp)] if is_slide else _slides_of_folder(match, slide_mpp)
        if not found and not Path(f"{path}.mrxs").is_file():  # a shell's slides/* names the data folders of MRXS too
            raise ValueError(f"There is no slide in {source}. Pass the folder or the file that has them.")
        jobs += found
    unique = {(os.path.abspath(job.path), job.slide_mpp): job for job in jobs}
    return sorted(_with_own_stems(list(unique.values())), key=lambda job: (job.stem, str(job.path)))


def _slides_of_folder(folder: Path, slide_mpp: float | None) -> list[Job]:
    jobs: list[Job] = []
    closed: list[OSError] = []
    for where, names in walk(folder, closed.append):
        suffixes = {name: Path(name).suffix.lower() for name in names if not name.startswith(".")}
        if ".dcm" in suffixes.values():
            jobs.append(_job(where, slide_mpp))
        wanted = (*SLIDE_SUFFIXES, *IMAGE_SUFFIXES)
        jobs += [_job(where / name, slide_mpp) for name, suffix in suffixes.items() if suffix in wanted]
    slides = {job.stem for job in jobs if job.path.suffix.lower() not in IMAGE_SUFFIXES}
    jobs = [job for job in jobs if job.path.suffix.lower() not in IMAGE_SUFFIXES or job.stem not in slides]
    for error in closed:
        place = Path(error.filename)
        jobs.append(Job(place, place.name, problem=f"The folder cannot be searched: {error.strerror}."))
    return jobs


def _slides_of_csv(table: Path, slide_mpp: float | None) -> list[Job]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            rows = [{key.strip(): (value or "").strip() for key, value in row.items() if key} for row in reader]
            columns = [name.strip() for name in reader.fieldnames or []]
    except (UnicodeDecodeError, csv.Error, AttributeError) as error:
        raise ValueError(f"{table.name} is not a table of comma-separated values: {error}.") from error
    if "slide" not in columns:
        raise ValueError(
            f"{table.name} needs a column `slide` (and may have `mpp`), got {', '.join(columns) or 'none'}."
        )
    jobs = []
    for row in rows:
        if not row["slide"]:
            continue
        path, text = table.parent / row["slide"], row.get("mpp", "")
        try:
            jobs.append(_job(path, float(text) if text else slide_mpp))
        except ValueError:
            jobs.append(replace(_job(path, None), problem=f"{table.name} states an mpp of {text!r}; write a number."))
    return jobs


def _job(path: Path, slide_mpp: float | None) -> Job:
    stem = path.name if path.is_dir() else path.stem
    try:
        stem.encode()
        return Job(path, stem, slide_mpp, _bytes(path))
    except UnicodeEncodeError:  # safetensors opens no file of such a name
        return Job(path, stem, slide_mpp, problem="The slide's name is not valid UTF-8; rename it.")
    except OSError as error:
        return Job(path, stem, slide_mpp, problem=f"The slide cannot be read: {error.strerror}.")


def _bytes(path: Path) -> int:
    """Size of a slide on disk; of a DICOM folder, and of MRXS with its data folder, all of it."""
    beside = path.with_suffix("") if path.suffix.lower() == ".mrxs" else path
    more = sum(file.stat().st_size for file in beside.iterdir() if file.is_file()) if beside.is_dir() else 0
    return more + (0 if path.is_dir() else path.stat().st_size)


def _with_own_stems(jobs: list[Job]) -> list[Job]:
    """Jobs that would write the same file are marked as not to be done."""
    by_stem: dict[str, list[Job]] = {}
    for job in jobs:
        by_stem.setdefault(job.stem, []).append(job)
    marked: list[Job] = []
    for stem, same in by_stem.items():
        places = ", ".join(sorted(str(job.path) for job in same)[:3]) + ", ..." * (len(same) > 3)
        clash = f"{len(same)} slides would write {stem}.safetensors ({places}); give each an --out of its own."
        marked += [replace(job, problem=job.problem or clash) for job in same] if len(same) > 1 else same
    return marked


# ---- whose slides


def rank_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """(rank, ranks): from torchrun or srun, from a SLURM array, or from both (each task of the array starts one)."""
    rank, ranks = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if "RANK" not in environment and "SLURM_STEP_NUM_TASKS" in environment:  # only srun sets it
        rank, ranks = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
    if "SLURM_ARRAY_TASK_ID" in environment:
        tasks = int(environment["SLURM_ARRAY_TASK_COUNT"])
        first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{key}", d)) for key, d in (("MIN", 0), ("STEP", 1)))
        task = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
        if not 0 <= task < tasks:
            raise ValueError("The SLURM array must be one range, such as --array=0-9: its tasks count off the slides.")
        rank, ranks = task * ranks + rank, tasks * ranks
    return rank, ranks


def share(jobs: list[Job], rank: int, ranks: int) -> list[Job]:
    """This rank's jobs, largest first. All ranks see the same jobs, done or not, and so agree on who does what."""
    loads, mine = [0] * ranks, []
    for job in sorted(jobs, key=lambda job: (-job.bytes, job.stem, str(job.path))):
        least = loads.index(min(loads))
        loads[least] += max(1, job.bytes)
        if least == rank:
            mine.append(job)
    return mine


# ---- one slide


def extract_slide(job: Job, settings: Settings, out: Path, encoder: PatchEncoder, part_seconds: float = 20.0) -> Row:
    """Encode one slide into OUT/<stem>.safetensors, from where an earlier run stopped.

    part_seconds: what is encoded is put on disk that often; a killed run loses no more
    Raises SlideError, ValueError or OSError if it cannot be done.
    """
    began = time.monotonic()
    with open_slide(job.path, slide_mpp=job.slide_mpp) as slide:
        coords, identity = _plan(slide, job, settings)
        work = Unfinished(_parts(job, out), identity, coords, encoder.dim, part_seconds)
        _tell(work.done, len(coords))
        todo = coords[work.done :]
        with closing(encode_patches(slide, encoder, todo, settings.mpp, settings.patch_size)) as batches:
            for features, fine in batches:
                work.add(np.arange(work.done, work.done + len(fine)), features.half(), fine)
                _tell(work.done, len(coords))
        return _finish(work, slide, job, settings, out, began)


def _plan(slide: Slide, job: Job, settings: Settings) -> tuple[np.ndarray, str]:
    """What to read: (coords (N, 2), an identity that parts of this very work bear)."""
    coords = choose_coords(slide, settings.mpp, settings.patch_size, settings.max_patches)
    facts = [asdict(settings), slide.name, job.bytes, slide.mpp, len(coords)]
    return coords, hashlib.sha256(json.dumps(facts).encode() + coords.tobytes()).hexdigest()


def _parts(job: Job, out: Path) -> Path:
    return out / f".{job.stem}.parts"


def _finish(work: Unfinished, slide: Slide, job: Job, settings: Settings, out: Path, began: float) -> Row:
    """Write the slide's file from all its patches, and forget the parts."""
    fine = work.readable
    features = work.features if fine.all() else work.features[torch.from_numpy(fine)]
    bag = bag_of(slide, stated_name(settings.encoder), work.coords, fine, features, settings.mpp, settings.patch_size)
    final = out / f"{job.stem}.safetensors"
    for leftover in out.glob(f".{glob.escape(final.name)}.*.partial"):
        leftover.unlink(missing_ok=True)
    save_bag(bag, final, made_from={"bytes": job.bytes, "slide_mpp": job.slide_mpp})
    shutil.rmtree(_parts(job, out), ignore_errors=True)
    return replace(
        _row_of(job.stem, len(bag.features), bag.slide_mpp, bag.mpp_source, bag.note),
        seconds=round(time.monotonic() - began, 2),
        resumed_at=work.resumed_at,
        unreadable=work.coords[~fine].tolist(),
    )


class Unfinished:
    """The patches of one slide that are encoded: all in memory, the first so many on disk, whatever order they come in.

    features (N, D) float16 (rows of unreadable patches mean nothing), readable (N,) bool; done: patches 0 to done - 1
    are here; resumed_at: how many of them an earlier run left.
    """

    def __init__(self, folder: Path, identity: str, coords: np.ndarray, dim: int, part_seconds: float):
        self._folder, self._identity, self._part_seconds = folder, identity, part_seconds
        self.coords = coords
        self.features = torch.empty(len(coords), dim, dtype=torch.float16)
        self.readable = np.zeros(len(coords), bool)
        self._here = np.zeros(len(coords), bool)
        self.resumed_at = self.done = self._saved = _resume(folder, identity)
        for path in folder.glob("*.safetensors"):
            part, start = load_file(path), int(path.stem)
            fine = part["readable"].numpy()
            self._put(np.arange(start, start + len(fine)), part["features"], fine)
        self._since = time.monotonic()

    def add(self, index: np.ndarray, features: Tensor, fine: np.ndarray) -> None:
        """Patches number index (b,): which could be read, fine (b,) bool, and the features of those (fine.sum(), D)."""
        self._put(index, features, fine)
        missing = ~self._here[self.done :]
        self.done += int(missing.argmax()) if missing.any() else len(missing)
        if time.monotonic() - self._since >= self._part_seconds and self.done > self._saved:
            part = slice(self._saved, self.done)
            kept = torch.from_numpy(self.readable[part])
            _save_part(self._folder, self._saved, self._identity, self.features[part][kept], kept)
            self._saved, self._since = self.done, time.monotonic()

    def _put(self, index: np.ndarray, features: Tensor, fine: np.ndarray) -> None:
        self.features[torch.from_numpy(index[fine])] = features
        self.readable[index] = fine
        self._here[index] = True


def _resume(folder: Path, identity: str) -> int:
    """Patches that are on disk already; parts of another slide, of other settings, or without their beginning go."""
    done = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                if file.metadata().get("identity") == identity and int(path.stem) == done:
                    done += file.get_slice("readable").get_shape()[0]
                    continue
        except (SafetensorError, ValueError, OSError):
            pass
        path.unlink()
    for leftover in folder.glob(".*.partial"):
        leftover.unlink(missing_ok=True)
    return done


def _save_part(folder: Path, start: int, identity: str, features: Tensor, readable: Tensor) -> None:
    """The patches from number `start` on, atomically: features (readable patches, D), readable (b,) bool."""
    part = {"features": features.contiguous(), "readable": readable}
    with replacing(folder / f"{start:09d}.safetensors") as partial:
        save_file(part, partial, metadata={"identity": identity})


def finished(job: Job, out: Path) -> Row | None:
    """The row of a slide whose file is there and was made from this very slide file; None if it is to be done.

    Reads the file's header only: a cohort's features are hundreds of gigabytes.
    Raises ValueError if the file there is not whole, or was not made by this program.
    """
    path = out / f"{job.stem}.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:  # compares the file's length with what its header promises
            facts = json.loads((file.metadata() or {}).get("sparsewsi_bag", "{}"))
            patches = file.get_slice("features").get_shape()[0] if facts else 0
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path.name} is there, but is no whole feature file. Delete or move it.") from error
    if "made_from" not in facts:
        raise ValueError(f"{path.name} is there, but not from this program. Move it, or choose another --out.")
    if facts["made_from"] != {"bytes": job.bytes, "slide_mpp": job.slide_mpp}:
        return None
    return _row_of(job.stem, patches, facts["slide_mpp"], facts["mpp_source"], facts["note"])


def _row_of(stem: str, patches: int, slide_mpp: float | None, mpp_source: str, note: str) -> Row:
    return Row(stem, "done" if patches else "empty", patches, slide_mpp, mpp_source, warnings=note)


# ---- the child process


_progress: Any = None  # shared with the parent: patches done, patches in all, process id


def _begin_child(progress: Any) -> None:
    """First thing in a child: remember where to tell progress, and end when the parent does, however it ends."""
    global _progress
    _progress = progress
    progress[2] = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _tell(done: int, total: int) -> None:
    if _progress is not None:
        _progress[0], _progress[1] = done, total


@functools.cache
def _encoder(name: str, device: str | None) -> PatchEncoder:
    return load_encoder(name, device)


def _encoder_name(name: str, device: str | None) -> str:
    """Load the encoder. Raises ValueError, in the parent as well, if that cannot be done."""
    return _encoder(name, device).name


def _attempt(job: Job, settings: Settings, out: Path, device: str | None, part_seconds: float) -> Row:
    """extract_slide, with whatever goes wrong as a row."""
    _tell(0, 0)
    try:
        return extract_slide(job, settings, out, _encoder(settings.encoder, device), part_seconds)
    except Exception as error:  # one slide never stops the batch
        return _failed(job, out, error)


def _failed(job: Job, out: Path, error: Exception) -> Row:
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:  # its parts would keep the report from being written
            shutil.rmtree(_parts(job, out), ignore_errors=True)
        return Row(job.stem, "failed", warnings=f"{error.strerror or error}.")
    return Row(job.stem, "failed", warnings=str(error) if isinstance(error, ValueError) else repr(error))


class Child:
    """One process that does one call after another; replaced by a new one when it dies or stands still."""

    def __init__(self, stall_seconds: float):
        self._context = multiprocessing.get_context("spawn")
        self._stall_seconds = stall_seconds
        self._pool: ProcessPoolExecutor | None = None
        self.progress = self._context.Array("q", 3, lock=False)  # patches done, patches in all, process id

    def call(
        self, function: Callable[..., Any], *arguments: Any, each_second: Callable[[int, int], None] = lambda *_: None
    ) -> Any:
        """function(*arguments) in the child; each_second gets patches done, patches in all.

        Raises BrokenProcessPool if the child died or had to be killed.
        """
        if self._pool is None:
            self.progress[2] = 0
            self._pool = ProcessPoolExecutor(1, self._context, _begin_child, (self.progress,))
        try:
            future = self._pool.submit(function, *arguments)
            seen, since = tuple(self.progress), time.monotonic()
            while not wait([future], timeout=1.0).done:
                each_second(self.progress[0], self.progress[1])
                if tuple(self.progress) != seen:
                    seen, since = tuple(self.progress), time.monotonic()
                elif time.monotonic() - since > self._stall_seconds:
                    self._kill()
            return future.result()
        except KeyboardInterrupt:
            self._kill()
            raise
        except BrokenProcessPool:
            self.close()
            raise

    def _kill(self) -> None:
        if self.progress[2]:
            os.kill(self.progress[2], getattr(signal, "SIGKILL", signal.SIGTERM))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def in_a_child(
    todo: list[Job],
    show: Show,
    settings: Settings,
    out: Path,
    *,
    device: str | None = None,
    part_seconds: float = 20.0,
    stall_seconds: float = 1800.0,
) -> Generator[tuple[Job, Row]]:
    """The slides one after another, in a child process. Raises ValueError if the encoder cannot be loaded."""
    with closing(Child(stall_seconds)) as child:
        child.call(_encoder_name, settings.encoder, device)
        for job in todo:
            row = Row(job.stem, "failed", warnings="The process that read it died or stood still, twice.")
            for _ in range(2):  # once more, from where it was, if the child dies: it may have died of something else
                with suppress(BrokenProcessPool):
                    each_second = functools.partial(show, job)
                    row = child.call(_attempt, job, settings, out, device, part_seconds, each_second=each_second)
                    break
            yield job, row


# ---- the report


class Report:
    """OUT/report/<rank>.jsonl, one line per slide worked on, and OUT/report.csv, the last line of every slide."""

    def __init__(self, out: Path, rank: int):
        self._folder, self._table = out / "report", out / "report.csv"
        self._path = self._folder / f"{rank}.jsonl"
        self._rank = rank
        self._unwritten: list[str] = []
        self.rows = self.read()

    def read(self) -> dict[str, Row]:
        """The latest row of every slide, of all ranks and runs."""
        rows: list[Row] = []
        for path in sorted(self._folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(Row(**json.loads(line)))
                except (ValueError, TypeError):
                    continue  # a line that a killed run left unfinished
        return {row.slide: row for row in sorted(rows, key=lambda row: row.time)}

    def add(self, row: Row) -> None:
        """Put a row on disk; if the disk is full, together with a later one."""
        row = replace(row, time=datetime.now(UTC).isoformat(timespec="milliseconds"))
        self.rows[row.slide] = row
        self._unwritten.append(json.dumps(asdict(row)) + "\n")
        try:
            self._folder.mkdir(exist_ok=True)
            # A killed run may have left half a line.
            with self._path.open("a+b") as file:
                size = file.seek(0, io.SEEK_END)
                file.seek(max(0, size - 1))
                torn = size > 0 and file.read(1) != b"\n"
                file.write(("\n" * torn + "".join(self._unwritten)).encode())
            self._unwritten.clear()
        except OSError as error:
            print(f"The report cannot be written: {error.strerror}.", file=sys.stderr)

    def add_if_new(self, row: Row) -> None:
        """Add a row of a slide that was worked on, or whose row says something else than the last."""
        known = self.rows.get(row.slide)
        if row.seconds or known is None or (known.outcome, known.warnings) != (row.outcome, row.warnings):
            self.add(row)

    def finish(self) -> None:
        """Write the table of all slides so far. Every rank does so; the last one to end writes the complete one."""
        rows = sorted(self.read().values(), key=lambda row: row.slide)
        columns = [column.name for column in fields(Row)]
        partial = self._table.with_name(f".report.csv.{self._rank}")
        try:
            with partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(asdict(row) | {"unreadable": len(row.unreadable)} for row in rows)
            os.replace(partial, self._table)
        except OSError as error:
            print(f"report.csv cannot be written: {error.strerror}.", file=sys.stderr)


# ---- on a Ray cluster


def on_ray(
    todo: list[Job],
    show: Show,
    settings: Settings,
    out: Path,
    *,
    encoders: int | None = None,
    part_seconds: float = 20.0,
    stall_seconds: float = 1800.0,
) -> Generator[tuple[Job, Row]]:
    """The slides on the Ray cluster of RAY_ADDRESS, or on this machine: tasks read, a pool of actors encodes.

    encoders: actors in the pool; default one per GPU, without any one per two CPUs
    Slides, OUT and this program lie on a disk that all machines see. Only this process writes, and what it has not got
    of a slide when it is stopped is read again. A task or actor that dies is started again, a slide that kills its task
    every time is reported. Raises ValueError without Ray, and if the encoder cannot be loaded.
    """
    try:
        import ray
        import ray.exceptions
        from ray.data import ActorPoolStrategy, DataContext
    except ImportError as error:
        raise ValueError("--engine ray needs Ray; install the extra: pip install -e '.[cluster]'.") from error

    left: list[tuple[str, int]] = []  # by an earlier run, of each slide: identity, patches
    for job in todo:
        identity = _identity_of(_parts(job, out))
        left.append((identity, _resume(_parts(job, out), identity)))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    gpus, cpus = (int(ray.cluster_resources().get(name, 0)) for name in ("GPU", "CPU"))
    pool = encoders or gpus or max(1, cpus // 2)
    if (need := 1 + (0 if gpus else pool)) > cpus:
        raise ValueError(f"{pool} encoders and a reader need {need} CPUs, Ray has {cpus}; lower --encoders.")
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 16 << 20  # about 100 patches
    context.max_errored_blocks = -1  # a slide that kills its task is missing at the end, and stops no other
    stream = (
        ray.data.from_items(list(range(len(todo))), override_num_blocks=len(todo))
        .map_batches(
            _read_on_ray,  # type: ignore[arg-type]  # Ray's types leave fn_kwargs out
            batch_size=1,
            fn_kwargs={"todo": todo, "left": left, "settings": settings, "stall_seconds": stall_seconds},
            num_cpus=1,
            max_retries=2,
        )
        .map_batches(
            _EncodeOnRay,
            batch_size=64,
            fn_constructor_args=(settings.encoder,),
            compute=ActorPoolStrategy(size=pool),
            num_gpus=1 if gpus else 0,
        )
    )
    missing = dict.fromkeys(todo)
    try:
        for job, row in _collect(stream, todo, settings, out, part_seconds):
            del missing[job]
            yield job, row
    except ray.exceptions.RayError as error:
        raise ValueError(f"Ray gave up: {str(error).strip().splitlines()[-1]}") from error
    text = "Not all of its patches arrived: the process that read or encoded them failed, died or stood still."
    yield from ((job, Row(job.stem, "failed", warnings=text)) for job in missing)


def _identity_of(folder: Path) -> str:
    """What the parts of a folder are parts of; "" if there is none."""
    try:
        with safe_open(folder / f"{0:09d}.safetensors", "pt") as file:
            return file.metadata()["identity"]
    except (SafetensorError, OSError, TypeError, KeyError):
        return ""


def _read_on_ray(
    batch: dict[str, np.ndarray],
    todo: list[Job],
    left: list[tuple[str, int]],
    settings: Settings,
    stall_seconds: float,
) -> Iterator[dict[str, np.ndarray]]:
    """A task: the rows of slide number `item`. If it stands still it ends its process, and Ray runs it again."""
    number = int(batch["item"][0])
    rows = _rows_of(number, todo[number], left[number], settings)
    while True:
        watch = threading.Timer(stall_seconds, os._exit, (1,))
        watch.daemon = True
        watch.start()
        try:
            some = next(rows, None)
        finally:
            watch.cancel()
        if some is None:
            return
        yield some


def _rows_of(number: int, job: Job, left: tuple[str, int], settings: Settings) -> Iterator[dict[str, np.ndarray]]:
    """One slide: a row of index -1 with what is to be read, as JSON (or what is wrong), and then its patches.

    Ray may read a slide several times and mix the results, so they depend on the arguments and the slide alone.
    """
    side = settings.patch_size

    def rows(index: np.ndarray, pixels: np.ndarray, fine: np.ndarray, plan: str = "") -> dict[str, np.ndarray]:
        if not fine.all():  # of a fixed size, as Ray has it; what is not fine is never encoded
            readable, pixels = pixels, np.zeros((len(fine), side, side, 3), np.uint8)
            pixels[fine] = readable
        plans = np.full(len(index), plan, object)
        return {"number": np.full(len(index), number), "index": index, "pixels": pixels, "fine": fine, "plan": plans}

    def head(**plan: Any) -> dict[str, np.ndarray]:
        return rows(np.array([-1]), np.zeros((0, side, side, 3), np.uint8), np.array([False]), json.dumps(plan))

    began = time.time()  # another machine's clock, for the report alone
    try:
        with open_slide(job.path, slide_mpp=job.slide_mpp) as slide:
            coords, identity = _plan(slide, job, settings)
            yield head(identity=identity, coords=coords.tolist(), began=began)
            done = left[1] if identity == left[0] else 0
            with closing(read_patches(slide, coords[done:], settings.mpp, side)) as batches:
                for pixels, fine in batches:
                    yield rows(np.arange(done, done + len(fine)), pixels, fine)
                    done += len(fine)
    except Exception as error:  # one slide never stops the batch
        yield head(problem=str(error) if isinstance(error, ValueError) else repr(error))


class _EncodeOnRay:
    """An actor: pixels in, features out."""

    def __init__(self, encoder: str):
        self._encoder = load_encoder(encoder)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pixels, fine = batch.pop("pixels"), batch["fine"]
        features = np.zeros((len(fine), self._encoder.dim), np.float16)
        features[fine] = self._encoder(pixels[fine]).half().numpy()
        return batch | {"features": features}


def _collect(
    stream: Any, todo: list[Job], settings: Settings, out: Path, part_seconds: float
) -> Generator[tuple[Job, Row]]:
    """Put together what comes in any order, and write a slide once all of it is here."""
    works: dict[int, tuple[Unfinished, float]] = {}
    early: dict[int, list[tuple[np.ndarray, Tensor, np.ndarray]]] = {}  # before the row that says what is to be read
    over: set[int] = set()
    for batch in stream.iter_batches(batch_size=None, batch_format="numpy"):
        for number in map(int, np.unique(batch["number"])):
            if number in over:
                continue
            job = todo[number]
            try:
                mine = batch["number"] == number
                index, fine, features, plans = (batch[key][mine] for key in ("index", "fine", "features", "plan"))
                for plan in map(json.loads, plans[index < 0]):  # two where the slide turned out to be damaged
                    if "problem" in plan:
                        raise ValueError(plan["problem"])
                    coords = np.array(plan["coords"], np.int32).reshape(-1, 2)
                    work = Unfinished(_parts(job, out), plan["identity"], coords, features.shape[1], part_seconds)
                    works[number] = work, time.monotonic() - max(0.0, time.time() - plan["began"])
                patches = index >= 0
                kept = torch.from_numpy(features[patches & fine])
                early.setdefault(number, []).append((index[patches], kept, fine[patches]))
                if number not in works:
                    continue
                work, began = works[number]
                for part in early.pop(number):
                    work.add(*part)
                if work.done < len(work.coords):
                    continue
                with open_slide(job.path, slide_mpp=job.slide_mpp) as slide:
                    row = _finish(work, slide, job, settings, out, began)
            except Exception as error:  # one slide never stops the batch
                row = _failed(job, out, error)
            over.add(number)
            works.pop(number, None)
            early.pop(number, None)
            yield job, row


# ---- all slides


def check_settings(out: Path, settings: Settings) -> None:
    """Claim OUT for features of these settings. Raises ValueError if it holds features of others."""
    path = out / "extract.json"
    in_use = any(out.glob("*.safetensors")) or any(out.glob(".*.parts"))
    if not (path.is_file() and in_use):  # a run that failed at once, over a misspelt encoder say, has claimed nothing
        with replacing(path) as partial:
            partial.write_text(json.dumps(asdict(settings), indent=2) + "\n")
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
    """Do what is not done yet by `work`, which is in_a_child or on_ray, and report every slide as it is done."""
    report, rows, behind = Report(out, rank), {}, 0

    def record(job: Job, row: Row) -> None:
        nonlocal behind
        rows[job.path], behind = row, behind + max(1, job.bytes)
        report.add_if_new(row)
        if row.outcome == "failed":
            tqdm.write(f"{job.stem}: {row.warnings}", file=sys.stderr)

    for job in jobs:
        if (row := _settled(job, out)) is not None:
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


def _settled(job: Job, out: Path) -> Row | None:
    """The row of a slide that is done or cannot be."""
    try:
        return Row(job.stem, "failed", warnings=job.problem) if job.problem else finished(job, out)
    except (ValueError, OSError) as error:
        return _failed(job, out, error)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 1 if slides failed (they are in the report); 2 with a sentence if the input is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    options = parser.parse_args(arguments)
    settings = Settings(options.encoder, options.mpp, options.patch_size, options.max_patches)
    device = options.device
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))  # torchrun's, srun's
    if device is None and local is not None and torch.cuda.is_available():
        device = f"cuda:{int(local) % torch.cuda.device_count()}"  # srun may show each task its own GPU alone
    try:
        rank, ranks = rank_of(os.environ)
        if options.engine == "ray" and ranks > 1:
            raise ValueError(
                "--engine ray shares the slides out itself: start it once, not with torchrun or in an array."
            )
        jobs = share(find_slides(options.slides, options.slide_mpp), rank, ranks)
        options.out.mkdir(parents=True, exist_ok=True)
        check_settings(options.out, settings)
        same = {
            "settings": settings,
            "out": options.out,
            "part_seconds": options.part_seconds,
            "stall_seconds": options.stall_seconds,
        }
        if options.engine == "ray":
            work = functools.partial(on_ray, encoders=options.encoders, **same)
        else:
            work = functools.partial(in_a_child, device=device, **same)
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
