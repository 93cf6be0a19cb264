"""Stops a run whose held-out score falls while its training reward rises: it learns the reward.

The score is the `eval_reward` that TRL logs for its `eval_dataset`, so any held-out prompts and
reward functions serve. All is read from the log, which every checkpoint holds. Scores are means
over a few prompts, so that a run whose policy stands still has high and low ones: a fall and a rise
count when they are larger than that noise.
"""

import math
import statistics
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from composer_replication.errors import TrainingError
from composer_replication.runs.checkpoint_folders import checkpoint_folders, checkpoint_step
from composer_replication.training.composer_config import ComposerConfig

NUM_STANDARD_ERRORS = 2.0
"""A fall, and the rise of the training reward, must be as many of their standard errors."""

LogRow = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class HeldoutFall:
    """What was seen when the held-out score fell.

    Example: `HeldoutFall(best_step=20, best=0.6, last_step=40, last=0.3, ...)`.
    """

    best_step: int
    """Of the last of the best evaluations in a row."""
    best: float
    """Their mean."""
    last_step: int
    last: float
    """The mean of as many evaluations, the latest."""
    standard_error: float
    """Of the fall."""
    reward_before: float
    """Mean training reward over the steps up to `best_step`; of the first half of all steps where
    there are none."""
    reward_since: float
    """Mean training reward over as many of the last steps."""

    def explain(self, output_dir: Path) -> str:
        """What it shows, what to change, and the checkpoint to go back to."""
        return (
            f"The held-out reward fell from {self.best:.3g} at step {self.best_step} to "
            f"{self.last:.3g} (standard error {self.standard_error:.2g}) while the training reward "
            f"rose from {self.reward_before:.3g} to "
            f"{self.reward_since:.3g}: the policy learns what the training prompts or the reward "
            "let pass, not the task. Look at the latest rollouts for what is rewarded there, add "
            "prompts, or lower grpo.learning_rate. "
            f"{last_good_checkpoint(output_dir, self.best_step)}"
        )


class HeldoutGuard(TrainerCallback):
    """Looks at every evaluation; raises where the log shows a `HeldoutFall`."""

    def __init__(self, args: ComposerConfig, eval_metrics: Mapping[str, Sequence[float]]) -> None:
        """Keep what counts as a fall.

        Args:
            args: `guard_enabled`, `guard_heldout_evaluations`, `guard_heldout_drop`.
            eval_metrics: TRL's figures of the batches of the evaluation that is being logged.
        """
        is_on = args.guard_enabled
        self._num_evaluations = int(args.guard_heldout_evaluations or 0) if is_on else 0
        self._drop = args.guard_heldout_drop
        self._eval_metrics = eval_metrics

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Look at the evaluation that was just logged and at those before it."""
        del control, kwargs
        if not self._num_evaluations or logs is None or "eval_reward" not in logs:
            return
        self._add_standard_error(state.log_history[-1])
        fall = heldout_fall(state.log_history, self._num_evaluations, self._drop)
        if fall is not None:
            raise TrainingError(
                f"Stopped at step {state.global_step} by guards.heldout_evaluations. "
                f"{fall.explain(Path(str(args.output_dir)))} To go on regardless set "
                "guards.heldout_evaluations = 0 (in Python guard_heldout_evaluations = 0)."
            )

    def _add_standard_error(self, row: MutableMapping[str, float]) -> None:
        """Of TRL's own evaluation, from how its batches differ."""
        rewards = [r for r in self._eval_metrics.get("reward", ()) if not math.isnan(r)]
        if len(rewards) > 1:
            row.setdefault("eval_reward_se", statistics.stdev(rewards) / math.sqrt(len(rewards)))


def heldout_fall(rows: Sequence[LogRow], num_evaluations: int, drop: float) -> HeldoutFall | None:
    """The fall that the log shows; None where the last evaluations are no such case.

    The last `num_evaluations` are compared with the best as many in a row before them. Each must be
    lower by `drop`, and their mean by sqrt(2 ln n) + 2 standard errors, where the best was chosen
    from n: the best of n equal ones stands out by nearly sqrt(2 ln n). The training reward must
    have risen by 2 standard errors.

    Args:
        rows: of the log, in order; steps have `reward`, evaluations `eval_reward` and its standard
            error `eval_reward_se`. One without, made on a single batch or prompt, is left out.
        num_evaluations: how many in a row, at least 1.
        drop: of the reward.
    """
    scores = [row for row in rows if "eval_reward_se" in row]
    earlier, latest = scores[:-num_evaluations], scores[-num_evaluations:]
    windows = [
        earlier[start : start + num_evaluations]
        for start in range(len(earlier) - num_evaluations + 1)
    ]
    if not windows:
        return None
    best_rows = max(reversed(windows), key=_score)
    best, last = _score(best_rows), _score(latest)
    variance = statistics.fmean(_number(row, "eval_reward_se") ** 2 for row in scores)
    standard_error = math.sqrt(2 * variance / num_evaluations)
    needed = (NUM_STANDARD_ERRORS + math.sqrt(2 * math.log(len(windows)))) * standard_error
    if best - last < needed or any(_number(row, "eval_reward") > best - drop for row in latest):
        return None
    best_step = _step(best_rows[-1])
    rise = _reward_rise(rows, best_step)
    if rise is None:
        return None
    return HeldoutFall(best_step, best, _step(latest[-1]), last, standard_error, *rise)


def _reward_rise(rows: Sequence[LogRow], best_step: int) -> tuple[float, float] | None:
    """The training reward before and after, where it rose by more than its steps vary."""
    rewards = [(_step(row), _number(row, "reward")) for row in rows if "reward" in row]
    before = [reward for step, reward in rewards if step <= best_step]
    since = [reward for step, reward in rewards if step > best_step]
    if not before:
        # The best evaluation was the one before training: its first half is what it rose from.
        before, since = since[: len(since) // 2], since[len(since) // 2 :]
    size = min(len(before), len(since))
    # How much steps vary cannot be seen in one.
    if size < 2:
        return None
    before, since = before[-size:], since[-size:]
    means = statistics.fmean(before), statistics.fmean(since)
    variance = (statistics.variance(before) + statistics.variance(since)) / size
    rise = means[1] - means[0]
    is_risen = rise > 0 and rise >= NUM_STANDARD_ERRORS * math.sqrt(variance)
    return means if is_risen else None


def _score(rows: Sequence[LogRow]) -> float:
    return statistics.fmean(_number(row, "eval_reward") for row in rows)


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
