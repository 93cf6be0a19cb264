"""Reading one row of a data file or a dataset: keys, texts and numbers, or an error with its place.

A key that no record has is metadata and is left alone, unless it is most likely a known key
misspelt, or one whose values a file cannot carry.
"""

import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from composer_replication.errors import DataError, shown
from composer_replication.traces.trace import Message, messages_from

# 'hnit' and 'acton' are this close to 'hint' and 'action'; 'session' and 'split' are not.
_MISSPELT_FROM = 0.7


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Put the place of a row in front of what is wrong with it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def check_keys(
    row: Mapping[str, object], known: frozenset[str], refused: Mapping[str, str]
) -> None:
    """Refuse a misspelt key and the keys of `refused`, which maps each to its reason and remedy.

    Raises:
        DataError: it names the key, and the known one that was probably meant.
    """
    # A dataset's column is None in the rows that do not have it.
    absent = sorted(key for key in known if row.get(key) is None)
    for key, value in row.items():
        if key in known or value is None:
            continue
        if key in refused:
            raise DataError(f"the key {key!r} cannot come from a row. {refused[key]}")
        close = difflib.get_close_matches(key, absent, n=1, cutoff=_MISSPELT_FROM)
        if close:
            raise DataError(
                f"unknown key {key!r}. Did you mean {close[0]!r}, which the row lacks? "
                "Rename the key; a key of your own needs another name."
            )


def require_text(row: Mapping[str, object], key: str, default: str | None = None) -> str:
    """The text under `key`, or a `DataError` that says what is there instead.

    A missing key, or the None that a dataset's column holds for it, is `default` where one is
    given.
    """
    value = row.get(key)
    if value is None and default is not None:
        return default
    if key not in row:
        raise DataError(f"there is no {key!r} among its keys ({_keys(row)}). Add it, as text.")
    if not isinstance(value, str):
        raise DataError(f"{key!r} is {shown(value)}; it must be text. Write it in quotes.")
    return value


def require_state(row: Mapping[str, object], key: str = "state") -> tuple[Message, ...]:
    """The chat messages under `key`; never empty."""
    value = row.get(key)
    if key not in row:
        raise DataError(
            f"there is no {key!r} among its keys ({_keys(row)}). Add it: the list of chat messages "
            'before the action, such as [{"role": "user", "content": "..."}].'
        )
    if not isinstance(value, list | tuple) or not value:
        raise DataError(
            f"{key!r} is {shown(value)}; it must be a list of chat messages with at least one. "
            'Write it as [{"role": "user", "content": "..."}].'
        )
    return messages_from(value)


def require_number(row: Mapping[str, object], key: str, default: float) -> float:
    """The finite number under `key`; `default` where the key is missing or None."""
    value = row.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(
            f"{key!r} is {shown(value)}; it must be a finite number. Leave it out for {default:g}."
        )
    return float(value)


def _keys(row: Mapping[str, object]) -> str:
    return ", ".join(map(repr, sorted(row))) or "none"
