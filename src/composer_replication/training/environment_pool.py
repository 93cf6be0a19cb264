"""Environments side by side: each in a thread of its own, with a time limit, results in order.

A thread cannot be ended from outside. One that does not answer in time is left behind with its
environment, and the next call of that seat gets a new one; the run goes on and the interpreter can
still exit. Environments must not share state, nor use what works in the main thread alone
(`signal`).
"""

import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Generic, Literal, TypeVar, cast

Environment = TypeVar("Environment")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Failure:
    """A call of an environment that gave no result.

    Example: `Failure("timeout", TimeoutError("no answer within 60 s"))`.
    """

    kind: Literal["timeout", "crash"]
    error: BaseException

    def __str__(self) -> str:
        return f"{self.kind}: {str(self.error) or type(self.error).__name__}"


@dataclass(frozen=True, slots=True)
class _Job:
    position: int
    call: Callable[[object], object]
    finished: "SimpleQueue[tuple[int, object]]"


_Seat = SimpleQueue[_Job | None]


class EnvironmentPool(Generic[Environment]):
    """Seats numbered from 0; every seat makes its environment once, in its thread, and keeps it.

    Example: all eight at once, in the time of the slowest:
        >>> pool = EnvironmentPool(ApiDrift, timeout_s=60.0, max_concurrency=32)
        >>> pool.run([(seat, ApiDrift.get_reward) for seat in range(8)])
    """

    def __init__(
        self, make: Callable[[], Environment], *, timeout_s: float, max_concurrency: int
    ) -> None:
        """Start nothing yet.

        Args:
            make: an environment; called in the thread that will use it.
            timeout_s: seconds that one call may take, making the environment included.
            max_concurrency: calls that may run at a time.
        """
        self._make = make
        self.timeout_s = timeout_s
        self.max_concurrency = max_concurrency
        self._seats: dict[int, _Seat] = {}
        # Idle threads wait for jobs; they end with the pool.
        weakref.finalize(self, _close, self._seats)

    def run(
        self, calls: Sequence[tuple[int, Callable[[Environment], Result]]]
    ) -> list[Result | Failure]:
        """What each call gave, in the order of `calls`; no call can raise or hang this one.

        Args:
            calls: (seat, function of its environment), each seat at most once.
        """
        results: list[Result | Failure | None] = [None] * len(calls)
        finished: SimpleQueue[tuple[int, object]] = SimpleQueue()
        waiting = deque(range(len(calls)))
        deadlines: dict[int, float] = {}
        while waiting or deadlines:
            while waiting and len(deadlines) < self.max_concurrency:
                position = waiting.popleft()
                seat, call = calls[position]
                deadlines[position] = time.monotonic() + self.timeout_s
                job = _Job(position, cast(Callable[[object], object], call), finished)
                self._queue_of(seat).put(job)
            wait_s = min(deadlines.values()) - time.monotonic()
            try:
                position, result = finished.get(timeout=max(wait_s, 0.0))
            except Empty:
                for position in _expired(deadlines):
                    results[position] = self._too_late(calls[position][0])
                    del deadlines[position]
                continue
            # A job that was given up may still finish.
            if position in deadlines:
                del deadlines[position]
                results[position] = cast("Result | Failure", result)
                if isinstance(result, Failure):
                    self._leave(calls[position][0])
        return cast("list[Result | Failure]", results)

    def _queue_of(self, seat: int) -> _Seat:
        if seat not in self._seats:
            queue: _Seat = SimpleQueue()
            # A daemon: one that hangs must not keep the interpreter from exiting.
            Thread(target=_serve, args=(self._make, queue), daemon=True).start()
            self._seats[seat] = queue
        return self._seats[seat]

    def _too_late(self, seat: int) -> Failure:
        self._leave(seat)
        return Failure("timeout", TimeoutError(f"no answer within {self.timeout_s:g} s"))

    def _leave(self, seat: int) -> None:
        """The state of an environment that failed is unknown: the next call makes another."""
        self._seats.pop(seat).put(None)


def _expired(deadlines: dict[int, float]) -> list[int]:
    now = time.monotonic()
    return [position for position, deadline in deadlines.items() if deadline <= now]


def _close(seats: dict[int, _Seat]) -> None:
    for queue in seats.values():
        queue.put(None)


def _serve(make: Callable[[], object], queue: _Seat) -> None:
    environment: object | None = None
    while (job := queue.get()) is not None:
        result: object
        try:
            environment = make() if environment is None else environment
            result = job.call(environment)
        # SystemExit too: what a model wrote may have made the environment call sys.exit().
        except BaseException as error:
            result = Failure("crash", error)
        job.finished.put((job.position, result))
        # An idle thread keeps no results alive.
        del job, result
