"""A stranger's slide, read for its whole life in a process of its own that sees nothing but the slide's folder.

A slide of a few kB can decode to gigabytes, crash a C library, or name other files of this machine in its text parts
(Slidedat.ini, .vms, .vmu): none of it may happen in the process that serves everybody. open_confined gives what
open_slide gives. Its child process is walled in by sandbox.py, ends with its parent, is killed when a request takes too
long, and what then happens to the slide is a sentence. Pixels come back through shared memory: patches are handed out
where the child wrote them. The child imports neither torch nor Gradio; it starts in about 0.3 s.

Linux has all walls. macOS has the limits, the audit hook and the refusal of references; on Windows only references are
refused, and the slide is read in this process.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import mmap
import os
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from sparsewsi.files import as_path
from sparsewsi.slides import sandbox
from sparsewsi.slides.refusals import CONVERT, DAMAGED, SlideError
from sparsewsi.slides.resolution import Resolution
from sparsewsi.slides.slide import NOT_THERE, Slide, open_slide
from sparsewsi.slides.tiff import OFF_LINE

SECONDS = 8  # of processor time for a request: a busy machine must not turn a good slide away
PATIENCE = 40  # s of wall clock for a request, for a disk that hangs
MEMORY = 1 << 30  # bytes of address space of the child; at rest it takes 0.2 GB of them
READERS = 4  # requests in flight, as many as bags.read_ahead has threads
MOST_FILES = 20_000  # in a stranger's folder
LONGEST = 1 << 20  # bytes of a text that names a slide's other files, of a request, and of what the child says
SLOT = 8 << 20  # bytes of pixels of one reply
WORDS = SLOT + 4096  # where they end and words begin
LENT = READERS + 2  # batches of patches that may be in use at a time without being copied
HEAP = (
    32 << 20
)  # bytes that the child keeps for the next tiles: to give them back and ask again costs more than decoding

TOO_MUCH = (
    f"The slide was given up: a look at it takes more than {SECONDS} seconds of work or {MEMORY >> 30} GB; {CONVERT}."
)
CRASHED = f"The slide was given up: the process that reads it crashed or ran out of memory; {CONVERT}."
LEADS_OUT = "The slide names a file outside its own folder, so it is not opened; pack it with its own files only."
REQUEST, DONE, REFUSED = 0, 1, 2  # what a turn is

_T = TypeVar("_T")


def open_confined(
    path: str | Path,
    *,
    root: str | Path | None = None,
    slide_mpp: float | None = None,
    begun: Callable[[Slide], None] | None = None,
) -> Slide:
    """open_slide in a process of its own.

    root: the folder that holds the slide and nothing else, all of which may be read; every file in it must be a plain
    one. None: the folder that the slide lies in. A stranger's slide is no phantom, whatever it says
    begun: called with the slide before it is opened, so that another thread may close it meanwhile
    Raises SlideError as open_slide does, and from every read once the child was killed or crashed. Close it: the child
    lives until then.
    """
    path, strange = Path(os.path.abspath(as_path(path))), root is not None
    if root is None:
        path = Path(os.path.realpath(path))
        root = path if path.is_dir() else path.parent
        if not os.path.isdir(root):  # a child cannot be confined to what is not there, and would die of it
            raise SlideError(NOT_THERE)
    else:
        root = Path(os.path.realpath(root))
        _refuse_links(root)
        if not Path(os.path.realpath(path)).is_relative_to(root):
            raise SlideError(LEADS_OUT)
    _refuse_references(path)
    if os.name != "posix":
        return open_slide(path, slide_mpp=slide_mpp)
    slide = ConfinedSlide(path, root, slide_mpp, begun)
    if strange and slide.phantom_seed is not None:  # a file's text may say so of any slide
        slide.name, slide.phantom_seed = f"slide {_digest(path)}", None
    return slide


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.sha256(stream.read(LONGEST)).hexdigest()[:8]


class ConfinedSlide(Slide):
    """A Slide whose pixels another process reads. Threads may share it, and close() may be called while others read.

    walls    which of sandbox.wall_in's walls stand around the child
    process  the child
    """

    walls: tuple[str, ...]

    def __init__(
        self,
        path: Path,
        root: Path,
        slide_mpp: float | None = None,
        begun: Callable[[Slide], None] | None = None,
    ):
        self._failure = ""  # why nothing more can be read
        self._closing = threading.Lock()
        self.process, channels, self._lent = _start()
        self._stop = weakref.finalize(self, _stop, self.process, channels)
        self._free: queue.LifoQueue[_Channel] = queue.LifoQueue()
        for channel in channels:
            self._free.put(channel)
        self._to_lend: queue.LifoQueue[int] = queue.LifoQueue()
        for number in range(LENT):
            self._to_lend.put(number)
        try:
            if begun is not None:
                begun(self)
            facts = self._ask({"path": str(path), "root": str(root), "slide_mpp": slide_mpp})
            stated = {name: _frozen(value) for name, value in json.loads(facts).items()}
            self.__dict__.update(stated, _resolution=Resolution(**stated["_resolution"]), cache={})
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether nothing more can be read."""
        return bool(self._failure)

    def close(self) -> None:
        """End the child; who is reading gets a SlideError."""
        with self._closing:
            self._failure = self._failure or "The slide has been closed."
        self._stop()

    def read_batch(
        self, corners: ArrayLike, size: tuple[int, int], mpp: float, out: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        places, one = np.asarray(corners), 3 * size[0] * size[1]
        if one > SLOT:
            return super().read_batch(places, size, mpp, out)
        self.require_mpp()
        step, shape = SLOT // one, (len(places), size[1], size[0], 3)
        task = {"how": "batch", "size": size, "mpp": mpp}
        loan = self._lend(shape) if out is None else None
        if loan is not None:
            words = self._ask({**task, "corners": places.tolist(), "lent": loan[0]})
            return loan[1], np.frombuffer(words, bool)
        pixels = np.empty(shape, np.uint8) if out is None else out
        fine = np.zeros(len(places), bool)
        for start in range(0, len(places), step):
            part = slice(start, start + step)
            words = self._ask({**task, "corners": places[part].tolist()}, pixels[part])
            fine[part] = np.frombuffer(words, bool)
        return pixels, fine

    def _lend(self, shape: tuple[int, ...]) -> tuple[int, np.ndarray] | None:
        """(number of a piece of shared memory, an array of this shape in it), lent until nobody looks at the array.

        None for what is larger, and where all pieces are lent.
        """
        size = math.prod(shape)
        if size > SLOT:
            return None
        try:
            number = self._to_lend.get_nowait()
        except queue.Empty:
            return None
        memory = np.frombuffer(self._lent[number], np.uint8, size, OFF_LINE)
        weakref.finalize(memory, self._to_lend.put, number).atexit = False
        return number, memory.reshape(shape)

    def read_jpeg(
        self, xy_level0: tuple[float, float], size: tuple[int, int], downsample: float, quality: int
    ) -> bytes:
        if 3 * math.prod(size) > LONGEST:
            return super().read_jpeg(xy_level0, size, downsample, quality)
        task = {"how": "jpeg", "xy": xy_level0, "size": size, "downsample": downsample, "quality": quality}
        words = self._ask(task)
        if not words.startswith(b"\xff\xd8\xff"):
            raise SlideError(CRASHED)
        return words

    def _read_block(
        self,
        level: int,
        xy: tuple[float, float],
        size: tuple[int, int],
        ratio: float,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        return self._read_rows({"how": "block", "level": level, "ratio": ratio}, xy, size, ratio)

    def _read_pixels(
        self, level: int, xy: tuple[int, int], size: tuple[int, int], out: np.ndarray | None = None
    ) -> np.ndarray:
        return self._read_rows({"how": "pixels", "level": level}, xy, size, 1)

    def _read_rows(
        self, task: dict[str, Any], xy: tuple[float, float], size: tuple[int, int], ratio: float
    ) -> np.ndarray:
        """As many rows at a time as the shared memory holds."""
        loan = self._lend((size[1], size[0], 3))
        if loan is not None:
            self._ask({**task, "xy": xy, "size": size, "lent": loan[0]})
            return loan[1]
        out = np.empty((size[1], size[0], 3), np.uint8)
        rows = max(1, SLOT // (3 * size[0]))
        for top in range(0, size[1], rows):
            part = out[top : top + rows]
            self._ask({**task, "xy": (xy[0], xy[1] + top * ratio), "size": (size[0], len(part))}, part)
        return out

    def _ask(self, task: dict[str, Any], out: np.ndarray | None = None) -> bytes:
        """The child's words on one request, its pixels in `out`. Raises SlideError."""
        channel = self._free.get()
        try:
            if self._failure:
                raise SlideError(self._failure)
            kind, words = channel.ask(json.dumps(task).encode(), out)
        except (OSError, EOFError) as error:
            self._give_up(isinstance(error, TimeoutError))
            raise SlideError(self._failure) from None
        except SlideError:
            raise
        except BaseException:  # interrupted half way: the next reply on this channel would answer another request
            self.close()
            raise
        finally:
            self._free.put(channel)
        if kind == REFUSED:
            raise SlideError(" ".join(words.decode(errors="replace").split()))
        return words

    def _give_up(self, timed_out: bool) -> None:
        with self._closing:
            if not self._failure:
                if timed_out:
                    self.process.kill()
                spent = self.process.wait() in (-getattr(signal, "SIGXCPU", 0), -signal.SIGKILL)
                self._failure = TOO_MUCH if timed_out or spent else CRASHED
        self._stop()


def _frozen(value: Any) -> Any:
    """JSON's lists are tuples in a Slide."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


# ---- what parent and child share: a socket pair for turns, and memory for requests, words and pixels


class _Channel:
    """One request at a time. In `memory`: SLOT bytes of pixels, and from WORDS on words; by the socket: a kind and how
    many bytes of words."""

    def __init__(self, turns: socket.socket, memory: int):
        self.turns = turns
        self.memory = mmap.mmap(memory, WORDS + LONGEST)
        self.pixels = np.frombuffer(self.memory, np.uint8, SLOT, OFF_LINE)
        self._patience = 0.0

    def ask(self, request: bytes, out: np.ndarray | None) -> tuple[int, bytes]:
        """(kind, words) of the reply. Raises EOFError where the child is gone, TimeoutError after PATIENCE."""
        # Not settimeout, by which Python would ask before every turn whether it may take it.
        if self._patience != PATIENCE:
            self._patience, (seconds, part) = PATIENCE, divmod(PATIENCE, 1)
            wait = struct.pack("@ll", int(seconds), int(1e6 * part))
            self.turns.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
        self.send(REQUEST, request)
        kind, words = self.receive()
        if kind == DONE and out is not None:
            np.copyto(out.reshape(-1), self.pixels[: out.size])
        return kind, words

    def send(self, kind: int, words: bytes) -> None:
        if len(words) > LONGEST:
            raise EOFError
        self.memory[WORDS : WORDS + len(words)] = words
        self.turns.sendall(struct.pack("<BI", kind, len(words)))

    def receive(self) -> tuple[int, bytes]:
        try:
            turn = self.turns.recv(5)
        except BlockingIOError:
            raise TimeoutError from None
        if len(turn) < 5:
            raise EOFError
        kind, length = struct.unpack("<BI", turn)
        if length > LONGEST:
            raise EOFError
        return kind, self.memory[WORDS : WORDS + length]


def _start() -> tuple[subprocess.Popen, list[_Channel], list[mmap.mmap]]:
    """A child that waits for its slide, the channels to it, and pieces of memory for patches."""
    package = str(Path(__file__).resolve().parents[2])
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    environment = {
        "PYTHONPATH": package,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": str(HEAP),
        "MALLOC_TRIM_THRESHOLD_": str(2 * HEAP),
    }
    program = "import sys; from sparsewsi.slides import confined; confined.serve([int(v) for v in sys.argv[1:]])"
    channels, lent = [], []
    with contextlib.ExitStack() as stack:
        passed = []
        for _ in range(READERS):
            ours, theirs = socket.socketpair()
            memory = _shared_memory(WORDS + LONGEST)
            stack.callback(os.close, memory)
            stack.callback(theirs.close)
            channels.append(_Channel(ours, memory))
            passed += [theirs.fileno(), memory]
        for _ in range(LENT):
            memory = _shared_memory(WORDS)
            stack.callback(os.close, memory)
            lent.append(mmap.mmap(memory, WORDS))
            passed.append(memory)
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", program, *map(str, passed)],
            env={**environment, **kept},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=passed,
            cwd="/",
        )
    return child, channels, lent


def _shared_memory(size: int) -> int:
    """A file without a name, in memory where there is such a thing, whose size the child cannot change."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryFile() as file:
            file.truncate(size)
            return os.dup(file.fileno())
    import fcntl

    memory = os.memfd_create("slide", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, size)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return memory


def _stop(child: subprocess.Popen, channels: list[_Channel]) -> None:
    child.kill()
    for channel in channels:  # shut, not closed: a thread may wait on it, and its number would be another file's soon
        with contextlib.suppress(OSError):
            channel.turns.shutdown(socket.SHUT_RDWR)
    child.wait()


# ---- references to other files


def _refuse_links(root: Path) -> None:
    """Raise SlideError unless everything below root is a folder or a plain file."""
    count = 0
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            entry, count = Path(folder, name), count + 1
            if entry.is_symlink() or not (entry.is_dir() or entry.is_file()) or count > MOST_FILES:
                raise SlideError(LEADS_OUT)


def _refuse_references(path: Path) -> None:
    """Raise SlideError if a text part of the slide names a file by more than its plain name."""
    for text in (path, path.with_suffix("") / "Slidedat.ini"):
        if any(re.search(rb"[/\\\0]|^\.\.$", value) for value in _named_in(text)):
            raise SlideError(LEADS_OUT)


def _named_in(text: Path) -> Iterator[bytes]:
    """The values of an INI file whose keys speak of files; nothing for what is not such a file."""
    try:
        with text.open("rb") as stream:
            head = stream.read(LONGEST)
    except OSError:
        return  # open_slide says what is wrong
    if b"[" not in head[:1000] or b"\0\0" in head[:1000]:
        return
    for line in head.split(b"\n"):  # as GLib splits them
        key, equals, value = line.partition(b"=")
        if equals and re.search(rb"file|image|map|index|folder|dir|path", key, re.IGNORECASE):
            yield value.strip()


# ---- the child


def serve(passed: list[int]) -> None:
    """Open the slide that the first request names and read from it until the parent is gone; never returns."""
    pairs = zip(passed[: 2 * READERS : 2], passed[1 : 2 * READERS : 2])
    channels = [_Channel(socket.socket(fileno=turns), memory) for turns, memory in pairs]
    lent = [np.frombuffer(mmap.mmap(memory, WORDS), np.uint8, SLOT, OFF_LINE) for memory in passed[2 * READERS :]]
    task = _next(channels[-1])
    standing = sandbox.wall_in([Path(task["root"])], MEMORY)
    sandbox.allow_seconds(SECONDS)
    slide = _attempt(channels[-1], lambda: open_slide(task["path"], slide_mpp=task["slide_mpp"]))
    if slide is None:
        os._exit(1)
    facts = {name: value for name, value in vars(slide).items() if name not in ("_source", "cache")}
    channels[-1].send(DONE, json.dumps({**facts, "walls": standing}, default=dataclasses.asdict).encode())
    busy: set[_Channel] = set()
    for channel in channels[:-1]:
        threading.Thread(target=_answer, args=(slide, channel, lent, busy), daemon=True).start()
    _answer(slide, channels[-1], lent, busy)


def _answer(slide: Slide, channel: _Channel, lent: list[np.ndarray], busy: set[_Channel]) -> None:
    allowed = -math.inf  # seconds of processor time when the limit was last set
    while True:
        task = _next(channel)
        busy.add(channel)
        if len(busy) > 1 or time.process_time() > allowed + SECONDS / 20:
            sandbox.allow_seconds(SECONDS * len(busy))
            allowed = time.process_time()
        words = _attempt(channel, lambda task=task: _read(slide, channel, lent, task))
        if words is not None:
            channel.send(DONE, words)
        busy.discard(channel)


def _read(slide: Slide, channel: _Channel, lent: list[np.ndarray], task: dict[str, Any]) -> bytes:
    """Put what a request asks for into shared memory; what is returned are a JPEG, or which patches could be read."""
    if task["how"] == "jpeg":
        return slide.read_jpeg(tuple(task["xy"]), tuple(task["size"]), task["downsample"], task["quality"])
    memory = lent[task["lent"]] if "lent" in task else channel.pixels
    if task["how"] == "batch":
        width, height = task["size"]
        out = memory[: 3 * width * height * len(task["corners"])].reshape(-1, height, width, 3)
        return slide.read_batch(task["corners"], (width, height), task["mpp"], out)[1].tobytes()
    width, height = task["size"]
    out = memory[: 3 * width * height].reshape(height, width, 3)
    if task["how"] == "block":
        pixels = slide._read_block(task["level"], tuple(task["xy"]), (width, height), task["ratio"], out)
    else:
        pixels = slide._read_pixels(task["level"], tuple(task["xy"]), (width, height), out)
    if pixels is not out:
        out[:] = pixels
    return b""


def _attempt(channel: _Channel, deed: Callable[[], _T]) -> _T | None:
    """What the deed returns; None if it failed, which the parent then knows."""
    try:
        return deed()
    except MemoryError:
        words = TOO_MUCH
    except SlideError as error:
        words = str(error)
    except Exception as error:  # decoders raise what they like
        words = DAMAGED.format(f": {type(error).__name__}")
    channel.send(REFUSED, words.encode(errors="replace")[:LONGEST])
    return None


def _next(channel: _Channel) -> dict[str, Any]:
    """The next request. The process ends, whatever else it is doing, when there is nobody who could ask any more."""
    try:
        return json.loads(channel.receive()[1])
    except (OSError, EOFError):
        os._exit(0)
