"""`resume`: save, load and one more step equals not having stopped.

The run writes a checkpoint at its last step but one and goes on. Afterwards model and trainer are
built anew from the configuration, as a restarted process would, and do the remaining step from that
checkpoint. Its row, its rollouts, every trained weight and the teacher must be those of the run.
"""

import gc
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from composer_replication.config.run_config import RunConfig
from composer_replication.experiments.channel_probe import trainable
from composer_replication.experiments.quiet_libraries import without_printed_logs
from composer_replication.experiments.trainer_setup import (
    build_trainer,
    device,
    load_run_model,
    prepare,
)
from composer_replication.runs.checkpoint_folders import checkpoint_step
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.runs.step_rows import is_measured
from composer_replication.runs.summary import Check
from composer_replication.training.metrics import MetricsRow, StepMetricsCallback
from composer_replication.training.trainer import ComposerReplicationTrainer

NAME = "resume"
SCRATCH_FOLDER = "resume_check"
"""Inside the run directory, deleted afterwards."""

CUDA_SPREADS = 10
"""How many times the difference of two resumed steps the run may differ by."""
CUDA_FLOOR = 1e-6

_REASONS = (
    ("learning_rate", "The scheduler's state was not restored."),
    ("position/", "The place in the hint sites or pairs was not restored."),
    ("tokens/sdpo", "The place in the hint sites or the buffered rollouts were not restored."),
    ("rollouts", "The random state, the prompts' order or the generation was not restored."),
    ("loss/sdpo", "The teacher or the place in the hint sites was not restored."),
    ("loss/dpo", "The place in the pairs, or the references, were not restored."),
    ("rewards/", "The place in the pairs, or the references, were not restored."),
    ("weights/", "The optimizer's state was not restored."),
    ("teacher/", "The teacher's weights were not restored."),
)


@dataclass(frozen=True, slots=True)
class EndOfRun:
    """What a run's last step left behind, in CPU memory."""

    step: int
    row: MetricsRow
    """What was logged, and the place of each loader under `position/`."""
    rollouts: list[object]
    weights: dict[str, Tensor]
    """Trained ones under `weights/`, the teacher's own under `teacher/`."""


@dataclass(frozen=True, slots=True)
class _Differences:
    """Between two ends, by name; a name whose values are not equal."""

    found: dict[str, float]
    texts: dict[str, str]

    @property
    def largest(self) -> float:
        """Over everything; 0 where both ends are the same."""
        return max(self.found.values(), default=0.0)


class _StopAfter(TrainerCallback):
    """Stops a resumed run where the first one stopped."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Stop at the step."""
        del args, kwargs
        if state.global_step >= self._step:
            control.should_training_stop = True


@torch.no_grad()
def end_of_run(
    trainer: ComposerReplicationTrainer, rows: list[MetricsRow], rollouts_dir: Path
) -> EndOfRun:
    """Copies of what the last step left; nothing in them keeps the trainer alive."""
    teacher = {} if trainer.teacher is None else trainer.teacher.state()
    named = {f"weights/{name}": parameter for name, parameter in trainable(trainer).items()}
    named |= {f"teacher/{name}": tensor for name, tensor in teacher.items()}
    # The last rollouts may be of an earlier step: one generation can feed several.
    step = trainer.state.global_step
    files = sorted(f for f in rollouts_dir.glob("step_*.jsonl") if f.stem <= f"step_{step:06d}")
    lines = files[-1].read_text(encoding="utf-8").splitlines() if files else []
    loaders = {} if trainer.planner is None else trainer.planner.loaders()
    positions = {f"position/{name}": loader.position for name, loader in loaders.items()}
    return EndOfRun(
        step=step,
        row={**rows[-1], **positions},
        rollouts=[json.loads(line) for line in lines],
        weights={name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()},
    )


