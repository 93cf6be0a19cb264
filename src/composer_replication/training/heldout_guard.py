"""Stops a run whose held-out score falls while its training reward rises: it learns the reward.

The score is the `eval_reward` that TRL logs for its `eval_dataset`, so any held-out prompts and
reward functions serve. All is read from the log, which every checkpoint holds.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from composer_replication.runs.checkpoint_folders import checkpoint_folders, checkpoint_step

LogRow = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class HeldoutFall:
    """What was seen when the held-out score fell.

    Example: `HeldoutFall(best_step=20, best=0.6, last_step=40, last=0.3, ...)`.
    """

    best_step: int
    best: float
    last_step: int
    last: float
    reward_before: float
    """Mean training reward over the steps up to the best evaluation; of the first half of all steps
    where that was the one before them."""
    reward_since: float
    """Mean training reward over as many of the last steps."""

    def explain(self, output_dir: Path) -> str:
        """What it shows, what to change, and the checkpoint to go back to."""
        return (
            f"The held-out reward fell from {self.best:.3g} at step {self.best_step} to "
            f"{self.last:.3g} while the training reward rose from {self.reward_before:.3g} to "
            f"{self.reward_since:.3g}: the policy learns what the training prompts or the reward "
            "let pass, not the task. Look at the latest rollouts for what is rewarded there, add "
            "prompts, or lower grpo.learning_rate. "
            f"{last_good_checkpoint(output_dir, self.best_step)}"
        )


def heldout_fall(rows: Sequence[LogRow], num_evaluations: int, drop: float) -> HeldoutFall | None:
    """The fall that the log shows; None where the last evaluations are no such case.

    Args:
        rows: of the log, in order; evaluations have `eval_reward`, steps have `reward`.
        num_evaluations: the last so many must all be under the best one by `drop`.
        drop: of the reward.
    """
    scores = [(_step(row), _number(row, "eval_reward")) for row in rows if "eval_reward" in row]
    if len(scores) <= num_evaluations:
        return None
    best_step, best = max(reversed(scores), key=lambda score: score[1])
    latest = scores[-num_evaluations:]
    if any(step <= best_step or score > best - drop for step, score in latest):
        return None
    rewards = [(_step(row), _number(row, "reward")) for row in rows if "reward" in row]
    before = [reward for step, reward in rewards if step <= best_step]
    since = [reward for step, reward in rewards if step > best_step]
    if not before:
        # The best evaluation was the one before training: its first half is what it rose from.
        before, since = since[: len(since) // 2], since[len(since) // 2 :]
    size = min(len(before), len(since))
    if size == 0:
        return None
    means = statistics.fmean(before[-size:]), statistics.fmean(since[-size:])
    if means[1] <= means[0]:
        return None
    return HeldoutFall(best_step, best, *latest[-1], *means)


def last_good_checkpoint(output_dir: Path, best_step: int) -> str:
    """A sentence that names the newest checkpoint which is not past the best evaluation."""
    good = [
        folder for folder in checkpoint_folders(output_dir) if checkpoint_step(folder) <= best_step
    ]
    if not good:
        return f"There is no checkpoint from step {best_step} or before."
    return f"The last good checkpoint is {max(good, key=checkpoint_step).name}."


def _number(row: LogRow, name: str) -> float:
    value = row[name]
    assert isinstance(value, int | float)
    return float(value)


def _step(row: LogRow) -> int:
    step = row["step"]
    assert isinstance(step, int)
    return step
