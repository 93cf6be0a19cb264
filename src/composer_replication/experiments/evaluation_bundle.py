"""What an evaluation reads from this machine, packed so that it finds the same on another.

A model folder, the model of a run and an adapter travel with the call; the model of a run that was
trained on Modal and is too large for that is read from the volume where it was left. Relative paths
stay as they are, so that the result names what was given here.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from composer_replication.config.loading import dump_config, load_config
from composer_replication.config.run_config import RunConfig
from composer_replication.experiments.evaluated_model import (
    ADAPTER_FILE,
    base_of_adapter,
    check_evaluated_model,
    model_place,
)
from composer_replication.experiments.evaluation_data import is_run_folder
from composer_replication.launch.bundle import packed_folder, packed_module, refuse_too_much
from composer_replication.launch.job import MAX_FILE_BYTES, VOLUME_FOLDER
from composer_replication.launch.records import load_records
from composer_replication.planner.model_files import EMBEDDED_SPEC, model_settings
from composer_replication.planner.model_shape import model_shape
from composer_replication.training.embedded_model import default_cache_dir

_MODEL_SUFFIXES = {".json", ".safetensors", ".jinja", ".txt", ".model"}
"""Of a checkpoint's files those that hold the model; the others hold the state of its training."""

_TEACHER_FILE = "teacher.safetensors"


@dataclass(slots=True)
class PackedEvaluation:
    """What is to be named there, and the files behind it.

    Example: `pack_evaluation("runs/first", None, None, "api_drift", ...).files`.
    """

    model: str = ""
    against: str | None = None
    data: str | None = None
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])


def pack_evaluation(
    model: str,
    against: str | None,
    data: Path | None,
    task: str,
    *,
    runs: Path,
    on_note: Callable[[str], None],
) -> PackedEvaluation:
    """Everything that is on this machine and not on another.

    Args:
        model: as `evaluate` takes it.
        against: the model before.
        data: a data folder, or the directory of the run whose data is played; None: a shipped task.
        task: name of the environment; a module of the user's own travels too.
        runs: folder of runs, with the records of launched jobs.
        on_note: receives a sentence where something else stands in for what was given.

    Raises:
        ConfigError: what is too large to travel, or not there.
        ModelError: a model that cannot be loaded.
    """
    packer = _Packer(runs, on_note)
    packed = PackedEvaluation(files=packer.files)
    packed.model = packer.model(model, "model")
    packed.against = None if against is None else packer.model(against, "before")
    if data is not None:
        packed.data = packer.data(data)
    packer.files |= packed_module(task)
    refuse_too_much(packer.files)
    return packed


def larger_model(models: list[str]) -> str:
    """Of several models the one with the most parameters, as the planner takes it.

    Raises:
        ModelError: one whose configuration cannot be read.
    """
    specs: list[str] = []
    for given in models:
        place = model_place(given, lambda _: None)
        specs.append(base_of_adapter(place) or place)
    return max(specs, key=lambda spec: model_shape(model_settings(spec)).num_parameters)


class _Packer:
    """Collects files by their path below the working directory of the job."""

    def __init__(self, runs: Path, on_note: Callable[[str], None]) -> None:
        self.files: dict[str, bytes] = {}
        self._runs = runs
        self._on_note = on_note

    def model(self, given: str, name: str) -> str:
        """What the model is called there."""
        folder = Path(given).expanduser()
        if not folder.is_dir():
            return given
        target, option = _target(folder, name), "MODEL" if name == "model" else "--against"
        if not is_run_folder(given):
            self._model_folder(folder, target, option, lambda _: True)
            return target
        place = Path(model_place(given, self._on_note))
        job_id = self._job_of(folder)
        if job_id is not None and _num_bytes(place) > MAX_FILE_BYTES:
            self._on_note(f"{given} is read from the volume, as {job_id} left it there.")
            return f"{VOLUME_FOLDER}/{job_id}"
        self._model_folder(place, f"{target}/model", option, _holds_model)
        self._run_config(folder, target)
        return target

    def data(self, folder: Path) -> str:
        """What the data is called there, a run's own with the configuration that names it."""
        target = _target(folder.expanduser(), "data")
        if is_run_folder(str(folder)):
            self._run_config(folder.expanduser(), target, with_data=True)
        else:
            self.files |= packed_folder(folder.expanduser(), target, "--data")
        return target

    def _run_config(self, folder: Path, target: str, *, with_data: bool = False) -> None:
        """The run's configuration, its data under the path that it has there."""
        config = load_config(folder / "config.toml", [])
        if with_data:
            config = self._with_data(config)
        self.files[f"{target}/config.toml"] = dump_config(config).encode()

    def _with_data(self, config: RunConfig) -> RunConfig:
        if config.data is None:
            return config
        source = Path(config.data).expanduser()
        target = _target(source, "data")
        self.files |= packed_folder(source, target, "data")
        return config.model_copy(update={"data": target})

    def _model_folder(
        self, folder: Path, target: str, option: str, keeps: Callable[[Path], bool]
    ) -> None:
        """Weights, configuration and tokenizer; of an adapter the base too where that is here."""
        base = base_of_adapter(str(folder))
        is_here = base is None or Path(base).expanduser().is_dir()
        if is_here:
            check_evaluated_model(str(folder))
        self.files |= packed_folder(folder, target, option, keeps=keeps)
        if base is not None and is_here:
            self._base(Path(base).expanduser(), f"{target}/{ADAPTER_FILE}")

    def _base(self, base: Path, adapter_file: str) -> None:
        """The adapter names its base as it is called there."""
        if base.resolve().is_relative_to(default_cache_dir().resolve()):
            there = EMBEDDED_SPEC
        else:
            there = _target(base, "base")
            self.files |= packed_folder(base, there, "the adapter's base")
        adapter = json.loads(self.files[adapter_file])
        adapter["base_model_name_or_path"] = there
        self.files[adapter_file] = json.dumps(adapter, indent=2).encode()

    def _job_of(self, folder: Path) -> str | None:
        """The job on Modal whose run directory that is; None: it ran here."""
        found = [
            record.job_id
            for record in load_records(self._runs)
            if record.where == "modal" and Path(record.folder).resolve() == folder.resolve()
        ]
        return found[-1] if found else None


def _target(folder: Path, name: str) -> str:
    """A relative path stays; what lies elsewhere gets a folder under its own name."""
    if folder.is_absolute() or ".." in folder.parts or folder == Path():
        return f"{name}/{folder.resolve().name}"
    return folder.as_posix()


def _holds_model(path: Path) -> bool:
    return path.suffix in _MODEL_SUFFIXES and path.name != _TEACHER_FILE


def _num_bytes(folder: Path) -> int:
    paths = (path for path in folder.rglob("*") if path.is_file() and _holds_model(path))
    return sum(path.stat().st_size for path in paths)
