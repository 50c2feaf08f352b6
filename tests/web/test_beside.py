"""Two selections side by side: what its handlers promise. What it is like to use: test_browser.py."""

import json
import re
from types import SimpleNamespace

import gradio as gr
import pytest
import torch

from sparsewsi.bags.bag import Bag
from sparsewsi.web import chat
from sparsewsi.web.answering import STOPPED
from sparsewsi.web.beside import Comparing
from sparsewsi.web.desk import CaseSlide
from sparsewsi.web.layout import lay_out
from sparsewsi.web.viewer import bag_props

NO_PICKS = {"pinned": [], "dropped": []}


@pytest.fixture(scope="module")
def on(desk) -> Comparing:
    _, page = lay_out(desk)
    return Comparing(desk, page)


@pytest.fixture
def asked(on, opened, me) -> tuple:
    """What the page holds after one question: slide, chat, questions, answers."""
    changes = on.on_question("Which?", "fat\nliver", "", opened, "", [], {}, me)
    *_, last = on.on_asked(opened, changes[on.page.chat], changes[on.page.questions], {}, me)
    return opened, last[on.page.chat], changes[on.page.questions], last[on.page.answers]


def ask_both(on, opened, right, chat_before, questions, answers, me) -> tuple[dict, dict]:
    """What a question changes: on the left, then on the right."""
    put = on.on_question("How?", "fat\nliver", "", opened, "", chat_before, questions, me)
    *_, left = on.on_asked(opened, put[on.page.chat], put[on.page.questions], answers, me)
    *_, both = on.on_asked_too(opened, right, left[on.page.chat], put[on.page.questions], left[on.page.answers], me)
    return left, both


def test_one_question_goes_to_both_and_each_answer_rests_on_its_own_patches(on, opened, me):
    page = on.page
    shown = on.on_both(opened, [], {}, {}, None, 8, "random", NO_PICKS, me)
    right = shown[page.right]
    assert shown[page.view].props["compared"] == "6 learned patches"
    assert shown[page.other].props["compared"] == "8 random patches"
    assert shown[page.other].props["kept"] == bag_props(opened.case.bag, right.opened.case.selection)["kept"]
    left, both = ask_both(on, opened, right, [], {}, {}, me)
    answer, other = left[page.answers][1], both[page.right].answers[1]
    assert (answer.question, len(answer.effects)) == ("How?", 6)
    assert (other.question, len(other.effects)) == ("How?", 8)
    message = both[page.chat][-1]
    assert chat.shows_both(message)
    assert re.match(r"Both: .*(fat|liver)$|Both answer the same|They differ$", chat.text_of(message))
    said = "".join(message["content"])
    assert said.index("6 learned patches") < said.index("class='other'") < said.index("8 random patches")
    assert other.beside == "8 random patches"


def test_seen_the_right_hand_answers_in_the_log_and_not_in_the_report(on, opened, asked, me, desk, monkeypatch):
    offered = {}
    monkeypatch.setattr(desk.slides, "offer", lambda token, make: offered.update({token: make}))
    page = on.page
    shown = on.on_both(*asked, None, 8, "random", NO_PICKS, me)
    kept = (shown[page.chat], shown[page.questions], shown[page.answers])
    list(on.on_asked_too(opened, shown[page.right], *kept, me))
    report = offered[opened.token]("report.html").read_text()
    assert report.count(">Q1. Which?<") == report.count(">Q2. Which?<") == 1
    assert "Answered from 8 random patches, side by side with the patches of this report." in report
    answers = json.loads(offered[opened.token]("selection.json").read_text())["answers"]
    assert [answer["beside"] for answer in answers] == ["", "8 random patches"]


def test_seen_they_differ_before_the_right_hand_answer_was_there(on, opened, asked, me):
    page = on.page
    shown = on.on_both(*asked, None, 8, "random", NO_PICKS, me)
    kept = (shown[page.chat], shown[page.questions], shown[page.answers])
    _, *steps, last = on.on_asked_too(opened, shown[page.right], *kept, me)
    assert {chat.text_of(step[page.chat][-1]) for step in steps} == {"…"}
    assert chat.text_of(last[page.chat][-1]) != "…"


def test_the_last_answer_stays_on_the_left_and_is_put_to_the_right(on, opened, asked, me):
    page = on.page
    shown = on.on_both(*asked, None, 8, "random", NO_PICKS, me)
    assert shown[page.answers] == {1: asked[3][1]}
    kept = (shown[page.chat], shown[page.questions], shown[page.answers])
    *_, both = on.on_asked_too(opened, shown[page.right], *kept, me)
    assert chat.shows_both(both[page.chat][-1])
    assert both[page.right].answers[1].options == ("fat", "liver")


