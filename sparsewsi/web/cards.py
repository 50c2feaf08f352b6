"""The slides that an empty page offers: a card each, with a picture and one line of what it teaches."""

from pathlib import Path
from typing import Any

import gradio as gr

VIEWER = Path(__file__).parent / "viewer"
# name, title, what it teaches; names are examples.EXAMPLES
CARDS = (
    ("phantom", "Phantom", "Computer-generated, its content is known: see whether the answer is right."),
    ("cmu-1", "CMU-1, small region", "A real scan (OpenSlide, CC0), fetched on click: see what the model says of it."),
)


def choose_slide(**settings: Any) -> gr.HTML:
    """The cards. Its events are `choose` ({name}) and `tour`."""
    cards = "".join(
        f"<button type='button' class='slide-card' id='{name}' data-choose='{name}'>"
        f"<span class='picture {name}' aria-hidden='true'></span><b>{title}</b><span>{teaches}</span></button>"
        for name, title, teaches in CARDS
    )
    return gr.HTML(
        f"<h1>Ask a whole slide, and see what the answer rests on</h1>"
        f"<p class='lead'>Of the patches of a slide the model keeps 32 and answers from nothing else. "
        f"<button type='button' class='link' data-tour>Show me in 30 seconds</button></p>"
        f"<div class='cards'>{cards}</div>",
        js_on_load=(VIEWER / "gallery.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        padding=False,
        **settings,
    )
