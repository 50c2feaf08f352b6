"""The app: open a slide, look at the patches that were selected, ask about it.

python app.py [--host 127.0.0.1] [--port 7860] [--model assets/demo-model]

Read it from the bottom: `layout` says what is on the page, `wire` what happens on a click; the handlers above them call
sparsewsi. A session holds a Bag and a Selection (CPU tensors), never an open slide.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import threading
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import gradio.themes
import numpy as np
from PIL import Image

from sparsewsi import export, phantom, plots
from sparsewsi.bag import Bag, extract_bag
from sparsewsi.config import SparseWSIConfig
from sparsewsi.encoders import PatchEncoder, load_encoder
from sparsewsi.model import Selection, SparseWSI
from sparsewsi.prompt import format_question
from sparsewsi.slide import open_slide

DEFAULT_MODEL = Path(__file__).resolve().parent / "assets" / "demo-model"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
THUMBNAIL = 1400  # px, longer side

SAMPLE_URL = "https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/CMU-1-Small-Region.svs"
SAMPLE_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
SAMPLE_BYTES = 1_938_955

# Questions to start with: text, options. The wording is the one the demo model was trained on.
QUESTIONS = (
    ("Describe this slide.", ()),
    ("Does this slide contain carcinoma?", ("Yes", "No")),
    ("Which tissue makes up most of this slide?", ("fibrous stroma", "smooth muscle", "fat", "colon mucosa")),
)
PRESENT_QUESTION = "Which of these tissues is present in this slide?"
KIND_WORDS = {
    "stroma_fibrous": "fibrous stroma",
    "smooth_muscle": "smooth muscle",
    "adipose": "fat",
    "normal_mucosa_colon": "colon mucosa",
    "lymphoid": "lymphoid tissue",
    "background": "glass",
}


@dataclass(frozen=True, eq=False)
class Opened:
    """What a session keeps of its slide."""

    bag: Bag
    selection: Selection


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
    import torch

    few = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    plots.umap_coords(few, Selection(torch.arange(4), few[:, 0].clone(), few[:4], len(few)))


def gpu(function: Callable) -> Callable:
    """spaces.GPU on a Hugging Face Space, the function itself elsewhere."""
    if os.environ.get("SPACE_ID") and importlib.util.find_spec("spaces"):
        import spaces  # type: ignore[import-not-found]

        return spaces.GPU(function)
    return function


# ---- where slides come from


@functools.cache
def private_root() -> Path:
    """A folder that only this user can read (0700), removed when the process ends."""
    root = Path(tempfile.mkdtemp(prefix="sparsewsi-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def private_folder(session: str | None) -> Path:
    """Where a session's upload lies. The session's name comes from the browser, so only its digest becomes a path."""
    return private_root() / hashlib.sha256(str(session).encode()).hexdigest()[:32]


def keep_upload(file: str | Path, session: str | None) -> Path:
    """Move an upload to the session's private folder, in place of an earlier one; its name is not kept."""
    folder = private_folder(session)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    suffix = Path(file).suffix if re.fullmatch(r"\.\w{1,8}", Path(file).suffix) else ""
    return Path(shutil.move(file, folder / f"slide{suffix}"))


def fetch_sample(
    folder: Path, url: str = SAMPLE_URL, sha256: str = SAMPLE_SHA256, most: int = 2 * SAMPLE_BYTES, timeout: float = 20
) -> Path:
    """OpenSlide's CMU-1-Small-Region.svs (CC0), fetched once into a folder, checked and kept there.

    Raises ValueError with one sentence when it cannot be had, or is not the file it should be.
    """
    path = folder / "CMU-1-Small-Region.svs"
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            data = answer.read(most)
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"OpenSlide's sample slide could not be fetched from this machine ({reason}).") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("What came in place of OpenSlide's sample slide is another file, so it was thrown away.")
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    partial.write_bytes(data)
    partial.replace(path)
    return path


def cache_folder() -> Path:
    """Where what was fetched or generated is kept: $SPARSEWSI_CACHE, else ~/.cache/sparsewsi."""
    return Path(os.environ.get("SPARSEWSI_CACHE") or Path.home() / ".cache" / "sparsewsi")


# ---- words


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


def notice() -> str:
    """The sentence under every answer."""
    with_config = SparseWSIConfig.load(model_name()) if Path(model_name()).is_dir() else loaded()[0].config
    return export.notice(with_config)


