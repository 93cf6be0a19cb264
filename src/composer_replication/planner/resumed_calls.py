"""How many calls a run needs whose time-out ends before it does, and how long they all take.

A call that reaches its time-out saves nothing then: the next one starts and loads again, goes on
from the newest checkpoint, and makes the steps since that one a second time.
"""

import math
from dataclasses import dataclass

from composer_replication.planner.cost import working_s
from composer_replication.planner.run_shape import RunShape
from composer_replication.planner.wall_clock import WallClock


@dataclass(frozen=True, slots=True)
class Stretch:
    """Expected seconds of what a call does before, while and after it gets on.

    Example: `Stretch(100.0, 60.0, 2.0, 200, 50, 10.0).first_kept_s` -> 210.0.
    """

    setup_s: float
    """Before the first step of the first call."""
    again_s: float
    """Before the first step of a later one, whose model is downloaded already."""
    step_s: float
    """A step with its share of the evaluations; of an evaluation, a model with its load."""
    num_steps: int
    steps_a_checkpoint: int
    """After so many the run keeps what it did; all of them where only its end is kept."""
    save_s: float

    @property
    def first_kept_s(self) -> float:
        """From the command to the first checkpoint."""
        return self.setup_s + self.steps_a_checkpoint * self.step_s + self.save_s

    def steps_within(self, limit_s: float) -> int:
        """Steps that the first call makes and can save before its time-out."""
        return max(0, int((working_s(limit_s) - self.setup_s - self.save_s) / self.step_s))


@dataclass(frozen=True, slots=True)
class Calls:
    """The calls of a run to its end.

    Example: `calls_to_end(stretch, total_s=900.0, limit_s=300.0).num_calls` -> 5.
    """

    num_calls: int | None
    """None: no call reaches a checkpoint, so the run never ends."""
    total_s: float
    """Expected, of all of them; of a run that never ends, that of one without a time-out."""


def stretch_of(shape: RunShape, clock: WallClock, num_steps: int) -> Stretch:
    """What a call of the run is made of."""
    total_s = clock.total_s.expected
    phases_s = {name: phase.expected for name, phase in clock.phases_s.items()}
    if shape.verb == "evaluate":
        # Each of its models is downloaded, loaded, measured and kept by itself.
        start_s = phases_s["cold_start"]
        return Stretch(start_s, start_s, (total_s - start_s) / num_steps, num_steps, 1, 0.0)
    save_s = phases_s["save"]
    return Stretch(
        setup_s=clock.setup_s,
        again_s=clock.setup_s - phases_s["download"],
        step_s=(total_s - clock.setup_s - save_s) / num_steps,
        num_steps=num_steps,
        steps_a_checkpoint=min(shape.steps_a_checkpoint, num_steps),
        save_s=save_s,
    )


def calls_to_end(stretch: Stretch, *, total_s: float, limit_s: float) -> Calls:
    """The calls of a run with that time-out.

    Args:
        stretch: of the run.
        total_s: expected, of one call without a time-out.
        limit_s: the time-out; infinite: there is none.
    """
    if math.isinf(limit_s) or total_s <= working_s(limit_s):
        return Calls(1, total_s)
    every = stretch.steps_a_checkpoint
    kept_first = stretch.steps_within(limit_s) // every * every
    if kept_first == 0:
        return Calls(None, total_s)
    room = working_s(limit_s) - stretch.again_s - stretch.save_s
    kept = int(room / stretch.step_s) // every * every
    left = max(stretch.num_steps - kept_first, 0)
    # Calls between the first and the last, which makes what is left and ends within its time.
    num_between = max(0, math.ceil((left - room / stretch.step_s) / kept))
    last = max(left - num_between * kept, 0)
    last_s = stretch.again_s + last * stretch.step_s + stretch.save_s
    return Calls(2 + num_between, (1 + num_between) * limit_s + last_s)
