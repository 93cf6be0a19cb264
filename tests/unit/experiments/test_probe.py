"""`plan --probe`: ten real steps become the seconds that the plan states."""

import json
import tempfile

import pytest

from composer_replication.cli import main
from composer_replication.experiments import probe

CONFIG = """
model = "{model}"
[rollout]
environment = "hinting_environment:VariedHints"
max_action_tokens = 4
max_turns = 1
[grpo]
num_generations = 2
per_device_train_batch_size = 2
max_completion_length = 8
max_steps = 500
save_steps = 1
bf16 = false
"""


@pytest.fixture
def config(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(model=tiny_model_dir))
    return str(path)


def here(capsys):
    candidates = json.loads(capsys.readouterr().out)["candidates"]
    return next(c for c in candidates if c["where"] == "local" and c["gpu"] == "cpu")


def test_a_probe_states_the_median_of_its_ten_steps(config, tmp_path, monkeypatch, capsys):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    run_probe, probed = probe.run_probe, []
    monkeypatch.setattr(
        probe, "run_probe", lambda config: probed.append(run_probe(config)) or probed[-1]
    )
    train, summaries = probe.run_train, []
    monkeypatch.setattr(
        probe, "run_train", lambda *args: summaries.append(train(*args)) or summaries[-1]
    )
    assert main(["plan", config, "--on", "local", "--json"]) == 0
    unprobed = here(capsys)
    assert main(["plan", config, "--on", "local", "--probe", "--json"]) == 0
    low, expected, high = here(capsys)["step_s"]
    # Which is what lets it count alone beside earlier runs.
    assert [measured.is_probe for measured in probed] == [True]
    (summary,) = summaries
    assert summary.steps == probe.NUM_STEPS
    assert expected == pytest.approx(summary.median_step_s, rel=1e-2, abs=1e-3)
    assert (low, high) == pytest.approx((0.85 * expected, 1.15 * expected), rel=1e-2, abs=1e-3)
    assert unprobed["step_s"][2] > 1.5 * unprobed["step_s"][0]
    # Neither a run directory nor a checkpoint stays behind.
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "runs").exists()
