"""selection.json: what was run and what came out, enough to run it again; and the way back from it.

N patches, K kept.
"""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsewsi.bags.bag import Bag, list_parts
from sparsewsi.files import read_json, write_json
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.selection import Selection
from sparsewsi.report.answer import Answer, name_llm, word_notice
from sparsewsi.report.contradictions import word_contradictions

RECORDED_PACKAGES = ("sparsewsi", "torch", "transformers", "peft", "numpy", "openslide-python", "openslide-bin")


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
    marks: Mapping[int, str] | None = None,
) -> None:
    """What was run and what came out, enough to run it again: model, slide, patches, scores, versions, answers.

    model:          name of the model's folder or repository, not a path
    weights_sha256: see model/artefact.py
    marks:          what the reader said of patches, by index: "agree" or "disagree"
    The slide is named by a digest of its content (Bag.slide), never by a path.
    """
    record = {
        "notice": " ".join(filter(None, [word_contradictions(answers), word_notice(config)])),
        "model": {
            "name": model,
            "weights_sha256": weights_sha256,
            "config": asdict(config) | {"llm": name_llm(config)},
        },
        "slide": {
            "name": bag.slide,
            "size": bag.slide_size,
            "mpp": bag.slide_mpp,
            "mpp_source": bag.mpp_source,
        }
        | ({"parts": [asdict(part) for part in bag.parts]} if bag.parts else {}),  # of several slides, joined
        "patches": {
            "encoder": bag.encoder,
            "mpp": bag.mpp,
            "size_level0": bag.patch_size,
            "max_patches": max_patches,
            "count": selection.num_patches,
            "sha256": digest_patches(bag),
            "note": bag.note,
        },
        "selection": {
            "selector": selector,
            "count": len(selection.indices),
            "indices": selection.indices.tolist(),
            "ranks": selection.ranks.tolist(),
            "coords": bag.coords[selection.indices].tolist(),
            "scores": [float(f"{score:.9g}") for score in selection.scores.tolist()],
        },
        "answers": [asdict(answer) for answer in answers],
        "marks": {str(index): mark for index, mark in (marks or {}).items()},
        "versions": {"python": platform.python_version(), **list_versions()},
    }
    write_json(path, record)


def describe_slides(bag: Bag) -> list[dict[str, Any]]:
    """The slides of a bag for programs: number, from 1, name, num_patches, mpp of the scan and size (level-0 px)."""
    return [
        {
            "number": number,
            "name": part.slide,
            "num_patches": part.patches,
            "mpp": part.slide_mpp,
            "size": part.slide_size and list(part.slide_size),
        }
        for number, part in enumerate(list_parts(bag), 1)
    ]


# ---- back from it ----


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
    name, content = Path(path).name, read_json(path)
    try:
        # what is beside is of other patches, and what was refused was never put
        answers = [one for one in content["answers"] if not one.get("beside") and not one.get("refused")]
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
            questions=tuple((str(a["question"]), tuple(map(str, a["options"]))) for a in answers),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} is no selection.json of this version ({error!r:.100}). Make it again.") from error
    k, n = len(record.indices), len(record.scores)
    ascending = record.indices.ndim == 1 and bool((record.indices.diff() > 0).all())
    fits = k > 0 and ascending and record.coords.shape == (k, 2) and record.scores.ndim == 1
    if not fits or record.indices[0] < 0 or record.indices[-1] >= n:
        raise ValueError(f"{name} names patches that cannot be ({k} of {n}). Make it again.")
    return record


# ---- what names what was run ----


def digest_patches(bag: Bag) -> str:
    """sha256 over the places and the features of all patches: what the model was given of the slide."""
    digest = hashlib.sha256(f"{bag.encoder} {bag.patch_size} {tuple(bag.features.shape)}".encode())
    digest.update(np.ascontiguousarray(bag.coords.numpy(), "<i4").data)
    digest.update(np.ascontiguousarray(bag.features.numpy(), "<f2").data)
    return digest.hexdigest()


def list_versions() -> dict[str, str]:
    """Versions of the packages that a result may depend on."""
    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
