"""A page that another reader answers on: it says who, where pictures go, and what is only that reader's word."""

import html
import json
import re
from pathlib import Path

import gradio as gr
import pytest
import torch

from sparsewsi.bags.extract import extract_bag
from sparsewsi.model.selection import Selection
from sparsewsi.phantom import write_phantom
from sparsewsi.readers.local import load_reader
from sparsewsi.readers.server import ServerReader
from sparsewsi.report.answer import Answer
from sparsewsi.report.case import Case, open_case
from sparsewsi.web.api import Api
from sparsewsi.web.chat import show_evidence, text_of
from sparsewsi.web.desk import CaseSlide, Desk, Opened
from sparsewsi.web.handlers import Handlers
from sparsewsi.web.layout import lay_out, tell_notice
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


@pytest.fixture(scope="module")
def case(slide: Path, desk: Desk) -> Case:
    return open_case(desk.model, extract_bag(slide, desk.config.encoder), slide)


@pytest.fixture
def far(desk: Desk, stand_in_server, tmp_path: Path) -> Desk:
    """A desk whose reader is behind the stand-in server."""
    reader = ServerReader("m", stand_in_server.endpoint, first_wait=0.01)
    made = Desk(desk.model_name, tmp_path, allow_paths=True, reader=reader)
    made._loaded = desk.load()
    return made


def test_a_server_answers_on_the_page_from_pictures_cut_in_the_slides_own_process(case, far, desk, stand_in_server, me):
    stand_in_server.say("Fat, see Patch 2.")
    with far.jobs.run(me.session_hash, "question") as job:
        asked = [{"role": "user", "content": "Which tissue?"}]
        text = "".join(far.answer(case, asked, [], job.name))
        answer = far.weigh(case, asked, far.judge(case, asked, text, [], job.name), job.name)
    assert (answer.text, answer.reader, answer.cited) == ("Fat, see Patch 2.", "openai:m", (2,))
    assert "Cited by the reader, not measured: <a href='#patch-2'>#2</a>" in show_evidence(answer, case.selection)[0]
    ((_, _, body),) = stand_in_server.received
    assert b"SMITH" not in body
    content = json.loads(body)["messages"][0]["content"]
    assert sum(part["type"] == "image_url" for part in content) == len(case.selection.indices)
    cost = rf"To ask again without a focus takes one more request, .* {len(case.selection.indices)} pictures, 0\.\d MB"
    assert re.search(cost, show_evidence(answer, case.selection)[0]), "told before it is done"
    features_alone = open_case(desk.model, case.bag)
    with far.jobs.run(me.session_hash, "question") as job, pytest.raises(ValueError, match="Only the features"):
        "".join(far.answer(features_alone, asked, [], job.name))


def put(far: Desk, case: Case, me) -> tuple[Handlers, Opened, list]:
    """The page's handlers, the slide as it is open, and a chat that ends with a question to be answered."""
    _, page = lay_out(far)
    on, opened = Handlers(far, page), Opened([CaseSlide("token", "", bag=case.bag)], case)
    changes = on.on_question("Which tissue?", "", "", opened, (), [], {}, me)
    return on, opened, changes[page.chat]


def read(on: Handlers, opened: Opened, chat: list, me) -> tuple[list, dict, str]:
    """The chat and the answers at the end, and the sentence that the page shows in red, if any."""
    last: dict = {}
    try:
        for last in on.on_asked(opened, chat, {}, {}, me):  # noqa: B007
            pass
    except gr.Error as error:
        return last[on.page.chat], last[on.page.answers], str(error.message)
    return last[on.page.chat], last[on.page.answers], ""


def test_a_rate_limit_is_waited_for_on_the_page(case, far, stand_in_server, me):
    stand_in_server.fail(429, "slow down", Retry_After="0.2")
    stand_in_server.say("Fat.")
    chat, answers, said = read(*put(far, case, me), me)
    assert [text_of(message) for message in chat] == ["Which tissue?", "Fat."]
    assert (said, len(answers), len(stand_in_server.received)) == ("", 1, 2)


@pytest.mark.parametrize(
    ("happens", "said"),
    [
        (lambda server: server.say("There is no ", end=None), r"broke off the answer of openai:m: .* Ask again\.$"),
        (lambda server: server.say(refusal="I cannot help."), r"^openai:m refused to answer: I cannot help"),
        (lambda server: server.fail(429, "quota", Retry_After="3600"), r"is busy and asks to wait 3600 s"),
        (lambda server: server.fail(401), r"refused access to m"),
    ],
    ids=["dropped stream", "refusal", "rate limit of an hour", "no access"],
)
def test_what_goes_wrong_with_a_server_is_one_sentence_and_the_question_stays(
    case, far, stand_in_server, me, happens, said
):
    happens(stand_in_server)
    on, opened, asked = put(far, case, me)
    chat, answers, told = read(on, opened, asked, me)
    assert re.search(said, told)
    assert len(told.splitlines()) == 1
    assert chat[0] == asked[0], "the question stands"
    assert all("again" in str(message["content"]) for message in chat[1:]), "half an answer says that it is one"
    assert answers == {}, "which no report or download has then"
    again = on.on_retry(opened, chat, me)
    stand_in_server.say("Fat.")
    chat, answers, told = read(on, opened, again[on.page.chat], me)
    assert ([text_of(message) for message in chat], told) == (["Which tissue?", "Fat."], "")
    assert len(answers) == 1


def test_a_program_asks_again_without_some_patches_and_is_told_what_it_takes(case, far, stand_in_server, me):
    far.find_case = lambda _name: case  # type: ignore[method-assign]
    stand_in_server.say("Fat.")
    said = Api(far).ask(me, "token", "Which tissue?", without=[1, 3])
    left = len(case.selection.indices) - 2
    assert f"{left} pictures" in said["again"]
    ((_, _, body),) = stand_in_server.received
    sent = [part.get("text", "") for part in json.loads(body)["messages"][0]["content"]]
    assert [text for text in sent if text.startswith("Patch ")][:2] == ["Patch 2:", "Patch 4:"]
    with pytest.raises(gr.Error, match="#999 is not among the patches that are kept"):
        Api(far).ask(me, "token", "Which tissue?", without=[999])


def test_a_local_model_answers_on_the_page_and_is_measured(slide, desk, tiny_llava, me, tmp_path):
    near = Desk(desk.model_name, tmp_path, allow_paths=True, reader=load_reader(str(tiny_llava)))
    near._loaded = desk.load()
    case = open_case(desk.model, extract_bag(slide, desk.config.encoder), slide, k=2)
    assert near.reading == "Read by hf:tiny-llava, from pictures of the patches."
    with near.jobs.run(me.session_hash, "question") as job:
        asked = [{"role": "user", "content": "Which tissue?"}]
        text = "".join(near.answer(case, asked, ["fat", "liver"], job.name))
        judged = near.judge(case, asked, text or "fat", ["fat", "liver"], job.name)
        answer = near.weigh(case, asked, judged, job.name)
    assert sum(answer.probs) == pytest.approx(1)
    assert len(answer.effects) == 2
