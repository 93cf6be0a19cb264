"""One run of the evidence: data from its seed, training as its arm says, held-out measurements.

    result = run_evidence(EvidenceRun("api_drift", "all", seed=0), Path("runs/evidence"), print)

Every arm of a task has the same settings, data, number of rollouts and order of prompts.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from composer_replication.config.loading import dump_config
from composer_replication.config.run_config import RunConfig
from composer_replication.environments.api_drift_rules import TOOL_KEYS, drift_from_seed
from composer_replication.environments.api_drift_tasks import task_from_seed
from composer_replication.experiments.api_drift_data import pair_tools
from composer_replication.experiments.evaluate import EvaluationResult, evaluate
from composer_replication.experiments.evaluation_data import EvaluationData
from composer_replication.experiments.evidence_arms import (
    ARMS,
    DPO,
    SDPO,
    SETTINGS,
    Arm,
    EvidenceRun,
    TaskSettings,
    fingerprint,
    sampling_temperature,
)
from composer_replication.experiments.forgetting_probe import old_convention_rows, text_loss
from composer_replication.experiments.heldout_evaluation import HeldoutEvaluation
from composer_replication.experiments.hint_controls import (
    ControlledHintsTrainer,
    HintControl,
    empty,
    shuffled,
    wrong,
)
from composer_replication.experiments.quiet_libraries import quiet_libraries, without_printed_logs
from composer_replication.experiments.run_data import DATA_SCHEMA
from composer_replication.experiments.task_registry import task_rows
from composer_replication.experiments.task_rows import TaskRows, write_manifest, write_split
from composer_replication.experiments.trainer_setup import (
    RunParts,
    build_trainer,
    device,
    device_label,
    load_run_model,
    prepare,
)
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.runs.step_rows import StepRow
from composer_replication.traces.json_lines import Row
from composer_replication.training.metrics import MetricsRow, StepMetricsCallback
from composer_replication.training.model_source import LoadedModel
from composer_replication.training.peak_memory import peak_gib
from composer_replication.training.trainer import ComposerReplicationTrainer

RESULT_SCHEMA = 1
Say = Callable[[str], None]


@quiet_libraries()
def run_evidence(
    run: EvidenceRun, runs_dir: Path, say: Say, settings: TaskSettings | None = None
) -> Row:
    """Train and measure one run; returns what its result file holds.

    Args:
        run: which.
        runs_dir: gets a run directory named after it, which replaces an older one.
        say: receives one line a step.
        settings: None: the task's own.
    """
    started_s = time.perf_counter()
    settings = settings or SETTINGS[run.task]
    arm = ARMS[run.arm]
    train = training_rows(run, settings)
    heldout = heldout_rows(run, settings)
    folder = runs_dir / run.key
    _write_data(folder / "data", run, train)
    config = run_config(run, settings, str(folder / "data"))
    with RunDirectory.create(_fresh(folder / "run"), resume=False) as directory:
        directory.write_config(dump_config(config))
        parts = prepare(config, directory, overrides={})
        loaded = load_run_model(parts, on_progress=say)
        metrics = StepMetricsCallback(
            device(), directory.append_metrics, lambda row: say(_line(row))
        )
        points = HeldoutEvaluation(
            EvaluationData(run.key, run.task, heldout.prompts, []),
            loaded.tokenizer,
            every_steps=settings.curve_every,
            num_prompts=settings.num_curve,
            write=directory.append_heldout,
            say=say,
            # The curve's start is the base arm's.
            from_start=False,
        )
        train_s = 0.0
        if arm.is_trained:
            train_s = _train(parts, loaded, metrics, points, _control(arm, train, run.seed))
        result = {
            "schema": RESULT_SCHEMA,
            **dataclasses.asdict(run),
            "settings": fingerprint(run.task, arm, settings),
            "model": loaded.label,
            "device": device_label(),
            "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
            "steps": len(metrics.rows),
            "generated_tokens": _num_sampled(metrics.rows),
            "curve": _curve(directory.read_heldout(), metrics.rows),
            "pair_tools": heldout.facts.get("pair_tools", []),
            **_measured(loaded, run, heldout, sampling_temperature(settings)),
            "train_s": round(train_s, 1),
            "total_s": round(time.perf_counter() - started_s, 1),
            "peak_gib": round(peak_gib(device()), 2),
        }
    say(f"done  {run.key}  greedy {_rate(result):.0%}  {result['total_s']} s")
    return result


def drifted_tools(drift_seed: int, num_tools: int | None) -> list[str]:
    """The first tools whose rule some pair shows and the last of those that none shows."""
    if num_tools is None:
        return []
    drift = drift_from_seed(drift_seed)
    covered = pair_tools(drift)
    others = [rule.tool for rule in drift.rules if rule.tool not in covered]
    half = num_tools // 2
    return [*covered[:half], *others[-half:]]


def training_rows(run: EvidenceRun, settings: TaskSettings | None = None) -> TaskRows:
    """What a run trains on: the same for every arm. None: the task's own settings."""
    settings = settings or SETTINGS[run.task]
    rows = _rows(run, "train", settings.num_train, settings)
    return _with_old_convention(rows, run.task, settings)


