"""How many calls a run takes, by hand and against one that is followed call by call."""

import math

import pytest

from composer_replication.planner.cost import timeout_for_s, working_s
from composer_replication.planner.resumed_calls import Stretch, calls_to_end

RUN = Stretch(
    setup_s=100.0, again_s=60.0, step_s=2.0, num_steps=400, steps_a_checkpoint=50, save_s=10.0
)
TOTAL_S = 100.0 + 400 * 2.0 + 10.0


def followed(run, limit_s):
    """Seconds of each call."""
    done, calls_s, setup_s = 0, [], run.setup_s
    while True:
        assert len(calls_s) < 100
        rest_s = setup_s + (run.num_steps - done) * run.step_s + run.save_s
        if rest_s <= working_s(limit_s):
            return [*calls_s, rest_s]
        steps = (working_s(limit_s) - setup_s - run.save_s) // run.step_s
        done = min(run.num_steps, done + int(steps // run.steps_a_checkpoint) * 50)
        calls_s.append(limit_s)
        setup_s = run.again_s


def test_a_run_that_ends_within_its_timeout_is_one_call():
    assert calls_to_end(RUN, total_s=TOTAL_S, limit_s=940.0).num_calls == 1
    assert calls_to_end(RUN, total_s=TOTAL_S, limit_s=939.0).num_calls == 2
    assert calls_to_end(RUN, total_s=TOTAL_S, limit_s=math.inf).total_s == TOTAL_S


def test_each_later_call_sets_up_again_and_repeats_what_was_not_saved():
    """530 s of work: 210 steps of which 200 are saved; then 230, of which 200 remain."""
    calls = calls_to_end(RUN, total_s=TOTAL_S, limit_s=560.0)
    assert calls.num_calls == 2
    assert calls.total_s == pytest.approx(560.0 + 60.0 + 200 * 2.0 + 10.0)


@pytest.mark.parametrize("limit_s", range(240, 940, 7))
def test_the_closed_form_is_the_run_followed_call_by_call(limit_s):
    calls = calls_to_end(RUN, total_s=TOTAL_S, limit_s=float(limit_s))
    expected = followed(RUN, float(limit_s))
    assert calls.num_calls == len(expected)
    assert calls.total_s == pytest.approx(sum(expected))


def test_a_run_whose_first_checkpoint_is_beyond_its_timeout_never_ends():
    least_s = timeout_for_s(RUN.first_kept_s)
    assert calls_to_end(RUN, total_s=TOTAL_S, limit_s=least_s).num_calls is not None
    assert calls_to_end(RUN, total_s=TOTAL_S, limit_s=least_s - 2.0).num_calls is None


@pytest.mark.parametrize("work_s", [1.0, 100.0, 269.0, 271.0, 90_000.0])
def test_the_timeout_for_some_work_is_the_shortest_that_leaves_time_for_it(work_s):
    limit_s = timeout_for_s(work_s)
    assert working_s(limit_s) >= work_s > working_s(limit_s - 1.2)
