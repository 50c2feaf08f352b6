"""The app: what it imports, how it is served, what its handlers promise. What it is like to use: test_browser.py."""

import dataclasses
import hashlib
import html
import http.server
import json
import re
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

import app
from sparsewsi.bags.bag import Bag
from sparsewsi.model import evidence
from sparsewsi.model.prompt import format_question
from sparsewsi.model.sparse_wsi import SparseWSI
from sparsewsi.report.answer import Answer
from sparsewsi.report.case import open_case
from sparsewsi.web import chat, intake

ROOT = Path(__file__).resolve().parents[2]


# ---- how it is served


@pytest.mark.skipif(find_spec("mcp") is not None, reason="what MCP needs is installed")
def test_tools_that_cannot_be_served_are_not_left_out_silently() -> None:
    done = subprocess.run([sys.executable, "app.py", "--mcp"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "--mcp needs the packages of an extra of Gradio: pip install 'gradio[mcp]'."


def test_it_is_served_to_this_machine_and_keeps_no_record():
    settings = app.launch_settings("127.0.0.1", None)
    wanted = {
        "server_name": "127.0.0.1",
        "share": False,
        "ssr_mode": False,
        "run_history": False,
        "enable_monitoring": False,
        "allowed_paths": [],
        "max_file_size": "8gb",
    }
    assert {key: settings[key] for key in wanted} == wanted
    assert all(font not in str(settings["theme"].font) for font in ("Google", "http"))


@pytest.mark.parametrize("allowed", [True, False])
def test_a_path_can_be_opened_only_where_that_is_allowed(allowed, tiny_model, monkeypatch):
    monkeypatch.setenv("SPARSEWSI_MODEL", str(tiny_model))
    demo = app.build(allow_paths=allowed)
    assert (app.open_path in [fn.fn for fn in demo.fns.values()]) == allowed
    assert not demo.analytics_enabled
    public = {str(fn.api_name) for fn in demo.fns.values() if fn.fn is not None and fn.api_visibility != "private"}
    assert public == {"analyze", "ask", "evidence"}


# ---- uploads


def test_an_upload_moves_to_a_folder_of_its_session_that_only_we_can_read(tmp_path):
    source = tmp_path / "Mustermann_1950.svs"
    source.write_bytes(b"slide")
    for session in ("../../escape", "abc", None):
        source.write_bytes(b"slide")
        kept = intake.keep_upload(source, session)
        assert not source.exists()
        assert kept.name == "slide.svs"
        assert kept.parent.parent == intake.private_root()
        for folder in (kept.parent, intake.private_root()):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    app.forget(SimpleNamespace(session_hash="abc"))  # type: ignore[arg-type]
    assert not intake.private_folder("abc").exists()
    assert intake.private_folder("../../escape").exists()


def test_a_second_upload_replaces_the_first(tmp_path):
    for name in ("one.svs", "two.tiff"):
        (tmp_path / name).write_bytes(b"slide")
        kept = intake.keep_upload(tmp_path / name, "same")
    assert [path.name for path in kept.parent.iterdir()] == ["slide.tiff"]


# ---- the sample slide


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A web server on this machine with one file, `sample`."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sample").write_bytes(b"pixels" * 100)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(tmp_path / "site"), **kwargs)

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_the_sample_is_kept_only_when_its_digest_is_right(site, tmp_path):
    good = hashlib.sha256(b"pixels" * 100).hexdigest()
    with pytest.raises(ValueError, match="another file"):
        intake.fetch_sample(tmp_path / "cache", f"{site}/sample", "0" * 64)
    assert not (tmp_path / "cache").exists()
    path = intake.fetch_sample(tmp_path / "cache", f"{site}/sample", good)
    assert path.read_bytes() == b"pixels" * 100
    assert intake.fetch_sample(tmp_path / "cache", "http://127.0.0.1:9/gone", good) == path, "fetched once, then kept"
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [path.name]


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x", "http://no-such-host.invalid/x", "SITE/missing"])
def test_no_network_is_one_sentence(address, site, tmp_path):
    with pytest.raises(ValueError, match="could not be fetched") as caught:
        intake.fetch_sample(tmp_path, address.replace("SITE", site), timeout=5)
    assert "\n" not in str(caught.value)


