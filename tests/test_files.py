"""Files are written whole, JSON lines survive a kill, the cache folder is where the user says."""

import io
import json
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from sparsewsi import files


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    files.write_text(target, "old")

    def fail() -> None:
        with files.replacing(target) as partial:
            partial.write_text("ne")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("name", ["S" * 255, "病" * 85, "a.json"])
def test_a_name_that_the_file_system_can_hold_can_be_written(tmp_path: Path, name: str) -> None:
    files.write_bytes(tmp_path / name, b"1")
    assert os.listdir(tmp_path) == [name]


def test_a_folder_takes_the_place_of_the_old_one_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("first", "second"):
        with files.replacing_folder(target) as new:
            (new / "x").write_text(text)

    def fail() -> None:
        with files.replacing_folder(target) as new:
            (new / "x").write_text("third")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert (target / "x").read_text() == "second"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\u2028\u2029\x85", "\x00", "é🙂"])
def test_any_text_can_be_written_and_read(text: str, tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"text": text, "score": float("inf")})
    assert files.read_json(tmp_path / "a.json") == {"text": text, "score": None}
    files.append_line(tmp_path / "log.jsonl", {"text": text, "score": float("-inf")})
    files.append_line(tmp_path / "log.jsonl", {"text": text})
    assert len((tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    files.write_text(tmp_path / "a.html", text)
    assert (tmp_path / "a.html").stat().st_size


def test_lines_after_a_torn_one_are_read(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    files.append_line(log, {"a": 1})
    with log.open("ab") as file:
        file.write(b'{"a": 2, "b')
    files.append_line(log, {"a": "\u2028\ud800", "b": float("nan")})
    assert list(files.read_lines(log)) == [{"a": 1}, {"a": "\u2028\ud800", "b": None}]
    assert log.read_bytes().count(b"\n") == 3
    assert list(files.read_lines(tmp_path / "none")) == []


def test_json_holds_no_number_that_json_cannot_state(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"x": [float("inf"), 1.5], "y": (float("nan"),)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, 1.5], "y": [None]}


def test_the_cache_folder_expands_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEWSI_CACHE", "~/somewhere")
    assert files.cache_folder() == Path.home() / "somewhere"


def test_a_digest_changes_with_content_and_name(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_bytes(b"x")
    two.write_bytes(b"x")
    assert files.digest(one) == files.digest(two)
    assert files.digest_all([one]) != files.digest_all([two])


def test_no_spreadsheet_runs_a_cell():
    for text in ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"):
        assert files.inert_cell(text) == f"'{text}"
    for value in ("slide 1", "", -1.5, None, 3):
        assert files.inert_cell(value) == value


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "cp437"])
@pytest.mark.parametrize("text", ["TGF-\u03b2 \u2265 5", "\u75c5\u7406", "\ud83d\ude00 \u2028", "a\udce9.svs"])
def test_whatever_the_console_can_show_anything_is_printed(monkeypatch, encoding: str, text: str) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    files.allow_any_text()
    print(f"before {text} after", flush=True)
    written = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert written.startswith("before ")
    assert written.rstrip().endswith(" after")


PASTED = [
    '"{}"',
    "'{}'",
    "\u201c{}\u201d",
    "  {}\n",
    "\u202a{}",  # as Windows copies it
    "\ufeff{}",
    "{}\u200b",
    "file:{}",
    "file://{}",
    "FILE://localhost{}",
    "'file://{}'",
]


@pytest.mark.parametrize("form", PASTED)
@pytest.mark.parametrize("name", ["my slide.svs", "S #1 (2).svs", "é?.svs"])
def test_a_path_is_found_as_it_is_pasted(tmp_path: Path, form: str, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert files.as_path(form.format(tmp_path / name)) == tmp_path / name
    if "file:" in form.lower():
        assert files.as_path(form.format((tmp_path / name).as_uri().removeprefix("file://"))) == tmp_path / name


@pytest.mark.parametrize("text", ["~nobody-of-this-name/a.svs", "\0", "a" * 5000, "file://", "file:", "'", '""', "~"])
def test_what_is_no_path_raises_nothing(text: str) -> None:
    files.as_path(text)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch) -> None:
    def homeless(_path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SPARSEWSI_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(ValueError, match="Set SPARSEWSI_CACHE"):
        files.cache_folder()


def test_what_a_writer_in_rust_says_of_the_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError), files.replacing(tmp_path / "a.safetensors") as partial:
        save_file({"x": torch.zeros(1)}, partial.parent / "no folder" / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["Müller", "Žofie/Ångström", "가 슬라이드"])
@pytest.mark.parametrize(("stored", "typed"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_found_however_its_accents_are_written(tmp_path: Path, name: str, stored: Any, typed: Any) -> None:
    there = tmp_path / unicodedata.normalize(stored, name) / "a.svs"
    there.parent.mkdir(parents=True)
    there.touch()
    written = str(tmp_path / unicodedata.normalize(typed, name) / "a.svs")
    assert written != str(there)
    assert files.as_path(written) == files.as_path(f'"{written}"') == there
    both = tmp_path / unicodedata.normalize(typed, name) / "a.svs"
    both.parent.mkdir(parents=True, exist_ok=True)
    both.touch()
    assert files.as_path(written) == both, "what is there just as it is written is meant"
    assert files.as_path(f"{written}.none") == Path(f"{written}.none")


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '[{"b": {"slide": 1, "slide": 1}}]', '{"x": [{"y": 1, "": 0, "y": 2}]}']
)
def test_a_key_that_stands_twice_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="twice"):
        files.read_json(tmp_path / "a.json")
