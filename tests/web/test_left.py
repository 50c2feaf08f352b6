"""A page that is loaded anew: what it showed comes back where that is safe; what is lost is told."""

from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
import pytest

from sparsewsi import phantom
from sparsewsi.web import desk as desk_module
from sparsewsi.web import handlers as told
from sparsewsi.web.chat import Question, show_answer, show_question
from sparsewsi.web.desk import Desk, Opened
from sparsewsi.web.handlers import Asked, Handlers
from sparsewsi.web.layout import lay_out


@pytest.fixture(scope="module")
def at_home(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Handlers:
    """The handlers of a page on this machine alone, where slides are opened by path."""
    desk = Desk(str(tiny_model), tmp_path_factory.mktemp("home"), allow_paths=True)
    return Handlers(desk, lay_out(desk)[1])


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("slides")
    paths = [folder / f"Mustermann {seed}.tiff" for seed in (7, 8)]
    for path, seed in zip(paths, (7, 8)):
        phantom.write_phantom(path, seed=seed, size=1024)
    return tuple(map(str, paths))


@pytest.fixture
def come(at_home: Handlers) -> Iterator[Callable[[str], gr.Request]]:
    """Who opens the page, by a session's name and, in its query, what the address says."""
    names: list[str] = []

    def request(name: str, **query: str) -> gr.Request:
        names.append(name)
        at_home.desk.arrive(name)
        return gr.Request(session_hash=name, query_params=query)

    yield request
    for name in names:
        at_home.desk.forget(name)


def open_case(on: Handlers, me: gr.Request, asked: Asked) -> Opened:
    shown = on.on_slide(asked, "", None, None, None, me)
    *_, last = on.on_slide_shown(shown[on.page.coming], None, [], me)
    return last[on.page.opened]


def talk(on: Handlers, case: Opened, me: gr.Request) -> tuple:
    """One question that was asked about a case, as the page holds it."""
    question = Question("Which tissue?", ("fat", "mucin"))
    changes = on._ask(case, [], question, {}, me)
    chat, questions = changes[on.page.chat], changes[on.page.questions]
    *_, last = on.on_asked(case, chat, questions, {}, me)
    on.on_talked(case, None, last[on.page.chat], questions, last[on.page.answers])
    return last[on.page.chat], questions, last[on.page.answers]


@pytest.mark.parametrize("many", [1, 2])
def test_seen_a_reload_forgot_a_slide_opened_by_path_and_the_chat(many, at_home, slides, come, monkeypatch):
    on, desk, page = at_home, at_home.desk, at_home.page
    case = open_case(on, come("before"), Asked(slides[:many]))
    before, token = talk(on, case, come("before")), case.token
    kept = case.case.selection.indices.tolist()
    desk.forget("before")
    assert case.closed
    (asked,) = on.on_load(token, come("after"))
    monkeypatch.setattr(desk, "_encode", None)  # its patches are not encoded again
    again = open_case(on, come("after"), asked[page.asked])
    assert again.case.selection.indices.tolist() == kept
    back = on.on_back(asked[page.asked], again, [], come("after"))
    assert (back[page.chat], back[page.questions], back[page.answers]) == before
    assert again.talk == before, "a second reload finds it, too"


def test_seen_a_reload_that_lost_the_question_that_was_being_answered(at_home, slides, come):
    on, desk, page = at_home, at_home.desk, at_home.page
    case, me = open_case(on, come("before"), Asked(slides[:1])), come("before")
    asked = on.on_question("Which?", "fat\nliver", "fat, I think", case, (), [], {}, me)
    steps = on.on_asked(case, asked[page.chat], asked[page.questions], {}, me)
    next(steps)
    desk.forget("before")
    steps.close()
    (reopened,) = on.on_load(case.token, come("after"))
    again = open_case(on, come("after"), reopened[page.asked])
    back = on.on_back(reopened[page.asked], again, [], come("after"))
    assert back[page.chat] == []
    assert (back[page.question], back[page.given_options], back[page.impression]) == (
        "Which?",
        "fat\nliver",
        "fat, I think",
    )


def test_seen_a_reload_that_lost_the_question_that_waited_for_the_slide(at_home, slides, come):
    on, page, me = at_home, at_home.page, come("early")
    shown = on.on_slide(Asked(slides[:1]), "", None, None, None, me)
    (coming,) = shown[page.coming]
    on.on_question("Which?", "fat\nliver", "fat, I think", None, shown[page.coming], [], {}, me)
    on.desk.forget("early")
    changes = said(on, coming.token, come("early again"))
    boxes = (page.question, page.given_options, page.impression)
    assert tuple(changes[box] for box in boxes) == ("Which?", "fat\nliver", "fat, I think")
    assert not on.desk.turns._early
    shown = on.on_slide(Asked(slides[:1]), "", None, None, None, me)
    on.on_question("Which?", "fat\nliver", "fat, I think", None, shown[page.coming], [], {}, me)
    on.desk.forget("early")
    named = next(on.on_load(shown[page.coming][0].token, come("named", slide="phantom")))
    assert tuple(named[box] for box in boxes) == ("Which?", "fat\nliver", "fat, I think")
    chat = on.on_question("Which?", "", "", None, shown[page.coming], [], {}, me)[page.chat]
    on.on_ready(None, Question("Which?"), None, chat, me)
    assert on.desk.turns.unanswered("early") is None, "it is in its box, and is put there once"


def test_a_reload_before_the_server_heard_of_the_old_page_ends_that(at_home, slides, come):
    case = open_case(at_home, come("slow"), Asked(slides[:1]))
    (asked,) = at_home.on_load(case.token, come("quick"))
    assert asked[at_home.page.asked].paths == slides[:1]
    assert case.closed


def said(on: Handlers, token: str, request: gr.Request) -> dict:
    """What the new page says of what did not come back."""
    steps = on.on_load(token, request)
    changes = next(steps)
    with pytest.raises(gr.Error):  # that nobody sees
        next(steps)
    return changes


def test_a_reload_says_that_an_upload_is_deleted(at_home, slides, come):
    on, page, me = at_home, at_home.page, come("uploader")
    upload = on.desk.uploads / "digest" / "Mustermann.tiff"
    upload.parent.mkdir(parents=True)
    upload.write_bytes(Path(slides[0]).read_bytes())
    case = open_case(on, me, on.on_upload([str(upload)], False, me)[page.asked])
    on.desk.forget("uploader")
    changes = said(on, case.token, come("again"))
    assert told.DELETED in changes[page.lost]
    assert not changes[page.reopen].visible, "nothing is left to be opened"


def test_a_reload_ends_an_analysis_and_offers_the_slide_again(at_home, slides, come):
    on, page = at_home, at_home.page
    shown = on.on_slide(Asked(slides[:1]), "", None, None, None, come("hasty"))
    (coming,) = shown[page.coming]
    on.desk.forget("hasty")
    changes = said(on, coming.token, come("hasty again"))
    assert told.STOPPED_AT_RELOAD in changes[page.lost]
    assert changes[page.reopen].visible
    asked = on.on_reopen(changes[page.left], come("hasty again"))[page.asked]
    assert open_case(on, come("hasty again"), asked).case.bag.slide == "phantom 7"


def test_what_was_left_is_given_once_for_a_while_and_to_no_stranger(at_home, slides, come, monkeypatch):
    on, page = at_home, at_home.page
    token = open_case(on, come("one"), Asked(slides[:1])).token
    on.desk.forget("one")
    assert told.UNKNOWN in said(on, "A" * len(token), come("stranger"))[page.lost]
    assert next(on.on_load(token, come("owner")))[page.asked].paths == slides[:1]
    assert told.UNKNOWN in said(on, token, come("late"))[page.lost]
    token = open_case(on, come("two"), Asked(slides[:1])).token
    on.desk.forget("two")
    monkeypatch.setattr(desk_module, "LEFT_FOR", 0.0)
    on.desk.tidy()
    assert not on.desk._left


def test_where_others_come_features_go_with_their_page(desk, on, slides, visitor):
    me = visitor()
    desk.arrive(me.session_hash)
    token = open_case(on, me, Asked(slides[:1])).token
    desk.forget(me.session_hash)
    left = desk.take_left(token)
    assert left is not None
    assert left.bytes == 0


def test_the_chat_of_another_selection_does_not_come_back(at_home, slides, come):
    on = at_home
    case = open_case(on, come("a"), Asked(slides[:1]))
    case.talk = ([show_question(Question("Which?")), show_answer("fat")], {0: Question("Which?")}, {})
    on.desk.forget("a")
    (asked,) = on.on_load(case.token, come("b"))
    again = open_case(on, come("b"), Asked(slides[1:]))
    with pytest.raises(gr.Error):
        on.on_back(asked[on.page.asked], again, [], come("b"))


@pytest.mark.parametrize(
    ("names", "found"), [("phantom", 1), ("phantom,cmu-1", 2), ("phantom,/etc/passwd", 0), ("", 0)]
)
def test_an_address_restores_the_examples_that_it_names_and_nothing_else(
    names, found, at_home, slides, come, monkeypatch
):
    monkeypatch.setattr(told, "open_example", lambda name: slides[name == "cmu-1"])
    steps = at_home.on_load("", come("by address", slide=names))
    if found:
        assert next(steps)[at_home.page.asked].paths == slides[:found]
    else:
        with pytest.raises(gr.Error):
            next(steps)


@pytest.mark.parametrize("uploaded", [False, True])
def test_seen_a_second_slide_that_took_the_first_ones_chat_with_it(uploaded, at_home, slides, come):
    on, page, me = at_home, at_home.page, come(f"uploaded {uploaded}")

    def ask_for(path: str) -> Asked:
        if not uploaded:
            return Asked((path,))
        file = on.desk.uploads / path[-6:] / "Mustermann.tiff"
        file.parent.mkdir(parents=True)
        file.write_bytes(Path(path).read_bytes())
        return on.on_upload([str(file)], False, me)[page.asked]

    first = open_case(on, me, ask_for(slides[0]))
    before, name = talk(on, first, me), first.case.bag.slide
    shown = on.on_slide(ask_for(slides[1]), "", first, None, None, me)
    assert shown[page.chat] == []
    assert shown[page.back].visible
    assert shown[page.back].value == f"Back to {name} and its 1 question"
    *_, last = on.on_slide_shown(shown[page.coming], None, [], me)
    second = last[page.opened]
    asked = on.on_reopen(shown[page.left], me)[page.asked]
    again = on.on_slide(asked, "", second, None, None, me)
    assert again[page.back].value == f"Back to {second.case.bag.slide}", "and forth"
    *_, last = on.on_slide_shown(again[page.coming], None, [], me)
    back = on.on_back(asked, last[page.opened], [], me)
    assert (back[page.chat], back[page.questions], back[page.answers]) == before


def test_a_slide_that_was_never_analysed_takes_no_cases_place(at_home, slides, come):
    """Seen: a case with nine answers could not be gone back to after another slide had been opened and cancelled."""
    on, page, me = at_home, at_home.page, come("changed my mind")

    def ask_for(path):
        return on.on_typed_path(str(path), False, me)[page.asked]

    first = open_case(on, me, ask_for(slides[0]))
    before = talk(on, first, me)
    shown = on.on_slide(ask_for(slides[1]), "", first, None, None, me)
    again = on.on_slide(ask_for(slides[1]), "", None, None, shown[page.coming], me)
    assert page.left not in again, "what the page offers stays"
    assert page.back not in again
    asked = on.on_reopen(shown[page.left], me)[page.asked]
    back = on.on_slide(asked, "", None, None, again[page.coming], me)
    *_, last = on.on_slide_shown(back[page.coming], None, [], me)
    back = on.on_back(asked, last[page.opened], [], me)
    assert (back[page.chat], back[page.questions], back[page.answers]) == before


def test_the_upload_of_the_case_before_goes_with_the_third_and_that_is_a_sentence(at_home, slides, come):
    on, page, me = at_home, at_home.page, come("three uploads")
    left, opened = [], None
    for number in range(3):
        file = on.desk.uploads / f"three{number}" / "a.tiff"
        file.parent.mkdir(parents=True)
        file.write_bytes(Path(slides[number % 2]).read_bytes())
        shown = on.on_slide(on.on_upload([str(file)], False, me)[page.asked], "", opened, None, None, me)
        left.append(shown[page.left])
        *_, last = on.on_slide_shown(shown[page.coming], None, [], me)
        opened = last[page.opened]
    assert len(list(on.desk.folder_of(me.session_hash).rglob("*.tiff"))) == 2
    with pytest.raises(gr.Error, match="choose its file again"):
        on.on_reopen(left[1], me)
