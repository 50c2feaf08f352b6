"""python -m sparsewsi: the whole path on a tiny real slide, and one sentence for everything it must refuse."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsewsi.__main__ import main
from sparsewsi.bags.bag import save_bag
from sparsewsi.bags.extract import extract_bag
from sparsewsi.model.sparse_wsi import SparseWSI
from sparsewsi.phantom import write_phantom

FILES = {"report.html", "overlay.png", "umap.png", "patches.csv", "patches.geojson", "selection.json"}
ASK = ["--question", "Which tissue is this?", "--option", "fat", "--option", "liver"]


@pytest.fixture(scope="module")
def tiny_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom of 1,024 px: a real pyramidal TIFF with mpp."""
    path = tmp_path_factory.mktemp("slides") / "tiny.tiff"
    write_phantom(path, seed=3, size=1024)
    return path


def test_a_slide_becomes_an_answer_and_six_files_twice_the_same(tiny_model, tiny_slide, tmp_path, capsys):
    records = []
    for name in ("one", "two"):
        out = tmp_path / name
        assert main([str(tiny_slide), "--model", str(tiny_model), "--out", str(out), *ASK]) == 0
        said = capsys.readouterr()
        assert {path.name for path in out.iterdir()} == FILES
        for part in (
            "phantom 3",
            "efficientnet-lite0",
            "6 of",
            "Untrained.",
            "Demo model, research use only",
            "%  fat",
        ):
            assert part in said.out
        records.append((out / "selection.json").read_text())
    record, again = (json.loads(text) for text in records)
    # Matrix products may differ by a unit in the last place with where their operands lie in memory.
    assert again["selection"].pop("scores") == pytest.approx(record["selection"]["scores"], rel=1e-5, abs=1e-5)
    probs = [answer.pop("probs") for answer in again["answers"]]
    assert probs == [pytest.approx(answer["probs"], abs=1e-4) for answer in record["answers"]]
    bare = json.loads(records[0])
    bare["selection"].pop("scores")
    assert [answer.pop("probs") for answer in bare["answers"]]
    assert again == bare
    assert len(record["selection"]["indices"]) == 6
    assert len(record["selection"]["scores"]) == record["patches"]["count"]
    assert sum(record["answers"][0]["probs"]) == pytest.approx(1, abs=1e-5)
    assert str(tmp_path) not in records[0], "a record names no folder of this machine"
    rows = list(csv.DictReader((tmp_path / "one" / "patches.csv").open()))
    assert [int(row["rank"]) for row in rows] == list(range(1, 7))
    assert Image.open(tmp_path / "one" / "overlay.png").size[0] >= 1000


def test_a_saved_bag_gives_the_patches_of_its_slide_without_the_slide(tiny_model, tiny_slide, tmp_path, capsys):
    save_bag(extract_bag(tiny_slide, "efficientnet-lite0"), tmp_path / "bag.safetensors")
    for source, name in ((tiny_slide, "slide"), (tmp_path / "bag.safetensors", "bag")):
        assert main([str(source), "--model", str(tiny_model), "--k", "3", "--out", str(tmp_path / name)]) == 0
    slide, bag = (json.loads((tmp_path / name / "selection.json").read_text()) for name in ("slide", "bag"))
    scores = slide["selection"].pop("scores")
    assert bag["selection"].pop("scores") == pytest.approx(scores, rel=1e-5, abs=1e-5)
    assert bag["selection"] == slide["selection"]
    assert bag["answers"] == slide["answers"]
    assert Image.open(tmp_path / "bag" / "overlay.png").size[0] >= 1000
    capsys.readouterr()


@pytest.mark.parametrize("written", ['"{}"', "URI", " {} "])
def test_a_slide_is_named_as_it_is_pasted(written, tiny_model, tiny_slide, tmp_path, capsys):
    text = tiny_slide.as_uri() if written == "URI" else written.format(tiny_slide)
    out = tmp_path / "out"
    assert main([text, "--model", str(tiny_model), "--out", str(out), "--max-patches", "4"]) == 0, capsys.readouterr()
    assert (out / "selection.json").is_file()


def test_options_belong_to_the_question_before_them(tiny_model, tiny_slide, tmp_path, capsys):
    asked = [*ASK, "--question", "Is it open?", "--max-patches", "4", "--selector", "uniform", "--k", "2"]
    assert main([str(tiny_slide), "--model", str(tiny_model), "--out", str(tmp_path / "o"), *asked]) == 0
    record = json.loads((tmp_path / "o" / "selection.json").read_text())
    assert [answer["options"] for answer in record["answers"]] == [["fat", "liver"], []]
    assert record["patches"]["count"] == record["patches"]["max_patches"] == 4
    assert record["selection"]["selector"] == "uniform"
    capsys.readouterr()


