"""The data of a run: prompts, hint sites and pairs of one folder, and the task they belong to."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeVar, cast

from composer_replication.errors import DataError
from composer_replication.traces.hints import HintSite, hint_site_from_row
from composer_replication.traces.pairs import PreferencePair, pair_from_row
from composer_replication.traces.trace import messages_from

DATA_SCHEMA = 1
Record = TypeVar("Record")
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class RunData:
    """What one run trains on.

    Example: `load_run_data(None).task` -> `"api_drift"`.
    """

    folder: Path
    task: str | None
    """The environment that the manifest names; None: a reward function must be given."""
    prompts: list[Row]
    """Rows with `prompt` and what the environment's `reset` takes."""
    hint_sites: list[HintSite]
    pairs: list[PreferencePair]


def load_run_data(folder: str | None) -> RunData:
    """Read `prompts.jsonl`, and `hint_sites.jsonl`, `pairs.jsonl`, `manifest.json` where present.

    Args:
        folder: a data directory; None: the `api_drift` data that ships with the package.

    Raises:
        DataError: a missing folder, no prompts, or a line that cannot be used; it names the line.
    """
    path = shipped_data() if folder is None else Path(folder)
    if not path.is_dir():
        raise DataError(
            f"The data directory {path} does not exist. Give a folder with prompts.jsonl, "
            "hint_sites.jsonl and pairs.jsonl, or leave data out for the shipped task."
        )
    prompts = _read(path / "prompts.jsonl", _prompt_row)
    if not prompts:
        raise DataError(
            f"{path} has no prompts.jsonl with at least one row, so GRPO has nothing to roll out. "
            'Add lines such as {"prompt": [{"role": "user", "content": "..."}]}.'
        )
    return RunData(
        folder=path,
        task=_task(path / "manifest.json"),
        prompts=prompts,
        hint_sites=_read(path / "hint_sites.jsonl", hint_site_from_row),
        pairs=_read(path / "pairs.jsonl", pair_from_row),
    )


def shipped_data() -> Path:
    """The folder of the `api_drift` data inside the installed package."""
    return Path(str(resources.files("composer_replication.environments") / "data" / "api_drift"))


def _prompt_row(row: Mapping[str, object], where: str) -> Row:
    prompt = row.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f"{where}: 'prompt' is {prompt!r}; it must be a list of chat messages.")
    messages_from(cast(list[Mapping[str, object]], prompt), where)
    return dict(row)


def _read(path: Path, parse: Callable[[Mapping[str, object], str], Record]) -> list[Record]:
    if not path.is_file():
        return []
    records: list[Record] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON ({error}). Write one object a line.") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} is {str(row)[:60]!r}; write one JSON object a line.")
        records.append(parse(cast(Row, row), where))
    return records


def _task(path: Path) -> str | None:
    if not path.is_file():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("schema") != DATA_SCHEMA:
        raise DataError(
            f"{path} has schema {manifest.get('schema')!r} and this version reads {DATA_SCHEMA}. "
            "Make the data again with this version."
        )
    return cast(str | None, manifest.get("task"))
