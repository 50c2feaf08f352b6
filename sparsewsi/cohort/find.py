"""Which slides there are, what their files will be called, and which rank does which."""

import csv
import glob
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sparsewsi.files import as_path
from sparsewsi.slides.find import Found, find_slides_in, slide_stem, sort_files

log = logging.getLogger(__name__)
LONGEST_NAME = 255  # bytes, of file systems
_MORE = "(more)"  # cells of a row that is longer than the header


@dataclass(frozen=True)
class Job:
    """One slide to do. stem: the name of its output; slide_mpp: um/px of level 0, where the user states it."""

    path: Path
    stem: str
    slide_mpp: float | None = None
    bytes: int = 0
    problem: str = ""  # why it cannot be done, as far as its path tells


def find_slides(sources: Iterable[str], slide_mpp: float | None = None) -> list[Job]:
    """The slides of folders (searched deeply), glob patterns, CSV files (`slide, mpp`) and single files, by stem.

    What a slide is in a folder, its content decides (slides/find.py); what is left out is logged. A path in a CSV is
    relative to the CSV. slide_mpp applies where a CSV states none.
    Raises ValueError for a source that names nothing, or a CSV that cannot be read.
    """
    jobs: list[Job] = []
    alone: dict[Path, None] = {}  # files that were named one by one
    for source in sources:
        path = as_path(source)
        if path.suffix.lower() == ".csv" and path.is_file():
            found = _read_csv(path, slide_mpp)
        elif path.is_dir():
            found = _search_folder(path, slide_mpp)
        else:
            paths = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(source, recursive=True))]
            if not paths:
                raise ValueError(f"There is no slide, folder or CSV at {source}, and no file matches it as a pattern.")
            alone |= dict.fromkeys(match for match in paths if match.is_file())
            folders = [match for match in paths if match.is_dir()]
            found = [job for match in folders for job in _search_folder(match, slide_mpp)]
            if len(folders) < len(paths):
                continue
        if not found and not Path(f"{path}.mrxs").is_file():  # a shell's slides/* names the data folders of MRXS too
            raise ValueError(f"There is no slide in {source}. Pass the folder or the file that has them.")
        jobs += found
    # One file is what the user says it is; of several, as a shell's slides/* names them, some belong to others.
    listed = Found(tuple(alone)) if len(alone) == 1 else sort_files(alone)
    _tell_left_out(listed)
    jobs += [make_job(path, slide_mpp) for path in listed.slides]
    if not jobs and listed.left_out:
        raise ValueError(f"None of the {len(alone)} files is a slide. Pass the folder or the file that has them.")
    unique = {(os.path.abspath(job.path), job.slide_mpp): job for job in jobs}
    return sorted(_mark_clashes(list(unique.values())), key=lambda job: (job.stem, str(job.path)))


def _search_folder(folder: Path, slide_mpp: float | None) -> list[Job]:
    found = find_slides_in(folder)
    _tell_left_out(found)
    jobs = [make_job(path, slide_mpp) for path in found.slides]
    for error in found.closed:
        place = Path(error.filename)
        jobs.append(Job(place, place.name, problem=f"The folder cannot be searched: {error.strerror}."))
    return jobs


def _tell_left_out(found: Found) -> None:
    if found.left_out:
        path, why = found.left_out[0]
        log.warning("Left out: %d files, such as %s (%s).", len(found.left_out), path.name, why)