def heldout_rows(
    run: EvidenceRun, settings: TaskSettings | None = None, *, num_prompts: int | None = None
) -> TaskRows:
    """What a run is measured on, before and after; None: as the task's settings say."""
    settings = settings or SETTINGS[run.task]
    return _rows(run, "heldout", num_prompts or settings.num_heldout, settings)


def _rows(run: EvidenceRun, split: str, num_prompts: int, settings: TaskSettings) -> TaskRows:
    """The first so many prompts of the task's tools, and the pairs about them."""
    knobs = {**settings.knobs, **({"drift_seed": run.drift} if run.drift else {})}
    tools = drifted_tools(run.drift, settings.num_tools)
    # A task's prompts go through its tools in turn.
    num_episodes = num_prompts * len(TOOL_KEYS) // len(tools) if tools else num_prompts
    rows = task_rows(run.task, split, seed=run.seed, num_episodes=num_episodes, **knobs)
    if not tools:
        return rows
    return dataclasses.replace(
        rows,
        prompts=[row for row in rows.prompts if _tool(run.task, row) in tools],
        pairs=[pair for pair in rows.pairs if json.loads(pair.rejected)["tool"] in tools],
    )


def _with_old_convention(rows: TaskRows, task: str, settings: TaskSettings) -> TaskRows:
    """The first `num_train` prompts, with those between them that keep the old convention alive.

    Of each block it is the prompt whose tool has had the fewest of them.
    """
    every = settings.old_convention_every
    if every is None:
        return rows
    prompts: list[Row] = []
    num_kept: Counter[str] = Counter()
    for start in range(0, len(rows.prompts), every):
        block = rows.prompts[start : start + every]
        kept = min(block, key=lambda row: num_kept[_tool(task, row)])
        num_kept[_tool(task, kept)] += 1
        prompts += [*block, *old_convention_rows(task, [kept])]
    return dataclasses.replace(rows, prompts=prompts[: settings.num_train])


def run_config(run: EvidenceRun, settings: TaskSettings, data: str) -> RunConfig:
    """The task's configuration with what the arm switches off."""
    arm = ARMS[run.arm]
    changes: dict[str, object] = dict.fromkeys(arm.switches_off, 0.0)
    if arm.teacher is not None:
        changes["teacher"] = arm.teacher
    assert changes.keys() <= {SDPO, DPO, "teacher"}
    # One precision on every device, so that the table may be filled on several.
    grpo = {**cast("Mapping[str, object]", settings.config["grpo"]), "bf16": False}
    # A run that a guard would stop is a finding as well.
    assert "guards" not in settings.config
    values = {**settings.config, "grpo": grpo, "guards": {"heldout_evaluations": 0}, **changes}
    values |= {"name": run.key, "seed": run.seed, "data": data}
    return RunConfig.model_validate(values)


def _fresh(folder: Path) -> Path:
    """The folder, without what an interrupted run left there."""
    for path in sorted(folder.rglob("*"), reverse=True) if folder.exists() else []:
        path.rmdir() if path.is_dir() else path.unlink()
    return folder


def _write_data(folder: Path, run: EvidenceRun, train: TaskRows) -> None:
    """Prompts and pairs, no hint sites: those are the error turns of rollouts.

    At given sites the SDPO arms would sample actions, and so more tokens than the others.
    """
    write_split(folder, dataclasses.replace(train, hint_sites=[], episodes=[]))
    (folder / "hint_sites.jsonl").unlink()
    write_manifest(folder, {"schema": DATA_SCHEMA, "task": run.task, "seed": run.seed})


