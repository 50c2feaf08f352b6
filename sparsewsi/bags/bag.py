"""A slide after encoding: features and coordinates of its patches, and the file that keeps them.

bags/extract.py makes a bag of a slide, bags/foreign.py reads any tool's feature file. N patches, D feature dim.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsewsi.files import replacing

FEATURE_SUFFIXES = (".safetensors", ".h5", ".hdf5", ".pt", ".npy", ".csv")  # of files that load_bag reads
UNKNOWN_ENCODER = "unknown"
_MAX_FLOAT16 = 65504.0


@dataclass(frozen=True)
class Part:
    """One slide of a case of several (see join)."""

    slide: str
    patches: int
    top: int  # how far its coords lie below where they are on the slide itself, px
    patch_size: int
    slide_mpp: float | None
    slide_size: tuple[int, int] | None
    bounds: tuple[int, int, int, int] | None = None
    mpp_source: str = "unknown"


@dataclass(frozen=True, eq=False)
class Bag:
    """One slide after encoding. CPU tensors, deep-copyable; N = 0 is legal (a slide without tissue).

    features:   (N, D) float16, raster order; other floating types are rounded to float16
    coords:     (N, 2) int32, (x, y) of the patch's top-left corner, level-0 px
    patch_size: side of a patch in level-0 px
    mpp:        um/px at which patches were read; None where a foreign file does not say
    encoder:    key of ENCODERS, "hf:<id>", another tool's name, or "unknown"
    slide:      name shown to people; never a path, never a patient id
    slide_mpp:  um/px of level 0
    mpp_source: where slide_mpp comes from
    slide_size: (W, H) of level 0, px
    note:       what a reader should know, such as positions that the file does not hold
    parts:      of several slides joined as one case, what each of them contributed, in order; else empty
    bounds:     (x, y, w, h) of the part that was scanned, level-0 px; None where it is all of the slide or not known
    Raises ValueError for shapes that do not fit each other, for features that are not finite in float16, for coords
    that are not whole numbers of 32 bits, and for sizes and resolutions that nothing can have.
    """

    features: Tensor
    coords: Tensor
    patch_size: int
    mpp: float | None
    encoder: str
    slide: str
    slide_mpp: float | None = None
    mpp_source: str = "unknown"
    slide_size: tuple[int, int] | None = None
    note: str = ""
    parts: tuple["Part", ...] = ()
    bounds: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        features, coords = self.features, self.coords
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(f"features must be floating-point (N, D), got {features.dtype} {tuple(features.shape)}.")
        if tuple(coords.shape) != (len(features), 2):
            raise ValueError(
                f"coords must be (N, 2) with N = {len(features)} as in features, got {tuple(coords.shape)}."
            )
        if not self.patch_size >= 1 or self.patch_size % 1 != 0:
            raise ValueError(f"patch_size must be a whole number of level-0 px and at least 1, got {self.patch_size}.")
        for name in ("mpp", "slide_mpp"):
            stated = getattr(self, name)
            if stated is not None and not 0 < stated < math.inf:
                raise ValueError(f"{name} must be a positive number of um/px or None, got {stated}.")
        if coords.dtype == torch.bool or coords.is_complex():
            raise ValueError(f"coords must be whole numbers (int32), got {coords.dtype}.")
        whole = coords.detach().cpu()
        # Far corners are computed in 32 bits as well.
        most = 2**31 - 1 - int(self.patch_size)
        if len(whole) and not (whole.double().abs().max() <= most and bool((whole.double() % 1 == 0).all())):
            raise ValueError("coords must be whole level-0 px within 32 bits; some are fractions, too large or NaN.")
        half = features.detach().to("cpu", torch.float16)
        # In parts: isfinite's own copies of a million patches would take twice what the features do.
        finite = [torch.isfinite(part).all(1) for part in half.split(8192)]
        rows = (~torch.cat(finite)).nonzero()[:, 0] if finite else torch.empty(0)
        if len(rows):
            raise ValueError(
                f"{len(rows)} of {len(half)} patches have features that are NaN, infinite or beyond float16's "
                f"{_MAX_FLOAT16:.0f} (first: row {int(rows[0])}). Encode the slide again."
            )
        object.__setattr__(self, "features", half)
        object.__setattr__(self, "coords", whole.to(torch.int32))
        object.__setattr__(self, "patch_size", int(self.patch_size))
        for name in ("slide_size", "bounds"):
            stated = getattr(self, name)
            if stated is not None:
                object.__setattr__(self, name, tuple(int(side) for side in stated))


def check_bag(bag: Bag, encoder: str, feature_dim: int) -> None:
    """Raise ValueError, in words, if a model for features of `encoder` (D = feature_dim) cannot take this bag.

    A foreign file may not state its encoder, nor may what the model was trained on; then only the dimension can be
    compared.
    """
    if bag.encoder not in (encoder, UNKNOWN_ENCODER) and encoder != UNKNOWN_ENCODER:
        raise ValueError(
            f"{bag.slide} was encoded with {bag.encoder}, but the model was trained on {encoder} features. "
            f"Encode the slide with {encoder}, or load a model trained on {bag.encoder}."
        )
    if bag.features.shape[1] != feature_dim:
        raise ValueError(
            f"{bag.slide} has features of dimension {bag.features.shape[1]} (encoder: {bag.encoder}), but the model "
            f"takes {feature_dim} (encoder: {encoder}). Encode the slide with the model's encoder."
        )


def join(bags: Sequence[Bag]) -> Bag:
    """Several slides of a case as one bag, so that K patches are chosen among all of theirs.

    Positions follow on: each slide lies below the one before it, and rows stay in raster order. `locate` tells which
    slide a patch is of. One bag is returned as it is. Raises ValueError for none, for cases that are joined already,
    and where encoders or dimensions differ.
    """
    if not bags:
        raise ValueError("there is no slide to join.")
    first = bags[0]
    if len(bags) == 1:
        return first
    coords, parts, below = [], [], 0
    for bag in bags:
        if bag.parts:
            raise ValueError(f"{bag.slide} is a case of several slides already. Join its slides.")
        check_bag(bag, first.encoder, first.features.shape[1])
        shifted = bag.coords.long() + torch.tensor([0, below])  # 32 bits would wrap around; Bag refuses what is beyond
        coords.append(shifted)
        parts.append(replace(list_parts(bag)[0], top=below))
        below = int(shifted[:, 1].max()) + bag.patch_size if len(shifted) else below
    return replace(
        first,
        features=torch.cat([bag.features for bag in bags]),
        coords=torch.cat(coords),
        slide=" + ".join(bag.slide for bag in bags),
        slide_size=None,
        bounds=None,
        note=" ".join(dict.fromkeys(bag.note for bag in bags if bag.note)),
        parts=tuple(parts),
    )


def list_parts(bag: Bag) -> tuple[Part, ...]:
    """The slides of a bag, in order; of one slide that one."""
    facts = (bag.patch_size, bag.slide_mpp, bag.slide_size, bag.bounds, bag.mpp_source)
    return bag.parts or (Part(bag.slide, len(bag.features), 0, *facts),)


def number_slides(bag: Bag) -> Tensor:
    """(N,) int64: the number, from 0, of the slide that each patch is of."""
    parts = list_parts(bag)
    return torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([part.patches for part in parts]))


def own_coords(bag: Bag) -> Tensor:
    """(N, 2) int32: where each patch lies on its own slide, level-0 px."""
    if not bag.parts:
        return bag.coords
    tops = torch.tensor([[0, part.top] for part in bag.parts], dtype=torch.int32)
    return bag.coords - tops[number_slides(bag)]


@dataclass(frozen=True)
class Place:
    """Where a patch of a bag lies on its own slide: level-0 px of that slide."""

    number: int  # of the slide in its case
    slide: str
    x: int
    y: int
    patch_size: int
    slide_mpp: float | None


def locate(bag: Bag, row: int) -> Place:
    """Which slide a patch is of, and where on it; a bag of one slide is its number 0."""
    x, y = bag.coords[row].tolist()
    first = 0
    for number, part in enumerate(list_parts(bag)):
        if row < first + part.patches:
            return Place(number, part.slide, x, y - part.top, part.patch_size, part.slide_mpp)
        first += part.patches
    raise IndexError(f"{bag.slide} has {first:,} patches, and no row {row:,}.")


# ---- its file


def save_bag(bag: Bag, path: str | Path, made_from: dict[str, Any] | None = None) -> None:
    """Write a bag as safetensors with JSON metadata, atomically: `path` is the whole file or is not touched.

    made_from: JSON types for the writer's own use; load_bag ignores them
    The same bag gives the same bytes.
    """
    tensors = {"features": bag.features.contiguous(), "coords": bag.coords.contiguous()}
    facts = json.dumps(describe(bag) | ({"made_from": made_from} if made_from else {}))
    with replacing(path) as partial:
        # One key: safetensors writes several in an order that changes from run to run.
        save_file(tensors, partial, metadata={"sparsewsi_bag": facts})


def describe(bag: Bag) -> dict[str, Any]:
    """Everything of a bag but its tensors, as JSON types."""
    bare = replace(bag, features=bag.features[:0], coords=bag.coords[:0])
    facts = asdict(bare) | {"features": None, "coords": None}
    return facts if bag.parts else {name: value for name, value in facts.items() if name != "parts"}


def from_facts(features: Tensor, coords: Tensor, text: str, path: Path) -> Bag:
    """The bag that `describe` described. Raises ValueError for facts of another version."""
    try:
        facts: dict[str, Any] = json.loads(text)
        facts.pop("made_from", None)
        facts |= {"features": features, "coords": coords}
        parts = [Part(**part) for part in facts.get("parts", ())]
        facts["parts"] = tuple(
            replace(
                part, slide_size=part.slide_size and tuple(part.slide_size), bounds=part.bounds and tuple(part.bounds)
            )
            for part in parts
        )
        return Bag(**facts)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path.name} holds bag metadata that this version cannot read: {error}.") from error


def read_own(path: Path) -> Bag:
    """The bag of a file that save_bag wrote. Raises ValueError for one that is broken or holds something else."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = (file.metadata() or {}).get("sparsewsi_bag")
            if facts is None:
                raise ValueError(
                    f"{path.name} is safetensors but no bag (no sparsewsi_bag metadata). save_bag writes bags."
                )
            return from_facts(file.get_tensor("features"), file.get_tensor("coords"), facts, path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is a broken safetensors file ({error}). Make it again.") from error
