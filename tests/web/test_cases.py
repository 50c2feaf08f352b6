"""Cases of several slides on the page: slides come and go, what was there before stays, each patch knows its slide."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from sparsewsi import phantom
from sparsewsi.bags.bag import Bag
from sparsewsi.report.answer import Answer
from sparsewsi.web import chat
from sparsewsi.web import desk as desk_module
from sparsewsi.web.answering import AT_READY
from sparsewsi.web.desk import CaseSlide, Desk, Opened
from sparsewsi.web.handlers import Asked, Handlers
from sparsewsi.web.limits import MOST_SLIDES


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two small slides, scanned at 0.5 and at 0.25 um/px."""
    folder = tmp_path_factory.mktemp("two")
    phantom.write_phantom(folder / "a.tiff", seed=5, size=1024)
    phantom.write_phantom(folder / "b.tiff", seed=6, size=1536, mpp=0.25)
    return str(folder / "a.tiff"), str(folder / "b.tiff")


def put(on: Handlers, me: gr.Request, *paths: str, to: Opened | None = None, coming: tuple = ()) -> dict:
    """What shows the slides, added to a case if there is one."""
    return on.on_slide(Asked(paths, to is not None or bool(coming)), "", to, None, coming, me)


def analyse(on: Handlers, me: gr.Request, shown: dict, to: Opened | None = None) -> dict:
    """The last that the analysis says."""
    *_, last = on.on_slide_shown(shown[on.page.coming], to, [], me)
    return last


def open_case(on: Handlers, me: gr.Request, *paths: str, to: Opened | None = None) -> Opened:
    return analyse(on, me, put(on, me, *paths, to=to), to)[on.page.opened]


def bag_of(one: CaseSlide) -> Bag:
    assert one.bag is not None
    return one.bag


def names(case: Opened) -> list[str]:
    return [bag_of(one).slide for one in case.slides]


def test_patches_are_kept_among_those_of_all_slides_and_each_knows_its_own(on, me, two, desk):
    first = open_case(on, me, two[0])
    both = open_case(on, me, two[1], to=first)
    assert first.closed, "its features are not held twice"
    assert [Path(one.path) for one in both.slides] == [Path(path) for path in two]
    assert names(both) == ["phantom 5", "phantom 6"]
    case, sizes = both.case, [len(bag_of(one).coords) for one in both.slides]
    assert len(case.selection.indices) == desk.config.num_tokens
    assert case.selection.num_patches == sum(sizes)
    assert case.numbers.tolist() == [int(index >= sizes[0]) for index in case.selection.indices.tolist()]
    assert [part.slide_mpp for part in case.bag.parts] == pytest.approx([0.5, 0.25], rel=0.01)
    assert [part.patch_size for part in case.bag.parts] == [224, 448], "the same tissue at either resolution"
    pointers = {bag_of(one).features.untyped_storage().data_ptr() for one in both.slides}
    assert pointers == {case.bag.features.untyped_storage().data_ptr()}


def test_slides_that_are_opened_together_are_the_same_case_as_one_after_the_other(on, visitor, two):
    together = open_case(on, visitor(), *two)
    me = visitor()
    in_turn = open_case(on, me, two[1], to=open_case(on, me, two[0]))
    assert torch.equal(together.case.selection.indices, in_turn.case.selection.indices)
    assert torch.equal(together.case.bag.features, in_turn.case.bag.features)


def test_a_second_slide_that_fails_leaves_the_first_and_says_why(on, me, two, tmp_path, desk):
    first = open_case(on, me, two[0])
    Image.new("RGB", (64, 64), "white").save(tmp_path / "blank.png")
    with pytest.raises(gr.Error, match="no file at the path"):
        on.on_typed_path(str(tmp_path / "absent.svs"), True, me, gr.Progress())
    shown = put(on, me, str(tmp_path / "blank.png"), to=first)
    assert on.page.opened not in shown, "the first stays while the second is analysed"
    told = analyse(on, me, shown, first)
    view = told[on.page.view].props
    assert "resolution" in view["work"]["error"]
    assert view["work"]["error"].startswith("slide ")
    assert [one["name"] for one in view["slides"]] == ["phantom 5"]
    assert "phantom 5" in told[on.page.facts]
    assert not first.closed
    assert desk.find_case(first.token) is first.case
    assert not desk.slides.holds(shown[on.page.coming][0].token)


def test_of_several_slides_the_others_are_analysed_when_one_fails(on, me, two, tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "blank.png")
    shown = put(on, me, two[0], str(tmp_path / "blank.png"), two[1])
    *_, before, told = on.on_slide_shown(shown[on.page.coming], None, [], me)
    assert names(before[on.page.opened]) == ["phantom 5", "phantom 6"]
    assert "resolution" in told[on.page.view].props["work"]["error"]


