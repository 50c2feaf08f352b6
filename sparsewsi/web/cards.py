"""The slides that an empty page offers: two examples, and public slides that their own server sends on a click."""

import html
from pathlib import Path
from typing import Any

import gradio as gr

from sparsewsi.web.gallery import read_gallery

SCRIPT = Path(__file__).parent / "viewer" / "gallery.js"
EXAMPLES = (  # name, as examples.EXAMPLES has it; title; what it teaches
    ("phantom", "Phantom", "Computer-generated, its content is known: see whether the answer is right."),
    ("cmu-1", "CMU-1, small region", "A real scan (OpenSlide, CC0), fetched on click: see what the model says of it."),
)


def choose_slide(**settings: Any) -> gr.HTML:
    """The cards. Its event is `choose` ({name}): one of examples.EXAMPLES or of the gallery."""
    examples = "".join(
        f"<button type='button' class='slide-card' id='{name}' data-choose='{name}'>"
        f"<span class='picture {name}' aria-hidden='true'></span><b>{title}</b><span>{teaches}</span></button>"
        for name, title, teaches in EXAMPLES
    )
    samples = read_gallery()
    public = "".join(
        f"<button type='button' class='sample' data-choose='{sample.name}'><b>{html.escape(sample.title)}</b>"
        f"<span>{html.escape(sample.teaches)}</span></button>"
        for sample in samples
    )
    sources = html.escape("; ".join(dict.fromkeys(f"{sample.source} ({sample.licence})" for sample in samples)))
    return gr.HTML(
        "<h1>Ask a whole slide, and see what the answer rests on</h1>"
        "<p class='lead'>Of the patches of a slide the model keeps 32 and answers from nothing else. "
        "<button type='button' class='link' data-tour>Show me in 30 seconds</button></p>"
        f"<div class='cards'>{examples}</div>"
        f"<details class='public'><summary>{len(samples)} public slides, read from their own server</summary>"
        f"<div class='samples'>{public}</div><p class='small'>{sources}</p></details>",
        js_on_load=SCRIPT.read_text(encoding="utf-8"),
        apply_default_css=False,
        padding=False,
        **settings,
    )
