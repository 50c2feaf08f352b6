"""How large a px is: where the slide says so, and whether that can be true.

A resolution comes from the caller, the format's own property, the OME-XML or the TIFF's resolution, or the objective.
Each may be wrong in the same few ways (a unit mistaken for another, a factor of ten), so each is held against the
objective, against what scanners do, and against the size of a glass slide. The sentence names the likely error.
"""

import html
import math
import re
from dataclasses import dataclass

PLAUSIBLE_MPP = (0.05, 32.0)  # um/px; what lies outside is no resolution of a slide, and is refused
FINEST_SCAN = 0.11  # um/px; no whole-slide scanner is finer, so what lies between is doubted
SCANS = (0.2, 0.6)  # um/px of most scans, 40x to 20x; tells which error is the likely one
GLASS_MM = (80.0, 30.0)  # longer and shorter side of a glass slide (76 x 26), with a margin
AGREE = (0.44, 2.2)  # um/px times objective / 10; a scanner's relay lens may halve or double it

_REMEDY = "Pass slide_mpp=, e.g. 0.25 for a 40x scan or 0.5 for a 20x scan."
_NO_MPP = f"The slide states no resolution. {_REMEDY}"
_STATED_IN = {
    "argument": "The resolution given is",
    "openslide": "The slide states",
    "ome": "The slide's OME-XML states",
    "tiff resolution": "The TIFF resolution says",
    "objective power": "The slide's objective stands for",
}
# What a stated value is times the true one, and how that comes about.
_ERRORS = (
    (10.0, "ten times too large"),
    (0.1, "ten times too small"),
    (2.54, "px per cm written as px per inch"),
    (1 / 2.54, "px per inch written as px per cm"),
    (25.4, "px per mm written as px per inch"),
    (1e3, "nm instead of um"),
    (1e-3, "mm instead of um"),
    (100.0, "a hundred times too large"),
    (0.01, "a hundred times too small"),
    (1e-4, "cm instead of um"),
    (1e-6, "m instead of um"),
)
_DEFAULT_DPI = (1, 72, 75, 96, 100, 120, 150, 180, 200, 240, 300, 350, 400, 600, 720, 1200)


@dataclass(frozen=True)
class Resolution:
    """um per level-0 px and what is to be said about it.

    mpp      None where the slide states none, or none that can be true; problem then says so and what to do
    source   "argument" | "openslide" | "ome" | "tiff resolution" | "objective power" | None
    notes    sentences about doubtful metadata
    doubt    the sentence of notes that says the resolution itself may be wrong, "" if nothing speaks against it
    """

    mpp: float | None
    source: str | None
    problem: str = ""
    notes: tuple[str, ...] = ()
    doubt: str = ""


def find_resolution(
    properties: dict[str, str], vendor: str, size: tuple[int, int], slide_mpp: float | None = None
) -> Resolution:
    """The resolution of a slide of size = (W, H) px. The order: argument, property, OME, TIFF resolution, objective."""
    power = _positive(properties.get("openslide.objective-power")) or _ome_power(properties)
    if slide_mpp is not None:
        return _doubt(float(slide_mpp), "argument", power, size, ())
    problem, stated, notes = _NO_MPP, _stated(properties, vendor), ()
    for source, pair in stated:
        mpp = math.sqrt(pair[0] * pair[1])
        if not all(PLAUSIBLE_MPP[0] <= v <= PLAUSIBLE_MPP[1] for v in pair):
            problem = explain_implausible(mpp, source, power)
            # A program's default in a TIFF is too common to be told where another statement can be true.
            notes += (f"{problem} What the slide states otherwise is used.",) if source != "tiff resolution" else ()
            continue
        skew = max(pair) / min(pair)
        if skew > 1.05:
            sentence = (
                f"The slide states {pair[0]:.4g} µm/px across and {pair[1]:.4g} down, and px that are not square are "
                "not read. Pass slide_mpp= if one of the two is a mistake."
            )
            return Resolution(None, None, sentence)
        if skew > 1.01:
            more = f"The slide states {pair[0]:.4g} µm/px across, {pair[1]:.4g} down; {mpp:.4g} is used for both."
            notes = (*notes, more)
        for other, (x, y) in stated:
            if max(x, mpp) / min(x, mpp) > 1.1 and PLAUSIBLE_MPP[0] <= x <= PLAUSIBLE_MPP[1]:
                more = (
                    f"{_STATED_IN[other]} {math.sqrt(x * y):.4g} µm/px, but {mpp:.4g} is used; pass slide_mpp= if not."
                )
                notes = (*notes, more)
        return _doubt(mpp, source, power, size, notes)
    if power is None:
        return Resolution(None, None, problem)
    if not PLAUSIBLE_MPP[0] <= 10 / power <= PLAUSIBLE_MPP[1]:
        return Resolution(None, None, f"The slide states an objective of {power:g}x, which no scanner has. {_REMEDY}")
    return _doubt(10 / power, "objective power", None, size, notes)


