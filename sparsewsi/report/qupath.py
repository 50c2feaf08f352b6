"""To QuPath and back: the kept patches as GeoJSON, and the patches in regions that were drawn there.

QuPath's origin is the corner of the part that was scanned (openslide.bounds-*), where a slide states one; ours is
that of the slide. N patches, V corners of a region. Positions are level-0 px.
"""

import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsewsi.bags.bag import Bag, list_parts, locate, number_slides, own_coords
from sparsewsi.files import read_json, write_json
from sparsewsi.model.selection import Selection

CLASS_NAME = "SparseWSI selected"
CLASS_COLOUR = (230, 159, 0)  # Okabe and Ito's orange: told from blue by every kind of colour vision
MOST_BYTES = 8 << 20  # of a GeoJSON; parsed, it takes ten times as many
# Of all regions of a GeoJSON together: some seconds on a slide of 100,000 patches.
MOST_CORNERS, MOST_REGIONS = 200_000, 5000


def write_geojson(
    path: str | Path, bag: Bag, selection: Selection, marks: Mapping[int, str] | None = None, number: int = 0
) -> None:
    """The kept patches as annotations QuPath reads (File > Import objects from file): squares in its own frame.

    Each has the classification CLASS_NAME, its rank as its name, and the measurements "Rank" and "Score"; one that the
    reader marked (marks: by index) has the metadata "Reader".
    number: of the slide whose patches are written, where the bag is of several; QuPath opens one at a time.
    """
    rows = selection.indices.tolist()
    mine = [place for place in selection.best_first.tolist() if locate(bag, rows[place]).number == number]
    features = [_square(bag, selection, place, marks or {}) for place in mine]
    write_json(path, {"type": "FeatureCollection", "features": features})