# ---- words and turns


@pytest.mark.parametrize("options", [[], ["Yes", "No"], ["a. b", "C. fat", "-"]])
def test_a_turn_is_read_back_as_it_was_asked(options):
    text = format_question("Which tissue?\nLook closely.", options)
    assert chat.read_turn(text) == ("Which tissue?\nLook closely.", options)


def test_resolution_takes_a_decimal_comma_and_refuses_words():
    assert app.read_mpp(" 0,25 ") == 0.25
    assert app.read_mpp("") is None
    with pytest.raises(ValueError, match="number of µm/px"):
        app.read_mpp("40x")


@pytest.mark.parametrize(
    "error", [ValueError("bad\nslide. Pass slide_mpp=, e.g. 0.25"), OSError(28, "No space"), RuntimeError("x")]
)
def test_what_goes_wrong_is_one_sentence_on_the_page(error):
    with pytest.raises(gr.Error) as caught, app.sentences():
        raise error
    assert "\n" not in caught.value.message
    assert "slide_mpp" not in caught.value.message


def visitor() -> gr.Request:
    """What Gradio tells a handler of who asks: somebody new."""
    return gr.Request(session_hash=uuid.uuid4().hex)


def test_a_question_without_a_slide_stays_in_the_box():
    with pytest.raises(gr.Error, match="Open a slide first"):
        app.add_turn("What is it?", "", None, [], visitor())