def explain_implausible(mpp: float, source: str = "argument", power: float | None = None) -> str:
    """The sentence for um/px that no slide has: the likely error, and what to pass instead."""
    start = f"{_STATED_IN[source]} {mpp:.4g} µm/px, which no slide has"
    if source == "argument" and 10 / mpp >= PLAUSIBLE_MPP[0] and mpp in (40, 60, 63, 80, 100):
        return f"{start}; {mpp:g} looks like the magnification, whose µm/px is about slide_mpp={10 / mpp:.3g}."
    if source == "tiff resolution" and any(abs(25_400 / dpi / mpp - 1) < 3e-3 for dpi in _DEFAULT_DPI):
        return f"The TIFF resolution, {mpp:.4g} µm/px, is a program's default and not a scan's. {_REMEDY}"
    error = _likely_error(mpp, power)
    if error is None:
        return f"{start}. {_REMEDY}"
    factor, words = error
    return f"{start}; it may be {words}: pass slide_mpp={mpp / factor:.3g} if so."


def explain_too_coarse(resolution: Resolution, mpp: float, most: float) -> str:
    """The sentence for a slide that would have to be enlarged more than `most` times to be read at mpp um/px."""
    own = resolution.mpp
    assert own is not None
    start = (
        f"The slide's finest level is {own:.4g} µm/px, too coarse to be read at {mpp:.4g} µm/px "
        f"(at most {most:g} times finer)."
    )
    if resolution.doubt:
        return f"{start} {resolution.doubt}"
    error = None if resolution.source == "argument" and own not in (5, 10, 20) else _likely_error(own, None)
    if resolution.source == "argument" and own in (5, 10, 20):
        return f"{start} If {own:g} is the magnification, pass slide_mpp={10 / own:.3g}; else use the scan itself."
    if error is not None:
        factor, words = error
        return f"{start} If that is {words}, pass slide_mpp={own / factor:.3g}; if not, use the scan itself, no copy."
    return f"{start} Use the scan itself, no reduced copy of it; if it is one, pass its true resolution as slide_mpp=."


def _doubt(mpp: float, source: str, power: float | None, size: tuple[int, int], notes: tuple[str, ...]) -> Resolution:
    """The resolution with what speaks against it."""
    longer, shorter = (side * mpp / 1000 for side in (max(size), min(size)))
    stated = f"{_STATED_IN[source]} {mpp:.4g} µm/px"
    why, error = "", _likely_error(mpp, power)
    if power is not None and not AGREE[0] <= mpp * power / 10 <= AGREE[1]:
        why = f"{stated}, but the slide an objective of {power:g}x, which is about {10 / power:.2g} µm/px"
    elif mpp < FINEST_SCAN:
        why = f"{stated}, finer than any whole-slide scanner"
    elif longer > GLASS_MM[0] or shorter > GLASS_MM[1]:
        why = f"{stated}, at which it is {longer:.0f} x {shorter:.0f} mm, larger than a glass slide"
        error = error if error is not None and error[0] > 1 else None
    elif source == "tiff resolution" and power is None and error is not None and _is_inch_for_cm(mpp):
        why = f"{stated}, which few scanners have"
    else:
        return Resolution(mpp, source, "", notes)
    likely = "it may be wrong" if error is None else f"it may be {error[1]}"
    remedy = "pass slide_mpp= if it is" if error is None else f"pass slide_mpp={mpp / error[0]:.3g} if so"
    sentence = f"{why}: {likely}, {remedy}. {mpp:.4g} µm/px is used."
    return Resolution(mpp, source, "", (*notes, sentence), sentence)


