"""`main`: finds the verb, carries it out, and turns every error into a text and an exit code."""

import contextlib
import sys
from collections.abc import Sequence
from typing import Literal

from composer_replication.cli.process_settings import reexecute_with_allocator_settings
from composer_replication.cli.verb import (
    EXIT_FAILED,
    EXIT_INPUT,
    EXIT_STOPPED,
    Answer,
    find_verb,
    parse_options,
)
from composer_replication.cli.verbs import HELP, VERBS
from composer_replication.errors import ComposerError, InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command and return its exit code.

    Args:
        argv: the arguments after the program's name; None: the process's own. Only then may the
            process be replaced by one with faster allocator settings.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] in (["--help"], ["-h"]):
        sys.stdout.write(HELP)
        return 0
    as_json = "--json" in arguments
    answer_stream = sys.stdout
    try:
        # TRL and its callbacks print to stdout, where --json allows one object and nothing else.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            answer, code = _carry_out(arguments, may_reexecute=argv is None)
    except ComposerError as error:
        code = EXIT_INPUT if isinstance(error, InputError) else EXIT_FAILED
        sys.stderr.write(f"error: {error}\n")
        answer = _ending("failed", str(error)) if as_json else ""
    except KeyboardInterrupt:
        # Before the run directory was open: there is nothing to record it in.
        code, text = EXIT_STOPPED, "Ctrl-C before the run began. Nothing was written."
        sys.stderr.write(f"stopped: {text}\n")
        answer = _ending("stopped", text) if as_json else ""
    if as_json:
        answer_stream.write(answer + "\n")
    return code


def _carry_out(arguments: list[str], *, may_reexecute: bool) -> Answer:
    verb = find_verb(arguments, VERBS)
    options = parse_options(verb, arguments[1:])
    if verb.computes and may_reexecute:
        reexecute_with_allocator_settings()
    return verb.carry_out(options)


def _ending(status: Literal["failed", "stopped"], text: str) -> str:
    from composer_replication.runs.summary import Summary

    return Summary(status=status, error=text).to_json()
