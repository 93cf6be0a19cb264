"""What a run reads from this machine, packed so that it finds the same on another."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composer_replication.config.run_config import RunConfig
from composer_replication.errors import ConfigError
from composer_replication.launch.job import MAX_FILE_BYTES
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
    moved = list(overrides)
    if config_path is not None:
        files[CONFIG_FILE] = config_path.read_bytes()
    if config.data is not None:
        files |= _folder(Path(config.data).expanduser(), DATA_FOLDER, "data")
        moved.append(f'data="{DATA_FOLDER}"')
    if config.model is not None and Path(config.model).expanduser().is_dir():
        files |= _folder(Path(config.model).expanduser(), MODEL_FOLDER, "model")
        moved.append(f'model="{MODEL_FOLDER}"')
    for name in (config.rollout.environment, config.rollout.reward):
        if name is not None and ":" in name:
            files |= _module(name.partition(":")[0].partition(".")[0])
    num_bytes = sum(len(content) for content in files.values())
    if num_bytes > MAX_FILE_BYTES:
        largest = max(files, key=lambda name: len(files[name]))
        raise ConfigError(
            f"The run reads {num_bytes / _BYTES_PER_MIB:.0f} MiB from this machine (the most is "
            f"{largest}), and {MAX_FILE_BYTES // _BYTES_PER_MIB} MiB travel with a remote run. Put "
            "the model on the Hugging Face hub and name it by its id, or use a smaller data folder."
        )
    sets = [part for override in moved for part in ("--set", override)]
    named = [CONFIG_FILE] if config_path is not None else []
    return Bundle((*named, *sets), files)


def _folder(folder: Path, target: str, key: str) -> dict[str, bytes]:
    if not folder.is_dir():
        raise ConfigError(
            f"{key} is {str(folder)!r}, which is no folder on this machine, so it cannot be sent. "
            "Check the path."
        )
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in paths)
    if size > MAX_FILE_BYTES:
        raise ConfigError(
            f"{key} is {str(folder)!r} of {size / _BYTES_PER_MIB:.0f} MiB, and "
            f"{MAX_FILE_BYTES // _BYTES_PER_MIB} MiB travel with a remote run. Put it on the "
            "Hugging Face hub, or use a smaller one."
        )
    return {f"{target}/{path.relative_to(folder)}": path.read_bytes() for path in paths}


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
