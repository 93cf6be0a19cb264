"""The comparison of a run's end with the end of the run that was resumed."""

import dataclasses

import pytest
import torch

from composer_replication.experiments.resume_check import EndOfRun, _cause, _compare

END = EndOfRun(
    step=3,
    row={"step": 3, "loss": 0.5, "loss/sdpo": 0.1, "learning_rate": 1e-5, "position/pairs": 6,
         "step_s": 1.0, "rollout_s": 0.2, "step_time": 1.0, "peak_gib": 2.0, "kl": float("nan")},
    rollouts=[{"turns": ["a"]}],
    weights={"weights/w": torch.ones(3), "teacher/w": torch.zeros(2)},
)  # fmt: skip


def changed(**row):
    return dataclasses.replace(END, row=END.row | row)


def test_an_equal_end_differs_in_nothing_whatever_it_took():
    again = changed(step_s=9.0, rollout_s=9.0, step_time=9.0, peak_gib=9.0)
    assert _compare(END, again).found == {}
    assert _compare(END, again).largest == 0.0


def test_rollouts_are_compared_where_the_resumed_run_made_any():
    assert _compare(END, dataclasses.replace(END, rollouts=[])).found == {}
    other = dataclasses.replace(END, rollouts=[{"turns": ["b"]}])
    assert "random state" in _cause(_compare(END, other), 0.0)


@pytest.mark.parametrize(
    ("again", "name", "reason"),
    [
        (changed(learning_rate=2e-5), "learning_rate is 2e-05 and was 1e-05", "scheduler"),
        (changed(**{"loss/sdpo": 0.1000001}), "loss/sdpo", "The teacher or the place"),
        (changed(**{"position/pairs": 0}), "position/pairs is 0 and was 6", "hint sites or pairs"),
        (changed(reward=1.0), "reward is 1.0 and was None", "Part of the state is not saved"),
        (
            dataclasses.replace(END, weights=END.weights | {"weights/w": torch.ones(3) + 1e-6}),
            "weights/w differs by 9.54e-07",
            "optimizer",
        ),
        (
            dataclasses.replace(END, weights={"weights/w": torch.ones(3)}),
            "teacher/w differs by inf",
            "teacher's weights",
        ),
        (
            dataclasses.replace(
                END, weights=END.weights | {"weights/w": torch.full((3,), torch.nan)}
            ),
            "weights/w differs by inf",
            "optimizer",
        ),
    ],
)
def test_a_difference_is_named_with_both_values_and_its_likely_reason(again, name, reason):
    differences = _compare(END, again)
    assert differences.largest > 0
    text = _cause(differences, 0.0)
    assert name in text
    assert reason in text
