"""A verb in its run directory: opened, locked, and with an ending on record whatever happens."""

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from composer_replication.cli.verb import EXIT_FAILED, EXIT_INPUT, EXIT_STOPPED, Answer
from composer_replication.errors import (
    ComposerError,
    ConfigError,
    InputError,
    RunDirectoryError,
)
from composer_replication.runs.atomic_files import NO_ROOM

if TYPE_CHECKING:
    from rich.console import Console

    from composer_replication.config.run_config import RunConfig
    from composer_replication.runs.run_directory import RunDirectory
    from composer_replication.runs.summary import Summary

EXIT_CODES = {"passed": 0, "failed": EXIT_FAILED, "stopped": EXIT_STOPPED}
"""Exit code of each status of a summary."""

RUNS_FOLDER = Path("runs")


def carry_out_in_run(
    config: "RunConfig",
    options: argparse.Namespace,
    body: "Callable[[RunDirectory, Console], Summary]",
) -> Answer:
    """Open the run directory that the options name and run `body` in it.

    Args:
        config: of the run; written as `config.toml`, compared where a run is resumed.
        options: `out`, `resume` and `json`.
        body: what the verb does; its summary is the answer.

    Raises:
        RunDirectoryError: a folder that is in use or cannot be written.
        ConfigError: a resumed run whose configuration changed.
    """
    from rich.console import Console

    from composer_replication.config.loading import dump_config

    with open_run(options, config.name) as run:
        if options.resume:
            _refuse_another_configuration(run, config)
        run.write_config(dump_config(config))
        console = Console(stderr=options.json)
        summary, code = record_ending(
            run, lambda: body(run, console), model=config.model, config=config
        )
    return summary.to_json(), code


def open_run(options: argparse.Namespace, name: str) -> "RunDirectory":
    """The run directory that the options name, locked.

    Args:
        options: `out` and `resume`.
        name: of the run, where `out` is None.

    Raises:
        RunDirectoryError: a folder that is in use or cannot be written.
    """
    from composer_replication.runs.followed_run import FollowedRun
    from composer_replication.runs.run_directory import RunDirectory
    from composer_replication.runs.run_folders import claim_folder, latest_folder

    if int(os.environ.get("RANK", "0")) > 0 and options.out is not None:
        # Of several processes of one run the first has the lock and writes.
        return FollowedRun(options.out)
    from composer_replication.launch.records import refuse_launched

    try:
        if options.out is not None:
            folder = options.out
        elif options.resume:
            folder = latest_folder(RUNS_FOLDER, name)
        else:
            folder = claim_folder(RUNS_FOLDER, name)
        refuse_launched(RUNS_FOLDER, folder)
        return RunDirectory.create(folder, resume=options.resume)
    except OSError as error:
        raise RunDirectoryError(
            f"{options.out or RUNS_FOLDER} cannot be made or written: {error.strerror}. "
            "Choose another --out."
        ) from error


def _refuse_another_configuration(run: "RunDirectory", config: "RunConfig") -> None:
    """A resumed run is the run that was started, or its config.toml would not reproduce it."""
    from composer_replication.config.config_keys import changed_keys
    from composer_replication.config.loading import load_config

    if not run.config_path.exists():
        return
    changed = changed_keys(load_config(run.config_path, []), config)
    if changed:
        raise ConfigError(
            f"{run.path} was started with other values of {', '.join(changed)}. A run that changes "
            f"on the way cannot be reproduced. Resume with {run.config_path}, or start a new run "
            "with another --out."
        )


def record_ending(
    run: "RunDirectory",
    body: "Callable[[], Summary]",
    *,
    model: str | None,
    config: "RunConfig | None" = None,
) -> "tuple[Summary, int]":
    """Run the body; where it raises, `summary.json` says so and `error.txt` has the traceback.

    Args:
        run: open; it has its configuration.
        body: what the verb does, its summary written.
        model: for the summary of a run that failed.
        config: of a run that trains: where memory is short, the settings that need less are named.

    Returns:
        The summary and the exit code.
    """
    from composer_replication.runs.summary import Summary

    started_s = time.perf_counter()
    run.forget_ending()
    try:
        with contextlib.nullcontext() if config is None else _memory_explained(config):
            summary = body()
        return summary, EXIT_CODES[summary.status]
    except KeyboardInterrupt:
        status, code, text = "stopped", EXIT_STOPPED, f"Ctrl-C. {run.path} keeps what was done."
    except InputError as error:
        status, code, text = "failed", EXIT_INPUT, str(error)
    except Exception as error:
        status, code = "failed", EXIT_FAILED
        text = f"{_in_words(error, run)} {_keep_traceback(run)}".rstrip()
    sys.stderr.write(f"{'stopped' if status == 'stopped' else 'error'}: {text}\n")
    total_s = time.perf_counter() - started_s
    summary = Summary(status=status, error=text, model=model, total_s=total_s)
    # A disk that is full for the run is full for its summary; the text above has said why.
    with contextlib.suppress(OSError):
        run.write_summary(summary)
    return summary, code


@contextlib.contextmanager
def _memory_explained(config: "RunConfig") -> Iterator[None]:
    """A failed allocation becomes the user's input: what was held, and the setting that fits."""
    try:
        yield
    except ComposerError:
        raise
    except Exception as error:
        # It needs torch, so it is imported when an error has already ended the run.
        from composer_replication.training.out_of_memory import memory_limit_error

        explained = memory_limit_error(error, config)
        if explained is None:
            raise
        raise explained from error


def _in_words(error: Exception, run: "RunDirectory") -> str:
    if isinstance(error, ComposerError):
        return str(error)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return (
            f"{run.path} cannot be written any more ({error.strerror}), so the run stopped. What "
            "was written is whole. Free space, then go on with --resume."
        )
    return (
        f"unexpected {type(error).__name__}: {error}. "
        "It came from a library below, or is a bug of this one: please report that."
    )


def _keep_traceback(run: "RunDirectory") -> str:
    """Write the traceback of the error in hand and say where it is."""
    try:
        run.error_path.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        run.error_path.unlink(missing_ok=True)
        return ""
    return f"The traceback is in {run.error_path}."
