"""The app: open a slide, look at the patches that were selected, ask about it, see what the answer rests on.

python app.py [--host 127.0.0.1] [--port 7860] [--model assets/demo-model] [--auth name:password] [--log FILE] [--mcp]

Read it from the bottom: `layout` says what is on the page, `wire` what happens on a click; the handlers above them call
sparsewsi. A session holds a Case (CPU tensors), never an open slide.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import html
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import torch
from gradio.events import api

from sparsewsi import phantom
from sparsewsi.bags.bag import Bag, save_bag
from sparsewsi.bags.encoders import load_encoder
from sparsewsi.bags.extract import extract_bag
from sparsewsi.bags.foreign import load_bag
from sparsewsi.bags.patch_encoder import PatchEncoder
from sparsewsi.model.config import DEFAULT_MODEL, SparseWSIConfig, name_model
from sparsewsi.model.prompt import format_question
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import SELECTORS
from sparsewsi.model.sparse_wsi import SparseWSI
from sparsewsi.report import umap
from sparsewsi.report.answer import Answer, name_llm, word_notice
from sparsewsi.report.case import Case, open_case
from sparsewsi.report.phantom import QUESTIONS, choose_questions, describe_truth, find_truth
from sparsewsi.report.qupath import read_regions
from sparsewsi.slides.slide import open_slide
from sparsewsi.web import intake
from sparsewsi.web.chat import about, back_to_question, inert, read_turn, said, side_by_side, text_of, turns_of
from sparsewsi.web.turns import Turns
from sparsewsi.web.viewer import PAGE_CSS, Slides, bag_props, map_props, packed, slide_props, slide_viewer, theme

LOOPBACK = ("127.0.0.1", "localhost", "::1")
FEWEST, MOST = 8, 256  # patches of a what-if
CASES = 16  # analysed slides kept for callers of the API; the oldest is forgotten first

FILES = (
    ("report.html", "report"),
    ("patches.geojson", "GeoJSON for QuPath"),
    ("patches.csv", "CSV"),
    ("selection.json", "selection.json"),
    ("log.jsonl", "log of this session"),
)
STOPPED = "Stopped; the evidence was not weighed."
UNWEIGHED = "The evidence could not be weighed."
BROKEN_OFF = "The answer broke off here; ask again."
WEIGHING = "_Weighing the evidence: the answer is scored again without each of the patches …_"


@dataclasses.dataclass(frozen=True, eq=False)
class Shown(Case):
    """A case on a page. token: name of its slide for the browser."""

    token: str = ""


_slides = Slides()
_cases: dict[str, Shown] = {}  # by token, for the API
_openings: dict[str, object] = {}  # by session: the slide that was asked for last
_turns = Turns()


# ---- the model: loaded once, when first needed

_loading = threading.Lock()


def model_name() -> str:
    """Folder or hub repository of the model that is served."""
    return os.environ.get("SPARSEWSI_MODEL") or str(DEFAULT_MODEL)


@functools.cache
def _load(name: str) -> tuple[SparseWSI, PatchEncoder]:
    model = SparseWSI.from_pretrained(name)
    return model, load_encoder(model.config.encoder)


def loaded() -> tuple[SparseWSI, PatchEncoder]:
    """The model and its patch encoder; a second caller waits for the first one's loading."""
    with _loading:
        return _load(model_name())


def warm_up() -> None:
    """Load the model and let umap-learn compile, so that the first visitor does not wait for either."""
    try:
        loaded()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"The model could not be loaded yet: {error}", file=sys.stderr)
    few = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    umap.map_features(few, Selection(torch.arange(4), few[:, 0].clone(), few[:4], len(few)))


def gpu(function: Callable) -> Callable:
    """spaces.GPU on a Hugging Face Space, the function itself elsewhere."""
    if os.environ.get("SPACE_ID") and importlib.util.find_spec("spaces"):
        import spaces  # type: ignore[import-not-found]

        return spaces.GPU(function)
    return function


# ---- where slides come from, and what is kept of a session


def record(session: str | None, **event: Any) -> None:
    """Add a line to the session's log, and to the file that $SPARSEWSI_LOG names."""
    folder = intake.private_folder(session, "-files")
    folder.mkdir(mode=0o700, exist_ok=True)
    line = {
        "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "session": intake.private_folder(session).name[:8],
        **event,
    }
    for file in filter(None, (folder / "log.jsonl", os.environ.get("SPARSEWSI_LOG"))):
        with Path(file).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line, ensure_ascii=False) + "\n")


EXAMPLES: dict[str, Callable[[], Path]] = {
    "phantom": phantom.example_slide,
    "cmu-1": lambda: intake.fetch_sample(intake.cache_folder()),
}


