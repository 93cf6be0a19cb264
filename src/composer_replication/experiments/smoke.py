"""The smoke: does the three-channel step train this model here, in what memory, how fast.

Order: the checks that need the starting weights, the training, the checks on what was trained, the
extra steps, the saved model; then, with that trainer gone, a second one for the resume check.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from composer_replication.config.run_config import RunConfig
from composer_replication.experiments.activation_memory import check_activations
from composer_replication.experiments.extra_steps import (
    ExtraStep,
    longest_prompt,
    step_at_largest_shape,
    step_with_top_k,
)
from composer_replication.experiments.fixed_shapes import full_length_sites, shortest_full_row
from composer_replication.experiments.hint_check import require_two_hints
from composer_replication.experiments.last_steps import LastSteps
from composer_replication.experiments.live_table import LiveTable
from composer_replication.experiments.planned_run import plan_misses, plan_run
from composer_replication.experiments.quiet_libraries import quiet_libraries, without_printed_logs
from composer_replication.experiments.resume_check import EndOfRun, check_resume, end_of_run
from composer_replication.experiments.run_phases import download_s
from composer_replication.experiments.saved_model import save_model
from composer_replication.experiments.smoke_checks import SmokeChecks, notes_on_checks
from composer_replication.experiments.smoke_summary import (
    SmokeMeasurements,
    print_figures,
    print_header,
    summarise,
)
from composer_replication.experiments.trainer_setup import (
    RunParts,
    build_trainer,
    device,
    load_run_model,
    prepare,
)
from composer_replication.runs.process_age import cold_start_s
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.runs.summary import Summary
from composer_replication.training.metrics import StepMetricsCallback, TensorPeakCallback
from composer_replication.training.model_source import LoadedModel
from composer_replication.training.peak_memory import peak_gib, reset_peak
from composer_replication.training.trainer import ComposerReplicationTrainer

MAX_STEPS = 50
MIN_STEPS_TO_RESUME = 2


@dataclass(slots=True)
class _Smoke:
    """A smoke's trainer and what watches it."""

    label: str
    trainer: ComposerReplicationTrainer
    metrics: StepMetricsCallback
    tensors: TensorPeakCallback
    last_steps: LastSteps
    checks: SmokeChecks


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
    started_s, cold_s = time.perf_counter(), cold_start_s()
    overrides = _overrides(config)
    parts = prepare(config, run, overrides=overrides)
    _require_hints(parts)
    print_header(parts, console)
    planned = plan_run(config, run, "smoke", parts)
    _print_notes(parts.notes, console)
    # The checkpoint serves a check alone; a smoke that was killed may have left its own.
    shutil.rmtree(run.checkpoints_dir, ignore_errors=True)
    try:
        seen, end, checkpoint = _train_and_judge(parts, run, console)
        resume_started_s = time.perf_counter()
        cache = {"reference_cache_dir": parts.args.reference_cache_dir}
        seen.checks.append(check_resume(config, run, end, checkpoint, overrides | cache))
    finally:
        shutil.rmtree(run.checkpoints_dir, ignore_errors=True)
    seen.phases_s = {"cold_start": cold_s, **seen.phases_s}
    seen.phases_s["resume"] = time.perf_counter() - resume_started_s
    seen.total_s = time.perf_counter() - started_s
    summary = summarise(seen)
    summary.notes.extend(plan_misses(planned, summary))
    run.write_summary(summary)
    print_figures(summary, seen, run, console)
    return summary


def _overrides(config: RunConfig) -> dict[str, object]:
    """What the smoke decides whatever `[grpo]` says: its length, a row a step, its checkpoint."""
    return {
        "max_steps": max(config.smoke.steps or MAX_STEPS, MIN_STEPS_TO_RESUME),
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "no",
        "save_only_model": False,
        "save_total_limit": None,
        # Guards stop long runs; a smoke shall reach its checks, which judge the same things.
        "guard_enabled": False,
    }


