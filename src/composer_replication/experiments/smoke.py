"""The smoke: does the three-channel step train this model here, in what memory, how fast."""

import statistics
import time
from dataclasses import dataclass, field
from typing import cast

import torch
from rich.console import Console
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from composer_replication.config.run_config import RunConfig
from composer_replication.experiments.extra_steps import (
    TOP_K,
    ExtraStep,
    longest_prompt,
    step_at_largest_shape,
    step_with_top_k,
)
from composer_replication.experiments.fixed_shapes import full_length_sites
from composer_replication.experiments.live_table import LiveTable
from composer_replication.experiments.quiet_libraries import quiet_libraries, without_printed_logs
from composer_replication.experiments.run_figures import channel_checks, channel_figures, percentile
from composer_replication.experiments.saved_model import save_model
from composer_replication.experiments.trainer_setup import (
    RunParts,
    build_trainer,
    device,
    device_label,
    load_run_model,
    prepare,
)
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.runs.summary import Check, Summary
from composer_replication.training.metrics import (
    MetricsRow,
    StepMetricsCallback,
    peak_gib,
    peak_reserved_gib,
    reset_peak,
)
from composer_replication.training.trainer import ComposerReplicationTrainer

MAX_STEPS = 50
# Under this many steps a median and a 95th percentile say little.
MIN_STEPS = 8


@dataclass(slots=True)
class SmokeMeasurements:
    """What the smoke saw, before it is judged."""

    rows: list[MetricsRow]
    phases_s: dict[str, float]
    total_s: float
    peak_gib: float
    largest_shape: ExtraStep | None
    top_k: ExtraStep | None
    moved_by: float
    notes: list[str] = field(default_factory=list)


@quiet_libraries()
def run_smoke(config: RunConfig, run: RunDirectory, console: Console) -> Summary:
    """Train for some steps with real rollouts, measure, judge, and save the model.

    Args:
        config: of the run; `smoke.steps` None: as many steps as fit `smoke.time_budget_s` (at
            most 50; all 50 on CUDA).
        run: gets metrics, rollouts, model and summary.
        console: shows the live table and the figures.

    Raises:
        InputError: something that could not work; no step was run.
        TrainingError: a step whose loss is not finite.
    """
    started_s = time.perf_counter()
    steps = config.smoke.steps or MAX_STEPS
    parts = prepare(config, run, overrides={"max_steps": steps, "save_strategy": "no"})
    _print_header(parts, console)
    loaded = load_run_model(parts, on_progress=lambda text: console.print(text, soft_wrap=True))
    load_s = time.perf_counter() - started_s
    reset_peak(device())

    table = LiveTable(console, is_sampled=config.smoke.fixed_shapes is None)
    metrics = StepMetricsCallback(device(), run.append_metrics, table.add)
    callbacks: list[TrainerCallback] = [metrics]
    if config.smoke.steps is None and device().type == "cpu":
        callbacks.append(TimeBudget(config.smoke.time_budget_s))
    trainer = build_trainer(parts, loaded, callbacks)
    without_printed_logs(trainer)
    for note in parts.notes:
        console.print(f"note {note}", highlight=False, soft_wrap=True)
    before = _fingerprint(trainer)
    trainer.train()
    moved_by = _distance(trainer, before)
    phases_s = {"load": load_s, **trainer.clock.total_s, "step": metrics.clock.total_s["step"]}
    peak = peak_gib(device())

    largest, top_k = _extra_steps(trainer, parts)
    save_started_s = time.perf_counter()
    save_model(trainer, run)
    phases_s["save"] = time.perf_counter() - save_started_s
    seen = SmokeMeasurements(
        rows=metrics.rows,
        phases_s=phases_s,
        total_s=time.perf_counter() - started_s,
        peak_gib=peak,
        largest_shape=largest,
        top_k=top_k,
        moved_by=moved_by,
        notes=parts.notes,
    )
    summary = summarise(seen, trainer.channel_weights, loaded.label)
    run.write_summary(summary)
    _print_figures(summary, seen, run, console)
    return summary


