"""`bench/evidence.py`: which runs it makes, and that no two processes make the same one."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from composer_replication.experiments import evidence as experiment

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
bench = importlib.import_module("evidence")


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Runs that were made, by the stand-in for training."""
    keys = []

    def run(which, runs_dir, say):
        keys.append(which.key)
        return {"seed": which.seed}

    monkeypatch.setattr(experiment, "run_evidence", run)
    monkeypatch.setattr(bench, "finished", lambda folder: {p.stem for p in folder.glob("*.json")})
    monkeypatch.setattr(bench, "write_page", lambda results, docs: None)
    return keys


def call(monkeypatch, tmp_path, *flags):
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    which = ["--only", "task=call_format", "--only", "arm=grpo", "--only", "seed=7,8"]
    monkeypatch.setattr(sys, "argv", ["evidence.py", *folders, *which, *flags])
    return bench.main()


def test_what_is_missing_is_made_once_and_no_more_than_asked(monkeypatch, tmp_path, made):
    assert call(monkeypatch, tmp_path, "--max-runs", "1") == 0
    assert made == ["call_format-grpo-s7"]
    assert json.loads((tmp_path / f"results/{made[0]}.json").read_text())["seed"] == 7
    assert call(monkeypatch, tmp_path) == 0
    assert made == ["call_format-grpo-s7", "call_format-grpo-s8"]


def test_a_run_that_another_process_makes_is_left_to_it(monkeypatch, tmp_path, made, capsys):
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs/call_format-grpo-s7.lock"):
        assert call(monkeypatch, tmp_path, "--max-runs", "1") == 0
    assert made == ["call_format-grpo-s8"]
    assert "call_format-grpo-s7 is being made by another process" in capsys.readouterr().out
