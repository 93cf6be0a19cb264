"""`Verb` and `Option`: what a verb takes, as data, and the parser made of it."""

import argparse
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from composer_replication.errors import InputError, nearest

EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_STOPPED = 130

Answer = tuple[str, int]
"""The JSON that `--json` prints, and the exit code."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a verb; `kind` says what its value is."""

    flag: str
    metavar: str | None
    help: str
    kind: Literal["text", "path", "repeated", "switch"] = "text"


@dataclass(frozen=True, slots=True)
class Argument:
    """The argument that stands without a flag."""

    name: str
    metavar: str
    is_required: bool
    kind: Literal["text", "path"] = "path"


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb: its texts, what it takes, and what carries it out."""

    name: str
    summary: str
    """Its line in the list of verbs."""
    purpose: str
    epilog: str
    options: tuple[Option, ...]
    carry_out: Callable[[argparse.Namespace], Answer]
    argument: Argument | None = None
    second: Argument | None = None
    """One more argument after it."""
    rest: Argument | None = None
    """What follows `argument`, one or more of it."""
    computes: bool = True
    """Runs torch, and so wants the process settings."""


class _Parser(argparse.ArgumentParser):
    """argparse with this project's errors instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print before it exits."""
        raise InputError(f"{message}. See '{self.prog} --help'.")


def parse_options(verb: Verb, arguments: list[str]) -> argparse.Namespace:
    """What was given to a verb.

    Raises:
        InputError: an option it does not take, with the nearest one that it does.
    """
    parser = _Parser(
        prog=f"composer-replication {verb.name}",
        description=verb.purpose,
        epilog=verb.epilog,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
        allow_abbrev=False,
    )
    for argument in (verb.argument, verb.second):
        if argument is not None:
            parser.add_argument(
                argument.name,
                metavar=argument.metavar,
                nargs=None if argument.is_required else "?",
                type=Path if argument.kind == "path" else str,
            )
    if verb.rest is not None:
        parser.add_argument(verb.rest.name, metavar=verb.rest.metavar, nargs="+", type=Path)
    for option in verb.options:
        _add(parser, option)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [option.flag for option in verb.options]
        raise InputError(
            f"{verb.name} does not take {unknown[0]!r}. {nearest(unknown[0], flags)} "
            f"See '{parser.prog} --help'."
        )
    return options


def find_verb(arguments: list[str], verbs: Collection[Verb]) -> Verb:
    """The verb that the arguments begin with.

    Raises:
        InputError: none, or one that does not exist.
    """
    by_name = {verb.name: verb for verb in verbs}
    if not arguments or arguments[0] not in by_name:
        given = f"unknown verb {arguments[0]!r}" if arguments else "no verb was given"
        suggestion = nearest(arguments[0] if arguments else "", by_name)
        raise InputError(f"{given}. {suggestion} See 'composer-replication --help'.")
    return by_name[arguments[0]]


def whole_number(flag: str, text: str | None, *, default: int) -> int:
    """The value of an option that counts.

    Raises:
        InputError: not a whole number of at least 1.
    """
    if text is None:
        return default
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise InputError(
        f"{flag} is {text!r}; it counts and must be a whole number of at least 1. "
        f"Write for example {flag} {max(default, 2)}."
    )


def _add(parser: argparse.ArgumentParser, option: Option) -> None:
    if option.kind == "switch":
        parser.add_argument(option.flag, action="store_true", help=option.help)
    elif option.kind == "repeated":
        parser.add_argument(
            option.flag, action="append", default=[], metavar=option.metavar, help=option.help
        )
    else:
        convert = Path if option.kind == "path" else str
        parser.add_argument(option.flag, metavar=option.metavar, help=option.help, type=convert)


SET = Option(
    "--set", "KEY=VALUE", "set one key, such as sdpo.top_k=20; may be repeated", "repeated"
)
OUT = Option(
    "--out", "DIR", "run directory; default runs/<name>, numbered where that is taken", "path"
)
RESUME = Option(
    "--resume", None, "go on in the run directory of --out, or in the latest of this name", "switch"
)
JSON = Option(
    "--json", None, "print the summary as one JSON object on stdout, all else on stderr", "switch"
)
RUN_OPTIONS = (SET, OUT, RESUME, JSON)
"""Of every verb that fills a run directory."""
