"""Checkpoint folders that are complete or absent, whenever their writer is killed.

A checkpoint is written aside in `.incoming`, its files are hashed and synced, and one rename makes
it `checkpoint-N`. What a killed writer leaves is therefore never taken for a checkpoint, and what
rots afterwards is found by its hashes.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import xxhash

from composer_replication.runs.atomic_files import write_text_atomically

MANIFEST_FILE = "complete.json"
"""Names every file of the checkpoint with its size and hash; written last."""

MANIFEST_SCHEMA = 1
STAGING_FOLDER = ".incoming"
_PREFIX = "checkpoint-"
_CHUNK_BYTES = 1 << 20


def staging_folder(parent: Path) -> Path:
    """Where the next checkpoint of `parent` is written until it is complete."""
    return parent / STAGING_FOLDER


def publish_checkpoint(staged: Path, parent: Path) -> Path:
    """Make the written folder `staged` (named `checkpoint-N`) a checkpoint of `parent`.

    A checkpoint of that name is replaced: a resumed run writes again what it could not read.

    Raises:
        OSError: the disk is full or cannot be synced; `parent` is as it was.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    facts = {str(path.relative_to(staged)): _size_and_hash(path) for path in files}
    manifest = json.dumps({"schema": MANIFEST_SCHEMA, "files": facts}, indent=1)
    write_text_atomically(staged / MANIFEST_FILE, manifest)
    for folder in {path.parent for path in files} | {staged}:
        _sync(folder)
    target = parent / staged.name
    if target.exists():
        # A folder cannot replace one that holds files; between these two renames there is none.
        target.rename(staged.with_name(f"replaced-{staged.name}"))
    staged.rename(target)
    _sync(parent)
    shutil.rmtree(staging_folder(parent), ignore_errors=True)
    return target


def checkpoint_defect(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, in words; None where every file is as it was written."""
    manifest_path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        files: dict[str, list[int | str]] = dict(manifest["files"])
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}, so it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST_FILE} is not readable ({error})"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes and was written with {size}"
        if _size_and_hash(path, sync=False)[1] != digest:
            return f"the content of {name} is not what was written"
    return None


def checkpoint_step(folder: Path) -> int:
    """The optimizer steps that a checkpoint's name says were done."""
    return int(folder.name.removeprefix(_PREFIX))


def checkpoint_folders(parent: Path) -> list[Path]:
    """Every folder that is named like a checkpoint, the newest step first."""
    folders = (path for path in parent.glob(f"{_PREFIX}*") if path.is_dir())
    named = [path for path in folders if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(named, key=checkpoint_step, reverse=True)


def newest_checkpoint(parent: Path, on_defect: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are whole; None where there is none.

    Args:
        parent: the run's `checkpoints/`.
        on_defect: told in a sentence of each newer one that cannot be used.
    """
    for folder in checkpoint_folders(parent):
        defect = checkpoint_defect(folder)
        if defect is None:
            return folder
        on_defect(f"{folder.name} cannot be used: {defect}. The one before it is tried.")
    return None


def _size_and_hash(path: Path, *, sync: bool = True) -> tuple[int, str]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        if sync:
            # The manifest must not reach the disk before what it vouches for.
            os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def _sync(folder: Path) -> None:
    """Make the names inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
