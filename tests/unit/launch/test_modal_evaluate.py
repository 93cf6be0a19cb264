"""`evaluate --on modal` against a double of Modal's API, with the real body on a tiny model."""

import json
import os
import shutil
import signal
import sys
import threading
import time

import pytest
import torch
from remote_cli import cli, content_of, ledger_of

from composer_replication.cli import main
from composer_replication.config.loading import dump_config
from composer_replication.config.run_config import RunConfig
from composer_replication.experiments import evaluation_bundle
from composer_replication.experiments.task_registry import write_task
from composer_replication.launch.records import LaunchRecord, save_record

TASK = ["--task", "call_format", "--episodes", "2", "--samples", "1"]


@pytest.fixture
def place(workplace, tiny_model_dir):
    """`tiny/` is a model, `first/` a run of it with data of its own in `rows/`."""
    shutil.copytree(tiny_model_dir, workplace / "tiny")
    shutil.copytree(tiny_model_dir, workplace / "first/model")
    write_task(workplace / "rows", "call_format", num_episodes={"train": 2, "heldout": 2})
    config = RunConfig(data="rows", rollout={"max_turns": 1, "max_action_tokens": 5})
    (workplace / "first/config.toml").write_text(dump_config(config))
    return workplace


@pytest.fixture
def remote(platform):
    # As many threads there as here: sums of floats depend on it.
    platform.environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    return platform


def evaluation_of(folder):
    """All that it left, but for seconds."""
    found = content_of(folder)
    report = json.loads(found.pop("evaluation.json"))
    report["total_s"] = 0
    for name in ("total_s", "median_step_s", "phases_s"):
        del found["summary"][name]
    for model in (report["model"], report["against"]):
        if model is not None:
            model["seconds"] = model["load_seconds"] = 0
    return found | {"report": report}


def test_a_remote_evaluation_finds_what_a_local_one_finds(remote, place, capsys):
    asked = ["evaluate", "first", "--against", "tiny", "--samples", "1"]
    assert main([*asked, "--out", "here"]) == 0
    done = cli(*asked, "--out", "there", "--on", "modal", "--yes", platform=remote)
    assert done.returncode == 0, done.stderr
    assert "no change shown" in done.stdout  # the table, as the container printed it
    assert evaluation_of(place / "there") == evaluation_of(place / "here")
    record, ledger = ledger_of(place)
    assert (record.verb, record.status, record.gpu) == ("evaluate", "passed", "L4")
    assert json.loads((place / "there/summary.json").read_text())["cost_usd"] == record.cost_usd
    assert ledger.total_usd() == record.cost_usd > 0
    assert remote.tags["verb"] == "evaluate"
    capsys.readouterr()
    assert main([*asked, "--out", "there", "--on", "modal", "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == "rows, heldout"
    assert len(remote.inputs) == 1  # finished, so neither asked nor paid for again


def test_a_container_that_dies_leaves_the_finished_model_to_the_next(remote, place):
    asked = ["evaluate", "tiny", "--against", "tiny", *TASK]
    assert main([*asked, "--out", "here"]) == 0
    volume = place / "modal/volumes/composer-replication-runs"

    def end_the_first():
        end = time.monotonic() + 120
        while not list(volume.glob("evaluate-*/figures_before.json")):
            assert time.monotonic() < end
            time.sleep(0.02)
        os.killpg(remote.inputs["fc-1"].process.pid, signal.SIGKILL)

    watcher = threading.Thread(target=end_the_first)
    watcher.start()
    done = cli(*asked, "--out", "there", "--on", "modal", "--yes", platform=remote)
    watcher.join()
    assert done.returncode == 0, done.stderr
    call = remote.inputs["fc-1"]
    assert call.num_containers == 2
    assert sum("tiny: loading" in line for line in call.lines) in (2, 3)
    assert any("tiny: measured before" in line for line in call.lines)
    assert evaluation_of(place / "there") == evaluation_of(place / "here")


def test_the_model_of_a_remote_run_that_is_too_large_to_travel_is_read_where_it_was_left(
    remote, place, monkeypatch
):
    monkeypatch.setattr(evaluation_bundle, "MAX_FILE_BYTES", 1)
    volume = place / "modal/volumes/composer-replication-runs"
    shutil.copytree(place / "first", volume / "first-3f2a1b")
    record = LaunchRecord(
        job_id="first-3f2a1b", verb="train", where="modal", folder="first", created_s=0.0
    )
    save_record(place / "runs", record)
    asked = ["evaluate", "first", "--samples", "1", "--out", "there", "--on", "modal", "--yes"]
    done = cli(*asked, "--json", platform=remote)
    assert done.returncode == 0, done.stderr
    assert "first is read from the volume, as first-3f2a1b left it there." in done.stderr
    report = json.loads(done.stdout)
    assert report["model"]["given"] == "remote-runs/first-3f2a1b"
    assert report["data"] == "rows, heldout"
    assert report["model"]["greedy"]["num_tokens"] <= 2 * 5  # the run's own limits


def test_the_plan_of_an_evaluation_is_shown_and_nothing_is_sent(place, capsys):
    asked = ["evaluate", "tiny", "--against", "tiny", *TASK, "--on", "modal", "--dry-run"]
    assert main(asked) == 0
    assert "2 models of" in capsys.readouterr().out
    limits = ["--set", "modal.timeout_s=600", "--set", "modal.retries=2", "--gpu", "L40S"]
    assert main([*asked, *limits, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"schema", "function", "plan", "worst_usd"}
    function = answer["function"]
    assert (function["gpu"], function["tags"]["verb"]) == ("L40S", "evaluate")
    assert (function["timeout_s"], function["retries"]) == (600, 2)
    assert not (place / "runs").exists()


REFUSALS = {
    "nobody to ask": ([], "Nobody is at a terminal to answer"),
    "over the cap": (["--yes", "--budget", "0.001"], "0.001"),
    "two cards": (["--yes", "--gpu", "L4:2"], "an evaluation computes on one card"),
    "a key of modal": (["--yes", "--set", "modal.timeot_s=3"], "Did you mean 'modal.timeout_s'?"),
    "too large": (
        ["--yes", "--against", "large"],
        "--against is 'large' of 65 MiB, and 64 MiB travel",
    ),
    "not in the image": (
        ["--yes", "--task", "reasoning_gym"],
        "which the image of a remote run leaves out",
    ),
    "no such model": (["--yes", "--against", "tinny"], "'tinny' is no model"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_sent_is_refused_before_modal_is_asked(place, name, capsys, monkeypatch):
    options, text = REFUSALS[name]
    if name == "too large":
        shutil.copytree(place / "tiny", place / "large")
        with (place / "large/other.bin").open("wb") as file:
            file.truncate(65 * 1024**2 - sum(p.stat().st_size for p in (place / "tiny").iterdir()))
    monkeypatch.setitem(sys.modules, "modal", None)
    assert main(["evaluate", "tiny", *TASK, "--on", "modal", *options]) == 2
    assert text in capsys.readouterr().err
    assert not (place / "runs").exists()