def facts(opened: Opened | None) -> str:
    """The line that always says what the page shows."""
    name = Path(model_name()).resolve().name if Path(model_name()).is_dir() else model_name()
    if opened is not None:
        return export.summary(opened.bag, opened.selection, loaded()[0].config, name)
    if not Path(model_name()).is_dir():
        return f"No slide open · model {name}"
    config = SparseWSIConfig.load(model_name())
    model = f"model {name} ({export.llm_name(config)})"
    return f"No slide open · {model} · encoder {config.encoder} · keeps {config.num_tokens} patches"


def words(kind: str) -> str:
    """A kind of tissue as people write it."""
    return KIND_WORDS.get(kind, kind.replace("_", " "))


def truth_of(path: str) -> phantom.GroundTruth | None:
    """What the generator planted, for a phantom; None for a real slide."""
    return phantom.load_truth(path) if phantom.truth_path(path).is_file() else None


def planted(truth: phantom.GroundTruth | None, opened: Opened) -> str:
    """The ground truth in a few lines, and what the selected patches show of it."""
    if truth is None:
        return ""
    bag, selection = opened.bag, opened.selection
    foci = Counter(needle.kind for needle in truth.needles)
    found = Counter(truth.label_at(bag.coords[selection.indices].numpy(), bag.patch_size).tolist())
    lines = [
        f"- Most of the tissue: **{words(truth.dominant)}**",
        f"- Hidden foci: **{', '.join(f'{words(kind)} ({count})' for kind, count in sorted(foci.items()))}**",
        f"- The {len(selection.indices)} selected patches: "
        + ", ".join(f"{count} {words(kind)}" for kind, count in found.most_common()),
    ]
    return "\n".join(lines)


def questions_for(truth: phantom.GroundTruth | None) -> list[tuple[str, tuple[str, ...]]]:
    """Questions to start with; of a phantom also which of four tissues it holds."""
    if truth is None or not truth.present:
        return list(QUESTIONS)
    absent = [kind for kind in phantom.NEEDLES if kind not in truth.present][:3]
    return [*QUESTIONS, (PRESENT_QUESTION, tuple(sorted(words(kind) for kind in (truth.present[0], *absent))))]


def read_mpp(text: str) -> float | None:
    """um/px from the field; None when it is empty. Raises ValueError for what is no resolution."""
    if not text.strip():
        return None
    try:
        return float(text.strip().replace(",", "."))
    except ValueError:
        raise ValueError(f"The scan resolution is a number of µm/px such as 0.25, got {text.strip()!r}.") from None


def read_turn(text: str) -> tuple[str, list[str]]:
    """The question and the options of a user's turn as format_question wrote it."""
    options = re.findall(r"^[A-Z]\. (.+)$", text, re.MULTILINE)
    return re.sub(r"\n[A-Z]\. .+$", "", text, flags=re.MULTILINE), options


def text_of(message: dict[str, Any]) -> str:
    """The words of a chat message without the notice: its first block."""
    content = message["content"]
    first = content if isinstance(content, str) else content[0] if content else ""
    return first if isinstance(first, str) else str(first.get("text", ""))


# ---- handlers