def test_undo_gives_the_words_back_and_edit_drops_what_came_after(tiny_model):
    turns = [
        {"role": "user", "content": format_question("Which?", ["fat", "mucin"])},
        {"role": "assistant", "content": [{"type": "text", "text": "fat"}, {"type": "text", "text": "Demo model"}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Because."}]},
    ]
    answers = {1: Answer("Which?", "fat"), 3: Answer("Why?", "Because.")}
    assert app.undo(turns, answers, visitor()) == (turns[:2], {1: answers[1]}, "Why?", "")
    assert app.undo(turns[:2], answers, visitor()) == ([], {}, "Which?", "fat\nmucin")
    assert chat.back_to_question(turns) == turns[:3]
    held, change = tiny_case(SparseWSI.from_pretrained(tiny_model)), SimpleNamespace(index=2, value="How?")
    edited, _ = app.edit(held, turns, change, visitor())  # type: ignore[arg-type]
    assert edited == [*turns[:2], {"role": "user", "content": "How?"}]
    assert chat.text_of(turns[1]) == "fat", "the notice is not said to the model"


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
    assert chat.text_of(chat.said(text, "notice")) == text
    assert "<img" not in chat.side_by_side([("a", text, [])], "notice")
    assert chat.inert("Mostly fat, with foci of mucin.") == "Mostly fat, with foci of mucin."


def tiny_case(model: SparseWSI, n: int = 30) -> app.Shown:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(n, 1280, generator=generator)
    coords = torch.tensor([[224 * (i % 6), 224 * (i // 6)] for i in range(n)])
    bag = Bag(features, coords, 224, 0.5, "efficientnet-lite0", "slide 1", 0.5, "openslide", (1344, 1120))
    case = open_case(model, bag, "/nowhere")
    return app.Shown(**{field.name: getattr(case, field.name) for field in dataclasses.fields(case)}, token="token")


@pytest.fixture
def asked(tiny_model, monkeypatch):
    """A slide, a visitor, and the chat with the question just asked; a pass of the evidence for every patch."""
    monkeypatch.setenv("SPARSEWSI_MODEL", str(tiny_model))
    monkeypatch.setitem(evidence.TOKENS, "cpu", 1)
    held, me = tiny_case(app.loaded()[0]), visitor()
    box, _, chat_now = app.add_turn("Why?", "", held, [], me)
    assert box.stop_btn == "Stop"
    yield held, me, chat_now
    app.forget(me)
    assert app._turns.get(str(me.session_hash)) is None


def test_one_question_at_a_time(asked):
    held, me, chat_now = asked
    for handler in (
        lambda: app.add_turn("How?", "", held, chat_now, me),
        lambda: app.retry(held, chat_now, me),
        lambda: app.undo(chat_now, {}, me),
        lambda: next(app.ask_again(held, chat_now, {}, 8, "random", {"pinned": [], "dropped": []}, me)),
    ):
        with pytest.raises(gr.Error, match="still being answered"):
            handler()
    *_, (chat_then, answers, view, box) = app.reply(held, chat_now, {}, me)
    assert list(answers) == [1]
    assert view.props["evidence"]
    assert box.stop_btn is False
    late = [*chat_then[:-1], chat.said("Half", "notice", [app.WEIGHING])]
    with pytest.raises(gr.Error, match="still being answered"):  # the page has not been told yet
        app.add_turn("How?", "", held, late, me)
    assert len(app.add_turn("How?", "", held, chat_then, me)[2]) == 3
    assert app.end(me) == gr.skip(), "it comes after the next question"


def test_what_was_stopped_is_neither_weighed_nor_asked_again(asked):
    held, me, chat_now = asked
    steps = app.reply(held, chat_now, {}, me)
    first = next(steps)[0]
    assert app.WEIGHING in str(first)
    app.halt(chat_now, visitor())
    assert app.WEIGHING in str(next(steps)[0])
    app.halt(chat_now, me)
    [(last, answers, view, box)] = steps
    assert app.STOPPED in str(last)
    assert app.WEIGHING not in str(last)
    assert chat.text_of(last[-1]) != "(no answer)"
    assert answers == {}
    assert view.props["evidence"] is None
    assert box.stop_btn is False
    assert [turn["role"] for turn in app.add_turn("How?", "", held, last, me)[2]] == ["user", "assistant", "user"]


def test_stop_before_an_answer_has_its_turn(asked):
    held, me, chat_now = asked
    stopped, box = app.halt(chat_now, me)
    assert app.STOPPED in str(stopped)
    assert chat.text_of(stopped[-1]) == "(no answer)"
    assert box.stop_btn is False
    assert only_skips(app.reply(held, chat_now, {}, me))


def test_stop_while_the_evidence_is_weighed(asked, monkeypatch):
    held, me, chat_now = asked
    passes, scores = [], evidence.score_answers
    monkeypatch.setattr(
        evidence, "score_answers", lambda *given: (passes.append(app.halt(chat_now, me)), scores(*given))[1]
    )
    *_, (before, *_), (last, answers, view, _) = app.reply(held, chat_now, {}, me)
    assert len(passes) == 1
    assert answers == {}
    assert view.props["evidence"] is None
    assert app.STOPPED in str(last)
    assert chat.text_of(last[-1]) == chat.text_of(before[-1])


def test_the_slide_that_was_asked_for_last_is_opened(monkeypatch, tmp_path):
    me, other = visitor(), visitor()
    Image.new("RGB", (64, 64), "white").save(tmp_path / "quick.png")
    quick, opened = str(tmp_path / "quick.png"), []

    def slow() -> str:  # meanwhile
        opened.append(app.open_path(quick, me, gr.Progress()))
        app.open_path(quick, other, gr.Progress())
        return "phantom.tiff"

    monkeypatch.setitem(app.EXAMPLES, "phantom", slow)
    with pytest.raises(gr.Error) as unseen:
        app.open_phantom(me, gr.Progress())
    assert not unseen.value.visible
    assert opened == [quick]

    def slow_again() -> str:
        with pytest.raises(gr.Error, match="no file at the path"):
            app.open_path(quick + ".svs", me, gr.Progress())
        return "phantom.tiff"

    monkeypatch.setitem(app.EXAMPLES, "phantom", slow_again)
    assert app.open_phantom(me, gr.Progress()) == "phantom.tiff", "what could not be opened is in nobody's way"
    for one in (me, other):
        app.forget(one)
    assert not app._openings


def test_a_defect_gets_a_sentence_too():
    with pytest.raises(gr.Error, match="at fault"), app.sentences():
        raise KeyError("layer")


def only_skips(steps) -> bool:
    return all(part == gr.skip() for step in steps for part in step)


def test_an_answer_to_a_chat_that_was_cleared_does_not_fill_it_again(asked):
    held, me, chat_now = asked
    steps = app.reply(held, chat_now, {}, me)
    next(steps)
    assert app.clear(me)[0] == {}
    [(last, answers, *_)] = steps
    assert (last, answers) == ([], {})


def test_an_answer_leaves_the_question_that_was_asked_after_clearing_alone(asked):
    held, me, chat_now = asked
    steps = app.reply(held, chat_now, {}, me)
    next(steps)
    app.clear(me)
    later = app.add_turn("How?", "", held, [], me)[2]
    assert list(steps) == []
    assert only_skips(app.reply(held, chat_now, {}, me)), "it waited in the queue when the chat was cleared"
    *_, (answered, *_) = app.reply(held, later, {}, me)
    assert chat.text_of(answered[0]) == "How?"


def test_an_answer_never_lands_beside_another_slide(asked, tmp_path):
    held, me, chat_now = asked
    Image.new("RGB", (64, 64), "white").save(tmp_path / "other.png")
    steps = app.reply(held, chat_now, {}, me)
    next(steps)
    app.show(str(tmp_path / "other.png"), "0.5", me)
    [(last, answers, *_)] = steps
    assert (last, answers) == ([], {})
    assert not app._slides.holds(held.token)


def test_a_slide_that_was_replaced_while_it_was_analysed_is_not_shown(asked, monkeypatch):
    held, _, _ = asked
    monkeypatch.setattr(app, "analyse", lambda *_: held)
    assert all(part == gr.skip() for part in app.look("a token of before", "a.svs", "", gr.Progress()))


@pytest.mark.parametrize("error", [ValueError("it is too large."), KeyError("layer")])
def test_an_answer_whose_evidence_failed_stands_without_it(asked, monkeypatch, error):
    held, me, chat_now = asked

    def fail(*_):
        raise error

    monkeypatch.setattr(evidence, "score_answers", fail)
    steps, last = app.reply(held, chat_now, {}, me), []
    with pytest.raises(gr.Error, match="too large" if isinstance(error, ValueError) else "at fault"):
        for last, *_ in steps:  # noqa: B007
            pass
    assert app.WEIGHING not in str(last)
    assert app.UNWEIGHED in str(last)


def test_an_answer_that_breaks_off_says_so(asked, monkeypatch):
    held, me, chat_now = asked

    def broken(*_):
        yield "There is no"
        raise RuntimeError("out of memory")

    monkeypatch.setattr(app, "words", broken)
    steps, last = app.reply(held, chat_now, {}, me), []
    with pytest.raises(gr.Error):
        for last, *_ in steps:  # noqa: B007
            pass
    assert app.BROKEN_OFF in str(last)
    assert app.WEIGHING not in str(last)


def test_a_question_that_failed_goes_with_the_next_one(tiny_model, monkeypatch):
    monkeypatch.setenv("SPARSEWSI_MODEL", str(tiny_model))
    held, me = tiny_case(app.loaded()[0]), visitor()
    asked = [{"role": "user", "content": "Why?"}]
    assert [turn["content"] for turn in app.add_turn("How?", "", held, asked, me)[2]] == ["How?"]
    app.forget(me)


def test_an_answer_streams_with_its_notice_and_is_then_weighed(tiny_model, monkeypatch):
    monkeypatch.setenv("SPARSEWSI_MODEL", str(tiny_model))
    held = tiny_case(app.loaded()[0])
    me, options = visitor(), "fat\nliver"
    chat_now = app.add_turn("Which?", options, held, [], me)[2]
    *steps, (answered, answers, update, _) = app.reply(held, chat_now, {}, me)
    assert all(step[0][-1]["content"][-1].startswith("Demo model, research use only") for step in steps)
    answer = answers[1]
    assert sum(answer.probs) == pytest.approx(1, abs=1e-5)
    assert len(answer.effects) == 6
    blocks = " ".join(answered[-1]["content"])
    assert all(f"{prob:.0%}" in blocks for prob in answer.probs)
    cited = re.findall(r"\[#(\d+)\]\(#patch-(\d+)\)", blocks)
    assert len(cited) == min(3, sum(effect > 0 for effect in answer.effects))
    assert all(a == b and 1 <= int(a) <= 6 for a, b in cited)
    assert update.props["evidence"]["indices"] == held.selection.indices.tolist()


def test_the_viewer_shows_the_evidence_of_the_last_answer_only(tiny_model):
    held = tiny_case(SparseWSI.from_pretrained(tiny_model))
    effects = tuple(float(i) for i in range(6))
    asked = [{"role": "user", "content": "Which?"}]
    answered = [*asked, {"role": "assistant", "content": "Fat."}]
    answers = {1: Answer("Which?", "Fat.", effects=effects)}
    assert app.last_evidence(held, answered, answers).props["evidence"]["effects"] == list(effects)
    for chat_now in ([], asked, [*answered, *asked]):
        assert app.last_evidence(held, chat_now, answers).props["evidence"] is None


@pytest.mark.parametrize("multi_turn", [True, False])
def test_what_was_said_before_goes_to_the_model_only_if_it_was_trained_on_that(
    multi_turn, tiny_model, tmp_path, monkeypatch
):
    model = SparseWSI.from_pretrained(tiny_model)
    model.config = dataclasses.replace(model.config, multi_turn=multi_turn)
    model.save_pretrained(tmp_path / "copy")
    monkeypatch.setenv("SPARSEWSI_MODEL", str(tmp_path / "copy"))
    held = tiny_case(app.loaded()[0])
    question = [{"role": "user", "content": format_question("Which?", ["fat", "liver"])}]
    before = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    asked = {"role": "user", "content": "Which?"}
    assert app.asked_in([*before, *question]) == ([*before, asked] if multi_turn else [asked], ["fat", "liver"])
    alone, later = ("".join(app.words(held, chat)) for chat in (question, [*before, *question]))
    assert (alone == later) != multi_turn


def test_downloads_are_written_when_asked_for(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEWSI_MODEL", str(tiny_model))
    path = tmp_path / "slide.png"
    Image.fromarray(np.full((1120, 1344, 3), 200, np.uint8)).save(path)
    held = dataclasses.replace(tiny_case(app.loaded()[0]), path=path, slide_mpp=0.5)
    answers = {1: Answer("Which <b>?", "fat", ("fat", "liver"), (0.5, 0.5))}
    app.record("s", event="open", slide="slide 1")
    for name, _ in app.FILES:
        text = app.make_file(held, answers, "s", name).read_text()
        assert "Mustermann" not in text
        assert name != "report.html" or "research use only, not for diagnosis" in text
    assert json.loads(app.make_file(held, answers, "s", "log.jsonl").read_text().splitlines()[0])["event"] == "open"
    app.forget(SimpleNamespace(session_hash="s"))  # type: ignore[arg-type]
    assert not list(intake.private_root().glob(f"{intake.private_folder('s').name}*"))


def test_a_file_that_was_not_uploaded_here_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    with pytest.raises(ValueError, match="not uploaded"):
        app.received({"path": "/etc/hostname"}, SimpleNamespace(session_hash="s"))  # type: ignore[arg-type]


def test_login_is_asked_for_where_names_are_given():
    assert app.launch_settings("127.0.0.1", None)["auth"] is None
    assert app.launch_settings("127.0.0.1", None, "a:b:c,d:e")["auth"] == [("a", "b:c"), ("d", "e")]
