"""From a slide to a bag: choose the patches with tissue, read them ahead on threads, encode them batch by batch.

N patches, D feature dim.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsewsi.bags.bag import Bag
from sparsewsi.bags.encoders import load_encoder
from sparsewsi.bags.patch_encoder import PatchEncoder
from sparsewsi.slides.slide import Slide, SlideError, open_slide
from sparsewsi.slides.tissue import find_tissue, patch_coords, patch_side, why_empty

READERS = max(1, min(4, os.cpu_count() or 1))  # threads that read patches; decoders drop the GIL
_P = TypeVar("_P")
_T = TypeVar("_T")


def extract_bag(
    path: str | Path,
    encoder: str | PatchEncoder,
    *,
    mpp: float = 0.5,
    patch_size: int = 224,
    batch_size: int = 32,
    slide_mpp: float | None = None,
    max_patches: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Bag:
    """Cut a slide into tissue patches and encode them.

    encoder:     name for load_encoder, or a loaded encoder
    mpp:         um/px to read at
    patch_size:  side of a patch in px at that mpp; the encoder resizes it to its own input
    batch_size:  patches read at a time, at least; a few batches are in memory, and features do not depend on it
    slide_mpp:   um/px of level 0 for slides that do not state it
    max_patches: keep at most so many, evenly spaced over the rows of the raster (as SlideChat does)
    progress:    called with (patches done, patches in all)
    Patches in damaged parts of the file are left out, and Bag.note says how many.
    Raises ValueError (SlideError) when the slide cannot be read or states no mpp. N = 0 is legal.
    """
    with open_slide(path, slide_mpp=slide_mpp) as slide:
        return encode_slide(
            slide,
            encoder,
            mpp=mpp,
            patch_size=patch_size,
            batch_size=batch_size,
            max_patches=max_patches,
            progress=progress,
        )


def encode_slide(
    slide: Slide,
    encoder: str | PatchEncoder,
    *,
    mpp: float = 0.5,
    patch_size: int = 224,
    batch_size: int = 32,
    max_patches: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Bag:
    """extract_bag of a slide that is open. What progress raises ends the work."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    coords = choose_coords(slide, mpp, patch_size, max_patches)
    loaded = load_encoder(encoder) if isinstance(encoder, str) else encoder
    features = torch.empty(len(coords), loaded.dim, dtype=torch.float16)
    readable = np.zeros(len(coords), bool)
    done = kept = 0
    if progress is not None:
        progress(0, len(coords))
    with closing(encode_patches(slide, loaded, coords, mpp, patch_size, batch_size)) as batches:
        for part, fine in batches:
            features[kept : kept + len(part)] = part
            readable[done : done + len(fine)] = fine
            kept, done = kept + len(part), done + len(fine)
            if progress is not None:
                progress(done, len(coords))
    return bag_of(slide, loaded.name, coords, readable, features[:kept], mpp, patch_size)


def choose_coords(slide: Slide, mpp: float, patch_size: int, max_patches: int | None = None) -> np.ndarray:
    """patch_coords, at most max_patches of them, evenly spaced: (N, 2) int32, level-0 px. Raises as patch_coords."""
    if max_patches is not None and max_patches < 1:
        raise ValueError(f"max_patches must be at least 1, got {max_patches}.")
    coords = patch_coords(slide, mpp, patch_size)
    if max_patches is not None and len(coords) > max_patches:
        coords = coords[np.linspace(0, len(coords) - 1, max_patches, dtype=int)]
    return coords


def encode_patches(
    slide: Slide, encoder: PatchEncoder, coords: np.ndarray, mpp: float, patch_size: int, batch_size: int = 32
) -> Generator[tuple[Tensor, np.ndarray]]:
    """Read and encode the patches at coords (N, 2), batch by batch in their order, reading ahead on threads.

    Batches are of whole chunks of the encoder, at least batch_size patches, so that only the last is filled up.
    Yields (features of the patches that could be read, (<= b, D) float32; which could, (b,) bool). A patch that lies in
    a damaged part of the file is skipped, never encoded as something else. Close the generator before the slide.
    """
    whole = -(-batch_size // encoder.chunk) * encoder.chunk
    with closing(read_patches(slide, coords, mpp, patch_size, whole)) as batches:
        for pixels, fine in batches:
            yield encoder(pixels), fine


def read_patches(
    slide: Slide, coords: np.ndarray, mpp: float, patch_size: int, batch_size: int = 32
) -> Generator[tuple[np.ndarray, np.ndarray]]:
    """encode_patches without the encoder.

    Yields (pixels of the patches that could be read, uint8 (<= b, patch_size, patch_size, 3); which could, (b,) bool).
    """

    def read(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels, fine = slide.read_batch(part, (patch_size, patch_size), mpp)
        return (pixels if fine.all() else pixels[fine]), fine

    parts = [coords[i : i + batch_size] for i in range(0, len(coords), batch_size)]
    with closing(read_ahead(read, parts)) as batches:  # the threads end before the slide is closed
        yield from batches


def bag_of(
    slide: Slide,
    encoder: str,
    coords: np.ndarray,
    readable: np.ndarray,
    features: Tensor,
    mpp: float,
    patch_size: int,
) -> Bag:
    """The bag of a slide whose patches at coords (N, 2) were encoded, but for those that are not readable (N,).

    features: (number of readable patches, D)
    Raises SlideError if there are patches and none is readable.
    """
    lost = len(coords) - int(readable.sum())
    if lost and not readable.any():
        raise SlideError(f"None of the slide's {lost} patches can be read; the file is damaged or cut short.")
    notes = [
        *slide.warnings,
        slide.check_mpp(mpp),
        find_tissue(slide).note if len(coords) else why_empty(slide, mpp, patch_size),
        f"{lost} of {len(coords)} patches lie in damaged parts of the file and are left out." if lost else None,
    ]
    return Bag(
        features=features,
        coords=torch.from_numpy(np.ascontiguousarray(coords[readable], dtype=np.int32)),
        patch_size=patch_side(slide, mpp, patch_size),
        mpp=mpp,
        encoder=encoder,
        slide=slide.name,
        slide_mpp=slide.require_mpp(),
        mpp_source=slide.mpp_source or "unknown",
        slide_size=(int(slide.size[0]), int(slide.size[1])),
        note=" ".join(note for note in notes if note),
        bounds=None if slide.bounds == (0, 0, *slide.size) else slide.bounds,
    )


def read_ahead(read: Callable[[_P], _T], parts: Iterable[_P], most: int = READERS) -> Generator[_T]:
    """read(part) for every part, in order, the next `most` of them on threads while the caller works on one.

    What read raises is raised here, when its turn comes.
    """
    with ThreadPoolExecutor(max_workers=most, thread_name_prefix="read-ahead") as pool:
        pending: deque[Future[_T]] = deque()
        try:
            for part in parts:
                pending.append(pool.submit(read, part))
                if len(pending) > most:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
