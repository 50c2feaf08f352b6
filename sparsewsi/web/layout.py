"""What is on the page: its parts by name, and the words of its bar."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from sparsewsi.model import limits
from sparsewsi.model.selector import SELECTORS
from sparsewsi.report.case import Case
from sparsewsi.report.phantom import QUESTIONS
from sparsewsi.report.scope import suggest
from sparsewsi.web.cards import choose_slide
from sparsewsi.web.chat import inert
from sparsewsi.web.desk import Desk, Exchange, Left
from sparsewsi.web.limits import MOST_CALLED, MOST_SLIDES
from sparsewsi.web.viewer import slide_viewer

TELL_WRONG = Path(__file__).parent / "viewer" / "wrong.js"
FEWEST, MOST = 8, 256  # patches of a what-if


@dataclass(frozen=True, eq=False)
class Page:
    """The parts of the page. The states hold what a session has: values, never an open slide."""

    asked: gr.State  # handlers.Asked | None: the slides that were asked for
    coming: gr.State  # tuple of desk.CaseSlide: those whose analysis is on its way; None where one failed
    opened: gr.State  # desk.Opened | None: the case, of the slides that have been analysed
    number: gr.State  # int: of the slide that is looked at, from 0
    questions: gr.State  # chat.Questions: those of the chat
    answers: gr.State  # dict[int, Answer]: by their place in the chat
    starters: gr.State  # list of (question, options) to start with
    picks: gr.State  # {"pinned": indices, "dropped": indices}
    next: gr.State  # chat.Question | None: the one that waited for the answer before it, which has come
    waiting: gr.State  # chat.Question | None: typed while the slide was analysed
    aside: gr.State  # what_if.Aside | None: what a what-if has taken the place of
    right: gr.State  # beside.Right | None: what the slide is compared with
    left: gr.State  # desk.Left | None: what a page before this one showed, to be opened again
    facts: gr.HTML
    called: gr.Textbox  # what the reader calls the case: it goes into the report and the session's log
    token: gr.Textbox  # of the slide that a page before this one showed
    lost: gr.HTML
    reopen: gr.Button
    gallery: gr.HTML
    upload: gr.UploadButton
    typed_path: gr.Textbox
    mpp: gr.Textbox
    wrong: gr.HTML
    beside: gr.Checkbox
    view: gr.HTML
    other: gr.HTML
    doubts: gr.HTML
    back: gr.Button  # to the case that the one on the page took the place of
    earlier: gr.HTML
    chat: gr.Chatbot
    next_line: gr.HTML  # which question is asked next
    question: gr.Textbox
    alone: gr.Markdown
    examples: gr.Dataset
    given_options: gr.Textbox
    impression: gr.Textbox
    k: gr.Slider
    selector: gr.Dropdown
    picked: gr.Markdown
    again: gr.Button
    both: gr.Button
    own: gr.Button
    unpick: gr.Button
    regions: gr.UploadButton
    compare: gr.HTML
    secret: gr.Accordion
    planted: gr.Markdown


def lay_out(desk: Desk) -> tuple[gr.Blocks, Page]:
    """The page, not wired yet. page.css puts its parts in their places."""
    with gr.Blocks(title="SparseWSI", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as demo:
        states = {
            "asked": gr.State(None),
            "coming": gr.State(()),
            "opened": gr.State(None),
            "number": gr.State(0),
            "questions": gr.State({}),
            "answers": gr.State({}),
            "starters": gr.State(list(QUESTIONS)),
            "picks": gr.State({"pinned": [], "dropped": []}),
            "next": gr.State(None),
            "waiting": gr.State(None),
            "aside": gr.State(None),
            "right": gr.State(None),
            "left": gr.State(None),
        }
        with gr.Column(elem_id="room"):
            facts, called = _lay_out_bar(desk)
            view, other = slide_viewer(elem_id="view"), slide_viewer(elem_id="other", visible=False)
            talk = _lay_out_chat(desk)
            rest = _lay_out_what_if()
            sources = _lay_out_sources(desk)
    return demo, Page(**states, facts=facts, called=called, view=view, other=other, **sources, **talk, **rest)


def _lay_out_bar(desk: Desk) -> tuple[gr.HTML, gr.Textbox]:
    with gr.Row(elem_id="bar"):
        gr.HTML(
            "<span class='brand'>SparseWSI</span>"
            "<button type='button' id='open-menu' aria-expanded='false' aria-controls='sources'>Open</button>"
            "<button type='button' id='add-slide' aria-controls='sources'>Add a slide</button>",
            elem_id="brand",
        )
        called = gr.Textbox(
            show_label=False,
            label="Name of the case, for the report",
            placeholder="Name this case",
            max_lines=1,
            max_length=MOST_CALLED,
            container=False,
            min_width=120,
            elem_id="called",
        )
        facts = gr.HTML(state_facts(desk, None), elem_id="facts")
        gr.HTML("<span class='use'>Research use only, not for diagnosis</span>", elem_id="use")
    return facts, called


def _lay_out_sources(desk: Desk) -> dict:
    with gr.Column(elem_id="sources"):
        token = gr.Textbox(visible=False)
        with gr.Row(elem_id="lost"):
            lost = gr.HTML(padding=False)
            reopen = gr.Button("Open again", size="sm", visible=False, min_width=110, elem_id="reopen")
        beside = gr.Checkbox(label="Add to the case that is open", value=False, container=False, elem_id="beside")
        gallery = choose_slide(elem_id="gallery")
        upload = gr.UploadButton(
            "Drop slides anywhere, or choose files", file_count="multiple", size="md", elem_id="upload"
        )
        with gr.Row(elem_id="by-path"):
            typed_path = gr.Textbox(
                label="Path on this machine",
                placeholder="/slides/case.svs or https://….dzi, then Enter",
                lines=1,
                max_lines=6,
                visible=desk.allow_paths,
                min_width=220,
                scale=3,
                elem_id="path",
            )
            mpp = gr.Textbox(
                label="Scan µm/px",
                placeholder="if not stated",
                max_length=12,
                min_width=150,
                elem_id="mpp",
            )
        wrong = gr.HTML(elem_id="wrong", padding=False, js_on_load=TELL_WRONG.read_text(encoding="utf-8"))
        gr.HTML(
            "<p class='small'>SVS, NDPI, MRXS, DICOM and what else OpenSlide reads; formats of several files as one "
            f"ZIP. Several files, or paths one a line, are one case of up to {MOST_SLIDES} slides. Uploads are read "
            "by this server alone and deleted when the tab is closed.</p>"
        )
    return {
        "token": token,
        "lost": lost,
        "reopen": reopen,
        "beside": beside,
        "gallery": gallery,
        "upload": upload,
        "typed_path": typed_path,
        "mpp": mpp,
        "wrong": wrong,
    }


def _lay_out_chat(desk: Desk) -> dict:
    with gr.Column(elem_id="ask"):
        doubts = gr.HTML(elem_id="doubts")
        back = gr.Button("Back", size="sm", visible=False, elem_id="back")
        earlier = gr.HTML(elem_id="earlier", padding=False)
        gr.HTML(
            "<p class='small'>Your chat is hidden, not lost: it comes back when this is left. Letters of foci are now "
            "those of these patches.</p>",
            elem_id="hidden-chat",
            padding=False,
        )
        chat = gr.Chatbot(
            label="Answers",
            show_label=False,
            height="100%",
            autoscroll=False,  # it would scroll the answer out of sight when its pictures come; viewer/tabs.js
            sanitize_html=True,  # what a model writes is inert() besides
            allow_tags=False,
            latex_delimiters=[],
            buttons=["copy"],
            feedback_options=None,
            editable="user",
            placeholder=tell_scope(desk),
            elem_id="chat",
        )
        examples = gr.Dataset(
            label="Tap a question to ask it",
            components=[gr.Textbox(visible=False)],
            samples=[[text] for text, _ in QUESTIONS],
            sample_labels=[text for text, _ in QUESTIONS],
            type="index",
            layout="gallery",
            elem_id="examples",
        )
        next_line = gr.HTML(elem_id="next")
        question = gr.Textbox(
            show_label=False,
            label="Question",
            placeholder="Ask about the slide",
            submit_btn=True,
            lines=1,
            max_lines=6,
            elem_id="question",
        )
        given_options = gr.Textbox(
            show_label=False,
            label="Answer options, one per line",
            placeholder="Answer options, one per line, if you have any",
            lines=1,
            max_lines=6,
            elem_id="options",
        )
        impression = gr.Textbox(
            show_label=False,
            label="Your own impression first",
            placeholder="Your own impression first, if you like",
            lines=1,
            max_lines=4,
            max_length=2000,
            elem_id="impression",
        )
        alone = gr.Markdown("Each question is answered on its own.", visible=False, elem_id="alone")
        gr.HTML(tell_notice(desk), elem_id="notice")
        with gr.Accordion("What the generator planted", open=False, visible=False, elem_id="secret") as secret:
            planted = gr.Markdown(elem_id="planted")
    return {
        "doubts": doubts,
        "back": back,
        "earlier": earlier,
        "chat": chat,
        "next_line": next_line,
        "question": question,
        "alone": alone,
        "examples": examples,
        "given_options": given_options,
        "impression": impression,
        "secret": secret,
        "planted": planted,
    }


def _lay_out_what_if() -> dict:
    with gr.Column(elem_id="what-if"):
        gr.HTML(
            "<p class='small'>Ask the last question once more, from other patches of the same slide; or look at both "
            "side by side, where each question goes to both.</p>"
        )
        k = gr.Slider(FEWEST, MOST, value=32, step=8, label="Patches", min_width=140, elem_id="k")
        selector = gr.Dropdown(
            ["learned", *SELECTORS], value="learned", label="Chosen by", min_width=140, elem_id="selector"
        )
        with gr.Row():
            picked = gr.Markdown("Pinned: 0 · dropped: 0", elem_id="picked")
            unpick = gr.Button("Clear picks", size="sm", min_width=90, elem_id="unpick")
        with gr.Row():
            again = gr.Button("Ask again", variant="primary", size="md", min_width=110, elem_id="again")
            both = gr.Button("Side by side", size="md", min_width=110, elem_id="both")
            own = gr.Button("Back", size="md", min_width=110, elem_id="own")
            regions = gr.UploadButton(
                "QuPath regions", file_types=[".geojson", ".json"], size="md", min_width=110, elem_id="regions"
            )
        compare = gr.HTML(elem_id="compare", apply_default_css=False)
    return {
        "k": k,
        "selector": selector,
        "picked": picked,
        "unpick": unpick,
        "again": again,
        "both": both,
        "own": own,
        "regions": regions,
        "compare": compare,
    }


# ---- the words of the bar, and what stands once beside all answers


def state_facts(desk: Desk, case: Case | None, doing: str = "", wrong: bool = False, coming: int = 0) -> str:
    """HTML of the bar: the slide, what was kept of it, the model. The pointer on it shows the whole line.

    doing: of a slide that is not analysed: its name and what happens to it. coming: slides of the case that are not
    analysed yet: what is kept so far is not what will be
    """
    if doing:
        return f"<div class='facts'><h1{' class=wrong' if wrong else ''}>{html.escape(doing)}</h1></div>"
    if case is None:
        told = f"model {desk.title}"
        if Path(desk.model_name).is_dir():  # else its configuration is on the hub: the page does not wait for that
            told += f" · keeps {desk.config.num_tokens} patches"
        return f"<div class='facts'><span>{html.escape(told)}</span></div>"
    kept, total = len(case.selection.indices), case.selection.num_patches
    parts = [f"{kept:,} of {total:,} patches", f"read at {case.bag.mpp:.3g} µm/px" if case.bag.mpp else "scale unknown"]
    if coming:
        parts[0] += f" so far; {coming} more slide{'s are' if coming > 1 else ' is'} being analysed"
    told = "".join(f"<span>{html.escape(part)}</span>" for part in [*parts, f"model {desk.title}"])
    name = f"Case of {len(case.bag.parts)} slides" if case.bag.parts else case.bag.slide
    return (
        f"<div class='facts' title='{html.escape(case.summary, quote=True)}'><h1>{html.escape(name)}</h1>{told}</div>"
    )


def tell_doubts(case: Case | None) -> str:
    """HTML of what a reader should know before believing an answer about this slide, gravest first."""
    doubts = [] if case is None else [*case.doubts, *filter(None, [case.bag.note])]
    if not doubts:
        return ""
    first, *more = map(html.escape, doubts)
    below = "".join(f"<p>{doubt}</p>" for doubt in more)
    count = f"<span class='count'> (and {len(more)} more)</span>" if more else ""  # where it is folded
    return f"<details open><summary>⚠ {first}{count}</summary>{below}</details>"


def tell_earlier(exchanges: Sequence[Exchange]) -> str:
    """HTML of what was asked and answered while the case had other slides, folded: none of it is about these."""
    if not exchanges:
        return ""
    many = f"{len(exchanges)} answer{'s' if len(exchanges) > 1 else ''}"
    rows = "".join(
        f"<dt>{html.escape(asked)}</dt><dd>{html.escape(answered)} <small>({html.escape(about)})</small></dd>"
        for about, asked, answered in exchanges
    )
    told = f"{many} about the slides of before; with other slides the chat starts anew"
    return f"<details><summary>{told}</summary><dl>{rows}</dl></details>"


def offer_back(left: Left | None) -> gr.Button:
    """The button back to the case before, hidden if there was none."""
    if left is None or not left.slides:
        return gr.Button(visible=False)
    names = [one.props.get("name", "") for one in left.slides]
    name = left.called or (names[0] if len(names) == 1 else f"the case of {len(names)} slides")
    asked = sum(message["role"] == "user" for message in left.talk[0])
    chat = f" and its {asked} question{'' if asked == 1 else 's'}" if asked else ""
    return gr.Button(f"Back to {name}{chat}", visible=True)


def tell_scope(desk: Desk) -> str:
    """Markdown of what the model can be asked, for a chat that is empty; only where its files are at hand."""
    offered = suggest(limits.load(desk.model_name)) if Path(desk.model_name).is_dir() else []
    lines = "".join(f"- {inert(one.text)} <small>{inert(one.told)}</small>\n" for one in offered)
    asked = f"\n\nOf slides that it had not seen, this model answered:\n\n{lines}" if lines else ""
    return f"<span class='no-slide'>**Open a slide, then ask about it.**</span>{asked}"


def tell_about(caption: str) -> str:
    """HTML of what was published about a slide, folded: a reader may want to look first."""
    return (
        f"<details class='about'><summary>What was published about this slide</summary>{html.escape(caption)}</details>"
    )


def tell_notice(desk: Desk) -> str:
    """HTML of the sentence that holds for every answer: once, not under each; and who reads, and what is sent where."""
    reading = f"<p class='small'>{html.escape(desk.reading)}</p>" if desk.reading else ""
    if not Path(desk.model_name).is_dir():
        return f"<details><summary>Research use only, not for diagnosis.</summary></details>{reading}"
    use, _, note = desk.notice.partition(". ")
    return f"<details><summary>{html.escape(use)}.</summary>{html.escape(note)}</details>{reading}"
