"""How much of a completion repeats itself, counted by hand."""

import pytest
import torch
from tiny_training import run

from composer_replication.training.repetition import mean_repetition, repeated_share


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([[1, 2, 3, 4, 5, 6, 7]], 0.0),
        ([[1, 2, 1, 2, 1, 2, 1, 2]], 3 / 5),  # 1212, 2121, and three of them again
        ([[7] * 10], 6 / 7),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], 0.0),  # two turns may say the same
        ([[7] * 5, [1, 2, 3, 4, 5]], 1 / 4),
        ([[7, 7, 7], []], 0.0),
        ([], 0.0),
    ],
)
def test_a_share_counts_what_the_same_turn_had_said(spans, share):
    assert repeated_share(spans) == share


def test_padding_and_what_an_environment_wrote_do_not_count():
    ids = torch.tensor([[7] * 10, [1, 2, 3, 4, 9, 9, 1, 2, 3, 4]])
    mask = torch.tensor([[1] * 10, [1] * 10])
    sampled = torch.tensor([[1] * 10, [1, 1, 1, 1, 0, 0, 1, 1, 1, 1]])
    both = {"completion_ids": ids, "completion_mask": mask, "tool_mask": sampled}
    assert mean_repetition(both) == (6 / 7 + 0) / 2
    padded = {"completion_ids": ids, "completion_mask": torch.tensor([[1] * 5 + [0] * 5, [0] * 10])}
    assert mean_repetition(padded) == (1 / 2 + 0) / 2
    assert mean_repetition({**padded, "completion_mask": torch.zeros(2, 10)}) == 0


def test_every_generation_logs_it(build):
    rows = run(build())
    assert rows
    assert all(0 <= row["completions/repetition"] <= 1 for row in rows)
