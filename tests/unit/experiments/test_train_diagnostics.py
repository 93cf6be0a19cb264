"""`[diagnostics]` and `[guards]` of a run's file reach the trainer, and its run directory."""

import dataclasses
import json
from pathlib import Path

import pytest

from composer_replication.cli import main
from composer_replication.config.diagnostic_sections import DiagnosticsConfig, GuardsConfig
from composer_replication.config.run_config import RunConfig
from composer_replication.experiments.trainer_setup import composer_config
from composer_replication.runs.credit_files import read_credit
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.training.composer_config import ComposerConfig

ENVIRONMENT = """
from composer_replication.environments.protocol import Observation

class AlwaysTheSame:
    def reset(self, **row):
        pass

    def _step_text(self, action):
        return Observation("done", is_done=True)

    def get_reward(self):
        return 0.25
"""


def test_the_sections_defaults_are_the_trainers():
    defaults = {field.name: field.default for field in dataclasses.fields(ComposerConfig)}
    for section, prefix in ((DiagnosticsConfig(), ""), (GuardsConfig(), "guard_")):
        for name, value in section:
            assert defaults[f"{prefix}{name}"] == value, name
    ours = {name for name in defaults if name.startswith("guard_")}
    assert ours == {f"guard_{name}" for name in GuardsConfig.model_fields}


def test_every_key_reaches_the_trainers_settings(tmp_path):
    guards = {
        name: False if name == "enabled" else number
        for number, name in enumerate(GuardsConfig.model_fields, 3)
    }
    config = RunConfig.model_validate(
        {"diagnostics": {"gradients_every": 3, "credit_every": 7}, "guards": guards}
    )
    with RunDirectory.create(tmp_path / "run", resume=False) as run:
        args = composer_config(config, run, {}, reference_cache=Path("cache"))
    assert (args.gradients_every, args.credit_every) == (3, 7)
    assert args.credit_dir == str(tmp_path / "run" / "credit")
    for name, value in guards.items():
        assert getattr(args, f"guard_{name}") == value, name


def test_a_guard_ends_the_train_verb_with_its_files_kept(
    tmp_path, tiny_model_dir, monkeypatch, capsys
):
    (tmp_path / "same_environment.py").write_text(ENVIRONMENT)
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / "c.toml"
    config.write_text(
        f"""
model = "{tiny_model_dir}"
[rollout]
environment = "same_environment:AlwaysTheSame"
max_action_tokens = 6
max_turns = 1
[grpo]
num_generations = 2
per_device_train_batch_size = 2
max_completion_length = 16
max_steps = 5
save_steps = 1
bf16 = false
[diagnostics]
gradients_every = 1
credit_every = 2
[guards]
no_spread_steps = 3
"""
    )
    out = tmp_path / "out"
    assert main(["train", str(config), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "Stopped at step 3 by guards.no_spread_steps. Over steps 1 to 3 (3)" in error
    assert "(mean reward 0.25)" in error
    assert "The last checkpoint is checkpoint-2." in error
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "guards.no_spread_steps" in summary["error"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["grad_norm/grpo"] == 0
        assert row["grad_share/dpo"] == pytest.approx(1 - row["grad_share/sdpo"])
    assert [path.name for path in (out / "credit").iterdir()] == ["step_000002.jsonl"]
    assert {row["channel"] for row in read_credit(out / "credit" / "step_000002.jsonl")} == {
        "grpo",
        "sdpo",
        "dpo",
    }
