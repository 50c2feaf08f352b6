"""One road: whatever the selector, the files of a case call a patch by one number; a what-if is what was asked for."""

import csv
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from sparsewsi.bags.bag import Bag, join
from sparsewsi.bags.extract import extract_bag
from sparsewsi.model.sparse_wsi import SparseWSI
from sparsewsi.phantom import write_phantom
from sparsewsi.report import umap
from sparsewsi.report.answer import Answer
from sparsewsi.report.case import ANNOTATIONS, FILES, Case, open_case

ASKED = [{"role": "user", "content": "Which tissue is this?"}]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> SparseWSI:
    return SparseWSI.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "tiny.tiff"
    write_phantom(path, seed=3, size=1024)
    return path


@pytest.fixture(scope="module")
def bag(slide: Path) -> Bag:
    return extract_bag(slide, "efficientnet-lite0")


@pytest.fixture(scope="module")
def case(model: SparseWSI, bag: Bag, slide: Path) -> Case:
    return open_case(model, bag, slide)


def test_the_files_of_a_case_call_a_patch_by_one_number(model, bag, slide, tmp_path):
    """Its rank by score among all patches of the slide: not 1 to K, as `farthest` does not take the highest scores."""
    case = open_case(model, bag, slide, k=5, selector="farthest")
    answer = case.measure(model, ASKED, "fat")
    case.write(tmp_path, [answer])
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    order = case.selection.scores.argsort(descending=True, stable=True).tolist()
    number = {index: order.index(index) + 1 for index in case.selection.indices.tolist()}
    assert sorted(number.values()) != [1, 2, 3, 4, 5], "else the test would show nothing"

    rows = list(csv.DictReader((tmp_path / "patches.csv").open()))
    assert {int(row["index"]): int(row["rank"]) for row in rows} == number
    corner = {tuple(bag.coords[index].tolist()): rank for index, rank in number.items()}
    squares = json.loads((tmp_path / "patches.geojson").read_text())["features"]
    for square in squares:
        facts, where = square["properties"], tuple(square["geometry"]["coordinates"][0][0])
        assert corner[where] == facts["measurements"]["Rank"] == int(facts["name"].removeprefix("#"))
    chosen = json.loads((tmp_path / "selection.json").read_text())["selection"]
    assert dict(zip(chosen["indices"], chosen["ranks"])) == number
    page = (tmp_path / "report.html").read_text()
    shown = re.findall(r'<figure id="patch-(\d+)">.*?alt="Patch (\d+)".*?<b>#(\d+)</b> score (\S+)<br>', page)
    assert shown == [
        (f"{rank}",) * 3 + (f"{case.selection.scores[order[rank - 1]]:.3g}",) for rank in sorted(number.values())
    ]
    assert set(map(int, re.findall(r'href="#patch-(\d+)"', page))) == set(number.values())
    assert {int(rank) for rank in re.findall(r"patch #(\d+)", answer.evidence)} <= set(number.values())