def test_the_same_slide_twice_is_a_sentence(on, me, two, tmp_path):
    first = open_case(on, me, two[0])
    shutil.copy(two[0], tmp_path / "copy.tiff")
    shutil.copy(phantom.truth_path(two[0]), phantom.truth_path(tmp_path / "copy.tiff"))
    for path in (two[0], str(tmp_path / "copy.tiff")):
        with pytest.raises(gr.Error, match="Phantom 5 is in the case already, as slide 1"):
            put(on, me, path, to=first)
    with pytest.raises(gr.Error, match="in the case already"):
        put(on, me, two[1], two[1])
    assert not first.closed


def test_a_case_has_a_bounded_number_of_slides_and_of_patches(on, me, two, desk, monkeypatch):
    with pytest.raises(gr.Error, match=f"at most {MOST_SLIDES} slides, and this would be 13"):
        on.on_typed_path("\n".join([two[0]] * 13), False, me, gr.Progress())
    with pytest.raises(gr.Error, match="this would be 13"):
        on.on_upload(["a.svs"] * 13, False, me, gr.Progress())
    with pytest.raises(gr.Error, match="this would be 13"):
        put(on, me, *[two[0]] * 13)
    first = open_case(on, me, two[0])
    monkeypatch.setattr(desk_module, "MOST_PATCHES", first.patches + 1)
    told = analyse(on, me, put(on, me, two[1], to=first), first)
    words = f"with {first.patches} of the other slides more than the {first.patches + 1}"
    assert words in told[on.page.view].props["work"]["error"]
    assert not first.closed


def test_cancelling_the_second_keeps_the_first(on, me, two, desk, monkeypatch):
    first = open_case(on, me, two[0])
    shown, encoder = put(on, me, two[1], to=first), desk.load()[1]

    def cancel(pixels):
        on.on_cancel(me)
        return encoder(pixels)

    monkeypatch.setattr(desk, "_loaded", (desk.model, Encoder(encoder, cancel)))
    told = analyse(on, me, shown, first)
    assert "the case is as it was" in told[on.page.view].props["work"]["error"]
    assert [one["name"] for one in told[on.page.view].props["slides"]] == ["phantom 5"]
    assert told[on.page.coming] is None
    assert desk.latest(first) is first


class Encoder:
    """A patch encoder that tells of every batch."""

    def __init__(self, encoder, call: Callable):
        self.name, self.dim, self.call = encoder.name, encoder.dim, call

    def __call__(self, pixels):
        return self.call(pixels)


def test_a_slide_that_is_added_while_the_first_is_analysed_leaves_both(on, me, two, desk):
    waiting = put(on, me, two[0])[on.page.coming]
    shown = put(on, me, two[1], coming=waiting)
    assert [Path(one.path) for one in shown[on.page.coming]] == [Path(path) for path in two]
    assert not desk.slides.holds(waiting[0].token), "its analysis begins anew"
    both = analyse(on, me, shown)[on.page.opened]
    assert names(both) == ["phantom 5", "phantom 6"]


def test_a_slide_can_be_taken_out_and_what_was_said_of_the_others_stays(on, me, two, desk):
    page, both = on.page, open_case(on, me, *two)
    start = len(bag_of(both.slides[0]).coords)
    both.marks.update({1: "agree", start + 2: "disagree"})
    out = SimpleNamespace(_data={"number": 0})
    with pytest.raises(gr.Error, match="being analysed"):
        on.on_remove(out, both, None, both.slides, [], me)
    left = on.on_remove(out, both, None, (), [], me)
    one = left[page.opened]
    assert names(one) == ["phantom 6"]
    assert one.marks == {2: "disagree"}
    assert both.closed
    assert desk.find_case(one.token) is one.case
    assert not desk.slides.holds(both.slides[0].token)
    assert (left[page.chat], left[page.answers]) == ([], {}), "they were about two slides"
    with pytest.raises(gr.Error, match="one slide at least"):
        on.on_remove(out, one, None, (), [], me)
    assert len(one.case.selection.indices) == desk.config.num_tokens


def test_one_question_goes_to_all_slides_and_citations_name_them(on, me, two):
    page, both = on.page, open_case(on, me, *two)
    asked = on.on_question("Which?", "fat\nliver", "", both, (), [], {}, me)
    *_, last = on.on_asked(both, asked[page.chat], asked[page.questions], {}, me)
    answer, said = last[page.answers][1], str(last[page.chat][-1]["content"])
    ranks, numbers = both.case.selection.ranks.tolist(), (both.case.numbers + 1).tolist()
    cited = [i for i in np.argsort(-np.array(answer.effects), kind="stable")[:3] if answer.effects[i] > 0]
    assert all(f"Slide {numbers[i]}, #{ranks[i]}" in said for i in cited)
    assert {slide.name for slide in answer.slides} == ({"1", "2"} if len(set(numbers)) == 2 else set())
    for focus in both.case.foci:
        assert len({numbers[place] for place in focus.places}) == 1, "a focus lies on one slide"


