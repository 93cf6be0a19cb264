import gc
import sys
import threading
import time

import pytest

from composer_replication.training.environment_pool import EnvironmentPool, Failure


class Clerk:
    """Remembers who asked for what, and in which thread."""

    def __init__(self):
        self.threads = [threading.get_ident()]
        self.num_calls = 0

    def answer(self, value, wait_s=0.0):
        self.threads.append(threading.get_ident())
        self.num_calls += 1
        time.sleep(wait_s)
        return value


def pool(timeout_s=10.0, max_concurrency=64):
    return EnvironmentPool(Clerk, timeout_s=timeout_s, max_concurrency=max_concurrency)


def asking(value, wait_s=0.0):
    return lambda clerk: clerk.answer(value, wait_s)


def test_eight_quarter_seconds_take_about_one_quarter_second():
    clerks = pool()
    clerks.run([(seat, asking(seat)) for seat in range(8)])
    started_s = time.perf_counter()
    results = clerks.run([(seat, asking(seat, wait_s=0.25)) for seat in range(8)])
    assert time.perf_counter() - started_s < 1.0
    assert results == list(range(8))


def test_results_come_in_the_order_of_the_calls_whoever_is_first():
    calls = [(seat, asking(seat, wait_s=0.02 * (5 - seat))) for seat in (3, 0, 5, 1)]
    assert pool().run(calls) == [3, 0, 5, 1]


def test_a_seat_keeps_its_environment_and_its_thread():
    clerks = pool()
    for value in range(3):
        clerks.run([(0, asking(value)), (1, asking(value))])
    first, second = clerks.run([(0, lambda c: c), (1, lambda c: c)])
    assert first.num_calls == second.num_calls == 3
    assert len(set(first.threads)) == len(set(second.threads)) == 1
    assert first.threads[0] != second.threads[0]


def test_one_that_never_answers_is_given_up_and_its_seat_gets_a_new_one():
    clerks = pool(timeout_s=0.2)
    release = threading.Event()
    started_s = time.perf_counter()
    late, prompt = clerks.run([(0, lambda c: release.wait()), (1, asking("here"))])
    assert time.perf_counter() - started_s < 2.0
    assert (late.kind, prompt) == ("timeout", "here")
    assert str(late) == "timeout: no answer within 0.2 s"
    release.set()
    assert clerks.run([(0, lambda c: c.num_calls), (1, lambda c: c.num_calls)]) == [0, 1]


def test_more_hanging_calls_than_may_run_at_a_time_do_not_starve_the_others():
    clerks = pool(timeout_s=0.1, max_concurrency=2)
    release = threading.Event()
    calls = [(seat, lambda c: release.wait()) for seat in range(4)] + [(4, asking("x"))]
    *late, prompt = clerks.run(calls)
    release.set()
    assert [failure.kind for failure in late] == ["timeout"] * 4
    assert prompt == "x"


@pytest.mark.parametrize("raised", [ValueError("broken"), SystemExit(3), KeyboardInterrupt()])
def test_whatever_an_environment_raises_is_its_own_failure(raised):
    def fail(clerk):
        raise raised

    clerks = pool()
    crash, other = clerks.run([(0, fail), (1, asking("fine"))])
    assert isinstance(crash, Failure)
    assert (crash.kind, crash.error, other) == ("crash", raised, "fine")
    assert str(crash).startswith("crash: ")
    assert clerks.run([(0, lambda c: c.num_calls)]) == [0]


def test_a_failure_without_a_text_is_named_by_its_kind():
    assert str(Failure("crash", ValueError())) == "crash: ValueError"


def test_an_environment_that_cannot_be_made_fails_its_call():
    broken = EnvironmentPool(lambda: sys.exit(1), timeout_s=1.0, max_concurrency=1)
    (failure,) = broken.run([(0, lambda made: made)])
    assert failure.kind == "crash"


def test_no_more_than_allowed_work_at_a_time():
    lock, running, most = threading.Lock(), [], []

    def work(clerk):
        with lock:
            running.append(clerk)
            most.append(len(running))
        time.sleep(0.02)
        with lock:
            running.remove(clerk)

    pool(max_concurrency=3).run([(seat, work) for seat in range(9)])
    assert max(most) == 3


def test_threads_end_with_the_pool():
    before = set(threading.enumerate())
    clerks = pool()
    clerks.run([(seat, asking(seat)) for seat in range(6)])
    threads = set(threading.enumerate()) - before
    assert len(threads) == 6
    del clerks
    gc.collect()
    for thread in threads:
        thread.join(timeout=5.0)
    assert not any(thread.is_alive() for thread in threads)


def test_nothing_to_do_is_nothing_done():
    assert pool().run([]) == []
