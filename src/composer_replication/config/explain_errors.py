"""pydantic's errors as one text: each key, the value given, why it cannot work, what to do."""

import difflib
from collections.abc import Mapping
from typing import cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from composer_replication.config.config_keys import known_keys
from composer_replication.errors import listed, nearest, shown

_REQUIREMENTS = {
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "text of the form {pattern}",
    "list_type": "an array",
    "tuple_type": "an array",
    "too_long": "an array of at most {max_length} items",
    "too_short": "an array with {min_length} or more items",
    "missing": "given",
    "dict_type": "a table of keys",
    "model_type": "a table of keys",
    "invalid-json-value": "text, a number, true or false, an array or a table",
}


def explain(error: ValidationError, table: Mapping[str, object], source: str) -> str:
    """One text for every problem in `table`, which was read from `source`."""
    return f"{source}: {listed(_problem_lines(error, table))}"


def _problem_lines(error: ValidationError, table: Mapping[str, object]) -> list[str]:
    # A union reports one error for each member, all for the same key: they become one line.
    by_key: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(_dotted_key(detail["loc"], table), []).append(detail)
    return [
        _problem_line(key, details)
        for key, details in by_key.items()
        # Where one item of an array is wrong, the union's other members have nothing to add.
        if not any(other.startswith(f"{key}[") for other in by_key)
    ]


def _problem_line(key: str, details: list[ErrorDetails]) -> str:
    detail = details[0]
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"]) if "ctx" in detail else detail["msg"]
    if detail["type"] == "extra_forbidden":
        return _unknown_key_line(key)
    wanted = " or ".join(_requirement(each) for each in details)
    if detail["type"] == "missing":
        return f"{key} is missing. {_description(key)} Write every item of the array."
    parts = [f"{key} is {shown(detail['input'])}; it must be {wanted}.", _description(key)]
    parts.append(f"Change it in the file or with --set {key.partition('[')[0]}=VALUE.")
    return " ".join(part for part in parts if part)


def _requirement(detail: ErrorDetails) -> str:
    text = _REQUIREMENTS.get(detail["type"])
    return detail["msg"] if text is None else text.format(**detail.get("ctx", {}))


def _unknown_key_line(key: str) -> str:
    known = known_keys()
    section, _, leaf = key.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    same_leaf = [name for name in sorted(known) if name.endswith(f".{leaf}")]
    close_leaf = difflib.get_close_matches(leaf, beside, n=1)
    if same_leaf:
        # The right key in the wrong section; `beta` is a key of two.
        suggestion = f"Did you mean {' or '.join(map(repr, same_leaf))}?"
    elif close_leaf:
        suggestion = f"Did you mean {beside[close_leaf[0]]!r}?"
    elif not section and difflib.get_close_matches(key, known, n=1):
        suggestion = nearest(key, known)
    else:
        suggestion = f"Known: {', '.join(sorted(beside.values()))}."
    line = f"unknown key {key!r}. {suggestion}"
    return line if section else f"{line} TRL's own settings go under [grpo]."


def _description(key: str) -> str:
    """The description of the key, or of the nearest table above it that has one."""
    known = known_keys()
    key = key.partition("[")[0]
    while key and key not in known:
        key = key.rpartition(".")[0]
    return known.get(key, "")


def _dotted_key(location: tuple[int | str, ...], table: Mapping[str, object]) -> str:
    """`smoke.fixed_shapes[0]` from pydantic's location, which also names members of unions."""
    key = ""
    value = cast("object", table)
    for part in location:
        if isinstance(part, int):
            key += f"[{part}]"
            value = dict(enumerate(cast("list[object]", value))).get(part)
        elif isinstance(value, dict):
            section = cast("dict[str, object]", value)
            if part in section:
                key += f".{part}" if key else part
                value = section[part]
    return key
