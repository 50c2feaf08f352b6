"""The handlers: what a click promises. What the page is like to use: test_browser.py."""

import dataclasses
import html
import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from sparsewsi import phantom
from sparsewsi.bags.foreign import load_bag
from sparsewsi.model.limits import UNVALIDATED, Limit, Limits
from sparsewsi.report import umap
from sparsewsi.report.answer import Answer, FocusEffect
from sparsewsi.report.record import read_selection
from sparsewsi.web import chat, handlers, jobs
from sparsewsi.web import desk as desk_module
from sparsewsi.web.answering import (
    AT_READY,
    BROKEN_OFF,
    COMING,
    STOPPED,
    UNWEIGHED,
    WEIGHING,
    evidence_props,
    point,
    show_told,
)
from sparsewsi.web.chat import Question
from sparsewsi.web.desk import CaseSlide, Opened
from sparsewsi.web.errors import explain_errors, say_once
from sparsewsi.web.gallery import read_gallery
from sparsewsi.web.handlers import Asked, Handlers, read_mpp
from sparsewsi.web.jobs import Halted
from sparsewsi.web.layout import tell_doubts
from sparsewsi.web.viewer import bag_props, file_props
from tests.web.test_jobs import soon

PHANTOM = SimpleNamespace(_data={"name": "phantom"})  # what the gallery tells


def show(on: Handlers, path, resolution: str, me: gr.Request) -> dict:
    """A slide is asked for and shown."""
    return on.on_slide(Asked((str(path),)), resolution, None, None, (), me)


def one_slide(token: str, case) -> Opened:
    return Opened([CaseSlide(token, "", bag=case.bag)], case)


def only_skips(steps) -> bool:
    return all(step == gr.skip() for step in steps)


def roles(messages: list) -> list[str]:
    return [message["role"] for message in messages]


# ---- words


def test_a_resolution_takes_a_decimal_comma_and_refuses_words():
    assert read_mpp(" 0,25 ") == 0.25
    assert read_mpp("") is None
    with pytest.raises(ValueError, match="number of µm/px"):
        read_mpp("40x")


@pytest.mark.parametrize(
    "error", [ValueError("bad\nslide. Pass slide_mpp=, e.g. 0.25"), OSError(28, "No space"), RuntimeError("x")]
)
def test_what_goes_wrong_is_one_sentence_on_the_page(error):
    with pytest.raises(gr.Error) as caught, explain_errors():
        raise error
    assert "\n" not in caught.value.message
    assert "slide_mpp" not in caught.value.message


def test_a_defect_gets_a_sentence_too():
    with pytest.raises(gr.Error, match="at fault"), explain_errors():
        raise KeyError("layer")


@pytest.mark.parametrize(
    "text",
    [
        "Mostly fat, with foci (two) of mucin: 3.5 mm; 40% - \"yes\" & 'no'?",
        "<img src=x onerror=alert(1)> ![x](http://evil.example/x.png) [a](javascript:b)",
        "# big\n* a\n1. b\n~~~\n`code` **bold** _it_ $x$ \\(y\\) www.evil.example a@b.c | t |\n---\n&lt;b&gt;",
    ],
)
def test_what_a_model_writes_is_shown_and_never_run(text):
    shown = chat.inert(text)
    assert html.unescape(shown) == text
    assert not re.search(r"[<>\[\]*`$|\\@]|://|www\.", shown)
    assert chat.text_of(chat.show_answer(text)) == text
    assert "<img" not in chat.compare([("a", text, [])])
    assert chat.inert("Mostly fat, with foci of mucin.") == "Mostly fat, with foci of mucin."


@pytest.mark.parametrize("given", [(), ("Yes", "No"), ("a. b", "C. fat", "-"), ("A. fat\\", "B. A. mucin")])
def test_a_question_is_put_as_it_was_written_whatever_its_options_look_like(given, on, opened, me):
    question = "Which tissue?\nA. Look closely.\nB. Say so."
    changes = on.on_question(question, "\n".join(given), "", opened, (), [], {}, me)
    asked, questions = changes[on.page.chat], changes[on.page.questions]
    assert chat.turns_of(asked, questions) == ([{"role": "user", "content": question}], given)
    on.on_clear(me)
    undone = on.on_undo(asked, questions, {}, me)
    assert undone[on.page.question] == question
    assert undone[on.page.given_options] == "\n".join(given)
    assert undone[on.page.questions] == {}


# ---- a question


def ask(on: Handlers, question: str, opened: Opened | None, chat_now: list, me: gr.Request, given: str = "") -> list:
    """The chat after the question."""
    return on.on_question(question, given, "", opened, (), chat_now, {}, me)[on.page.chat]


def test_a_question_without_a_slide_stays_in_the_box(on, me):
    with pytest.raises(gr.Error, match="Open a slide first"):
        ask(on, "What is it?", None, [], me)


def test_a_question_with_too_many_options_stays_in_the_box(on, opened, me, desk):
    with pytest.raises(gr.Error, match="at most 26 options"):
        ask(on, "Which?", opened, [], me, "\n".join(map(str, range(27))))
    assert not desk.turns.busy(str(me.session_hash))


def test_undo_gives_the_words_back_and_edit_drops_what_came_after(on, opened, me):
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Which?\n\nfat\nmucin"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "fat"}, {"type": "text", "text": "Demo model"}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Because."}]},
    ]
    questions, page = {0: Question("Which?", ("fat", "mucin")), 2: Question("Why?")}, on.page
    answers = {1: Answer("Which?", "fat"), 3: Answer("Why?", "Because.")}
    undone = on.on_undo(turns, questions, answers, me)
    left = [turns[:2], {0: questions[0]}, {1: answers[1]}]
    assert [undone[part] for part in (page.chat, page.questions, page.answers)] == left
    assert (undone[page.question], undone[page.given_options]) == ("Why?", "")
    again = on.on_undo(*left, me)
    assert [again[part] for part in (page.chat, page.questions, page.answers)] == [[], {}, {}]
    assert (again[page.question], again[page.given_options]) == ("Which?", "fat\nmucin")
    assert chat.back_to_question(turns) == turns[:3]
    assert chat.text_of(turns[1]) == "fat", "the notice is not said to the model"


@pytest.mark.parametrize(
    ("place", "value", "question"),
    [
        (2, "How?", Question("How?")),
        ([2, 0], "How &amp; why?\n\nA. Say so.", Question("How & why?\n\nA. Say so.")),
        (0, "What?\n\nfat\nmucin", Question("What?", ("fat", "mucin"))),
        (0, "Which?\n\nA. fat\nliver \n", Question("Which?", ("A. fat", "liver"))),
        (0, "Which?\n\n", Question("Which?")),
    ],
)
def test_an_edited_question_takes_the_place_of_what_came_after_it(place, value, question, on, opened, me):
    questions = {0: Question("Which?", ("fat", "mucin")), 2: Question("Why?")}
    turns = [chat.show_question(questions[0]), chat.show_answer("Fat."), chat.show_question(questions[2])]
    change = SimpleNamespace(index=place, value=value)
    changes = on.on_edit(opened, turns, questions, change, me)
    place = place if isinstance(place, int) else place[0]
    assert changes[on.page.chat] == [*turns[:place], chat.show_question(question)]
    assert changes[on.page.questions] == {**{i: questions[i] for i in questions if i < place}, place: question}


