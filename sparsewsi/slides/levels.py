"""How many level-0 px one px of a level is: from the sizes where they agree, else from what the levels show.

Sizes are rounded, padded to whole tiles or cut to them, and then neither their ratio across nor that down is the scale.
A wrong scale moves patches by more the farther they lie from the origin, so levels are compared in places all over.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from sparsewsi.slides.refusals import SlideError
from sparsewsi.slides.resize import resize

PLACES = 4  # across and down
LARGEST = 1024  # px of the finer level decoded for one place
ALIKE = 0.2  # correlation of a level of the right scale with the finer one, at the least; of other images 0.1
ALIKE_GUESSED = 0.5  # the same where the best of many scales is taken, which finds more by chance
CLEAR = 0.8  # from here on no further scales are tried
PARTS, LOOK, SHOW = 3, 128, 8  # parts across and down of a level that are looked through; px of each, and of a place
FARTHEST = 32  # times reduced: what a level is compared with
UNLIKE = 24  # grey values by which what is there differs from what is meant to be
LEAST_PLACES = 3  # more than half of them unlike: another picture
FLAT = 2.0  # standard deviation, grey values: what shows nothing cannot be compared

Size = tuple[int, int]
Read = Callable[[int, Size, Size], np.ndarray]  # (level, (x, y), (w, h)), level px -> uint8 (h, w, 3)


def measure_downsamples(
    sizes: Sequence[Size], read: Read, doubted: Collection[int] = ()
) -> tuple[list[float | None], list[str]]:
    """(level-0 px per px of every level, None for one that is not of this slide; sentences on what is doubtful).

    sizes: (w, h) as the file states them, finest first; doubted: levels to be compared whatever their size
    """
    found: list[float | None] = [1.0]
    notes = []
    for level, size in enumerate(sizes[1:], 1):
        whole, twins = _explain(sizes[0], size), [i for i, other in enumerate(sizes) if other == size and i != level]
        if any(i < level and found[i] for i in twins):
            found.append(None)
            notes.append(f"The slide holds two images of {_text(size)} px; one of them is read.")
            continue
        if whole is not None and not twins and level not in doubted:
            found.append(whole)
            continue
        fitting = [whole] if whole is not None else _candidates(sizes[0], size, found)
        finer = max(i for i in range(level) if found[i] and sizes[i] != size)
        scale, sure = _compare(sizes, level, fitting, finer, found[finer] or 1.0, read)
        found.append(scale)
        if scale is None:
            notes.append(f"The image of {_text(size)} px is not this slide reduced and is left out.")
        elif not sure and whole is None:
            notes.append(
                f"The level of {_text(size)} px states no clear scale and shows too little to measure it; it is taken "
                f"to be reduced {scale:.4g} times."
            )
    return found, notes


def compare_roughly(
    sizes: Sequence[Size], downsamples: Sequence[float | None], read: Read
) -> tuple[list[float | None], list[str]]:
    """measure_downsamples' scales, None also for a level that does not show what a coarser one does; sentences.

    A writer that was killed, or saves room, leaves levels of the right size with nothing in them, or with holes; others
    mirror a level, or take it from another slide.
    """
    found, notes, places = list(downsamples), [], {}
    kept = [(level, scale) for level, scale in enumerate(downsamples) if scale is not None]
    for level, scale in kept:
        coarser = [other for other, theirs in kept if other > level and theirs <= FARTHEST * scale]
        if not coarser:
            continue
        shown, ratio = coarser[-1], (downsamples[coarser[-1]] or 1.0) / scale
        if shown not in places:
            whole = true_size(sizes[0], sizes[shown], downsamples[shown] or 1.0)
            places[shown] = list(_dark_places((whole[0] - 1, whole[1] - 1), shown, read))
        looks = [_look(level, place, ratio, read) for place in places[shown]]
        seen = [look for look in looks if look]
        if "empty" not in seen and not (len(seen) >= LEAST_PLACES and seen.count("unlike") > len(seen) / 2):
            continue
        what = "full image" if level == 0 else f"level of {_text(sizes[level])} px"
        does = "is empty in places where" if "empty" in seen else "does not show what"
        where = f"The {what} {does} that of {_text(sizes[shown])} px shows"
        where += " something" if "empty" in seen else ""
        notes.append(where + ("; the file is not whole." if level == 0 else " and is left out."))
        found[level] = scale if level == 0 else None
    return found, notes


def _dark_places(size: Size, level: int, read: Read) -> Iterator[tuple[int, int, np.ndarray]]:
    """(x, y, uint8 (SHOW, SHOW, 3)) of what is darkest, but not even, in parts of a level spread over it; level px.

    size: the part of the level that shows the slide and nothing else
    """
    extent = tuple(min(LOOK, max(SHOW, side // PARTS)) for side in size)
    for parts in itertools.product(range(PARTS), repeat=2):
        left, top = (max(0, side * (2 * i + 1) // (2 * PARTS) - n // 2) for side, i, n in zip(size, parts, extent))
        try:
            pixels = read(level, (left, top), (extent[0], extent[1]))
        except SlideError:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(pixels.mean(2), (SHOW, SHOW))
        means = np.where(windows.std((2, 3)) > 2 * FLAT, windows.mean((2, 3)), np.inf)
        y, x = divmod(int(means.argmin()), means.shape[1])
        if np.isfinite(means[y, x]):
            yield left + x, top + y, pixels[y : y + SHOW, x : x + SHOW]


def _look(level: int, place: tuple[int, int, np.ndarray], ratio: float, read: Read) -> str:
    """What a level, `ratio` px of which are one of a coarser one, is at a place of that: "like" it, "unlike", "empty".

    "" where it cannot be read.
    """
    x, y, wanted = place
    side = round(SHOW * ratio)
    try:
        pixels = read(level, (round(x * ratio), round(y * ratio)), (side, side))
    except SlideError:
        return ""
    small = resize(pixels, (0, 0, side, side), (SHOW, SHOW)).astype(float)
    if float(np.abs(small.mean((0, 1)) - wanted.mean((0, 1))).max()) > UNLIKE:
        return "empty" if float(pixels.std((0, 1)).max()) < 0.5 else "unlike"
    grey, each = pixels.astype(float).mean(2), (np.arange(SHOW) * ratio).astype(int)
    # Some writers reduce by keeping one px of many, the first or the middle one.
    kept = [grey[np.ix_(each + first, each + first)] for first in (0, int(ratio / 2))]
    alike = max(float(np.corrcoef(one.ravel(), wanted.mean(2).ravel())[0, 1]) for one in (small.mean(2), *kept))
    return "like" if alike > ALIKE else "unlike"


def true_size(size0: Size, size: Size, downsample: float) -> Size:
    """The part of a level that shows the slide, (w, h): what is padded beyond it does not count."""
    return tuple(min(side, math.ceil(side0 / downsample - 1e-6)) for side0, side in zip(size0, size))  # type: ignore[return-value]


def _explain(size0: Size, size: Size) -> float | None:
    """The whole number that explains a level's size up to rounding, else the ratio that does both ways, else None."""
    ratios = [side0 / side for side0, side in zip(size0, size)]
    whole = round(math.sqrt(ratios[0] * ratios[1]))
    if whole >= 1 and all(side0 // whole <= side <= -(-side0 // whole) for side0, side in zip(size0, size)):
        return float(whole)
    # OpenSlide's own readers of other formats round by one px more; that far a ratio is exact.
    close = whole >= 1 and all(abs(side0 / whole - side) <= 1.5 for side0, side in zip(size0, size))
    return sum(ratios) / 2 if close and max(size) > 64 else None


def _candidates(size0: Size, size: Size, finer: Sequence[float | None]) -> list[float]:
    """Scales that padding, cutting or rounding could have hidden behind a level's size; the likeliest first."""
    ratios = sorted(side0 / side for side0, side in zip(size0, size))
    low, high = 0.8 * ratios[0], 4 * ratios[1]
    known = [scale for scale in finer if scale]
    steps = [known[-1] * round(known[i] / known[i - 1]) for i in range(len(known) - 1, 0, -1)]
    powers = [2.0**i for i in range(1, 24)]
    wholes = [float(i) for i in range(2, 2 + 64)]
    likely = [*steps, *powers, math.sqrt(ratios[0] * ratios[1]), *ratios, *wholes]
    return list(dict.fromkeys(scale for scale in likely if low <= scale <= high))[:12]


def _compare(
    sizes: Sequence[Size], level: int, scales: Sequence[float], finer: int, finer_scale: float, read: Read
) -> tuple[float | None, bool]:
    """(the scale at which a level shows what a finer one does, True), (None, True) if it shows something else.

    (the likeliest scale, False) where the two show too little to tell.
    """
    if not scales:
        return None, True
    side = max(8, min(32, int(LARGEST * finer_scale / scales[0])))
    scores: dict[float, float] = {}
    for scale in scales:
        pairs = list(_pairs(sizes, level, scale, side, finer, finer_scale, read))
        score = _similarity(pairs) if pairs else None
        if score is not None:
            scores[scale] = score
            if score > CLEAR:
                break
    if not scores:
        return scales[0], False
    best, least = max(scores.values()), ALIKE if len(scales) == 1 else ALIKE_GUESSED
    # Of scales that do as well, the likeliest: they come first.
    return (next(scale for scale in scores if scores[scale] > best - 0.01) if best >= least else None), True


def _pairs(
    sizes: Sequence[Size], level: int, scale: float, side: int, finer: int, finer_scale: float, read: Read
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same places on a level, were it of this scale, and on a finer one: float (side, side) each."""
    ratio = scale / finer_scale
    width, height = true_size(sizes[0], sizes[level], scale)
    inside = [min(a, int(b / ratio)) - side - 2 for a, b in zip((width, height), sizes[finer])]
    if min(inside) < 0:
        return
    for row, column in itertools.product(range(PLACES), repeat=2):
        x, y = (round(n * (2 * i + 1) / (2 * PLACES)) for n, i in zip(inside, (column, row)))
        left, top = x * ratio, y * ratio
        x0, y0 = math.floor(left), math.floor(top)
        extent = math.ceil(side * ratio) + 2
        try:
            coarse, fine = read(level, (x, y), (side, side)), read(finer, (x0, y0), (extent, extent))
        except SlideError:  # other places tell as well
            continue
        box = (left - x0, top - y0, left - x0 + side * ratio, top - y0 + side * ratio)
        yield coarse.mean(2), resize(fine, box, (side, side)).astype(float).mean(2)


def _similarity(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """Correlation of all places together, from their own means if they show something; None if neither does."""
    one, other = (np.stack([pair[i] for pair in pairs]) for i in (0, 1))
    if min(one.std(), other.std()) < FLAT:
        return 0.0 if max(one.std(), other.std()) > 4 * FLAT else None  # one shows what the other does not
    inner = [a - a.mean((1, 2), keepdims=True) for a in (one, other)]
    if min(part.std() for part in inner) >= FLAT:
        one, other = inner  # fine structure tells a shift of one px, means do not
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def _text(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
