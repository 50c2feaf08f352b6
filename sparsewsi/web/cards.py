"""The slides that an empty page offers: two examples, and public slides that their own server sends on a click."""

import base64
import html
from pathlib import Path
from typing import Any

import gradio as gr

from sparsewsi.web.gallery import read_gallery

SCRIPT = Path(__file__).parent / "viewer" / "gallery.js"
DRAWN = Path(__file__).parent / "viewer" / "cards"  # python -m benchmarks.pictures --cards draws them, none is a scan
TISSUE = {  # the drawing of an organ's card; it tells nothing of the diagnosis
    "adrenal gland": "lymphoid",
    "breast": "adipose",
    "colon": "normal_mucosa_colon",
    "duodenum": "normal_mucosa_colon",
    "esophagus": "smooth_muscle",
    "pituitary gland": "lymphoid",
    "stomach": "normal_mucosa_colon",
}
EXAMPLES = (  # name, as examples.EXAMPLES has it; its drawing; title; what it teaches
    ("phantom", "phantom", "Phantom", "Computer-generated, its content is known: see whether the answer is right."),
    (
        "cmu-1",
        "stroma_fibrous",
        "CMU-1, small region",
        "A real scan (OpenSlide, CC0), fetched on click: see what the model says of it.",
    ),
)


def choose_slide(**settings: Any) -> gr.HTML:
    """The cards. Its event is `choose` ({name}): one of examples.EXAMPLES or of the gallery."""
    examples = "".join(
        f"<button type='button' class='slide-card' id='{name}' data-choose='{name}'>"
        f"<span class='picture {drawn}' aria-hidden='true'></span><b>{title}</b><span>{teaches}</span></button>"
        for name, drawn, title, teaches in EXAMPLES
    )
    samples = read_gallery()
    public = "".join(
        f"<button type='button' class='sample' data-choose='{sample.name}'>"
        f"<i class='drawn {TISSUE.get(sample.organ, 'stroma_fibrous')}' aria-hidden='true'></i>"
        f"<b>{html.escape(sample.title)}</b><span>{html.escape(sample.teaches)}</span></button>"
        for sample in samples
    )
    sources = html.escape("; ".join(dict.fromkeys(f"{sample.source} ({sample.licence})" for sample in samples)))
    return gr.HTML(
        "<h1>Ask a whole slide, and see what the answer rests on</h1>"
        "<p class='lead'>Of the patches of a slide the model keeps 32 and answers from nothing else. "
        "<button type='button' class='link' data-tour>Show me in 30 seconds</button></p>"
        f"<div class='cards'>{examples}</div>"
        f"<details class='public'><summary>{len(samples)} public slides, read from their own server</summary>"
        f"<div class='samples'>{public}</div>"
        f"<p class='small'>The pictures here are drawn by a computer. {sources}</p></details>{_style()}",
        js_on_load=SCRIPT.read_text(encoding="utf-8"),
        apply_default_css=False,
        padding=False,
        **settings,
    )


def _style() -> str:
    """A rule for each drawing, which holds it: one that many cards have is sent once."""
    rules = []
    for path in sorted(DRAWN.glob("*.jpg")):
        data = base64.b64encode(path.read_bytes()).decode()
        rules.append(f"#gallery .{path.stem}{{background-image:url(data:image/jpeg;base64,{data})}}")
    return f"<style>{''.join(rules)}</style>"