@pytest.fixture
def asked(on, opened, me):
    """The chat with a question just asked, whose answer comes in many pieces."""
    changes = on.on_question("Where is it?", "", "", opened, (), [], {}, me)
    assert changes[on.page.question].stop_btn == "Stop"
    return changes[on.page.chat]


def test_one_question_at_a_time(on, opened, asked, me):
    picks = {"pinned": [], "dropped": []}
    for handler in (
        lambda: on.on_retry(opened, asked, me),
        lambda: on.on_undo(asked, {}, {}, me),
        lambda: next(on.on_ask_again(opened, asked, {}, {}, None, 8, "random", picks, me)),
    ):
        with pytest.raises(gr.Error, match="still being answered"):
            handler()
    *_, last = on.on_asked(opened, asked, {}, {}, me)
    assert list(last[on.page.answers]) == [1]
    assert last[on.page.question].stop_btn is False
    assert on.on_answered(me)[on.page.question].submit_btn
    assert len(ask(on, "How?", opened, last[on.page.chat], me)) == 3
    assert on.on_answered(me) == gr.skip(), "it comes after the next question"


def test_seen_a_second_question_during_the_weighing_that_was_not_taken_up(on, opened, asked, me):
    """It waits, is told as the next one, and is asked once the answer before has come."""
    page, steps = on.page, on.on_asked(opened, asked, {}, {}, me)
    next(steps)
    waits = on.on_question("How?", "fat\nliver", "", opened, (), asked, {}, me)
    assert "Next:" in waits[page.next_line]
    assert "How?" in waits[page.next_line]
    assert page.chat not in waits, "the answer that comes writes the chat"
    assert (waits[page.question].value, waits[page.given_options]) == ("", "")
    with pytest.raises(gr.Error, match="waits already"):
        on.on_question("And why?", "", "", opened, (), asked, {}, me)
    *_, last = steps
    ended = on.on_answered(me)
    assert ended[page.next_line] == ""
    now = on.on_next(ended[page.next], opened, last[page.chat], {}, me)
    assert now[page.next] is None
    assert roles(now[page.chat]) == ["user", "assistant", "user"]
    *_, told = on.on_asked(opened, now[page.chat], now[page.questions], last[page.answers], me)
    assert told[page.answers][3].options == ("fat", "liver")
    assert on.page.next not in on.on_answered(me)


@pytest.mark.parametrize("end", ["on_stop", "on_clear"])
def test_a_question_that_waits_is_back_in_its_box_when_the_answer_before_is_stopped(end, on, opened, asked, me):
    steps = on.on_asked(opened, asked, {}, {}, me)
    next(steps)
    on.on_question("How?", "fat\nliver", "Benign", opened, (), asked, {}, me)
    back = on.on_stop(asked, me) if end == "on_stop" else on.on_clear(me)
    boxes = on.page.question, on.page.given_options, on.page.impression, on.page.next_line
    ready = "submit_btn" in back[boxes[0]].constructor_args
    assert ready == (end == "on_clear"), "a stopped answer says itself when it has ended"
    assert (back[boxes[0]].value, *(back[box] for box in boxes[1:])) == ("How?", "fat\nliver", "Benign", "")


def test_a_question_to_start_with_is_asked_by_one_tap_and_not_while_a_slide_is_analysed(on, opened, me, desk):
    page, starters = on.page, [("Which?", ["fat", "liver"])]
    early = on.on_starter(0, starters, None, opened.slides, [], {}, "", me)
    assert early == {page.question: "Which?", page.given_options: "fat\nliver"}
    assert not desk.turns.busy(str(me.session_hash))
    asked = on.on_starter(0, starters, opened, (), [], {}, " Benign", me)
    assert asked[page.questions] == {0: Question("Which?", ("fat", "liver"), impression="Benign")}
    assert desk.turns.busy(str(me.session_hash))
    assert "Next:" in on.on_starter(0, starters, opened, (), asked[page.chat], {}, "", me)[page.next_line]


def test_an_answer_that_was_stopped_is_neither_weighed_nor_asked_again(on, opened, asked, me, visitor):
    steps = on.on_asked(opened, asked, {}, {}, me)
    assert COMING in str(next(steps)[on.page.chat])
    on.on_stop(asked, visitor())
    assert COMING in str(next(steps)[on.page.chat])
    on.on_stop(asked, me)
    [last] = steps
    assert STOPPED in str(last[on.page.chat])
    assert WEIGHING not in str(last[on.page.chat])
    assert chat.text_of(last[on.page.chat][-1]) != "(no answer)"
    assert last[on.page.answers] == {}
    assert last[on.page.questions][0].refused == STOPPED, "the report has it, too"
    assert last[on.page.questions][0].said
    assert last[on.page.view].props["evidence"] is None
    assert last[on.page.question].stop_btn is False
    assert roles(ask(on, "How?", opened, last[on.page.chat], me)) == ["user", "assistant", "user"]


def test_stop_before_an_answer_has_its_turn(on, opened, asked, me):
    stopped = on.on_stop(asked, me)
    assert STOPPED in str(stopped[on.page.chat])
    assert chat.text_of(stopped[on.page.chat][-1]) == "(no answer)"
    assert stopped[on.page.question].stop_btn is False
    assert only_skips(on.on_asked(opened, asked, {}, {}, me))


def test_stop_while_the_evidence_is_weighed(on, opened, asked, me, desk, monkeypatch):
    passes, weigh = [], desk.model.leave_one_out

    def stop_at_the_first_pass(selection, messages, answer, options, progress, groups):
        def look(*count):
            passes.append(on.on_stop(asked, me))
            progress(*count)

        return weigh(selection, messages, answer, options, look, groups)

    monkeypatch.setattr(desk.model, "leave_one_out", stop_at_the_first_pass)
    *_, before, last = on.on_asked(opened, asked, {}, {}, me)
    assert len(passes) == 1
    assert last[on.page.answers] == {}
    assert last[on.page.view].props["evidence"] is None
    assert STOPPED in str(last[on.page.chat])
    assert chat.text_of(last[on.page.chat][-1]) == chat.text_of(before[on.page.chat][-1])


def test_an_answer_to_a_chat_that_was_cleared_does_not_fill_it_again(on, opened, asked, me):
    steps = on.on_asked(opened, asked, {}, {}, me)
    next(steps)
    assert on.on_clear(me)[on.page.answers] == {}
    [last] = steps
    assert last == {on.page.chat: [], on.page.answers: {}}


