"""What a run reads from this machine, packed so that it finds the same on another."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tomlkit

from composer_replication.config.run_config import RunConfig
from composer_replication.errors import ConfigError
from composer_replication.launch.job import MAX_FILE_BYTES
from composer_replication.runs.atomic_files import write_text_atomically
from composer_replication.units import BYTES_PER_GIB

CONFIG_FILE = "config.toml"
DATA_FOLDER = "data"
MODEL_FOLDER = "model"

_BYTES_PER_MIB = BYTES_PER_GIB // 1024


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verb's arguments and the files that they name, both relative to a working directory.

    Example: `bundle(Path("run.toml"), [], config).arguments` -> `("config.toml",)`.
    """

    arguments: tuple[str, ...]
    files: dict[str, bytes]
    moved: Mapping[str, str] = field(default_factory=dict[str, str])
    """Keys of the configuration that name a path of the working directory there -> their own."""


def bundle(config_path: Path | None, overrides: Sequence[str], config: RunConfig) -> Bundle:
    """The configuration file, a data folder, a model folder, and modules of the user's own.

    Args:
        config_path: as it was given; None: none was.
        overrides: `KEY=VALUE`.
        config: what both give; its paths are those of this machine.

    Raises:
        ConfigError: files that are missing, or too large to travel with the call.
    """
    files: dict[str, bytes] = {}
    moved: dict[str, str] = {}
    if config_path is not None:
        files[CONFIG_FILE] = config_path.read_bytes()
    if config.data is not None:
        files |= packed_folder(Path(config.data).expanduser(), DATA_FOLDER, "data")
        moved["data"] = config.data
    if config.model is not None and Path(config.model).expanduser().is_dir():
        files |= packed_folder(Path(config.model).expanduser(), MODEL_FOLDER, "model")
        moved["model"] = config.model
    for name in (config.rollout.environment, config.rollout.reward):
        files |= packed_module(name)
    refuse_too_much(files)
    there = {"data": DATA_FOLDER, "model": MODEL_FOLDER}
    changes = [*overrides, *(f'{key}="{there[key]}"' for key in moved)]
    sets = [part for change in changes for part in ("--set", change)]
    named = [CONFIG_FILE] if config_path is not None else []
    return Bundle((*named, *sets), files, moved)


def name_own_paths(config_path: Path, moved: Mapping[str, str]) -> None:
    """Give the configuration of a run that came home the paths that it has here.

    Args:
        config_path: of the run; a run that never began has none.
        moved: of its `Bundle`.
    """
    if not moved or not config_path.exists():
        return
    document = tomlkit.parse(config_path.read_text(encoding="utf-8"))
    document.update(moved)
    write_text_atomically(config_path, tomlkit.dumps(document))


def refuse_too_much(files: Mapping[str, bytes]) -> None:
    """Files that together are too large to travel.

    Raises:
        ConfigError: they are.
    """
    num_bytes = sum(len(content) for content in files.values())
    if num_bytes > MAX_FILE_BYTES:
        largest = max(files, key=lambda name: len(files[name]))
        raise ConfigError(
            f"The run reads {num_bytes / _BYTES_PER_MIB:.0f} MiB from this machine (the most is "
            f"{largest}), and {MAX_FILE_BYTES // _BYTES_PER_MIB} MiB travel with a remote run. Put "
            "the model on the Hugging Face hub and name it by its id, or use a smaller data folder."
        )


def packed_folder(
    folder: Path, target: str, key: str, *, keeps: Callable[[Path], bool] = lambda _: True
) -> dict[str, bytes]:
    """The files of a folder, by the path below the working directory that they get.

    Args:
        folder: on this machine.
        target: its path there.
        key: what named it, for the error.
        keeps: whether a file of it travels.

    Raises:
        ConfigError: no such folder, or one that is too large to travel.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{key} is {str(folder)!r}, which is no folder on this machine, so it cannot be sent. "
            "Check the path."
        )
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and keeps(path))
    size = sum(path.stat().st_size for path in paths)
    if size > MAX_FILE_BYTES:
        raise ConfigError(
            f"{key} is {str(folder)!r} of {size / _BYTES_PER_MIB:.0f} MiB, and "
            f"{MAX_FILE_BYTES // _BYTES_PER_MIB} MiB travel with a remote run. Put it on the "
            "Hugging Face hub, or use a smaller one."
        )
    return {f"{target}/{path.relative_to(folder)}": path.read_bytes() for path in paths}


def packed_module(named: str | None) -> dict[str, bytes]:
    """The module of the user's own that `module:Name` names; nothing where none is named so."""
    if named is None or ":" not in named:
        return {}
    return _module(named.partition(":")[0].partition(".")[0])


def _module(name: str) -> dict[str, bytes]:
    """A module or package of the user's own; what is installed is left to the image."""
    installed = (sys.prefix, sys.base_prefix)
    for entry in (".", *sys.path):
        parent = Path(entry or ".").resolve()
        if str(parent).startswith(installed):
            continue
        if (parent / f"{name}.py").is_file():
            return {f"{name}.py": (parent / f"{name}.py").read_bytes()}
        if (parent / name / "__init__.py").is_file() and name != "composer_replication":
            package = parent / name
            paths = (path for path in package.rglob("*") if path.is_file())
            kept = (path for path in paths if "__pycache__" not in path.parts)
            return {f"{name}/{path.relative_to(package)}": path.read_bytes() for path in kept}
    return {}
