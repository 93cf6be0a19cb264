"""What a checkpoint needs beyond TRL's: the teacher's weights and the loaders' positions."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file, save_file

from composer_replication.errors import DataError
from composer_replication.runs.atomic_files import write_text_atomically
from composer_replication.training.teacher import Teacher

TEACHER_FILE = "teacher.safetensors"
POSITIONS_FILE = "composer_state.json"


class Positioned(Protocol):
    """A loader whose place is one number."""

    position: int


def save_composer_state(
    folder: Path, teacher: Teacher | None, loaders: Mapping[str, Positioned]
) -> None:
    """Write both files into a checkpoint folder."""
    weights = {} if teacher is None else teacher.state()
    if weights:
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()}, folder / TEACHER_FILE
        )
    payload = {
        "schema": 1,
        "positions": {name: loader.position for name, loader in loaders.items()},
        "has_teacher": bool(weights),
    }
    write_text_atomically(folder / POSITIONS_FILE, json.dumps(payload))


def load_composer_state(
    folder: Path, teacher: Teacher | None, loaders: Mapping[str, Positioned]
) -> None:
    """Put both back.

    Raises:
        DataError: the checkpoint lacks what this run needs to go on as it was.
    """
    path = folder / POSITIONS_FILE
    if not path.is_file():
        raise DataError(
            f"The checkpoint {folder} has no {POSITIONS_FILE}, so the teacher and the data order "
            "cannot be restored. Resume from a checkpoint that this trainer wrote."
        )
    payload = json.loads(path.read_text())
    for name, loader in loaders.items():
        loader.position = int(payload["positions"].get(name, 0))
    if teacher is not None and teacher.state():
        if not payload["has_teacher"]:
            raise DataError(
                f"The checkpoint {folder} holds no teacher weights and this run's teacher needs "
                "them. Resume with the teacher setting of the first start."
            )
        teacher.load_state(load_file(folder / TEACHER_FILE))
