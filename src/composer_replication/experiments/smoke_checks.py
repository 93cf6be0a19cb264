"""The smoke's checks on one trainer: watched from before its first step, judged after its last."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from composer_replication.experiments import gradient_rows, token_alignment
from composer_replication.experiments.channel_probe import Inputs, record_inputs, trainable
from composer_replication.experiments.live_channels import check_channels, own_gradients
from composer_replication.experiments.packed_check import check_packed
from composer_replication.experiments.start_checks import StartChecks
from composer_replication.experiments.trained_batches import TrainedBatches
from composer_replication.experiments.trl_parity import check_parity
from composer_replication.runs.summary import Check
from composer_replication.step.channels import CHANNELS
from composer_replication.traces.hints import HintSite
from composer_replication.training.metrics import MetricsRow
from composer_replication.training.trainer import ComposerReplicationTrainer


class SmokeChecks:
    """Attached to a trainer before `train()`; it changes nothing of the run.

    Attributes:
        seconds: spent on checks so far, before the first step and after the last.
    """

    def __init__(
        self, trainer: ComposerReplicationTrainer, asked: Mapping[str, float] | None = None
    ) -> None:
        """Keep what the start looks like.

        Args:
            trainer: not yet trained.
            asked: weights of the extra channels that the configuration turns on; None: the
                trainer's own.
        """
        self._trainer = trainer
        self._asked = asked
        self._start = StartChecks(trainer)
        self._batches = TrainedBatches(trainer)
        self._before = _fingerprint(trainer)
        self._judged_s = 0.0

    @property
    def seconds(self) -> float:
        """Of every check but the resume."""
        return self._start.seconds + self._judged_s

    def judge(self, rows: Sequence[MetricsRow]) -> list[Check]:
        """Every verdict that needs this trainer, after training.

        Args:
            rows: of every step.
        """
        started_s = time.perf_counter()
        trainer, batches = self._trainer, self._batches
        moved = _check_moved(trainer, self._before)
        assert batches.latest is not None
        parity, grpo = check_parity(trainer, batches.last.get("grpo", batches.latest).inputs)
        channels = check_channels(
            rows,
            trainer.channel_weights,
            {"grpo": grpo, **own_gradients(trainer, batches)},
            largest_advantage=batches.largest_advantage,
            alternates=trainer._composer_args.channel_schedule == "alternate",
            asked=self._asked,
        )
        rows_checks: list[Check] = []
        if "sdpo" in trainer.channel_weights:
            rows_checks = self._judge_rows()
        packed: list[Check] = []
        if trainer.packing.is_on:
            last = {name: batch.inputs for name, batch in batches.last.items()}
            packed = [check_packed(trainer, batches.latest.inputs, last)]
        self._judged_s = time.perf_counter() - started_s
        return [*channels, moved, *self._start.checks, *rows_checks, parity, *packed]

    def _judge_rows(self) -> list[Check]:
        inputs, sites = self._hinted_batch()
        if CHANNELS["sdpo"].count(inputs) == 0:
            cause = "The collator gives no action token for a hint site: no sdpo_student_index."
            names = (gradient_rows.NAME, token_alignment.NAME)
            return [Check(name, passed=False, value=0, bound="> 0", cause=cause) for name in names]
        return [
            gradient_rows.check_gradient_rows(self._trainer, inputs, sites),
            token_alignment.check_token_alignment(self._trainer, inputs, sites),
        ]

    def _hinted_batch(self) -> tuple[Inputs, Sequence[HintSite]]:
        """The last hint sites that were trained on; the run's own where none ever were."""
        batch = self._batches.last.get("sdpo")
        if batch is not None:
            return batch.inputs, batch.records.hint_sites
        sites = self._start.sites[:2]
        return record_inputs(self._trainer, sites), sites


def notes_on_checks(channel_weights: Mapping[str, float], *, asked_steps: int | None) -> list[str]:
    """What a reader must know about the checks that a run has, and those it has not.

    Args:
        channel_weights: of the extra channels that are on.
        asked_steps: `smoke.steps`.
    """
    notes: list[str] = []
    if asked_steps == 1:
        notes.append("smoke.steps is 1 and two steps are run: the resume check needs the second.")
    if "sdpo" not in channel_weights:
        notes.append("SDPO is off: hint_effect, gradient_rows and token_alignment are not checked.")
    if "dpo" not in channel_weights:
        notes.append("DPO is off: dpo_reference is not checked.")
    if not torch.cuda.is_available():
        notes.append("Activations are not measured on a CPU: activation_memory needs CUDA.")
    return notes


def _check_moved(trainer: ComposerReplicationTrainer, before: list[Tensor]) -> Check:
    moved_by = _distance(trainer, before)
    return Check(
        "parameters_moved",
        passed=0 < moved_by < float("inf"),
        value=moved_by,
        bound="> 0",
        cause=None
        if 0 < moved_by < float("inf")
        else "No weight changed, or one is not finite. Raise grpo.learning_rate, or check that "
        "some reward varies.",
    )


@torch.no_grad()
def _fingerprint(trainer: ComposerReplicationTrainer) -> list[Tensor]:
    """A slice of every trainable parameter, to see later that it moved."""
    parameters = trainable(trainer).values()
    return [parameter.detach().reshape(-1)[:4096].clone() for parameter in parameters]


@torch.no_grad()
def _distance(trainer: ComposerReplicationTrainer, before: list[Tensor]) -> float:
    after = _fingerprint(trainer)
    return max(
        float((new.to(old.device) - old).abs().nan_to_num(nan=float("inf")).max())
        for new, old in zip(after, before, strict=True)
        if old.numel()
    )
