"""The command line as a process of its own beside a double of Modal, and what it leaves behind."""

import json
import os
import subprocess
import sys

from composer_replication.launch.ledger import Ledger
from composer_replication.launch.records import load_records


def cli(*arguments, platform=None, program=("-m", "composer_replication"), **environment):
    """The finished process of a command; `platform` gives it credentials for the double."""
    return subprocess.run(
        [sys.executable, *program, *arguments],
        env=environment_of(platform, **environment),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def environment_of(platform, **environment):
    """This process's own without credentials for Modal, or with those for the double."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MODAL_")}
    credentials = {} if platform is None else platform.client_environment()
    return {**inherited, "MODAL_CONFIG_PATH": "/nonexistent.toml", **environment, **credentials}


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
