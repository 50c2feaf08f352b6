"""The slide viewer: a Gradio component and the tiles it asks for. intake.py: how slides come in."""

from sparsewsi.web.viewer.viewer import (
    BY_SLIDE,
    HEAR,
    PAGE_CSS,
    PICTURES,
    Slides,
    bag_props,
    file_props,
    foci_props,
    map_props,
    packed,
    slide_props,
    slide_viewer,
    theme,
    words_props,
)

__all__ = [
    "BY_SLIDE",
    "HEAR",
    "PAGE_CSS",
    "PICTURES",
    "Slides",
    "bag_props",
    "file_props",
    "foci_props",
    "map_props",
    "packed",
    "slide_props",
    "slide_viewer",
    "theme",
    "words_props",
]
