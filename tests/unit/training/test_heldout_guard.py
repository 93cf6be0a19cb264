"""A held-out score that falls while the reward rises stops a run, and nothing else does."""

import pytest
from datasets import Dataset
from tiny_training import PROMPTS

from composer_replication import ComposerConfig, ComposerReplicationTrainer
from composer_replication.errors import TrainingError
from composer_replication.training.heldout_guard import heldout_fall

RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def log(rewards, scores, every=2):
    """A step a reward; after every other step an evaluation."""
    rows = []
    for step, reward in enumerate(rewards, 1):
        rows.append({"step": step, "loss": 0.0, "reward": reward})
        if step % every == 0:
            rows.append({"step": step, "eval_reward": scores[step // every - 1]})
    return rows


def test_a_fall_says_from_where_to_where_and_what_the_reward_did():
    fall = heldout_fall(log(RISING, [0.5, 0.3, 0.2]), 2, 0.1)
    assert fall is not None
    assert (fall.best_step, fall.best, fall.last_step, fall.last) == (2, 0.5, 6, 0.2)
    # Two steps up to the best evaluation; of the four since, the last two.
    assert (fall.reward_before, fall.reward_since) == pytest.approx((0.15, 0.55))


@pytest.mark.parametrize(
    ("rewards", "scores"),
    [
        pytest.param(RISING, [0.5, 0.45, 0.41], id="within the drop"),
        pytest.param(RISING, [0.5, 0.3, 0.45], id="it came back"),
        pytest.param(RISING, [0.2, 0.3, 0.5], id="it rises"),
        pytest.param(RISING[::-1], [0.5, 0.3, 0.2], id="the reward falls too"),
        pytest.param(RISING[:4], [0.5, 0.2], id="too few evaluations"),
        pytest.param([], [], id="nothing logged"),
    ],
)
def test_no_fall_is_seen_where_there_is_none(rewards, scores):
    assert heldout_fall(log(rewards, scores), 2, 0.1) is None


def test_among_equal_scores_the_latest_is_the_best():
    rewards = [*RISING, 0.7, 0.8]
    fall = heldout_fall(log(rewards, [0.5, 0.5, 0.2, 0.2]), 2, 0.1)
    assert fall is not None
    assert fall.best_step == 4


def overfitting_run(tmp_path, tiny_llama, tokenizer, **changes):
    """Five steps; the training reward rises and the held-out one falls from step 2 on."""
    calls = {"train": 0, "eval": 0}

    def reward(completion_ids, prompts, **columns):
        kind = "eval" if prompts[0][-1]["content"].startswith("Held") else "train"
        calls[kind] += 1
        value = 0.1 * calls["train"] if kind == "train" else 1.0 - 0.2 * calls["eval"]
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
    held = [{"prompt": [{"role": "user", "content": "Held out."}]}]
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
    assert "Stopped at step 3 by guards.heldout_evaluations." in text
    assert "fell from 0.8" in text
    assert "at step 1 to" in text
    assert "The last good checkpoint is checkpoint-1." in text


def test_a_guard_that_is_off_lets_the_same_run_end(tmp_path, tiny_llama, smollm2_tokenizer):
    trainer = overfitting_run(
        tmp_path, tiny_llama, smollm2_tokenizer, guard_heldout_evaluations=0, save_strategy="no"
    )
    assert trainer.state.global_step == 5
