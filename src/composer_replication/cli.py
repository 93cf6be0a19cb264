"""The command line: one verb, one configuration file, one run directory, one answer.

Only the standard library is imported until a verb runs, so that `--help` answers at once.
"""

import argparse
import contextlib
import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from composer_replication.errors import (
    ComposerError,
    ConfigError,
    InputError,
    RunDirectoryError,
    nearest,
)

if TYPE_CHECKING:
    from rich.console import Console

    from composer_replication.config.run_config import RunConfig
    from composer_replication.runs.run_directory import RunDirectory
    from composer_replication.runs.summary import Summary

EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_STOPPED = 130
EXIT_CODES = {"passed": 0, "failed": EXIT_FAILED, "stopped": EXIT_STOPPED}
"""Exit code of each status of a summary."""

REEXECUTED_GUARD = "COMPOSER_REEXECUTED"
ALLOCATOR_SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""glibc and OpenMP read these when a process starts. With the first three freed pages are kept
instead of returned to the kernel, which made torch on CPU virtual machines 2.5 to 6 times faster.
With the last, threads that wait sleep: beside other busy processes spinning ones cost a factor of
4 to 10."""

RUNS_FOLDER = Path("runs")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_HELP = """\
usage: composer-replication VERB [CONFIG.toml] [--set KEY=VALUE ...] [--out DIR] [--resume] [--json]

Trains a small agent. One optimizer step minimises
  GRPO + alpha_sdpo * SDPO (hint self-distillation) + beta_replay * DPO (trace replay, our addition)

verbs:
  smoke    do the channels run end to end on my model; how much memory, how long a step
  train    the run that a configuration file describes
  doctor   what this machine can run, and what is missing

examples:
  composer-replication doctor
  composer-replication smoke
  composer-replication smoke configs/smoke_qwen2.5_0.5b.toml --set alpha_sdpo=0.2 --json
  composer-replication train configs/train_qwen2.5_7b.toml --out runs/first

exit codes: 0 done, 1 failed, 2 your input, 130 stopped with Ctrl-C
Each verb has its own help: composer-replication VERB --help
"""

_OPTION_HELP = {
    "--model": ("M", "Hugging Face id or local folder; sets model"),
    "--data": ("DIR", "folder of prompts, hint sites and pairs; sets data"),
    "--steps": ("N", "optimizer steps, at least 1; sets smoke.steps"),
    "--fixed-shapes": ("B,T", "B rows of T tokens at every step, nothing sampled; such as 2,1024"),
    "--set": ("KEY=VALUE", "set one key, such as sdpo.top_k=20; may be repeated"),
    "--out": ("DIR", "run directory; default runs/<name>, numbered where that is taken"),
    "--resume": (None, "go on in the run directory of --out, or in the latest of this name"),
    "--json": (None, "print the summary as one JSON object on stdout, all else on stderr"),
}


@dataclass(frozen=True, slots=True)
class _Verb:
    purpose: str
    options: tuple[str, ...]
    takes_config: bool
    needs_config: bool
    epilog: str


_SMOKE_EPILOG = """\
Writes runs/<name>/: config.toml, metrics.jsonl, summary.json, rollouts/. --resume runs it again
in the same folder. Where a key is given twice, options win over --set, and --set over the file.

examples:
  composer-replication smoke
  composer-replication smoke --model Qwen/Qwen2.5-0.5B-Instruct --steps 50
  composer-replication smoke --fixed-shapes 2,1024 --set beta_replay=0

exit codes: 0 every check passed, 1 a check or the run failed, 2 your input, 130 Ctrl-C"""

_TRAIN_EPILOG = """\
Writes runs/<name>/: config.toml, metrics.jsonl, summary.json, rollouts/, checkpoints/, model/.
--resume continues from the newest whole checkpoint, or starts where there is none; only the length
of the run and what is kept of it may have changed.

examples:
  composer-replication train configs/train_qwen2.5_7b.toml --out runs/first
  composer-replication train runs/first/config.toml --out runs/first --resume

