"""Feature files, ours and other tools': TRIDENT, CLAM, AtlasPatch, STAMP and SlideChat are read as they are.

N patches, D feature dim.
"""

import csv
import hashlib
import itertools
import json
import math
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from sparsewsi.bags.bag import UNKNOWN_ENCODER, Bag, describe, from_facts, read_own
from sparsewsi.files import as_path, replacing
from sparsewsi.slides.resolution import PLAUSIBLE_MPP

_NOMINAL_PATCH_SIZE = 256  # level-0 px; only for files that say nothing about size and position

# Names that other tools give to the same weights and the same output (no projection, no normalisation).
_ENCODER_ALIASES = {
    "conch_v1": "conch",
    "mahmood-conch": "conch",
    "conchv1_5": "conch_v15",
    "mahmood-conch1_5": "conch_v15",
    "uni_v1": "uni",
    "mahmood-uni": "uni",
    "uni_v2": "uni2",
    "uni2-h": "uni2",
    "mahmood-uni2": "uni2",
    "prov-gigapath": "gigapath",
    "prov_gigapath": "gigapath",
    "hoptimus0": "h-optimus-0",
    "h_optimus_0": "h-optimus-0",
    "phikon": "hf:owkin/phikon",
    "phikon_v2": "hf:owkin/phikon-v2",
}


# Of patch encoders in use. As the number of patches of a slide each is rare, and with another D it says (D, N).
_DIMS = (192, 384, 512, 768, 1024, 1152, 1280, 1408, 1536, 2048, 2560, 3072)
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7-Zip"}
_MOST_RATIO = 200  # bytes of features per byte of file; even zeros that are compressed stay below


@dataclass(frozen=True)
class _Foreign:
    """What a foreign file says; None where it says nothing.

    features: (N, D); coords: (N, >= 2), level-0 px unless unit_mpp is given: then px of that um/px
    """

    features: np.ndarray
    coords: np.ndarray | None = None
    patch_size: float | None = None
    mpp: float | None = None
    slide_mpp: float | None = None
    mpp_source: str = "unknown"
    slide_size: tuple[int, int] | None = None
    encoder: str | None = None
    note: str = ""
    overlap: float | None = None  # of neighbours, px


def load_bag(
    path: str | Path,
    *,
    encoder: str | None = None,
    slide_mpp: float | None = None,
    allow_pickle: bool = False,
) -> Bag:
    """Read a bag: our safetensors, TRIDENT / CLAM / AtlasPatch / STAMP h5, CLAM pt, SlideChat csv, npy.

    The content decides, not the file name. Rows of foreign files with coordinates are sorted into raster order.
    encoder:      encoder of a file that does not state it, or which of several feature sets (AtlasPatch) to take
    slide_mpp:    um/px of level 0 of a file that does not state it; STAMP's coordinates are in um and need it
    allow_pickle: read an old npy that holds a pickled dict; only for files you made, unpickling runs code
    Warns in words where the positions or the size of the patches had to be assumed (also in Bag.note).
    Raises ValueError for files that are empty, broken, of another kind, or hold features that are not finite.
    """
    path = as_path(path)
    try:
        if not path.is_file():
            raise ValueError(f"{path.name} is not a file. Pass a feature file (safetensors, h5, pt, csv, npy).")
        with path.open("rb") as file:
            head = file.read(64)
        return _read_any(path, head, encoder, slide_mpp, allow_pickle)
    except PermissionError:
        raise ValueError(f"{path.name} may not be read: this user lacks the permission.") from None
    except OSError as error:  # a disk or a network mount that went away
        raise ValueError(f"{path.name} cannot be read ({error.strerror or error}). Is its disk there?") from error


