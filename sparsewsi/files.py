"""Files: found by their names, written whole or not at all, named by their content, kept in one cache folder; JSON
lines that survive a kill.

The lowest room of the house: nothing of ours is imported here.
"""

import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

UNSEEN = "\u200b\u200e\u200f\u202a\u202c\u2066\u2069\ufeff"  # Windows copies a path with marks of direction
QUOTES = ('""', "''", "``", "\u201c\u201d", "\u2018\u2019")  # as shells, file managers and word processors put them


def cache_folder() -> Path:
    """Where fetched weights and example slides are kept: $SPARSEWSI_CACHE, default ~/.cache/sparsewsi.

    Raises ValueError for a user without a home.
    """
    try:
        return Path(os.environ.get("SPARSEWSI_CACHE") or "~/.cache/sparsewsi").expanduser()
    except RuntimeError as error:
        raise ValueError("this user has no home folder. Set SPARSEWSI_CACHE to a folder for weights.") from error


def as_path(text: str | Path) -> Path:
    """The path that is meant: pasted with quotes or as a file:// URL, with spaces around it or `~`.

    What exists just as it is written is taken as it is; of names with accents also what is written with them as letters
    of their own, or not (Unicode's NFC and NFD: macOS and Linux differ, and no eye sees it).
    """
    with suppress(OSError, ValueError):
        if Path(text).exists():
            return Path(text)
    return _find_spelling(_clean(text))


def _find_spelling(path: Path) -> Path:
    """The path itself, or the one that is there and differs in how accents are written alone."""
    if str(path).isascii():
        return path
    with suppress(OSError, ValueError):
        found = Path(path.anchor)
        for part in path.parts[1 if path.anchor else 0 :]:
            if not (found / part).exists():
                wanted = unicodedata.normalize("NFC", part)
                same = [name for name in os.listdir(found) if unicodedata.normalize("NFC", name) == wanted]
                part = same[0] if len(same) == 1 else part
            found /= part
        if found.exists():
            return found
    return path


def _clean(text: str | Path) -> Path:
    text = str(text).strip().strip(UNSEEN).strip()
    if len(text) > 1 and text[0] + text[-1] in QUOTES:
        text = text[1:-1].strip()
    if text.lower().startswith("file:"):
        rest = text[len("file:") :]
        host, slash, path = rest[2:].partition("/") if rest.startswith("//") else ("", "", rest)
        if host.lower() in ("", "localhost"):
            text = url2pathname(slash + path)
    with suppress(RuntimeError):  # no such user, or one without a home
        return Path(text).expanduser() if text.startswith("~") else Path(text)
    return Path(text)


# ---- found by their names


def walk(folder: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[tuple[Path, list[str]]]:
    """Folders under one, itself first, with the names of their files; follows links, passes over hidden folders."""
    seen: set[str] = set()  # links may lead in a circle
    for where, folders, names in os.walk(folder, onerror=onerror, followlinks=True):
        if os.path.realpath(where) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(where), names


def allow_any_text() -> None:
    """Let what is printed hold any letter: one that the console's encoding lacks is written as its number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


# ---- written whole or not at all


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file in the same folder, renamed to `path` once what was written there is on disk.

    A process killed on the way leaves `path` as it was (absent, or the old file). The temporary name is short, so that
    a name the file system can hold can also be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    try:
        partial.touch()
        mode = partial.stat().st_mode  # safetensors writes files that only their owner may read
        yield partial
        partial.chmod(mode)
        _fsync(partial)
        os.replace(partial, path)
        if os.name == "posix":  # the rename itself is on disk only when the folder is
            _fsync(path.parent)
    except Exception as error:
        # Writers in Rust, such as safetensors', tell a full disk as an error of their own.
        number = None if isinstance(error, OSError) else re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place at the end; an error leaves `path` as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = _beside(path), _beside(path)
    try:
        new.mkdir()
        yield new
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def share(folder: str | Path) -> None:
    """Give the files of a folder the mode of new files: safetensors writes some that only their owner may read."""
    with replacing(Path(folder) / ".mode") as probe:
        mode = probe.stat().st_mode
    (Path(folder) / ".mode").unlink()
    for file in Path(folder).rglob("*"):
        if file.is_file():
            file.chmod(mode)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file: whoever reads it finds the old content or the new, never a part."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """write_bytes of the text in UTF-8; half a character (a lone surrogate) is written as \\ud800, as JSON does."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """write_text of JSON. A number that JSON cannot state (NaN, infinity) is written as null."""
    write_text(path, json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path, most: int = 64 << 20) -> Any:
    """Parsed JSON of a file from outside. Raises ValueError for one that is missing, over `most` bytes, or broken."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path.name}.")
    if path.stat().st_size > most:
        raise ValueError(f"{path.name} is larger than {most >> 20} MB. Export fewer objects.")
    try:
        return parse_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path.name} is not valid JSON ({str(error).splitlines()[0][:100]}). Export it again."
        ) from error


def parse_json(text: str | bytes) -> Any:
    """json.loads, with ValueError also where an object holds a key twice."""
    return json.loads(text, object_pairs_hook=_make_object)


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Programs differ in which of two values under one key they read."""
    made = dict(pairs)
    if len(made) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"an object holds {twice[:40]!r} twice")
    return made


def inert_cell(value: Any) -> Any:
    """A cell of a table that no spreadsheet runs: text that begins as a formula does gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _beside(path: Path) -> Path:
    return path.parent / f".{uuid.uuid4().hex}.partial"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- named by their content


def digest(path: str | Path) -> str:
    """sha256 of a file's content, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_all(paths: Iterable[str | Path]) -> str:
    """sha256 over the names and contents of files, and of the files in folders (not below), in the order of names."""
    total = hashlib.sha256()
    for path in map(Path, paths):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                total.update(f"{file.name} {digest(file)}\n".encode())
    return total.hexdigest()


# ---- JSON lines


def append_line(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add a record to a file of JSON lines, after a line that a killed process left torn has been ended.

    What ends a line for some readers (U+2028, lone surrogates) is escaped.
    """
    line = json.dumps(_plain(record), ensure_ascii=True, allow_nan=False) + "\n"
    with Path(path).open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines; none if there is no file. Lines torn by a kill are passed over."""
    if not Path(path).is_file():
        return
    with Path(path).open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record
