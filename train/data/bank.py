"""Feature banks: labelled patches, encoded once, from which mosaics are put together.

M patches in the bank, D feature dim.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparsewsi import phantom
from sparsewsi.files import replacing
from train.data.kinds import BACKGROUNDS, NEEDLES, Vocabulary
from train.data.tiles import SPLIT_FILE, Tile, augment_tile, turn_tile

Labelled = tuple[np.ndarray, str, str, str]  # pixels uint8 (224, 224, 3), kind, source, split


@dataclass(frozen=True)
class Bank:
    """Features of labelled patches, grouped by kind, for one origin ("real" or "phantom") and one split."""

    features: torch.Tensor  # (M, D) float16
    kinds: np.ndarray  # (M,) str
    sources: np.ndarray  # (M,) str, the slide (or the cohort where slides are unknown) a patch came from
    origin: str  # key of NEEDLES
    encoder: str

    def rows(self, kind: str) -> np.ndarray:
        """Indices of one kind's patches."""
        return np.flatnonzero(self.kinds == kind)


def list_other_kinds(bank: Bank) -> list[str]:
    """Kinds that are neither needles nor background: real slides hold such tissue, too."""
    return sorted(set(map(str, bank.kinds)) - {*NEEDLES[bank.origin], *BACKGROUNDS[bank.origin]})


def cut_tiles(tiles: Sequence[Tile], copies: int) -> Iterator[Labelled]:
    """Train tiles, augmented `copies` times, and val and test tiles in eight orientations."""
    for number, tile in enumerate(tiles):
        image = Image.open(tile.file).convert("RGB")
        rng = np.random.default_rng((0, number))
        views = [augment_tile(image, rng) for _ in range(copies)] if tile.split == "train" else turn_tile(image)
        yield from ((view, tile.kind, tile.source, tile.split) for view in views)


def list_phantom_seeds(split: str, count: int) -> range:
    """The first `count` seeds of a split's phantoms. Raises ValueError for more than the split has."""
    first, last = json.loads(SPLIT_FILE.read_text())["phantom"][split]
    if count > last + 1 - first:
        raise ValueError(f"the {split} split has {last + 1 - first} phantoms, {count} were asked for.")
    return range(first, first + count)


def draw_phantom_patches(
    seeds: int, per_kind: int, splits: tuple[str, ...] = ("train", "val", "test")
) -> Iterator[Labelled]:
    """`per_kind` patches of every kind from `seeds` train phantoms, and from a fifth as many (or 4) of the others."""
    for split in splits:
        for seed in list_phantom_seeds(split, seeds if split == "train" else max(4, seeds // 5)):
            for kind in phantom.KINDS:
                for pixels in phantom.patches(seed, kind, per_kind, mixed=0.4):
                    yield pixels, kind, f"phantom-{seed}", split


def write_bank(
    path: Path,
    patches: Iterator[Labelled],
    encode: Callable[[np.ndarray], torch.Tensor],
    encoder: str,
    origin: str,
    vocabulary: Vocabulary | None = None,
    more: Mapping[str, str] | None = None,
) -> None:
    """Encode patches and write features (M, D) fp16 with their kinds, sources and splits as one safetensors file.

    vocabulary: the words of an origin that kinds.py does not know. more: further metadata.
    """
    features, rows, batch = [], [], []

    def flush() -> None:
        if batch:
            features.append(encode(np.stack(batch)).half())
            batch.clear()

    for pixels, kind, source, split in patches:
        batch.append(pixels)
        rows.append((kind, source, split))
        if len(batch) == 64:
            flush()
        if len(rows) % 1024 == 0:
            print(f"{origin}: {len(rows)} patches", flush=True)
    flush()
    kinds, sources, splits = zip(*rows)
    metadata = {
        "kinds": json.dumps(kinds),
        "sources": json.dumps(sources),
        "splits": json.dumps(splits),
        "encoder": encoder,
        "origin": origin,
        **(more or {}),
    }
    if vocabulary is not None:
        metadata["vocabulary"] = json.dumps(asdict(vocabulary))
    with replacing(path) as partial:
        save_file({"features": torch.cat(features)}, partial, metadata)


AGAIN = "Write the bank again with python -m train.data.mosaic bank"


def load_bank(path: Path, split: str) -> Bank:
    """The part of a bank file that belongs to a split; its vocabulary, if it has its own, is registered.

    Raises ValueError if there is no patch of the split.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata, features = file.metadata(), file.get_tensor("features")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no feature bank, or a damaged one ({error}). {AGAIN}.") from error
    if not metadata or not {"splits", "kinds", "sources", "origin", "encoder"} <= set(metadata):
        raise ValueError(f"{path} is safetensors, but no feature bank. {AGAIN}.")
    keep = np.array(json.loads(metadata["splits"])) == split
    if not keep.any():
        raise ValueError(f"{path} holds no patch of split {split!r}. {AGAIN}.")
    if "vocabulary" in metadata:
        Vocabulary(**json.loads(metadata["vocabulary"])).register()
    kinds, sources = (np.array(json.loads(metadata[name]))[keep] for name in ("kinds", "sources"))
    return Bank(features[torch.from_numpy(keep)], kinds, sources, metadata["origin"], metadata["encoder"])
