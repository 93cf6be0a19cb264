"""JSON lines read strictly: UTF-8, one object a line, finite numbers, errors with their line."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from composer_replication.errors import DataError, shown

Row = dict[str, object]

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Line number, from 1, and object of every line that is not blank.

    Raises:
        DataError: a file that cannot be read or is not UTF-8, or a line that is not one object of
            finite numbers; it names the line.
    """
    # Not splitlines(): JSON texts may hold the line separators that only Unicode knows.
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if line.strip():
            yield number, _json_object(line, f"{path}, line {number}")


def read_utf8(path: Path) -> str:
    """The text of a file, without the byte order mark that some editors write.

    Raises:
        DataError: the file cannot be opened, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Give a readable file."
        ) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        looks_like = " It looks like UTF-16." if content.startswith(_UTF16_MARKS) else ""
        raise DataError(
            f"{path}, line {line}, is not UTF-8 (byte 0x{content[error.start]:02x}).{looks_like} "
            "Save the file as UTF-8."
        ) from error


def _json_object(line: str, where: str) -> Row:
    try:
        value = json.loads(line, parse_constant=_refuse_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        command = "jq -c '.[]'" if line.lstrip().startswith("[") else "jq -c ."
        raise DataError(
            f"{where}, is not JSON: {error.msg} at column {error.colno}. "
            f"Write one object a line; `{command}` does that to a whole file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}. Correct the value, or drop the row.") from error
    if not isinstance(value, dict):
        raise DataError(
            f"{where}, is {shown(value)}, and a row is an object. "
            "Write one object a line; `jq -c '.[]'` does that to a whole array."
        )
    return cast(Row, value)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number that training could use")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond the range of a float")
    return number