def _read_any(path: Path, head: bytes, encoder: str | None, slide_mpp: float | None, allow_pickle: bool) -> Bag:
    if not head:
        raise ValueError(f"{path.name} is empty (0 bytes), probably left by a killed job. Make it again.")
    if head[8:9] == b"{":
        return _fill_in(read_own(path), encoder, slide_mpp)
    if head.startswith(b"\x89HDF"):
        found = _read_h5(path, encoder, slide_mpp)
        if isinstance(found, Bag):
            return _fill_in(found, encoder, slide_mpp)
    elif head.startswith(b"PK") and head[30:].split(b".npy")[0] != head[30:]:
        found = _read_npz(path)
    elif head.startswith((b"PK", b"\x80")):
        found = _read_pt(path, encoder, slide_mpp)
    elif head.startswith(b"\x93NUMPY"):
        found = _read_npy(path, allow_pickle)
    elif path.suffix.lower() in (".csv", ".txt"):
        found = replace(_read_csv(path), encoder=encoder or "conch")  # SlideChat has no other
    elif head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path.name} is a Git LFS pointer, not the file itself. Run git lfs pull where it came from.")
    elif (packed := next((name for sign, name in _PACKED.items() if head.startswith(sign)), "")) != "":
        raise ValueError(f"{path.name} is packed with {packed}. Unpack it first.")
    else:
        raise ValueError(
            f"{path.name} is no feature file known here (safetensors, h5, pt, csv, npy). For a slide use extract_bag."
        )
    if slide_mpp is not None:
        found = replace(found, slide_mpp=slide_mpp, mpp_source="argument")
    if encoder is not None:
        found = replace(found, encoder=found.encoder or encoder)
    return _to_bag(found, path)


def _fill_in(bag: Bag, encoder: str | None, slide_mpp: float | None) -> Bag:
    """A bag of our own, with what the caller knows and the file does not."""
    if encoder is not None and bag.encoder == UNKNOWN_ENCODER:
        bag = replace(bag, encoder=_encoder_name(encoder))
    if slide_mpp is not None and bag.slide_mpp is None:
        bag = replace(bag, slide_mpp=slide_mpp, mpp_source="argument")
    return bag


def _to_bag(found: _Foreign, path: Path) -> Bag:
    """Check what a foreign file says, fill in what it does not, sort rows into raster order."""
    features, notes = found.features, [found.note] if found.note else []
    if features.ndim == 3 and features.shape[0] == 1:  # (1, N, D), a batch of one slide
        features = features[0]
    if features.ndim == 1 and features.dtype.kind == "f":
        raise ValueError(f"{path.name} holds one vector of {len(features)} numbers: a whole slide's, not its patches'.")
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
        raise ValueError(f"{path.name}: features must be floating-point (N, D), got {features.dtype} {features.shape}.")
    if features.shape[1] == 0:
        raise ValueError(f"{path.name}: features have no columns, got {features.shape}.")
    if features.dtype.itemsize > 8:
        features = features.astype(np.float64)  # which torch knows
    if len(features) > 1 and (features[:, 0] == features[0, 0]).all() and (features == features[0]).all():
        notes.append("All patches have the same features: what made the file encoded one patch again and again.")
    blank = int((~features[features[:, 0] == 0].any(1)).sum())
    if blank:
        notes.append(
            f"The features of {blank} of {len(features)} patches are all zero, as a killed job leaves them: if one "
            "made the file, make it again."
        )

    size = found.patch_size
    if found.coords is None:
        rows, columns = features.shape
        if rows in _DIMS and columns not in _DIMS and columns % 64:
            raise ValueError(
                f"{path.name}: features are {rows} x {columns}, which looks like (D, N); they must be (N, D), a row a "
                "patch. Turn them (features.T), or keep them with their coords if the slide has so many patches."
            )
        size = size or _NOMINAL_PATCH_SIZE
        coords = _raster_index(len(features)) * round(size)
        notes.append(
            "The file holds no coordinates: patches are laid out as a square raster in file order, "
            "so their places on the slide are not known."
        )
    else:
        coords = np.asarray(found.coords)
        if coords.ndim == 3 and coords.shape[0] == 1:
            coords = coords[0]
        if coords.ndim != 2 or coords.shape[1] < 2 or len(coords) != len(features):
            turned = coords.ndim == 2 and features.shape[1] == len(coords)
            raise ValueError(
                f"{path.name}: {features.shape[0]} features but coords of shape {coords.shape}; they must be (N, 2) "
                f"with the same N. {'Features are stored as (D, N).' if turned else 'It may come from a killed job.'}"
            )
        if coords.shape[1] == 3:
            raise ValueError(f"{path.name}: coords are {coords.shape}, which two are x and y? Write these alone.")
        coords = coords[:, :2]
        if coords.dtype.kind not in "iuf":
            raise ValueError(f"{path.name}: coords are {coords.dtype}, not numbers.")
        if not np.isfinite(coords).all() or np.abs(coords).max(initial=0) > 2**31 - 1:
            raise ValueError(f"{path.name}: coords are not finite or beyond 32 bits, so they are no pixel positions.")
        step = _grid_step(coords)
        if len(coords) > 1 and (step is None or step <= 1):
            what = "all the same" if step is None else "a px or less apart, so they seem to count patches"
            notes.append(f"The coordinates are {what}: where patches lie on the slide is not known.")
        if size is None:
            size = step or _NOMINAL_PATCH_SIZE
            notes.append(
                f"The file states no patch size: {round(size)} level-0 px "
                + ("is the step of its coordinates." if step else "is assumed.")
            )
        elif step and not found.overlap and abs(step - size) > max(2, 0.02 * size):
            notes.append(
                f"Patches are {round(size)} level-0 px wide, but {round(step)} px apart: they overlap or leave gaps, "
                "or the coordinates are px of another level."
            )
        notes += _doubt_places(coords, found.slide_size)
        order = np.lexsort((coords[:, 0], coords[:, 1]))
        if (np.diff(order) != 1).any():  # a copy of many patches is felt
            features = features[order]
        coords = np.rint(coords[order])
    note = " ".join(notes)
    try:
        bag = Bag(
            features=torch.from_numpy(np.ascontiguousarray(features)),
            coords=torch.from_numpy(coords.astype(np.int32)),
            patch_size=max(1, round(size)),
            mpp=found.mpp,
            encoder=_encoder_name(found.encoder),
            slide=_anonymous_name(path),
            slide_mpp=found.slide_mpp,
            mpp_source=found.mpp_source,
            slide_size=found.slide_size,
            note=note,
        )
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if note:
        warnings.warn(note, UserWarning, stacklevel=4)  # without the file's name, which may be a patient's
    return bag


