"""What is measured at chosen steps beside training: channel gradients and credit files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from composer_replication.errors import ConfigError
from composer_replication.runs.credit_files import CreditRow, write_credit
from composer_replication.training.channel_credit import (
    dpo_rows,
    grpo_rows,
    recorded_policy_logp,
    sdpo_rows,
)
from composer_replication.training.channel_gradients import ChannelGradients
from composer_replication.training.composer_config import ComposerConfig
from composer_replication.training.teacher import Teacher
from composer_replication.training.trl_hooks import GRPOTrainer


class StepDiagnostics(TrainerCallback):
    """Measures the steps that `gradients_every` and `credit_every` choose, and nothing outside.

    The trainer wraps TRL's loss in `watching` and calls `measure` once a micro-batch; the hooks of
    the training loop say which step it is.
    """

    def __init__(
        self, args: ComposerConfig, accelerator: Accelerator, weights: Mapping[str, float]
    ) -> None:
        """Refuse what cannot be measured.

        Args:
            args: which steps, and where credit files go.
            accelerator: of the trainer.
            weights: of the extra channels; GRPO's is 1.

        Raises:
            ConfigError: this run's precision, sharding or checkpointing allows no measurement.
        """
        self._args = args
        self._accelerator = accelerator
        self._weights = {"grpo": 1.0, **weights}
        self._gradients: ChannelGradients | None = None
        if args.gradients_every:
            self._gradients = ChannelGradients(accelerator, is_reentrant=_is_reentrant(args))
        if args.credit_every:
            _check_credit(accelerator)
        self._step: int | None = None
        self._policy_logp: list[Tensor] = []
        self._rows: list[CreditRow] = []

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """A step begins; forwards outside of steps are nobody's."""
        del args, control, kwargs
        self._step = state.global_step + 1
        self._rows = []

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """The step is over."""
        del args, state, control, kwargs
        self._step = None

    @contextmanager
    def watching(self, trainer: GRPOTrainer) -> Iterator[None]:
        """Keeps what TRL's loss computes and drops, where this step's credit is asked for."""
        if not self._is_chosen(self._args.credit_every):
            yield
            return
        with recorded_policy_logp(trainer) as self._policy_logp:
            yield

    def measure(
        self,
        trainer: GRPOTrainer,
        model: nn.Module,
        losses: Mapping[str, Tensor],
        inputs: dict[str, Tensor],
        teacher: Teacher | None,
    ) -> None:
        """Measure one micro-batch of a chosen step; log and write with the step's last one.

        Args:
            trainer: gets the figures among its metrics.
            model: the policy as the step runs it.
            losses: each live channel's unweighted loss of this rank and micro-batch.
            inputs: of the micro-batch.
            teacher: of SDPO.
        """
        is_last = self._accelerator.sync_gradients
        if self._gradients is not None and self._is_chosen(self._args.gradients_every):
            weighted = {name: self._weights[name] * loss for name, loss in losses.items()}
            self._gradients.add(model, weighted)
            if is_last:
                for name, value in self._gradients.take_figures().items():
                    trainer._metrics["train"][name].append(value)
        if self._is_chosen(self._args.credit_every):
            self._rows += self._credit(trainer, losses, inputs, teacher)
            if is_last:
                self._write()

    def _is_chosen(self, every: int | None) -> bool:
        return bool(every) and self._step is not None and self._step % every == 0

    def _credit(
        self,
        trainer: GRPOTrainer,
        losses: Mapping[str, Tensor],
        inputs: dict[str, Tensor],
        teacher: Teacher | None,
    ) -> list[CreditRow]:
        assert self._step is not None
        # Kept any longer, it would hold the graph of this micro-batch.
        policy_logp = self._policy_logp.pop()
        tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
        policy = cast(nn.Module, trainer.model)
        settings = self._args.step_settings()
        num_ranks = self._accelerator.num_processes
        rows: list[CreditRow] = []
        rows += grpo_rows(
            losses["grpo"], policy_logp, inputs, tokenizer, step=self._step, num_ranks=num_ranks
        )
        weights = {
            name: self._weights[name] / max(float(inputs[f"{name}_step_count"]), 1.0)
            for name in losses
            if name != "grpo"
        }
        with self._accelerator.autocast():
            if "sdpo" in weights and "sdpo_student_index" in inputs:
                rows += sdpo_rows(
                    policy,
                    inputs,
                    settings.sdpo,
                    None if teacher is None else teacher.open,
                    tokenizer,
                    step=self._step,
                    loss_weight=weights["sdpo"],
                )
            if "dpo" in weights and "dpo_pair_weights" in inputs:
                rows += dpo_rows(
                    policy,
                    inputs,
                    settings,
                    tokenizer,
                    step=self._step,
                    loss_weight=weights["dpo"],
                )
        return rows

    def _write(self) -> None:
        assert self._step is not None
        rows = cast(list[CreditRow], gather_object(self._rows))
        # People read channel by channel; micro-batches and ranks mean nothing to them.
        rows.sort(key=lambda row: list(self._weights).index(row["channel"]))
        if self._accelerator.is_main_process:
            folder = Path(self._args.credit_dir or Path(str(self._args.output_dir)) / "credit")
            write_credit(folder, self._step, rows)
        self._rows = []


def _is_reentrant(args: ComposerConfig) -> bool:
    """Whether a backward recomputes activations by running one of its own."""
    kwargs = cast(dict[str, object] | None, args.gradient_checkpointing_kwargs)
    # transformers takes the other kind; torch, given any keywords without this one, takes this.
    return bool(args.gradient_checkpointing and kwargs and kwargs.get("use_reentrant", True))


def _check_credit(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ConfigError(
            f"diagnostics.credit_every is set and the run is distributed by {kind.value}, where "
            "all processes must run every forward together, while credit scores each process's "
            "own rows. Use one process or DDP, or set diagnostics.credit_every = 0."
        )
