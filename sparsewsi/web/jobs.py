"""Work for people: whose it is, whose turn it is, and whether anybody still waits for it.

A session has one job that runs, and a few that wait. Sessions take turns, batch by batch and pass by pass: of those
that want the machine, the one that has had least of it goes first, so that a large slide of one stops nobody else's
question. Sessions that nobody listens to, without a page or a stream of answers that is open, come after all others:
together they get a fifth of the machine while somebody is there, and all of it else. Whoever works looks at the job's
flag between batches and passes.
"""

import contextvars
import itertools
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
from torch import Tensor

AT_ONCE = {
    "slide": 2,
    "example": 4,
    "question": 4,
    "map": 1,
    "files": 2,
}  # jobs of a kind that run at a time, of all sessions
BESIDE = "map"  # nobody waits for it, so it runs beside the session's one job
EVERY = 1.0  # s between two looks of who follows a job
MOST_OF_ONE, MOST_OF_ALL = 4, 64  # jobs that run or wait, of a session and of all
MOST_UNHEARD = 8  # of all sessions that nobody listens to
SHARE, MOST_OWED = 0.25, 1.0  # s that are owed to them for a second of others while they wait, and s owed at most
LATE = 30.0  # s after which one of theirs waits for its place as others do
BUSY = "{} things are being done for this page already; wait for them."
FULL = "The server is busy: {} jobs are waiting. Try again in a few minutes."
UNHEARD = "{} things are being done already for callers who do not listen for the answer; listen, or try again later."


class Halted(Exception):
    """Nobody waits for this work any more: it was stopped, or its caller has left."""


class Busy(ValueError):
    """There is too much to do already; the sentence says for whom."""


