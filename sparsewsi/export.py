"""Files about a selection: CSV, QuPath GeoJSON and a JSON record from which it can be replayed. All writes are atomic.

N patches, K kept. Positions are in the level-0 frame, px.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sparsewsi.bag import Bag
from sparsewsi.config import SparseWSIConfig

if TYPE_CHECKING:  # model.py stands above this file
    from sparsewsi.model import Selection

RECORDED_PACKAGES = ("sparsewsi", "torch", "transformers", "peft", "numpy", "openslide-python", "openslide-bin")
CLASS_NAME = "SparseWSI selected"
CLASS_COLOUR = (230, 159, 0)  # Okabe and Ito's orange: told from blue by every kind of colour vision


@dataclass(frozen=True)
class Answer:
    """A question that was put and what came back.

    options: empty for an open question
    probs:   one per option, sums to 1
    """

    question: str
    text: str
    options: tuple[str, ...] = ()
    probs: tuple[float, ...] = ()


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
        "model": {"name": model, "weights_sha256": weights_sha256, "config": asdict(config)},
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