def check_resume(
    config: RunConfig,
    run: RunDirectory,
    end: EndOfRun,
    checkpoint: Path | None,
    overrides: Mapping[str, object],
) -> Check:
    """The verdict; the first trainer must be gone, since a second one is built beside nothing.

    Args:
        config: of the run.
        run: whose files stay as they are.
        end: of the run that was not stopped.
        checkpoint: of the step before; None: the run ended too early to write one.
        overrides: what the run's own trainer was built with.
    """
    if checkpoint is None or not checkpoint.is_dir():
        return _failed(
            f"The run ended at step {end.step}, without a checkpoint of the step before."
        )
    if checkpoint_step(checkpoint) != end.step - 1:
        return _failed(f"{checkpoint.name} is not of the step before the last, {end.step}.")
    _free_memory()

    def resumed() -> EndOfRun:
        try:
            return _resume(config, run, checkpoint, end.step, overrides)
        finally:
            shutil.rmtree(run.path / SCRATCH_FOLDER, ignore_errors=True)
            _free_memory()

    # Whatever a restarted run dies of is this check's verdict, not the end of the smoke.
    try:
        return _verdict(end, resumed)
    except Exception as error:
        return _failed(
            f"A run that goes on from {checkpoint.name} ends with {type(error).__name__}: {error}"
        )


def _verdict(end: EndOfRun, resumed: Callable[[], EndOfRun]) -> Check:
    again = resumed()
    differences = _compare(end, again)
    bound = 0.0
    if device().type == "cuda":
        # CUDA adds gradients up in no fixed order, so two resumed steps differ as well.
        bound = max(CUDA_FLOOR, CUDA_SPREADS * _compare(again, resumed()).largest)
    passed = differences.largest <= bound
    return Check(
        NAME,
        passed=passed,
        value=differences.largest,
        bound=bound,
        cause=None if passed else _cause(differences, bound),
    )


def _resume(
    config: RunConfig,
    run: RunDirectory,
    checkpoint: Path,
    last_step: int,
    overrides: Mapping[str, object],
) -> EndOfRun:
    """The remaining step in a fresh model and trainer, with output folders of their own."""
    with RunDirectory.create(run.path / SCRATCH_FOLDER, resume=False) as scratch:
        parts = prepare(config, scratch, overrides=dict(overrides))
        loaded = load_run_model(parts, on_progress=_ignore)
        metrics = StepMetricsCallback(device(), _ignore, _ignore)
        trainer = build_trainer(parts, loaded, [metrics, _StopAfter(last_step)])
        without_printed_logs(trainer)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return end_of_run(trainer, metrics.rows, scratch.rollouts_dir)


def _compare(end: EndOfRun, again: EndOfRun) -> _Differences:
    found: dict[str, float] = {}
    texts: dict[str, str] = {}
    if end.rollouts and again.rollouts and end.rollouts != again.rollouts:
        found["rollouts"], texts["rollouts"] = float("inf"), "other rollouts than the run's"
    for name in sorted(end.row.keys() | again.row.keys()):
        first, second = end.row.get(name), again.row.get(name)
        distance = 0.0 if is_measured(name) else _distance(first, second)
        if distance > 0:
            found[name], texts[name] = distance, f"{name} is {second} and was {first}"
    for name in end.weights.keys() | again.weights.keys():
        distance = _tensor_distance(end.weights.get(name), again.weights.get(name))
        if distance > 0:
            found[name], texts[name] = distance, f"{name} differs by {distance:.3g}"
    return _Differences(found, texts)


def _distance(first: object, second: object) -> float:
    if first == second or (first != first and second != second):
        return 0.0
    if not isinstance(first, int | float) or not isinstance(second, int | float):
        return float("inf")
    return abs(first - second) / max(1.0, abs(first))


def _tensor_distance(first: Tensor | None, second: Tensor | None) -> float:
    if first is None or second is None or first.shape != second.shape:
        return float("inf")
    if torch.equal(first, second):
        return 0.0
    distance = (first.double() - second.double()).abs().nan_to_num(nan=float("inf"))
    return float(distance.max())


def _cause(differences: _Differences, bound: float) -> str:
    over = [name for name, distance in differences.found.items() if distance > bound]
    ranked = [name for start, _ in _REASONS for name in over if name.startswith(start)]
    ranked += [name for name in over if name not in ranked]
    reason = next((text for start, text in _REASONS if ranked[0].startswith(start)), "")
    shown = "; ".join(differences.texts[name] for name in ranked[:3])
    more = f" ({len(ranked) - 3} more)" if len(ranked) > 3 else ""
    return (
        f"After the restart {shown}{more}. {reason or 'Part of the state is not saved.'} A run "
        "that is resumed would not be the run that was started: look at training/resume_state.py."
    )


def _ignore(row: object) -> None:
    """The resumed step is compared, not shown."""
    del row


def _failed(cause: str) -> Check:
    return Check(NAME, passed=False, value=None, bound=0.0, cause=cause)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
