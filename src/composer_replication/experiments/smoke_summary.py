"""The smoke's answer: its summary, and the few lines that a terminal shows."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console

from composer_replication.experiments.extra_steps import TOP_K, ExtraStep
from composer_replication.experiments.run_figures import channel_figures, percentile
from composer_replication.experiments.trainer_setup import RunParts, device, device_label
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.runs.summary import Check, Summary
from composer_replication.training.metrics import MetricsRow
from composer_replication.training.peak_memory import peak_reserved_gib


@dataclass(slots=True)
class SmokeMeasurements:
    """What the smoke saw."""

    label: str
    """The model as a reader knows it."""
    channel_weights: Mapping[str, float]
    executor: str
    """How the step was scored, and why so where it was not packed."""
    rows: list[MetricsRow]
    phases_s: dict[str, float | None]
    peak_gib: float
    peak_tensor_gib: float | None
    largest_shape: ExtraStep | None
    top_k: ExtraStep | None
    checks: list[Check]
    notes: list[str] = field(default_factory=list)
    total_s: float = 0.0


def summarise(seen: SmokeMeasurements) -> Summary:
    """Figures and verdicts of a smoke; the first step warms up and is timed apart."""
    timed = [float(row["step_s"] or 0.0) for row in seen.rows[1:] or seen.rows]
    notes = list(seen.notes)
    if seen.top_k is not None:
        notes.append(f"SDPO with top_k = {TOP_K}: loss {seen.top_k.loss:.3e}.")
    reserved = peak_reserved_gib(device())
    if reserved is not None:
        notes.append(f"CUDA's allocator reserved {reserved:.2f} GiB at its peak.")
    return Summary(
        status="passed" if all(check.passed for check in seen.checks) else "failed",
        checks=seen.checks,
        model=seen.label,
        device=device_label(),
        steps=len(seen.rows),
        median_step_s=statistics.median(timed),
        p95_step_s=percentile(timed, 0.95),
        total_s=seen.total_s,
        peak_gib=seen.peak_gib,
        peak_tensor_gib=seen.peak_tensor_gib,
        peak_gib_max_shape=seen.largest_shape.peak_gib if seen.largest_shape else seen.peak_gib,
        phases_s=dict(seen.phases_s),
        executor=seen.executor,
        channels={n: channel_figures(seen.rows, n) for n in ("grpo", *seen.channel_weights)},
        notes=notes,
    )


def print_header(parts: RunParts, console: Console) -> None:
    """What is about to run, and on what."""
    weights = f"alpha_sdpo {parts.config.alpha_sdpo}, beta_replay {parts.config.beta_replay}"
    _print(console, f"smoke GRPO + SDPO + DPO ({weights}) on {parts.model_spec}, {device_label()}")
    _print(
        console,
        f"data  {len(parts.data.prompts)} prompts, {len(parts.data.hint_sites)} hint sites, "
        f"{len(parts.data.pairs)} pairs from {parts.data.folder.name}",
    )


def print_figures(
    summary: Summary, seen: SmokeMeasurements, run: RunDirectory, console: Console
) -> None:
    """The answer, each failed check, and the figures."""

    def line(title: str, text: str) -> None:
        _print(console, f"{title:<7} {text}")

    console.print()
    line(summary.status, f"{summary.steps} steps on {summary.model}, {summary.device}")
    for check in summary.checks:
        if not check.passed:
            line("  check", f"{check.name}: {check.value} (bound {check.bound}). {check.cause}")
    num_passed = sum(check.passed for check in summary.checks)
    line("checks", f"{num_passed} of {len(summary.checks)} passed")
    phases = ", ".join(f"{k} {v:.1f}" for k, v in seen.phases_s.items() if v is not None)
    line(
        "time",
        f"median step {summary.median_step_s:.2f} s, p95 {summary.p95_step_s:.2f} s; "
        f"total {seen.total_s:.1f} s ({phases})",
    )
    line("memory", _memory_text(seen))
    for name, figures in summary.channels.items():
        known = ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if v is not None)
        line(name, known)
    if seen.top_k is not None:
        line("top_k", f"SDPO with {TOP_K} teacher tokens and a tail: {seen.top_k.loss:.3e} nats")
    line("files", str(run.path))
    line("next", f"composer-replication train {run.config_path} --set grpo.max_steps=200")


def _memory_text(seen: SmokeMeasurements) -> str:
    text = f"peak {seen.peak_gib:.2f} GiB"
    shape = seen.largest_shape
    if shape is not None:
        text += (
            f"; largest shape ({shape.num_rows} x {shape.num_tokens} tokens) "
            f"{shape.peak_gib:.2f} GiB, {shape.step_s:.2f} s"
        )
    if seen.peak_tensor_gib is not None:
        text += f"; tensors alone {seen.peak_tensor_gib:.2f} GiB"
    return text


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
