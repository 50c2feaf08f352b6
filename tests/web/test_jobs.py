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


def listened(*sessions: str) -> Jobs:
    """Jobs of sessions that somebody listens to."""
    jobs = Jobs()
    for session in sessions:
        jobs.heed(session, True)
    return jobs


def test_a_session_has_one_job_at_a_time_and_a_short_line():
    jobs, running, most = listened("a", "b"), Counter(), Counter()

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
    jobs = listened(*(f"session {i}" for i in range(jobs_module.MOST_OF_ALL)))
    waiting = [jobs.enter(f"session {i}", "slide") for i in range(jobs_module.MOST_OF_ALL)]
    with pytest.raises(ValueError, match="Try again in a few minutes"):
        jobs.enter("another", "question")
    for job in waiting:
        jobs.leave(job)
    with jobs.run("another", "question") as job:
        assert job.place == 0


def test_who_waits_knows_its_place_and_who_was_served_less_goes_first(monkeypatch):
    monkeypatch.setitem(jobs_module.AT_ONCE, "slide", 2)
    jobs = listened("greedy", "b", "c", "d")
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
    jobs, over = listened("one", "other"), threading.Event()

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
    assert waited < 3, "not when the other one is over"


def test_the_machine_is_shared_by_time_not_by_turns():
    jobs, steps = listened("long", "short"), {"long": 0.0, "short": 0.0}

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


def work_on(jobs: Jobs, session: str, seconds: float, steps: Counter, over: threading.Event) -> threading.Thread:
    """One job after the other, each of one step of so many seconds, until it is over; counts them."""

    def work() -> None:
        while not over.is_set():
            with jobs.run(session, "question") as job, jobs.step(job):
                time.sleep(seconds)
            steps[session] += 1

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_many_who_come_anew_overtake_nobody_who_waits():
    """Twenty sessions with one step each, none of which has had anything of the machine yet."""
    jobs, steps, over = listened("live", *(f"new {i}" for i in range(20))), Counter(), threading.Event()
    threads = []
    with jobs.run("live", "question") as job, jobs.step(job):
        time.sleep(0.2)
        threads = [work_on(jobs, f"new {i}", 0.05, steps, over) for i in range(20)]
        time.sleep(0.05)
        began = time.monotonic()
        for _ in range(3):
            jobs.pause(job)
        waited = time.monotonic() - began
    over.set()
    for thread in threads:
        thread.join()
    assert waited < 20 * 0.05, "of those that run at the same time each has a step, no more"


def test_who_has_a_page_open_goes_before_all_that_nobody_listens_to_and_these_are_not_starved():
    jobs, steps, over = listened("live"), Counter(), threading.Event()
    threads = [work_on(jobs, f"deaf {i}", 0.02, steps, over) for i in range(6)]
    time.sleep(0.2)
    alone = sum(steps.values())
    assert alone >= 5, "where nobody else is they have all of the machine"
    threads.append(work_on(jobs, "live", 0.02, steps, over))
    steps.clear()
    time.sleep(2)
    over.set()
    for thread in threads:
        thread.join()
    deaf = {session: count for session, count in steps.items() if session != "live"}
    assert steps["live"] > sum(deaf.values()), "who also have what it leaves between two questions"
    assert len(deaf) == 6, "each of them comes to its turn"


def test_who_opens_a_page_is_no_longer_one_of_those_that_nobody_listens_to():
    jobs, steps, over = listened("live"), Counter(), threading.Event()
    threads = [work_on(jobs, session, 0.02, steps, over) for session in ("live", "other")]
    time.sleep(0.5)
    jobs.heed("other", True)
    steps.clear()
    time.sleep(1)
    over.set()
    for thread in threads:
        thread.join()
    assert steps["other"] > 0.7 * steps["live"]


def test_a_few_things_are_done_for_those_that_nobody_listens_to_and_a_place_is_left_for_others(monkeypatch):
    monkeypatch.setitem(jobs_module.AT_ONCE, "slide", 2)
    jobs = listened("live")
    deaf = [jobs.enter(f"deaf {i}", "slide") for i in range(jobs_module.MOST_UNHEARD)]
    with pytest.raises(ValueError, match="do not listen"):
        jobs.enter("one more", "question")
    jobs.start(deaf[0])
    assert not jobs._may_run(deaf[1])
    with jobs.run("live", "slide") as job:
        assert job.place == 0
    jobs.heed("deaf 1", True)
    jobs.start(deaf[1])
    jobs.enter("one more", "question")


def test_a_page_is_answered_before_a_flood_that_nobody_listens_to_which_is_done_in_the_end(desk, opened):
    """The desk's own work: eight sessions select patches again and again while the ninth asks."""
    done, each, chat = Counter(), 40, [{"role": "user", "content": "Which tissue is this?"}]
    options = ["liver", "fat"]

    def flood(session: str) -> None:
        with desk.jobs.run(session, "question") as job:
            for _ in range(each):
                desk.select(opened.slides, job=job.name)
                done[session] += 1

    threads = [threading.Thread(target=flood, args=(f"deaf {i}",)) for i in range(jobs_module.MOST_UNHEARD)]
    desk.jobs.heed("live", True)
    for thread in threads:
        thread.start()
    assert soon(lambda: sum(done.values()) > 3)
    with desk.jobs.run("live", "question") as job:
        before = sum(done.values())
        answer = desk.weigh(opened.case, chat, desk.judge(opened.case, chat, None, options, job.name), job.name)
        meanwhile = sum(done.values()) - before
    desk.jobs.heed("live", False)
    for thread in threads:
        thread.join(60)
    assert len(answer.effects) == len(opened.case.selection.indices)
    assert meanwhile < each, "not even one of them came to its end"
    assert len(done) == len(threads)
    assert set(done.values()) == {each}


def test_who_paused_for_long_has_saved_nothing_up():
    jobs, steps, over = listened("idle", "busy"), Counter(), threading.Event()
    with jobs.run("idle", "slide") as job:
        thread = work_on(jobs, "busy", 0.02, steps, over)
        time.sleep(1)
        steps.clear()
        ends = time.monotonic() + 0.5
        while time.monotonic() < ends:
            with jobs.step(job):
                time.sleep(0.02)
    over.set()
    thread.join()
    assert steps["busy"] >= 6, "every second step is the other's"


@pytest.mark.parametrize("state", ["waiting in its session's line", "waiting for a place", "at its next step"])
def test_a_job_that_nobody_waits_for_ends_at_once_wherever_it_is(state, monkeypatch):
    monkeypatch.setitem(jobs_module.AT_ONCE, "slide", 2)
    jobs, failed = listened("mine", "other", "third", "another"), []
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
        assert time.monotonic() - began < 3
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
    job._since -= 60
    job.tell("encoding", 50, 100)
    assert job.seconds_left == pytest.approx(60, abs=5)


def test_work_that_goes_on_after_its_job_was_left_finds_it_ended():
    jobs = Jobs()
    with jobs.run("mine", "question") as job:
        jobs.end("mine", "question")
    assert jobs.find(job.name) is job
    with pytest.raises(Halted), jobs.step(jobs.find(job.name)):
        pass