def test_two_what_ifs_stand_side_by_side_and_one_button_restores_everything(on, opened, asked, me, desk, monkeypatch):
    monkeypatch.setattr(desk.slides, "holds", lambda _token: True)
    page = on.page
    on.on_answered(me)
    first, *_, done = on.on_ask_again(*asked, None, 8, "random", NO_PICKS, me)
    state = (first[page.opened], done[page.chat], first[page.questions], done[page.answers], first[page.aside])
    shown = on.on_both(*state, 8, "farthest", NO_PICKS, me)
    assert shown[page.view].props["compared"] == "8 random patches"
    assert shown[page.other].props["compared"] == "8 farthest patches"
    left = on.on_leave(state[0], shown[page.chat], shown[page.answers], shown[page.aside], me) | on.on_left()
    assert (left[page.opened], left[page.chat], left[page.questions], left[page.answers]) == asked
    assert left[page.right] is None
    assert left[page.other].props["slides"] is None
    assert left[page.aside] is None


def test_a_right_answer_can_be_stopped(on, opened, asked, me):
    shown = on.on_both(*asked, None, 8, "random", NO_PICKS, me)
    page = on.page
    steps = on.on_asked_too(opened, shown[page.right], shown[page.chat], shown[page.questions], shown[page.answers], me)
    next(steps)
    on.on_stop(shown[page.chat], me)
    *_, last = steps
    assert STOPPED in str(last[page.chat][-1])
    assert last[page.right].answers == {}


def test_where_the_left_one_gave_no_answer_the_right_one_is_not_asked(on, opened, asked, me):
    shown = on.on_both(*asked, None, 8, "random", NO_PICKS, me)
    refused = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "This model cannot answer that"}]
    (only,) = on.on_asked_too(opened, shown[on.page.right], refused, {}, {}, me)
    assert only == {"__type__": "update"}


def test_both_go_with_their_session(on, opened, asked, me, desk):
    shown = on.on_both(*asked, None, 8, "random", NO_PICKS, me)
    right = shown[on.page.right].opened
    assert right in opened._beside


@pytest.fixture(scope="module")
def case_of_two(desk):
    """Two slides of random features, of 20 and of 10 patches."""
    generator = torch.Generator().manual_seed(2)
    slides = []
    for number, count in enumerate((20, 10), 1):
        coords = torch.tensor([[224 * i, 0] for i in range(count)])
        features = torch.randn(count, 1280, generator=generator)
        bag = Bag(features, coords, 224, 0.5, "efficientnet-lite0", f"slide {number}", 0.5, "openslide", (4480, 224))
        slides.append(CaseSlide(f"token {number}", f"{number}.svs", props={"token": f"token {number}"}, bag=bag))
    return desk.select(slides)


def test_two_slides_of_a_case_stand_side_by_side_each_with_its_own_patches(on, case_of_two, me):
    page, named = on.page, SimpleNamespace(_data={"number": 1})
    shown = on.on_two(named, case_of_two, [], {}, {}, None, me)
    left, right = shown[page.opened], shown[page.right]
    assert [one.token for one in left.slides] == ["token 2"], "the one that the viewer shows"
    assert [one.token for one in right.opened.slides] == ["token 1"]
    assert (right.left, right.label) == ("Slide 2", "Slide 1")
    assert left.case.selection.num_patches == 10
    assert right.opened.case.selection.num_patches == 20
    answered, both = ask_both(on, left, right, [], {}, {}, me)
    assert len(answered[page.answers][1].effects) == len(both[page.right].answers[1].effects) == 6
    said = "".join(both[page.chat][-1]["content"])
    assert said.index("Slide 2") < said.index("class='other'") < said.index("Slide 1")


def test_two_slides_are_left_by_one_button_and_first_by_that(on, case_of_two, me):
    page, named = on.page, SimpleNamespace(_data={"number": 0})
    shown = on.on_two(named, case_of_two, [], {}, {}, None, me)
    with pytest.raises(gr.Error, match="Leave the comparison"):
        on.on_both(shown[page.opened], [], {}, {}, shown[page.aside], 8, "random", NO_PICKS, me)
    with pytest.raises(gr.Error, match="Leave the comparison"):
        list(on.on_ask_again(shown[page.opened], [], {}, {}, shown[page.aside], 8, "random", NO_PICKS, me))
    left = on.on_leave(shown[page.opened], [], {}, shown[page.aside], me)
    assert left[page.opened] is case_of_two
    assert [one["token"] for one in left[page.view].props["slides"]] == ["token 1", "token 2"]
    assert left[page.view].props["bag"] == bag_props(case_of_two.case.bag, case_of_two.case.selection)["bag"]


def test_one_slide_cannot_be_compared_with_another(on, opened, me):
    with pytest.raises(gr.Error, match="second slide"):
        on.on_two(SimpleNamespace(_data={"number": 0}), opened, [], {}, {}, None, me)
