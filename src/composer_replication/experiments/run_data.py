"""The data of a run: prompts, hint sites and pairs of one folder, and the task they belong to."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Generic, TypeVar, cast

from composer_replication.errors import DataError, shown
from composer_replication.traces.hints import SITE_KEYS, HintSite, hint_site_from_row
from composer_replication.traces.json_lines import Row, json_rows, read_utf8
from composer_replication.traces.pairs import PAIR_KEYS, PreferencePair, pair_from_row
from composer_replication.traces.row_reading import check_keys, placed, require_state

DATA_SCHEMA = 1
PROMPTS_FILE = "prompts.jsonl"
SITES_FILE = "hint_sites.jsonl"
PAIRS_FILE = "pairs.jsonl"
Record = TypeVar("Record")


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
    lines: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """For each file the line of every record."""
    notes: list[str] = field(default_factory=list[str])
    """What was read and is not used."""

    def place(self, file: str, index: int) -> str:
        """Where a record stands, such as `data/pairs.jsonl, line 3`."""
        return f"{self.folder / file}, line {self.lines[file][index]}"

    def lack_of(self, file: str) -> str:
        """Why there is no record of that kind, as the end of a sentence."""
        if (self.folder / file).is_file():
            return f"{self.folder / file} has no row"
        others = sorted(path.name for path in self.folder.glob("*.jsonl"))
        return f"{self.folder} has no {file} (it has {', '.join(others)})"


def load_run_data(folder: str | None) -> RunData:
    """Read `prompts.jsonl`, and `hint_sites.jsonl`, `pairs.jsonl`, `manifest.json` where present.

    Args:
        folder: a data directory; None: the `api_drift` data that ships with the package.

    Raises:
        DataError: a missing folder, no prompts, or a line that cannot be used; it names the line.
    """
    path = shipped_data() if folder is None else Path(folder).expanduser()
    if not path.is_dir():
        problem = "is a file, not a folder" if path.exists() else "does not exist"
        raise DataError(
            f"The data directory {path} {problem}. Give a folder with {PROMPTS_FILE}, "
            f"{SITES_FILE} and {PAIRS_FILE}, or leave data out for the shipped task."
        )
    prompts = _read(path / PROMPTS_FILE, _prompt_row)
    if not prompts.records:
        raise DataError(
            f"{path} has no {PROMPTS_FILE} with at least one row, so GRPO has nothing to roll out. "
            'Add lines such as {"prompt": [{"role": "user", "content": "..."}]}.'
        )
    sites = _read(path / SITES_FILE, hint_site_from_row, SITE_KEYS)
    pairs = _read(path / PAIRS_FILE, pair_from_row, PAIR_KEYS)
    return RunData(
        folder=path,
        task=_task(path / "manifest.json"),
        prompts=prompts.records,
        hint_sites=sites.records,
        pairs=pairs.records,
        lines={PROMPTS_FILE: prompts.lines, SITES_FILE: sites.lines, PAIRS_FILE: pairs.lines},
        notes=[*sites.notes, *pairs.notes],
    )


def shipped_data() -> Path:
    """The folder of the `api_drift` data inside the installed package."""
    return Path(str(resources.files("composer_replication.environments") / "data" / "api_drift"))


def _prompt_row(row: Mapping[str, object], where: str) -> Row:
    with placed(where):
        check_keys(row, frozenset({"prompt"}), {})
        messages = require_state(row, "prompt")
        if messages[-1].role == "assistant":
            raise DataError(
                f"the prompt ends with an assistant turn, {messages[-1].content[:60]!r}; the model "
                "takes the next turn itself. Drop that turn, or make a hint site or a pair of it."
            )
    return dict(row)


@dataclass(slots=True)
class _FileContent(Generic[Record]):
    records: list[Record] = field(default_factory=list[Record])
    lines: list[int] = field(default_factory=list[int])
    notes: list[str] = field(default_factory=list[str])


def _read(
    path: Path,
    parse: Callable[[Mapping[str, object], str], Record],
    known: frozenset[str] | None = None,
) -> _FileContent[Record]:
    """The records of a file; keys beside `known` are noted, unless None: all are read."""
    content: _FileContent[Record] = _FileContent()
    if not path.is_file():
        return content
    unread: dict[str, int] = {}
    for number, row in json_rows(path):
        content.records.append(parse(row, f"{path}, line {number}"))
        content.lines.append(number)
        for key in row.keys() - known if known is not None else ():
            unread[key] = unread.get(key, 0) + 1
    if unread:
        keys = ", ".join(f"{key!r} ({unread[key]} rows)" for key in sorted(unread))
        content.notes.append(f"{path.name} has keys that nothing reads: {keys}.")
    return content


def _task(path: Path) -> str | None:
    if not path.is_file():
        return None
    example = '{"schema": 1, "task": "api_drift"}'
    try:
        manifest = json.loads(read_utf8(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not JSON ({error}). Write it as {example}, or remove it."
        ) from error
    if not isinstance(manifest, dict):
        raise DataError(
            f"{path} holds {shown(manifest)}, and a manifest is an object. Write it as {example}."
        )
    fields = cast(Row, manifest)
    if fields.get("schema") != DATA_SCHEMA:
        raise DataError(
            f"{path} has schema {fields.get('schema')!r} and this version reads {DATA_SCHEMA}. "
            "Make the data again with this version."
        )
    task = fields.get("task")
    if task is not None and not isinstance(task, str):
        raise DataError(
            f"{path}: 'task' is {shown(task)}; it names an environment. Write it as {example}."
        )
    return task
