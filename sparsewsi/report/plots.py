"""Pictures of a selection: where the kept patches lie on the slide, how all patches score, how their features map.

N patches, K kept, D feature dim, M points drawn. Frames: level-0 px, px of the thumbnail (xy_thumb), px of the picture
drawn (a small thumbnail is enlarged first). overlay() and heat_map() need Pillow only; matplotlib and umap-learn are
imported where they are used, as the first import of umap-learn takes seconds.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sparsewsi.bags.bag import Bag
from sparsewsi.report.export import by_rank, ranks
from sparsewsi.slides.slide import Slide

if TYPE_CHECKING:  # model.py stands above this file
    from matplotlib.axes import Axes

    from sparsewsi.model.sparse_wsi import Selection

LEAST_SIDE = 1000  # px: smaller thumbnails are enlarged, or the rank numbers would cover them
# Yellow in a dark casing: seen on pink, on purple, on white and on the black of fluorescence, by luminance alone.
BOX, CASING, INK = (255, 225, 25), (15, 15, 20), (255, 255, 255)
# Viridis at 0, 1/4, 1/2, 3/4, 1: even in luminance, told apart by every kind of colour vision.
VIRIDIS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], np.float32)
UMAP_DIM = 50  # features are rotated onto so many principal axes before UMAP: the same map, found sooner


def _font(size: float) -> ImageFont.FreeTypeFont:
    """The sans serif that ships with matplotlib (Pillow's own has no µ); found without importing matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None, "matplotlib is in the base install"
    assert spec.origin is not None, "matplotlib is a package with a file"
    return ImageFont.truetype(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)


# ---- on the slide ----


def overlay(thumbnail: np.ndarray, scale: float, bag: Bag, selection: Selection) -> Image.Image:
    """The thumbnail with a box around every kept patch, its rank in it, and a scale bar if mpp is known.

    thumbnail: uint8 (h, w, 3);  scale: level-0 px per thumbnail px
    Patches too small to be seen get a box of a least size around their centre; numbers that would cover each other are
    moved aside and tied to their box by a line.
    """
    picture, scale = _at_least(thumbnail, scale)
    draw = ImageDraw.Draw(picture)
    unit = max(picture.size) / LEAST_SIDE
    font = _font(23 * unit)
    boxes = [_box(bag, int(index), scale, 20 * unit) for index in by_rank(selection)]
    for left, top, right, bottom in reversed(boxes):  # the best is drawn last, on top
        draw.rectangle((left, top, right, bottom), outline=CASING, width=round(5 * unit))
        inset = round(1.5 * unit)
        draw.rectangle((left + inset, top + inset, right - inset, bottom - inset), outline=BOX, width=round(2.5 * unit))
    extents = [draw.textbbox((0, 0), f"{rank}", font, "mm", stroke_width=2 * unit) for rank in range(1, len(boxes) + 1)]
    places = _label_places(boxes, extents, picture.size)
    for box, (x, y) in zip(boxes, places):
        if _nearest(box, x, y) != (x, y):
            draw.line((*_nearest(box, x, y), x, y), fill=CASING, width=max(1, round(1.5 * unit)))
    for rank, (x, y) in enumerate(places, 1):
        draw.text((x, y), f"{rank}", INK, font, "mm", stroke_width=2 * unit, stroke_fill=CASING)
    if bag.slide_mpp:
        _scale_bar(draw, picture.size, bag.slide_mpp * scale, font, unit)
    return picture


def heat_map(thumbnail: np.ndarray, scale: float, bag: Bag, selection: Selection) -> Image.Image:
    """The thumbnail in grey, every patch coloured by the percentile of its score among all N, with a colour bar."""
    picture, scale = _at_least(thumbnail, scale)
    percentile = np.argsort(np.argsort(selection.scores.numpy(), kind="stable")) / max(len(selection.scores) - 1, 1)
    colours = Image.fromarray(np.zeros((picture.height, picture.width, 4), np.uint8))
    paint = ImageDraw.Draw(colours)
    for (x, y), colour in zip(bag.coords.numpy() / scale, _viridis(percentile)):
        side = bag.patch_size / scale
        paint.rectangle((x, y, x + side - 0.5, y + side - 0.5), fill=(*colour, 165))
    picture = Image.alpha_composite(picture.convert("L").convert("RGBA"), colours).convert("RGB")
    draw, unit = ImageDraw.Draw(picture), max(picture.size) / LEAST_SIDE
    font = _font(19 * unit)
    _colour_bar(picture, draw, font, unit)
    if bag.slide_mpp:
        _scale_bar(draw, picture.size, bag.slide_mpp * scale, font, unit)
    return picture


def canvas(bag: Bag, max_side: int = 1400) -> tuple[np.ndarray, float]:
    """Stands in for the thumbnail of a bag whose slide is not at hand: its patches as grey squares on white.

    Returns (uint8 (h, w, 3), level-0 px per px). Without slide_size the canvas ends at the last patch.
    """
    size = bag.slide_size
    if size is None:
        corner = bag.coords.numpy().max(0) if len(bag.coords) else np.zeros(2, int)
        size = (int(corner[0]) + bag.patch_size, int(corner[1]) + bag.patch_size)
    scale = max(size) / max_side
    picture = Image.new("RGB", (max(1, math.ceil(size[0] / scale)), max(1, math.ceil(size[1] / scale))), "white")
    draw = ImageDraw.Draw(picture)
    for x, y in bag.coords.numpy() / scale:
        side = bag.patch_size / scale
        draw.rectangle((x, y, x + side - 1, y + side - 1), fill=(222, 214, 224))
    return np.asarray(picture), scale


def patch_pictures(slide: Slide, bag: Bag, selection: Selection) -> list[np.ndarray]:
    """The kept patches as they were encoded, best first: K times uint8 (p, p, 3). The slide must be the bag's."""
    assert bag.mpp is not None, "a bag made from a slide knows its mpp"
    side = round(bag.patch_size * slide.require_mpp() / bag.mpp)  # px at bag.mpp
    return [slide.read(tuple(bag.coords[index].tolist()), (side, side), bag.mpp) for index in by_rank(selection)]


def _at_least(thumbnail: np.ndarray, scale: float) -> tuple[Image.Image, float]:
    """The thumbnail as a picture of at least LEAST_SIDE px, with its scale."""
    picture = Image.fromarray(thumbnail)
    factor = math.ceil(LEAST_SIDE / max(picture.size))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    return picture, scale / factor


def _box(bag: Bag, index: int, scale: float, least: float) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a patch in picture px, at least `least` px wide."""
    side = bag.patch_size / scale
    x, y = (float(v) / scale + side / 2 for v in bag.coords[index])
    half = max(side, least) / 2
    return x - half, y - half, x + half, y + half


Rectangle = tuple[float, float, float, float]  # left, top, right, bottom


def _label_places(boxes: list[Rectangle], extents: list[Rectangle], size: tuple[float, float]) -> list[tuple]:
    """Centres of labels: in the middle of a box that is larger than its label, else as near to it as is free.

    extents: the labels' rectangles about their centre;  size: of the picture, which labels do not leave
    """
    taken: list[Rectangle] = []
    places = []
    for (left, top, right, bottom), (west, north, east, south) in zip(boxes, extents):
        x0, y0, step = (left + right) / 2, (top + bottom) / 2, (south - north) / 3
        roomy = right - left > 1.2 * (east - west) and bottom - top > 1.2 * (south - north)
        blocked = taken if roomy else taken + boxes
        tries = [(0.0, 0.0)] if roomy else []  # then a spiral outwards: 16 directions, upper right first
        tries += [
            (ring * step * math.cos(turn * math.pi / 8 - 0.8), ring * step * math.sin(turn * math.pi / 8 - 0.8))
            for ring in range(2, 40)
            for turn in range(16)
        ]
        for dx, dy in tries:
            x = min(max(x0 + dx, -west), size[0] - east)
            y = min(max(y0 + dy, -north), size[1] - south)
            spot = (x + west, y + north, x + east, y + south)
            if not any(_overlap(spot, other) for other in blocked):
                break
        else:
            x, y = x0, y0  # nowhere free: better on top of another number than far from its patch
            spot = (x + west, y + north, x + east, y + south)
        taken.append(spot)
        places.append((x, y))
    return places


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _nearest(box: Rectangle, x: float, y: float) -> tuple[float, float]:
    """The point of a box that is nearest to (x, y)."""
    return min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])


def _scale_bar(draw: ImageDraw.ImageDraw, size: tuple[int, int], um_per_px: float, font, unit: float) -> None:
    """A bar of 1, 2 or 5 times a power of ten um, about a sixth of the picture long, at the lower left."""
    length_um = _round_length(size[0] * um_per_px / 6)
    text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    left, bottom = 20 * unit, size[1] - 20 * unit
    right = left + length_um / um_per_px
    draw.rectangle((left - 2 * unit, bottom - 8 * unit, right + 2 * unit, bottom + 2 * unit), fill=INK)
    draw.rectangle((left, bottom - 6 * unit, right, bottom), fill=CASING)
    place = ((left + right) / 2, bottom - 13 * unit)
    draw.text(place, text, CASING, font, "mb", stroke_width=round(3 * unit), stroke_fill=INK)


def _round_length(most: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is no larger than `most`."""
    power = 10.0 ** math.floor(math.log10(most))
    return next(power * step for step in (5, 2, 1) if power * step <= most * (1 + 1e-9))


def _colour_bar(picture: Image.Image, draw: ImageDraw.ImageDraw, font, unit: float) -> None:
    """The legend of the heat map at the lower right, on a white ground."""
    width, height = round(220 * unit), round(14 * unit)
    left, top = picture.width - width - round(24 * unit), picture.height - height - round(20 * unit)
    ground = (left - 12 * unit, top - 32 * unit, left + width + 12 * unit, top + height + 10 * unit)
    draw.rectangle(ground, fill=INK)
    strip = np.broadcast_to(_viridis(np.linspace(0, 1, width))[None], (height, width, 3))
    picture.paste(Image.fromarray(np.ascontiguousarray(strip)), (left, top))
    for x, anchor, text in ((left, "ls", "low"), (left + width / 2, "ms", "score"), (left + width, "rs", "high")):
        draw.text((x, top - 8 * unit), text, CASING, font, anchor)


def _viridis(values: np.ndarray) -> np.ndarray:
    """Colours of values in [0, 1]: uint8 (n, 3)."""
    at = np.clip(values, 0, 1) * (len(VIRIDIS) - 1)
    return np.stack([np.interp(at, np.arange(len(VIRIDIS)), VIRIDIS[:, c]) for c in range(3)], -1).astype(np.uint8)


# ---- in feature space ----


@dataclass(frozen=True)
class FeatureMap:
    """A slide's patches in two dimensions.

    xy:     (M, 2) float32
    rows:   (M,) int64, which patch of the bag each point is
    total:  N; more than M where only a part was drawn
    method: "UMAP" or "PCA"
    """

    xy: np.ndarray
    rows: np.ndarray
    total: int
    method: str

    @property
    def title(self) -> str:
        """What the map shows and leaves out, in words."""
        count = f"{self.total:,} patches" if self.total != 1 else "1 patch"
        if len(self.rows) < self.total:
            count = f"{len(self.rows):,} of {self.total:,} patches (a random part and every selected patch)"
        return f"{self.method} of the features of {count}" + (" (too few for UMAP)" if self.method == "PCA" else "")


def umap_coords(features: Tensor, selection: Selection, seed: int = 0, max_points: int = 20_000) -> FeatureMap:
    """Map features (N, D) to two dimensions: UMAP, or PCA when there are fewer than 5 patches.

    max_points: of a larger slide a seeded random part is mapped, which holds every kept patch
    The same input and seed give the same map. The first call imports umap-learn and compiles it, which takes seconds.
    """
    total = len(features)
    rows = np.arange(total)
    if total > max_points:
        kept = selection.indices.numpy()
        rest = np.random.default_rng(seed).choice(
            np.setdiff1d(rows, kept), max(0, max_points - len(kept)), replace=False
        )
        rows = np.sort(np.concatenate([kept, rest]))
    x = _principal(features[rows].float().numpy(), UMAP_DIM)  # (M, <= UMAP_DIM)
    if total < 5:
        return FeatureMap(_two_columns(x), rows, total, "PCA")
    import umap

    neighbours = min(15, len(rows) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "no transform with precomputed neighbours" and the like: not needed
        reducer = umap.UMAP(
            n_neighbors=neighbours,
            # Exact neighbours by matrix products: umap's own search for N < 4,096 is a Python loop over all pairs.
            precomputed_knn=_neighbours(x, neighbours),
            force_approximation_algorithm=True,
            init=_start(x, seed),  # type: ignore[arg-type]  # an array is allowed
            random_state=seed,
            n_jobs=1,
            n_epochs=200,
        )
        xy = np.asarray(reducer.fit_transform(x), np.float32)
    return FeatureMap(xy, rows, total, "UMAP")


def _principal(x: np.ndarray, most: int) -> np.ndarray:
    """Centred x (M, D) on its first principal axes, at most `most` of them."""
    x = x - x.mean(0)
    if len(x) < x.shape[1]:  # the smaller of the two Gram matrices is the cheaper one
        _, vectors = np.linalg.eigh(x @ x.T)
        axes = x.T @ vectors[:, ::-1][:, :most]
        axes /= np.linalg.norm(axes, axis=0).clip(1e-12)
    else:
        _, vectors = np.linalg.eigh(x.T @ x)
        axes = vectors[:, ::-1][:, :most]
    # The sign of an axis is arbitrary: fix it, so that maps do not flip between machines.
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])] + 1e-30)
    return np.ascontiguousarray(x @ axes, np.float32)