def open_phantom(progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
    progress(None, desc="Opening the phantom (generated on first use)")
    with sentences():
        return str(phantom.example_slide())


def open_sample(progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
    progress(None, desc="Fetching OpenSlide's CMU-1-Small-Region (CC0)")
    with sentences():
        return str(fetch_sample(cache_folder()))


def open_upload(file: str, request: gr.Request) -> str:
    with sentences():
        return str(keep_upload(file, request.session_hash))


def open_path(text: str) -> str:
    with sentences():
        open_slide(text.strip()).close()
        return str(Path(text.strip()).expanduser())


def forget(request: gr.Request) -> None:
    """The tab was closed: delete what was uploaded in it."""
    shutil.rmtree(private_folder(request.session_hash), ignore_errors=True)


@gpu
def look(path: str, resolution: str, progress: gr.Progress = gr.Progress()) -> tuple:  # noqa: B008
    """Encode the slide and select; returns what the page shows of it, an empty chat and an empty resolution.

    The resolution was this slide's: left in its field it would be taken for the next one's.
    """
    with sentences():
        slide_mpp = read_mpp(resolution)
        opened = encode(path, slide_mpp, progress)
        progress(1, desc="Drawing")
        overview, heat, patches = pictures(path, slide_mpp, opened)
        truth = truth_of(path)
    asked = questions_for(truth)
    samples = gr.Dataset(samples=[[text] for text, _ in asked], sample_labels=[text for text, _ in asked])
    secret = gr.Accordion(visible=truth is not None, open=False)
    return (
        opened,
        overview,
        heat,
        patches,
        None,
        facts(opened),
        secret,
        planted(truth, opened),
        samples,
        asked,
        [],  # the chat: old answers are another slide's
        None,
        "",
    )


def encode(path: str, slide_mpp: float | None, progress: gr.Progress) -> Opened:
    """Slide -> bag -> selection, saying what it is doing."""
    if not path:
        raise ValueError("Open a slide first.")
    progress(None, desc="Loading the model")
    model, encoder = loaded()
    progress(None, desc="Finding tissue")

    def encoded(done: int, total: int) -> None:
        progress((done, total), desc="Encoding patches", unit="patches")

    bag = extract_bag(
        path,
        encoder,
        mpp=model.config.mpp,
        patch_size=model.config.patch_size,
        slide_mpp=slide_mpp,
        progress=encoded,
    )
    progress(1, desc="Selecting patches")
    return Opened(bag, model.select(bag))


def pictures(
    path: str, slide_mpp: float | None, opened: Opened
) -> tuple[Image.Image, Image.Image, list[tuple[np.ndarray, str]]]:
    """Overlay, heat map, and the selected patches with rank and score."""
    bag, selection = opened.bag, opened.selection
    with open_slide(path, slide_mpp=slide_mpp) as slide:
        thumbnail, scale = slide.thumbnail(THUMBNAIL)
        patches = plots.patch_pictures(slide, bag, selection)
    scores = selection.scores[export.by_rank(selection)].tolist()
    captions = [f"#{rank} · {score:.2f}" for rank, score in enumerate(scores, 1)]
    overview = plots.overlay(thumbnail, scale, bag, selection)
    return overview, plots.heat_map(thumbnail, scale, bag, selection), list(zip(patches, captions))


def draw_map(opened: Opened) -> Image.Image:
    with sentences():
        return plots.umap_plot(plots.umap_coords(opened.bag.features, opened.selection), opened.selection)


def take_example(index: int, asked: list) -> tuple[str, str]:
    text, options = asked[index]
    return text, "\n".join(options)


def add_turn(question: str, options: str, opened: Opened | None, chat: list) -> tuple:
    """Put the question into the chat and give the box back empty, with a Stop button while the answer comes."""
    if opened is None:
        raise gr.Error("Open a slide first; the question stays in the box.", print_exception=False)
    if not question.strip():
        raise gr.Error("Write a question first.", print_exception=False)
    with sentences():
        text = format_question(question.strip(), [line.strip() for line in options.splitlines() if line.strip()])
    return busy(value=""), "", [*chat, {"role": "user", "content": text}], None


@gpu
def reply(opened: Opened, chat: list) -> Iterator[tuple[Any, Any]]:
    """Stream the answer to the last question; with options, their probabilities follow."""
    with sentences():
        turns = [{"role": m["role"], "content": text_of(m)} for m in chat if m["role"] in ("user", "assistant")]
        model, text = loaded()[0], ""
        for piece in model.answer(opened.selection, turns):
            text += piece
            yield [*chat, {"role": "assistant", "content": [text, notice()]}], gr.skip()
        question, options = read_turn(turns[-1]["content"])
        if options:
            yield gr.skip(), dict(zip(options, model.option_probs(opened.selection, question, options).tolist()))


def busy(**changes: Any) -> Any:
    return gr.Textbox(submit_btn=False, stop_btn="Stop", **changes)


def idle() -> Any:
    return gr.Textbox(submit_btn=True, stop_btn=False)


def back_to_question(chat: list) -> list:
    """The chat up to and with the user's last turn."""
    last = max(i for i, message in enumerate(chat) if message["role"] == "user")
    return chat[: last + 1]


def retry(chat: list) -> tuple[list, Any]:
    """Ask the last question again."""
    return back_to_question(chat), busy()


def undo(chat: list) -> tuple[list, str, str]:
    """Take back the last question; its words return to the boxes."""
    kept = back_to_question(chat)
    question, options = read_turn(text_of(kept[-1]))
    return kept[:-1], question, "\n".join(options)


def edit(chat: list, change: gr.EditData) -> tuple[list, Any]:
    """Ask an edited question in place of the old one and of what came after it."""
    place = change.index[0] if isinstance(change.index, (list, tuple)) else change.index
    return [*chat[:place], {"role": "user", "content": change.value}], busy()


# ---- layout

CSS = """
#title h1 { margin-bottom: 0; }
#title p { color: var(--body-text-color-subdued); margin-top: 2px; }
#sources { align-items: flex-end; gap: 10px; }
#sources button { min-height: 44px; white-space: nowrap; }
#sources .form { border: none; background: transparent; box-shadow: none; gap: 10px; }
#sources .block { padding: 0; border: none; background: transparent; }
#facts { border-left: 3px solid var(--primary-500); padding: 2px 12px; }
#facts p { font-size: 0.9rem; margin: 0; }
#map img { background: white; }
#patches .grid-wrap { max-height: none; height: auto; overflow: visible; padding-top: 34px; }
#patches .grid-container { grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); gap: 6px; }
#patches .grid-container .thumbnail-item { height: auto; aspect-ratio: auto; }
#patches .caption-label { position: static; display: block; max-width: none; text-align: center; padding: 2px; }
#chat .bot .thought:not(:first-child) { font-size: 0.8rem; font-style: italic; opacity: 0.8; }
@media (max-width: 720px) { /* on a telephone: slide, answers, map, then the patches */
  #left { display: contents; }
  #left > *:last-child { order: 5; }
}
.toast-wrap { top: auto !important; bottom: 16px; } /* never over the field that it asks to fill in */
[data-testid="status-tracker"]:has(.error) { display: none; } /* the message says what is wrong; nothing is covered */
"""


def picture(words_for_it: str, name: str, height: int | None) -> gr.Image:
    """A picture without a label on top of it; what it shows is said by its tab or title, and to screen readers."""
    return gr.Image(
        label=words_for_it,
        alt_text=words_for_it,
        show_label=False,
        height=height,
        interactive=False,
        buttons=["fullscreen"],
        elem_id=name,
    )


def layout(allow_paths: bool) -> tuple[gr.Blocks, SimpleNamespace]:
    """The page and its parts by name."""
    ui = SimpleNamespace()
    with gr.Blocks(title="SparseWSI", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as demo:
        ui.path, ui.opened, ui.asked = gr.State(""), gr.State(None), gr.State(list(QUESTIONS))
        gr.Markdown("# SparseWSI\nAsk a whole-slide image, from the patches that matter.", elem_id="title")
        with gr.Row(elem_id="sources"):
            ui.phantom = gr.Button(
                "Example: phantom slide", variant="primary", size="md", min_width=200, elem_id="phantom"
            )
            ui.upload = gr.UploadButton("Upload a slide", size="md", min_width=140, elem_id="upload")
            ui.sample = gr.Button("Fetch CMU-1 (OpenSlide)", size="md", min_width=200, elem_id="sample")
            ui.typed = gr.Textbox(
                label="Path on this machine",
                placeholder="/slides/case.svs, then Enter",
                visible=allow_paths,
                min_width=240,
                scale=2,
                elem_id="path",
            )
            ui.mpp = gr.Textbox(
                label="Scan µm/px",
                placeholder="as stated",
                max_length=12,
                min_width=130,
                elem_id="mpp",
            )
        ui.facts = gr.Markdown(facts(None), elem_id="facts")
        with gr.Row():
            with gr.Column(scale=3, min_width=320, elem_id="left"):
                with gr.Tabs():
                    with gr.Tab("Selected patches"):
                        ui.overview = picture("The slide with its selected patches, numbered by rank", "overview", 590)
                    with gr.Tab("All scores"):
                        ui.heat = picture("The slide with every patch coloured by its score", "heat", 590)
                ui.patches = gr.Gallery(
                    label="Selected patches: rank · score (click to enlarge)",
                    columns=8,
                    object_fit="contain",
                    format="png",
                    buttons=["fullscreen"],
                    interactive=False,
                    elem_id="patches",
                )
            with gr.Column(scale=2, min_width=320):
                ui.chat = gr.Chatbot(
                    label="Answers",
                    height=340,
                    show_label=False,
                    render_markdown=False,  # what a model writes is shown as text, never run as HTML or images
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
                ui.probs = gr.Label(
                    label="Probability of each option", show_heading=False, visible=False, elem_id="probs"
                )
                with gr.Accordion("What the generator planted", open=False, visible=False) as ui.secret:
                    ui.planted = gr.Markdown(elem_id="planted")
                ui.map = picture("Map of the features: selected against discarded patches", "map", None)
        gr.Markdown("Research use only, not for diagnosis. Uploads are deleted when the tab is closed.", elem_id="foot")
    return demo, ui


# ---- wiring


def wire(demo: gr.Blocks, ui: SimpleNamespace, allow_paths: bool) -> None:
    """Connect clicks with handlers."""
    alone: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1, "api_visibility": "private"}
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    seen = [ui.opened, ui.overview, ui.heat, ui.patches, ui.map, ui.facts, ui.secret, ui.planted, ui.examples, ui.asked]
    seen += [ui.chat, ui.probs, ui.mpp]

    sources = [
        ui.phantom.click(open_phantom, None, ui.path, show_progress_on=ui.overview, **alone),
        ui.sample.click(open_sample, None, ui.path, show_progress_on=ui.overview, **alone),
        ui.upload.upload(open_upload, ui.upload, ui.path, show_progress_on=ui.overview, **alone),
    ]
    if allow_paths:  # never on a page that others can reach: it would read any image on the server
        sources.append(ui.typed.submit(open_path, ui.typed, ui.path, **alone))
    sources = [source.success for source in sources] + [ui.mpp.submit]
    for trigger in sources:
        shown = trigger(look, [ui.path, ui.mpp], seen, show_progress_on=ui.overview, **alone)
        shown.success(draw_map, ui.opened, ui.map, show_progress_on=ui.map, api_visibility="private")
    demo.unload(forget)

    ui.examples.click(take_example, [ui.examples, ui.asked], [ui.question, ui.options], **quiet)
    asked = [
        ui.question.submit(
            add_turn,
            [ui.question, ui.options, ui.opened, ui.chat],
            [ui.question, ui.options, ui.chat, ui.probs],
            **quiet,
        ),
        ui.chat.retry(retry, ui.chat, [ui.chat, ui.question], **quiet),
        ui.chat.edit(edit, ui.chat, [ui.chat, ui.question], **quiet),
    ]
    answers = [event.success(reply, [ui.opened, ui.chat], [ui.chat, ui.probs], **alone) for event in asked]
    for answer in answers:
        answer.then(idle, None, ui.question, **quiet)
    ui.question.stop(idle, None, ui.question, cancels=answers, **quiet)
    ui.chat.undo(undo, ui.chat, [ui.chat, ui.question, ui.options], **quiet)
    ui.probs.change(lambda probs: gr.Label(visible=bool(probs)), ui.probs, ui.probs, **quiet)


def build(allow_paths: bool) -> gr.Blocks:
    """The page, wired. allow_paths: offer to open any file of this machine; only for a page nobody else can reach."""
    demo, ui = layout(allow_paths)
    with demo:
        wire(demo, ui, allow_paths)
    return demo.queue(default_concurrency_limit=2)


def theme() -> gradio.themes.Base:
    """Quiet colours, labels without a ground, and fonts of the visitor's machine: no request to a font server."""
    soft = gradio.themes.Soft(
        primary_hue="teal", secondary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"]
    )
    return soft.set(
        body_background_fill="*neutral_50",
        block_border_width="1px",
        block_border_color="*neutral_200",
        input_border_width="1px",
        input_border_color="*neutral_300",
        button_secondary_border_color="*neutral_300",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_padding="0 0 2px 0",
        block_title_text_color="*body_text_color_subdued",
        block_title_text_color_dark="*body_text_color_subdued",
        block_title_text_weight="500",
        block_label_text_color="*body_text_color_subdued",
        block_label_text_color_dark="*body_text_color_subdued",
        block_label_background_fill="*block_background_fill",
        block_label_background_fill_dark="*block_background_fill",
        body_text_color_subdued="*neutral_600",
    )


def launch_settings(host: str, port: int | None) -> dict[str, Any]:
    """How the page is served: to this machine only, without sharing, monitoring or a record of runs."""
    return {
        "server_name": host,
        "server_port": port,
        "share": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "run_history": False,
        "enable_monitoring": False,
        "show_error": False,
        "allowed_paths": [],
        "max_file_size": "8gb",
        "footer_links": [],
        "theme": theme(),
        "css": CSS,
    }


def main() -> int:
    """Serve the app until it is interrupted."""
    on_space = bool(os.environ.get("SPACE_ID"))
    parser = argparse.ArgumentParser(description="Ask a whole-slide image, from the patches that matter.")
    parser.add_argument("--host", default="0.0.0.0" if on_space else "127.0.0.1")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--model", help="folder or hub repository; default $SPARSEWSI_MODEL, else assets/demo-model")
    options = parser.parse_args()
    if options.model:
        os.environ["SPARSEWSI_MODEL"] = options.model
    try:
        os.environ.setdefault("GRADIO_TEMP_DIR", str(private_root() / "gradio"))  # pictures of slides are private too
        demo = build(allow_paths=options.host in LOOPBACK and not on_space)
        threading.Thread(target=warm_up, name="warm-up", daemon=True).start()
        _, address, _ = demo.launch(**launch_settings(options.host, options.port), quiet=True, prevent_thread_lock=True)
        print(f"SparseWSI is served at {address}", flush=True)
        demo.block_thread()
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
