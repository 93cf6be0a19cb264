import threading
import time

import pytest

from composer_replication.launch.pool import (
    largest_first,
    least_wall_s,
    num_slots,
    planned_wall_s,
    run_all,
)


def run(members, start, num_parallel, **extra):
    ended = []
    run_all(
        members,
        start,
        num_parallel=num_parallel,
        has_passed=lambda outcome: outcome == 0,
        on_end=ended.append,
        stops=extra.get("stops", threading.Event()),
    )
    return ended


def test_a_failed_member_is_retried_once_and_stops_no_other():
    tries = {}

    def start(member, number):
        tries.setdefault(member, []).append(number)
        return {"fails": 1, "recovers": int(number == 1), "passes": 0}[member]

    ended = run(["fails", "recovers", "passes"], start, 2)
    assert tries == {"fails": [1, 2], "recovers": [1, 2], "passes": [1]}
    last = {attempt.member: attempt.outcome for attempt in ended if attempt.is_last}
    assert last == {"fails": 1, "recovers": 0, "passes": 0}


def test_as_many_run_at_once_as_there_are_slots_and_none_more():
    now, most, lock = [], [], threading.Lock()

    def start(member, number):
        with lock:
            now.append(member)
            most.append(len(now))
        time.sleep(0.05)
        with lock:
            now.remove(member)
        return 0

    assert len(run(range(8), start, 3)) == 8
    assert max(most) == 3


def test_eight_members_in_four_slots_take_little_more_than_the_least_they_could():
    durations_s = [0.6, 0.5, 0.4, 0.3, 0.3, 0.3, 0.2, 0.2]

    def start(member, number):
        time.sleep(member)
        return 0

    started_s = time.monotonic()
    ended = run(durations_s, start, 4)
    wall_s = time.monotonic() - started_s
    seen_s = {str(n): attempt.wall_s for n, attempt in enumerate(ended)}
    assert wall_s <= 1.2 * least_wall_s(seen_s, 4)


def test_an_error_ends_the_pool_after_what_is_running():
    started = []

    def start(member, number):
        started.append(member)
        if member == 1:
            raise RuntimeError("no slot can work")
        time.sleep(0.1)
        return 0

    with pytest.raises(RuntimeError, match="no slot can work"):
        run(range(50), start, 2)
    assert len(started) < 10


def test_what_runs_beside_an_error_comes_to_its_own_end():
    stops, is_running = threading.Event(), threading.Event()
    ended = []

    def start(member, number):
        if member == "error":
            is_running.wait(10)
            raise RuntimeError("over the cap")
        is_running.set()
        assert not stops.wait(0.3)
        return 0

    with pytest.raises(RuntimeError, match="over the cap"):
        run_all(
            ["runs", "error", "waits"],
            start,
            num_parallel=2,
            has_passed=lambda outcome: outcome == 0,
            on_end=ended.append,
            stops=stops,
        )
    assert [(attempt.member, attempt.outcome) for attempt in ended] == [("runs", 0)]


def test_members_that_are_told_to_stop_are_not_retried():
    stops = threading.Event()

    def start(member, number):
        stops.set()
        return 130

    ended = run(["a", "b"], start, 1, stops=stops)
    assert [(attempt.member, attempt.is_last) for attempt in ended] == [("a", True)]


def test_memory_limits_the_slots_and_one_always_runs():
    assert num_slots(4, num_members=8, member_gib=3.0, free_gib=10.0) == 3
    assert num_slots(4, num_members=2, member_gib=None, free_gib=10.0) == 2
    assert num_slots(None, num_members=8, member_gib=1.0, free_gib=10.0) == 1
    assert num_slots(4, num_members=8, member_gib=20.0, free_gib=10.0) == 1


def test_the_least_wall_is_the_longest_member_or_an_even_share():
    assert least_wall_s({"a": 4.0, "b": 1.0}, 4) == 4.0
    assert least_wall_s({"a": 4.0, "b": 4.0, "c": 4.0}, 2) == 6.0
    assert least_wall_s({}, 2) == 0.0


def test_the_longest_start_first_and_equal_ones_as_they_were_written():
    planned_s = {"a": 1.0, "b": 3.0, "c": 3.0, "d": 2.0}
    assert largest_first(list(planned_s), planned_s.__getitem__) == ["b", "c", "d", "a"]


def test_the_longest_first_is_near_the_least_where_the_written_order_is_not():
    written_s = [1.0, 1.0, 1.0, 1.0, 4.0]
    assert planned_wall_s(written_s, 2) == 6.0
    assert planned_wall_s(sorted(written_s, reverse=True), 2) == 4.0
    assert planned_wall_s([2.0], 4) == 2.0