def _neighbours(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and distances (M, k) of the k nearest points of x (M, d) to each of its points, itself first."""
    points, parts = torch.from_numpy(x), []
    for start in range(0, len(x), 1024):
        distance = torch.cdist(points[start : start + 1024], points)
        here = torch.arange(len(distance))
        distance[here, start + here] = -1.0  # a twin at distance 0 must not come before the point itself
        near = distance.topk(k, largest=False)
        parts.append((near.indices.numpy().astype(np.int32), near.values.clamp_min(0).numpy()))
    return np.concatenate([i for i, _ in parts]), np.concatenate([d for _, d in parts])


def _two_columns(x: np.ndarray) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, max(0, 2 - x.shape[1]))))[:, :2].astype(np.float32)


def _start(x: np.ndarray, seed: int) -> np.ndarray:
    """UMAP's starting points (M, 2): the first two principal axes, with a little noise for patches that are equal."""
    xy = _two_columns(x)
    xy = 10 * xy / max(float(np.abs(xy).max()), 1e-6)
    return xy + np.random.default_rng(seed).normal(0, 1e-2, xy.shape).astype(np.float32)


def umap_plot(points: FeatureMap, selection: Selection) -> Image.Image:
    """The map as a picture with a legend: discarded patches small and grey, selected ones numbered by rank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.6), dpi=150, layout="constrained")
    drawing = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rank_of = dict(zip(selection.indices.tolist(), ranks(selection).tolist()))
    kept = np.array([int(row) in rank_of for row in points.rows], bool)
    dot = float(np.clip(9000 / max(len(kept), 1), 3, 30))
    axes.scatter(*points.xy[~kept].T, s=dot, c="#8a8f98", alpha=0.55, linewidths=0)
    axes.scatter(*points.xy[kept].T, s=42, c="#e69f00", marker="D", edgecolors="black", linewidths=0.8, zorder=3)
    legend = [
        axes.plot([], [], linestyle="", marker="D", markersize=7, color="#e69f00", markeredgecolor="black")[0],
        axes.plot([], [], linestyle="", marker="o", markersize=5, color="#8a8f98")[0],
    ]
    words = [f"{len(rank_of):,} selected (number: rank)", f"{points.total - len(rank_of):,} discarded"]
    axes.legend(legend, words, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, frameon=False)
    axes.set_title(points.title, fontsize=10)
    axes.set(xlabel=f"{points.method} 1", ylabel=f"{points.method} 2", xticks=[], yticks=[])
    drawing.draw()  # settles the layout, so that places in px are known
    if kept.any():
        _number_points(axes, points.xy[kept], [rank_of[row] for row in points.rows[kept].tolist()])
        drawing.draw()
    return Image.fromarray(np.asarray(drawing.buffer_rgba())).convert("RGB")


def _number_points(axes: Axes, xy: np.ndarray, numbers: list[int]) -> None:
    """Write each number beside its point, clear of the other points and numbers, tied to it by a line."""
    from matplotlib import patheffects

    pixels = axes.transData.transform(xy)
    boxes = [(x - 10, y - 10, x + 10, y + 10) for x, y in pixels]
    extents = [(-8.0 * len(f"{n}"), -9.0, 8.0 * len(f"{n}"), 9.0) for n in numbers]
    width, height = axes.figure.canvas.get_width_height()
    halo = [patheffects.withStroke(linewidth=2, foreground="white")]
    order = np.argsort(numbers)
    places = _label_places([boxes[i] for i in order], [extents[i] for i in order], (width, height))
    for i, place in zip(order, places):
        axes.annotate(
            f"{numbers[i]}",
            xy=(float(xy[i, 0]), float(xy[i, 1])),
            xytext=place,
            textcoords="figure pixels",
            ha="center",
            va="center",
            fontsize=8,
            path_effects=halo,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "#444444", "shrinkA": 0, "shrinkB": 0},
        )
