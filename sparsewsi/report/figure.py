"""One figure for a talk: the slide with its boxes, the kept patches and the map, with what they are; PNG or SVG.

K kept patches.
"""

import io
import math
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sparsewsi.model.selection import Selection

COLUMNS, GAP = 8, 6  # of patches; px between them
LINE = 190  # characters that fit at the foot
GROUNDS = 195  # and under the title
INCHES, DPI = (16.0, 9.0), 150


def draw_figure(
    kind: str,
    overview: Image.Image,
    patches: Sequence[np.ndarray],
    selection: Selection,
    feature_map: Image.Image | None,
    title: str,
    notice: str,
    question: str = "",
    grounds: str = "",
    bold: bool = True,
) -> bytes:
    """The figure as a file's content.

    kind: "png" or "svg". overview: the slide with its boxes (plots.draw_overlay). patches: best first
    (plots.cut_patches). feature_map: umap.draw_map, None where it could not be drawn. title: what was answered, or the
    slide, bold unless it is a guess; question: what was asked; grounds: how sure that is and what it rests on; notice:
    stands at the foot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second, that who draws nothing does not wait for
    from matplotlib.figure import Figure

    figure = Figure(INCHES, dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 2, width_ratios=(1.05, 1), left=0.02, right=0.98, top=0.85, bottom=0.07, wspace=0.03)
    slide = figure.add_subplot(grid[0])
    slide.imshow(overview)
    right = grid[1].subgridspec(2, 1, height_ratios=(1.1, 1), hspace=0.08)
    sheet = figure.add_subplot(right[0])
    sheet.imshow(_make_sheet(patches))
    side, ranks = (patches[0].shape[0] + GAP if len(patches) else 1), selection.ranks[selection.best_first].tolist()
    for number, rank in enumerate(ranks[: len(patches)]):
        x, y = number % COLUMNS * side, number // COLUMNS * side
        box = {"facecolor": "black", "alpha": 0.6, "pad": 1.5, "linewidth": 0}
        place = (x + 0.04 * side, y + 0.16 * side)
        sheet.text(*place, f"{rank}", color="white", fontsize=8, weight="bold", bbox=box)
    if feature_map is not None:
        figure.add_subplot(right[1]).imshow(feature_map)
    for axes in figure.axes:
        axes.set_axis_off()
    ink, quiet = "#1c2024", "#59626d"
    for text, y, most, look in (
        (question, 0.985, 150, {"fontsize": 13, "color": quiet}),
        (title, 0.95, 120, {"fontsize": 17, "color": ink, "weight": "bold" if bold else "normal"}),
    ):
        figure.text(0.02, y, textwrap.shorten(text, most, placeholder=" …"), va="top", parse_math=False, **look)
    told = textwrap.fill(grounds, GROUNDS, max_lines=2, placeholder=" …")
    figure.text(0.02, 0.908, told, fontsize=11, color=ink, va="top", parse_math=False)
    foot = textwrap.fill(notice, LINE)
    figure.text(0.02, 0.012, foot, fontsize=9, color=quiet, va="bottom", parse_math=False)
    data = io.BytesIO()
    figure.savefig(data, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return data.getvalue()


def _make_sheet(patches: Sequence[np.ndarray]) -> np.ndarray:
    """The patches in rows, uint8 (h, w, 3) on white."""
    if not len(patches):
        return np.full((8, 8, 3), 255, np.uint8)
    side = patches[0].shape[0]
    rows = math.ceil(len(patches) / COLUMNS)
    out = np.full((rows * (side + GAP) - GAP, COLUMNS * (side + GAP) - GAP, 3), 255, np.uint8)
    for number, patch in enumerate(patches):
        y, x = (part * (side + GAP) for part in divmod(number, COLUMNS))
        out[y : y + side, x : x + side] = patch[:side, :side]
    return out
