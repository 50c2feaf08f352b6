"""selection.json suffices to select again, and is replayed only where it belongs."""

import dataclasses
import json

import pytest
import torch

from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.selector import hard_topk
from sparsewsi.report.answer import Answer
from sparsewsi.report.record import Record, read_selection, write_selection


def test_record_suffices_to_select_again(tmp_path, bag, selection):
    answer = Answer("Which?", "fat", ("fat", "mucin"), (0.75, 0.25))
    write_selection(
        tmp_path / "s.json", bag, selection, SparseWSIConfig(demo=True), model="demo-model", answers=[answer]
    )
    record = json.loads((tmp_path / "s.json").read_text())
    again = hard_topk(torch.tensor(record["selection"]["scores"]), record["selection"]["count"])
    assert again.tolist() == record["selection"]["indices"] == [1, 3, 4]
    assert SparseWSIConfig.from_dict(record["model"]["config"]) == SparseWSIConfig(demo=True)
    assert record["slide"] == {"name": "slide 0a1b2c3d", "size": [400, 300], "mpp": 0.25, "mpp_source": "openslide"}
    assert record["answers"][0]["probs"] == [0.75, 0.25]
    assert "not for diagnosis" in record["notice"]
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"]


@pytest.fixture
def record(tmp_path, bag, selection) -> Record:
    answers = [Answer("Which?", "fat", ("fat", "mucin"), (0.75, 0.25)), Answer("Describe.", "Fat.")]
    write_selection(tmp_path / "s.json", bag, selection, SparseWSIConfig(), model="m", answers=answers)
    return read_selection(tmp_path / "s.json")


def test_a_record_is_read_back_whole(record, bag, selection):
    assert record.indices.tolist() == selection.indices.tolist()
    assert torch.equal(record.scores, selection.scores)
    assert record.questions == (("Which?", ("fat", "mucin")), ("Describe.", ()))
    assert record.slide_mpp is None, "the slide states it"
    record.check(bag)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slide": "slide ffffffff"}, "its slide is slide 0a1b2c3d, not slide ffffffff"),
        ({"encoder": "uni"}, "its encoder is efficientnet-lite0, not uni"),
        ({"features": torch.zeros(6, 8), "coords": torch.zeros(6, 2)}, "its number of patches is 5, not 6"),
        ({"coords": torch.zeros(5, 2)}, "lie elsewhere"),
    ],
)
def test_a_record_of_something_else_is_refused(record, bag, changes, said):
    with pytest.raises(ValueError, match=said):
        record.check(dataclasses.replace(bag, **changes))


def test_a_file_that_is_no_record_is_refused(tmp_path, record):
    content = json.loads((tmp_path / "s.json").read_text())
    for part in ("indices", "scores", "coords"):
        for value in (None, [], [[0]], "x", [-1], [10**30]):
            (tmp_path / "bad.json").write_text(
                json.dumps(content | {"selection": content["selection"] | {part: value}})
            )
            with pytest.raises(ValueError, match=r"bad\.json"):
                read_selection(tmp_path / "bad.json")
    for text in ("", "[]", "{}", '{"slide": 3}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json"):
            read_selection(tmp_path / "bad.json")