exit codes: 0 done, 1 failed, 2 your input, 130 Ctrl-C"""

_DOCTOR_EPILOG = """\
Writes nothing.

exit codes: 0 ready, 1 something that a smoke needs is missing"""

_COMMON_OPTIONS = ("--set", "--out", "--resume", "--json")
_VERBS = {
    "smoke": _Verb(
        "Runs the three channels end to end and reports memory, step time and every check.",
        ("--model", "--data", "--steps", "--fixed-shapes", *_COMMON_OPTIONS),
        takes_config=True,
        needs_config=False,
        epilog=_SMOKE_EPILOG,
    ),
    "train": _Verb(
        "Trains the model that CONFIG.toml describes and saves it.",
        _COMMON_OPTIONS,
        takes_config=True,
        needs_config=True,
        epilog=_TRAIN_EPILOG,
    ),
    "doctor": _Verb(
        "Says what this machine can run, and what is missing.",
        ("--json",),
        takes_config=False,
        needs_config=False,
        epilog=_DOCTOR_EPILOG,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command and return its exit code.

    Args:
        argv: the arguments after the program's name; None: the process's own. Only then may the
            process be replaced by one with faster allocator settings.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] in (["--help"], ["-h"]):
        sys.stdout.write(_HELP)
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


class _Parser(argparse.ArgumentParser):
    """argparse with this project's errors instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. See '{self.prog} --help'.")


def _carry_out(arguments: list[str], *, may_reexecute: bool) -> tuple[str, int]:
    """The answer as JSON, for `--json`, and the exit code."""
    verb, options = _parse(arguments)
    if verb == "doctor":
        return _doctor(as_json=options.json)
    if may_reexecute:
        _reexecute_with_allocator_settings()
    return _compute(verb, options)


def _parse(arguments: list[str]) -> tuple[str, argparse.Namespace]:
    if not arguments or arguments[0] not in _VERBS:
        given = f"unknown verb {arguments[0]!r}" if arguments else "no verb was given"
        suggestion = nearest(arguments[0] if arguments else "", _VERBS)
        raise InputError(f"{given}. {suggestion} See 'composer-replication --help'.")
    name = arguments[0]
    verb = _VERBS[name]
    parser = _Parser(
        prog=f"composer-replication {name}",
        description=verb.purpose,
        epilog=verb.epilog,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
        allow_abbrev=False,
    )
    if verb.takes_config:
        nargs = None if verb.needs_config else "?"
        parser.add_argument("config", metavar="CONFIG.toml", nargs=nargs, type=Path)
    for option in verb.options:
        metavar, text = _OPTION_HELP[option]
        if metavar is None:
            parser.add_argument(option, action="store_true", help=text)
        elif option == "--set":
            parser.add_argument(option, action="append", default=[], metavar=metavar, help=text)
        else:
            convert = Path if option == "--out" else str
            parser.add_argument(option, metavar=metavar, help=text, type=convert)
    options, unknown = parser.parse_known_args(arguments[1:])
    if unknown:
        raise InputError(
            f"{name} does not take {unknown[0]!r}. {nearest(unknown[0], verb.options)} "
            f"See '{parser.prog} --help'."
        )
    return name, options


def _overrides(verb: str, options: argparse.Namespace) -> list[str]:
    """`--set` and the smoke's own options as overrides; the later ones win."""
    overrides: list[str] = list(options.set)
    if verb != "smoke":
        return overrides
    # JSON's quoting is TOML's, so that a path with '=' or quotes stays one text.
    if options.model is not None:
        overrides.append(f"model={json.dumps(options.model, ensure_ascii=False)}")
    if options.data is not None:
        overrides.append(f"data={json.dumps(options.data, ensure_ascii=False)}")
    if options.steps is not None:
        if not options.steps.isdecimal() or int(options.steps) == 0:
            raise InputError(
                f"--steps is {options.steps!r}; it counts optimizer steps and must be a whole "
                "number of at least 1. Write for example --steps 50."
            )
        overrides.append(f"smoke.steps={int(options.steps)}")
    if options.fixed_shapes is not None:
        sizes = options.fixed_shapes.split(",")
        if len(sizes) != 2 or not all(size.strip().isdecimal() for size in sizes):
            raise InputError(
                f"--fixed-shapes is {options.fixed_shapes!r}; it must be two whole numbers, B "
                "rows and T tokens, with a comma between. Write for example --fixed-shapes 2,1024."
            )
        overrides.append(f"smoke.fixed_shapes=[{int(sizes[0])}, {int(sizes[1])}]")
    return overrides


