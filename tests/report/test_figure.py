"""The figure for a talk: a picture of its kind, whatever is missing."""

import io

import numpy as np
import pytest
from PIL import Image

from sparsewsi.report.figure import draw_figure


@pytest.mark.parametrize("patches", [0, 3])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_figure_is_drawn_with_and_without_pictures(kind, patches, selection):
    pictures = [np.full((16, 16, 3), 80 * i, np.uint8) for i in range(patches)]
    overview = Image.new("RGB", (60, 40), "white")
    data = draw_figure(kind, overview, pictures, selection, None, "Which $tissue$? fat", "Research use only")
    if kind == "png":
        assert Image.open(io.BytesIO(data)).size == (2400, 1350)
    else:
        assert data.lstrip().startswith(b"<?xml")
        assert b"<script" not in data
