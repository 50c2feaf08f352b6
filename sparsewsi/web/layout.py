"""What is on the page: its parts by name."""

from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from sparsewsi.model.selector import SELECTORS
from sparsewsi.report.answer import name_llm
from sparsewsi.report.case import Case
from sparsewsi.report.phantom import QUESTIONS
from sparsewsi.web.chat import inert
from sparsewsi.web.desk import Desk
from sparsewsi.web.viewer import slide_viewer

FEWEST, MOST = 8, 256  # patches of a what-if


@dataclass(frozen=True, eq=False)
class Page:
    """The parts of the page. The states hold what a session has: values, never an open slide."""

    path: gr.State  # str: the slide that was asked for
    token: gr.State  # str: its name for the viewer
    opened: gr.State  # desk.Opened | None: the slide once it has been analysed
    questions: gr.State  # chat.Questions: those of the chat
    answers: gr.State  # dict[int, Answer]: by their place in the chat
    starters: gr.State  # list of (question, options) to start with
    picks: gr.State  # {"pinned": indices, "dropped": indices}
    phantom: gr.Button
    upload: gr.UploadButton
    sample: gr.Button
    typed_path: gr.Textbox
    mpp: gr.Textbox
    facts: gr.Markdown
    view: gr.HTML
    chat: gr.Chatbot
    question: gr.Textbox
    alone: gr.Markdown
    examples: gr.Dataset
    given_options: gr.Textbox
    k: gr.Slider
    selector: gr.Dropdown
    picked: gr.Markdown
    again: gr.Button
    own: gr.Button
    regions: gr.UploadButton
    compare: gr.HTML
    secret: gr.Accordion
    planted: gr.Markdown


def lay_out(desk: Desk) -> tuple[gr.Blocks, Page]:
    """The page, not wired yet."""
    with gr.Blocks(title="SparseWSI", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as demo:
        states = {
            "path": gr.State(""),
            "token": gr.State(""),
            "opened": gr.State(None),
            "questions": gr.State({}),
            "answers": gr.State({}),
            "starters": gr.State(list(QUESTIONS)),
            "picks": gr.State({"pinned": [], "dropped": []}),
        }
        sources = _lay_out_sources(desk)
        facts = gr.Markdown(state_facts(desk, None), elem_id="facts")
        with gr.Row():
            with gr.Column(scale=3, min_width=320, elem_id="left"):
                view = slide_viewer(elem_id="view")
            with gr.Column(scale=2, min_width=320, elem_id="right"):
                talk = _lay_out_chat()
                other = _lay_out_what_if()
                with gr.Accordion("What the generator planted", open=False, visible=False) as secret:
                    planted = gr.Markdown(elem_id="planted")
        gr.Markdown("Research use only, not for diagnosis. Uploads are deleted when the tab is closed.", elem_id="foot")
    return demo, Page(**states, **sources, facts=facts, view=view, **talk, **other, secret=secret, planted=planted)


def _lay_out_sources(desk: Desk) -> dict:
    with gr.Row(elem_id="sources"):
        gr.Markdown("# SparseWSI", elem_id="title")
        return {
            "phantom": gr.Button(
                "Example: phantom slide", variant="primary", size="md", min_width=190, elem_id="phantom"
            ),
            "upload": gr.UploadButton("Upload a slide", size="md", min_width=130, elem_id="upload"),
            "sample": gr.Button("Fetch CMU-1 (OpenSlide)", size="md", min_width=190, elem_id="sample"),
            "typed_path": gr.Textbox(
                label="Path on this machine",
                placeholder="/slides/case.svs, then Enter",
                max_lines=1,
                visible=desk.allow_paths,
                min_width=220,
                scale=2,
                elem_id="path",
            ),
            "mpp": gr.Textbox(label="Scan µm/px", placeholder="as stated", max_length=12, min_width=120, elem_id="mpp"),
        }


def _lay_out_chat() -> dict:
    return {
        "chat": gr.Chatbot(
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
        ),
        "question": gr.Textbox(
            show_label=False,
            label="Question",
            placeholder="Ask about the slide",
            submit_btn=True,
            max_length=2000,
            elem_id="question",
        ),
        "alone": gr.Markdown(
            "Each question is answered on its own, without those before it.", visible=False, elem_id="alone"
        ),
        "examples": gr.Dataset(
            label="Questions to start with",
            components=[gr.Textbox(visible=False)],
            samples=[[text] for text, _ in QUESTIONS],
            sample_labels=[text for text, _ in QUESTIONS],
            type="index",
            layout="gallery",
            elem_id="examples",
        ),
        "given_options": gr.Textbox(
            label="Answer options, one per line (multiple choice)",
            lines=1,
            max_lines=6,
            max_length=2000,
            elem_id="options",
        ),
    }


def _lay_out_what_if() -> dict:
    with gr.Accordion("What if? Other patches, the same question", open=False, elem_id="what-if"):
        with gr.Row():
            k = gr.Slider(FEWEST, MOST, value=32, step=8, label="Patches", min_width=140, elem_id="k")
            selector = gr.Dropdown(
                ["learned", *SELECTORS], value="learned", label="Selector", min_width=140, elem_id="selector"
            )
        picked = gr.Markdown("Pinned: 0 · dropped: 0", elem_id="picked")
        with gr.Row():
            again = gr.Button("Ask again", variant="primary", size="md", min_width=110, elem_id="again")
            own = gr.Button("Back", size="md", min_width=110, elem_id="own")
            regions = gr.UploadButton(
                "QuPath regions", file_types=[".geojson", ".json"], size="md", min_width=110, elem_id="regions"
            )
        compare = gr.HTML(elem_id="compare", apply_default_css=False)
    return {
        "k": k,
        "selector": selector,
        "picked": picked,
        "again": again,
        "own": own,
        "regions": regions,
        "compare": compare,
    }


def state_facts(desk: Desk, case: Case | None) -> str:
    """The lines that always say what the page shows, and what to doubt in it."""
    if case is not None:
        doubts = " ".join([*filter(None, [case.bag.note]), *case.doubts])
        return inert(case.summary) + (f"\n\n⚠ {inert(doubts)}" if doubts else "")
    if not Path(desk.model_name).is_dir():  # its configuration is on the hub: the page does not wait for that
        return f"No slide open · model {inert(desk.title)}"
    config = desk.config
    model = f"model {desk.title} ({name_llm(config)})"
    return inert(f"No slide open · {model} · encoder {config.encoder} · keeps {config.num_tokens} patches")
