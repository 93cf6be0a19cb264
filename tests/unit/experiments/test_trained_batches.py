"""Which rollouts of a micro-batch the checks after training look at."""

import torch

from composer_replication.experiments.trained_batches import few_rows

PROMPTS = torch.tensor([[5, 6], [5, 6], [0, 6], [0, 6], [0, 6]])
MASK = torch.tensor([[1, 1], [1, 1], [0, 1], [0, 1], [0, 1]])


def micro_batch(*advantages):
    size = len(advantages)
    return {
        "prompt_ids": PROMPTS[:size],
        "prompt_mask": MASK[:size],
        "completion_ids": torch.arange(size)[:, None],
        "advantages": torch.tensor(advantages),
        "sdpo_step_count": torch.tensor(3),
    }


def rows(inputs):
    return inputs["completion_ids"][:, 0].tolist()


def test_the_largest_advantages_are_kept_in_order_and_nothing_else_is_cut():
    few = few_rows(micro_batch(0.5, -2.0, 0.0, 0.1, 1.0), 2)
    assert rows(few) == [1, 4]
    assert few["advantages"].tolist() == [-2.0, 1.0]
    assert few["sdpo_step_count"] == 3


def test_advantages_of_each_token_count_by_their_largest():
    inputs = micro_batch(0.0, 0.0, 0.0)
    inputs["advantages"] = torch.tensor([[0.0, 0.2], [-0.9, 0.0], [0.1, 0.1]])
    assert rows(few_rows(inputs, 2)) == [0, 1]


def test_rollouts_of_one_prompt_come_before_larger_advantages_of_others():
    inputs = micro_batch(0.5, -2.0, 0.0, 0.1, 1.0)
    assert rows(few_rows(inputs, 2, prefers_one_prompt=True)) == [0, 1]
    # Too few of that prompt: then the largest of the others.
    assert rows(few_rows(inputs, 3, prefers_one_prompt=True)) == [0, 1, 4]
    # The same ids under another mask are another prompt.
    inputs["prompt_ids"] = torch.full_like(inputs["prompt_ids"], 6)
    assert rows(few_rows(inputs, 2, prefers_one_prompt=True)) == [0, 1]


def test_without_any_advantage_the_first_prompt_is_taken():
    assert rows(few_rows(micro_batch(0.0, 0.0, 0.0, 0.0), 2, prefers_one_prompt=True)) == [0, 1]
