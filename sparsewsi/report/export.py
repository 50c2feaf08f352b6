"""Files about a selection: CSV, QuPath GeoJSON, a report and a JSON record from which it can be replayed; and the way
back, from regions drawn in QuPath and from the record. All writes are atomic.

N patches, K kept, V corners of a region. Positions are in the level-0 frame, px.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import os
import platform
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from html import escape
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparsewsi.bags.bag import Bag
from sparsewsi.model.config import SparseWSIConfig

if TYPE_CHECKING:  # model.py stands above this file
    from sparsewsi.model.sparse_wsi import Selection

RECORDED_PACKAGES = ("sparsewsi", "torch", "transformers", "peft", "numpy", "openslide-python", "openslide-bin")
CLASS_NAME = "SparseWSI selected"
CLASS_COLOUR = (230, 159, 0)  # Okabe and Ito's orange: told from blue by every kind of colour vision
MOST_BYTES = 64 << 20  # of a file that is read back: a record of a million scores has 15 MB
MOST_CORNERS = 200_000  # of all regions of a GeoJSON together: a second or two on a slide of 100,000 patches


@dataclass(frozen=True)
class Answer:
    """A question that was put and what came back.

    options:  empty for an open question
    probs:    one per option, sums to 1
    effects:  Evidence.effects, one per selection.indices; empty where no evidence was asked for
    evidence: Evidence.sentence, what the effects mean
    """

    question: str
    text: str
    options: tuple[str, ...] = ()
    probs: tuple[float, ...] = ()
    effects: tuple[float, ...] = ()
    evidence: str = ""


def notice(config: SparseWSIConfig) -> str:
    """What stands wherever answers of this model are shown: the use it is for, and the model's own note."""
    use = f"{'Demo model, research' if config.demo else 'Research'} use only, not for diagnosis."
    return f"{use} {config.note}".strip()


def ranks(selection: Selection) -> np.ndarray:
    """(K,) int64: the rank by score of each of selection.indices, 1 = highest; ties go to the lower index."""
    kept = selection.scores[selection.indices].double().numpy()
    order = np.argsort(-kept, kind="stable")
    out = np.empty(len(kept), np.int64)
    out[order] = np.arange(1, len(kept) + 1)
    return out


def by_rank(selection: Selection) -> np.ndarray:
    """(K,) int64: selection.indices, best score first."""
    return selection.indices.numpy()[np.argsort(ranks(selection))]


def llm_name(config: SparseWSIConfig) -> str:
    """The base LLM as people are told: a hub id, or the last part of a folder's path."""
    return Path(config.llm).name if Path(config.llm).is_dir() else config.llm


def summary(bag: Bag, selection: Selection, config: SparseWSIConfig, model: str) -> str:
    """One line for people: model, encoder, K of N, share of the tissue, resolution and where it is known from."""
    kept, total = len(selection.indices), selection.num_patches
    at = f"{bag.mpp:.4g} µm/px" if bag.mpp else "an unknown resolution"
    scan = f"scan {bag.slide_mpp:.4g} µm/px ({bag.mpp_source})" if bag.slide_mpp else "scan resolution unknown"
    return (
        f"{bag.slide} · model {model} ({llm_name(config)}) · encoder {bag.encoder} · {kept:,} of {total:,} patches "
        f"({100 * kept / max(total, 1):.2g} % of the tissue) read at {at} · {scan}"
    )


# ---- files ----


def write_csv(path: str | Path, bag: Bag, selection: Selection) -> None:
    """One row per kept patch, best first: rank, index, x, y, size (level-0 px), score, centre and size in um.

    The columns in um are empty when the resolution of level 0 is unknown.
    """
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["rank", "index", "x", "y", "size", "score", "centre_x_um", "centre_y_um", "size_um"])
    for rank, index in enumerate(by_rank(selection), 1):
        x, y = (int(v) for v in bag.coords[index])
        in_um = [""] * 3
        if bag.slide_mpp:
            half = bag.patch_size / 2
            in_um = [f"{v * bag.slide_mpp:.2f}" for v in (x + half, y + half, bag.patch_size)]
        rows.writerow([rank, int(index), x, y, bag.patch_size, f"{float(selection.scores[index]):.6g}", *in_um])
    _write(path, text.getvalue().encode())


