"""The slide viewer: a Gradio component, and the tiles it asks for."""

from sparsewsi.viewer.viewer import Slides, bag_props, map_props, slide_props, slide_viewer

__all__ = ["Slides", "bag_props", "map_props", "slide_props", "slide_viewer"]
