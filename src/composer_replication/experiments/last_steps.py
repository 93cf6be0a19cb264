"""Ends a smoke: after its steps or its time, with a checkpoint one step before the last."""

import time

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Under this many steps a median and a 95th percentile say little.
MIN_STEPS = 8


class LastSteps(TrainerCallback):
    """Asks for a checkpoint at the last step but one, and stops after the last.

    Attributes:
        saved_step: at which the checkpoint was asked for; None before.
    """

    def __init__(self, max_steps: int, *, budget_s: float | None = None) -> None:
        """Keep the limits.

        Args:
            max_steps: of the run, at least 2.
            budget_s: seconds for the steps; the last one is then chosen so that it fits, but not
                before step `MIN_STEPS`. None: all `max_steps`.
        """
        self.saved_step: int | None = None
        self._max_steps = max_steps
        self._budget_s = budget_s
        self._started_s = 0.0
        self._ends_s: list[float] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Forget an earlier run."""
        del args, state, control, kwargs
        self._ends_s = []

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Start the clock with the first step; the checks before it are not training."""
        del args, state, control, kwargs
        if not self._ends_s:
            self._started_s = time.perf_counter()
            self._ends_s = [self._started_s]

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Save where one more step ends the run, and stop after that step."""
        del args, kwargs
        self._ends_s.append(time.perf_counter())
        if self.saved_step is not None:
            control.should_training_stop = True
        elif state.global_step == self._max_steps - 1 or self._is_time_up(state.global_step):
            self.saved_step = state.global_step
            control.should_save = True

    def _is_time_up(self, step: int) -> bool:
        """Whether the budget holds one more step and not two, each as long as the longest."""
        if self._budget_s is None or step + 1 < MIN_STEPS:
            return False
        longest_s = max(b - a for a, b in zip(self._ends_s, self._ends_s[1:], strict=False))
        return self._ends_s[-1] - self._started_s + 2 * longest_s > self._budget_s
