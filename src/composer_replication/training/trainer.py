"""`ComposerReplicationTrainer`: TRL's GRPOTrainer with SDPO and trace-replay DPO in the same step.

GRPO keeps TRL's own loss and normalisation. Each further channel is divided by its count over the
whole optimizer step: a rank's loss is sum * num_processes / global count, since DDP averages over
ranks and TRL does not divide by gradient accumulation for us. Trace-replay DPO is this project's
own addition to the published recipe.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from composer_replication.batch.collate import ComposerDataCollator
from composer_replication.errors import ConfigError, TrainingError
from composer_replication.runs.rollout_files import write_rollouts
from composer_replication.step.channels import CHANNELS, ChannelSum
from composer_replication.step.optimizer_step import channel_sums
from composer_replication.traces.hints import HintSite
from composer_replication.traces.pairs import PreferencePair
from composer_replication.training.channel_plan import MicroBatch, plan_step, scheduled
from composer_replication.training.channel_weights import channel_weights
from composer_replication.training.composer_config import ComposerConfig
from composer_replication.training.metrics import StepClock
from composer_replication.training.record_loader import RecordLoader, hint_sites_from, pairs_from
from composer_replication.training.references import with_references
from composer_replication.training.resume_state import load_composer_state, save_composer_state
from composer_replication.training.rewards import RewardFunction, environment_reward
from composer_replication.training.rollout_log import rollout_rows
from composer_replication.training.rollouts import EnvironmentRollouts
from composer_replication.training.site_sampling import sample_site_actions
from composer_replication.training.teacher import (
    PolicyTeacher,
    Teacher,
    TeacherCallback,
    make_teacher,
)
from composer_replication.training.trl_hooks import GRPOConfig, GRPOTrainer

Inputs = dict[str, Tensor]


class ComposerReplicationTrainer(GRPOTrainer):
    """GRPO + alpha_sdpo * SDPO + beta_replay * DPO on top of TRL.

    Example: a TRL script with the class changed and two arguments added:
        >>> trainer = ComposerReplicationTrainer(
        ...     model=model, reward_funcs=reward, args=GRPOConfig(...), train_dataset=prompts,
        ...     hint_sites=load_hint_sites("data"), pairs=load_pairs("data"),
        ... )
    """

    def __init__(
        self,
        model: object,
        reward_funcs: RewardFunction | list[RewardFunction] | None = None,
        args: GRPOConfig | None = None,
        *positional: object,
        hint_sites: Sequence[HintSite | Mapping[str, object]] | None = None,
        pairs: Sequence[PreferencePair | Mapping[str, object]] | None = None,
        **keywords: object,
    ) -> None:
        """Set TRL up, then the extra channels.

        Args:
            model: as `GRPOTrainer` takes it.
            reward_funcs: as `GRPOTrainer` takes them; None with `EnvironmentRollouts`: its reward.
            args: a `ComposerConfig`, or a `GRPOConfig`, which keeps its values.
            positional: the further arguments of `GRPOTrainer`, in its order.
            hint_sites: records or dataset rows; their actions are sampled anew from the policy.
            pairs: records or dataset rows; scored once under the starting weights.
            keywords: the further arguments of `GRPOTrainer`.

        Raises:
            ConfigError: a channel with a weight above 0 that could never have data, or settings
                that cannot work together.
            DataError: a record that cannot be used.
        """
        args = args or ComposerConfig(output_dir="composer-replication")
        if not isinstance(args, ComposerConfig):
            args = ComposerConfig.from_grpo_config(args)
        sites = None if hint_sites is None else hint_sites_from(hint_sites)
        preferences = None if pairs is None else pairs_from(pairs)
        rollouts = keywords.get("rollout_func")
        has_error_turns = isinstance(rollouts, EnvironmentRollouts)
        if reward_funcs is None and has_error_turns:
            reward_funcs = environment_reward
        weights = channel_weights(
            args,
            has_hint_sites=sites is not None or has_error_turns,
            has_pairs=preferences is not None,
        )
        super().__init__(model, reward_funcs, args, *positional, **keywords)  # pyright: ignore[reportArgumentType]
        self.channel_weights = weights
        self.clock = StepClock(self.accelerator.device)
        self._plan: list[MicroBatch] = []
        self._channel_totals: dict[str, float] = {}
        self._set_up_channels(sites, preferences)

    def _set_up_channels(
        self, sites: list[HintSite] | None, pairs: list[PreferencePair] | None
    ) -> None:
        args = self._composer_args
        self.collator = ComposerDataCollator(
            cast(PreTrainedTokenizerBase, self.processing_class),
            hint_placement=args.hint_placement,
            max_length=args.max_context_tokens,
            truncation=args.truncation,
        )
        self.step_settings = args.step_settings()
        self.teacher: Teacher | None = None
        self._site_loader: RecordLoader[HintSite] | None = None
        self._pair_loader: RecordLoader[PreferencePair] | None = None
        data = {CHANNELS[name].data for name in self.channel_weights}
        if not data:
            return
        self._check_accumulation()
        policy = cast(nn.Module, self.model)
        if "hint_sites" in data:
            self.teacher = make_teacher(
                args.teacher,
                policy,
                self._autocast,
                ema_rate=args.teacher_ema_rate,
                has_adapters=self._has_adapters,
            )
            self.add_callback(TeacherCallback(self.teacher))
            if sites is not None:
                self._site_loader = RecordLoader(sites, args.seed)
        if "pairs" in data and pairs is not None:
            self._pair_loader = RecordLoader(self._score_references(pairs), args.seed)

    def _score_references(self, pairs: list[PreferencePair]) -> list[PreferencePair]:
        args = self._composer_args
        cache = args.reference_cache_dir or str(Path(str(args.output_dir)) / "reference_logps")
        policy = cast(nn.Module, self.model)
        reference = PolicyTeacher(policy, self._autocast, without_adapters=self._has_adapters)
        # Same rows at a time as in training: a batch of another size moves the last digits.
        scored, _ = with_references(
            pairs,
            reference,
            policy,
            self.collator,
            precision=f"{self.accelerator.mixed_precision}/{policy.dtype}",
            batch_size=args.pairs_per_step,
            cache_dir=Path(cache),
        )
        return scored

    def _check_accumulation(self) -> None:
        per_generation = int(self._composer_args.steps_per_generation or 1)
        accumulation = self.args.gradient_accumulation_steps
        if per_generation % accumulation:
            raise ConfigError(
                f"steps_per_generation is {per_generation} and gradient_accumulation_steps is "
                f"{accumulation}. One optimizer step would span several generations, so the "
                "tokens of SDPO and the pairs of DPO could not be counted before it starts. Make "
                "steps_per_generation a multiple of gradient_accumulation_steps."
            )

    def _autocast(self) -> AbstractContextManager[object]:
        """The policy's own precision, for weights that accelerate has not wrapped."""
        return self.accelerator.autocast()

    @property
    def _composer_args(self) -> ComposerConfig:
        return cast(ComposerConfig, self.args)

    @property
    def _is_training(self) -> bool:
        return cast(nn.Module, self.model).training

    @property
    def _has_adapters(self) -> bool:
        return hasattr(self.model, "disable_adapter")

    # ---- what TRL calls -------------------------------------------------------------------------

    def _generate_and_score_completions(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: list[dict[str, object]]
    ) -> Inputs:
        """TRL's rollouts and rewards; then the plan of the extra channels for the same steps."""
        self.clock.start("rollout")
        output = super()._generate_and_score_completions(inputs)
        rollout_s = self.clock.stop("rollout")
        self._metrics["train" if self._is_training else "eval"]["rollout_s"].append(rollout_s)
        if self._is_training:
            sites = [
                site
                for row in inputs
                for site in cast(list[HintSite], row.get("rollout_hint_sites") or [])
            ]
            self._write_rollouts(inputs, output)
            if self.channel_weights:
                self._plan = self._plan_generation(sites)
        return output

    def _prepare_inputs(self, generation_batch: object) -> Inputs:
        """TRL's micro-batch with the tensors of the extra channels beside it."""
        inputs = super()._prepare_inputs(generation_batch)
        if not self._plan or not self._is_training:
            return inputs
        micro_batch = self._plan[self._step % len(self._plan)]
        return {**inputs, **micro_batch.inputs(self.accelerator.device)}

    def _compute_loss(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """TRL's loss plus each scheduled channel times its weight.

        Raises:
            TrainingError: the loss is not finite; nothing is updated.
        """
        loss = super()._compute_loss(model, inputs)
        if not self._is_training:
            return loss
        losses = {"grpo": loss}
        args = self._composer_args
        for name in scheduled(
            tuple(self.channel_weights), args.channel_schedule, self.state.global_step
        ):
            losses[name] = self._channel_loss(name, model, inputs)
            loss = loss + self.channel_weights[name] * losses[name]
        self._record(losses, inputs)
        if not torch.isfinite(loss):
            values = {name: value.item() for name, value in losses.items()}
            raise TrainingError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}: {values}. "
                "Nothing was updated. Lower the learning rate, or look for nan in that channel's "
                "rows."
            )
        return loss

    def _channel_loss(self, name: str, model: nn.Module, inputs: Inputs) -> Tensor:
        if name == "sdpo":
            return self._compute_sdpo_loss(model, inputs)
        if name == "dpo":
            return self._compute_trace_replay_loss(model, inputs)
        return self._normalised(name, model, inputs)

    def _compute_sdpo_loss(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Mean divergence over the step's hinted tokens, unweighted; override to change it.

        `inputs` holds the collator's `input_ids`, `ctx_teacher_input_ids`, `sdpo_loss_mask` and
        index lists for this micro-batch.
        """
        return self._normalised("sdpo", model, inputs)

    def _compute_trace_replay_loss(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Mean preference loss over the step's pairs, unweighted; override to change it.

        `inputs` holds the collator's `dpo_chosen_*` and `dpo_rejected_*` tensors.
        """
        return self._normalised("dpo", model, inputs)

    def _normalised(self, name: str, model: nn.Module, inputs: Inputs) -> Tensor:
        """A channel's sum times ranks over its count in the whole optimizer step."""
        open_teacher = None if self.teacher is None else self.teacher.open
        part = channel_sums(model, inputs, (name,), self.step_settings, open_teacher)[name]
        count = float(inputs[f"{name}_step_count"])
        self._record_channel_metrics(part)
        return part.loss_sum * self.accelerator.num_processes / max(count, 1.0)

    # ---- planning -------------------------------------------------------------------------------

    def _plan_generation(self, rollout_sites: list[HintSite]) -> list[MicroBatch]:
        """Micro-batches for every optimizer step that this generation feeds."""
        args = self._composer_args
        accumulation = args.gradient_accumulation_steps
        # Each further iteration over the same rollouts takes its own hint sites and pairs.
        num_steps = int(args.steps_per_generation or 1) * args.num_iterations // accumulation
        data = {CHANNELS[name].data for name in self.channel_weights}
        sites = self._sites_for(rollout_sites, num_steps) if "hint_sites" in data else []
        plan: list[MicroBatch] = []
        for index in range(num_steps):
            live = scheduled(
                tuple(self.channel_weights), args.channel_schedule, self.state.global_step + index
            )
            data = {CHANNELS[name].data for name in live}
            plan += plan_step(
                sites[index::num_steps] if "hint_sites" in data else [],
                self._take_pairs() if "pairs" in data else [],
                num_micro_batches=accumulation,
                collator=self.collator,
                channels=list(self.channel_weights),
                sum_over_ranks=self._sum_over_ranks,
            )
        return plan

    def _sites_for(self, rollout_sites: list[HintSite], num_steps: int) -> list[HintSite]:
        """Error turns of the rollouts first; the given hint sites fill what they leave."""
        args = self._composer_args
        wanted = args.hint_sites_per_step * num_steps
        # Spread over the rollouts: neighbours are turns of one episode.
        num_found = min(wanted, len(rollout_sites))
        sites = [rollout_sites[i * len(rollout_sites) // num_found] for i in range(num_found)]
        # Every rank moves its loader by the same amount, whatever its own rollouts gave.
        missing = wanted - len(sites)
        if self._site_loader is None:
            return sites
        recorded = self._site_loader.take(
            wanted,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
        )[:missing]
        if args.hint_site_actions == "recorded" or not recorded:
            return sites + recorded
        seed = args.seed * 1_000_003 + self._step
        return sites + sample_site_actions(self, recorded, seed)

    def _take_pairs(self) -> list[PreferencePair]:
        if self._pair_loader is None:
            return []
        return self._pair_loader.take(
            self._composer_args.pairs_per_step,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
        )

    def _sum_over_ranks(self, counts: Tensor) -> Tensor:
        local = counts.to(self.accelerator.device, torch.float32)
        return cast(Tensor, self.accelerator.reduce(local, reduction="sum")).cpu()

    # ---- metrics, files -------------------------------------------------------------------------

    def _record(self, losses: Mapping[str, Tensor], inputs: Inputs) -> None:
        """Add this micro-batch to the step's totals; log them with its last micro-batch."""
        for name, value in losses.items():
            mean = cast(Tensor, self.accelerator.reduce(value.detach().float(), reduction="mean"))
            self._add_to_total(f"loss/{name}", float(mean))
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        sampled = cast(Tensor, self.accelerator.reduce(mask.sum().float(), reduction="sum"))
        self._add_to_total("tokens/grpo", float(sampled))
        if not self.accelerator.sync_gradients:
            return
        for name in self.channel_weights:
            unit = CHANNELS[name].unit
            self._channel_totals[f"{unit}/{name}"] = float(inputs[f"{name}_step_count"])
        for name, total in self._channel_totals.items():
            self._metrics["train"][name].append(total)
        self._channel_totals = {}

    def _add_to_total(self, name: str, value: float) -> None:
        self._channel_totals[name] = self._channel_totals.get(name, 0.0) + value

    def _record_channel_metrics(self, part: ChannelSum) -> None:
        for name, value in part.metrics.items():
            if math.isfinite(number := float(value)):
                self._metrics["train"][name].append(number)

    def _write_rollouts(self, inputs: list[dict[str, object]], output: Inputs) -> None:
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        rows = gather_object(rollout_rows(inputs, output, tokenizer))
        if not self.accelerator.is_main_process:
            return
        for name, rewards in self._logs["rewards"].items():
            for row, reward in zip(rows, list(rewards)[-len(rows) :], strict=True):
                row["rewards"][name] = reward
        args = self._composer_args
        folder = Path(args.rollouts_dir or Path(str(args.output_dir)) / "rollouts")
        write_rollouts(folder, self.state.global_step + 1, rows)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """TRL's checkpoint with the teacher's weights and the loaders' positions beside it."""
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            save_composer_state(folder, self.teacher, self._loaders())

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Weights, then the teacher and the loaders' positions."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_composer_state(Path(resume_from_checkpoint), self.teacher, self._loaders())

    def _loaders(self) -> dict[str, RecordLoader[HintSite] | RecordLoader[PreferencePair]]:
        loaders = {"hint_sites": self._site_loader, "pairs": self._pair_loader}
        return {name: loader for name, loader in loaders.items() if loader is not None}
