"""Rewards: one finite number a rollout, or an error that names the function and the rollout."""

import asyncio
import inspect

import numpy as np
import pytest
import torch

from composer_replication.environments.protocol import Observation
from composer_replication.errors import ConfigError, DataError, RewardError
from composer_replication.training.checked_environment import CheckedEnvironment
from composer_replication.training.rewards import (
    checked_reward,
    environment_reward,
    token_reward,
)

PROMPTS = [[{"role": "user", "content": f"prompt {i}"}] for i in range(2)]
ROLLOUTS = {"prompts": PROMPTS, "completions": ["a", "b"], "completion_ids": [[1], [2]]}


def checked(answer):
    return checked_reward(lambda **columns: answer, "mine:score")(**ROLLOUTS)


@pytest.mark.parametrize(
    "answer",
    [
        [0, 1.5],
        (0, 1.5),
        np.array([0, 1.5]),
        torch.tensor([0, 1.5]),
        [np.float32(0), torch.tensor(1.5)],
        (value for value in (False, 1.5)),
    ],
)
def test_whatever_holds_one_number_a_rollout_is_taken(answer):
    assert checked(answer) == [0.0, 1.5]


def test_a_rollout_may_be_left_unscored_but_not_all_of_them():
    assert checked([None, 1.0]) == [None, 1.0]
    with pytest.raises(RewardError, match="returned None for all 2 rollouts"):
        checked([None, None])


REFUSED = {
    "too_few": (
        [0.5],
        "returned 1 values for 2 rollouts, so it is not known which reward is whose",
    ),
    "too_many": ([0.5] * 3, "returned 3 values for 2 rollouts"),
    "nothing": (None, "returned None; it must return a list of one number for each of the 2"),
    "one_number": (0.5, "returned 0.5; it must return a list"),
    "text": ("ab", "returned 'ab'; it must return a list"),
    "table": ({0: 0.5, 1: 0.5}, "returned {0: 0.5, 1: 0.5}; it must return a list"),
    "text_of_a_number": (
        [0.5, "0.5"],
        "returned '0.5' for rollout 1 (its prompt ends 'prompt 1'); a reward is a number.",
    ),
    "nan": (
        [0.5, float("nan")],
        "returned nan for rollout 1 (its prompt ends 'prompt 1'); the baseline of its whole group "
        "would not be a number. Return a finite number, such as 0.0 for a failed rollout.",
    ),
    "infinity": ([float("inf"), 0.5], "returned inf for rollout 0 (its prompt ends 'prompt 0')"),
    "nan_in_a_tensor": (torch.tensor([float("nan"), 0.5]), "returned tensor(nan) for rollout 0"),
    "pairs": ([[1, 2], [3, 4]], "returned [1, 2] for rollout 0"),
}


@pytest.mark.parametrize(("answer", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_reward_names_the_function_and_the_rollout(answer, text):
    with pytest.raises(RewardError) as caught:
        checked(answer)
    assert str(caught.value).startswith(f"The reward function 'mine:score' {text}")


def test_what_the_users_function_raises_is_told_with_its_line():
    def score(**columns):
        return columns["difficulty"]

    with pytest.raises(RewardError) as caught:
        checked_reward(score, "mine:score")(**ROLLOUTS)
    line = score.__code__.co_firstlineno + 1
    assert str(caught.value).startswith(
        "The reward function 'mine:score' raised KeyError: 'difficulty' (test_rewards.py, line "
        f"{line}, in score). Correct it"
    )
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [DataError("own words"), torch.OutOfMemoryError("CUDA")])
def test_own_errors_and_a_lack_of_memory_pass_through(error):
    def score(**columns):
        raise error

    with pytest.raises(type(error)) as caught:
        checked_reward(score, "mine:score")(**ROLLOUTS)
    assert caught.value is error


def test_a_coroutine_function_stays_one_and_is_checked_too():
    async def score(**columns):
        return [1.0]

    wrapped = checked_reward(score, "mine:score")
    assert inspect.iscoroutinefunction(wrapped)
    with pytest.raises(RewardError, match="returned 1 values for 2 rollouts"):
        asyncio.run(wrapped(**ROLLOUTS))


def test_trl_still_names_its_metrics_after_the_function():
    assert checked_reward(lambda **columns: [], "package.module:score").__name__ == "score"


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), None, "high"])
def test_a_reward_of_the_environment_is_a_finite_number(value):
    assert environment_reward(environment_reward=[1, 0.5]) == [1.0, 0.5]
    with pytest.raises(RewardError) as caught:
        environment_reward(environment_reward=[0.5, value], **ROLLOUTS)
    assert str(caught.value).startswith(
        f"The environment's get_reward() gave {value!r} for rollout 1 (its prompt ends 'prompt 1')"
    )


def test_the_synthetic_reward_is_the_share_of_even_tokens():
    assert token_reward(completion_ids=[[1, 2], [], [4]]) == [0.5, 0.0, 1.0]


class Environment:
    answer = Observation("done", is_done=True)

    def reset(self, **row):
        self.row = row
        return row.get("opening")

    def _step_text(self, action):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def get_reward(self):
        return len(self.row)


def test_a_checked_environment_passes_everything_on():
    environment = CheckedEnvironment(Environment)
    assert environment.reset(opening=" Go.") == " Go."
    assert environment._step_text("act") is Environment.answer
    assert environment.get_reward() == 1


def test_what_the_users_environment_raises_or_answers_is_told_by_name(monkeypatch):
    environment = CheckedEnvironment(Environment)
    with pytest.raises(RewardError, match=r"^Environment\.reset returned 7; what it returns"):
        environment.reset(opening=7)
    monkeypatch.setattr(Environment, "answer", "text")
    with pytest.raises(RewardError, match=r"_step_text returned 'text'\. Return an Observation"):
        environment._step_text("act")
    monkeypatch.setattr(Environment, "answer", ValueError("no such tool"))
    with pytest.raises(
        RewardError, match=r"^Environment\._step_text\('act'\) raised ValueError: no"
    ):
        environment._step_text("act")
    del environment._instance.row
    with pytest.raises(RewardError, match=r"^Environment\.get_reward raised AttributeError"):
        environment.get_reward()


def test_an_object_that_no_rollout_could_drive_is_refused():
    with pytest.raises(ConfigError, match="The environment int lacks reset, _step_text or get_rew"):
        CheckedEnvironment(int)