def example_name(path: str) -> str:
    """The key of EXAMPLES for a slide in the cache, "" for any other: only examples may be named in an address."""
    inside = Path(path).parent == intake.cache_folder()
    return ("phantom" if phantom.truth_path(path).is_file() else "cmu-1") if inside else ""


# ---- from a slide to patches


def read_bag(path: str, slide_mpp: float | None, progress: Callable[..., Any]) -> Bag:
    """The slide's patches, encoded; those of examples are kept in the cache, nobody else's ever are."""
    config, encoder = loaded()[0].config, loaded()[1]
    kept = intake.cache_folder() / f"{Path(path).stem}-{config.encoder}-{config.mpp:g}-{config.patch_size}.safetensors"
    if example_name(path) and slide_mpp is None and kept.is_file():
        return load_bag(kept)

    def encoded(done: int, total: int) -> None:
        progress((done, total), desc="Encoding the patches", unit="patches")

    progress(None, desc="Finding tissue")
    sizes: dict[str, Any] = {"mpp": config.mpp, "patch_size": config.patch_size}
    bag = extract_bag(path, encoder, **sizes, slide_mpp=slide_mpp, progress=encoded)
    if example_name(path) and slide_mpp is None:
        save_bag(bag, kept)
    return bag


@gpu
def analyse(token: str, path: str, slide_mpp: float | None, progress: Callable[..., Any]) -> Shown:
    """Slide -> bag -> selection, saying what it is doing."""
    with sentences():
        progress(None, desc="Loading the model")
        model = loaded()[0]
        bag = read_bag(path, slide_mpp, progress)
        progress(1, desc="Selecting patches")
        case = open_case(model, bag, path, slide_mpp=slide_mpp)
        return Shown(**{field.name: getattr(case, field.name) for field in dataclasses.fields(case)}, token=token)


# ---- words


class Halted(Exception):
    """Stop was pressed while the evidence was weighed."""


@contextmanager
def sentences() -> Iterator[None]:
    """Turn what went wrong into one sentence on the page."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = " ".join(text.split()).replace("Pass slide_mpp=", 'Fill in "Scan µm/px" and press Enter')
        text = text[:1].upper() + text[1:] if text.split(" ")[0].isalpha() else text  # a file's name stays as it is
        raise gr.Error(text, duration=30, print_exception=False) from error
    except (gr.Error, Halted):
        raise
    except Exception as error:  # a defect: the server's log has the rest
        raise gr.Error("That failed, and the program is at fault; try again.", duration=30) from error


def short_name() -> str:
    """The model's name for people, never a path."""
    return name_model(model_name())


def notice() -> str:
    """The sentence under every answer."""
    with_config = SparseWSIConfig.load(model_name()) if Path(model_name()).is_dir() else loaded()[0].config
    return word_notice(with_config)


def facts(case: Shown | None) -> str:
    """The lines that always say what the page shows, and what to doubt in it."""
    if case is not None:
        doubted = " ".join([*filter(None, [case.bag.note]), *case.doubts])
        return inert(case.summary) + (f"\n\n⚠ {inert(doubted)}" if doubted else "")
    if not Path(model_name()).is_dir():
        return f"No slide open · model {inert(short_name())}"
    config = SparseWSIConfig.load(model_name())
    model = f"model {short_name()} ({name_llm(config)})"
    return inert(f"No slide open · {model} · encoder {config.encoder} · keeps {config.num_tokens} patches")


def read_mpp(text: str) -> float | None:
    """um/px from the field; None when it is empty. Raises ValueError for what is no resolution."""
    if not text.strip():
        return None
    try:
        return float(text.strip().replace(",", "."))
    except ValueError:
        raise ValueError(f"The scan resolution is a number of µm/px such as 0.25, got {text.strip()!r}.") from None


def make_file(case: Shown, answers: dict[int, Answer], session: str | None, name: str) -> Path:
    """Write one of FILES to the session's folder, now that somebody asks for it."""
    path = intake.private_folder(session, "-files") / name
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if name == "log.jsonl":
        path.touch()
    else:
        case.write(path.parent, list(answers.values()), [name])
    return path


# ---- handlers


@contextmanager
def opening(request: gr.Request) -> Iterator[None]:
    """The slide that was asked for last is the one that opens, however long the others take."""
    session, mine = str(request.session_hash), object()
    _openings[session] = mine
    try:
        with sentences():
            yield
    except gr.Error:
        if _openings.get(session) is mine:
            del _openings[session]
        raise
    if _openings.get(session, mine) is not mine:
        raise nothing_to_open()


def nothing_to_open() -> gr.Error:
    """Unseen: what would follow is not run."""
    return gr.Error("", visible=False, print_exception=False)


def open_example(name: str, request: gr.Request, progress: gr.Progress) -> str:
    words_for_it = {"phantom": "Opening the phantom (generated on first use)", "cmu-1": "Fetching CMU-1 (CC0)"}
    progress(None, desc=words_for_it[name])
    with opening(request):
        return str(EXAMPLES[name]())


