"""One slide: planned, encoded in parts that survive a kill, and written whole.

N patches, D feature dim.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsewsi.bags.bag import save_bag
from sparsewsi.bags.extract import bag_of, choose_coords, encode_patches
from sparsewsi.bags.patch_encoder import PatchEncoder
from sparsewsi.bags.vit import stated_name
from sparsewsi.cohort.find import Job
from sparsewsi.cohort.report import Row
from sparsewsi.files import replacing
from sparsewsi.slides.slide import Slide, open_slide

Tell = Callable[[int, int], None]  # is called with news of a slide: patches done, patches in all
WHOLE = "whole"  # name of a slide's file among its parts, before it is moved to its place


@dataclass(frozen=True)
class Settings:
    """What the features of a folder have in common."""

    encoder: str
    mpp: float  # um/px at which patches are read
    patch_size: int  # px at that mpp
    max_patches: int | None = None


@dataclass(frozen=True)
class Order:
    """What is to be made, and where."""

    settings: Settings
    out: Path
    part_seconds: float = 20.0  # what is encoded is put on disk that often; a killed run loses no more
    stall_seconds: float = 1800.0  # a slide that stands still so long is given up


def tell_nobody(done: int, total: int) -> None:
    """A Tell for work that nobody watches."""


def extract_slide(job: Job, order: Order, encoder: PatchEncoder, tell: Tell = tell_nobody) -> Row:
    """Encode one slide into OUT/<stem>.safetensors, from where an earlier run stopped.

    Raises SlideError, ValueError or OSError if it cannot be done.
    """
    began, settings = time.monotonic(), order.settings
    with open_slide(job.path, slide_mpp=job.slide_mpp) as slide:
        coords, identity = plan_work(slide, job, settings)
        work = Unfinished(parts_folder(job, order.out), identity, coords, encoder.dim, order.part_seconds)
        tell(work.done, len(coords))
        todo = coords[work.done :]
        with closing(encode_patches(slide, encoder, todo, settings.mpp, settings.patch_size)) as batches:
            for features, fine in batches:
                work.add(np.arange(work.done, work.done + len(fine)), features.half(), fine)
                tell(work.done, len(coords))
        return finish_slide(work, slide, job, order, began)


def try_slide(job: Job, order: Order, encoder: PatchEncoder, tell: Tell = tell_nobody) -> Row:
    """extract_slide, with whatever goes wrong as a row: one slide never stops the batch."""
    try:
        return extract_slide(job, order, encoder, tell)
    except Exception as error:
        return fail(job, order.out, error)


def look_up(job: Job, out: Path) -> Row | None:
    """The row of a slide that is done or cannot be; None if it is to be done."""
    try:
        return Row(job.stem, "failed", warnings=job.problem) if job.problem else find_finished(job, out)
    except (ValueError, OSError) as error:
        return fail(job, out, error)


def plan_work(slide: Slide, job: Job, settings: Settings) -> tuple[np.ndarray, str]:
    """What to read: (coords (N, 2), an identity that parts of this very work bear)."""
    coords = choose_coords(slide, settings.mpp, settings.patch_size, settings.max_patches)
    facts = [asdict(settings), slide.name, job.bytes, slide.mpp, len(coords)]
    return coords, hashlib.sha256(json.dumps(facts).encode() + coords.tobytes()).hexdigest()


def parts_folder(job: Job, out: Path) -> Path:
    """Where the parts of a slide lie until it is whole."""
    return out / f".{job.stem}.parts"


def finish_slide(work: "Unfinished", slide: Slide, job: Job, order: Order, began: float) -> Row:
    """Write the slide's file from all its patches, and forget the parts."""
    fine, settings, parts = work.readable, order.settings, parts_folder(job, order.out)
    features = work.features if fine.all() else work.features[torch.from_numpy(fine)]
    bag = bag_of(slide, stated_name(settings.encoder), work.coords, fine, features, settings.mpp, settings.patch_size)
    save_bag(bag, parts / WHOLE, made_from={"bytes": job.bytes, "slide_mpp": job.slide_mpp})
    os.replace(parts / WHOLE, order.out / f"{job.stem}.safetensors")
    shutil.rmtree(parts, ignore_errors=True)  # with whatever a killed run left half written
    return replace(
        make_row(job.stem, len(bag.features), bag.slide_mpp, bag.mpp_source, bag.note),
        seconds=round(time.monotonic() - began, 2),
        resumed_at=work.resumed_at,
        unreadable=work.coords[~fine].tolist(),
    )


