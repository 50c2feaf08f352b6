"""The folder of a run: one process at a time, one set of settings, lines that survive a kill."""

import json
import lzma
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsewsi import files

try:
    import fcntl
except ImportError:  # Windows has none; there nothing is locked
    fcntl = None


@contextmanager
def hold(folder: Path) -> Iterator[None]:
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


def check_settings(
    path: Path, settings: Mapping[str, Any], may_change: tuple[str, ...] = (), may_be_new: bool = False
) -> None:
    """Raise ValueError if a run saved other settings at path.

    may_be_new: settings that the file does not name are not compared, as a program that is older had fewer
    """
    if not path.is_file():
        return
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Choose another --out.") from error
    mine = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    names = set(mine) & set(saved) if may_be_new else set(mine) | set(saved)
    changed = [
        f"{name} was {saved.get(name)!r}, is {mine.get(name)!r}"
        for name in sorted(names - set(may_change))
        if saved.get(name) != mine.get(name)
    ]
    if changed:
        raise ValueError(f"{path.parent} holds a run with other settings: {'; '.join(changed)}. Choose another --out.")


def claim(folder: Path, settings: Mapping[str, Any], name: str = "settings.json") -> None:
    """check_settings, then save these settings in the folder.

    Raises ValueError also for a folder with answers and no settings, about which nothing is known.
    """
    path = folder / name
    if (folder / "records.jsonl").exists() and not path.exists():
        raise ValueError(f"{folder} holds answers, but not what was asked ({name}). Choose another --out.")
    check_settings(path, settings)
    files.write_json(path, settings)


def digest_of(*paths: Path) -> str:
    """Eight hexadecimal digits that change with the files, or with the files in the folders."""
    return files.digest_all(paths)[:8]


def digest_model(folder: Path) -> str:
    """digest_of the weights of a model folder or a checkpoint."""
    return digest_of(*sorted(folder.resolve().rglob("*.safetensors")))


def read_records(log: Path) -> dict[int, dict[str, Any]]:
    """Records by item number; lines about the same item are merged, a line torn by a kill is left out.

    Answers that are kept for good are compressed: without log, <log>.xz is read.
    """
    packed = log.with_name(log.name + ".xz")
    lines = files.read_lines(log)
    if packed.is_file() and not log.exists():
        lines = map(json.loads, lzma.decompress(packed.read_bytes()).decode().splitlines())
    records: dict[int, dict[str, Any]] = {}
    for record in lines:
        records.setdefault(record["number"], {}).update(record)
    return records


def cut_metrics(path: Path, done: int) -> None:
    """Drop the lines of steps that will be done again, and one that a kill left torn."""
    if path.is_file():
        lines = [json.dumps(record) + "\n" for record in files.read_lines(path) if record["step"] < done]
        files.write_text(path, "".join(lines))