def write_geojson(path: str | Path, bag: Bag, selection: Selection) -> None:
    """The kept patches as annotations QuPath reads (File > Import objects from file): squares in level-0 px.

    Each has the classification CLASS_NAME, its rank as its name, and the measurements "Rank" and "Score".
    """
    features = [_square(bag, int(index), rank, selection) for rank, index in enumerate(by_rank(selection), 1)]
    _write(path, json.dumps({"type": "FeatureCollection", "features": features}, indent=1).encode())


def _square(bag: Bag, index: int, rank: int, selection: Selection) -> dict[str, Any]:
    x, y = (int(v) for v in bag.coords[index])
    right, bottom = x + bag.patch_size, y + bag.patch_size
    return {
        "type": "Feature",
        # The same patch of the same slide keeps its id, so that a second import replaces the first.
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{bag.slide}/{x}/{y}/{bag.patch_size}")),
        "geometry": {"type": "Polygon", "coordinates": [[[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]]},
        "properties": {
            "objectType": "annotation",
            "name": f"#{rank}",
            "classification": {"name": CLASS_NAME, "color": list(CLASS_COLOUR)},
            "isLocked": True,
            "measurements": {"Rank": rank, "Score": float(selection.scores[index])},
        },
    }


def write_selection(
    path: str | Path,
    bag: Bag,
    selection: Selection,
    config: SparseWSIConfig,
    *,
    model: str,
    weights_sha256: str | None = None,
    selector: str = "learned",
    max_patches: int | None = None,
    answers: Sequence[Answer] = (),
) -> None:
    """What was run and what came out, enough to run it again: model, slide, patches, scores, versions, answers.

    model:          name of the model's folder or repository, not a path
    weights_sha256: see weights_digest
    The slide is named by a digest of its content (Bag.slide), never by a path.
    """
    record = {
        "notice": notice(config),
        "model": {
            "name": model,
            "weights_sha256": weights_sha256,
            "config": asdict(config) | {"llm": llm_name(config)},
        },
        "slide": {
            "name": bag.slide,
            "size": bag.slide_size,
            "mpp": bag.slide_mpp,
            "mpp_source": bag.mpp_source,
        },
        "patches": {
            "encoder": bag.encoder,
            "mpp": bag.mpp,
            "size_level0": bag.patch_size,
            "max_patches": max_patches,
            "count": selection.num_patches,
            "sha256": patches_digest(bag),
            "note": bag.note,
        },
        "selection": {
            "selector": selector,
            "count": len(selection.indices),
            "indices": selection.indices.tolist(),
            "ranks": ranks(selection).tolist(),
            "coords": bag.coords[selection.indices].tolist(),
            "scores": [float(f"{score:.9g}") for score in selection.scores.tolist()],
        },
        "answers": [asdict(answer) for answer in answers],
        "versions": {"python": platform.python_version(), **_versions()},
    }
    _write(path, json.dumps(record, indent=1, ensure_ascii=False).encode())


# ---- the report ----

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 16px; }
h1 { margin: 0; } h2 { margin: 1.6em 0 .4em; border-bottom: 1px solid var(--line); }
.notice, .warnings { border-left: 5px solid #e69f00; background: var(--soft); padding: 8px 12px; margin: 12px 0; }
.notice { font-weight: 600; } .warnings ul { margin: 0; padding-left: 1.2em; }
img { max-width: 100%; height: auto; } .overview { width: 100%; background: #fff; }
.patches { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; }
figure { margin: 0; } figcaption { font-size: 12.5px; } .patches img { width: 100%; }
figure:target { outline: 3px solid #e69f00; outline-offset: 3px; }
.answer { border: 1px solid var(--line); border-radius: 6px; padding: 4px 14px; margin: 12px 0; break-inside: avoid; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; } th, td { text-align: left; padding: 2px 14px 2px 0; vertical-align: top; }
td { overflow-wrap: anywhere; } th { font-weight: 600; } .number { font-variant-numeric: tabular-nums; }
"""


def factor(effect: float) -> str:
    """An effect in nats as what an answer's likelihood is divided by without the patch: "3.2" for log(3.2)."""
    value = math.exp(min(effect, 50))
    return "over 1000" if value > 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def write_report(
    path: str | Path,
    bag: Bag,
    selection: Selection,
    config: SparseWSIConfig,
    *,
    model: str,
    overview: Image.Image,
    patches: Sequence[np.ndarray] = (),
    answers: Sequence[Answer] = (),
    warnings: Sequence[str] = (),
    weights_sha256: str | None = None,
    selector: str = "learned",
) -> None:
    """One HTML file to read, print and file away: no script, nothing fetched, every picture inside.

    overview: the slide with its boxes (plots.overlay). patches: uint8 (p, p, 3), best first (plots.patch_pictures);
    none where the slide is not at hand. warnings: sentences that stand under the notice. Words of users and of the
    model are escaped. The slide is named by Bag.slide and digests only.
    """
    assert len(patches) in (0, len(selection.indices)), "one picture per kept patch, or none"
    place = np.argsort(ranks(selection))  # rank - 1 -> place in selection.indices
    facts = {
        "Slide": f"{bag.slide}, {_size(bag)}",
        "Scan": f"{bag.slide_mpp:.4g} µm/px ({bag.mpp_source})" if bag.slide_mpp else "resolution unknown",
        "Model": f"{model}, language model {llm_name(config)}",
        "Weights (sha256)": weights_sha256 or "not recorded",
        "Patch encoder": f"{bag.encoder}, patches read at "
        + (f"{bag.mpp:.4g} µm/px" if bag.mpp else "an unknown resolution"),
        "Patches": f"{len(selection.indices):,} of {selection.num_patches:,} "
        f"({100 * len(selection.indices) / max(selection.num_patches, 1):.2g} % of the tissue), selector: {selector}",
        "All patches (sha256)": patches_digest(bag),
        "Versions": ", ".join(f"{name} {number}" for name, number in _versions().items()),
        "Written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    doubts = "".join(f"<li>{escape(text)}</li>" for text in (*warnings, *filter(None, [bag.note])))
    parts = [
        f'<p class="notice">{escape(notice(config))}</p>',
        f'<div class="warnings"><ul>{doubts}</ul></div>' if doubts else "",
        f'<img class="overview" alt="The slide with the kept patches" src="{_picture(overview)}">',
        "<h2>Questions and answers</h2>" if answers else "",
        *(_answer_html(number, answer, place) for number, answer in enumerate(answers, 1)),
        "<h2>Kept patches, best score first</h2>",
        f'<div class="patches">{"".join(_figures(bag, selection, place, patches, answers))}</div>',
        "<h2>How this was made</h2><table>",
        *(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items()),
        f'</table><p class="notice">{escape(notice(config))}</p>',
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>SparseWSI: {escape(bag.slide)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(bag.slide)}</h1>{chr(10).join(filter(None, parts))}</body></html>"
    )
    _write(path, page.encode())


def _size(bag: Bag) -> str:
    if bag.slide_size is None:
        return "size unknown"
    width, height = bag.slide_size
    in_mm = f" ({width * bag.slide_mpp / 1000:.3g} x {height * bag.slide_mpp / 1000:.3g} mm)" if bag.slide_mpp else ""
    return f"{width:,} x {height:,} px{in_mm}"


def _answer_html(number: int, answer: Answer, place: np.ndarray) -> str:
    """A question, its answer, its options, and the patches in the order of their evidence. place: rank - 1 -> place."""
    rows = "".join(
        f'<tr><td>{escape(option)}</td><td class="number">{prob:.1%}</td></tr>'
        for option, prob in zip(answer.options, answer.probs)
    )
    out = [
        f'<section class="answer"><p class="text"><b>Q{number}. {escape(answer.question)}</b></p>',
        f'<p class="text">{escape(answer.text) or "(no answer)"}</p>',
        f"<table><tr><th>Option</th><th>Probability</th></tr>{rows}</table>" if rows else "",
        f"<p>{escape(answer.evidence)}</p>" if answer.evidence else "",
    ]
    if answer.effects:
        by_rank = [answer.effects[where] for where in place]
        order = sorted(range(len(by_rank)), key=lambda i: -by_rank[i])  # stable: ties go to the better score
        links = " · ".join(f'<a href="#patch-{i + 1}">#{i + 1}</a> {factor(by_rank[i])}' for i in order)
        out.append(
            "<p>Patches by evidence (how many times less likely the answer gets without the patch; below 1: likelier): "
            f'<span class="number">{links}</span></p>'
        )
    return "".join([*out, "</section>"])


def _figures(
    bag: Bag, selection: Selection, place: np.ndarray, patches: Sequence[np.ndarray], answers: Sequence[Answer]
) -> Iterator[str]:
    """A figure per kept patch, best first: picture, rank, score, place and its evidence for every answer."""
    for number, where in enumerate(place):
        index = int(selection.indices[where])
        x, y = (int(v) + bag.patch_size / 2 for v in bag.coords[index])
        at = f"x {x * bag.slide_mpp:,.0f}, y {y * bag.slide_mpp:,.0f} µm" if bag.slide_mpp else f"x {x:g}, y {y:g} px"
        shares = []
        for i, answer in enumerate(answers, 1):
            if answer.effects:
                above = sum(effect > answer.effects[where] for effect in answer.effects)
                shares.append(f"Q{i}: {factor(answer.effects[where])}, evidence rank {above + 1}")
        picture = (
            f'<img alt="Patch {number + 1}" src="{_picture(Image.fromarray(patches[number]))}">' if len(patches) else ""
        )
        lines = [f"<b>#{number + 1}</b> score {float(selection.scores[index]):.3g}", at, *shares]
        yield f'<figure id="patch-{number + 1}">{picture}<figcaption>{"<br>".join(lines)}</figcaption></figure>'


def _picture(image: Image.Image) -> str:
    """A data URI; JPEG, which is a fifth of PNG for tissue."""
    data = io.BytesIO()
    image.convert("RGB").save(data, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


# ---- regions from QuPath ----


def read_regions(path: str | Path, bag: Bag) -> Tensor:
    """Patches of a bag in the regions of a GeoJSON file (QuPath: File > Export objects as GeoJSON).

    Polygon and MultiPolygon: the patches whose centre is inside, holes excluded; a region too small to hold a centre
    takes the patch at its own middle. Point and MultiPoint: the patch around it. Other geometries are passed over.
    Coordinates are level-0 px. Returns (M,) int64, ascending.
    Raises ValueError, in words, for a file that is too big, that is no GeoJSON, or whose regions meet no patch.
    """
    name = Path(path).name
    polygons, points = _geometries(_read_json(path), name)
    if not polygons and not points:
        raise ValueError(f"{name} holds no polygon and no point. Draw a region in QuPath and export it as GeoJSON.")
    if sum(len(ring) for rings in polygons for ring in rings) > MOST_CORNERS:
        raise ValueError(f"the regions of {name} have more than {MOST_CORNERS:,} corners. Simplify their shapes.")
    corners = bag.coords.numpy().astype(np.float64)  # (N, 2)
    kept = np.zeros(len(corners), bool)
    for rings in polygons:
        found = _inside(rings, corners + bag.patch_size / 2)
        if not found.any():
            points.append((rings[0].min(0) + rings[0].max(0)) / 2)
        kept |= found
    for point in points:
        kept |= ((corners <= point) & (point < corners + bag.patch_size)).all(1)
    if not kept.any():
        raise ValueError(
            f"no patch of {bag.slide} lies in the {len(polygons) + len(points)} regions of {name}. Draw them on tissue "
            "of this very slide; coordinates must be full-resolution pixels, as QuPath exports them."
        )
    return torch.from_numpy(np.flatnonzero(kept))


def _read_json(path: str | Path) -> Any:
    """Parsed JSON of a file from outside. Raises ValueError for one that is missing, too big, or broken."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path.name}.")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.name} is larger than {MOST_BYTES >> 20} MB. Export fewer objects.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path.name} is not valid JSON ({str(error).splitlines()[0][:100]}). Export it again."
        ) from error


def _geometries(content: Any, name: str) -> tuple[list[list[np.ndarray]], list[np.ndarray]]:
    """Polygons, each a list of rings (V, 2), and points (2,) of parsed GeoJSON."""
    polygons: list[list[np.ndarray]] = []
    points: list[np.ndarray] = []
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):  # QuPath writes a bare list of features if it is asked to
            waiting += item
            continue
        kind = item.get("type") if isinstance(item, dict) else None
        if kind in ("FeatureCollection", "Feature", "GeometryCollection"):
            waiting.append(item.get({"FeatureCollection": "features", "Feature": "geometry"}.get(kind, "geometries")))
        elif kind in ("Polygon", "MultiPolygon"):
            parts = item.get("coordinates")
            for part in parts if kind == "MultiPolygon" and isinstance(parts, list) else [parts]:
                rings = [_positions(ring, name) for ring in part] if isinstance(part, list) else []
                if not rings or min(map(len, rings)) < 3:
                    raise ValueError(f"a {kind} of {name} has a ring of fewer than three corners. Export it again.")
                polygons.append(rings)
        elif kind in ("Point", "MultiPoint"):
            given = item.get("coordinates")
            points += list(_positions([given] if kind == "Point" else given, name))
        elif item is not None and kind not in ("LineString", "MultiLineString"):
            raise ValueError(f"{name} is JSON, but no GeoJSON. In QuPath: File > Export objects as GeoJSON.")
    return polygons, points


def _positions(values: Any, name: str) -> np.ndarray:
    """(V, 2) float64 of GeoJSON positions; a third number, the height, is dropped."""
    try:
        out = np.array([[float(value[0]), float(value[1])] for value in values], np.float64).reshape(-1, 2)
    except (TypeError, ValueError, LookupError, OverflowError):
        out = np.array([[np.nan, np.nan]])
    if not (np.abs(out) < 2**31).all():
        raise ValueError(f"{name} has coordinates that are no pixel positions. Export it again from QuPath.")
    return out


def _inside(rings: Sequence[np.ndarray], points: np.ndarray) -> np.ndarray:
    """(M,) bool: which points (M, 2) lie inside rings (V, 2), by the even-odd rule, so that inner rings are holes.

    Patches lie on few rows: edges are cut once per row, and a point is inside if an odd number of cuts is left of it.
    """
    out = np.zeros(len(points), bool)
    low, high = rings[0].min(0), rings[0].max(0)
    near = np.flatnonzero(((low <= points) & (points <= high)).all(1))
    starts, ends = np.concatenate(rings), np.concatenate([np.roll(ring, -1, 0) for ring in rings])
    rows, row = np.unique(points[near, 1], return_inverse=True)
    groups = np.split(near[np.argsort(row, kind="stable")], np.cumsum(np.bincount(row))[:-1]) if len(near) else []
    for y, group in zip(rows, groups):
        cut = (starts[:, 1] <= y) != (ends[:, 1] <= y)
        (x0, y0), (x1, y1) = starts[cut].T, ends[cut].T
        cuts = np.sort(x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        out[group] = np.searchsorted(cuts, points[group, 0]) % 2 == 1
    return out


# ---- back from the record ----


@dataclass(frozen=True, eq=False)
class Record:
    """What a selection.json says of how it was made, as far as a replay needs it.

    indices: (K,) int64 ascending; coords: (K, 2) int32 of these; scores: (N,) float32
    slide_mpp: um/px that was given by hand, else None
    questions: (text, options) in the order they were asked
    """

    slide: str
    slide_mpp: float | None
    encoder: str
    max_patches: int | None
    selector: str
    indices: Tensor
    coords: Tensor
    scores: Tensor
    weights_sha256: str | None
    patches_sha256: str | None
    questions: tuple[tuple[str, tuple[str, ...]], ...]

    def check_names(self, *, slide: str | None = None, encoder: str | None = None) -> None:
        """Raise ValueError, in words, if the record is about another slide or encoder; None is not compared."""
        self._check_same("slide", self.slide, slide)
        self._check_same("encoder", self.encoder, encoder)

    def check(self, bag: Bag) -> None:
        """Raise ValueError, in words, unless the bag has the very patches that the record is about."""
        self.check_names(slide=bag.slide, encoder=bag.encoder)
        self._check_same("number of patches", f"{len(self.scores):,}", f"{len(bag.features):,}")
        if not torch.equal(bag.coords[self.indices], self.coords):
            raise ValueError(
                "this selection cannot be replayed here: its patches lie elsewhere on the slide. "
                "Pass the resolution (slide_mpp=) and the model it was made with."
            )

    def _check_same(self, what: str, recorded: str, found: str | None) -> None:
        if found not in (None, recorded):
            raise ValueError(
                f"this selection cannot be replayed here: its {what} is {recorded}, not {found}. "
                "Open the slide it was made from, with the same model."
            )


def read_selection(path: str | Path) -> Record:
    """Read what write_selection wrote. Raises ValueError, in words, for any other file."""
    name, content = Path(path).name, _read_json(path)
    try:
        slide, patches, chosen = content["slide"], content["patches"], content["selection"]
        record = Record(
            slide=str(slide["name"]),
            slide_mpp=float(slide["mpp"]) if slide["mpp_source"] == "argument" else None,
            encoder=str(patches["encoder"]),
            max_patches=patches["max_patches"],
            selector=str(chosen["selector"]),
            indices=torch.tensor(chosen["indices"], dtype=torch.int64),
            coords=torch.tensor(chosen["coords"], dtype=torch.int32),
            scores=torch.tensor(chosen["scores"], dtype=torch.float32),
            weights_sha256=content["model"]["weights_sha256"],
            patches_sha256=patches.get("sha256"),
            questions=tuple((str(a["question"]), tuple(map(str, a["options"]))) for a in content["answers"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} is no selection.json of this version ({error!r:.100}). Make it again.") from error
    k, n = len(record.indices), len(record.scores)
    ascending = record.indices.ndim == 1 and bool((record.indices.diff() > 0).all())
    fits = k > 0 and ascending and record.coords.shape == (k, 2) and record.scores.ndim == 1
    if not fits or record.indices[0] < 0 or record.indices[-1] >= n:
        raise ValueError(f"{name} names patches that cannot be ({k} of {n}). Make it again.")
    return record


# ---- bytes ----


def write_image(path: str | Path, image: Image.Image) -> None:
    """Write a picture as PNG."""
    data = io.BytesIO()
    image.save(data, "PNG")
    _write(path, data.getvalue())


def weights_digest(folder: str | Path) -> str | None:
    """sha256 over the weight files of a model folder (names and contents); None for a repository on a hub."""
    files = sorted(Path(folder).glob("**/*.safetensors")) if Path(folder).is_dir() else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() if files else None


def patches_digest(bag: Bag) -> str:
    """sha256 over the places and the features of all patches: what the model was given of the slide."""
    digest = hashlib.sha256(f"{bag.encoder} {bag.patch_size} {tuple(bag.features.shape)}".encode())
    digest.update(np.ascontiguousarray(bag.coords.numpy(), "<i4").data)
    digest.update(np.ascontiguousarray(bag.features.numpy(), "<f2").data)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _write(path: str | Path, data: bytes) -> None:
    """Write all of it or nothing: a reader never sees half a file."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
