"""`DataShape`: row lengths of a data folder and what its rows share, without a tokenizer.

Lengths in tokens are estimated from characters: a long row is taken at the most that chat text and
JSON need, a typical one at what they usually do.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import cast

from composer_replication.errors import DataError

LONG_TOKENS_PER_CHAR = 0.34
TYPICAL_TOKENS_PER_CHAR = 0.26
"""SmolLM2's tokenizer makes 0.22 to 0.30 tokens of a character of the shipped data."""

TEMPLATE_TOKENS = 32
"""A chat template's own system prompt and the opening of the answer."""
MESSAGE_TOKENS = 5


@dataclass(frozen=True, slots=True)
class RecordLengths:
    """Tokens of one kind of record.

    Example: `RecordLengths(200, 40, 0, 130)`.
    """

    longest_state: int = 0
    longest_action: int = 0
    longest_hint: int = 0
    typical_row: int = 0
    """State and action of the median record."""


@dataclass(frozen=True, slots=True)
class DataShape:
    """What of a data folder decides memory and time."""

    num_prompts: int
    prompts: RecordLengths
    hint_sites: RecordLengths
    pairs: RecordLengths
    tree_share: float
    """Tokens of the prefix tree of neighbouring records, for each token of their rows; at most 1.
    Rows of one record share its state, which this does not count."""


def shipped_data() -> Path:
    """The `api_drift` data in the package."""
    return Path(str(files("composer_replication.environments"))) / "data" / "api_drift"


def data_shape(folder: str | None) -> DataShape:
    """The lengths in a folder's `prompts`, `hint_sites` and `pairs`; None: the shipped data.

    Raises:
        DataError: no folder, no prompts, or a line that is no JSON object.
    """
    path = shipped_data() if folder is None else Path(folder).expanduser()
    if not (path / "prompts.jsonl").is_file():
        raise DataError(
            f"The data directory {path} has no prompts.jsonl, so the length of its rows is not "
            "known. Give a folder with prompts.jsonl, or leave data out for the shipped task."
        )
    prompts = list(_rows(path / "prompts.jsonl"))
    if not prompts:
        raise DataError(
            f"{path / 'prompts.jsonl'} has no line, so there is nothing to roll out. Give a folder "
            "with prompts, or leave data out for the shipped task."
        )
    sites = list(_rows(path / "hint_sites.jsonl"))
    pairs = list(_rows(path / "pairs.jsonl"))
    states = [_text(row.get("state")) for row in [*sites, *pairs]]
    return DataShape(
        num_prompts=len(prompts),
        prompts=prompt_lengths(prompts),
        hint_sites=_lengths(sites, "state", ("action",), hint="hint"),
        pairs=_lengths(pairs, "state", ("chosen", "rejected")),
        tree_share=_tree_share(states or [_text(row.get("prompt")) for row in prompts]),
    )


def prompt_lengths(rows: Sequence[Mapping[str, object]]) -> RecordLengths:
    """The lengths of rows that hold a `prompt`."""
    return _lengths(rows, "prompt", ())


def _rows(path: Path) -> Iterator[Mapping[str, object]]:
    if not path.is_file():
        return
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as text ({error}). Give a file in UTF-8 with one JSON object a "
            "line."
        ) from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}, is no JSON object, so its row has no length. Correct that "
                "line."
            )
        yield cast("Mapping[str, object]", row)


def _lengths(
    rows: Sequence[Mapping[str, object]],
    state_key: str,
    action_keys: tuple[str, ...],
    hint: str | None = None,
) -> RecordLengths:
    if not rows:
        return RecordLengths()
    states = [_messages(row.get(state_key)) for row in rows]
    fixed = [TEMPLATE_TOKENS + MESSAGE_TOKENS * len(state) for state in states]
    chars = [sum(map(len, state)) for state in states]
    actions = [max((len(_text(row.get(key))) for key in action_keys), default=0) for row in rows]
    hints = [len(_text(row.get(hint))) if hint else 0 for row in rows]
    typical = sorted(
        start + TYPICAL_TOKENS_PER_CHAR * (state + action)
        for start, state, action in zip(fixed, chars, actions, strict=True)
    )
    return RecordLengths(
        longest_state=max(start + _long(state) for start, state in zip(fixed, chars, strict=True)),
        longest_action=_long(max(actions)) + MESSAGE_TOKENS if action_keys else 0,
        longest_hint=_long(max(hints)) + MESSAGE_TOKENS if hint else 0,
        typical_row=round(typical[len(typical) // 2]),
    )


def _long(num_chars: int) -> int:
    return round(LONG_TOKENS_PER_CHAR * num_chars)


def _messages(value: object) -> list[str]:
    """The texts of a list of messages; a prompt that is one text is one message."""
    if not isinstance(value, list):
        return [_text(value)]
    return [_text(message) for message in cast("list[object]", value)]


def _text(value: object) -> str:
    """All text in a message, an action or a state, in order."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return "".join(map(_text, cast("Mapping[str, object]", value).values()))
    if isinstance(value, list):
        return "".join(map(_text, cast("list[object]", value)))
    return ""


def _tree_share(texts: Sequence[str]) -> float:
    """Characters of the trie of all texts over their sum, for a few neighbours at a time.

    Records that stand side by side were made from one trace; a step draws a few of them.
    """
    total = shared = 0
    for before, text in pairwise(texts):
        total += len(text)
        shared += _common_prefix(before, text)
    return 1.0 if total == 0 else 1.0 - shared / total


def _common_prefix(one: str, other: str) -> int:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