def _square(bag: Bag, selection: Selection, place: int, marks: Mapping[int, str]) -> dict[str, Any]:
    rank, index = int(selection.ranks[place]), int(selection.indices[place])
    at = locate(bag, index)
    x, y = (place - corner for place, corner in zip((at.x, at.y), _origin(bag, at.number)))
    right, bottom = x + at.patch_size, y + at.patch_size
    return {
        "type": "Feature",
        # The same patch of the same slide keeps its id, so that a second import replaces the first.
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{at.slide}/{[at.x, at.y]}/{at.patch_size}")),
        "geometry": {"type": "Polygon", "coordinates": [[[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]]},
        "properties": {
            "objectType": "annotation",
            "name": f"#{rank}",
            "classification": {"name": CLASS_NAME, "color": list(CLASS_COLOUR)},
            "isLocked": True,
            "measurements": {"Rank": rank, "Score": float(selection.scores[index])},
            **({"metadata": {"Reader": marks[index]}} if index in marks else {}),
        },
    }


def _origin(bag: Bag, number: int = 0) -> tuple[int, int]:
    """Where QuPath's (0, 0) lies on the slide, or on this one of several, level-0 px."""
    bounds = list_parts(bag)[number].bounds
    return (0, 0) if bounds is None else bounds[:2]


# ---- regions ----


@dataclass(frozen=True)
class Regions:
    """rows: (M,) int64, ascending, the patches in the regions of a file; note: which regions were left out, or ""."""

    rows: Tensor
    note: str = ""


def read_regions(path: str | Path, bag: Bag, number: int = 0) -> Tensor:
    """find_regions' patches alone: (M,) int64, ascending."""
    return find_regions(path, bag, number).rows


def find_regions(path: str | Path, bag: Bag, number: int = 0) -> Regions:
    """Patches of a bag in the regions of a GeoJSON file (QuPath: File > Export objects as GeoJSON).

    number: of the slide that they were drawn on, where the bag is of several

    Polygon and MultiPolygon: the patches whose centre is inside, holes excluded; a region too small to hold a centre
    takes the patch at its own middle. Point and MultiPoint: the patch around it. Other geometries are passed over, and
    regions of a class whose name ends in * (QuPath's Ignore*) are left out. Coordinates are QuPath's, px of full
    resolution.
    Raises ValueError, in words, for a file that is too big, that is no GeoJSON, or whose regions meet no patch.
    """
    name = Path(path).name
    polygons, points, passed = _geometries(read_json(path, MOST_BYTES), name)
    if passed["ignored"] and not polygons and not points:
        raise ValueError(
            f"all regions of {name} have a class that ends in *, such as Ignore*, which QuPath leaves out of its own "
            "work. Give those that are meant another class."
        )
    if not polygons and not points:
        raise ValueError(f"{name} holds no polygon and no point. Draw a region in QuPath and export it as GeoJSON.")
    if sum(len(ring) for rings in polygons for ring in rings) > MOST_CORNERS:
        raise ValueError(f"the regions of {name} have more than {MOST_CORNERS:,} corners. Simplify their shapes.")
    values = np.concatenate([*(ring for rings in polygons for ring in rings), *(point[None] for point in points)])
    if values.min() >= 0 and values.max() <= 1:
        raise ValueError(f"all positions of {name} lie between 0 and 1: they must be px of full resolution.")
    corners = own_coords(bag).numpy().astype(np.float64) - _origin(bag, number)  # (N, 2)
    mine, part = number_slides(bag).numpy() == number, list_parts(bag)[number]
    chosen, regions, missed = np.zeros(len(corners), bool), len(polygons) + len(points), []
    for rings in polygons:
        found = _inside(rings, corners + part.patch_size / 2) & mine
        if not found.any():
            points.append((rings[0].min(0) + rings[0].max(0)) / 2)
        chosen |= found
    for point in points:
        found = ((corners <= point) & (point < corners + part.patch_size)).all(1) & mine
        if not found.any():
            missed.append(point)
        chosen |= found
    if not chosen.any():
        raise ValueError(
            f"no patch of {part.slide} lies in {'the region' if regions == 1 else f'the {regions} regions'} of {name}. "
            "Draw on tissue of this very slide; coordinates must be full-resolution pixels, as QuPath exports them."
        )
    notes = []
    if missed:
        x, y = (f"{value:.0f}" for value in missed[0])
        notes.append(f"{len(missed)} of {regions} regions meet no patch, the first at ({x}, {y})")
    if passed["ignored"]:
        notes.append(f"left out for a class that ends in *, such as Ignore*: {passed['ignored']}")
    if passed["line"]:
        notes.append(f"lines, which enclose no patch: {passed['line']}")
    return Regions(torch.from_numpy(np.flatnonzero(chosen)), "; ".join(notes))


def _is_ignored(feature: dict[str, Any]) -> bool:
    """Has an object a class that QuPath itself leaves out?"""
    stated = feature.get("properties")
    stated = stated.get("classification") if isinstance(stated, dict) else None
    name = stated.get("name") if isinstance(stated, dict) else stated
    return isinstance(name, str) and name.strip().endswith("*")


def _geometries(content: Any, name: str) -> tuple[list[list[np.ndarray]], list[np.ndarray], Counter[str]]:
    """Polygons, each a list of rings (V, 2), points (2,) of parsed GeoJSON, how many were passed over and why."""
    passed: Counter[str] = Counter()
    polygons: list[list[np.ndarray]] = []
    points: list[np.ndarray] = []
    waiting = [content]
    while waiting:
        if len(polygons) + len(points) > MOST_REGIONS:
            raise ValueError(f"{name} holds more than {MOST_REGIONS:,} regions or points. Export fewer objects.")
        item = waiting.pop()
        if isinstance(item, list):  # QuPath writes a bare list of features if it is asked to
            waiting += item
            continue
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "Feature" and _is_ignored(item):
            passed["ignored"] += 1
            continue
        if kind in ("FeatureCollection", "Feature", "GeometryCollection"):
            waiting.append(item.get({"FeatureCollection": "features", "Feature": "geometry"}.get(kind, "geometries")))
        elif kind in ("Polygon", "MultiPolygon"):
            parts = item.get("coordinates")
            parts = parts if kind == "MultiPolygon" and isinstance(parts, list) else [parts]
            for part in parts[: MOST_REGIONS + 1]:
                rings = [_positions(ring, name) for ring in part] if isinstance(part, list) else []
                if not rings or min(map(len, rings)) < 3:
                    raise ValueError(f"a {kind} of {name} has a ring of fewer than three corners. Export it again.")
                polygons.append(rings)
        elif kind in ("Point", "MultiPoint"):
            given = item.get("coordinates")
            given = given[: MOST_REGIONS + 1] if kind == "MultiPoint" and isinstance(given, list) else [given]
            points += list(_positions(given, name))
        elif kind in ("LineString", "MultiLineString"):
            passed["line"] += 1
        elif item is not None:
            raise ValueError(f"{name} is JSON, but no GeoJSON. In QuPath: File > Export objects as GeoJSON.")
    if len(polygons) + len(points) > MOST_REGIONS:
        raise ValueError(f"{name} holds more than {MOST_REGIONS:,} regions or points. Export fewer objects.")
    return polygons, points, passed


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
    low, high = np.min([ring.min(0) for ring in rings], 0), np.max([ring.max(0) for ring in rings], 0)
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