def _doubt_places(coords: np.ndarray, size: tuple[int, int] | None) -> Iterator[str]:
    """Sentences on places (N, 2) that no patches of one slide of `size` have."""
    beyond = (coords < 0).any(1) if size is None else ((coords < 0) | (coords >= size)).any(1)
    if beyond.any():
        yield (
            f"{np.count_nonzero(beyond)} of {len(coords)} patches lie beyond the slide"
            + (f" of {size[0]} x {size[1]} px" if size else "")
            + ": the coordinates are of another slide or level, or x and y are exchanged."
        )
    twice = len(coords) - len(np.unique(coords, axis=0))
    if twice and twice < len(coords) - 1:  # of all at one place the step has told
        yield f"{twice} of {len(coords)} patches lie where another one does: the file may hold them twice."


def _encoder_name(stated: str | None) -> str:
    if not stated:
        return UNKNOWN_ENCODER
    name = stated.strip()
    return _ENCODER_ALIASES.get(name.lower(), name)


def _anonymous_name(path: Path) -> str:
    """A name without the file's: slide file names are often patient ids."""
    with path.open("rb") as file:
        digest = hashlib.sha256(str(path.stat().st_size).encode() + file.read(1 << 20))
    return f"slide {digest.hexdigest()[:8]}"


def _raster_index(count: int) -> np.ndarray:
    """(count, 2) column and row of a raster that is about square."""
    width = max(1, math.isqrt(max(count - 1, 0)) + 1)
    index = np.arange(count)
    return np.stack([index % width, index // width], axis=1)


def _grid_step(coords: np.ndarray) -> float | None:
    """Distance between neighbours of a row or a column; None where all patches are at one place.

    CLAM lays a grid over each piece of tissue, and these do not fit each other: the smallest distance that is common.
    """
    steps = []
    for along, across in ((0, 1), (1, 0)):
        places = coords[np.lexsort((coords[:, along], coords[:, across]))]
        steps.append(np.diff(places[:, along])[np.diff(places[:, across]) == 0])
    found = np.concatenate(steps)
    if not (found > 0).any():  # no two are in one row or column
        found = np.concatenate([np.diff(np.unique(coords[:, axis])) for axis in (0, 1)])
    values, counts = np.unique(found[found > 0], return_counts=True)
    if not len(values):
        return None
    return float(values[counts >= min(counts.max(), 0.1 * counts.sum())][0])


def _read_h5(path: Path, encoder: str | None, slide_mpp: float | None) -> _Foreign | Bag:
    try:
        with h5py.File(path, "r") as file:
            data, chosen = _find_features(file, path, encoder)
            coords = file.get("coords")
            if coords is not None and not isinstance(coords, h5py.Dataset):
                raise ValueError(f"{path.name}: `coords` is a group, not a data set.")
            _check_within(file, path, data, coords)
            # AtlasPatch and STAMP describe patches on the file, TRIDENT and CLAM on the coords.
            facts: dict[str, Any] = dict(file.attrs)
            facts |= dict(coords.attrs) if coords is not None else {}
            if data.ndim != 1 and coords is not None and "sparsewsi_bag" in facts:
                features = torch.from_numpy(_read_features(data, path))
                return from_facts(
                    features, torch.from_numpy(_to_native(coords[:])), _text(facts["sparsewsi_bag"]), path
                )
            found = _Foreign(
                features=_read_features(data, path),
                coords=_to_native(coords[:]) if coords is not None else None,
                note="" if coords is not None else _name_others(file, data),
                encoder=chosen or _find_encoder(facts, dict(data.attrs), path),
            )
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # h5py raises many types for what is damaged
        raise ValueError(f"{path.name} {_explain_h5(str(error))}") from error
    if "tile_size_um" in facts or _text(facts.get("unit", "")) == "um":
        return _convert_stamp_units(found, facts, path, slide_mpp)
    if "extractor" in facts and found.coords is not None and round(_grid_step(found.coords[:, :2]) or 0) == 224:
        # Before version 2 STAMP counted in px of 256 um / 224 px.
        scaled = replace(found, coords=found.coords * (256 / 224))
        return _convert_stamp_units(scaled, {"tile_size_um": 256.0, "tile_size_px": 224}, path, slide_mpp)
    return _add_pixel_facts(found, facts)


def _explain_h5(error: str) -> str:
    """Why an HDF5 file was not read: only a file that is broken is to be made again."""
    if "unable to lock file" in error:
        return (
            "is open for writing in another program, or its file system has no locks. Close it there, then try again."
        )
    if "already open for" in error or "SWMR" in error:
        return (
            "is being written, or was left so by a program that was killed. If nothing writes to it any more, "
            "h5clear -s FILE (of the HDF5 tools) sets it right."
        )
    if "plugin" in error or "filter" in error:
        return (
            "is compressed with a filter that h5py does not bring, such as Blosc. Copy it with h5repack -f GZIP=1, or "
            "pip install hdf5plugin where it was made and write it without."
        )
    if "Permission denied" in error:
        return "may not be read: this user lacks the permission."
    return "is a broken or truncated HDF5 file. Make it again."


def _read_features(data: h5py.Dataset, path: Path) -> np.ndarray:
    """The features as they are, but wider floating types as float16, a part at a time: a bag holds no more.

    Raises ValueError for a file that promises far more than it holds.
    """
    if not data.shape:
        raise ValueError(f"{path.name} holds a single value as its features, or none. Make it again.")
    if data.size and data.nbytes > _MOST_RATIO * max(data.id.get_storage_size(), path.stat().st_size):
        raise ValueError(f"{path.name} states features of {data.shape} but holds hardly any data. Make it again.")
    if data.dtype.kind != "f" or data.ndim != 2:
        return _to_native(data[:])
    out = np.empty(data.shape, np.float16)
    chunk = data.chunks[0] if data.chunks else 1
    step = -(-max(1, (1 << 24) // max(1, data.shape[1])) // chunk) * chunk  # whole chunks, 64 MB of float32
    with np.errstate(over="ignore"):  # Bag says which rows are beyond float16
        for start in range(0, len(out), step):
            out[start : start + step] = data[start : start + step]
    return out


def _to_native(values: np.ndarray) -> np.ndarray:
    """The same numbers in this machine's byte order, which torch needs."""
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _check_within(file: h5py.File, path: Path, *sets: h5py.Dataset | None) -> None:
    """HDF5 can have a data set elsewhere: a features file from a stranger must not choose what else is read here."""
    for item in sets:
        if item is not None and (item.file.filename != file.filename or item.external or item.is_virtual):
            raise ValueError(f"{path.name} refers to another file for its data; copy the data into it.")


def _find_features(file: h5py.File, path: Path, encoder: str | None) -> tuple[h5py.Dataset, str | None]:
    """The data set with the features, and the encoder's name where that is the data set's (AtlasPatch)."""
    for name in ("features", "feats"):
        item = file.get(name)
        if isinstance(item, h5py.Dataset):
            return item, None
        if isinstance(item, h5py.Group):
            sets = {_text(key): value for key, value in item.items() if isinstance(value, h5py.Dataset)}
            wanted = [key for key in sets if encoder is None or encoder in (key, _encoder_name(key))]
            if len(wanted) == 1:
                return sets[wanted[0]], wanted[0]
            if not sets:
                raise ValueError(f"{path.name} holds coordinates but no features yet.")
            raise ValueError(
                f"{path.name} holds features of {', '.join(sets)}; "
                + ("pass encoder= to choose one." if encoder is None else f"none is {encoder}.")
            )
    raise ValueError(
        f"{path.name} holds no data set `features` or `feats`, only: {', '.join(map(_text, file)) or 'nothing'}. "
        "It may be a file of coordinates."
    )


def _name_others(file: h5py.File, features: h5py.Dataset) -> str:
    """A sentence on what may be the coordinates of a file without coords, under another name."""
    names = [_text(name) for name, item in file.items() if isinstance(item, h5py.Dataset) and item != features]
    return f"Coordinates are read from `coords`; the file holds {', '.join(names)} instead." if names else ""


def _find_encoder(facts: dict[str, Any], own: dict[str, Any], path: Path) -> str | None:
    for key in ("encoder", "encoder_name", "patch_encoder", "extractor"):
        value = own.get(key, facts.get(key))
        if value is not None and _text(value):
            return _text(value)
    # TRIDENT names the encoder only in its folder: <job>/20x_512px_0px_overlap/features_conch_v1/<slide>.h5
    folder = path.absolute().parent.name
    return folder.removeprefix("features_") if folder.startswith("features_") else None


def _convert_stamp_units(found: _Foreign, facts: dict[str, Any], path: Path, slide_mpp: float | None) -> _Foreign:
    """STAMP: coordinates and patch side in um; level-0 px follow once the slide's mpp is known."""
    side_um = _number(facts.get("tile_size_um", facts.get("tile_size")))
    if _text(facts.get("feat_type", "tile")) != "tile":
        raise ValueError(f"{path.name} holds {_text(facts['feat_type'])} features of STAMP, not those of patches.")
    if side_um is None or found.coords is None:
        raise ValueError(f"{path.name} looks like STAMP's but lacks coords or tile_size_um. Extract it again.")
    side_px = _number(facts.get("tile_size_px"))
    mpp = side_um / side_px if side_px else None
    unit = slide_mpp or mpp or 1.0
    note = (
        ""
        if slide_mpp
        else f"Coordinates are in um and the file does not state the slide's mpp: positions are in px of {unit:g} um. "
        "Pass slide_mpp= for level-0 px."
    )
    return replace(
        found,
        coords=found.coords[..., :2] / unit,
        patch_size=side_um / unit,
        mpp=mpp,
        slide_mpp=unit,
        mpp_source="argument" if slide_mpp else "assumed",
        note=note,
    )


def _add_pixel_facts(found: _Foreign, facts: dict[str, Any]) -> _Foreign:
    """TRIDENT, AtlasPatch, CLAM, or no attributes at all: coordinates in level-0 px."""
    side, side_level0 = _positive(facts.get("patch_size")), _positive(facts.get("patch_size_level0"))
    magnification = _magnification(facts.get("target_magnification"))
    magnification_level0 = _magnification(facts.get("level0_magnification"))
    if side_level0 is None and side is not None:
        if magnification and magnification_level0:
            side_level0 = side * magnification_level0 / magnification
        elif facts.get("patch_level") is not None:  # CLAM: side in px of that level
            level = _number(facts["patch_level"]) or 0
            downsample = 1.0 if level == 0 else _number(facts.get("downsample"))
            scale = _number(facts.get("custom_downsample")) or 1.0
            side_level0 = side * downsample * scale if downsample else None
    width, height = _number(facts.get("level0_width")), _number(facts.get("level0_height"))
    return replace(
        found,
        patch_size=side_level0,
        mpp=10 / magnification if magnification else None,  # 20x is about 0.5 um/px
        slide_mpp=10 / magnification_level0 if magnification_level0 else None,
        mpp_source="objective power" if magnification_level0 else "unknown",
        slide_size=(int(width), int(height)) if width and height else None,
        overlap=_positive(facts.get("overlap")),
    )


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _number(value: Any) -> float | None:
    """The first finite number of an attribute: CLAM stores pairs, TRIDENT the text "None"."""
    try:
        number = float(np.ravel(value)[0])
    except (TypeError, ValueError, IndexError):
        return None
    return number if math.isfinite(number) else None


def _positive(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and number > 0 else None


def _magnification(value: Any) -> float | None:
    """A magnification that a slide may have, written as 20 or 20x."""
    number = _positive(_text(value).strip("xX ") if isinstance(value, str | bytes) else value)
    return number if number and PLAUSIBLE_MPP[0] <= 10 / number <= PLAUSIBLE_MPP[1] else None


def _read_pt(path: Path, encoder: str | None, slide_mpp: float | None) -> _Foreign:
    """CLAM's pt_files/<slide>.pt: the features alone; coordinates from the h5 beside it or in h5_files/."""
    with path.open("rb") as file:
        head = file.read(2)
    packed = head == b"PK"
    if packed and not zipfile.is_zipfile(path):
        raise ValueError(f"{path.name} is cut short or damaged. Copy it again.")
    if packed and not any(name.endswith("data.pkl") for name in _names_in(path)):
        raise ValueError(f"{path.name} is a zip archive without features of its own. Unpack it first.")
    try:
        if head[:1] == b"\x80" and head != b"\x80\x02":
            raise ValueError("a pickle that torch did not write")
        data = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises half a dozen types for a file that is not tensors alone
        raise ValueError(
            f"{path.name} cannot be read as tensors alone ({type(error).__name__}). Pickled objects are never loaded: "
            "save the features as a tensor, or as h5 or npy."
        ) from error
    if isinstance(data, dict) and isinstance(data.get("features"), Tensor):
        coords = data.get("coords")
        if coords is not None:
            try:
                coords = torch.as_tensor(coords)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{path.name}: coords are a {type(coords).__name__}, no tensor (N, 2).") from error
            coords = _array(coords, path).astype(np.float64)
        return _Foreign(_array(data["features"], path), coords)
    if not isinstance(data, Tensor):
        raise ValueError(f"{path.name} holds a {type(data).__name__}; a tensor (N, D) of features is needed.")
    features = _array(data, path)
    for sibling in (path.with_suffix(".h5"), path.parent.parent / "h5_files" / f"{path.stem}.h5"):
        if sibling.is_file():
            beside = _read_h5(sibling, encoder, slide_mpp)
            if isinstance(beside, Bag):
                return _Foreign(features, beside.coords.numpy(), beside.patch_size, beside.mpp, encoder=beside.encoder)
            return replace(beside, features=features)
    return _Foreign(features, encoder=_find_encoder({}, {}, path))


def _array(tensor: Tensor, path: Path) -> np.ndarray:
    """The tensor's numbers, of the types that NumPy lacks as float32."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = "quantised" if tensor.is_quantized else "sparse" if tensor.layout != torch.strided else "empty (meta)"
        raise ValueError(f"{path.name} holds a {kind} tensor; a dense one (N, D) of features is needed.")
    tensor = tensor.detach().resolve_conj()
    known = not tensor.is_floating_point() or tensor.dtype in (torch.float16, torch.float32, torch.float64)
    return (tensor if known else tensor.float()).numpy()


def _names_in(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _read_npz(path: Path) -> _Foreign:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays)
            alone = names[0] if len(names) == 1 else None
            chosen = next((name for name in ("features", "feats", "feature") if name in names), alone)
            if chosen is not None:
                coords = _to_native(arrays["coords"]) if "coords" in names else None
                return _Foreign(_to_native(arrays[chosen]), coords)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path.name} is a broken npz file ({error}). Make it again.") from error
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise ValueError(f"{path.name} is a broken npz file ({error}). Make it again.") from error
        raise ValueError(f"{path.name} holds pickled objects, which are never loaded. Save plain arrays.") from error
    raise ValueError(f"{path.name} holds the arrays {', '.join(names)}; one must be called features.")


def _read_npy(path: Path, allow_pickle: bool) -> _Foreign:
    try:
        data = np.load(path, mmap_mode="r", allow_pickle=False)  # a header that promises more than the file is told
    except (SyntaxError, TokenError, TypeError, OverflowError, EOFError) as error:  # NumPy parses the header as Python
        raise ValueError(f"{path.name} is a broken npy file: its header says nothing. Make it again.") from error
    except ValueError as error:
        if "pickle" not in str(error).lower() and "object" not in str(error).lower():
            raise ValueError(f"{path.name} is a broken npy file ({error}). Make it again.") from error
        if not allow_pickle:
            raise ValueError(
                f"{path.name} holds pickled objects, which can run code when loaded. "
                # No command has the flag, so the sentence says who may vouch for a file, and the way out of pickles.
                "If you made it yourself, load_bag(path, allow_pickle=True) reads it in Python; save_bag then writes a "
                "file that every command reads."
            ) from error
        # SlideChat's old copies are a pickled dict. Neither a command nor the app sets allow_pickle: only a Python
        # caller who vouches for a file of their own gets here.
        data = np.load(path, allow_pickle=True)  # the caller said so, see above
        data = data.item() if data.ndim == 0 else data
        data = np.asarray(data["feature"]) if isinstance(data, dict) and "feature" in data else data
    if not isinstance(data, np.ndarray) or data.dtype == object:
        raise ValueError(f"{path.name} holds no array (N, D) and no dict with the key `feature`.")
    return _Foreign(_to_native(np.array(data)))


_SLIDECHAT_DIM = 512


def _read_csv(path: Path) -> _Foreign:
    """SlideChat: CONCH features, a row per patch, 512 columns or more, header or none, a name as last column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, strict=True)
            first = next(rows, [])
            second = next(rows, [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path.name} is not a text file of comma-separated values ({error}).") from error
    width = len(first)
    sign = next((name for sign, name in ((";", "semicolons"), ("\t", "tabs")) if sign in "".join(first)), "")
    if width < _SLIDECHAT_DIM or sign:
        raise ValueError(
            f"{path.name} has {width} columns{f', or is set off by {sign}' if sign else ''}; a SlideChat feature file "
            f"has at least {_SLIDECHAT_DIM}, with commas between, one row a patch."
        )
    start = _find_start(first, second, path)
    columns = range(start, start + _SLIDECHAT_DIM)
    skip = int(_is_header(first, columns))
    if skip and not second:
        raise ValueError(f"{path.name} has a header but no rows.")
    if skip and len(second) != width:
        raise ValueError(f"{path.name}: the header has {width} columns, the first row {len(second)}.")
    try:
        features = np.loadtxt(
            path,
            np.float32,
            delimiter=",",
            usecols=columns,
            skiprows=skip,
            ndmin=2,
            quotechar='"',
            encoding="utf-8-sig",
        )
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path.name}: a row does not hold {_SLIDECHAT_DIM} numbers ({error}).") from error
    sample = second if skip else first
    texts = [index for index in range(width) if index not in columns and not _is_number(sample[index])]
    names = [row[texts[-1]] for row in _read_rows(path, width)][skip:] if texts else []
    if texts and len(names) != len(features):
        raise ValueError(f"{path.name}: {len(features)} rows of features but {len(names)} names. Make it again.")
    coords = _coords_from_names(names) if texts else None
    if skip and [cell.strip().lower() for cell in first[:2]] == ["x", "y"] and start == 2:
        coords = np.loadtxt(path, delimiter=",", usecols=(0, 1), skiprows=1, ndmin=2, encoding="utf-8-sig")
    return _Foreign(features, coords)


def _find_start(first: list[str], second: list[str], path: Path) -> int:
    """The first column of features. Raises ValueError for columns of numbers that would be taken for others."""
    names = [cell.strip() for cell in first]
    counted = next((i for i in range(min(3, len(names) - 1)) if names[i : i + 2] == ["0", "1"]), None)
    if counted is not None and second[counted : counted + 2] != ["1", "2"]:  # a header of pandas
        return counted
    start, sample = 2 if len(first) > _SLIDECHAT_DIM + 1 else 0, second or first
    behind = sum(map(_is_number, sample[start + _SLIDECHAT_DIM :]))
    if behind > (8 if start else 0):
        what = f"{behind} more columns of numbers than" if start else "a column of numbers besides"
        raise ValueError(
            f"{path.name} has {what} the {_SLIDECHAT_DIM} features of SlideChat's CONCH. Write the features alone, or "
            "those of another encoder as h5 or npy."
        )
    return start


def _read_rows(path: Path, width: int) -> Iterator[list[str]]:
    """The rows of a CSV one at a time, as they are wide. Raises ValueError where one is not a line of `width` cells.

    A quotation mark that is not closed would take the lines after it into its cell, and their patches with them.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows, line = csv.reader(file, strict=True), 0
        try:
            for row in rows:
                line += 1
                if rows.line_num > line or (row and len(row) != width):
                    raise ValueError(
                        f"{path.name}: line {line} is not {width} cells as the first one"
                        + (", a quotation mark is not closed" if rows.line_num > line else "")
                        + ". Make it again."
                    )
                if row:
                    yield row
        except csv.Error as error:
            raise ValueError(
                f"{path.name}: a quotation mark in line {line + 1} is not closed as it should be ({error})."
            ) from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_header(row: list[str], columns: range) -> bool:
    """Text where features should be, or pandas' column numbers 0, 1, 2, ..."""
    cells = [row[index].strip() for index in columns]
    if not all(_is_number(cell) for cell in cells):
        return True
    return all(cell.isdecimal() for cell in cells) and all(
        int(after) - int(before) == 1 for before, after in itertools.pairwise(cells)
    )


_NAME_XY = (re.compile(r"(\d+)_(\d+)"), re.compile(r".*?x[=_-]?(\d+)[_,-]+y[=_-]?(\d+)(?!.*\d)"))


def _coords_from_names(names: list[str]) -> np.ndarray | None:
    """(N, 2) from patch names such as `4096_8192.png` or `slide_x4096_y8192.png`; None unless every name is one.

    None as well when two patches would share a place: the numbers then mean something else.
    """
    stems = [re.split(r"[\\/]", name.strip())[-1] for name in names]
    stems = [re.sub(r"\.(png|jpe?g|tiff?|bmp|npy|pt)$", "", stem, flags=re.IGNORECASE) for stem in stems]
    for pattern in _NAME_XY:
        matches = [pattern.fullmatch(stem) for stem in stems]
        if all(matches):
            coords = np.array([[int(match[1]), int(match[2])] for match in matches if match], dtype=np.int64)
            return coords if len(np.unique(coords, axis=0)) == len(coords) else None
    return None


# ---- for other tools


def write_trident_h5(bag: Bag, path: str | Path) -> None:
    """Write a bag in TRIDENT's layout, atomically; CLAM's readers of feature files accept it as well.

    `features` float32 (CLAM feeds them to its model as they are) and `coords` int64, contiguous, with TRIDENT's
    attributes. Magnifications are 10 / mpp, not rounded to 20 or 40, so that patch_size_level0 follows from them.
    CLAM's `patch_level` is written only where its meaning (patch_size counts px of that level) is true: level 0.
    Everything else a Bag holds goes into one more attribute, so that load_bag gives back the same bag.
    """
    level0 = bag.patch_size
    facts: dict[str, Any] = {"patch_size_level0": level0, "overlap": 0, "name": bag.slide, "savetodir": ""}
    side = level0
    if bag.mpp is not None and bag.slide_mpp is not None:
        side = max(1, round(level0 * bag.slide_mpp / bag.mpp))
        facts |= {"level0_magnification": 10 / bag.slide_mpp, "target_magnification": 10 / bag.mpp}
    facts["patch_size"] = side
    if side == level0:
        facts["patch_level"] = 0
    if bag.slide_size is not None:
        facts |= {"level0_width": bag.slide_size[0], "level0_height": bag.slide_size[1]}
    facts["sparsewsi_bag"] = json.dumps(describe(bag))
    with replacing(path) as partial, h5py.File(partial, "w") as file:
        features = file.create_dataset("features", tuple(bag.features.shape), np.float32)
        for first in range(0, len(bag.features), 8192):  # a float32 copy of a million patches would be 5 GB
            features[first : first + 8192] = bag.features[first : first + 8192].float().numpy()
        features.attrs.update({"name": bag.slide, "savetodir": "", "encoder": bag.encoder})
        file.create_dataset("coords", data=bag.coords.numpy().astype(np.int64)).attrs.update(facts)