def _read_csv(table: Path, slide_mpp: float | None) -> list[Job]:
    def fold(name: str) -> str:
        return name.strip().casefold()

    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True, restkey=_MORE)
            columns = [fold(name) for name in reader.fieldnames or []]
            given = list(reader)
            longer = next((row for row in given if any(map(str.strip, row.pop(_MORE, ())))), None)
            rows = [{fold(key): (value or "").strip() for key, value in row.items() if key} for row in given]
    except csv.Error as error:
        raise ValueError(f"{table.name}: a quotation mark is not closed as it should be ({error}).") from error
    except (UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{table.name} is not a table of comma-separated values in UTF-8: {error}.") from error
    if "slide" not in columns:
        mark = next((name for sign, name in ((";", "semicolons"), ("\t", "tabs")) if sign in "".join(columns)), "")
        raise ValueError(
            f"{table.name} needs a column `slide` (and may have `mpp`), got {', '.join(columns) or 'none'}"
            + (f", set off by commas, not {mark}." if mark else ".")
        )
    if longer is not None:
        raise ValueError(
            f"{table.name}: the row of {str(next(iter(longer.values())))[:80]} has more cells than the header. Put a "
            "name with a comma in quotation marks, and write numbers with a point."
        )
    unclear = [name for name in columns if name not in ("slide", "mpp") and "mpp" in name]
    unclear += [name for name in ("slide", "mpp") if columns.count(name) > 1]
    if unclear:
        raise ValueError(
            f"{table.name}: slides and um/px are read from one column each, called slide and mpp; got {unclear[0]}."
        )
    jobs = []
    for row in rows:
        if not row["slide"]:
            continue
        path, text = as_path(table.parent / as_path(row["slide"])), row.get("mpp", "")
        try:
            mpp = float(text) if text else slide_mpp
            if mpp is not None and not 0 < mpp < math.inf:
                raise ValueError
            jobs.append(make_job(path, mpp))
        except ValueError:
            jobs.append(
                replace(make_job(path, None), problem=f"{table.name} states an mpp of {text!r}; write a number.")
            )
    return jobs


def make_job(path: Path, slide_mpp: float | None) -> Job:
    """The job of one slide, with what its path tells of why it cannot be done."""
    stem = path.name if path.is_dir() else slide_stem(path)
    try:
        over = len(f"{stem}.safetensors".encode()) - LONGEST_NAME
        if over > 0:
            words = f"The slide's name is {over} bytes too long for <name>.safetensors; give it a shorter one."
            return Job(path, stem, slide_mpp, problem=words)
        return Job(path, stem, slide_mpp, _measure_bytes(path))
    except UnicodeEncodeError:  # safetensors opens no file of such a name
        return Job(path, stem, slide_mpp, problem="The slide's name is not valid UTF-8; rename it.")
    except OSError as error:
        return Job(path, stem, slide_mpp, problem=f"The slide cannot be read: {error.strerror}.")
    except ValueError:  # a null byte
        return Job(path, stem, slide_mpp, problem="The slide's path holds signs that no path has; write it anew.")


def _measure_bytes(path: Path) -> int:
    """Size of a slide on disk; of a DICOM folder, and of MRXS with its data folder, all of it."""
    beside = path.with_suffix("") if path.suffix.lower() == ".mrxs" else path
    more = sum(file.stat().st_size for file in beside.iterdir() if file.is_file()) if beside.is_dir() else 0
    return more + (0 if path.is_dir() else path.stat().st_size)


def _mark_clashes(jobs: list[Job]) -> list[Job]:
    """Jobs that would write the same file are marked as not to be done."""
    by_stem: dict[str, list[Job]] = {}
    for job in jobs:
        by_stem.setdefault(job.stem, []).append(job)
    marked: list[Job] = []
    for stem, same in by_stem.items():
        paths = sorted(str(job.path) for job in same)
        places = ", ".join([*paths[:3], *(["..."] if len(same) > 3 else [])])
        clash = f"{len(same)} slides would write {stem}.safetensors ({places}); give each an --out of its own."
        marked += [replace(job, problem=job.problem or clash) for job in same] if len(same) > 1 else same
    return marked


def find_rank(environment: Mapping[str, str]) -> tuple[int, int]:
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


def share_jobs(jobs: list[Job], rank: int, ranks: int) -> list[Job]:
    """This rank's jobs, largest first. All ranks see the same jobs, done or not, and so agree on who does what."""
    loads, mine = [0] * ranks, []
    for job in sorted(jobs, key=lambda job: (-job.bytes, job.stem, str(job.path))):
        least = loads.index(min(loads))
        loads[least] += max(1, job.bytes)
        if least == rank:
            mine.append(job)
    return mine
