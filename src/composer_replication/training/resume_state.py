"""What a checkpoint needs beyond TRL's own files to go on as if nothing had happened.

`composer_state.json` holds the loaders' positions, `teacher.safetensors` the teacher's weights, and
`composer_rank_R.pt` what rank R would lose inside a generation: TRL's micro-batch counter, the
rollouts it buffered for the steps to come, and the plan of the extra channels for them.
"""

import json
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Protocol, cast

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from composer_replication.errors import DataError
from composer_replication.runs.atomic_files import write_text_atomically
from composer_replication.runs.checkpoint_folders import checkpoint_defect
from composer_replication.training.channel_plan import MicroBatch
from composer_replication.training.composer_config import ComposerConfig
from composer_replication.training.generation_plan import GenerationPlanner
from composer_replication.training.record_loader import records_fingerprint
from composer_replication.training.teacher import Teacher

TEACHER_FILE = "teacher.safetensors"
STATE_FILE = "composer_state.json"
STATE_SCHEMA = 2

# Prompts hashed from either end of the data set: enough to tell another one, at any size.
_HASHED_PROMPTS = 1000


class ResumableRun(Protocol):
    """The parts of `ComposerReplicationTrainer` that a checkpoint holds or is checked against."""

    accelerator: Accelerator
    planner: GenerationPlanner | None
    teacher: Teacher | None
    num_iterations: int
    _step: int
    _buffered_inputs: list[dict[str, Tensor]] | None
    _plan: list[MicroBatch]
    _finished_passes: int

    @property
    def _composer_args(self) -> ComposerConfig: ...

    @property
    def train_dataset(self) -> object:
        """Rows with the prompts."""
        ...


def save_run_state(run: ResumableRun, folder: Path) -> None:
    """Add our files to a checkpoint folder; every rank calls this."""
    _save_generation_phase(run, folder)
    if not run.accelerator.is_main_process:
        return
    weights = {} if run.teacher is None else run.teacher.state()
    if weights:
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()}, folder / TEACHER_FILE
        )
    loaders = {} if run.planner is None else run.planner.loaders()
    payload = {
        "schema": STATE_SCHEMA,
        "positions": {name: loader.position for name, loader in loaders.items()},
        "fingerprints": _fingerprints(run),
        "has_teacher": bool(weights),
        "num_processes": run.accelerator.num_processes,
    }
    write_text_atomically(folder / STATE_FILE, json.dumps(payload))


def load_run_state(run: ResumableRun, folder: Path) -> None:
    """Put back what `save_run_state` wrote.

    Raises:
        DataError: the checkpoint is damaged, lacks what this run needs to go on as it was, or was
            written with other records or another number of processes.
    """
    payload = _read_state(folder)
    if payload["num_processes"] != run.accelerator.num_processes:
        raise DataError(
            f"The checkpoint {folder} was written by {payload['num_processes']} processes and "
            f"{run.accelerator.num_processes} resume it, which would deal rollouts and records out "
            "differently. Resume with as many processes."
        )
    saved = cast(dict[str, str], payload["fingerprints"])
    for name, fingerprint in _fingerprints(run).items():
        if saved.get(name) != fingerprint:
            raise DataError(
                f"The checkpoint {folder} was written with other {name} than this run has, so its "
                "place in them means nothing. Resume with the data of the first start, or start a "
                "new run."
            )
    if run.planner is not None:
        positions = cast(dict[str, int], payload["positions"])
        for name, loader in run.planner.loaders().items():
            loader.position = positions[name]
    if run.teacher is not None and run.teacher.state():
        if not payload["has_teacher"]:
            raise DataError(
                f"The checkpoint {folder} holds no teacher weights and this run's teacher needs "
                "them. Resume with the teacher setting of the first start."
            )
        run.teacher.load_state(load_file(folder / TEACHER_FILE))
    _load_generation_phase(run, folder)
    run._finished_passes = int(json.loads((folder / "trainer_state.json").read_text())["epoch"])


def skip_passes(sampler: object, num_passes: int) -> None:
    """Move a shuffling sampler past whole passes over the data.

    TRL's sampler shuffles each pass with one generator that starts from the seed, so a run resumed
    in its second pass would see the first one's order again.
    """
    generator = getattr(sampler, "generator", None)
    if generator is not None:
        for _ in range(num_passes):
            torch.randperm(sampler.num_samples, generator=generator)  # pyright: ignore


def _save_generation_phase(run: ResumableRun, folder: Path) -> None:
    generate_every = int(run._composer_args.steps_per_generation or 1) * run.num_iterations
    is_within = run._step % generate_every != 0 and run._buffered_inputs is not None
    payload = {
        "micro_step": run._step,
        "buffered_inputs": run._buffered_inputs if is_within else None,
        "plan": [
            {"tensors": dict(part.tensors), "step_counts": part.step_counts}
            for part in (run._plan if is_within else [])
        ],
    }
    torch.save(payload, _rank_file(run, folder))


def _load_generation_phase(run: ResumableRun, folder: Path) -> None:
    payload = torch.load(_rank_file(run, folder), map_location="cpu", weights_only=True)
    run._step = payload["micro_step"]
    run._plan = [MicroBatch(part["tensors"], part["step_counts"]) for part in payload["plan"]]
    buffered = cast(list[dict[str, Tensor]] | None, payload["buffered_inputs"])
    device = run.accelerator.device
    # TRL leaves a count and unused keys as they are; only tensors live on a device.
    run._buffered_inputs = buffered and [
        {k: v.to(device) if isinstance(v, Tensor) else v for k, v in part.items()}
        for part in buffered
    ]


def _read_state(folder: Path) -> dict[str, object]:
    path = folder / STATE_FILE
    if not path.is_file():
        raise DataError(
            f"The checkpoint {folder} has no {STATE_FILE}, so the teacher and the data order "
            "cannot be restored. Resume from a checkpoint that this trainer wrote."
        )
    defect = checkpoint_defect(folder)
    if defect is not None:
        raise DataError(
            f"The checkpoint {folder} cannot be used: {defect}. Resume from the one before it."
        )
    payload = cast(dict[str, object], json.loads(path.read_text()))
    if payload["schema"] != STATE_SCHEMA:
        raise DataError(
            f"{path} has schema {payload['schema']} and this version reads {STATE_SCHEMA}. Resume "
            "with the version that wrote it."
        )
    return payload


def _fingerprints(run: ResumableRun) -> dict[str, str]:
    """Hashes of the records that a place in them is meant for."""
    known = {} if run.planner is None else dict(run.planner.fingerprints)
    rows = run.train_dataset
    if isinstance(rows, Sized):
        known["prompts"] = records_fingerprint(_ends(rows))
    return known


def _ends(rows: Sized) -> Iterator[object]:
    num_rows = len(rows)
    yield num_rows
    for index in range(num_rows):
        if index < _HASHED_PROMPTS or index >= num_rows - _HASHED_PROMPTS:
            yield rows[index]  # pyright: ignore


def _rank_file(run: ResumableRun, folder: Path) -> Path:
    return folder / f"composer_rank_{run.accelerator.process_index}.pt"
