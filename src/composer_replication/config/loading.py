"""Reading a configuration: a TOML file, `--set` overrides on top, one error for all mistakes."""

import tomllib
from collections.abc import Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import cast

import tomlkit
from pydantic import ValidationError

from composer_replication.config.explain_errors import explain
from composer_replication.config.grpo_keys import section_problems
from composer_replication.config.run_config import RunConfig
from composer_replication.errors import ConfigError, listed

_Table = dict[str, object]


def load_config(path: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The configuration in `path`, or the defaults, with `a.b=value` overrides applied in order.

    Raises:
        ConfigError: a file that cannot be read, an override that cannot be parsed, or the list of
            every key and value that cannot work.
    """
    table = _read_toml(path) if path is not None else {}
    for override in overrides:
        _apply_override(table, override)
    try:
        config = RunConfig.model_validate(table)
    except ValidationError as error:
        source = str(path) if path is not None else "configuration"
        raise ConfigError(explain(error, table, source)) from None
    problems = section_problems(config.grpo)
    if problems:
        raise ConfigError(listed(problems))
    return config


def dump_config(config: RunConfig) -> str:
    """The configuration as TOML that loads as an equal one; keys that are None are left out."""
    return tomlkit.dumps(config.model_dump(mode="json", exclude_none=True))


def _read_toml(path: Path) -> _Table:
    try:
        # Some editors put a byte order mark in front, which is no TOML.
        return cast("_Table", tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist, so there is no configuration to read. "
            "Check the path; configs/ holds examples."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}. Give a TOML file.") from None
    except tomllib.TOMLDecodeError as error:
        # The parser's message ends with "(at line 3, column 5)".
        raise ConfigError(
            f"{path} is not valid TOML: {error}. Correct that line; text needs quotes in a file."
        ) from None


def _apply_override(table: _Table, override: str) -> None:
    key, separator, text = override.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not separator or not all(names):
        raise ConfigError(
            f"--set {override!r} names no key and value. Write --set KEY=VALUE, such as "
            "--set sdpo.top_k=20."
        )
    section = table
    for depth, name in enumerate(names[:-1], start=1):
        inner = section.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"--set {override!r}: {'.'.join(names[:depth])} is {inner!r}, which is a value "
                f"and has no keys. Set {'.'.join(names[:depth])} itself, or a key of a section."
            )
        section = cast("_Table", inner)
    section[names[-1]] = _parse_value(override, text.strip())


def _parse_value(override: str, text: str) -> object:
    """`text` as a TOML value; what is none is bare text, as shells take quotes away."""
    try:
        parsed = cast("_Table", tomllib.loads(f"value = {text}"))
    except tomllib.TOMLDecodeError as error:
        if not text:
            key = override.partition("=")[0]
            raise ConfigError(
                f"--set {override!r} gives {key} no value. Write --set {key}=VALUE, or leave it "
                "out for the default."
            ) from None
        if text[0] in "[{\"'":
            raise ConfigError(
                f"--set {override!r}: the value is not valid TOML: {error}. "
                "Quote the whole of it for the shell, such as --set 'smoke.fixed_shapes=[2, 1024]'."
            ) from None
        return text
    # A bare date is a name here, and a line break would add keys of its own.
    if len(parsed) > 1 or isinstance(parsed["value"], date | datetime | time):
        return text
    return parsed["value"]
