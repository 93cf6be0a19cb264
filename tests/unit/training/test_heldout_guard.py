"""A held-out score that falls while the reward rises stops a run, and nothing else does."""

import math

import numpy as np
import pytest
from datasets import Dataset
from tiny_training import PROMPTS

from composer_replication import ComposerConfig, ComposerReplicationTrainer
from composer_replication.errors import TrainingError
from composer_replication.training.heldout_guard import heldout_fall

RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]


def log(rewards, scores, every=2, error=0.0):
    """A step a reward; after every other step an evaluation."""
    rows = []
    for step, reward in enumerate(rewards, 1):
        rows.append({"step": step, "loss": 0.0, "reward": reward})
        if step % every == 0:
            score = scores[step // every - 1]
            rows.append({"step": step, "eval_reward": score, "eval_reward_se": error})
    return rows


def test_a_fall_says_from_where_to_where_and_what_the_reward_did():
    fall = heldout_fall(log(RISING, [0.5, 0.4, 0.3, 0.2], error=0.05), 2, 0.1)
    assert fall is not None
    assert (fall.best_step, fall.last_step) == (4, 8)
    assert (fall.best, fall.last, fall.standard_error) == pytest.approx((0.45, 0.25, 0.05))
    assert (fall.reward_before, fall.reward_since) == pytest.approx((0.25, 0.65))


@pytest.mark.parametrize(
    ("rewards", "scores"),
    [
        pytest.param(RISING, [0.5, 0.5, 0.45, 0.41], id="within the drop"),
        pytest.param(RISING, [0.5, 0.5, 0.3, 0.45], id="it came back"),
        pytest.param(RISING, [0.2, 0.3, 0.5, 0.6], id="it rises"),
        pytest.param(RISING[::-1], [0.5, 0.5, 0.3, 0.2], id="the reward falls too"),
        pytest.param([0.5] * 8, [0.5, 0.5, 0.3, 0.2], id="the reward stands still"),
        pytest.param([0.1, 0.9, 0.4, 0.5, 0.1, 0.9, 0.5, 0.5], [0.5, 0.5, 0.3, 0.2], id="noise"),
        pytest.param(RISING[:6], [0.5, 0.2, 0.2], id="too few evaluations"),
        pytest.param([], [], id="nothing logged"),
    ],
)
def test_no_fall_is_seen_where_there_is_none(rewards, scores):
    assert heldout_fall(log(rewards, scores), 2, 0.1) is None


def test_a_fall_must_be_larger_than_its_noise():
    # From 0.5 to 0.2, one window to choose from: two standard errors of 0.15 are just enough.
    scores = [0.5, 0.5, 0.2, 0.2]
    assert heldout_fall(log(RISING, scores, error=0.149), 2, 0.1) is not None
    assert heldout_fall(log(RISING, scores, error=0.151), 2, 0.1) is None
    # The best of four windows has to stand out more: sqrt(2 ln 4) = 1.67 standard errors.
    rewards = [0.05 * step for step in range(14)]
    longer = [0.5, 0.5, 0.5, 0.5, 0.5, 0.2, 0.2]
    assert heldout_fall(log(rewards, longer, error=0.149), 2, 0.1) is None
    assert heldout_fall(log(rewards, longer, error=0.081), 2, 0.1) is not None
    assert heldout_fall(log(rewards, longer, error=0.082), 2, 0.1) is None


def test_evaluations_whose_noise_is_unknown_are_left_out():
    rows = log(RISING, [0.5, 0.4, 0.3, 0.2])
    for row in rows:
        row.pop("eval_reward_se", None)
    assert heldout_fall(rows, 2, 0.1) is None


def test_among_equal_scores_the_latest_is_the_best():
    fall = heldout_fall(log([*RISING, 0.9, 1.0], [0.5, 0.5, 0.5, 0.2, 0.2]), 2, 0.1)
    assert fall is not None
    assert fall.best_step == 6


def test_the_best_may_be_the_evaluation_before_training():
    rows = [{"step": 0, "eval_reward": 0.5, "eval_reward_se": 0.0}, *log(RISING[:4], [0.2, 0.1])]
    fall = heldout_fall(rows, 1, 0.1)
    assert fall is not None
    assert (fall.best_step, fall.last_step) == (0, 4)
    assert (fall.reward_before, fall.reward_since) == pytest.approx((0.15, 0.35))


def stopped_at(rng, num_prompts, rates, reward_at):
    """The evaluation at which a run of these success rates is stopped; None: it ends.

    After each come five steps of 16 rollouts; `reward_at(step)` is how many succeed.
    """
    rows = []
    for number, rate in enumerate(rates):
        score = rng.binomial(num_prompts, rate) / num_prompts
        error = math.sqrt(score * (1 - score) / (num_prompts - 1))
        step = 5 * number
        rows.append({"step": step, "eval_reward": score, "eval_reward_se": error})
        if heldout_fall(rows, 2, 0.1):
            return number
        for each in range(step + 1, step + 6):
            reward = rng.binomial(16, reward_at(each)) / 16
            rows.append({"step": each, "reward": reward})
    return None


@pytest.mark.parametrize("num_prompts", [8, 32, 128])
@pytest.mark.parametrize("rate", [0.5, 0.9])
@pytest.mark.parametrize("slope", [0.0, 0.005])
def test_under_5_percent_of_runs_whose_heldout_score_stands_still_are_stopped(
    num_prompts, rate, slope
):
    """30 evaluations; the training reward is level, or rises from 0.1 to 0.85."""
    rng = np.random.default_rng(0)
    num_stopped = sum(
        stopped_at(rng, num_prompts, [rate] * 30, lambda step: 0.1 + slope * step) is not None
        for _ in range(100)
    )
    assert num_stopped < 5


@pytest.mark.parametrize(("num_prompts", "after"), [(32, 0.05), (128, 0.25)])
def test_a_collapse_is_caught_within_four_evaluations(num_prompts, after):
    """From 0.5, at the 15th evaluation, when the training reward goes from 0.4 to 0.7."""
    rng = np.random.default_rng(0)
    rates = [0.5] * 15 + [after] * 15
    found = [
        stopped_at(rng, num_prompts, rates, lambda step: 0.7 if step > 70 else 0.4)
        for _ in range(100)
    ]
    assert sum(at is not None and 15 <= at < 19 for at in found) >= 95


def overfitting_run(tmp_path, tiny_llama, tokenizer, **changes):
    """Five steps; the training reward rises and that of two held-out prompts falls from step 2 on.

    The trainer plays one prompt after the other, a batch each.
    """
    calls = {"train": 0, "eval": 0}

    def reward(completion_ids, prompts, **columns):
        kind = "eval" if prompts[0][-1]["content"].startswith("Held") else "train"
        calls[kind] += 1
        value = 0.1 * calls["train"] if kind == "train" else 1.0 - 0.2 * ((calls["eval"] + 1) // 2)
        return [value + 0.001 * index for index in range(len(completion_ids))]

    values = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 4,
        "max_steps": 5,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    held = [{"prompt": [{"role": "user", "content": f"Held out {n}."}]} for n in range(2)]
    trainer = ComposerReplicationTrainer(
        model=tiny_llama(),
        reward_funcs=reward,
        args=ComposerConfig(**(values | changes)),
        train_dataset=Dataset.from_list(PROMPTS),
        eval_dataset=Dataset.from_list(held),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def test_a_real_run_is_stopped_and_told_its_last_good_checkpoint(
    tmp_path, tiny_llama, smollm2_tokenizer
):
    with pytest.raises(TrainingError) as stopped:
        overfitting_run(tmp_path, tiny_llama, smollm2_tokenizer)
    text = str(stopped.value)
    assert "Stopped at step 4 by guards.heldout_evaluations." in text
    assert "fell from 0.7" in text
    assert "at step 2 to" in text
    assert "The last good checkpoint is checkpoint-2." in text


def test_a_guard_that_is_off_lets_the_same_run_end(tmp_path, tiny_llama, smollm2_tokenizer):
    trainer = overfitting_run(
        tmp_path, tiny_llama, smollm2_tokenizer, guard_heldout_evaluations=0, save_strategy="no"
    )
    assert trainer.state.global_step == 5
