"""`ComposerReplicationTrainer`: TRL's GRPOTrainer with SDPO and trace-replay DPO in the same step.

GRPO keeps TRL's own loss and normalisation. Each further channel is divided by its count over the
whole optimizer step: a rank's loss is sum * num_processes / global count, since DDP averages over
ranks and TRL does not divide by gradient accumulation for us. No paper has trace-replay DPO.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from composer_replication.batch.collate import ComposerDataCollator
from composer_replication.runs.checkpoint_folders import staging_folder
from composer_replication.step.channels import CHANNELS, ChannelSum
from composer_replication.step.hidden_states import causal_lm, check_output_head
from composer_replication.step.optimizer_step import channel_sums
from composer_replication.step.settings import TeacherContext
from composer_replication.traces.hints import HintSite
from composer_replication.traces.pairs import PreferencePair
from composer_replication.training import routing
from composer_replication.training.channel_plan import MicroBatch, scheduled
from composer_replication.training.channel_weights import channel_weights
from composer_replication.training.composer_config import ComposerConfig
from composer_replication.training.finite_checks import check_gradient_norm, non_finite_loss
from composer_replication.training.generation_plan import GenerationPlanner
from composer_replication.training.heldout_guard import HeldoutGuard
from composer_replication.training.metrics import StepClock, means_over_ranks
from composer_replication.training.packing import Packing
from composer_replication.training.process_checks import check_processes
from composer_replication.training.record_loader import hint_sites_from, pairs_from
from composer_replication.training.record_texts import RecordTextCollator
from composer_replication.training.references import references_for_run
from composer_replication.training.repetition import mean_repetition
from composer_replication.training.resume_state import load_run_state, save_run_state, skip_passes
from composer_replication.training.rewards import RewardFunction, environment_reward
from composer_replication.training.rollout_log import write_step_rollouts
from composer_replication.training.rollouts import EnvironmentRollouts
from composer_replication.training.run_guards import RunGuards
from composer_replication.training.site_sampling import sample_site_actions
from composer_replication.training.step_diagnostics import StepDiagnostics
from composer_replication.training.teacher import Teacher, make_teacher
from composer_replication.training.teacher_callback import TeacherCallback
from composer_replication.training.trl_hooks import GRPOConfig, GRPOTrainer
from composer_replication.training.whole_checkpoint import whole_checkpoint

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
        if weights and args.ddp_broadcast_buffers is None:
            # Ranks run different numbers of forwards, and would wait for each other's buffers.
            args.ddp_broadcast_buffers = False
        super().__init__(model, reward_funcs, args, *positional, **keywords)  # pyright: ignore[reportArgumentType]
        self.channel_weights = weights
        self.clock = StepClock(self.accelerator.device)
        self._plan: list[MicroBatch] = []
        self._finished_passes = 0
        self._is_saving = False
        self._channel_totals: dict[str, float] = {}
        self._metric_sums: dict[str, tuple[float, float]] = {}
        self._set_up_channels(sites, preferences)

    def _set_up_channels(
        self, sites: list[HintSite] | None, pairs: list[PreferencePair] | None
    ) -> None:
        args = self._composer_args
        self.diagnostics = StepDiagnostics(args, self.accelerator, self.channel_weights)
        self.add_callback(self.diagnostics)
        policy = cast(nn.Module, self.model)
        is_fp32 = self.accelerator.mixed_precision == "no" and policy.dtype == torch.float32
        self.add_callback(RunGuards(args, tuple(self.channel_weights), is_fp32=is_fp32))
        self.add_callback(HeldoutGuard(args, self._metrics["eval"]))
        collator = RecordTextCollator if args.credit_every else ComposerDataCollator
        self.collator = collator(
            cast(PreTrainedTokenizerBase, self.processing_class),
            hint_placement=args.hint_placement,
            max_length=args.max_context_tokens,
            truncation=args.truncation,
            vocab_size=causal_lm(policy).config.get_text_config().vocab_size,
        )
        self.step_settings = args.step_settings()
        self.packing = Packing.for_trainer(self, self.step_settings, self.channel_weights)
        self.teacher: Teacher | None = None
        self.planner: GenerationPlanner | None = None
        data = {CHANNELS[name].data for name in self.channel_weights}
        if data or self.packing.is_on:
            check_output_head(policy)
            check_processes(args, self.accelerator)
        if not data:
            return
        if "hint_sites" in data:
            self.teacher = make_teacher(
                args.teacher,
                cast(nn.Module, self.model),
                self._autocast,
                ema_rate=args.teacher_ema_rate,
                has_adapters=hasattr(policy, "disable_adapter"),
            )
            self.add_callback(TeacherCallback(self.teacher))
        if pairs is not None and "pairs" in data:
            pairs = references_for_run(
                pairs, args, policy, self.accelerator, self.collator, self.packing
            )
        self.planner = GenerationPlanner(
            args,
            list(self.channel_weights),
            sites=sites,
            pairs=pairs,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
            sum_over_ranks=self._sum_over_ranks,
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

    # ---- what TRL calls -------------------------------------------------------------------------

    def _generate_and_score_completions(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: list[dict[str, object]]
    ) -> Inputs:
        """TRL's rollouts and rewards; then the plan of the extra channels for the same steps."""
        self.clock.start("rollout")
        output = super()._generate_and_score_completions(inputs)
        metrics = self._metrics["train" if self._is_training else "eval"]
        metrics["rollout_s"].append(self.clock.stop("rollout"))
        metrics["completions/repetition"].append(mean_repetition(output))
        if self._is_training:
            sites = self._route(inputs, output)
            write_step_rollouts(self, inputs, output)
            prompts = self.packing.note_groups(output, self.args.per_device_train_batch_size)
            if self.planner is not None:
                self._plan = self.planner.plan(
                    sites,
                    self.collator,
                    global_step=self.state.global_step,
                    resample=self._resample,
                    prompts=prompts,
                )
        return output

    def _prepare_inputs(self, generation_batch: object) -> Inputs:
        """TRL's micro-batch with the tensors of the extra channels beside it."""
        generation = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        buffered = self._buffered_inputs
        if self.packing.is_on and buffered is not None and buffered is not generation:
            whole = self.packing.whole_groups(buffered)
            self._buffered_inputs = cast(list[Inputs] | None, whole)
            inputs = whole[self._step % len(whole)]
        if not self._plan or not self._is_training:
            return inputs
        return inputs | self._plan[self._step % len(self._plan)].inputs(self.accelerator.device)

    def _compute_loss(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """TRL's loss plus each scheduled channel times its weight.

        Raises:
            TrainingError: the loss is not finite; nothing is updated.
        """
        names = self._scheduled_channels()
        with self.packing.shared(model, inputs, names, self._open_teacher):
            return self._weighted_losses(model, inputs, names)

    def _weighted_losses(self, model: nn.Module, inputs: Inputs, names: tuple[str, ...]) -> Tensor:
        with self.diagnostics.watching(self):
            loss = super()._compute_loss(model, inputs)
        if not self._is_training:
            return loss
        losses = {"grpo": loss}
        for name in names:
            losses[name] = self._channel_loss(name, model, inputs)
            loss = loss + self.channel_weights[name] * losses[name]
        means = self._record(losses, inputs)
        if not all(math.isfinite(mean) for mean in means.values()):
            raise non_finite_loss(means, inputs, self.state.global_step + 1)
        self.diagnostics.measure(self, model, losses, inputs, self.teacher)
        return loss

    def _get_per_token_logps_and_entropies(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        **keywords: object,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's policy, old and reference log-probs, all from the same kernels where packed."""
        rows = (input_ids, attention_mask, logits_to_keep)
        if not self.packing.is_on:
            return super()._get_per_token_logps_and_entropies(model, *rows, **keywords)  # pyright: ignore[reportArgumentType]
        return *self.packing.rollout_scores(model, *rows), None

    def _scheduled_channels(self) -> tuple[str, ...]:
        names = tuple(self.channel_weights) if self._is_training else ()
        return scheduled(names, self._composer_args.channel_schedule, self.state.global_step)

    @property
    def _open_teacher(self) -> TeacherContext | None:
        """None stands for the live policy, which rides in the packed forward."""
        is_riding = self.packing.is_on and self._composer_args.teacher == "live"
        return None if self.teacher is None or is_riding else self.teacher.open

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: Tensor | float | None = None
    ) -> Tensor | float | None:
        """The norm before clipping; one that is not finite never reaches the optimizer."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        has_loss_scaling = self.accelerator.scaler is not None
        check_gradient_norm(norm, self.state.global_step + 1, has_loss_scaling=has_loss_scaling)
        return norm

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
        settings, teacher = self.step_settings, self._open_teacher
        sums = channel_sums(model, inputs, (name,), settings, teacher, executor=self.packing)
        self._record_channel_metrics(sums[name])
        count = max(float(inputs[f"{name}_step_count"]), 1.0)
        return sums[name].loss_sum * self.accelerator.num_processes / count

    def _route(self, inputs: list[dict[str, object]], output: Inputs) -> list[HintSite]:
        """The error turns that SDPO takes; under routing their rollouts leave GRPO."""
        args = self._composer_args
        if self.planner is None or "sdpo" not in self.channel_weights:
            return []
        if args.rollout_routing == "off":
            return self.planner.choose(routing.sites_of_rollouts(inputs))
        sites = self.planner.choose(routing.sites_of_failures(inputs, args.success_reward))
        num_routed = routing.leave_grpo(sites, inputs, output["advantages"])
        self._metrics["train"]["rollouts/routed"].append(num_routed)
        return sites

    def _resample(self, sites: list[HintSite]) -> list[HintSite]:
        return sample_site_actions(self, sites, self._composer_args.seed * 1_000_003 + self._step)

    def _sum_over_ranks(self, counts: Tensor) -> Tensor:
        local = counts.to(self.accelerator.device, torch.float32)
        return cast(Tensor, self.accelerator.reduce(local, reduction="sum")).cpu()

    # ---- metrics, files -------------------------------------------------------------------------

    def _record(self, losses: Mapping[str, Tensor], inputs: Inputs) -> dict[str, float]:
        """Add this micro-batch to the step's totals; log them with its last micro-batch.

        Returns:
            The mean of each loss over the ranks: not finite on all of them where it is on one, so
            that all stop together instead of waiting for the one that stopped.
        """
        local = torch.stack([value.detach().float() for value in losses.values()])
        reduced = cast(Tensor, self.accelerator.reduce(local, reduction="mean"))
        means = dict(zip(losses, reduced.tolist(), strict=True))
        for name, mean in means.items():
            self._add_to_total(f"loss/{name}", mean)
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        sampled = cast(Tensor, self.accelerator.reduce(mask.sum().float(), reduction="sum"))
        self._add_to_total("tokens/grpo", float(sampled))
        if not self.accelerator.sync_gradients:
            return means
        for name in self.channel_weights:
            unit = CHANNELS[name].unit
            self._channel_totals[f"{unit}/{name}"] = float(inputs[f"{name}_step_count"])
        for name, total in (self._channel_totals | means_over_ranks(self._metric_sums)).items():
            self._metrics["train"][name].append(total)
        self._channel_totals, self._metric_sums = {}, {}
        return means

    def _add_to_total(self, name: str, value: float) -> None:
        self._channel_totals[name] = self._channel_totals.get(name, 0.0) + value

    def _record_channel_metrics(self, part: ChannelSum) -> None:
        for name, value in part.metrics.items():
            total, count = self._metric_sums.get(name, (0.0, 0.0))
            self._metric_sums[name] = (total + float(value) * part.count, count + part.count)

    # ---- checkpoints ----------------------------------------------------------------------------

    def _get_output_dir(self, trial: object) -> str:
        """Where checkpoints are; while one is written, the folder aside."""
        folder = super()._get_output_dir(trial=trial)  # pyright: ignore[reportArgumentType]
        return str(staging_folder(Path(folder))) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """TRL's checkpoint with all that it leaves out, complete or absent."""
        with whole_checkpoint(
            Path(self._get_output_dir(trial)),
            self.state.global_step,
            self.accelerator,
            save_total_limit=self.args.save_total_limit,
            best=self.state.best_model_checkpoint,
        ) as folder:
            self._is_saving = True
            try:
                super()._save_checkpoint(model, trial)  # pyright: ignore[reportArgumentType]
            finally:
                self._is_saving = False
            save_run_state(self, folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Weights, then teacher, loaders, and the place inside the generation."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_run_state(self, Path(resume_from_checkpoint))

    def _get_train_sampler(self, dataset: object = None) -> Sampler[int]:
        """TRL's sampler, where a resumed run's sampler stands."""
        sampler = super()._get_train_sampler(dataset)  # pyright: ignore[reportArgumentType]
        skip_passes(sampler, self._finished_passes)
        return sampler
