"""`rollouts/step_000001.jsonl`: one readable line for each rollout of a step."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from composer_replication.runs.atomic_files import write_text_atomically
from composer_replication.runs.json_text import without_non_finite


def write_rollouts(folder: Path, step: int, rows: Iterable[Mapping[str, object]]) -> None:
    """Replace the file of `step`, whole or not at all; non-finite figures are null.

    Text stays as people read it, and a value that JSON cannot hold, such as an image in a prompt,
    is written as its `str`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps(without_non_finite(row), ensure_ascii=False, allow_nan=False, default=str)
        for row in rows
    )
    write_text_atomically(folder / f"step_{step:06d}.jsonl", "".join(f"{line}\n" for line in lines))
