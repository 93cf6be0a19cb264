"""The run directory: what it refuses, what it writes, and what a killed run leaves."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from composer_replication.errors import RunDirectoryError
from composer_replication.runs.run_directory import RUN_SCHEMA, RunDirectory
from composer_replication.runs.run_folders import claim_folder, latest_folder
from composer_replication.runs.summary import Summary

HOLDER = """
import sys, time
from pathlib import Path
from composer_replication.runs.run_directory import RunDirectory
run = RunDirectory.create(Path(sys.argv[1]), resume=False)
run.append_metrics({"step": 1, "loss": 0.5})
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    with RunDirectory.create(tmp_path / "run", resume=False) as opened:
        yield opened


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path / "held"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "held")], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_use_is_refused_and_its_holder_named(tmp_path, holder, resume):
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.create(tmp_path / "held", resume=resume)
    assert str(caught.value) == (
        f"{tmp_path / 'held'} is in use by process {holder.pid} on {socket.gethostname()}. "
        "Two runs in one folder would overwrite each other's files. Wait for it, end that "
        "process, or choose another --out."
    )


def test_a_killed_holder_releases_the_lock_and_leaves_a_readable_run(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with RunDirectory.create(tmp_path / "held", resume=True) as run:
        assert json.loads(run.metrics_path.read_text()) == {"step": 1, "loss": 0.5}


def test_closing_releases_the_lock(tmp_path):
    with RunDirectory.create(tmp_path, resume=False):
        pass
    RunDirectory.create(tmp_path, resume=True).close()


def test_a_foreign_folder_is_refused_and_left_untouched(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.create(tmp_path, resume=False)
    assert str(caught.value) == (
        f"{tmp_path} is not empty and is not a run directory (it holds 'thesis.tex'), so a run "
        "could overwrite what is there. Choose another --out."
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match="is a file; a run needs a folder"):
        RunDirectory.create(tmp_path / "file", resume=False)


def test_a_run_that_trained_a_step_needs_resume(tmp_path):
    with RunDirectory.create(tmp_path, resume=False) as run:
        run.append_metrics({"step": 1})
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.create(tmp_path, resume=False)
    assert str(caught.value) == (
        f"{tmp_path} already holds a run. A second one would mix with its files. "
        "Choose another --out, or continue that run with --resume."
    )
    # The refusal must not keep the lock.
    RunDirectory.create(tmp_path, resume=True).close()


def test_resume_starts_a_run_where_a_kill_came_before_its_first_file(tmp_path):
    """A preempted job is always told to resume."""
    with RunDirectory.create(tmp_path / "new", resume=True) as run:
        assert run.read_metrics() == []
    RunDirectory.create(tmp_path / "new", resume=True).close()


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_a_run_that_ended_before_its_first_result_gives_its_folder_to_the_next(tmp_path, status):
    """A refused configuration is corrected and the same command given again."""
    with RunDirectory.create(tmp_path, resume=False) as run:
        run.write_config("steps = 0")
        run.write_summary(Summary(status=status, error="steps is 0"))
        run.error_path.write_text("Traceback")
    RunDirectory.create(tmp_path, resume=False).close()


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts", "checkpoints", "model", "notes.txt"])
def test_a_folder_with_anything_a_run_or_a_user_left_there_is_taken(tmp_path, name):
    with RunDirectory.create(tmp_path, resume=False) as run:
        run.write_summary(Summary(status="failed", error="out of memory"))
    (tmp_path / name).touch()
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        RunDirectory.create(tmp_path, resume=False)


@pytest.mark.parametrize("text", ['{"status": "passed"}', "{", "[]"])
def test_a_summary_that_passed_or_cannot_be_read_keeps_its_folder(tmp_path, text):
    RunDirectory.create(tmp_path, resume=False).close()
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        RunDirectory.create(tmp_path, resume=False)


def test_a_start_that_was_killed_before_its_first_file_can_be_repeated(tmp_path):
    for leftover in (".lock", ".lock_owner.json", ".schema.json.77.tmp"):
        (tmp_path / leftover).touch()
    RunDirectory.create(tmp_path, resume=False).close()


def test_another_schema_version_is_refused(tmp_path):
    (tmp_path / "schema.json").write_text('{"schema": 99}')
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.create(tmp_path, resume=True)
    assert str(caught.value) == (
        f"{tmp_path} was written with schema 99 and this version reads {RUN_SCHEMA}. "
        "Resume it with the version that started it, or choose another --out."
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '"schema"'])
def test_an_unreadable_schema_file_is_refused(tmp_path, text):
    (tmp_path / "schema.json").write_text(text)
    with pytest.raises(RunDirectoryError, match="does not say a schema version"):
        RunDirectory.create(tmp_path, resume=True)


def test_json_files_carry_their_schema_and_null_for_nan(run):
    run.write_json("planned.json", {"peak_gib": float("nan"), "steps": 3})
    text = (run.path / "planned.json").read_text()
    assert json.loads(text) == {"schema": 1, "peak_gib": None, "steps": 3}
    assert text.startswith('{\n  "schema": 1,')


def test_metrics_are_readable_after_every_row(run):
    for step in (1, 2):
        run.append_metrics({"step": step, "loss": float("inf")})
        rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
        assert rows[-1] == {"step": step, "loss": None}
    assert len(rows) == 2


def test_a_metrics_row_without_its_step_is_a_bug(run):
    with pytest.raises(AssertionError, match="needs its step"):
        run.append_metrics({"loss": 1.0})


def test_truncation_drops_later_steps_and_a_torn_last_line(run):
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 4, "lo')
    run.truncate_metrics(last_step=2)
    assert run.metrics_path.read_text() == '{"step": 1}\n{"step": 2}\n'
    run.append_metrics({"step": 3})
    assert run.metrics_path.read_text().splitlines()[-1] == '{"step": 3}'


def test_truncation_keeps_a_whole_last_row_that_lost_its_line_break(run):
    run.metrics_path.write_text('{"step": 1}\n{"step": 2}')
    run.truncate_metrics(last_step=2)
    assert run.metrics_path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_truncation_of_a_run_without_metrics_does_nothing(run):
    run.truncate_metrics(last_step=5)
    assert not run.metrics_path.exists()


def test_a_torn_line_in_the_middle_is_refused(run):
    run.metrics_path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunDirectoryError, match=r"line 2, is not a metrics row"):
        run.truncate_metrics(last_step=3)