def _control(arm: Arm, train: TaskRows, seed: int) -> HintControl | None:
    if arm.control is None:
        return None
    if arm.control == "shuffled":
        return shuffled([site.hint for site in train.hint_sites], seed)
    return {"wrong_key": wrong, "empty": empty}[arm.control]


def _train(
    parts: RunParts,
    loaded: LoadedModel,
    metrics: StepMetricsCallback,
    points: HeldoutEvaluation,
    control: HintControl | None,
) -> float:
    """Train to the end; returns the seconds, those of the evaluations left out."""
    trainer_class = ComposerReplicationTrainer if control is None else ControlledHintsTrainer
    trainer = build_trainer(parts, loaded, [points, metrics], trainer_class=trainer_class)
    if control is not None:
        assert isinstance(trainer, ControlledHintsTrainer)
        trainer.hint_control = control
    points.trainer = trainer
    without_printed_logs(trainer)
    started_s = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started_s - trainer.clock.total_s["evaluate"]


def _curve(heldout: Sequence[StepRow], steps: Sequence[MetricsRow]) -> list[Row]:
    """A point for each evaluation between steps: what had been sampled and earned until then."""
    points: list[Row] = []
    num_before = 0
    for row in heldout:
        done = cast(int, row["step"])
        recent = steps[num_before:done]
        points.append(
            {
                "step": done,
                "generated_tokens": _num_sampled(steps[:done]),
                "heldout_success": row["success"],
                "train_reward": sum(float(r["reward"] or 0) for r in recent) / len(recent),
            }
        )
        num_before = done
    return points


def _num_sampled(steps: Sequence[MetricsRow]) -> int:
    return sum(int(float(row["tokens/grpo"] or 0)) for row in steps)


def _greedy(loaded: LoadedModel, task: str, rows: Sequence[Row]) -> EvaluationResult:
    model, tokenizer = _parts(loaded)
    return evaluate(model, tokenizer, task, rows, decoding="greedy")


def _measured(loaded: LoadedModel, run: EvidenceRun, heldout: TaskRows, temperature: float) -> Row:
    """Held-out success, greedy and sampled as in training, and what may have been forgotten."""
    model, tokenizer = _parts(loaded)
    greedy = _greedy(loaded, run.task, heldout.prompts)
    sampled = evaluate(
        model,
        tokenizer,
        run.task,
        heldout.prompts,
        decoding="sampled",
        temperature=temperature,
        seed=run.seed,
    )
    old_rows = old_convention_rows(run.task, heldout.prompts[:24])
    old = _greedy(loaded, run.task, old_rows).success.rate if old_rows else None
    return {
        "greedy": _outcomes(greedy),
        "sampled": _outcomes(sampled),
        "tools": [_tool(run.task, row) for row in heldout.prompts],
        "forgetting": {
            "nats_per_token": text_loss(model, tokenizer).nats_per_token,
            "old_convention": old,
        },
    }


def _outcomes(result: EvaluationResult) -> Row:
    return {
        "outcomes": [int(outcome) for outcome in result.outcomes()],
        "mean_reward": round(result.mean_reward, 4),
        "error_kinds": result.error_kinds,
    }


def _tool(task: str, row: Row) -> str:
    """Whose rule the prompt is about; empty where a task has no rules."""
    if task != "api_drift":
        return ""
    return task_from_seed(cast(int, row["task_seed"]), str(row["split"])).tool


def _parts(loaded: LoadedModel) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    return cast(nn.Module, loaded.model), loaded.tokenizer


def _line(row: Mapping[str, object]) -> str:
    names = ("reward", "loss/sdpo", "loss/dpo", "step_s")
    values = [f"{name} {float(row[name]):.3f}" for name in names if row.get(name) is not None]  # pyright: ignore[reportArgumentType]
    return f"step {row['step']}  {'  '.join(values)}"


def _rate(result: Row) -> float:
    outcomes = cast(Mapping[str, list[int]], result["greedy"])["outcomes"]
    return sum(outcomes) / len(outcomes)
