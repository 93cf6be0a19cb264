"""When a smoke saves its checkpoint and when it stops."""

import time
from types import SimpleNamespace

import pytest

from composer_replication.experiments.last_steps import MIN_STEPS, LastSteps


def run(last_steps, num_steps, *, step_s=0.0):
    """The steps done and the step that was saved."""
    for step in range(1, num_steps + 1):
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        last_steps.on_step_begin(None, None, control)
        time.sleep(step_s)
        last_steps.on_step_end(None, SimpleNamespace(global_step=step), control)
        assert control.should_save is (last_steps.saved_step == step)
        if control.should_training_stop:
            return step, last_steps.saved_step
    return num_steps, last_steps.saved_step


@pytest.mark.parametrize("max_steps", [2, 5])
def test_the_checkpoint_is_of_the_last_step_but_one(max_steps):
    assert run(LastSteps(max_steps), max_steps + 3) == (max_steps, max_steps - 1)


def test_a_spent_budget_saves_and_leaves_room_for_one_more_step_but_never_before_the_minimum():
    assert run(LastSteps(50, budget_s=0.0), 50, step_s=0.001) == (MIN_STEPS, MIN_STEPS - 1)


def test_an_ample_budget_ends_at_the_maximum():
    assert run(LastSteps(12, budget_s=1000.0), 20) == (12, 11)


def test_the_budget_counts_from_the_first_step_on():
    last_steps = LastSteps(50, budget_s=1000.0)
    last_steps._started_s = -1e9
    assert run(last_steps, MIN_STEPS + 3) == (MIN_STEPS + 3, None)
