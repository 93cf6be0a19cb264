"""Several members at a time: started in order, retried once, none stopped by another's failure."""

import heapq
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Member = TypeVar("Member")
Outcome = TypeVar("Outcome")

ATTEMPTS = 2
"""A failed member is retried once."""


@dataclass(frozen=True, slots=True)
class Attempt(Generic[Member, Outcome]):
    """One attempt of one member, ended.

    Attributes:
        wall_s: it took.
        is_last: no other follows.
    """

    member: Member
    number: int
    outcome: Outcome
    wall_s: float
    is_last: bool


def run_all(
    members: Sequence[Member],
    start: Callable[[Member, int], Outcome],
    *,
    num_parallel: int,
    has_passed: Callable[[Outcome], bool],
    on_end: Callable[[Attempt[Member, Outcome]], None],
    stops: threading.Event,
    on_interrupt: Callable[[], None] = lambda: None,
) -> None:
    """Carry out every member, `num_parallel` at a time, and return when the last has ended.

    A member that failed is retried at once, in the slot it has: at the end of the queue it would
    run alone while the other slots idle.

    Args:
        members: `largest_first`, so that none is left over for the end.
        start: carries out a member's attempt (1, 2) and returns how it ended; runs in a thread.
        num_parallel: slots.
        has_passed: whether an outcome needs no retry.
        on_end: told of every attempt, in this thread.
        stops: set on Ctrl-C; `start` watches it and ends what it runs.
        on_interrupt: told of Ctrl-C before that.

    Raises:
        BaseException: what `start` raised, once what was running has come to its own end; no member
            is started after it.
        KeyboardInterrupt: once what was running has been ended.
    """
    is_closed = threading.Event()
    waiting: queue.SimpleQueue[Member] = queue.SimpleQueue()
    for member in members:
        waiting.put(member)
    ended: queue.SimpleQueue[Attempt[Member, Outcome] | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            while not (stops.is_set() or is_closed.is_set()):
                try:
                    member = waiting.get_nowait()
                except queue.Empty:
                    break
                for number in range(1, ATTEMPTS + 1):
                    started_s = time.monotonic()
                    outcome = start(member, number)
                    is_over = stops.is_set() or is_closed.is_set()
                    is_last = has_passed(outcome) or number == ATTEMPTS or is_over
                    wall_s = time.monotonic() - started_s
                    ended.put(Attempt(member, number, outcome, wall_s, is_last))
                    if is_last:
                        break
        except BaseException as error:
            is_closed.set()
            ended.put(error)
        ended.put(None)

    workers = [threading.Thread(target=work) for _ in range(min(num_parallel, len(members)))]
    for worker in workers:
        worker.start()
    failure = _collect(len(workers), ended, on_end, stops, on_interrupt)
    for worker in workers:
        worker.join()
    if failure is not None:
        raise failure


def _collect(
    num_workers: int,
    ended: "queue.SimpleQueue[Attempt[Member, Outcome] | BaseException | None]",
    on_end: Callable[[Attempt[Member, Outcome]], None],
    stops: threading.Event,
    on_interrupt: Callable[[], None],
) -> BaseException | None:
    """Pass attempts on until every worker is done; the first error, if there was one."""
    failure: BaseException | None = None
    while num_workers > 0:
        try:
            # A bare get() would not hear of Ctrl-C.
            item = ended.get(timeout=0.2)
            if item is None:
                num_workers -= 1
            elif isinstance(item, BaseException):
                failure = failure or item
            else:
                on_end(item)
        except queue.Empty:
            continue
        except KeyboardInterrupt as error:
            if not stops.is_set():
                on_interrupt()
            stops.set()
            failure = failure or error
    return failure


def num_slots(
    asked: int | None, *, num_members: int, member_gib: float | None, free_gib: float | None
) -> int:
    """How many members run at once: as many as were asked for and fit the memory; at least one.

    Args:
        asked: None: one.
        num_members: no more are of use.
        member_gib: planned for one member; None: not known, so memory sets no limit.
        free_gib: of the machine or the card.
    """
    slots = min(asked or 1, max(num_members, 1))
    if member_gib is not None and free_gib is not None and member_gib > 0:
        slots = min(slots, int(free_gib // member_gib))
    return max(slots, 1)


def largest_first(members: Sequence[Member], planned_s: Callable[[Member], float]) -> list[Member]:
    """The order in which members start: the longest first, equal ones as they were given."""
    return sorted(members, key=planned_s, reverse=True)


def planned_wall_s(durations_s: Sequence[float], num_parallel: int) -> float:
    """Seconds until the last of members that start in this order has ended, each free slot taken.

    Example: `planned_wall_s([4.0, 3.0, 3.0], 2)` -> 6.0.
    """
    slots = [0.0] * num_parallel
    for duration_s in durations_s:
        heapq.heapreplace(slots, slots[0] + duration_s)
    return max(slots)


def least_wall_s(durations_s: Mapping[str, float], num_parallel: int) -> float:
    """No schedule is shorter: the longest member, or all of them shared out evenly."""
    if not durations_s:
        return 0.0
    return max(max(durations_s.values()), sum(durations_s.values()) / num_parallel)