def test_only_the_files_that_were_asked_for_are_written(case, tmp_path):
    case.write(tmp_path / "out", names=["patches.csv", "selection.json"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"patches.csv", "selection.json"}


def test_an_answer_comes_with_what_is_measured(model, case):
    text = "".join(case.answer(model, ASKED, ["fat", "liver"]))
    answer = case.measure(model, ASKED, text, ["fat", "liver"])
    assert (answer.question, answer.text) == ("Which tissue is this?", text.strip())
    assert sum(answer.probs) == pytest.approx(1)
    assert len(answer.effects) == len(case.selection.indices)
    assert case.measure(model, ASKED, text, evidence=False).effects == ()
    silent = case.measure(model, ASKED, " \n", ["fat", "liver"])
    assert (silent.text, silent.effects, len(silent.probs)) == ("", (), 2)


def test_a_what_if_keeps_pinned_patches_drops_others_and_fills_up(model, case):
    total = case.selection.num_patches
    own = case.selection.indices.tolist()
    left_out = [index for index in range(total) if index not in own]
    for selector in ("learned", "random", "farthest"):
        other = case.choose(model, 6, selector, pinned=left_out[:2], dropped=own[:3])
        chosen = other.selection.indices.tolist()
        assert len(chosen) == 6
        assert chosen == sorted(chosen)
        assert set(left_out[:2]) <= set(chosen)
        assert not set(own[:3]) & set(chosen)
        assert other.selector == selector
    same = case.choose(model, len(own))
    assert torch.equal(same.selection.tokens, case.selection.tokens)
    assert len(case.choose(model, 1, pinned=left_out[:2]).selection.indices) == 2, "what is pinned stays"
    assert len(case.choose(model, 3, pinned=left_out[:1] * 2).selection.indices.unique()) == 3
    with pytest.raises(ValueError, match="Every patch was dropped"):
        case.choose(model, 4, dropped=range(total))
    with pytest.raises(ValueError, match="another was pinned"):
        case.choose(model, 4, pinned=[total])
    with pytest.raises(ValueError, match="choose one of learned"):
        case.choose(model, 4, "best")


def test_a_patch_keeps_its_number_in_a_what_if(model, case):
    other = case.choose(model, 10, "random")
    order = case.selection.scores.argsort(descending=True, stable=True)
    assert order[other.selection.ranks - 1].tolist() == other.selection.indices.tolist()


# ---- what is ready is saved, whatever fails after it


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("cannot cache function 'rdist': no locator available for file 'umap/layouts.py'"),
        ImportError("numba needs NumPy 2.3 or less"),
        MemoryError(),
        OSError(30, "Read-only file system"),
        KeyError("llvm"),
    ],
)
def test_a_map_that_cannot_be_drawn_costs_no_other_file(case, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(umap, "map_features", fail)
    with pytest.warns(UserWarning, match=r"umap\.png was left out"):
        written = case.write(tmp_path)
    assert set(written) == {path.name for path in tmp_path.iterdir()} == set(FILES) - {"umap.png"}


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are POSIX's")
@pytest.mark.parametrize(("room", "fit"), [(60_000, 3), (9000, 2), (200, 0)])
def test_where_the_disk_has_room_for_few_bytes_the_small_files_are_written_whole(case, tmp_path, room, fit):
    """A limit on the size of files stands for a disk that is full: the kernel refuses to write on in both cases."""
    import resource

    case.write(tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            case.write(tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = {path.name: path.read_bytes() for path in (tmp_path / "full").iterdir()}
    assert len(left) >= fit
    assert all(content == (tmp_path / "whole" / name).read_bytes() for name, content in left.items())
    assert set(left) == {name for name in FILES if (tmp_path / "whole" / name).stat().st_size <= room}


def test_files_of_several_slides_are_one_for_each_where_a_viewer_opens_one(model, bag, slide, tmp_path):
    write_phantom(tmp_path / "other.tiff", seed=4, size=1024)
    both = join([bag, extract_bag(tmp_path / "other.tiff", "efficientnet-lite0")])
    case = open_case(model, both, [slide, tmp_path / "other.tiff"], k=6, selector="random")
    answer = case.measure(model, ASKED, "fat")
    written = case.write(tmp_path / "out", [answer], (*FILES, ANNOTATIONS, "figure.png"))
    assert {"patches-1.geojson", "patches-2.geojson"} <= set(written)
    assert not {"patches.geojson", ANNOTATIONS, "annotations-1.dcm"} & set(written), "no DICOM slide is among them"
    rows = list(csv.DictReader((tmp_path / "out" / "patches.csv").open()))
    for number in (1, 2):
        squares = json.loads((tmp_path / "out" / f"patches-{number}.geojson").read_text())["features"]
        mine = [row for row in rows if row["slide_number"] == str(number)]
        assert [(int(row["x"]), int(row["y"])) for row in mine] == [
            tuple(square["geometry"]["coordinates"][0][0]) for square in squares
        ]
    shown = {row["slide_number"] for row in rows}
    assert {one.name for one in answer.slides} == (shown if len(shown) > 1 else set())
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count('class="overview"') == 2, "each slide with its boxes"
    for focus in case.foci:
        assert len({int(case.numbers[place]) for place in focus.places}) == 1


def test_seen_a_figure_that_did_not_say_how_sure_an_answer_is_nor_what_it_rests_on(case, tmp_path):
    answer = Answer("Which?", "fat", ("fat", "mucin"), (0.7, 0.3), (2.0,) * 6, without_all=3.0, limit="Not sure: why.")
    case.write(tmp_path, [answer], ["figure.svg"])
    drawn = re.sub(r"<!--|-->", "", " ".join(re.findall(r"<!--.*?-->", (tmp_path / "figure.svg").read_text(), re.S)))
    for part in (
        "Which?",
        "fat 70%, mucin 30%.",
        "Depends on the patches: strongly (whether it is right is another question).",
        "Not sure: why.",
        "research use only",
    ):
        assert part in " ".join(drawn.split()), part


def test_seen_the_worst_patch_kept_without_a_word_that_it_was_for_being_unlike_the_others(
    model, bag, slide, tmp_path, monkeypatch
):
    assert not open_case(model, bag, slide, k=5).unlike, "this model keeps the highest scores"
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, diversity=10.0))
    case = open_case(model, bag, slide, k=5)
    kept = dict(zip(case.selection.indices.tolist(), case.selection.ranks.tolist()))
    assert case.unlike == {index for index, rank in kept.items() if rank > 5}
    assert case.unlike, "else the test would show nothing"
    assert f"{len(case.unlike)} of the patches kept for being unlike the others" in case.summary
    case.write(tmp_path, names=["report.html"])
    assert (tmp_path / "report.html").read_text().count("<br>kept for being unlike the others") == len(case.unlike)
    assert not open_case(model, bag, slide, k=5, selector="topk").unlike
    assert not open_case(model, bag, slide, k=5, selector="kmeans").unlike
    worst = int(case.selection.scores.argmin())
    pinned = case.choose(model, 5, pinned=[worst])
    assert worst in pinned.selection.indices
    assert worst not in pinned.unlike, "it was kept by hand"
