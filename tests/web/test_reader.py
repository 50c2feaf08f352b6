"""A page that another reader answers on: it says who, where pictures go, and what is only that reader's word."""

import html
import json
from pathlib import Path

import pytest
import torch

from sparsewsi.bags.extract import extract_bag
from sparsewsi.model.selection import Selection
from sparsewsi.phantom import write_phantom
from sparsewsi.readers.local import load_reader
from sparsewsi.readers.server import ServerReader
from sparsewsi.report.answer import Answer
from sparsewsi.report.case import open_case
from sparsewsi.web.chat import show_evidence
from sparsewsi.web.desk import Desk
from sparsewsi.web.layout import tell_notice
from sparsewsi.web.serve import read_flags


def test_the_page_says_who_reads_before_any_question(desk, opened, tmp_path):
    far = Desk(desk.model_name, tmp_path, reader=ServerReader("m", "https://models.example.org/v1"))
    assert "to models.example.org. No file name" in far.reading
    assert html.escape(far.reading) in tell_notice(far)
    assert desk.reading == ""
    assert "Read by" not in tell_notice(desk)


def test_cited_is_not_shown_as_measured():
    selection = Selection(torch.tensor([0, 2]), torch.tensor([3.0, 2.0, 1.0]), torch.zeros(2, 4), 3)
    answer = Answer("Which?", "Fat, Patch 3.", reader="openai:m", cited=(3,), evidence="Not measured.")
    (block,) = show_evidence(answer, selection)
    assert "<p class='small'>Not measured.</p>" in block
    assert "Cited by the reader, not measured: <a href='#patch-3'>#3</a>" in block


def test_a_reader_is_chosen_by_a_flag_and_its_server_by_the_environment(monkeypatch):
    monkeypatch.setenv("SPARSEWSI_ENDPOINT", "http://127.0.0.1:9/v1")
    assert read_flags([], on_space=False).reader is None
    chosen = read_flags(["--reader", "openai:m", "--reader-images", "4"], on_space=False).reader
    assert (chosen.name, chosen.endpoint, chosen.images_per_call) == ("openai:m", "http://127.0.0.1:9/v1", 4)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ward-7") / "SMITH_JOHN.tiff"
    write_phantom(path, seed=3, size=1024)
    return path


def test_a_server_answers_on_the_page_from_pictures_cut_in_the_slides_own_process(
    slide, desk, stand_in_server, me, tmp_path
):
    far = Desk(desk.model_name, tmp_path, allow_paths=True, reader=ServerReader("m", stand_in_server.endpoint))
    far._loaded = desk.load()
    case = open_case(desk.model, extract_bag(slide, desk.config.encoder), slide)
    stand_in_server.say("Fat, see Patch 2.")
    with far.jobs.run(me.session_hash, "question") as job:
        asked = [{"role": "user", "content": "Which tissue?"}]
        text = "".join(far.answer(case, asked, [], job.name))
        answer = far.measure(case, asked, text, [], job.name)
    assert (answer.text, answer.reader, answer.cited) == ("Fat, see Patch 2.", "openai:m", (2,))
    assert "Cited by the reader, not measured: <a href='#patch-2'>#2</a>" in show_evidence(answer, case.selection)[0]
    ((_, _, body),) = stand_in_server.received
    assert b"SMITH" not in body
    content = json.loads(body)["messages"][0]["content"]
    assert sum(part["type"] == "image_url" for part in content) == len(case.selection.indices)
    features_alone = open_case(desk.model, case.bag)
    with far.jobs.run(me.session_hash, "question") as job, pytest.raises(ValueError, match="only its features"):
        "".join(far.answer(features_alone, asked, [], job.name))


def test_a_local_model_answers_on_the_page_and_is_measured(slide, desk, tiny_llava, me, tmp_path):
    near = Desk(desk.model_name, tmp_path, allow_paths=True, reader=load_reader(str(tiny_llava)))
    near._loaded = desk.load()
    case = open_case(desk.model, extract_bag(slide, desk.config.encoder), slide, k=2)
    assert near.reading == "Read by hf:tiny-llava, from pictures of the patches."
    with near.jobs.run(me.session_hash, "question") as job:
        asked = [{"role": "user", "content": "Which tissue?"}]
        text = "".join(near.answer(case, asked, ["fat", "liver"], job.name))
        answer = near.measure(case, asked, text or "fat", ["fat", "liver"], job.name)
    assert sum(answer.probs) == pytest.approx(1)
    assert len(answer.effects) == 2
