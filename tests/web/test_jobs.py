"""Jobs: whose they are, whose turn it is, and that they end when nobody waits."""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from sparsewsi.web import jobs as jobs_module
from sparsewsi.web.jobs import Halted, Job, Jobs


def soon(true, seconds: float = 5.0) -> bool:
    ends = time.monotonic() + seconds
    while not true() and time.monotonic() < ends:
        time.sleep(0.01)
    return true()


def test_a_session_has_one_job_at_a_time_and_a_short_line():
    jobs, running, most = Jobs(), Counter(), Counter()

    def work(session: str) -> None:
        with jobs.run(session, "question"):
            running[session] += 1
            most[session] = max(most[session], running[session])
            time.sleep(0.05)
            running[session] -= 1

    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(work, "ab"[i % 2]) for i in range(20)]
    refused = [str(one.exception()) for one in asked if one.exception()]
    assert most == {"a": 1, "b": 1}
    assert len(refused) >= 20 - 2 * jobs_module.MOST_OF_ONE
    assert all("wait for them" in sentence for sentence in refused)
    assert not jobs._jobs
    assert not jobs._spent
    assert not jobs._served


def test_a_full_server_says_so_and_is_free_again():
    jobs = Jobs()
    waiting = [jobs.enter(f"session {i}", "slide") for i in range(jobs_module.MOST_OF_ALL)]
    with pytest.raises(ValueError, match="Try again in a few minutes"):
        jobs.enter("another", "question")
    for job in waiting:
        jobs.leave(job)
    with jobs.run("another", "question") as job:
        assert job.place == 0


def test_who_waits_knows_its_place_and_who_was_served_less_goes_first(monkeypatch):
    monkeypatch.setitem(jobs_module.AT_ONCE, "slide", 2)
    jobs = Jobs()
    greedy = [jobs.enter("greedy", "slide") for _ in range(3)]
    others = [jobs.enter(name, "slide") for name in ("b", "c", "d")]
    jobs.start(greedy[0])
    jobs.start(others[0])  # two at a time, not one session's two
    assert [job.place for job in (greedy[0], others[0])] == [0, 0]
    assert [job.place for job in (*others[1:], *greedy[1:])] == [1, 2, 3, 4]
    jobs.leave(greedy[0])
    jobs.start(others[1])
    jobs.leave(others[0])
    jobs.start(others[2])
    assert [job.place for job in greedy[1:]] == [1, 2]


def test_a_large_slide_does_not_stop_a_question():
    """The one encodes batches of 0.1 s all the time; the other's three passes come between them."""
    jobs, over = Jobs(), threading.Event()

    def encode() -> None:
        with jobs.run("one", "slide") as job:
            while not over.is_set():
                with jobs.step(job):
                    time.sleep(0.1)

    thread = threading.Thread(target=encode)
    thread.start()
    time.sleep(1)
    began = time.monotonic()
    with jobs.run("other", "question") as job, jobs.step(job):
        for _ in range(3):
            time.sleep(0.05)
            jobs.pause(job)
    waited = time.monotonic() - began
    over.set()
    thread.join()
    assert waited < 1


def test_the_machine_is_shared_by_time_not_by_turns():
    jobs, steps = Jobs(), {"long": 0.0, "short": 0.0}

    def work(session: str, seconds: float) -> None:
        ends = time.monotonic() + 1.5
        with jobs.run(session, "question") as job:
            while time.monotonic() < ends:
                with jobs.step(job):
                    time.sleep(seconds)
                steps[session] += seconds

    threads = [threading.Thread(target=work, args=given) for given in (("long", 0.1), ("short", 0.01))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps["short"] > 0.5 * steps["long"]


@pytest.mark.parametrize("state", ["waiting in its session's line", "waiting for a place", "at its next step"])
def test_a_job_that_nobody_waits_for_ends_at_once_wherever_it_is(state, monkeypatch):
    monkeypatch.setitem(jobs_module.AT_ONCE, "slide", 2)
    jobs, failed = Jobs(), []
    session = "mine" if state == "waiting in its session's line" else "other"
    before = [jobs.enter(name, "slide") for name in (session, "third")]
    for job in before:
        jobs.start(job)

    def work() -> None:
        try:
            with jobs.run("mine", "question" if state == "at its next step" else "slide") as job, jobs.step(job):
                pass
        except Halted as error:
            failed.append(error)

    with jobs.step(before[1]):
        thread = threading.Thread(target=work)
        thread.start()
        assert soon(lambda: any(job.session == "mine" for job in jobs._jobs))
        time.sleep(0.1)
        began = time.monotonic()
        jobs.end("mine")
        thread.join(5)
        assert time.monotonic() - began < 1
    assert failed
    for job in before:
        jobs.leave(job)
    with jobs.run("another", "slide"):
        pass


def test_a_job_that_was_ended_does_not_keep_the_next_one_waiting():
    """The slide that was asked for last opens, even while another machine is slow to give the one before."""
    jobs = Jobs()
    slow = jobs.enter("mine", "example")
    jobs.start(slow)
    jobs.end("mine")
    with jobs.run("mine", "slide") as job:
        assert job.place == 0
    jobs.leave(slow)
    assert not jobs._jobs


def test_what_a_job_holds_is_closed_when_it_ends_and_at_once_if_it_has():
    class Slide:
        closed = False

        def close(self) -> None:
            self.closed = True

    jobs, first, second = Jobs(), Slide(), Slide()
    with jobs.run("mine", "slide") as job:
        job.hold(first)
        jobs.end("mine", "map")
        assert not first.closed
        jobs.end("mine", "slide")
        assert first.closed
        job.hold(second)
        assert second.closed
        with pytest.raises(Halted):
            job.tell("encoding", 1, 2)


def test_following_a_job_gives_its_result_or_what_it_raised_and_leaving_ends_it(monkeypatch):
    monkeypatch.setattr(jobs_module, "EVERY", 0.02)
    jobs, let_go = Jobs(), threading.Event()

    def count(job: Job) -> str:
        for done in range(1, 6):
            job.tell("counting", done, 5)
            time.sleep(0.02)
        return "five"

    *_, last = jobs.follow("mine", "slide", "token", count)
    assert last.result == "five"
    assert last.token == "token"

    def fail(_: Job) -> None:
        raise ValueError("That is no slide.")

    with pytest.raises(ValueError, match="no slide"):
        list(jobs.follow("mine", "slide", "", fail))

    def wait(job: Job) -> None:
        while not job.ended:
            time.sleep(0.01)
        let_go.set()

    following = jobs.follow("mine", "slide", "", wait)
    next(following)
    following.close()
    assert let_go.wait(2)
    assert soon(lambda: not jobs._jobs)


def test_time_left_is_known_once_something_is_done():
    job = Job("mine", "slide")
    job.tell("encoding", 0, 100)
    assert job.seconds_left is None
    time.sleep(0.1)
    job.tell("encoding", 50, 100)
    assert job.seconds_left == pytest.approx(0.1, abs=0.05)
