"""Where the hints of `hint_effect` come from, and what is refused where they cannot tell."""

import json

import pytest

from composer_replication.cli import main
from composer_replication.experiments.run_data import shipped_data

SIZES = [
    "--steps", "2",
    "--set", "grpo.num_generations=2",
    "--set", "grpo.per_device_train_batch_size=2",
    "--set", "grpo.max_completion_length=24",
    "--set", "grpo.learning_rate=1e-3",
    "--set", "grpo.bf16=false",
    "--set", "beta_replay=0",
]  # fmt: skip


@pytest.fixture
def smoke(tiny_model_dir, tmp_path):
    """`smoke(environment, sites)` -> exit code and the run's folder."""

    def run(environment, sites):
        data, out = tmp_path / "data", tmp_path / "run"
        data.mkdir()
        prompts = (shipped_data() / "prompts.jsonl").read_text().splitlines()[:4]
        (data / "prompts.jsonl").write_text("\n".join(prompts))
        if sites:
            (data / "hint_sites.jsonl").write_text("\n".join(map(json.dumps, sites)))
        options = ["--model", str(tiny_model_dir), "--data", str(data), "--out", str(out), *SIZES]
        task = ["--set", f"rollout.environment=hinting_environment:{environment}"]
        return main(["smoke", *options, *task, "--set", "rollout.max_action_tokens=8"]), out

    return run


def site(hint):
    state = [{"role": "user", "content": "Read a.py."}]
    return {"state": state, "hint": hint, "action": '{"path": "a.py"}'}


def test_without_recorded_sites_the_hints_come_from_episodes_played_before_training(smoke):
    code, out = smoke("VariedHints", [])
    checks = {c["name"]: c for c in json.loads((out / "summary.json").read_text())["checks"]}
    assert code == 0
    assert checks["hint_effect"]["passed"]
    assert checks["token_alignment"]["passed"]


def test_episodes_that_give_one_hint_alone_are_an_error(smoke, capsys):
    code, _ = smoke("OneHint", [])
    assert code == 2
    assert "with 1 different hints" in capsys.readouterr().err


def test_data_with_one_hint_for_all_is_refused_before_the_model_loads(smoke, capsys, monkeypatch):
    def load(parts, on_progress):
        pytest.fail("the model was loaded")

    monkeypatch.setattr("composer_replication.experiments.smoke.load_run_model", load)
    code, _ = smoke("VariedHints", [site("Use file."), site("Use file."), site(" ")])
    assert code == 2
    error = capsys.readouterr().err
    assert "3 hint sites with 1 different hints" in error
    assert "set alpha_sdpo = 0" in error
