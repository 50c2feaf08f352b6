"""What the commands of train/ have in common."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sparsewsi.model.config import Unavailable

try:
    import fcntl
except ImportError:  # Windows has none; there nothing is locked
    fcntl = None

SLIDE_SUFFIXES = {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}


def run_command(main: Callable[[], None]) -> None:
    """Run a command; what was wrong with its input is one sentence and exit status 2, not a traceback."""
    try:
        main()
    except (ValueError, OSError, Unavailable, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def walk(folder: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Folders under one, itself first, with the names of their files; links are followed, hidden folders are not."""
    seen: set[str] = set()  # links may lead in a circle
    for where, folders, names in os.walk(folder, onerror=onerror, followlinks=True):
        if os.path.realpath(where) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield where, names


def write_whole(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: whoever reads path finds the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text)
    temporary.replace(path)


def fingerprint(paths: Iterable[Path]) -> str:
    """Eight hex digits that change with what is in files, or in the files of folders."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold an output folder, so that no two runs write the same files; the system lets go of it when a run dies.

    Raises ValueError if another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"Another run is writing to {folder}. Wait for it, stop it, or choose another --out."
                ) from None
            except OSError:  # a file system without locks
                pass
        yield