def _likely_error(mpp: float, power: float | None) -> tuple[float, str] | None:
    """(factor, words) of the error that would explain mpp; None if none does."""
    low, high = SCANS if power is None else (0.75 * 10 / power, 1.35 * 10 / power)
    return next(((factor, words) for factor, words in _ERRORS if low <= mpp / factor <= high), None)


def _is_inch_for_cm(mpp: float) -> bool:
    """Would the two units of a TIFF, exchanged, give just what scanners have?"""
    return any(abs(mpp * factor / scan - 1) < 0.04 for factor in (2.54, 1 / 2.54) for scan in (0.25, 0.5))


# ---- what the slide says


def _stated(properties: dict[str, str], vendor: str) -> list[tuple[str, tuple[float, float]]]:
    """(source, um/px across and down) of all that a slide states, the most direct first."""
    found = [
        ("openslide", _property_mpp(properties)),
        ("ome", _ome_mpp(properties)),
        ("tiff resolution", _tiff_mpp(properties)),
    ]
    if vendor == "generic-tiff":  # OpenSlide's property is then the TIFF resolution, and as believable as that
        found = [found[1], found[2] if found[2][1] else ("tiff resolution", found[0][1])]
    elif vendor != "aperio":  # the first page of other TIFFs need not be the scan
        found = found[:1] if found[0][1] else found[2:]
    if vendor == "aperio":  # OpenSlide keeps the last of several
        said = re.findall(r"\bMPP\s*=\s*([\d.,]+)", properties.get("tiff.ImageDescription", ""))
        values = {_positive(text.replace(",", ".")) for text in said if len(said) > 1}
        found += [("openslide", (value, value)) for value in values if value and (value, value) != found[0][1]]
    return [(source, pair) for source, pair in found if pair is not None]


def _positive(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _property_mpp(properties: dict[str, str]) -> tuple[float, float] | None:
    x, y = _positive(properties.get("openslide.mpp-x")), _positive(properties.get("openslide.mpp-y"))
    return (x or y, y or x) if x or y else None  # type: ignore[return-value]


def _tiff_mpp(properties: dict[str, str]) -> tuple[float, float] | None:
    unit = {"inch": 25_400.0, "centimeter": 10_000.0}.get(properties.get("tiff.ResolutionUnit", ""))
    x, y = _positive(properties.get("tiff.XResolution")), _positive(properties.get("tiff.YResolution"))
    return (unit / x, unit / y) if unit and x and y else None


_UM = {
    "": 1.0,
    "µm": 1.0,
    "μm": 1.0,
    "um": 1.0,
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "dm": 1e5,
    "m": 1e6,
    "in": 25_400.0,
    "Å": 1e-4,
}


def _ome_facts(properties: dict[str, str], element: str) -> dict[str, str]:
    """The attributes of the first element of that name in the OME-XML that a TIFF may hold."""
    text = properties.get("tiff.ImageDescription", "")
    found = re.search(rf"<(?:\w+:)?{element}\b[^>]*>", text) if "openmicroscopy.org" in text else None
    pairs = re.findall(r"""(\w+)\s*=\s*("[^"]*"|'[^']*')""", found[0]) if found else []
    return {name: html.unescape(value[1:-1]) for name, value in pairs}


def _ome_power(properties: dict[str, str]) -> float | None:
    """The objective that the OME-XML states."""
    return _positive(_ome_facts(properties, "Objective").get("NominalMagnification"))


def _ome_mpp(properties: dict[str, str]) -> tuple[float, float] | None:
    """PhysicalSizeX and Y of the first image of the OME-XML that a TIFF may hold."""
    facts = _ome_facts(properties, "Pixels")
    sizes = []
    for axis in "XY":
        value, unit = _positive(facts.get(f"PhysicalSize{axis}")), _UM.get(facts.get(f"PhysicalSize{axis}Unit", ""))
        if value is None or unit is None:
            return None
        sizes.append(value * unit)
    return sizes[0], sizes[1]
