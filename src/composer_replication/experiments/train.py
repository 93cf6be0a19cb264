"""The train verb: the run that a configuration describes, its checkpoints and its model."""

import statistics
import time
from pathlib import Path

from rich.console import Console
from transformers.trainer_utils import get_last_checkpoint

from composer_replication.config.execution_sections import SmokeConfig
from composer_replication.config.run_config import RunConfig
from composer_replication.errors import RunDirectoryError
from composer_replication.experiments.live_table import LiveTable
from composer_replication.experiments.quiet_libraries import quiet_libraries, without_printed_logs
from composer_replication.experiments.run_figures import channel_checks, channel_figures, percentile
from composer_replication.experiments.saved_model import save_model
from composer_replication.experiments.trainer_setup import (
    build_trainer,
    device,
    device_label,
    load_run_model,
    prepare,
)
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.runs.summary import Summary
from composer_replication.training.metrics import StepMetricsCallback, peak_gib, reset_peak


@quiet_libraries()
def run_train(
    config: RunConfig, run: RunDirectory, console: Console, *, resume: bool = False
) -> Summary:
    """Train as configured and write `checkpoints/`, `model/` and `summary.json`.

    Args:
        config: of the run; `[grpo] max_steps` or `num_train_epochs` set its length.
        run: gets every file.
        console: shows the live table.
        resume: go on from the last checkpoint in `checkpoints/`.

    Raises:
        InputError: something that could not work; no step was run.
        TrainingError: a step whose loss is not finite.
    """
    started_s = time.perf_counter()
    checkpoint = _last_checkpoint(run) if resume else None
    # A smoke's file may be trained as it is; its fixed shapes are the smoke's alone.
    parts = prepare(config.model_copy(update={"smoke": SmokeConfig()}), run, overrides={})
    console.print(f"train on {parts.model_spec}, {device_label()}", highlight=False, soft_wrap=True)
    loaded = load_run_model(parts, on_progress=lambda text: console.print(text, soft_wrap=True))
    load_s = time.perf_counter() - started_s
    reset_peak(device())

    metrics = StepMetricsCallback(device(), run.append_metrics, LiveTable(console).add)
    trainer = build_trainer(parts, loaded, [metrics])
    without_printed_logs(trainer)
    for note in parts.notes:
        console.print(f"note  {note}", highlight=False, soft_wrap=True)
    if checkpoint is not None:
        step = int(checkpoint.name.rpartition("-")[2])
        run.truncate_metrics(last_step=step)
        console.print(f"resumed from step {step}", highlight=False, soft_wrap=True)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    save_started_s = time.perf_counter()
    save_model(trainer, run)

    rows = metrics.rows
    timed = [float(row["step_s"] or 0.0) for row in rows[1:] or rows]
    checks = channel_checks(rows, tuple(trainer.channel_weights))
    summary = Summary(
        status="passed" if all(check.passed for check in checks) else "failed",
        checks=checks,
        model=loaded.label,
        device=device_label(),
        steps=trainer.state.global_step,
        median_step_s=statistics.median(timed) if timed else None,
        p95_step_s=percentile(timed, 0.95) if timed else None,
        total_s=time.perf_counter() - started_s,
        peak_gib=peak_gib(device()),
        phases_s={
            "load": load_s,
            **trainer.clock.total_s,
            "step": metrics.clock.total_s.get("step", 0.0),
            "save": time.perf_counter() - save_started_s,
        },
        channels={name: channel_figures(rows, name) for name in ("grpo", *trainer.channel_weights)},
        notes=parts.notes,
    )
    run.write_summary(summary)
    console.print(
        f"{summary.status}  {summary.steps} steps, median {summary.median_step_s:.2f} s, "
        f"peak {summary.peak_gib:.2f} GiB\nmodel   {run.model_dir}",
        highlight=False,
        soft_wrap=True,
    )
    return summary


def _last_checkpoint(run: RunDirectory) -> Path:
    folder = run.checkpoints_dir
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise RunDirectoryError(
            f"{folder} holds no checkpoint, so there is nothing to go on from. Start the run anew "
            "with another --out, and set grpo.save_steps so that checkpoints are written."
        )
    return Path(found)
