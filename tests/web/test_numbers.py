"""A patch has one number: on the page, for programs, and in every file, whichever selector kept it."""

import base64
import csv
import json
import re

import numpy as np
import pytest

from sparsewsi import phantom
from sparsewsi.report.answer import Answer
from sparsewsi.web import api
from sparsewsi.web.api import Api
from sparsewsi.web.desk import Opened
from sparsewsi.web.handlers import Asked
from sparsewsi.web.viewer import bag_props
from sparsewsi.web.what_if import selection_props


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("slides") / "phantom.tiff"
    phantom.write_phantom(path, seed=3, size=1024)
    return str(path)


def unpack(text: str, dtype: str = "<i4") -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


@pytest.mark.parametrize("selector", ["learned", "farthest", "random"])
def test_a_patch_has_one_number_on_the_page_for_programs_and_in_files(selector, desk, on, slide, visitor, monkeypatch):
    monkeypatch.setattr(api, "open_example", lambda _name: slide)
    found = Api(desk).analyze(visitor(), selector=selector)
    numbers = dict(zip(found["indices"], found["ranks"]))
    assert len(numbers) == 6
    by_score = np.argsort(-np.array(found["scores"]), kind="stable")
    assert np.all(np.diff(np.array(found["ranks"])[by_score]) > 0), "the better score has the lower number"
    assert (sorted(found["ranks"]) == [1, 2, 3, 4, 5, 6]) == (selector == "learned")

    case = desk.find_case(found["case"])
    props = bag_props(case.bag, case.selection)
    kept = unpack(props["kept"])
    assert dict(zip(kept.tolist(), unpack(props["bag"]["ranks"])[kept].tolist())) == numbers
    assert unpack(selection_props(case)["kept"]).tolist() == kept.tolist()

    weighed = Api(desk).evidence(visitor(), found["case"], "Which?", "fat")
    assert dict(zip(weighed["indices"], weighed["ranks"])) == numbers
    assert {int(number) for number in re.findall(r"#(\d+)", weighed["sentence"])} <= set(numbers.values())

    me = visitor()
    [one] = on.on_slide(Asked((slide,)), "", None, None, (), me)[on.page.coming]
    token = one.token
    on.on_analysed(Opened([one], case), {1: Answer("Which?", "fat", effects=tuple(weighed["effects"]))}, me)
    text = {
        name: desk.slides.download(token, name).read_text()
        for name in ("patches.csv", "patches.geojson", "selection.json", "report.html")
    }
    rows = csv.DictReader(text["patches.csv"].splitlines())
    assert {int(row["index"]): int(row["rank"]) for row in rows} == numbers
    squares = json.loads(text["patches.geojson"])["features"]
    corners = {tuple(case.bag.coords[index].tolist()): number for index, number in numbers.items()}
    named = {tuple(one["geometry"]["coordinates"][0][0]): one["properties"]["name"] for one in squares}
    assert named == {corner: f"#{number}" for corner, number in corners.items()}
    record = json.loads(text["selection.json"])["selection"]
    assert dict(zip(record["indices"], record["ranks"])) == numbers
    assert {int(number) for number in re.findall(r'id="patch-(\d+)"', text["report.html"])} == set(numbers.values())
