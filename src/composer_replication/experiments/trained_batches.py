"""The micro-batches that training really trained on, with the records they were made from.

A check that made its own batch would prove something about that batch. These are the tensors of the
run, and beside them the hint sites, whose own token ids say where an action is.
"""

from collections import deque
from dataclasses import dataclass

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from composer_replication.batch.batches import StepBatch
from composer_replication.batch.collate import ComposerDataCollator, StepTensors
from composer_replication.experiments.channel_probe import Inputs
from composer_replication.step.channels import CHANNELS
from composer_replication.training.trainer import ComposerReplicationTrainer

# Micro-batches of one generation at most; they are token ids, so a thousand are small.
_REMEMBERED = 1024


@dataclass(frozen=True, slots=True)
class TrainedBatch:
    """One micro-batch as `_compute_loss` got it."""

    inputs: Inputs
    records: StepBatch
    """Hint sites and pairs of `inputs`, in the order of its rows."""


class TrainedBatches(TrainerCallback):
    """Keeps, for each channel, the last micro-batch that it could train on.

    Attributes:
        last: by channel name; for `grpo` one whose advantages differ from 0.
        latest: of the whole run, whatever it holds.
        largest_advantage: over all micro-batches, in absolute value.
    """

    def __init__(self, trainer: ComposerReplicationTrainer) -> None:
        self._trainer = trainer
        self.last: dict[str, TrainedBatch] = {}
        self.latest: TrainedBatch | None = None
        self.largest_advantage = 0.0
        self._watch = _WatchedCollator(trainer.collator)
        trainer.collator = self._watch
        trainer.add_callback(self)

    def on_substep_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Keep a micro-batch within an accumulation."""
        del args, state, control, kwargs
        self._keep()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Keep the last micro-batch of a step."""
        del args, state, control, kwargs
        self._keep()

    def _keep(self) -> None:
        trainer = self._trainer
        buffered, plan = trainer._buffered_inputs, trainer._plan
        assert buffered is not None
        # TRL has counted the micro-batch by the time the callbacks run.
        index = trainer._step - 1
        inputs: Inputs = dict(buffered[index % len(buffered)])
        records = StepBatch()
        if plan:
            inputs |= plan[index % len(plan)].inputs(trainer.accelerator.device)
            records = self._watch.records_of(plan[index % len(plan)].tensors)
        advantage = float(inputs["advantages"].abs().max())
        self.largest_advantage = max(self.largest_advantage, advantage)
        self.latest = batch = TrainedBatch(inputs, records)
        if advantage > 0:
            self.last["grpo"] = batch
        for name in trainer.channel_weights:
            if CHANNELS[name].count(inputs) > 0:
                self.last[name] = batch


class _WatchedCollator(ComposerDataCollator):
    """The trainer's own collator, remembering the records of its latest calls."""

    def __init__(self, collator: ComposerDataCollator) -> None:
        vars(self).update(vars(collator))
        self._collate = collator
        self._seen: deque[tuple[StepTensors, StepBatch]] = deque(maxlen=_REMEMBERED)

    def __call__(self, batch: StepBatch) -> StepTensors:
        tensors = self._collate(batch)
        self._seen.append((tensors, batch))
        return tensors

    def records_of(self, tensors: StepTensors) -> StepBatch:
        """What these very tensors were made from."""
        return next(batch for made, batch in self._seen if made is tensors)


def few_rows(inputs: Inputs, num_rows: int, *, prefers_one_prompt: bool = False) -> Inputs:
    """Rollouts of a micro-batch cut to rows of the largest advantages; all else as it is.

    Args:
        inputs: the micro-batch.
        num_rows: at most.
        prefers_one_prompt: first rollouts of the prompt whose advantage is the largest.

    Example: `few_rows(inputs, 2)["prompt_ids"].shape[0]` -> 2.
    """
    size = len(inputs["prompt_ids"])
    advantages = inputs["advantages"].abs().reshape(size, -1).amax(dim=1)
    if prefers_one_prompt:
        prompts = torch.cat([inputs["prompt_ids"], inputs["prompt_mask"]], dim=1)
        is_other = (prompts != prompts[advantages.argmax()]).any(dim=1)
        advantages = advantages - is_other * (advantages.max() + 1)
    rows = torch.topk(advantages, min(num_rows, size)).indices.sort().values
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages",
             "tool_mask", "old_per_token_logps", "ref_per_token_logps",
             "sampling_per_token_logps", "importance_sampling_ratio")  # fmt: skip
    return {
        name: tensor.index_select(0, rows) if name in names else tensor
        for name, tensor in inputs.items()
    }