def test_an_answer_leaves_the_question_that_was_asked_after_clearing_alone(on, opened, asked, me):
    steps = on.on_asked(opened, asked, {}, {}, me)
    next(steps)
    on.on_clear(me)
    later = ask(on, "How?", opened, [], me)
    assert list(steps) == [gr.skip()], "Gradio sends what was yielded last once more"
    assert only_skips(on.on_asked(opened, asked, {}, {}, me)), "it waited in the queue when the chat was cleared"
    *_, last = on.on_asked(opened, later, {}, {}, me)
    assert chat.text_of(last[on.page.chat][0]) == "How?"


def test_an_answer_never_lands_beside_another_slide(on, opened, asked, me, desk, tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "other.png")
    steps = on.on_asked(opened, asked, {}, {}, me)
    next(steps)
    shown = show(on, tmp_path / "other.png", "0.5", me)
    assert shown[on.page.opened] is None
    assert shown[on.page.chat] == []
    [last] = steps
    assert last == {on.page.chat: [], on.page.answers: {}}
    assert not desk.slides.holds(opened.token)


@pytest.mark.parametrize("error", [ValueError("it is too large."), KeyError("layer")])
def test_an_answer_whose_evidence_failed_stands_without_it(on, opened, asked, me, desk, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(desk.model, "leave_one_out", fail)
    steps, last = on.on_asked(opened, asked, {}, {}, me), {}
    with pytest.raises(gr.Error, match="too large" if isinstance(error, ValueError) else "at fault"):
        for last in steps:  # noqa: B007
            pass
    assert WEIGHING not in str(last[on.page.chat])
    assert UNWEIGHED in str(last[on.page.chat])


def test_weighing_says_how_far_it_is(on, opened, asked, me, desk, monkeypatch):
    weigh, seen = desk.model.leave_one_out, threading.Event()

    def weigh_slowly(*given):
        given[4](3, 8)
        assert seen.wait(60)
        return weigh(*given)

    monkeypatch.setattr(jobs, "EVERY", 0.01)
    monkeypatch.setattr(desk.model, "leave_one_out", weigh_slowly)
    for last in on.on_asked(opened, asked, {}, {}, me):
        if f"{WEIGHING} 3 of 8" in str(last[on.page.chat]):
            seen.set()
    assert seen.is_set()
    assert last[on.page.answers][1].effects


def test_an_answer_that_breaks_off_says_so(on, opened, asked, me, desk, monkeypatch):
    def break_off(*_):
        yield "There is no"
        raise RuntimeError("out of memory")

    monkeypatch.setattr(desk, "answer", break_off)
    steps, last = on.on_asked(opened, asked, {}, {}, me), {}
    with pytest.raises(gr.Error):
        for last in steps:  # noqa: B007
            pass
    assert BROKEN_OFF in str(last[on.page.chat])
    assert WEIGHING not in str(last[on.page.chat])


def test_a_question_that_failed_goes_with_the_next_one(on, opened, me):
    messages = ask(on, "How?", opened, [{"role": "user", "content": "Why?"}], me)
    assert [chat.text_of(message) for message in messages] == ["How?"]


def test_an_answer_streams_and_is_then_weighed(on, opened, me):
    changes = on.on_question("Which?", "fat\nliver", "", opened, (), [], {}, me)
    *steps, last = on.on_asked(opened, changes[on.page.chat], changes[on.page.questions], {}, me)
    assert all(WEIGHING in str(step[on.page.chat][-1]) for step in steps)
    answer = last[on.page.answers][1]
    assert answer.options == ("fat", "liver")
    assert sum(answer.probs) == pytest.approx(1, abs=1e-5)
    assert len(answer.effects) == 6
    blocks = " ".join(last[on.page.chat][-1]["content"])
    assert all(f"{prob:.0%}" in blocks for prob in answer.probs)
    cited = re.findall(r"href='#patch-(\d+)'><span>#(\d+)", blocks)
    assert len(cited) == min(3, sum(effect > 0 for effect in answer.effects))
    assert all(a == b and 1 <= int(a) <= 6 for a, b in cited)
    assert last[on.page.view].props["evidence"]["indices"] == opened.case.selection.indices.tolist()


def test_the_viewer_shows_the_evidence_of_the_last_answer_only(on, opened):
    effects = tuple(float(i) for i in range(6))
    question = [{"role": "user", "content": "Which?"}]
    answered = [*question, {"role": "assistant", "content": "Fat."}]
    answers = {1: Answer("Which?", "Fat.", effects=effects)}

    def shown(messages: list):
        return on.on_answer_shown(opened, messages, answers)[on.page.view].props["evidence"]

    assert shown(answered)["effects"] == list(effects)
    assert [shown(messages) for messages in ([], question, [*answered, *question])] == [None] * 3


@pytest.mark.parametrize("multi_turn", [True, False])
def test_earlier_turns_go_to_the_model_only_if_it_was_trained_on_that(multi_turn, on, opened, me, desk, monkeypatch):
    monkeypatch.setattr(desk.model, "config", dataclasses.replace(desk.config, multi_turn=multi_turn))
    why = Question("Why?", ("fat", "mucin"))
    before = [chat.show_question(why), chat.show_answer("Because.")]
    changes = on.on_question("Which?", "fat\nliver", "", opened, (), before, {0: why}, me)
    put, judge = [], desk.judge

    def note_and_judge(case, messages, text, options, job):
        put.append((messages, options))
        return judge(case, messages, text, options, job)

    monkeypatch.setattr(desk, "judge", note_and_judge)
    list(on.on_asked(opened, changes[on.page.chat], changes[on.page.questions], {}, me))
    earlier = [
        {"role": "user", "content": "Why?\nA. fat\nB. mucin"},
        {"role": "assistant", "content": "Because."},
    ]
    last = {"role": "user", "content": "Which?"}
    assert put == [([*earlier, last] if multi_turn else [last], ("fat", "liver"))]


# ---- what was seen when it was tried as a pathologist would


def test_seen_an_edit_that_was_lost_as_an_answers_last_words_came_twice(on, me):
    """Gradio sends what a generator yielded last once more when it ends."""
    assert list(say_once(on.on_asked)(None, [], {}, {}, me)) == [gr.skip(), gr.skip()]
    assert list(say_once(lambda: iter([{"chat": 1}, {"chat": 2}]))()) == [{"chat": 1}, {"chat": 2}, gr.skip()]


def test_seen_one_question_with_two_verdicts_as_it_was_typed_or_tapped(on, opened, me, monkeypatch):
    kind = Limit("carcinoma", ("carcinoma",), 9, 9, 0.8, 0.7, 0.9, found=0.9)
    monkeypatch.setattr(on, "_limits", lambda _: Limits((kind,), ("fat",)))
    for text, options in (("Does this slide contain carcinoma?", ("Yes", "No")), ("Describe this slide.", ())):
        typed = on.on_question(text, "", "", opened, (), [], {}, me)
        assert typed[on.page.questions][0].options == options
        on.on_clear(me)
    typed = on.on_question("Is there carcinoma?", "yes\nno\nperhaps", "", opened, (), [], {}, me)
    assert typed[on.page.questions][0].options == ("yes", "no", "perhaps")


def test_seen_the_resolution_of_a_slide_that_did_not_come_was_taken_for_the_next_ones(on, me, tmp_path):
    sample = read_gallery()[0]
    chosen = on.on_choose(SimpleNamespace(_data={"name": sample.name}), False, me, gr.Progress())
    assert chosen[on.page.mpp] == ""
    asked = chosen[on.page.asked]
    assert (asked.paths, asked.mpp) == ((sample.address,), sample.mpp)
    Image.new("RGB", (448, 448), "white").save(tmp_path / "a.png")
    [one] = on.on_slide(dataclasses.replace(asked, paths=(str(tmp_path / "a.png"),)), "", None, None, (), me)[
        on.page.coming
    ]
    assert one.slide_mpp == sample.mpp


def test_a_question_typed_while_the_slide_is_analysed_waits_and_is_asked(on, opened, me):
    page = on.page
    waits = on.on_question("Which?", "fat\nliver", "", None, opened.slides, [], {}, me)
    assert AT_READY in str(waits[page.chat])
    assert (waits[page.question], waits[page.given_options]) == ("", "")
    with pytest.raises(gr.Error, match="waits for the slide already"):
        on.on_question("And where?", "", "", None, opened.slides, waits[page.chat], {}, me)
    ready = on.on_ready(opened, waits[page.waiting], (), waits[page.chat], me)
    assert roles(ready[page.chat]) == ["user"]
    assert ready[page.waiting] is None
    *_, last = on.on_asked(opened, ready[page.chat], ready[page.questions], {}, me)
    assert last[page.answers][1].options == ("fat", "liver")


def test_a_question_that_waited_for_a_slide_that_failed_is_back_in_its_box(on, opened, me):
    page = on.page
    waits = on.on_question("Which?", "fat\nliver", "", None, opened.slides, [], {}, me)
    back = on.on_ready(None, waits[page.waiting], None, waits[page.chat], me)
    assert (back[page.question], back[page.given_options]) == ("Which?", "fat\nliver")
    assert back[page.chat] == []


def test_after_a_failed_analysis_the_header_says_so(on, me, desk, monkeypatch, tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    shown = show(on, tmp_path / "a.png", "0.5", me)

    def fail(*_given, **_named):
        raise ValueError("there is no tissue on it.")

    monkeypatch.setattr(desk, "analyse", fail)
    *_, told = on.on_slide_shown(shown[on.page.coming], None, [], me)
    assert f"{shown[on.page.coming][0].props['name']} · not analysed" in told[on.page.facts]
    assert "no tissue" in told[on.page.view].props["work"]["error"]
    assert told[on.page.coming] is None, "questions do not wait for it"


def test_one_option_is_no_choice(on, opened, me):
    for given in ("fat", "fat\nFat "):
        with pytest.raises(gr.Error, match="at least two different options"):
            ask(on, "Which?", opened, [], me, given)


@pytest.fixture
def limited(opened):
    """The slide of a model that says what it was validated on."""
    kinds = (
        Limit("carcinoma", ("carcinoma",), 22, 19, 0.77, 0.58, 0.95),
        Limit("organ", (r"\borgan\b",), 21, 18, 0.44, 0.24, 0.68, least=0.99),
    )
    return one_slide("token", dataclasses.replace(opened.case, limits=Limits(kinds, ("fat",))))


def test_what_the_model_was_not_trained_for_is_refused_with_what_it_can_answer(on, limited, me, desk):
    refused = on.on_question("What grade is it?", "", "", limited, (), [], {}, me)[on.page.chat]
    assert "cannot answer that" in chat.text_of(refused[-1])
    assert "Does this slide contain carcinoma?" in str(refused[-1])
    assert "Ask in English" in str(refused[-1]), "no language of its own is looked for"
    assert not desk.turns.busy(str(me.session_hash))
    with pytest.raises(gr.Error, match="was refused"):
        on.on_retry(limited, refused, me)
    asked = on.on_suggested(SimpleNamespace(_data={"number": 0}), limited, refused, {}, "", me)
    assert chat.text_of(asked[on.page.chat][-1]).startswith("Does this slide contain carcinoma?")


def test_seen_boxes_emptied_by_a_refusal_of_which_nothing_was_left_in_report_and_log(on, limited, me, desk):
    page = on.page
    changes = on.on_question("What Gleason grade?", "3\n4", "It is 4.", limited, (), [], {}, me)
    assert (changes[page.given_options], changes[page.impression]) == ("3\n4", "It is 4.")
    on.on_talked(limited, None, changes[page.chat], changes[page.questions], {})
    report = on._write_download(limited, limited.case, [], me.session_hash, "report.html").read_text()
    for part in ("What Gleason grade?", "Refused, not put to the model: This model cannot answer that.", "It is 4."):
        assert part in report
    log = (desk.files_of(me.session_hash) / "log.jsonl").read_text().splitlines()
    event = [told for told in map(json.loads, log) if told["event"] == "refused"][-1]
    assert (event["question"], event["why"]) == ("What Gleason grade?", "This model cannot answer that.")
    kept = on._write_download(limited, limited.case, [], me.session_hash, "selection.json")
    assert read_selection(kept).questions == (), "which a replay does not put either"


def test_what_was_put_to_the_model_and_what_it_contradicts_stand_under_an_answer(opened):
    put = Answer("Is there a neoplasm in this slide?", "No", ("Yes", "No"), (0.3, 0.7), asked="where is the tumour?")
    shown = str(show_told(put, opened.case, [Answer("Describe the slide", "A carcinoma.")]))
    assert "Put to the model as: Is there a neoplasm in this slide?" in shown
    assert "These answers contradict each other" in shown
    assert "contradict" not in str(show_told(put, opened.case, [Answer("Describe the slide", "Fat.")]))


def test_seen_a_guess_of_cancer_above_pictures_that_read_as_proof(limited):
    case, places = limited.case, len(limited.case.selection.indices)
    guess = Answer("Describe it.", "Carcinoma.", effects=(5.0,) * places, without_all=5.0, limit=UNVALIDATED)
    said, block = show_told(guess, case)["content"]
    assert said == "A guess, no finding: Carcinoma."
    assert block.startswith(f"<p class='unvalidated'>{UNVALIDATED}</p>"), "before chip and pictures, and not bold"
    assert block.count(UNVALIDATED) == 1
    assert "depends on the patches: strongly" in block
    assert "It tells nothing about the answer being right" in block
    unsure = dataclasses.replace(guess, without_all=0.0, effects=(0.0,) * places)
    assert show_told(unsure, case)["content"][0] == "No answer: a guess, and the slide does not decide it"
    assert "What the model wrote, which is no finding: Carcinoma." in str(show_told(unsure, case))


def test_where_is_the_tumour_is_answered_by_pointing(on, limited, me):
    page = on.page
    asked = on.on_question("Where is the carcinoma?", "", "", limited, (), [], {}, me)
    assert asked[page.questions][0].put == "Does this slide contain carcinoma?"
    assert chat.text_of(asked[page.chat][0]) == "Where is the carcinoma?"
    *_, last = on.on_asked(limited, asked[page.chat], asked[page.questions], {}, me)
    answer, said = last[page.answers][1], chat.text_of(last[page.chat][-1])
    if answer.probs[0] > 0.5 and answer.rests != "not":
        assert said.startswith(("Here:", "Not sure (Yes:"))
        assert last[page.view].props["focus"]
    elif answer.rests == "not":
        assert "the slide does not decide it" in said.lower()
    else:
        assert said.startswith("The model does not find carcinoma")


@pytest.mark.parametrize(
    ("question", "given", "begin"),
    [
        ("Which organ is this?", "skin\ncolon", "Not sure"),
        ("Which organ is this?", "", "Not sure"),
        ("Does this slide contain carcinoma?", "Yes\nNo", "Not "),
        ("Describe this slide.", "", "Not "),
        ("Where is the carcinoma?", "", ("Not ", "The model does not find")),
    ],
)
def test_seen_a_bare_answer_that_was_later_taken_back(question, given, begin, on, limited, me):
    """Whatever is shown before the evidence is weighed says that it is not, or what else is to be doubted of it."""
    changes = on.on_question(question, given, "", limited, (), [], {}, me)
    *steps, last = on.on_asked(limited, changes[on.page.chat], changes[on.page.questions], {}, me)
    assert steps
    assert all(chat.text_of(step[on.page.chat][-1]).startswith(begin) for step in steps)
    assert not last[on.page.answers][1].unweighed


def test_seen_pictures_of_an_answer_that_does_not_rest_on_the_slide(opened):
    """Seen: a bold No, five pictures, and below them that it rests on the slide: not."""
    selection, effects = opened.case.selection, (0.1,) * len(opened.case.selection.indices)
    answer = Answer("Is it malignant?", "No", effects=effects, without_all=0.1)
    shown = chat.show_evidence(answer, selection)[0]
    assert "depends on the patches: not" in shown
    assert "href" not in shown
    assert "Without all 6 patches it would be 1.11 times less likely." in shown
    assert evidence_props(selection, answer) is None, "nor does the viewer show any"
    rests = dataclasses.replace(answer, without_all=3.0)
    assert "href='#patch-" in chat.show_evidence(rests, selection)[0]
    assert evidence_props(selection, rests)


def test_an_organ_is_never_told_for_certain_below_the_models_own_threshold(on, limited, me):
    changes = on.on_question("Which organ is this?", "skin\ncolon", "", limited, (), [], {}, me)
    *_, last = on.on_asked(limited, changes[on.page.chat], changes[on.page.questions], {}, me)
    assert re.fullmatch(r"Not sure: (skin or colon|colon or skin)", chat.text_of(last[on.page.chat][-1]))


def test_a_what_if_is_a_state_that_one_button_leaves(on, opened, me, desk, monkeypatch):
    monkeypatch.setattr(desk.slides, "holds", lambda _token: True)
    page, picks = on.page, {"pinned": [0], "dropped": []}
    changes = on.on_question("Which?", "fat\nliver", "", opened, (), [], {}, me)
    *_, last = on.on_asked(opened, changes[page.chat], changes[page.questions], {}, me)
    before = (opened, last[page.chat], changes[page.questions], last[page.answers])
    first, *_, done = on.on_ask_again(*before, None, 8, "random", picks, me)
    mine, aside = first[page.opened], first[page.aside]
    assert first[page.view].props["whatif"] == "8 random patches, 1 pinned"
    assert len(mine.case.selection.indices) == 8
    assert len(done[page.answers][1].effects) == 8
    # an ordinary question is answered from what the boxes show
    on.on_answered(me)
    asked = on.on_question("How?", "", "", mine, (), done[page.chat], first[page.questions], me)
    *_, told = on.on_asked(mine, asked[page.chat], asked[page.questions], done[page.answers], me)
    assert len(told[page.answers][3].effects) == 8
    left = on.on_leave(mine, told[page.chat], told[page.answers], aside, me)
    assert tuple(left[part] for part in (page.opened, page.chat, page.questions, page.answers)) == before
    assert left[page.view].props["whatif"] == ""
    assert left[page.view].props["kept"] == bag_props(opened.case.bag, opened.case.selection)["kept"]
    assert left[page.view].props["evidence"]["effects"]
    assert (left[page.picks], left[page.compare]) == ({"pinned": [], "dropped": []}, "")


def test_seen_a_doubt_that_was_hidden_behind_a_number():
    case: Any = SimpleNamespace(doubts=("First.", "Second."), bag=SimpleNamespace(note=""))
    told = tell_doubts(case)
    assert told.startswith("<details open><summary>⚠ First.")
    assert "<p>Second.</p>" in told


def test_a_what_if_can_be_left_while_it_is_answered(on, opened, asked, me):
    page = on.page
    *_, last = on.on_asked(opened, asked, {}, {}, me)
    before = (opened, last[page.chat], {}, last[page.answers])
    steps = on.on_ask_again(*before, None, 8, "random", {"pinned": [], "dropped": []}, me)
    first, _ = next(steps), next(steps)
    on.on_question("How?", "", "", first[page.opened], (), first[page.chat], {}, me)
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(on.on_leave, first[page.opened], first[page.chat], {}, first[page.aside], me)
        with pytest.raises(TimeoutError):  # what was told of it is not on its way yet, and would come after
            leaving.result(0.3)
        assert list(steps) == [gr.skip()], "Gradio sends what was yielded last once more"
        left = leaving.result(4)
    assert left[page.chat] == last[page.chat]
    assert left[page.question].value == "How?", "which waited, is back in its box"
    assert on.on_answered(me)[page.question].submit_btn


def test_the_path_of_the_slide_before_does_not_stay_in_its_box(on, me, tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    assert show(on, tmp_path / "a.png", "0.5", me)[on.page.typed_path] == ""


def test_the_name_of_a_case_goes_into_its_report_and_the_sessions_log_alone(
    on, opened, me, desk, tmp_path, monkeypatch
):
    """Never into a file's name or the server's log: it may name a patient."""
    monkeypatch.setattr(desk, "log", tmp_path / "server.jsonl")
    on.on_called("  Case 7,\n polyp " + 100 * "x", opened, None, me)
    assert opened.called == ("Case 7, polyp " + 100 * "x")[:80]
    opened.case.write(tmp_path, names=["report.html", "selection.json"], called=opened.called)
    assert f"<h1>{opened.called} (slide 1)</h1>" in (tmp_path / "report.html").read_text()
    assert "Case 7" not in (tmp_path / "selection.json").read_text()
    assert "Case 7" in (desk.files_of(me.session_hash) / "log.jsonl").read_text()
    assert not desk.log.exists()
    assert not [path for path in desk.folder.rglob("*") if "Case" in path.name]
    on.on_called("", opened, None, me)


def test_the_resolution_typed_for_one_slide_is_not_the_next_ones(on, me, tmp_path):
    """Seen when it was tried: after Cancel the next slide was read at the resolution typed for the one before."""
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    assert on.on_slide(Asked((str(tmp_path / "a.png"),)), "0.96", None, None, None, me)[on.page.mpp] == ""


def test_picks_can_be_cleared(on):
    assert on.on_unpick()[on.page.picks] == {"pinned": [], "dropped": []}


def test_the_likes_of_a_patch_are_those_that_look_most_like_it(on, opened):
    members = on.on_likes(SimpleNamespace(_data={"index": 3}), opened)[on.page.view].props["members"]
    features = opened.case.bag.features.float()
    directions = torch.nn.functional.normalize(features - features.mean(0), dim=1)
    near = directions @ directions[3]
    assert 3 not in members["indices"]
    assert near[members["indices"][0]] == near[torch.arange(30) != 3].max()


# ---- whose caller has gone


def test_an_answer_ends_when_its_caller_has_gone(on, opened, asked, me, desk):
    steps = on.on_asked(opened, asked, {}, {}, me)
    next(steps)
    desk.forget(me.session_hash)
    assert list(steps) == [{on.page.chat: [], on.page.answers: {}}]
    assert not desk.folder_of(me.session_hash, "-files").exists(), "nothing is written down of who has gone"


def test_evidence_ends_when_its_caller_has_gone_and_not_when_another_has(opened, me, visitor, desk, monkeypatch):
    weigh, leaving = desk.model.leave_one_out, visitor()

    def leave_at_the_first_pass(selection, messages, answer, options, progress, groups):
        def look(*count):
            desk.leave(leaving.session_hash)
            progress(*count)

        return weigh(selection, messages, answer, options, look, groups)

    monkeypatch.setattr(desk.model, "leave_one_out", leave_at_the_first_pass)
    asked = (opened.case, [{"role": "user", "content": "Which?"}])
    with desk.jobs.run(me.session_hash, "question") as job:
        assert desk.weigh(*asked, Answer("Which?", "fat"), job.name).effects
        leaving = me
        with pytest.raises(Halted):
            desk.weigh(*asked, Answer("Which?", "fat"), job.name)


def test_an_analysis_ends_when_its_caller_has_gone(desk, me, tmp_path, monkeypatch):
    phantom.write_phantom(tmp_path / "phantom.tiff", seed=3, size=1024)
    path = str(tmp_path / "phantom.tiff")
    token, batches, encoder = desk.slides.add(path, me.session_hash), [], desk.load()[1]

    def leave_at_the_first_batch(pixels):
        batches.append(len(pixels))
        desk.leave(me.session_hash)
        return encoder(pixels)

    monkeypatch.setattr(desk, "_loaded", (desk.model, Encoder(encoder, leave_at_the_first_batch)))
    with desk.jobs.run(me.session_hash, "slide") as job, pytest.raises(Halted):
        desk.analyse(CaseSlide(token, path, 0.5), job=job.name)
    assert len(batches) == 1


class Encoder:
    """A patch encoder that tells of every batch."""

    def __init__(self, encoder, call):
        self.name, self.dim, self.call = encoder.name, encoder.dim, call

    def __call__(self, pixels):
        return self.call(pixels)


def test_what_is_encoded_so_far_can_be_seen(on, desk, me, tmp_path, monkeypatch):
    phantom.write_phantom(tmp_path / "phantom.tiff", seed=3, size=4096)
    path, encoder, seen = str(tmp_path / "phantom.tiff"), desk.load()[1], []
    token = desk.slides.add(path, me.session_hash)

    def look(pixels):
        job = desk.jobs.of(me.session_hash, "slide")
        seen.append((job.phase, job.place, job.done, job.total, len(desk.provisional(job))))
        return encoder(pixels)

    monkeypatch.setattr(desk, "_loaded", (desk.model, Encoder(encoder, look)))
    *working, last = on.on_slide_shown((CaseSlide(token, path, props={"name": "phantom 3"}),), None, [], me)
    assert working[0][on.page.view].props["work"]["phase"] in ("waiting", "loading the model", "finding tissue")
    assert last[on.page.view].props["work"] is None
    total = len(last[on.page.opened].case.bag.coords)
    assert seen[0] == ("encoding", 0, 0, total, 0)
    assert seen[1] == ("encoding", 0, 16, total, 6)


def test_a_slide_that_is_cancelled_while_it_is_opened_is_let_go_at_once(desk, me, tmp_path):
    phantom.write_phantom(tmp_path / "phantom.tiff", seed=3, size=1024)
    for delay in (0.05, 0.2):
        with desk.jobs.run(me.session_hash, "slide") as job:
            threading.Timer(delay, desk.cancel, [me.session_hash]).start()
            with pytest.raises(ValueError, match="closed"):
                open_again_and_again(desk, tmp_path / "phantom.tiff", job)


def open_again_and_again(desk, path, job):
    while True:
        desk.open_slide(path, job=job).thumbnail(512)


# ---- a slide


def test_the_slide_that_was_asked_for_last_is_opened(on, me, visitor, monkeypatch, tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "quick.png")
    quick, other, found = str(tmp_path / "quick.png"), visitor(), []

    def take_long(_name: str) -> str:  # meanwhile
        found.append(on.on_typed_path(quick, False, me, gr.Progress())[on.page.asked].paths[0])
        on.on_typed_path(quick, False, other, gr.Progress())
        return "phantom.tiff"

    monkeypatch.setattr(handlers, "open_example", take_long)
    with pytest.raises(gr.Error) as unseen:
        on.on_choose(PHANTOM, False, me, gr.Progress())
    assert not unseen.value.visible
    assert found == [quick]

    def fail_meanwhile(_name: str) -> str:
        with pytest.raises(gr.Error, match="no file at the path"):
            on.on_typed_path(quick + ".svs", False, me, gr.Progress())
        return "phantom.tiff"

    monkeypatch.setattr(handlers, "open_example", fail_meanwhile)
    opened = on.on_choose(PHANTOM, False, me, gr.Progress())
    assert opened == {on.page.asked: Asked(("phantom.tiff",))}, "what could not be opened is in nobody's way"


def test_a_slide_that_was_replaced_while_it_was_analysed_is_not_shown(on, opened, desk, me, monkeypatch):
    monkeypatch.setattr(desk, "analyse", lambda *_given, **_named: one_slide("a token of before", opened.case))
    with pytest.raises(gr.Error) as unseen:
        list(on.on_slide_shown((CaseSlide("a token of before", "a.svs", props={"name": "a"}),), None, [], me))
    assert not unseen.value.visible


def test_the_features_of_an_example_are_kept_and_nobody_elses(desk, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SPARSEWSI_CACHE", "~/cache")
    example, theirs = (str(tmp_path / name) for name in ("cache/phantom.tiff", "theirs.tiff"))
    phantom.write_phantom(example, seed=3, size=1024)
    shutil.copy(example, theirs)
    first = desk.analyse(CaseSlide("a", example)).case
    desk.analyse(CaseSlide("b", theirs))
    [kept] = tmp_path.rglob("*.safetensors")
    assert kept.parent == tmp_path / "cache", "the home folder is written as ~"
    assert torch.equal(load_bag(kept).features, first.bag.features)
    assert torch.equal(desk.analyse(CaseSlide("c", example)).case.selection.indices, first.selection.indices)


def test_downloads_are_written_when_they_are_asked_for(on, opened, desk, me, tmp_path):
    path = tmp_path / "Mustermann.png"
    Image.fromarray(np.full((1120, 1344, 3), 200, np.uint8)).save(path)
    shown = show(on, path, "0.5", me)
    token = shown[on.page.coming][0].token
    mine = one_slide(token, dataclasses.replace(opened.case, path=path, slide_mpp=0.5))
    on.on_analysed(mine, {1: Answer("Which <b>?", "fat", ("fat", "liver"), (0.5, 0.5))}, me)
    texts = {name: desk.slides.download(token, name).read_bytes().decode(errors="ignore") for name, _ in file_props()}
    assert all("Mustermann" not in text for text in texts.values())
    assert "research use only, not for diagnosis" in texts["report.html"]
    assert json.loads(texts["log.jsonl"].splitlines()[0])["event"] == "open"
    on.on_unload(me)
    assert not list(desk.folder.glob(f"{desk.folder_of(me.session_hash).name}*"))
    with pytest.raises(KeyError):
        desk.slides.download(token, "report.html")


# ---- what is too much


def test_a_sessions_log_is_bounded_and_nothing_is_written_of_who_has_gone(on, desk, me, visitor, tmp_path, monkeypatch):
    monkeypatch.setattr(desk, "log", tmp_path / "log.jsonl")
    monkeypatch.setattr(desk_module, "MOST_LOGGED", 20_000)
    other = visitor()
    views = [{"x": "\u2028\ud800" * 100}] * 5
    for _ in range(50):
        on.on_journal(SimpleNamespace(_data={"views": views}), me)
    on.on_journal(SimpleNamespace(_data={"views": views}), other)
    logs = [desk.folder_of(who.session_hash, "-files") / "log.jsonl" for who in (me, other)]
    assert 20_000 <= logs[0].stat().st_size < 30_000
    assert logs[1].stat().st_size < 10_000
    assert {json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()} == {"look"}
    before = (tmp_path / "log.jsonl").stat().st_size
    monkeypatch.setattr(desk_module, "MOST_LOGGED_IN_ALL", 10)
    on.on_journal(SimpleNamespace(_data={"views": []}), other)
    desk.forget(me.session_hash)
    on.on_journal(SimpleNamespace(_data={"views": []}), me)
    assert (tmp_path / "log.jsonl").stat().st_size == before
    assert not logs[0].parent.exists()


NO_PICKS = {"pinned": [], "dropped": []}


@pytest.mark.parametrize("told", [{"pinned": []}, {"pinned": 3}, []])
def test_pins_that_no_viewer_tells_are_refused(on, opened, told):
    with pytest.raises(gr.Error):
        on.on_picks(SimpleNamespace(_data=told), opened, NO_PICKS)


def test_seen_pins_that_were_too_many_and_stayed_on_the_slide(on, opened):
    before = {"pinned": [3], "dropped": [4]}
    changes = on.on_picks(SimpleNamespace(_data={"pinned": list(range(30)) * 9, "dropped": []}), opened, before)
    assert on.page.picks not in changes
    told = changes[on.page.view].props["picks"]
    assert (told["pinned"], told["dropped"], told["refused"]) == ([3], [4], True)


def test_pins_of_patches_that_are_not_there_are_left_out(on, opened):
    told = {"pinned": [0, 29, 30, -1, 10**30, "3", None, 1.5], "dropped": [True]}
    picks = on.on_picks(SimpleNamespace(_data=told), opened, NO_PICKS)[on.page.picks]
    assert picks["pinned"] == [0, 29]


@pytest.mark.parametrize("resolution", ["1e-5", "inf", "nan", "1e400", "-1", "320", "0.25; rm", "9" * 400])
def test_a_resolution_that_no_scan_has_is_a_sentence(on, me, tmp_path, resolution):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "slide.png")
    with pytest.raises(gr.Error, match=r"um/px|µm/px") as refused:
        show(on, tmp_path / "slide.png", resolution, me)
    assert "at fault" not in refused.value.message


@pytest.mark.parametrize(("question", "options"), [("x" * 1001, []), ("Which?", ["y" * 600, "z" * 600])])
def test_the_evidence_of_what_is_long_is_not_weighed_and_that_is_said(opened, desk, me, question, options):
    with desk.jobs.run(me.session_hash, "question") as job:
        messages = [{"role": "user", "content": question}]
        answer = desk.weigh(opened.case, messages, Answer(question, "fat", tuple(options)), job.name)
    assert not answer.effects
    assert "not weighed" in answer.unweighed
    assert "not weighed" in " ".join(chat.show_evidence(answer, opened.case.selection))


@pytest.mark.parametrize("k", [0, 7, 257, 10**9])
def test_a_what_if_takes_as_many_patches_as_the_slider(on, opened, asked, me, k):
    *_, last = on.on_asked(opened, asked, {}, {}, me)
    on.on_answered(me)
    before = (opened, last[on.page.chat], {}, last[on.page.answers], None)
    with pytest.raises(gr.Error, match="takes 8 to 256 patches"):
        list(on.on_ask_again(*before, k, "random", {"pinned": [], "dropped": []}, me))


@pytest.mark.parametrize("text", ["x" * 2001, "Which \ud800?", "y" * 100_000])
def test_a_question_that_comes_back_from_the_browser_longer_is_not_asked(on, opened, me, text):
    chat_now = [{"role": "user", "content": text}]
    on.on_retry(opened, chat_now, me)
    with pytest.raises(gr.Error, match=r"characters|half a character"):
        list(on.on_asked(opened, chat_now, {}, {}, me))
    assert ask(on, "How?", opened, [], me), "the next one is"


def test_features_go_with_their_session_and_the_oldest_when_they_are_too_many(
    on, opened, desk, me, visitor, monkeypatch
):
    kept = []

    def keep(who) -> bool:
        features = opened.case.bag.features.clone()  # a slide of its own
        case = dataclasses.replace(opened.case, bag=dataclasses.replace(opened.case.bag, features=features))
        kept.append(one_slide(desk.slides.add("a.svs", who.session_hash), case))
        return desk.keep(kept[-1])

    assert all(keep(who) for who in (me, visitor(), visitor()))
    desk.arrive(me.session_hash)
    monkeypatch.setattr(desk_module, "MOST_FEATURES", 2 * opened.bytes)
    keep(visitor())
    assert [one._case is not None for one in kept] == [True, False, False, True], "who has no page open goes first"
    with pytest.raises(ValueError, match="closed; open it again"):
        _ = kept[1].case
    desk.forget(me.session_hash)
    assert kept[0]._case is None
    assert not desk.keep(one_slide("of a session that has ended", opened.case))


def test_a_slide_of_more_patches_than_the_page_encodes_is_refused_before_any_is(desk, me, tmp_path, monkeypatch):
    phantom.write_phantom(tmp_path / "phantom.tiff", seed=3, size=1024)
    monkeypatch.setattr(desk_module, "MOST_PATCHES", 3)
    with desk.jobs.run(me.session_hash, "slide") as job, pytest.raises(ValueError, match="sparsewsi extract"):
        desk.analyse(CaseSlide("token", str(tmp_path / "phantom.tiff")), job=job.name)
    assert job.phase == "finding tissue"


def test_a_strangers_slide_has_no_ground_truth_whatever_lies_beside_it(on, desk, me, tmp_path):
    folder = desk.folder_of(me.session_hash)
    folder.mkdir()
    phantom.write_phantom(folder / "slide.tiff", seed=3, size=1024)
    assert phantom.truth_path(folder / "slide.tiff").is_file()
    shown = show(on, folder / "slide.tiff", "", me)
    assert "phantom" not in shown[on.page.view].props["slides"][0]["name"]
    *_, last = on.on_slide_shown(shown[on.page.coming], None, [], me)
    assert last[on.page.secret].visible is False


def test_seen_two_sides_that_differ_in_their_doubts_alone_called_different():
    left, right = ("32", "A guess: fat", []), ("8", "The slide does not decide it; a guess: fat", [])
    assert chat.text_of(chat.show_both(left, right, agree=True)) == "Both answer the same, with other doubts"
    assert chat.text_of(chat.show_both(left, right)) == "They differ"


# ---- seen by a consultant pathologist


def test_seen_picks_that_were_cleared_while_another_slide_opened_and_the_program_blamed_itself(on, opened):
    closed = one_slide("token", opened.case)
    closed.close()
    for gone in (None, closed):
        changes = on.on_picks(SimpleNamespace(_data=NO_PICKS), gone, NO_PICKS)
        assert changes[on.page.picks] == {"pinned": [], "dropped": []}


def test_seen_a_traceback_of_a_slide_that_was_closed_as_its_analysis_ended(on, opened, me):
    closed = one_slide("token", opened.case)
    closed.close()
    assert on.on_analysed(closed, {}, me) is None
    assert on.on_case(closed) == gr.skip()
    assert on.on_map_wanted(closed, me) == gr.skip()
    shown = on.on_answer_shown(closed, [{}, {}], {1: Answer("Which?", "fat", effects=(1.0,))})
    assert shown[on.page.view].props["evidence"] is None


def test_a_map_that_waits_for_the_compiler_keeps_nobody_from_the_machine(on, opened, desk, visitor, monkeypatch):
    first, second = visitor(), visitor()
    mine, drawn, begun, compiled = one_slide("token", opened.case), [], threading.Event(), threading.Event()
    draw, drawn_at_once = umap.map_features, []

    def compile_slowly(_pause) -> None:
        begun.set()
        assert compiled.wait(30)

    def note(*given, **named):
        drawn_at_once.append(not compiled.is_set())
        return draw(*given, **named)

    monkeypatch.setattr(umap, "compile_ahead", compile_slowly)
    monkeypatch.setattr(umap, "map_features", note)
    warming = threading.Thread(target=desk.warm_up)
    warming.start()
    assert begun.wait(30)
    mapping = threading.Thread(target=lambda: drawn.append(on.on_map_wanted(mine, first)))
    mapping.start()
    mapping.join(2)
    with desk.jobs.run(second.session_hash, "question") as job, desk.jobs.step(job):
        assert not drawn_at_once
    compiled.set()
    mapping.join(60)
    warming.join(30)
    assert drawn[0][on.page.view].props["map"]
    assert drawn_at_once == [False]


def test_the_compiler_of_the_map_lets_a_question_go_first(desk, me, monkeypatch):
    passes, asked, waited = [], threading.Event(), []

    def compile_in_passes(pause) -> None:
        for number in range(3):
            pause()
            passes.append(number)
            asked.wait(30)

    monkeypatch.setattr(umap, "compile_ahead", compile_in_passes)
    warming = threading.Thread(target=desk.warm_up)
    warming.start()
    assert soon(lambda: passes == [0])
    with desk.jobs.run(me.session_hash, "question"):
        asked.set()
        warming.join(0.5)
        waited.extend(passes)
    warming.join(30)
    assert waited == [0]
    assert passes == [0, 1, 2]


def test_seen_a_focus_that_opened_on_blank_glass_and_not_where_its_weight_lies(opened):
    case, ranks = opened.case, opened.case.selection.ranks.tolist()
    first, last = min(ranks), max(ranks)
    effects = tuple(2.0 if rank == last else 0.0 for rank in ranks)
    focus = FocusEffect("A", tuple(sorted(ranks)), 2.0)
    answer = Answer("Where?", "Yes", ("Yes", "No"), (0.9, 0.1), effects, foci=(focus,), without_all=3.0, asked="Where?")
    shown = chat.show_evidence(answer, case.selection)[0]
    assert f"#focus-A-{last}" in shown
    assert f"#focus-A-{first}'" not in shown
    where = point(answer, case)
    assert where is not None
    assert (where["name"], where["rank"]) == ("A", last)


def test_seen_a_what_if_of_the_same_patches_and_of_which_question_nobody_said(on, opened, me, desk, monkeypatch):
    monkeypatch.setattr(desk.slides, "holds", lambda _token: True)
    mine, page = one_slide("token", opened.case.choose(desk.model, 8)), on.page
    asked = on.on_question("Which tissue?", "fat\nliver", "", mine, (), [], {}, me)
    *_, last = on.on_asked(mine, asked[page.chat], asked[page.questions], {}, me)
    on.on_answered(me)
    told = (mine, last[page.chat], asked[page.questions], last[page.answers], None)
    (only,) = on.on_ask_again(*told, 8, "learned", {"pinned": [], "dropped": []}, me)
    assert set(only) == {page.compare}
    assert "Nothing changed: these are the same 8 patches" in only[page.compare]
    on.on_answered(me)
    with pytest.raises(gr.Error, match="Both would be the same 8 patches"):
        on.on_both(*told, 8, "learned", {"pinned": [], "dropped": []}, me)
    first, *_ = on.on_ask_again(*told, 16, "learned", {"pinned": [], "dropped": []}, me)
    assert "asked again: <b>Which tissue?</b>" in first[page.compare]
