"""Slides on a Ray cluster: tasks read, a pool of actors encodes, this process puts together and writes."""

import json
import logging
import os
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsewsi.bags.encoders import load_encoder
from sparsewsi.bags.extract import read_patches
from sparsewsi.cohort.child import Show
from sparsewsi.cohort.find import Job
from sparsewsi.cohort.report import Row
from sparsewsi.cohort.slide import Order, Settings, Unfinished, fail, finish_slide, parts_folder, plan_work, resume
from sparsewsi.slides.slide import open_slide


def extract_on_ray(
    todo: list[Job],
    show: Show,
    order: Order,
    encoders: int | None = None,
) -> Generator[tuple[Job, Row]]:
    """The slides on the Ray cluster of RAY_ADDRESS, or on this machine: tasks read, a pool of actors encodes.

    encoders: actors in the pool; default one per GPU, without any one per two CPUs
    Slides, OUT and this program lie on a disk that all machines see. Only this process writes, and what it has not got
    of a slide when it is stopped is read again. A task or actor that dies is started again, a slide that kills its task
    every time is reported. Raises ValueError without Ray, and if the encoder cannot be loaded.
    """
    try:
        import ray
        import ray.exceptions
        from ray.data import ActorPoolStrategy, DataContext
    except ImportError as error:
        raise ValueError("--engine ray needs Ray; install the extra: pip install -e '.[cluster]'.") from error

    left: list[tuple[str, int]] = []  # by an earlier run, of each slide: identity, patches
    for job in todo:
        identity = _read_identity(parts_folder(job, order.out))
        left.append((identity, resume(parts_folder(job, order.out), identity)))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    gpus, cpus = (int(ray.cluster_resources().get(name, 0)) for name in ("GPU", "CPU"))
    pool = encoders or gpus or max(1, cpus // 2)
    if (need := 1 + (0 if gpus else pool)) > cpus:
        raise ValueError(f"{pool} encoders and a reader need {need} CPUs, Ray has {cpus}; lower --encoders.")
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 16 << 20  # about 100 patches
    context.max_errored_blocks = -1  # a slide that kills its task is missing at the end, and stops no other
    stream = (
        ray.data.from_items(list(range(len(todo))), override_num_blocks=len(todo))
        .map_batches(
            _read_on_ray,  # type: ignore[arg-type]  # Ray's types leave fn_kwargs out
            batch_size=1,
            fn_kwargs={"todo": todo, "left": left, "settings": order.settings, "stall_seconds": order.stall_seconds},
            num_cpus=1,
            max_retries=2,
        )
        .map_batches(
            _EncodeOnRay,
            batch_size=64,
            fn_constructor_args=(order.settings.encoder,),
            compute=ActorPoolStrategy(size=pool),
            num_gpus=1 if gpus else 0,
        )
    )
    missing = dict.fromkeys(todo)
    try:
        for job, row in _collect(stream, todo, order):
            del missing[job]
            yield job, row
    except ray.exceptions.RayError as error:
        raise ValueError(f"Ray gave up: {str(error).strip().splitlines()[-1]}") from error
    text = "Not all of its patches arrived: the process that read or encoded them failed, died or stood still."
    yield from ((job, Row(job.stem, "failed", warnings=text)) for job in missing)


def _read_identity(folder: Path) -> str:
    """What the parts of a folder are parts of; "" if there is none."""
    try:
        with safe_open(folder / f"{0:09d}.safetensors", "pt") as file:
            return file.metadata()["identity"]
    except (SafetensorError, OSError, TypeError, KeyError):
        return ""


def _read_on_ray(
    batch: dict[str, np.ndarray],
    todo: list[Job],
    left: list[tuple[str, int]],
    settings: Settings,
    stall_seconds: float,
) -> Iterator[dict[str, np.ndarray]]:
    """A task: the rows of slide number `item`. If it stands still it ends its process, and Ray runs it again."""
    number = int(batch["item"][0])
    rows = _yield_rows(number, todo[number], left[number], settings)
    while True:
        watch = threading.Timer(stall_seconds, os._exit, (1,))
        watch.daemon = True
        watch.start()
        try:
            some = next(rows, None)
        finally:
            watch.cancel()
        if some is None:
            return
        yield some


def _yield_rows(number: int, job: Job, left: tuple[str, int], settings: Settings) -> Iterator[dict[str, np.ndarray]]:
    """One slide: a row of index -1 with what is to be read, as JSON (or what is wrong), and then its patches.

    Ray may read a slide several times and mix the results, so they depend on the arguments and the slide alone.
    """
    side = settings.patch_size

    def rows(index: np.ndarray, pixels: np.ndarray, fine: np.ndarray, plan: str = "") -> dict[str, np.ndarray]:
        if not fine.all():  # of a fixed size, as Ray has it; what is not fine is never encoded
            readable, pixels = pixels, np.zeros((len(fine), side, side, 3), np.uint8)
            pixels[fine] = readable
        plans = np.full(len(index), plan, object)
        return {"number": np.full(len(index), number), "index": index, "pixels": pixels, "fine": fine, "plan": plans}

    def head(**plan: Any) -> dict[str, np.ndarray]:
        return rows(np.array([-1]), np.zeros((0, side, side, 3), np.uint8), np.array([False]), json.dumps(plan))

    began = time.time()  # another machine's clock, for the report alone
    try:
        with open_slide(job.path, slide_mpp=job.slide_mpp) as slide:
            coords, identity = plan_work(slide, job, settings)
            yield head(identity=identity, coords=coords.tolist(), began=began)
            done = left[1] if identity == left[0] else 0
            with closing(read_patches(slide, coords[done:], settings.mpp, side)) as batches:
                for pixels, fine in batches:
                    yield rows(np.arange(done, done + len(fine)), pixels, fine)
                    done += len(fine)
    except Exception as error:  # one slide never stops the batch
        yield head(problem=str(error) if isinstance(error, ValueError) else repr(error))


class _EncodeOnRay:
    """An actor: pixels in, features out."""

    def __init__(self, encoder: str):
        self._encoder = load_encoder(encoder)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pixels, fine = batch.pop("pixels"), batch["fine"]
        features = np.zeros((len(fine), self._encoder.dim), np.float16)
        features[fine] = self._encoder(pixels[fine]).half().numpy()
        return batch | {"features": features}


def _collect(stream: Any, todo: list[Job], order: Order) -> Generator[tuple[Job, Row]]:
    """Put together what comes in any order, and write a slide once all of it is here."""
    works: dict[int, tuple[Unfinished, float]] = {}
    early: dict[int, list[tuple[np.ndarray, Tensor, np.ndarray]]] = {}  # before the row that says what is to be read
    over: set[int] = set()
    for batch in stream.iter_batches(batch_size=None, batch_format="numpy"):
        for number in map(int, np.unique(batch["number"])):
            if number in over:
                continue
            job = todo[number]
            try:
                mine = batch["number"] == number
                index, fine, features, plans = (batch[key][mine] for key in ("index", "fine", "features", "plan"))
                for plan in map(json.loads, plans[index < 0]):  # two where the slide turned out to be damaged
                    if "problem" in plan:
                        raise ValueError(plan["problem"])
                    coords = np.array(plan["coords"], np.int32).reshape(-1, 2)
                    parts = parts_folder(job, order.out)
                    work = Unfinished(parts, plan["identity"], coords, features.shape[1], order.part_seconds)
                    works[number] = work, time.monotonic() - max(0.0, time.time() - plan["began"])
                patches = index >= 0
                kept = torch.from_numpy(features[patches & fine])
                early.setdefault(number, []).append((index[patches], kept, fine[patches]))
                if number not in works:
                    continue
                work, began = works[number]
                for part in early.pop(number):
                    work.add(*part)
                if work.done < len(work.coords):
                    continue
                with open_slide(job.path, slide_mpp=job.slide_mpp) as slide:
                    row = finish_slide(work, slide, job, order, began)
            except Exception as error:  # one slide never stops the batch
                row = fail(job, order.out, error)
            over.add(number)
            works.pop(number, None)
            early.pop(number, None)
            yield job, row