class TimeBudget(TrainerCallback):
    """Stops a run before the step that would not fit, but not before `MIN_STEPS`."""

    def __init__(self, budget_s: float) -> None:
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
        """Start the clock."""
        del args, state, control, kwargs
        self._started_s = time.perf_counter()
        self._ends_s = [self._started_s]

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Stop where the next step, if as long as the longest, would end too late."""
        del args, kwargs
        self._ends_s.append(time.perf_counter())
        longest_s = max(b - a for a, b in zip(self._ends_s, self._ends_s[1:], strict=False))
        would_end_s = self._ends_s[-1] - self._started_s + longest_s
        if state.global_step >= MIN_STEPS and would_end_s > self._budget_s:
            control.should_training_stop = True


def summarise(seen: SmokeMeasurements, channel_weights: dict[str, float], label: str) -> Summary:
    """Figures and verdicts of a smoke; the first step warms up and is timed apart."""
    timed = [float(row["step_s"] or 0.0) for row in seen.rows[1:] or seen.rows]
    checks = _checks(seen, channel_weights)
    notes = list(seen.notes)
    if seen.top_k is not None:
        notes.append(f"SDPO with top_k = {TOP_K}: loss {seen.top_k.loss:.3e}.")
    reserved = peak_reserved_gib(device())
    if reserved is not None:
        notes.append(f"CUDA's allocator reserved {reserved:.2f} GiB at its peak.")
    return Summary(
        status="passed" if all(check.passed for check in checks) else "failed",
        checks=checks,
        model=label,
        device=device_label(),
        steps=len(seen.rows),
        median_step_s=statistics.median(timed),
        p95_step_s=percentile(timed, 0.95),
        total_s=seen.total_s,
        peak_gib=seen.peak_gib,
        peak_gib_max_shape=seen.largest_shape.peak_gib if seen.largest_shape else seen.peak_gib,
        phases_s=dict(seen.phases_s),
        channels={name: channel_figures(seen.rows, name) for name in ("grpo", *channel_weights)},
        notes=notes,
    )


def _extra_steps(
    trainer: ComposerReplicationTrainer, parts: RunParts
) -> tuple[ExtraStep | None, ExtraStep | None]:
    tokenizer, num_sites = trainer.collator.tokenizer, parts.args.hint_sites_per_step
    shape = parts.config.smoke.fixed_shapes
    sites = (
        parts.data.hint_sites[:num_sites]
        if shape is None
        else full_length_sites(tokenizer, shape[1], num_sites)
    )
    has_sdpo = "sdpo" in trainer.channel_weights and len(sites) > 0
    top_k = step_with_top_k(trainer, sites) if has_sdpo else None
    if shape is not None:
        return None, top_k
    completion = int(parts.args.max_completion_length or 0)
    limit = parts.config.smoke.max_shape_tokens or completion + longest_prompt(
        parts.data.prompts, tokenizer
    )
    context = parts.args.max_context_tokens or limit
    return step_at_largest_shape(trainer, limit, context), top_k


def _checks(seen: SmokeMeasurements, channel_weights: dict[str, float]) -> list[Check]:
    checks = channel_checks(seen.rows, tuple(channel_weights))
    checks.append(
        Check(
            "parameters_moved",
            passed=seen.moved_by > 0,
            value=seen.moved_by,
            bound="> 0",
            cause=None
            if seen.moved_by > 0
            else "No weight changed. Raise grpo.learning_rate, or check that some reward varies.",
        )
    )
    return checks


@torch.no_grad()
def _fingerprint(trainer: ComposerReplicationTrainer) -> list[torch.Tensor]:
    """A slice of every trainable parameter, to see later that it moved."""
    model = cast(nn.Module, trainer.model)
    trainable = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return [parameter.detach().reshape(-1)[:4096].clone() for parameter in trainable]


@torch.no_grad()
def _distance(trainer: ComposerReplicationTrainer, before: list[torch.Tensor]) -> float:
    after = _fingerprint(trainer)
    return max(
        float((new.to(old.device) - old).abs().max())
        for new, old in zip(after, before, strict=True)
        if old.numel()
    )


def _print_header(parts: RunParts, console: Console) -> None:
    weights = f"alpha_sdpo {parts.config.alpha_sdpo}, beta_replay {parts.config.beta_replay}"
    console.print(
        f"smoke GRPO + SDPO + DPO ({weights}) on {parts.model_spec}, {device_label()}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"data  {len(parts.data.prompts)} prompts, {len(parts.data.hint_sites)} hint sites, "
        f"{len(parts.data.pairs)} pairs from {parts.data.folder.name}",
        highlight=False,
        soft_wrap=True,
    )


def _print_figures(
    summary: Summary, seen: SmokeMeasurements, run: RunDirectory, console: Console
) -> None:
    def line(title: str, text: str) -> None:
        console.print(f"{title:<7} {text}", highlight=False, soft_wrap=True)

    console.print()
    line(summary.status, f"{summary.steps} steps on {summary.model}, {summary.device}")
    for check in summary.checks:
        if not check.passed:
            line("  check", f"{check.name}: {check.value} (bound {check.bound}). {check.cause}")
    phases = ", ".join(f"{name} {value:.1f}" for name, value in seen.phases_s.items())
    line(
        "time",
        f"median step {summary.median_step_s:.2f} s, p95 {summary.p95_step_s:.2f} s; "
        f"total {seen.total_s:.1f} s ({phases})",
    )
    memory = f"peak {seen.peak_gib:.2f} GiB"
    if seen.largest_shape is not None:
        shape = seen.largest_shape
        memory += (
            f"; largest shape ({shape.num_rows} x {shape.num_tokens} tokens) "
            f"{shape.peak_gib:.2f} GiB, {shape.step_s:.2f} s"
        )
    line("memory", memory)
    for name, figures in summary.channels.items():
        known = ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if v is not None)
        line(name, known)
    if seen.top_k is not None:
        line("top_k", f"SDPO with {TOP_K} teacher tokens and a tail: {seen.top_k.loss:.3e} nats")
    line("files", str(run.path))
    line("next", f"composer-replication train {run.config_path} --set grpo.max_steps=200")