class Unfinished:
    """The patches of one slide that are encoded: all in memory, the first so many on disk, whatever order they come in.

    features (N, D) float16 (rows of unreadable patches mean nothing), readable (N,) bool; done: patches 0 to done - 1
    are here; resumed_at: how many of them an earlier run left.
    """

    def __init__(self, folder: Path, identity: str, coords: np.ndarray, dim: int, part_seconds: float):
        self._folder, self._identity, self._part_seconds = folder, identity, part_seconds
        self.coords = coords
        self.features = torch.empty(len(coords), dim, dtype=torch.float16)
        self.readable = np.zeros(len(coords), bool)
        self._here = np.zeros(len(coords), bool)
        self.resumed_at = self.done = self._saved = resume(folder, identity)
        for path in folder.glob("*.safetensors"):
            part, start = load_file(path), int(path.stem)
            fine = part["readable"].numpy()
            self._put(np.arange(start, start + len(fine)), part["features"], fine)
        self._since = time.monotonic()

    def add(self, index: np.ndarray, features: Tensor, fine: np.ndarray) -> None:
        """Patches number index (b,): which could be read, fine (b,) bool, and the features of those (fine.sum(), D)."""
        self._put(index, features, fine)
        missing = ~self._here[self.done :]
        self.done += int(missing.argmax()) if missing.any() else len(missing)
        if time.monotonic() - self._since >= self._part_seconds and self.done > self._saved:
            part = slice(self._saved, self.done)
            kept = torch.from_numpy(self.readable[part])
            save_part(self._folder, self._saved, self._identity, self.features[part][kept], kept)
            self._saved, self._since = self.done, time.monotonic()

    def _put(self, index: np.ndarray, features: Tensor, fine: np.ndarray) -> None:
        self.features[torch.from_numpy(index[fine])] = features
        self.readable[index] = fine
        self._here[index] = True


def resume(folder: Path, identity: str) -> int:
    """Patches that are on disk already; parts of another slide, of other settings, or without their beginning go."""
    done = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                if file.metadata().get("identity") == identity and int(path.stem) == done:
                    done += file.get_slice("readable").get_shape()[0]
                    continue
        except (SafetensorError, ValueError, OSError):
            pass
        path.unlink()
    for leftover in folder.glob(".*.partial"):
        leftover.unlink(missing_ok=True)
    return done


def save_part(folder: Path, start: int, identity: str, features: Tensor, readable: Tensor) -> None:
    """The patches from number `start` on, atomically: features (readable patches, D), readable (b,) bool."""
    part = {"features": features.contiguous(), "readable": readable}
    with replacing(folder / f"{start:09d}.safetensors") as partial:
        save_file(part, partial, metadata={"identity": identity})


def find_finished(job: Job, out: Path) -> Row | None:
    """The row of a slide whose file is there and was made from this very slide file; None if it is to be done.

    Reads the file's header only: a cohort's features are hundreds of gigabytes.
    Raises ValueError if the file there is not whole, or was not made by this program.
    """
    path = out / f"{job.stem}.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:  # compares the file's length with what its header promises
            facts = json.loads((file.metadata() or {}).get("sparsewsi_bag", "{}"))
            patches = file.get_slice("features").get_shape()[0] if facts else 0
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is there, but is no whole feature file. Delete or move it.") from error
    if "made_from" not in facts:
        raise ValueError(f"{path.name} is there, but not from this program. Move it, or choose another --out.")
    if facts["made_from"] != {"bytes": job.bytes, "slide_mpp": job.slide_mpp}:
        return None
    return make_row(job.stem, patches, facts["slide_mpp"], facts["mpp_source"], facts["note"])


def make_row(stem: str, patches: int, slide_mpp: float | None, mpp_source: str, note: str) -> Row:
    """The row of a slide that is done."""
    return Row(stem, "done" if patches else "empty", patches, slide_mpp, mpp_source, warnings=note)


def fail(job: Job, out: Path, error: Exception) -> Row:
    """The row of a slide that cannot be done, and why."""
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:  # its parts would keep the report from being written
            shutil.rmtree(parts_folder(job, out), ignore_errors=True)
        return Row(job.stem, "failed", warnings=f"{error.strerror or error}.")
    return Row(job.stem, "failed", warnings=str(error) if isinstance(error, ValueError) else repr(error))
