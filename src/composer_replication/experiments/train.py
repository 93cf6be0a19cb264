"""The train verb: the run that a configuration describes, its checkpoints and its model."""

import statistics
import time
from pathlib import Path

from rich.console import Console
from transformers import TrainerState

from composer_replication.config.execution_sections import SmokeConfig
from composer_replication.config.run_config import RunConfig
from composer_replication.experiments.heldout_evaluation import HeldoutEvaluation, heldout_scores
from composer_replication.experiments.live_table import LiveTable
from composer_replication.experiments.planned_run import plan_misses, plan_run
from composer_replication.experiments.quiet_libraries import quiet_libraries, without_printed_logs
from composer_replication.experiments.run_figures import channel_checks, channel_figures, percentile
from composer_replication.experiments.run_phases import download_s
from composer_replication.experiments.saved_model import save_model
from composer_replication.experiments.trainer_setup import (
    RunParts,
    build_trainer,
    device,
    device_label,
    load_run_model,
    prepare,
)
from composer_replication.runs.checkpoint_folders import checkpoint_step, newest_checkpoint
from composer_replication.runs.process_age import cold_start_s
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.runs.step_rows import StepRow
from composer_replication.runs.summary import Summary
from composer_replication.training.metrics import StepMetricsCallback, TensorPeakCallback
from composer_replication.training.model_source import LoadedModel
from composer_replication.training.peak_memory import peak_gib, reset_peak
from composer_replication.training.trainer import ComposerReplicationTrainer


@quiet_libraries()
def run_train(
    config: RunConfig, run: RunDirectory, console: Console, *, resume: bool = False
) -> Summary:
    """Train as configured and write `checkpoints/`, `model/` and `summary.json`.

    Args:
        config: of the run; `[grpo] max_steps` or `num_train_epochs` set its length.
        run: gets every file.
        console: shows the live table.
        resume: go on from the newest whole checkpoint in `checkpoints/`, or from the start where
            there is none.

    Raises:
        InputError: something that could not work; no step was run.
        TrainingError: a step whose loss is not finite.
    """
    started_s, cold_s = time.perf_counter(), cold_start_s()
    checkpoint = _place_to_go_on(run, console) if resume else None
    # A smoke's file may be trained as it is; its fixed shapes are the smoke's alone.
    parts = prepare(config.model_copy(update={"smoke": SmokeConfig()}), run, overrides={})
    console.print(f"train on {parts.model_spec}, {device_label()}", highlight=False, soft_wrap=True)
    planned = plan_run(parts.config, run, "train", parts)
    for note in parts.notes:
        console.print(f"note  {note}", highlight=False, soft_wrap=True)
    loaded = load_run_model(parts, on_progress=lambda text: console.print(text, soft_wrap=True))
    load_s = time.perf_counter() - started_s
    reset_peak(device())

    earlier_rows = run.read_metrics() if resume else []
    metrics = StepMetricsCallback(
        device(), run.append_metrics, LiveTable(console).add, earlier_rows=earlier_rows
    )
    tensors = TensorPeakCallback(device())
    heldout = _heldout(parts, loaded, run, console, run.read_heldout() if resume else [])
    trainer = build_trainer(parts, loaded, [*heldout, metrics, tensors])
    for evaluation in heldout:
        evaluation.trainer = trainer
    without_printed_logs(trainer)
    _train_from(trainer, checkpoint)
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
        peak_tensor_gib=tensors.peak_gib,
        phases_s={
            "cold_start": cold_s,
            "download": download_s(loaded),
            "load": load_s,
            **trainer.clock.total_s,
            "step": metrics.clock.total_s.get("step", 0.0),
            "save": time.perf_counter() - save_started_s,
        },
        executor=trainer.packing.label,
        heldout=heldout_scores(run.read_heldout()),
        channels={name: channel_figures(rows, name) for name in ("grpo", *trainer.channel_weights)},
        notes=parts.notes,
    )
    for miss in plan_misses(planned, summary):
        summary.notes.append(miss)
        console.print(f"note  {miss}", highlight=False, soft_wrap=True)
    run.write_summary(summary)
    console.print(
        f"{summary.status}  {summary.steps} steps, median {summary.median_step_s:.2f} s, "
        f"peak {summary.peak_gib:.2f} GiB\nmodel   {run.model_dir}",
        highlight=False,
        soft_wrap=True,
    )
    return summary


def _heldout(
    parts: RunParts,
    loaded: LoadedModel,
    run: RunDirectory,
    console: Console,
    earlier_rows: list[StepRow],
) -> list[HeldoutEvaluation]:
    """The held-out evaluations of the run, where its configuration asks for them.

    They stand before the callbacks that time a step: its time begins after them.
    """
    every_steps = parts.config.evaluation.every_steps
    if parts.heldout is None or not every_steps:
        return []

    def say(sentence: str) -> None:
        console.print(sentence, highlight=False, soft_wrap=True)

    evaluation = HeldoutEvaluation(
        parts.heldout,
        loaded.tokenizer,
        every_steps=every_steps,
        num_prompts=parts.config.evaluation.prompts,
        write=run.append_heldout,
        say=say,
        earlier_rows=earlier_rows,
    )
    return [evaluation]


def _place_to_go_on(run: RunDirectory, console: Console) -> Path | None:
    """The newest whole checkpoint, the metrics cut to it; None: the run starts from step 0."""

    def say(sentence: str) -> None:
        console.print(f"note  {sentence}", highlight=False, soft_wrap=True)

    checkpoint = newest_checkpoint(run.checkpoints_dir, say)
    step = 0 if checkpoint is None else checkpoint_step(checkpoint)
    run.truncate_metrics(last_step=step)
    if checkpoint is None:
        say(f"{run.path} holds no checkpoint: the run starts from step 0.")
    else:
        console.print(f"resumed from step {step}", highlight=False, soft_wrap=True)
    return checkpoint


def _train_from(trainer: ComposerReplicationTrainer, checkpoint: Path | None) -> None:
    """Train to the end; a run that had reached it is only loaded, to be saved and summed up.

    transformers would do one step too many: it looks at the step count after a step, not before.
    """
    if checkpoint is None:
        trainer.train()
    elif 0 < trainer.args.max_steps <= checkpoint_step(checkpoint):
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint))