class _Closes(Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Peek:
    """What is known of a slide while its patches are encoded.

    coords: (N, 2) int32, level-0 px; patch_size: side, level-0 px; features: (n, D) of the first n of them that could
    be read; readable: which of the first ones could be, (m,) bool, m >= n
    """

    coords: np.ndarray
    patch_size: int
    features: Tensor
    readable: np.ndarray


@dataclass(eq=False)
class Job:
    """Something that is done for a session. Any thread may read it.

    what:  a key of AT_ONCE
    token: of the slide that it is about, if it is known
    phase: what is being done: "waiting", then what the worker says
    place: how many jobs go first; 0: it runs
    done, total: patches or passes
    ended: nobody waits for it any more
    error: why it failed, in a sentence
    result: what came of it, once it is done
    kept: which patches would be kept so far, (K,), and the time until which that holds
    """

    session: str
    what: str
    token: str = ""
    phase: str = "waiting"
    place: int = 0
    done: int = 0
    total: int = 0
    ended: bool = False
    error: str = ""
    result: Any = None
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    seen: Callable[[], Peek] | None = None
    kept: tuple[float, Tensor] | None = None
    _number: int = 0  # order of arrival
    _since: float = 0.0  # when the phase began
    _held: list[_Closes] = field(default_factory=list)

    def look(self, *_: int) -> None:
        """Raise Halted once nobody waits any more."""
        if self.ended:
            raise Halted

    def tell(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Say what is being done, and look."""
        if phase != self.phase:
            self._since = time.monotonic()
        self.phase, self.done, self.total = phase, done, total
        self.look()

    @property
    def seconds_left(self) -> float | None:
        """Of this phase, as far as can be said."""
        if not self.done or not self.total:
            return None
        return (time.monotonic() - self._since) / self.done * (self.total - self.done)

    def peek(self) -> Peek | None:
        """What is known so far; None until tissue was found."""
        return self.seen() if self.seen is not None else None

    def hold(self, slide: _Closes) -> None:
        """Have a slide closed under its readers when the job ends."""
        self._held.append(slide)
        if self.ended:
            slide.close()

    def end(self) -> None:
        """Nobody waits any more."""
        self.ended = True
        for slide in list(self._held):
            slide.close()


class Jobs:
    """The jobs of all sessions of one server. Threads share it."""

    def __init__(self) -> None:
        self.steps = 0  # that were done so far
        self._changed = threading.Condition()
        self._jobs: list[Job] = []  # that run or wait, in the order they came
        self._named: WeakValueDictionary[str, Job] = WeakValueDictionary()  # those that somebody still works at, too
        self._running: set[Job] = set()
        self._heard: set[str] = set()  # sessions that somebody listens to
        self._served: dict[str, int] = {}  # by session with jobs: number of its last start, so that sessions alternate
        self._spent: dict[str, float] = {}  # s of the machine, by session with jobs
        self._clock = 0.0  # what whose turn it was last had spent then
        self._owed = 0.0  # s of the machine that are owed to those that nobody listens to
        self._wanting: list[Job] = []  # at their next step
        self._stepping: Job | None = None
        self._began = 0.0  # when the step did
        self._count = itertools.count(1)

    def enter(self, session: str, what: str, token: str = "") -> Job:
        """A job at the end of its session's line. Raises Busy where the line is too long."""
        job = Job(session, what, token, _number=next(self._count), _since=time.monotonic())
        with self._changed:
            mine = [other for other in self._jobs if other.session == session]
            if len(mine) >= MOST_OF_ONE or (what == BESIDE and any(other.what == BESIDE for other in mine)):
                raise Busy(BUSY.format(len(mine)))
            if len(self._jobs) >= MOST_OF_ALL:
                raise Busy(FULL.format(len(self._jobs)))
            unheard = sum(other.session not in self._heard for other in self._jobs)
            if session not in self._heard and unheard >= MOST_UNHEARD:
                raise Busy(UNHEARD.format(unheard))
            self._jobs.append(job)
            self._named[job.name] = job
            self._place()
        return job

    def start(self, job: Job) -> None:
        """Wait until the job may run. Raises Halted if nobody waits for it any more."""
        with self._changed:
            while not self._may_run(job):
                job.look()
                self._changed.wait(1)
            job.look()
            self._running.add(job)
            self._served[job.session] = next(self._count)
            self._place()

    def leave(self, job: Job) -> None:
        """The job is over, however it went."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
            self._running.discard(job)
            if not any(other.session == job.session for other in self._jobs):
                self._served.pop(job.session, None)
                self._spent.pop(job.session, None)
            self._place()
            self._changed.notify_all()

    @contextmanager
    def run(self, session: str, what: str, token: str = "") -> Iterator[Job]:
        """A job that runs while the block does. Raises Busy and Halted as enter and start do."""
        job = self.enter(session, what, token)
        try:
            self.start(job)
            yield job
        finally:
            self.leave(job)

    @contextmanager
    def step(self, job: Job) -> Iterator[None]:
        """One batch or pass, when it is the session's turn. Raises Halted if nobody waits for it any more."""
        self._take(job)
        try:
            yield
        finally:
            self._give(job)

    def pause(self, job: Job) -> None:
        """Between two passes of a long step: whoever has had less of the machine goes first. Raises as step does."""
        self._give(job)
        self._take(job)

    def follow(self, session: str, what: str, token: str, deed: Callable[[Job], Any]) -> Generator[Job]:
        """Do something in a thread, as a job; gives the job at once, every second and when it is done, with its result.

        Closing the iterator ends the job. What the deed raises is raised here.
        """
        job = self.enter(session, what, token)

        def work() -> Any:
            try:
                self.start(job)
                return deed(job)
            finally:
                self.leave(job)

        yield from self.watch(job, work)

    def watch(self, job: Job, deed: Callable[[], Any]) -> Generator[Job]:
        """Do something of a job in a thread; what it gives, and what closing it does, are as of follow."""
        failed = []

        def work() -> None:
            try:
                job.result = deed()
            except BaseException as error:  # whatever it is, it belongs to the caller, who must not wait for ever
                failed.append(error)

        thread = threading.Thread(
            target=contextvars.copy_context().run, args=(work,), name=f"job-{job.what}", daemon=True
        )
        thread.start()
        try:
            while thread.is_alive():
                yield job
                thread.join(EVERY)
        finally:
            if thread.is_alive():
                job.end()
                self._wake()
        if failed:
            job.error = " ".join(str(failed[0]).split())
            raise failed[0]
        yield job

    def end(self, session: str, *what: str) -> None:
        """Nobody waits for a session's jobs any more, or for those of some kinds."""
        with self._changed:
            ending = [job for job in self._jobs if job.session == session and (not what or job.what in what)]
        for job in ending:
            job.end()
        self._wake()

    def heed(self, session: str, listens: bool) -> None:
        """Whether somebody listens to what is done for a session: its page is open, or a stream of answers."""
        with self._changed:
            (self._heard.add if listens else self._heard.discard)(session)
            if any(job.session == session for job in self._jobs):
                self._place()
                self._changed.notify_all()

    def of(self, session: str, what: str) -> Job | None:
        """The session's last job of a kind that runs or waits."""
        return next((job for job in reversed(self._jobs) if (job.session, job.what) == (session, what)), None)

    def busy(self, session: str) -> bool:
        """Whether anything is done for a session, or waits."""
        return any(job.session == session for job in list(self._jobs))

    @property
    def answering(self) -> bool:
        """Whether a question is being answered for anybody."""
        with self._changed:
            return any(job.what == "question" for job in self._running)

    def find(self, name: str) -> Job:
        """A job by its name; one that nobody can end where it is not known, as in another process (ZeroGPU's)."""
        return self._named.get(name) or Job("", "slide")

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _take(self, job: Job) -> None:
        with self._changed:
            self._wanting.append(job)
            self._reckon(job)
            try:
                while self._stepping is not None or self._next() is not job:
                    job.look()
                    self._changed.wait(1)
                job.look()
                self._stepping, self._began = job, time.monotonic()
                self._clock = max(self._clock, self._spent.get(job.session, 0.0))
            finally:
                self._wanting.remove(job)
                self._changed.notify_all()

    def _give(self, job: Job) -> None:
        with self._changed:
            if self._stepping is not job:
                return
            self._stepping, self.steps = None, self.steps + 1
            took = time.monotonic() - self._began
            if job.session in self._spent:
                self._spent[job.session] += took
            if not self._hears(job):
                self._owed = max(self._owed - took, -MOST_OWED)
            elif all(map(self._hears, self._wanting)):
                self._owed = 0.0
            else:
                self._owed = min(self._owed + took * SHARE, MOST_OWED)
            self._changed.notify_all()

    # ---- with the lock held

    def _hears(self, job: Job) -> bool:
        """Whether somebody listens for what comes of it."""
        return job.session in self._heard

    def _line(self, what: str) -> list[Job]:
        """The jobs of a kind that wait, first who goes first: of the session that was served least recently."""
        waiting = [job for job in self._jobs if job.what == what and job not in self._running]
        late = time.monotonic() - LATE
        return sorted(
            waiting,
            key=lambda job: (
                not self._hears(job) and job._since > late,
                self._served.get(job.session, 0),
                job._number,
            ),
        )

    def _may_run(self, job: Job) -> bool:
        running = [other for other in self._running if other.what == job.what]
        free = [one for one in self._line(job.what) if not self._is_behind(one) and self._has_place(one, running)]
        return bool(free) and free[0] is job

    def _has_place(self, job: Job, running: list[Job]) -> bool:
        """Whether one more of its kind may run; those that nobody listens to leave one place to others."""
        most, deaf = AT_ONCE[job.what], sum(not self._hears(other) for other in running)
        return len(running) < most and (self._hears(job) or deaf < max(1, most - 1))

    def _is_behind(self, job: Job) -> bool:
        """Whether an earlier job of its own session has to end first; one that nobody waits for is on its way out."""
        return job.what != BESIDE and any(
            other.session == job.session and other.what != BESIDE and other._number < job._number and not other.ended
            for other in self._jobs
        )

    def _place(self) -> None:
        for what in AT_ONCE:
            for place, job in enumerate(self._line(what), 1):
                job.place = place
        for job in self._running:
            job.place = 0

    def _next(self) -> Job | None:
        heard = [job for job in self._wanting if self._hears(job)]
        deaf = [job for job in self._wanting if not self._hears(job)]
        first = deaf if deaf and (not heard or self._owed > 0) else heard
        return min(first, key=lambda job: self._spent.get(job.session, 0.0), default=None)

    def _reckon(self, job: Job) -> None:
        """Who comes anew stands where the one does that has had most, so that many who come overtake nobody; who did
        not want the machine for a while has saved nothing up."""
        most = max(self._spent.values(), default=self._clock)
        self._spent[job.session] = max(self._spent.get(job.session, most), self._clock)
