"""Slides from outside: a first look at them, archives unpacked after a look, and where uploads lie."""

import errno
import lzma
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from io import FileIO
from pathlib import Path, PurePosixPath

from sparsewsi.files import as_path
from sparsewsi.slides.confined import open_confined
from sparsewsi.slides.find import find_slides_in
from sparsewsi.slides.remote import is_remote
from sparsewsi.slides.slide import Slide

OVERVIEW = 1024  # px
ENTRIES, UNPACKED, RATIO = 20_000, 16 << 30, 100  # what an archive may hold: files, bytes, bytes per stored byte
MOST_READ = 8 << 20  # bytes that are read of an archive at a time: of its list of files, that is all
PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others may ask for gigabytes of memory to be unpacked

# What zipfile and its decoders raise for archives that are none, or damaged; one file under another is an OSError.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError, EOFError, OSError)
DAMAGED += (struct.error, IndexError, UnicodeError, OverflowError)  # names that are empty or no text, sizes that lie

PACKED = 1000  # bytes of px per byte of file, for the smallest level alone; JPEG of plain white glass comes to 330
SEVERAL_FILES = (".mrxs", ".vms", ".vmu", ".dcm")  # the file that is opened is not where the px are


def _pay_no_heed() -> None:
    """Nobody can end this work."""


def check(path: str | Path, opening: Callable[[str | Path], Slide] = open_confined) -> None:
    """Raise ValueError with one sentence if a slide cannot be opened and looked at within open_confined's limits."""
    with opening(path) as slide:
        (width, height), file = slide.level_sizes[-1], as_path(path)
        alone = not is_remote(path) and file.is_file() and file.suffix.lower() not in SEVERAL_FILES
        if alone and 3 * width * height > PACKED * file.stat().st_size:
            raise ValueError(
                f"The slide was given up: {width:,} x {height:,} px on its smallest level are no scan in a file "
                f"of {file.stat().st_size / 1000:,.0f} kB. Save it again as a pyramidal TIFF."
            )
        slide.thumbnail(OVERVIEW)
        slide.read_level(0, (slide.size[0] // 2, slide.size[1] // 2), (64, 64))


class _Archive(FileIO):
    """A zip archive whose list of files is not read into memory however long it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:  # the end, with its comment
            size = MOST_READ
        if size > MOST_READ:
            raise ValueError("The zip archive holds far more files than a slide; it was not unpacked.")
        return super().read(size)


def unpack(archive: Path, folder: Path, most: int = UNPACKED, look: Callable[[], None] = _pay_no_heed) -> Path:
    """Unpack a zip of a slide that is a folder (DICOM, MRXS, VMS) into a new folder; returns what to open.

    Raises ValueError, before anything is written, for entries that lead out of the folder or are links, and for
    archives that unpack to more than ENTRIES files, `most` bytes (at most UNPACKED) or RATIO times their size.
    look: called again and again; what it raises ends the work
    """
    try:
        with _Archive(archive) as file, zipfile.ZipFile(file) as opened:
            entries = opened.infolist()
            _look_at(entries, archive.stat().st_size, min(most, UNPACKED))
            folder.mkdir(mode=0o700)
            for entry in entries:
                if not entry.is_dir():
                    _write(opened, entry, folder, look)
    except DAMAGED as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise ValueError("The zip archive holds a name that is too long for this server; shorten it.") from error
        raise ValueError("The zip archive is damaged or encrypted; pack the slide again.") from error
    return _slide_in(folder)


def _look_at(entries: list[zipfile.ZipInfo], packed: int, most: int) -> None:
    for entry in entries:
        name = PurePosixPath(entry.filename.replace("\\", "/"))
        link = stat.S_ISLNK(entry.external_attr >> 16)
        if name.is_absolute() or ".." in name.parts or ":" in entry.filename or link:
            raise ValueError("The zip archive holds a path that leads out of its folder; it was not unpacked.")
        if entry.compress_type not in PLAIN:
            raise ValueError("The zip archive is not packed by Deflate; pack the slide again, as a plain ZIP.")
    size = sum(entry.file_size for entry in entries)
    if len(entries) > ENTRIES or size > most or size > RATIO * max(packed, 1 << 20):
        raise ValueError("The zip archive unpacks to far more than a slide; it was not unpacked.")


def _write(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path, look: Callable[[], None]) -> None:
    """One file, and never more of it than the archive said it holds."""
    look()
    target = folder / entry.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    left = entry.file_size
    with opened.open(entry) as source, target.open("wb") as out:
        while block := source.read(1 << 20):
            look()
            left -= len(block)
            if left < 0:
                raise zipfile.BadZipFile("more than was said")
            out.write(block)


def _slide_in(folder: Path) -> Path:
    """The one slide of an archive, by the rule of slides/find.py. Raises ValueError if there is none, or several."""
    found = find_slides_in(folder)
    if len(found.slides) > 1:
        raise ValueError(f"The zip archive holds {len(found.slides)} slides; pack the files of one alone.")
    if not found.slides:
        reason = f" but {found.left_out[0][1]}" if found.left_out else ""
        raise ValueError(f"The zip archive holds no slide{reason}; pack the slide with all its files.")
    return found.slides[0]


# ---- where they lie


def require_upload(file: str | Path, uploads: Path) -> Path:
    """The file, if it is a plain one that was uploaded to this server: uploads/<digest>/<name>, as Gradio lays it down.

    Raises ValueError for anything else a caller may name: a folder would take everybody's uploads with it.
    """
    path = Path(file)
    inside = Path(os.path.realpath(path.parent)).parent == Path(os.path.realpath(uploads))
    if not inside or path.is_symlink() or not path.is_file():
        raise ValueError("The file was not uploaded to this server.")
    return path


def keep_upload(file: str | Path, folder: Path, most: int = UNPACKED, look: Callable[[], None] = _pay_no_heed) -> Path:
    """Move an upload into a folder that only we can read, in place of an earlier one; its name is not kept.

    Returns what to open: the file, or what an archive held. most, look: see unpack
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    suffix = Path(file).suffix if re.fullmatch(r"\.\w{1,8}", Path(file).suffix) else ""
    kept = Path(shutil.move(file, folder / f"slide{suffix}"))
    if suffix.lower() != ".zip":
        return kept
    unpacked = unpack(kept, folder / "unpacked", most, look)
    kept.unlink()
    return unpacked
