"""The exclusive lock of a run directory; the kernel releases it when its holder dies."""

import json
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from composer_replication.errors import RunDirectoryError
from composer_replication.runs.atomic_files import write_text_atomically

LOCK_FILE = ".lock"
OWNER_FILE = ".lock_owner.json"
"""Who holds the lock; a file of its own, since some lock implementations empty theirs."""


def take_lock(folder: Path) -> FileLock:
    """Lock `folder` for this process.

    Raises:
        RunDirectoryError: another process holds it; names its pid and host.
    """
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunDirectoryError(
            f"{folder} is in use by {_owner(folder)}. Two runs in one folder would overwrite each "
            "other's files. Wait for it, end that process, or choose another --out."
        ) from None
    owner = {"schema": 1, "pid": os.getpid(), "host": socket.gethostname()}
    write_text_atomically(folder / OWNER_FILE, json.dumps(owner) + "\n")
    return lock


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        # The holder writes the file just after it takes the lock.
        return "another process"
    return f"process {owner['pid']} on {owner['host']}"