def test_a_selection_is_replayed_without_scoring_and_only_where_it_belongs(
    tiny_model, tiny_slide, tmp_path, monkeypatch, capsys
):
    common = ["--model", str(tiny_model)]
    drawn = ["--selector", "random", "--k", "3", "--max-patches", "8", "--evidence"]
    assert main([str(tiny_slide), *common, *drawn, *ASK, "--out", str(tmp_path / "one")]) == 0
    first = json.loads((tmp_path / "one" / "selection.json").read_text())
    (answer,) = first["answers"]
    assert len(answer["effects"]) == 3
    assert answer["evidence"] in (tmp_path / "one" / "report.html").read_text()

    def never(*_args, **_kwargs):
        raise AssertionError("a replay does not score")

    monkeypatch.setattr(SparseWSI, "select", never)
    monkeypatch.setattr(SparseWSI, "score", never)
    replay = [*common, "--replay", str(tmp_path / "one" / "selection.json")]
    assert main([str(tiny_slide), *replay, "--evidence", "--out", str(tmp_path / "two")]) == 0
    again = json.loads((tmp_path / "two" / "selection.json").read_text())
    assert again == first

    write_phantom(tmp_path / "other.tiff", seed=4, size=1024)
    capsys.readouterr()
    assert main([str(tmp_path / "other.tiff"), *replay, "--out", str(tmp_path / "three")]) == 2
    assert "its slide is phantom 3, not phantom 4" in capsys.readouterr().err
    save_bag(extract_bag(tiny_slide, "efficientnet-lite0", max_patches=7), tmp_path / "bag.safetensors")
    assert main([str(tmp_path / "bag.safetensors"), *replay, "--out", str(tmp_path / "four")]) == 2
    assert "number of patches is 8, not 7" in capsys.readouterr().err


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A folder with files that are no slides."""
    (tmp_path / "junk.svs").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "empty.tiff").write_bytes(b"")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    Image.fromarray(np.full((900, 900, 3), 250, np.uint8)).save(tmp_path / "blank.png")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.svs"], "no file"),
        (["junk.svs"], "slide"),
        (["empty.tiff"], "empty"),
        (["junk.safetensors"], "junk.safetensors"),
        (["missing.safetensors"], "no file"),
        (["blank.png"], "--slide-mpp"),
        (["blank.png", "--slide-mpp", "0.5"], "no tissue"),
        (["blank.png", "--slide-mpp", "-1"], "positive"),
        (["blank.png", "--slide-mpp", "wide"], "--slide-mpp"),
        (["SLIDE", "--k", "0"], "--k"),
        (["SLIDE", "--max-patches", "0"], "--max-patches"),
        (["SLIDE", "--selector", "best"], "learned"),
        (["SLIDE", "--option", "fat"], "--question"),
        (["SLIDE", "--out", "junk.svs"], "--out"),
        (["SLIDE", "--model", "no-such-model"], "no-such-model"),
        (["SLIDE", "--model", "."], "config.json"),
        ([], "SLIDE"),
        (["SLIDE", "--wrong"], "--wrong"),
        (["SLIDE", "--replay", "missing.json"], "missing.json"),
        (["SLIDE", "--replay", "junk.svs"], "JSON"),
        (["SLIDE", "--replay", "missing.json", "--k", "3"], "--replay"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(words, said, bad, tiny_model, tiny_slide, monkeypatch, capsys):
    monkeypatch.chdir(bad)
    model = [] if "--model" in words else ["--model", str(tiny_model)]
    assert main([str(tiny_slide) if word == "SLIDE" else word for word in words] + model) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert error.endswith((".", ")"))
    assert not (bad / "out").exists()


def test_from_a_shell_there_is_no_traceback(tmp_path):
    command = [sys.executable, "-m", "sparsewsi", "missing.svs", "--model", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_three_commands_are_named_and_each_says_what_it_takes(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for command in ("ask", "extract", "app"):
        assert f"sparsewsi {command}" in overview
    for command, flag in (("ask", "--replay"), ("extract", "--encoder"), ("app", "--mcp")):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        assert flag in capsys.readouterr().out


def test_several_slides_are_one_case_in_which_each_patch_knows_its_slide(tiny_model, tiny_slide, tmp_path, capsys):
    other = tmp_path / "other.tiff"
    write_phantom(other, seed=4, size=1024)
    out = tmp_path / "out"
    assert main(["ask", str(tiny_slide), str(other), "--model", str(tiny_model), "--out", str(out), *ASK]) == 0
    assert "phantom 3 + phantom 4" in capsys.readouterr().out
    squares = {"patches-1.geojson", "patches-2.geojson"}
    assert {path.name for path in out.iterdir()} == FILES - {"patches.geojson"} | squares
    rows = list(csv.DictReader((out / "patches.csv").open()))
    record = json.loads((out / "selection.json").read_text())
    n = [part["patches"] for part in record["slide"]["parts"]]
    assert sum(n) == record["patches"]["count"]
    assert len(rows) == 6
    for row in rows:
        assert row["slide"] == ("phantom 3" if int(row["index"]) < n[0] else "phantom 4")
        assert 0 <= int(row["y"]) < 1024
    found = [len(json.loads((out / name).read_text())["features"]) for name in sorted(squares)]
    assert found == [sum(row["slide"] == name for row in rows) for name in ("phantom 3", "phantom 4")]
    report = (out / "report.html").read_text()
    assert "Slide 2 (phantom 4)" in report
    assert "slide 2: x" in report or not found[1]
    again = [str(tiny_slide), str(other), "--model", str(tiny_model), "--out", str(tmp_path / "again")]
    assert main([*again, "--replay", str(out / "selection.json")]) == 0
    assert (tmp_path / "again" / "patches.csv").read_text() == (out / "patches.csv").read_text()


def test_a_command_may_be_left_out_and_is_then_ask(capsys):
    for words in (["missing.svs"], ["ask", "missing.svs"]):
        assert main(words) == 2
        assert "no file" in capsys.readouterr().err


def test_extract_passes_its_words_on(tmp_path, capsys):
    assert main(["extract", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 2
    capsys.readouterr()


def test_a_question_that_cannot_be_put_is_refused_before_anything_is_loaded(tiny_slide, tmp_path, capsys):
    """The folder is a model's for the command line, but loading it would fail in other words."""
    for words, part in (
        (["--question", " "], "The question is empty"),
        (["--question", "Which?", *["--option", "fat"] * 27], "at most 26 options"),
    ):
        assert main([str(tiny_slide), "--model", str(tmp_path), *words]) == 2
        assert part in capsys.readouterr().err
