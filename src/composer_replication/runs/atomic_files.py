"""Writes that a reader sees whole or not at all, whenever the writer is killed."""

import errno
import os
import re
from pathlib import Path

from composer_replication.runs.process_age import is_alive

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write fails with where a disk, a quota or a volume is full."""


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8; until that succeeds the old content stays."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; until that succeeds the old content stays."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            # Without this a power cut can leave the new name on an empty file.
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_name(name: str) -> str:
    """The hidden name beside the target under which this process writes."""
    return f".{name}.{os.getpid()}.tmp"


def drop_torn_writes(folder: Path) -> None:
    """Remove what writers that live no more left in `folder` itself."""
    for entry in folder.iterdir():
        writer = re.fullmatch(r"\..+\.(\d+)\.tmp", entry.name)
        if writer and entry.is_file() and not is_alive(int(writer[1])):
            entry.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """True for what a killed writer may leave behind."""
    return name.startswith(".") and name.endswith(".tmp")
