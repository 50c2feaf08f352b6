"""Slides from outside: where they are kept, archives unpacked after a look, and slides opened first in a child process.

A slide of a few kB can decode to gigabytes, and a damaged one can crash a C library: neither may happen in the process
that serves everybody. Run as a script, this file is that child: it opens the slide, reads its overview and a piece of
level 0, and prints one sentence and ends with status 1 if that fails. It imports neither torch nor Gradio.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

SECONDS = 8  # of processor time of the child: a busy machine must not turn a good slide away
PATIENCE = 40  # seconds of wall clock, for a disk that hangs
MEMORY = 1 << 30  # bytes of address space of the child; a libopenslide at rest takes 0.2 GB of them
OVERVIEW = 1024  # px
ENTRIES, UNPACKED, RATIO = 20_000, 16 << 30, 100  # what an archive may hold: files, bytes, bytes per stored byte

PACKED = 1000  # bytes of px per byte of file, for the smallest level alone; JPEG of plain white glass comes to 330
SEVERAL_FILES = (".mrxs", ".vms", ".dcm")  # the file that is opened is not where the px are

TOO_MUCH = (
    f"The slide was given up: its overview takes more than {SECONDS} seconds of work or {MEMORY >> 30} GB to make. "
    "Convert it to a pyramidal TIFF, e.g. vips tiffsave IN OUT.tiff --tile --pyramid --compression jpeg."
)


def check(path: str | Path) -> None:
    """Raise ValueError with one sentence if a slide cannot be opened and looked at within the limits."""
    package = Path(__file__).resolve().parents[2]
    environment = {"PYTHONPATH": str(package), "OPENBLAS_NUM_THREADS": "1", "PATH": os.environ.get("PATH", "")}
    command = [sys.executable, str(Path(__file__).resolve()), str(Path(path).expanduser().absolute())]
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(TOO_MUCH) from None
    if child.returncode:
        raise ValueError(child.stdout.strip() if child.returncode == 1 and child.stdout.strip() else TOO_MUCH)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a zip of a slide that is a folder (DICOM, MRXS, VMS) into a new folder; returns what to open.

    Raises ValueError, before anything is written, for entries that lead out of the folder or are links, and for
    archives that unpack to more than ENTRIES files, UNPACKED bytes or RATIO times their size.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = opened.infolist()
            _look_at(entries, archive.stat().st_size)
            folder.mkdir(mode=0o700)
            for entry in entries:
                if not entry.is_dir():
                    _write(opened, entry, folder)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError("The zip archive is damaged or encrypted; pack the slide again.") from error
    return _slide_in(folder)


def _look_at(entries: list[zipfile.ZipInfo], packed: int) -> None:
    for entry in entries:
        name = PurePosixPath(entry.filename.replace("\\", "/"))
        link = stat.S_ISLNK(entry.external_attr >> 16)
        if name.is_absolute() or ".." in name.parts or ":" in entry.filename or link:
            raise ValueError("The zip archive holds a path that leads out of its folder; it was not unpacked.")
    size = sum(entry.file_size for entry in entries)
    if len(entries) > ENTRIES or size > UNPACKED or size > RATIO * max(packed, 1 << 20):
        raise ValueError("The zip archive unpacks to far more than a slide; it was not unpacked.")


def _write(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path) -> None:
    """One file, and never more of it than the archive said it holds."""
    target = folder / entry.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    left = entry.file_size
    with opened.open(entry) as source, target.open("wb") as out:
        while block := source.read(1 << 20):
            left -= len(block)
            if left < 0:
                raise zipfile.BadZipFile("more than was said")
            out.write(block)


def _slide_in(folder: Path) -> Path:
    """The .mrxs or .vms file, else the folder that holds the DICOM files. Raises ValueError if there is neither."""
    for suffix in (".mrxs", ".vms"):
        if found := sorted(folder.rglob(f"*{suffix}")):
            return found[0]
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    if not files:
        raise ValueError("The zip archive is empty.")
    return files[0].parent if len(files) > 1 else files[0]


# ---- where they lie


def keep_upload(file: str | Path, folder: Path) -> Path:
    """Move an upload into a folder that only we can read, in place of an earlier one; its name is not kept.

    Returns what to open: the file, or what an archive held.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    suffix = Path(file).suffix if re.fullmatch(r"\.\w{1,8}", Path(file).suffix) else ""
    kept = Path(shutil.move(file, folder / f"slide{suffix}"))
    return unpack(kept, folder / "unpacked") if suffix.lower() == ".zip" else kept


# ---- the child


def _child(path: str) -> int:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from sparsewsi.slides.slide import open_slide

    try:
        with open_slide(path) as slide:
            file, (width, height) = Path(path), slide.level_sizes[-1]
            alone = file.is_file() and file.suffix.lower() not in SEVERAL_FILES
            if alone and 3 * width * height > PACKED * file.stat().st_size:
                print(
                    f"The slide was given up: {width:,} x {height:,} px on its smallest level are no scan in a file "
                    f"of {file.stat().st_size / 1000:,.0f} kB. Save it again as a pyramidal TIFF."
                )
                return 1
            slide.thumbnail(OVERVIEW)
            slide.read_level(0, (slide.size[0] // 2, slide.size[1] // 2), (64, 64))
    except MemoryError:
        print(TOO_MUCH)
        return 1
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1]))
