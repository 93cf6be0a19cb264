"""Checkpoint folders: complete or absent, and damage is found and named."""

import os
import signal
import subprocess
import sys

import pytest

from composer_replication.runs.checkpoint_folders import (
    checkpoint_defect,
    newest_checkpoint,
    publish_checkpoint,
    staging_folder,
)


def stage(parent, step, content=b"weights"):
    folder = staging_folder(parent) / f"checkpoint-{step}"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.bin").write_bytes(content)
    (folder / "deep" / "state.json").write_text("{}")
    return folder


@pytest.fixture
def parent(tmp_path):
    """A folder with the checkpoints of steps 2 and 10."""
    for step in (2, 10):
        publish_checkpoint(stage(tmp_path, step), tmp_path)
    return tmp_path


def test_a_published_checkpoint_is_whole_and_nothing_else_is_left(parent):
    assert sorted(path.name for path in parent.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    assert checkpoint_defect(parent / "checkpoint-10") is None
    assert (parent / "checkpoint-10" / "deep" / "state.json").read_text() == "{}"


def test_the_newest_is_the_one_of_the_highest_step(parent):
    assert newest_checkpoint(parent, pytest.fail) == parent / "checkpoint-10"


@pytest.mark.parametrize(
    ("damage", "defect"),
    [
        (lambda f: (f / "model.bin").write_bytes(b"weightz"), "content of model.bin is not what"),
        (lambda f: (f / "model.bin").write_bytes(b"weig"), "has 4 bytes and was written with 7"),
        (lambda f: (f / "deep" / "state.json").unlink(), "deep/state.json is missing"),
        (lambda f: (f / "complete.json").unlink(), "has no complete.json"),
        (lambda f: (f / "complete.json").write_text("{"), "complete.json is not readable"),
        (lambda f: (f / "complete.json").write_text("[]"), "complete.json is not readable"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(parent, damage, defect):
    damage(parent / "checkpoint-10")
    said = []
    assert newest_checkpoint(parent, said.append) == parent / "checkpoint-2"
    (sentence,) = said
    assert sentence.startswith("checkpoint-10 cannot be used: ")
    assert defect in sentence


def test_what_a_killed_writer_left_is_no_checkpoint(parent):
    stage(parent, 11)
    assert newest_checkpoint(parent, pytest.fail) == parent / "checkpoint-10"


def test_a_damaged_checkpoint_is_replaced_by_the_same_step_written_again(parent):
    (parent / "checkpoint-10" / "model.bin").write_bytes(b"broken!")
    publish_checkpoint(stage(parent, 10, b"new"), parent)
    assert checkpoint_defect(parent / "checkpoint-10") is None
    assert (parent / "checkpoint-10" / "model.bin").read_bytes() == b"new"
    assert not staging_folder(parent).exists()


def test_no_folder_and_foreign_folders_are_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path / "missing", pytest.fail) is None
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-3").touch()
    assert newest_checkpoint(tmp_path, pytest.fail) is None


WRITER = """
import sys
from pathlib import Path
from composer_replication.runs.checkpoint_folders import publish_checkpoint, staging_folder
parent = Path(sys.argv[1])
print("ready", flush=True)
for step in range(1, 100000):
    folder = staging_folder(parent) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in range(5):
        (folder / f"{name}.bin").write_bytes(b"x" * 200_000)
    publish_checkpoint(folder, parent)
    print(step, flush=True)
"""


def test_a_writer_killed_at_any_instant_leaves_only_whole_checkpoints(tmp_path):
    for delay in range(6):
        parent = tmp_path / str(delay)
        parent.mkdir()
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(parent)], stdout=subprocess.PIPE, text=True
        ) as writer:
            for _ in range(3 + delay):
                assert writer.stdout.readline()
            os.kill(writer.pid, signal.SIGKILL)
        folders = list(parent.glob("checkpoint-*"))
        assert len(folders) >= 2 + delay
        assert all(checkpoint_defect(folder) is None for folder in folders)