def _require_hints(parts: RunParts) -> None:
    """Refuse before the model loads what `hint_effect` could not judge after it."""
    sites = parts.data.hint_sites
    if parts.config.alpha_sdpo > 0 and sites and parts.config.smoke.fixed_shapes is None:
        require_two_hints(sites, str(parts.data.folder))


def _train_and_judge(
    parts: RunParts, run: RunDirectory, console: Console
) -> tuple[SmokeMeasurements, EndOfRun, Path | None]:
    """All that needs the first trainer, which is gone afterwards: verdicts, figures, the model."""
    started_s = time.perf_counter()
    loaded = load_run_model(parts, on_progress=lambda text: console.print(text, soft_wrap=True))
    load_s = time.perf_counter() - started_s
    reset_peak(device())
    smoke = _build(parts, loaded, run, console)
    trainer, rows = smoke.trainer, smoke.metrics.rows
    trainer.train()
    peak = peak_gib(device())
    step_s = smoke.metrics.clock.total_s["step"]
    checks = smoke.checks.judge(rows)
    phases_s = {"download": download_s(loaded), "load": load_s}
    phases_s |= {**trainer.clock.total_s, "step": step_s}
    phases_s["checks"] = smoke.checks.seconds
    largest, top_k = _extra_steps(trainer, parts)
    activations = None if largest is None else check_activations(parts.model_spec, largest)
    save_started_s = time.perf_counter()
    save_model(trainer, run)
    phases_s["save"] = time.perf_counter() - save_started_s
    # Copies of the weights: taken last, so that no measured peak holds them.
    end = end_of_run(trainer, rows, run.rollouts_dir)
    tensor_peak = smoke.tensors.peak_gib if largest is None else largest.peak_tensor_gib
    seen = SmokeMeasurements(
        label=smoke.label,
        channel_weights=trainer.channel_weights,
        executor=trainer.packing.label,
        rows=rows,
        phases_s=phases_s,
        peak_gib=peak,
        peak_tensor_gib=tensor_peak,
        largest_shape=largest,
        top_k=top_k,
        checks=checks if activations is None else [*checks, activations],
        notes=parts.notes,
    )
    saved = smoke.last_steps.saved_step
    return seen, end, None if saved is None else run.checkpoints_dir / f"checkpoint-{saved}"


def _build(parts: RunParts, loaded: LoadedModel, run: RunDirectory, console: Console) -> _Smoke:
    config = parts.config.smoke
    table = LiveTable(console, is_sampled=config.fixed_shapes is None)
    metrics = StepMetricsCallback(device(), run.append_metrics, table.add)
    has_budget = config.steps is None and device().type == "cpu"
    last_steps = LastSteps(
        parts.args.max_steps, budget_s=config.time_budget_s if has_budget else None
    )
    # Where something is sampled, the step at the largest shape is measured instead.
    tensors = TensorPeakCallback(device(), is_on=config.fixed_shapes is not None)
    trainer = build_trainer(parts, loaded, [metrics, tensors, last_steps])
    without_printed_logs(trainer)
    notes = notes_on_checks(trainer.channel_weights, asked_steps=config.steps)
    parts.notes.extend(notes)
    _print_notes(notes, console)
    weights = parts.config.channels | {
        "sdpo": parts.config.alpha_sdpo,
        "dpo": parts.config.beta_replay,
    }
    checks = SmokeChecks(trainer, {name: weight for name, weight in weights.items() if weight > 0})
    return _Smoke(loaded.label, trainer, metrics, tensors, last_steps, checks)


def _print_notes(notes: Sequence[str], console: Console) -> None:
    for note in notes:
        console.print(f"note {note}", highlight=False, soft_wrap=True)


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
    # Very short data: the filled rows cannot be shorter than a template, a hint and an action.
    context = max(parts.args.max_context_tokens or limit, shortest_full_row(tokenizer))
    return step_at_largest_shape(trainer, limit, context), top_k
