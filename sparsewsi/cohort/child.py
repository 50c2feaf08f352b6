"""Slides one after another in a child process: a decoder that crashes takes the child along, not the batch."""

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from typing import Any

from sparsewsi.bags.encoders import load_encoder
from sparsewsi.bags.patch_encoder import PatchEncoder
from sparsewsi.cohort.find import Job
from sparsewsi.cohort.report import Row
from sparsewsi.cohort.slide import Order, try_slide

Show = Callable[[Job, int, int], None]  # is called with news of a slide: patches done, patches in all

_progress: Any = None  # shared with the parent: patches done, patches in all, process id


def _begin_child(progress: Any) -> None:
    """First thing in a child: remember where to tell progress, and end when the parent does, however it ends."""
    global _progress
    _progress = progress
    progress[2] = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _tell_parent(done: int, total: int) -> None:
    _progress[0], _progress[1] = done, total


@functools.cache
def _load_once(name: str, device: str | None) -> PatchEncoder:
    return load_encoder(name, device)


def _load_first(name: str, device: str | None) -> str:
    """Load the encoder. Raises ValueError, in the parent as well, if that cannot be done."""
    return _load_once(name, device).name


def _extract(job: Job, order: Order, device: str | None) -> Row:
    _tell_parent(0, 0)
    return try_slide(job, order, _load_once(order.settings.encoder, device), _tell_parent)


class Child:
    """One process that does one call after another; replaced by a new one when it dies or stands still."""

    def __init__(self, stall_seconds: float):
        self._context = multiprocessing.get_context("spawn")
        self._stall_seconds = stall_seconds
        self._pool: ProcessPoolExecutor | None = None
        self.progress = self._context.Array("q", 3, lock=False)  # patches done, patches in all, process id

    def call(
        self, function: Callable[..., Any], *arguments: Any, each_second: Callable[[int, int], None] = lambda *_: None
    ) -> Any:
        """function(*arguments) in the child; each_second gets patches done, patches in all.

        Raises BrokenProcessPool if the child died or had to be killed.
        """
        if self._pool is None:
            self.progress[2] = 0
            self._pool = ProcessPoolExecutor(1, self._context, _begin_child, (self.progress,))
        try:
            future = self._pool.submit(function, *arguments)
            seen, since = tuple(self.progress), time.monotonic()
            while not wait([future], timeout=1.0).done:
                each_second(self.progress[0], self.progress[1])
                if tuple(self.progress) != seen:
                    seen, since = tuple(self.progress), time.monotonic()
                elif time.monotonic() - since > self._stall_seconds:
                    self._kill()
            return future.result()
        except KeyboardInterrupt:
            self._kill()
            raise
        except BrokenProcessPool:
            self.close()
            raise

    def _kill(self) -> None:
        if self.progress[2]:
            os.kill(self.progress[2], getattr(signal, "SIGKILL", signal.SIGTERM))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def extract_in_child(
    todo: list[Job], show: Show, order: Order, device: str | None = None
) -> Generator[tuple[Job, Row]]:
    """The slides one after another, in a child process. Raises ValueError if the encoder cannot be loaded."""
    with closing(Child(order.stall_seconds)) as child:
        child.call(_load_first, order.settings.encoder, device)
        for job in todo:
            row = Row(job.stem, "failed", warnings="The process that read it died or stood still, twice.")
            for _ in range(2):  # once more, from where it was, if the child dies: it may have died of something else
                with suppress(BrokenProcessPool):
                    row = child.call(_extract, job, order, device, each_second=functools.partial(show, job))
                    break
            yield job, row
