"""`train --on modal` against a double of Modal's API, with real training of a tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fake_modal import fake_modal
from remote_cli import cli, ledger_of

from composer_replication.cli import main
from composer_replication.runs.step_rows import without_measurements

CONFIG = """
name = "tiny"
model = "tiny"
[grpo]
num_generations = 2
per_device_train_batch_size = 2
max_completion_length = 12
learning_rate = 1e-3
max_steps = 4
save_steps = 1
bf16 = false
[rollout]
environment = "hinting_environment:VariedHints"
max_action_tokens = 6
[modal]
retries = 3
"""
ENVIRONMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def place(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ENVIRONMENTS)
    monkeypatch.setenv("COMPOSER_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_model_dir, tmp_path / "tiny")
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path


def result_of(run):
    """All that must not depend on where it was trained or how often it was stopped."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "rows": [without_measurements(row) for row in rows],
        # A kill in the middle of a write leaves its temporary file.
        "rollouts": {path.name: path.read_text() for path in (run / "rollouts").glob("step_*")},
        "model": (run / "model/model.safetensors").read_bytes(),
        "summary": {name: summary[name] for name in ("status", "checks", "steps", "channels")},
    }


def test_a_preempted_training_ends_as_one_at_the_desk(place):
    # As many threads there as here: sums of floats depend on it.
    both = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ENVIRONMENTS)}
    assert main(["train", "run.toml", "--out", "here"]) == 0
    with fake_modal(place / "modal", both) as platform:
        platform.preemptions = [(2, 0.0)]
        there = cli("train", "run.toml", "--on", "modal", "--out", "there", "--yes",
                    platform=platform, **both)  # fmt: skip
        assert there.returncode == 0, there.stdout + there.stderr
        assert platform.inputs["fc-1"].num_containers == 2
    expected = result_of(place / "here")
    assert len(expected["rows"]) == 4
    assert {"loss/grpo", "loss/sdpo", "loss/dpo"} <= expected["rows"][0].keys()
    found = result_of(place / "there")
    for name, value in expected.items():
        assert found[name] == value, f"{name} differs"
    record, ledger = ledger_of(place)
    assert (record.status, ledger.total_usd()) == ("passed", record.cost_usd)