def test_a_question_typed_while_a_slide_is_added_waits_for_it(on, me, two):
    page, first = on.page, open_case(on, me, two[0])
    shown = put(on, me, two[1], to=first)
    before = [chat.show_question(chat.Question("Before?")), chat.show_answer("Fat.")]
    waits = on.on_question("Which?", "", "", first, shown[page.coming], before, {}, me)
    assert len(waits[page.chat]) == 4
    assert AT_READY in str(waits[page.chat][-1])
    back = on.on_ready(first, waits[page.waiting], None, waits[page.chat], me)
    assert (back[page.question], back[page.chat]) == ("Which?", before), "the slide was not added"
    both = analyse(on, me, shown, first)[page.opened]
    ready = on.on_ready(both, waits[page.waiting], (), [], me)
    assert [chat.text_of(one) for one in ready[page.chat]] == ["Which?"]


def test_files_of_a_case_are_one_for_each_slide(on, me, two, desk, tmp_path):
    both = open_case(on, me, *two)
    on.on_analysed(both, {1: Answer("Which?", "fat")}, me)
    for one in both.slides:
        archive = desk.slides.download(one.token, "annotations.zip")
    with zipfile.ZipFile(archive) as file:
        assert file.namelist() == ["patches-1.geojson", "patches-2.geojson"]
        squares = [json.loads(file.read(name))["features"] for name in file.namelist()]
    assert [len(part) for part in squares] == [int((both.case.numbers == number).sum()) for number in (0, 1)]
    report = desk.slides.download(both.token, "report.html").read_text()
    assert "Slide 1 (phantom 5)" in report
    assert "Slide 2 (phantom 6)" in report
    rows = desk.slides.download(both.token, "patches.csv").read_text().splitlines()
    assert {row.rsplit(",", 2)[1:][0] for row in rows[1:]} <= {"phantom 5", "phantom 6"}
    assert desk.slides.download(both.token, "figure.png").stat().st_size > 10_000


def test_regions_are_those_of_the_slide_that_is_looked_at(on, me, two, desk):
    both = open_case(on, me, *two)
    ring = [[0, 0], [3000, 0], [3000, 3000], [0, 3000], [0, 0]]
    start = len(bag_of(both.slides[0]).coords)
    for number, (low, high) in enumerate([(0, start), (start, both.patches)]):
        file = desk.uploads / "regions" / "r.geojson"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
        looked = on.on_shown(SimpleNamespace(_data={"number": number}))[on.page.number]
        found = on.on_regions(str(file), both, looked, me)[on.page.view].props["members"]["indices"]
        assert found == list(range(low, high))


def upload(desk: Desk, name: str, content: bytes) -> str:
    file = desk.uploads / name / "slide.tiff"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return str(file)


def test_uploads_of_a_case_are_kept_together_and_go_with_their_slide(on, me, two, desk):
    mine = [upload(desk, f"up{i}", Path(path).read_bytes()) for i, path in enumerate(two)]
    asked = on.on_upload(mine, False, me, gr.Progress())[on.page.asked]
    both = open_case(on, me, *asked.paths)

    def files() -> int:
        return len(list(desk.folder_of(me.session_hash).rglob("slide.tiff")))

    assert files() == 2
    on.on_remove(SimpleNamespace(_data={"number": 1}), both, None, (), [], me)
    assert files() == 1
    bad = [upload(desk, "up2", Path(two[1]).read_bytes()), upload(desk, "up3", b"junk" * 99)]
    with pytest.raises(gr.Error, match="File 2 of 2: "):
        on.on_upload(bad, True, me, gr.Progress())
    assert files() == 1, "all of them or none, and the case that is open stays"


def test_the_uploads_of_a_case_keep_to_the_room_of_one_visitor(on, me, two, desk, monkeypatch):
    size = Path(two[0]).stat().st_size
    monkeypatch.setattr(desk, "quota", 4 * (size + 1000))
    both = [upload(desk, f"room{i}", Path(two[0]).read_bytes()) for i in range(2)]
    with pytest.raises(gr.Error, match="File 2 of 2: The slides of a case may take"):
        on.on_upload(both, False, me, gr.Progress())
    assert on.on_upload([upload(desk, "room3", Path(two[0]).read_bytes())], False, me, gr.Progress())
