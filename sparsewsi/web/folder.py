"""The folder of a server, where strangers' uploads lie: nobody else's, and gone with the process, however that ends."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PREFIX = "sparsewsi-"
TIDY_EVERY, UNOPENED = 60.0, 900.0  # s
TRIES = 3


@contextmanager
def make_folder() -> Iterator[Path]:
    """A folder of this process alone, for what strangers bring. Those of processes that were killed go first."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if left.is_dir() and not left.is_symlink():
            _delete_abandoned(left)
    name, held = _take_folder()
    try:
        yield Path(name)
    finally:
        for _ in range(TRIES):  # who is still at work may write into it meanwhile
            shutil.rmtree(name, ignore_errors=True)
        held.close()


def _take_folder() -> tuple[str, IO[str]]:
    """A new folder and the open file in it whose lock says that its process lives."""
    while True:
        name = tempfile.mkdtemp(prefix=PREFIX)
        held = (Path(name) / "held").open("w")
        if fcntl is None:
            return name, held
        fcntl.flock(held, fcntl.LOCK_EX)  # let go by the system, however the process ends
        if os.fstat(held.fileno()).st_nlink:
            return name, held
        held.close()  # another server started just then, found the file not locked yet, and deleted the folder


def _delete_abandoned(folder: Path) -> None:
    """Delete a folder whose process is gone; not where that cannot be told."""
    with suppress(OSError), (folder / "held").open("r+") as held:
        if fcntl is None or folder.stat().st_uid != os.getuid():
            return
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # kept to the end: who makes it just now waits, and sees
        shutil.rmtree(folder, ignore_errors=True)


def tidy_for_ever(tidy: Callable[[], None]) -> None:
    """Call it every minute."""
    while True:
        time.sleep(TIDY_EVERY)
        with suppress(OSError):
            tidy()


def delete_untouched(entry: Path, older: float = UNOPENED) -> None:
    """Delete a file or folder, nothing of which has been touched for so many seconds."""
    with suppress(OSError):
        parts = [entry, *entry.rglob("*")] if entry.is_dir() else [entry]
        if time.time() - max(part.lstat().st_mtime for part in parts) > older:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def measure(folder: Path) -> int:
    """Bytes of the files below a folder."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_size
    return total
