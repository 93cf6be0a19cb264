"""Evaluations on held-out prompts while a run trains: between two steps, nothing of it changed.

The first is before any step and the last after all of them. Each becomes a row of `heldout.jsonl`
and, as `eval_reward` and `eval_success`, of the log that trackers and `guards.heldout_evaluations`
read.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from composer_replication.experiments.evaluate import evaluate
from composer_replication.experiments.evaluation_data import EvaluationData
from composer_replication.runs.step_rows import StepRow
from composer_replication.runs.summary import HeldoutScores
from composer_replication.training.metrics import StepClock
from composer_replication.training.trainer import ComposerReplicationTrainer

Say = Callable[[str], None]


class HeldoutEvaluation(TrainerCallback):
    """Plays the held-out prompts greedily every few steps.

    Give it to the trainer before the callbacks that time steps, and set `trainer` afterwards.
    """

    def __init__(
        self,
        data: EvaluationData,
        tokenizer: PreTrainedTokenizerBase,
        *,
        every_steps: int,
        num_prompts: int,
        write: Callable[[Mapping[str, object]], None],
        say: Say,
        earlier_rows: Sequence[StepRow] = (),
        from_start: bool = True,
    ) -> None:
        """Keep what is played.

        Args:
            data: the held-out episodes.
            tokenizer: of the policy.
            every_steps: optimizer steps between two evaluations, at least 1.
            num_prompts: the first so many prompts are played.
            write: receives each row.
            say: receives a sentence about each.
            earlier_rows: of the run that is resumed; what they hold is not played again.
            from_start: play before the first step as well.
        """
        self._data, self._tokenizer = data, tokenizer
        self._prompts = data.prompts[:num_prompts]
        self._every_steps = every_steps
        self._write, self._say = write, say
        self._earlier = {cast(int, row["step"]): row for row in earlier_rows}
        # Where it was played last.
        self._last_step = -1 if from_start else 0
        self.trainer: ComposerReplicationTrainer | None = None
        """Whose log gets the figures, and whose clock the seconds as `evaluate`."""

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Play where the finished steps are a multiple of `every_steps`."""
        del control, kwargs
        if state.global_step % self._every_steps == 0:
            self._play(args, state, model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Play once more after the last step."""
        del control, kwargs
        self._play(args, state, model)

    def _play(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> None:
        # With gradient accumulation a step begins once for each of its micro-batches.
        if state.global_step == self._last_step or model is None:
            return
        self._last_step = state.global_step
        row = self._earlier.get(state.global_step)
        if row is None:
            row = self._row(args, state, model)
            if state.is_world_process_zero:
                self._write(row)
                self._say(_sentence(row))
        if self.trainer is not None:
            # Not TRL's own log, which would empty the figures that the next step's row collects.
            logs = {"eval_reward": _number(row, "reward"), "eval_success": _number(row, "success")}
            if row.get("reward_se") is not None:
                logs["eval_reward_se"] = _number(row, "reward_se")
            Trainer.log(self.trainer, logs)

    def _row(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> StepRow:
        clock = StepClock(args.device) if self.trainer is None else self.trainer.clock
        clock.start("evaluate")
        result = evaluate(
            model,
            self._tokenizer,
            self._data.task,
            self._prompts,
            decoding="greedy",
            reward=self._data.reward,
            max_turns=self._data.max_turns,
            max_action_tokens=self._data.max_action_tokens,
            step_timeout_s=self._data.step_timeout_s,
            max_concurrency=self._data.max_concurrency,
            is_bf16=bool(args.bf16),
        )
        seconds = clock.stop("evaluate")
        return {
            "step": state.global_step,
            "success": result.success.rate,
            "low": result.success.low,
            "high": result.success.high,
            "reward": result.mean_reward,
            "reward_se": result.reward_standard_error,
            "num_prompts": len(self._prompts),
            "num_failed": result.num_failed,
            "seconds": round(seconds, 2),
        }


def heldout_scores(rows: Sequence[StepRow]) -> HeldoutScores | None:
    """What `summary.json` keeps of the rows of `heldout.jsonl`; None: there are none."""
    if not rows:
        return None
    best = max(rows, key=lambda row: _number(row, "success"))
    return HeldoutScores(
        first=_number(rows[0], "success"),
        last=_number(rows[-1], "success"),
        best=_number(best, "success"),
        best_step=cast(int, best["step"]),
        num_prompts=cast(int, rows[-1]["num_prompts"]),
    )


def _sentence(row: StepRow) -> str:
    success, low, high = (_number(row, name) for name in ("success", "low", "high"))
    return (
        f"held-out success {success:.0%} [{low:.0%}, {high:.0%}], "
        f"reward {_number(row, 'reward'):.3f}, after step {row['step']}"
    )


def _number(row: StepRow, name: str) -> float:
    return cast(float, row[name])