def test_rollouts_of_a_step_are_one_file_that_a_repeated_step_replaces(run):
    run.write_rollouts(12, [{"reward": 0.0}, {"reward": 1.0}])
    run.write_rollouts(12, [{"reward": 0.5, "advantage": float("nan")}])
    assert [path.name for path in run.rollouts_dir.iterdir()] == ["step_000012.jsonl"]
    text = (run.rollouts_dir / "step_000012.jsonl").read_text()
    assert text == '{"reward": 0.5, "advantage": null}\n'


def test_the_summary_and_configuration_land_under_their_names(run):
    run.write_config("seed = 1\n")
    run.write_summary(Summary(status="passed"))
    assert run.config_path.read_text() == "seed = 1\n"
    assert json.loads(run.summary_path.read_text())["status"] == "passed"
    assert [run.model_dir.name, run.checkpoints_dir.name] == ["model", "checkpoints"]


def test_a_taken_name_gets_the_next_number(tmp_path):
    names = [claim_folder(tmp_path, "smoke").name for _ in range(3)]
    assert names == ["smoke", "smoke-2", "smoke-3"]
    assert latest_folder(tmp_path, "smoke").name == "smoke-3"


def test_the_latest_folder_counts_numbers_and_ignores_longer_names(tmp_path):
    for name in ("smoke", "smoke-9", "smoke-10", "smoke-large"):
        (tmp_path / name).mkdir()
    assert latest_folder(tmp_path, "smoke").name == "smoke-10"
    assert latest_folder(tmp_path, "other").name == "other"


def test_what_killed_writers_left_is_gone_when_the_run_goes_on(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    with RunDirectory.create(tmp_path / "run", resume=False) as run:
        run.append_metrics({"step": 1})
        run.write_rollouts(1, [{"reward": 1.0}])
    torn = [run.path / f".metrics.jsonl.{dead.pid}.tmp", run.rollouts_dir / f".a.{dead.pid}.tmp"]
    kept = [run.path / f".summary.json.{os.getppid()}.tmp", run.path / f"a.{dead.pid}.tmp"]
    for path in (*torn, *kept):
        path.write_text("half")
    with pytest.raises(RunDirectoryError):
        RunDirectory.create(run.path, resume=False)
    assert all(path.exists() for path in torn)  # the folder that is refused stays as it is
    with RunDirectory.create(run.path, resume=True):
        assert not any(path.exists() for path in torn)
        assert all(path.exists() for path in kept)
