"""The command line beside a double of Modal, in this process or one of its own."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import modal.client

from composer_replication.cli import main
from composer_replication.launch.ledger import Ledger
from composer_replication.launch.records import load_records


def cli(*arguments, platform=None, program=None, **environment):
    """How a command ended; `platform` gives it credentials for the double.

    What only talks to Modal runs in this process, where all is imported already: that saves seconds
    a command. What trains here, or has a program of its own, is another process.
    """
    environment = environment_of(platform, **environment)
    if program is None and ("--on" in arguments or arguments[0] == "runs"):
        return _here(arguments, environment)
    return subprocess.run(
        [sys.executable, *(program or ("-m", "composer_replication")), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def _here(arguments, environment):
    stdout, stderr = io.StringIO(), io.StringIO()
    before, stdin = dict(os.environ), sys.stdin
    os.environ.clear()
    os.environ.update(environment)
    try:
        with (
            Path(os.devnull).open() as sys.stdin,
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
        ):
            code = main(arguments)
    finally:
        sys.stdin = stdin
        os.environ.clear()
        os.environ.update(before)
        forget_client()
    return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())


def forget_client():
    """Modal's client keeps its connection, with which the next double would not be asked."""
    if modal.client._Client._client_from_env is not None:
        modal.client.Client.from_env().close()


def environment_of(platform, **environment):
    """This process's own without credentials for Modal, or with those for the double."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MODAL_")}
    credentials = {} if platform is None else platform.client_environment()
    missing = {"MODAL_CONFIG_PATH": "/nonexistent.toml"}
    return {**inherited, **missing, **environment, **credentials}


def content_of(folder):
    """Every file but locks; of the summary what is neither cost nor a note on it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(".lock"):
            found[str(path.relative_to(folder))] = path.read_bytes()
    summary = json.loads(found.pop("summary.json"))
    found["summary"] = {k: v for k, v in summary.items() if k not in ("cost_usd", "notes")}
    return found


def ledger_of(workplace):
    (record,) = load_records(workplace / "runs")
    return record, Ledger(workplace / record.ledger)