def _reexecute_with_allocator_settings() -> None:
    """Replace the process once by itself, with what the allocator reads only at its start."""
    import platform

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    has_settings = all(name in os.environ for name in ALLOCATOR_SETTINGS)
    if has_settings or REEXECUTED_GUARD in os.environ:
        return
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    environment = {**ALLOCATOR_SETTINGS, **os.environ, REEXECUTED_GUARD: "1"}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _compute(verb: str, options: argparse.Namespace) -> tuple[str, int]:
    """Run `smoke` or `train` in its run directory."""
    from rich.console import Console

    from composer_replication.config.loading import dump_config, load_config

    config = load_config(options.config, _overrides(verb, options))
    if verb == "smoke" and options.config is None:
        from composer_replication.experiments.smoke_defaults import with_smoke_defaults

        config = with_smoke_defaults(config)
    with _open_run(options, config.name) as run:
        if options.resume:
            _refuse_another_configuration(run, config)
        run.write_config(dump_config(config))
        console = Console(stderr=options.json)
        summary, code = _run_and_record(verb, config, run, console, options.resume)
    return summary.to_json(), code


def _open_run(options: argparse.Namespace, name: str) -> "RunDirectory":
    from composer_replication.runs.run_directory import RunDirectory
    from composer_replication.runs.run_folders import claim_folder, latest_folder

    try:
        if options.out is not None:
            folder = options.out
        elif options.resume:
            folder = latest_folder(RUNS_FOLDER, name)
        else:
            folder = claim_folder(RUNS_FOLDER, name)
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


def _run_and_record(
    verb: str, config: "RunConfig", run: "RunDirectory", console: "Console", is_resumed: bool
) -> "tuple[Summary, int]":
    """Run the verb; where it raises, `summary.json` says so and `error.txt` holds the traceback."""
    from composer_replication.runs.summary import Summary

    started_s = time.perf_counter()
    # What an earlier attempt left would be read as this one's end if this one is killed.
    for stale in (run.summary_path, run.error_path):
        stale.unlink(missing_ok=True)
    try:
        with _memory_explained(config):
            summary = _run_verb(verb, config, run, console, is_resumed)
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
    summary = Summary(status=status, error=text, model=config.model, total_s=total_s)
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
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
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


def _run_verb(
    verb: str, config: "RunConfig", run: "RunDirectory", console: "Console", is_resumed: bool
) -> "Summary":
    if verb == "smoke":
        from composer_replication.experiments.smoke import run_smoke

        # A smoke has no checkpoint to go on from: its rows start anew.
        run.truncate_metrics(last_step=-1)
        return run_smoke(config, run, console)
    from composer_replication.experiments.train import run_train

    return run_train(config, run, console, resume=is_resumed)


def _doctor(*, as_json: bool) -> tuple[str, int]:
    from rich.console import Console

    from composer_replication.experiments.doctor import doctor_summary, render_doctor, run_doctor
    from composer_replication.runs.json_text import to_json_text

    lines = run_doctor()
    if not as_json:
        render_doctor(lines, Console())
    answer = doctor_summary(lines)
    return to_json_text(answer, indent=2), 0 if answer["is_ok"] else EXIT_FAILED


def _ending(status: Literal["failed", "stopped"], text: str) -> str:
    from composer_replication.runs.summary import Summary

    return Summary(status=status, error=text).to_json()