def open_phantom(request: gr.Request, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
    return open_example("phantom", request, progress)


def open_sample(request: gr.Request, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
    return open_example("cmu-1", request, progress)


def open_upload(file: str, request: gr.Request, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
    progress(None, desc="Looking at the file")
    with opening(request):
        path = intake.keep_upload(file, request.session_hash)
        intake.check(path)
        return str(path)


def open_path(text: str, request: gr.Request, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
    progress(None, desc="Looking at the file")
    with opening(request):
        intake.check(text.strip())
        return str(Path(text.strip()).expanduser())


def open_address(request: gr.Request, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
    """The slide that the page's address names, if it names one of the examples."""
    name = dict(request.query_params).get("slide", "")
    if name not in EXAMPLES:
        raise nothing_to_open()
    return open_example(name, request, progress)


def forget(request: gr.Request) -> None:
    """The tab was closed: delete what was uploaded in it and what was made of it."""
    for token in _slides.forget(str(request.session_hash)):
        _cases.pop(token, None)
    drop(request)
    _openings.pop(str(request.session_hash), None)
    for what in ("", "-files"):
        shutil.rmtree(intake.private_folder(request.session_hash, what), ignore_errors=True)


def show(path: str, resolution: str, request: gr.Request) -> tuple:
    """The slide itself, at once; what belonged to the one before goes."""
    with sentences():
        if not path:
            raise ValueError("Open a slide first.")
        with open_slide(path, slide_mpp=read_mpp(resolution)) as slide:
            token = _slides.add(path, str(request.session_hash))
            props = slide_props(token, slide, example_name(path))
        record(request.session_hash, event="open", slide=slide.name, size=slide.size, mpp=slide.mpp)
    view = gr.HTML(slide=props, bag=None, kept=None, map=None, evidence=None, files=[])
    box = drop(request)
    return token, view, None, [], {}, "", gr.Accordion(visible=False), f"{slide.name} · being analysed", box


def look(token: str, path: str, resolution: str, progress: gr.Progress = gr.Progress()) -> tuple:  # noqa: B008
    """Analyse the slide. The resolution was this slide's: left in its field it would be taken for the next one's."""
    with sentences():
        case = analyse(token, path, read_mpp(resolution), progress)
        if not _slides.holds(token):  # another one was opened meanwhile
            return (gr.skip(),) * 10
        truth = find_truth(path)
        secret = describe_truth(truth, case.bag, case.selection)
    asked = choose_questions(truth)
    samples = gr.Dataset(samples=[[text] for text, _ in asked], sample_labels=[text for text, _ in asked])
    view = gr.HTML(**bag_props(case.bag, case.selection), files=FILES)
    config = loaded()[0].config
    k, alone = max(FEWEST, min(MOST, config.num_tokens)), gr.Markdown(visible=not config.multi_turn)
    opened = gr.Accordion(visible=truth is not None, open=False)
    return case, view, facts(case), opened, secret, samples, asked, "", k, alone


def draw_map(case: Shown | None) -> Any:
    if case is None:
        return gr.skip()
    with sentences():
        props = map_props(umap.map_features(case.bag.features, case.selection))
    return gr.HTML(map=props) if _slides.holds(case.token) else gr.skip()


def offer(case: Shown | None, answers: dict[int, Answer], request: gr.Request) -> None:
    """From now on the downloads hold these answers."""
    if case is not None:
        _slides.offer(case.token, functools.partial(make_file, case, answers, request.session_hash))


def take_example(index: int, asked: list) -> tuple[str, str]:
    text, options = asked[index]
    return text, "\n".join(options)


def add_turn(question: str, options: str, case: Shown | None, chat: list, request: gr.Request) -> tuple:
    """Put the question into the chat and give the box back empty, with a Stop button while the answer comes."""
    if case is None:
        raise gr.Error("Open a slide first; the question stays in the box.", print_exception=False)
    if not question.strip():
        raise gr.Error("Write a question first.", print_exception=False)
    alone(chat, request)
    with sentences():
        text = format_question(question.strip(), [line.strip() for line in options.splitlines() if line.strip()])
    answered = chat[:-1] if chat and chat[-1]["role"] == "user" else chat  # a question that was not answered goes
    asked = [*answered, {"role": "user", "content": inert(text)}]
    return begin(case, asked, request, value=""), "", asked


def asked_in(chat: list) -> tuple[list[dict[str, str]], list[str]]:
    """What the model is asked: the last question, after what was said before if it was trained on that."""
    return turns_of(chat, history=loaded()[0].config.multi_turn)


def idle() -> Any:
    """The question box, ready for the next question."""
    return gr.Textbox(submit_btn=True, stop_btn=False)


def what(case: Shown, chat: list) -> tuple:
    """The last question, as it comes back from the page."""
    return case.token, len(chat), " ".join(text_of(chat[-1]).split())


def begin(case: Shown, chat: list, request: gr.Request, **changes: Any) -> Any:
    """An answer is coming: the question box, with a Stop button."""
    _turns.begin(str(request.session_hash), what(case, chat))
    return gr.Textbox(submit_btn=False, stop_btn="Stop", **changes)


def alone(chat: list, request: gr.Request) -> None:
    """One at a time, the chat is what all of them write: raises gr.Error while an answer is coming, on the page too."""
    if _turns.busy(str(request.session_hash)) or (chat and WEIGHING in str(chat[-1]["content"])):
        sentence = "The last question is still being answered: wait for it or press Stop."
        raise gr.Error(sentence, print_exception=False)


def halt(chat: list, request: gr.Request) -> tuple[Any, Any]:
    """Stop was pressed: an answer that has started says so itself, soon."""
    turn = _turns.stop(str(request.session_hash))
    if turn is not None and turn.started and not turn.done:
        return gr.skip(), gr.skip()
    unstarted = turn is not None and not turn.started
    return [*chat, said("", notice(), [STOPPED])] if unstarted else gr.skip(), idle()


def end(request: gr.Request) -> Any:
    """The answer has come, or will not: the question box for the next one, if that has not been asked already."""
    return idle() if _turns.end(str(request.session_hash)) else gr.skip()


def drop(request: gr.Request) -> Any:
    """Whatever is being answered is not wanted any more."""
    _turns.drop(str(request.session_hash))
    return idle()


@gpu
def words(case: Shown, chat: list) -> Iterator[str]:
    """The answer to the last question, in pieces."""
    yield from case.answer(loaded()[0], *asked_in(chat))


@gpu
def weighed(case: Shown, chat: list, text: str, session: str) -> Answer:
    """What the answer to the last question rests on. Raises Halted."""
    turn = _turns.get(session)

    def look(*_: int) -> None:
        if not _turns.wanted(session, turn):
            raise Halted

    turns, options = asked_in(chat)
    return case.measure(loaded()[0], turns, text, options, progress=look)


NOTHING = (gr.skip(),) * 4  # new in chat, answers, view and question box


def reply(case: Shown | None, chat: list, answers: dict[int, Answer], request: gr.Request) -> Iterator[tuple]:
    """Stream the answer to the last question, then what it rests on, until Stop is pressed."""
    session, text, lines = str(request.session_hash), "", [STOPPED]
    failure, without = None, BROKEN_OFF
    turn = _turns.take(session, what(case, chat)) if case is not None else None
    if case is None or turn is None:
        yield NOTHING
        return
    answers = {i: earlier for i, earlier in answers.items() if i < len(chat)}

    def so_far(*lines: str) -> list:
        return [*chat, said(text, notice(), list(lines))]

    try:
        with sentences():
            for piece in words(case, chat):
                if not _turns.wanted(session, turn):
                    break
                text += piece
                yield so_far(WEIGHING), *NOTHING[1:]
            else:
                without = UNWEIGHED
                yield so_far(WEIGHING), *NOTHING[1:]
                answers[len(chat)] = weighed(case, chat, text_of(so_far()[-1]) if text else "", session)
                text, lines = answers[len(chat)].text, about(answers[len(chat)], case.selection)
    except Halted:
        pass
    except gr.Error as error:  # no half answer may stand as a whole one
        failure, lines = error, [without]
    turn.done = True
    if _turns.get(session) is turn:
        chat = chat if failure and not text else so_far(*lines)
        if not failure:
            log_answer(case, chat, answers, request)
        offer(case, answers, request)
        yield chat, answers, last_evidence(case, chat, answers), idle()
    elif _turns.get(session) is None:  # cleared, or another slide: a word may have come after that
        yield [], {}, *NOTHING[2:]
    if failure:
        raise failure


def evidence_props(selection: Selection, answer: Answer) -> dict[str, Any] | None:
    indices = selection.indices.tolist()
    return {"indices": indices, "effects": [round(effect, 4) for effect in answer.effects]} if answer.effects else None


def last_evidence(case: Shown | None, chat: list, answers: dict[int, Answer]) -> Any:
    """The viewer shows the evidence of the answer that the chat ends with, never that of another one."""
    answer = answers.get(len(chat) - 1)
    return gr.HTML(evidence=evidence_props(case.selection, answer) if case and answer else None)


def log_answer(case: Shown, chat: list, answers: dict[int, Answer], request: gr.Request) -> None:
    """Write down the answer that the chat ends with; one that was stopped with its words alone."""
    question, options = read_turn(text_of(chat[-2]))
    answer = answers.get(len(chat) - 1, Answer(question, text_of(chat[-1]), tuple(options)))
    record(request.session_hash, event="ask", slide=case.bag.slide, **dataclasses.asdict(answer))


def log_views(event: gr.EventData, request: gr.Request) -> None:
    record(request.session_hash, event="look", views=event._data["views"][:200])


def retry(case: Shown, chat: list, request: gr.Request) -> tuple[list, Any]:
    """Ask the last question again."""
    alone(chat, request)
    asked = back_to_question(chat)
    return asked, begin(case, asked, request)


def undo(chat: list, answers: dict[int, Answer], request: gr.Request) -> tuple[list, dict, str, str]:
    """Take back the last question; its words return to the boxes."""
    alone(chat, request)
    kept = back_to_question(chat)
    question, options = read_turn(text_of(kept[-1]))
    answers = {i: answer for i, answer in answers.items() if i < len(kept) - 1}
    return kept[:-1], answers, question, "\n".join(options)


def clear(request: gr.Request) -> tuple[dict, Any]:
    """The chat was emptied; an answer that is still coming does not fill it again."""
    return {}, drop(request)


def edit(case: Shown, chat: list, change: gr.EditData, request: gr.Request) -> tuple[list, Any]:
    """Ask an edited question in place of the old one and of what came after it."""
    alone(chat, request)
    place = change.index[0] if isinstance(change.index, (list, tuple)) else change.index
    asked = [*chat[:place], {"role": "user", "content": inert(html.unescape(str(change.value)))}]
    return asked, begin(case, asked, request)


def take_picks(event: gr.EventData, case: Shown) -> tuple[dict[str, list[int]], str]:
    """Which patches were pinned and dropped in the viewer, kept and in words."""
    total = len(case.bag.coords)
    picks = {key: [i for i in event._data[key] if 0 <= int(i) < total][:4096] for key in ("pinned", "dropped")}
    return picks, f"Pinned: {len(picks['pinned'])} · dropped: {len(picks['dropped'])}"


def ask_again(
    case: Shown | None,
    chat: list,
    answers: dict[int, Answer],
    k: int,
    selector: str,
    picks: dict[str, list[int]],
    request: gr.Request,
) -> Iterator[tuple[Any, Any]]:
    """The last question once more, from other patches; both answers beside each other."""
    alone(chat, request)
    for step in what_if(case, chat, answers, k, selector, picks):
        if case is None or not _slides.holds(case.token):  # another slide was opened
            yield "", gr.skip()
            return
        yield step


@gpu
def what_if(
    case: Shown | None, chat: list, answers: dict[int, Answer], k: int, selector: str, picks: dict[str, list[int]]
) -> Iterator[tuple[Any, Any]]:
    """The steps of ask_again."""
    with sentences():
        if case is None or not chat:
            raise ValueError("Ask a question first: a what-if asks the same again, from other patches.")
        first = answers.get(len(chat) - 1)
        before = (f"{len(case.selection.indices)} patches, learned", text_of(chat[-1]))
        left = (*before, about(first, case.selection) if first else [])
        other = case.choose(loaded()[0], int(k), selector, **picks)
        selection = other.selection
        title = f"What if: {len(selection.indices)} patches, {selector}"
        title += "".join(f", {len(picks[key])} {key}" for key in ("pinned", "dropped") if picks[key])
        turns, options = asked_in(chat)
        yield (
            side_by_side([left, (title, "", [])], notice()),
            gr.HTML(kept=packed(selection.indices, np.int32), evidence=None),
        )
        text = ""
        for piece in other.answer(loaded()[0], turns, options):
            text += piece
            yield side_by_side([left, (title, text, [])], notice()), gr.skip()
        answer = other.measure(loaded()[0], turns, text, options)
        right = (title, answer.text or "(no answer)", about(answer, selection))
        yield side_by_side([left, right], notice()), gr.HTML(evidence=evidence_props(selection, answer))


def own_patches(case: Shown | None) -> tuple[str, Any]:
    """Back from a what-if to what the model selected."""
    return "", gr.HTML(kept=packed(case.selection.indices, np.int32), evidence=None) if case else gr.skip()


def import_regions(file: str, case: Shown | None) -> Any:
    """Regions drawn in QuPath: the patches in them, listed and marked."""
    with sentences():
        try:
            if case is None:
                raise ValueError("Open a slide first: the regions must be of that slide.")
            found = read_regions(file, case.bag)
        finally:
            Path(file).unlink(missing_ok=True)
    return gr.HTML(members={"indices": found.tolist(), "where": "imported regions", "nonce": uuid.uuid4().hex})


# ---- the API: what gradio_client and MCP see


def case_of(token: str) -> Shown:
    if token not in _cases:
        raise ValueError(
            "This case is not known, or no longer. Call analyze first; a case lives as long as its session."
        )
    return _cases[token]


def analyze(request: gr.Request, slide: str = "phantom", file: gr.FileData | None = None, slide_mpp: float = 0) -> dict:
    """Open a whole-slide image, encode its patches and keep those the model selects.

    Args:
        slide: "phantom" or "cmu-1" for an example; not looked at when a file is given.
        file: a slide to upload.
        slide_mpp: micrometres per pixel of the scan, for slides that do not state it; 0 if they do.
    Returns:
        case (to be passed to ask and evidence), slide, num_patches, indices and coords (level-0 px) of the kept patches
        in raster order, ranks (1 = best score), scores of the kept, summary, doubts, notice.
    """
    with sentences():
        path = received(file, request) if file else EXAMPLES[slide]() if slide in EXAMPLES else None
        if path is None:
            raise ValueError(f"The slide must be {' or '.join(EXAMPLES)}, or a file, got {slide!r}.")
        token = _slides.add(path, str(request.session_hash))
        case = analyse(token, str(path), slide_mpp or None, lambda *_args, **_kwargs: None)
        _cases[token] = case
        for old in list(_cases)[:-CASES]:
            _cases.pop(old, None)
    kept = case.selection.indices
    return {
        "case": token,
        "slide": case.bag.slide,
        "num_patches": case.selection.num_patches,
        "indices": kept.tolist(),
        "coords": case.bag.coords[kept].tolist(),
        "ranks": case.selection.ranks.tolist(),
        "scores": case.selection.scores[kept].tolist(),
        "summary": case.summary,
        "doubts": list(case.doubts),
        "notice": notice(),
    }


def received(file: Any, request: gr.Request) -> Path:
    """An upload through the API, moved and looked at. Raises ValueError for a path that was not uploaded here."""
    path = Path(file["path"] if isinstance(file, dict) else file.path).resolve()
    if not path.is_relative_to(Path(os.environ["GRADIO_TEMP_DIR"]).resolve()):
        raise ValueError("The file was not uploaded to this server.")
    kept = intake.keep_upload(path, request.session_hash)
    intake.check(kept)
    return kept


@gpu
def ask(case: str, question: str, options: list[str] | None = None) -> dict:
    """Ask about an analysed slide.

    Args:
        case: what analyze returned.
        question: the question, in words.
        options: answer options of a multiple-choice question.
    Returns:
        answer, probabilities (one per option), notice.
    """
    with sentences():
        opened, model, given = case_of(case), loaded()[0], options or []
        turns = [{"role": "user", "content": question}]
        text = "".join(opened.answer(model, turns, given))
        found = opened.measure(model, turns, text, given, evidence=False)
    return {"answer": found.text, "probabilities": list(found.probs), "notice": notice()}


@gpu
def evidence(case: str, question: str, answer: str, options: list[str] | None = None) -> dict:
    """How much an answer loses when each of the kept patches is left out.

    Args:
        case: what analyze returned.
        question: the question.
        answer: an answer to it, such as the one that ask returned.
        options: answer options, if it was a multiple-choice question.
    Returns:
        effects in nats, in the order of analyze's indices; indices; ranks by score; sentence, what they mean; notice.
    """
    with sentences():
        opened = case_of(case)
        found = opened.measure(loaded()[0], [{"role": "user", "content": question}], answer, options or [])
    kept = opened.selection
    lines = {"effects": list(found.effects), "sentence": found.evidence, "notice": notice()}
    return {"indices": kept.indices.tolist(), "ranks": kept.ranks.tolist(), **lines}


# ---- layout


def layout(allow_paths: bool) -> tuple[gr.Blocks, SimpleNamespace]:
    """The page and its parts by name."""
    ui = SimpleNamespace()
    with gr.Blocks(title="SparseWSI", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as demo:
        ui.path, ui.token, ui.case, ui.answers = gr.State(""), gr.State(""), gr.State(None), gr.State({})
        ui.asked, ui.picks = gr.State(list(QUESTIONS)), gr.State({"pinned": [], "dropped": []})
        with gr.Row(elem_id="sources"):
            gr.Markdown("# SparseWSI", elem_id="title")
            ui.phantom = gr.Button(
                "Example: phantom slide", variant="primary", size="md", min_width=190, elem_id="phantom"
            )
            ui.upload = gr.UploadButton("Upload a slide", size="md", min_width=130, elem_id="upload")
            ui.sample = gr.Button("Fetch CMU-1 (OpenSlide)", size="md", min_width=190, elem_id="sample")
            ui.typed = gr.Textbox(
                label="Path on this machine",
                placeholder="/slides/case.svs, then Enter",
                max_lines=1,
                visible=allow_paths,
                min_width=220,
                scale=2,
                elem_id="path",
            )
            ui.mpp = gr.Textbox(
                label="Scan µm/px", placeholder="as stated", max_length=12, min_width=120, elem_id="mpp"
            )
        ui.facts = gr.Markdown(facts(None), elem_id="facts")
        with gr.Row():
            with gr.Column(scale=3, min_width=320, elem_id="left"):
                ui.view = slide_viewer(elem_id="view")
            with gr.Column(scale=2, min_width=320, elem_id="right"):
                ui.chat = gr.Chatbot(
                    label="Answers",
                    height="max(300px, 50vh)",
                    show_label=False,
                    sanitize_html=True,  # what a model writes is inert() besides
                    allow_tags=False,
                    latex_delimiters=[],
                    buttons=["copy"],
                    feedback_options=None,
                    editable="user",
                    placeholder="Open a slide, then ask about it.",
                    elem_id="chat",
                )
                ui.question = gr.Textbox(
                    show_label=False,
                    label="Question",
                    placeholder="Ask about the slide",
                    submit_btn=True,
                    max_length=2000,
                    elem_id="question",
                )
                ui.alone = gr.Markdown(
                    "Each question is answered on its own, without those before it.", visible=False, elem_id="alone"
                )
                ui.examples = gr.Dataset(
                    label="Questions to start with",
                    components=[gr.Textbox(visible=False)],
                    samples=[[text] for text, _ in QUESTIONS],
                    sample_labels=[text for text, _ in QUESTIONS],
                    type="index",
                    layout="gallery",
                    elem_id="examples",
                )
                ui.options = gr.Textbox(
                    label="Answer options, one per line (multiple choice)",
                    lines=1,
                    max_lines=6,
                    max_length=2000,
                    elem_id="options",
                )
                with gr.Accordion("What if? Other patches, the same question", open=False, elem_id="what-if"):
                    with gr.Row():
                        ui.k = gr.Slider(FEWEST, MOST, value=32, step=8, label="Patches", min_width=140, elem_id="k")
                        ui.selector = gr.Dropdown(
                            ["learned", *SELECTORS],
                            value="learned",
                            label="Selector",
                            min_width=140,
                            elem_id="selector",
                        )
                    ui.picked = gr.Markdown("Pinned: 0 · dropped: 0", elem_id="picked")
                    with gr.Row():
                        ui.again = gr.Button("Ask again", variant="primary", size="md", min_width=110, elem_id="again")
                        ui.own = gr.Button("Back", size="md", min_width=110, elem_id="own")
                        ui.regions = gr.UploadButton(
                            "QuPath regions",
                            file_types=[".geojson", ".json"],
                            size="md",
                            min_width=110,
                            elem_id="regions",
                        )
                    ui.compare = gr.HTML(elem_id="compare", apply_default_css=False)
                with gr.Accordion("What the generator planted", open=False, visible=False) as ui.secret:
                    ui.planted = gr.Markdown(elem_id="planted")
        gr.Markdown("Research use only, not for diagnosis. Uploads are deleted when the tab is closed.", elem_id="foot")
    return demo, ui


# ---- wiring


def wire(demo: gr.Blocks, ui: SimpleNamespace, allow_paths: bool) -> None:
    """Connect clicks with handlers."""
    single: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1, "api_visibility": "private"}
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    waiting: dict[str, Any] = {"show_progress_on": ui.facts, "api_visibility": "private"}
    first = [ui.token, ui.view, ui.case, ui.chat, ui.answers, ui.compare, ui.secret, ui.facts, ui.question]
    seen = [ui.case, ui.view, ui.facts, ui.secret, ui.planted, ui.examples, ui.asked, ui.mpp, ui.k, ui.alone]

    every: dict[str, Any] = {"trigger_mode": "multiple"}  # also while the same event is still busy with another slide
    sources = [
        ui.phantom.click(open_phantom, None, ui.path, **waiting | every),
        ui.sample.click(open_sample, None, ui.path, **waiting | every),
        ui.upload.upload(open_upload, ui.upload, ui.path, **waiting | every),
        demo.load(open_address, None, ui.path, **quiet),
    ]
    if allow_paths:  # never on a page that others can reach: it would read any image on the server
        sources.append(ui.typed.submit(open_path, ui.typed, ui.path, **waiting | every))
    for trigger in [*[source.success for source in sources], ui.mpp.submit]:
        shown = trigger(show, [ui.path, ui.mpp], first, **quiet | every)
        looked = shown.success(look, [ui.token, ui.path, ui.mpp], seen, **waiting | single | every)
        looked.success(offer, [ui.case, ui.answers], None, **quiet | every)
        looked.success(draw_map, ui.case, ui.view, **quiet | every)
    demo.unload(forget)

    ui.examples.click(take_example, [ui.examples, ui.asked], [ui.question, ui.options], **quiet)
    asked = [
        ui.question.submit(
            add_turn, [ui.question, ui.options, ui.case, ui.chat], [ui.question, ui.options, ui.chat], **quiet
        ),
        ui.chat.retry(retry, [ui.case, ui.chat], [ui.chat, ui.question], **quiet),
        ui.chat.edit(edit, [ui.case, ui.chat], [ui.chat, ui.question], **quiet),
    ]
    ended = [ui.case, ui.chat, ui.answers]
    for event in asked:
        event.success(last_evidence, ended, ui.view, **quiet)
        told = [ui.chat, ui.answers, ui.view, ui.question]
        answered = event.success(reply, ended, told, **quiet | single | every)
        answered.then(end, None, ui.question, **quiet | every)
    ui.question.stop(halt, ui.chat, [ui.chat, ui.question], queue=False, **quiet)  # never behind others
    undone = ui.chat.undo(undo, [ui.chat, ui.answers], [ui.chat, ui.answers, ui.question, ui.options], **quiet)
    for event in (undone, ui.chat.clear(clear, None, [ui.answers, ui.question], **quiet)):
        event.success(offer, [ui.case, ui.answers], None, **quiet)
        event.success(last_evidence, ended, ui.view, **quiet)

    ui.view.picks(take_picks, ui.case, [ui.picks, ui.picked], **quiet)
    ui.view.journal(log_views, None, None, **quiet)
    other = [ui.case, ui.chat, ui.answers, ui.k, ui.selector, ui.picks]
    ui.again.click(ask_again, other, [ui.compare, ui.view], **single, show_progress_on=ui.compare)
    ui.own.click(own_patches, ui.case, [ui.compare, ui.view], **quiet).success(last_evidence, ended, ui.view, **quiet)
    ui.regions.upload(import_regions, [ui.regions, ui.case], ui.view, **quiet)

    shared: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1}
    api(analyze, api_name="analyze", **shared)
    api(ask, api_name="ask", **shared)
    api(evidence, api_name="evidence", **shared)


def build(allow_paths: bool) -> gr.Blocks:
    """The page, wired. allow_paths: offer to open any file of this machine; only for a page nobody else can reach."""
    demo, ui = layout(allow_paths)
    with demo:
        wire(demo, ui, allow_paths)
    return demo.queue(default_concurrency_limit=2)


def launch_settings(host: str, port: int | None, auth: str | None = None, mcp: bool = False) -> dict[str, Any]:
    """How the page is served: to this machine only, without sharing, monitoring or a record of runs.

    auth: name:password, or several of them with commas between
    """
    return {
        "server_name": host,
        "server_port": port,
        "auth": [tuple(pair.split(":", 1)) for pair in auth.split(",")] if auth else None,
        "app_kwargs": {"routes": _slides.routes()},
        "share": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": mcp,
        "run_history": False,
        "enable_monitoring": False,
        "show_error": False,
        "allowed_paths": [],
        "max_file_size": "8gb",
        "footer_links": [],
        "theme": theme(),
        "css": PAGE_CSS.read_text(encoding="utf-8"),
    }


def main() -> int:
    """Serve the app until it is interrupted."""
    on_space = bool(os.environ.get("SPACE_ID"))
    parser = argparse.ArgumentParser(description="Ask a whole-slide image, from the patches that matter.")
    parser.add_argument("--host", default="0.0.0.0" if on_space else "127.0.0.1")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--model", help="folder or hub repository; default $SPARSEWSI_MODEL, else assets/demo-model")
    parser.add_argument("--auth", default=os.environ.get("SPARSEWSI_AUTH"), help="name:password[,name:password ...]")
    parser.add_argument(
        "--log", help="file that views and questions are added to, as JSON lines; default $SPARSEWSI_LOG"
    )
    parser.add_argument(
        "--mcp", action="store_true", help="also serve the API as MCP tools (pip install 'gradio[mcp]')"
    )
    options = parser.parse_args()
    for name, value in (("SPARSEWSI_MODEL", options.model), ("SPARSEWSI_LOG", options.log)):
        if value:
            os.environ[name] = value
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # a service that is stopped leaves no slide behind
    try:
        os.environ.setdefault("GRADIO_TEMP_DIR", str(intake.private_root() / "gradio"))  # uploads start there
        demo = build(allow_paths=options.host in LOOPBACK and not on_space and not options.auth)
        settings = launch_settings(options.host, options.port, options.auth, options.mcp)
        _, address, _ = demo.launch(**settings, quiet=True, prevent_thread_lock=True)
        if demo.mcp_error:  # Gradio would serve the page without
            demo.close(verbose=False)
            raise ValueError("--mcp needs the packages of an extra of Gradio: pip install 'gradio[mcp]'.")
        threading.Thread(target=warm_up, name="warm-up", daemon=True).start()
        print(f"SparseWSI is served at {address}", flush=True)
        demo.block_thread()
    except (ValueError, OSError, ImportError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
