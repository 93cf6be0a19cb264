"""A train run is measured on held-out prompts between its steps, and trains as if it were not."""

import json

import pytest
from safetensors.torch import load_file

from composer_replication.cli import main
from composer_replication.experiments.heldout_evaluation import heldout_scores
from composer_replication.experiments.task_registry import write_task
from composer_replication.runs.summary import HeldoutScores

JUDGE = """
from composer_replication.environments.protocol import Observation

rewards = {"train": 0.0, "heldout": 2.2}

class ByLetters:
    def reset(self, split="", **row):
        self.split = split

    def _step_text(self, action):
        self.action = action
        return Observation("done", is_done=True)

    def get_reward(self):
        return sum(map(ord, self.action)) % 7 / 10

class Drifts(ByLetters):
    def get_reward(self):
        rewards[self.split] += {"train": 0.01, "heldout": -0.2}[self.split]
        return min(rewards[self.split], 1.0)
"""


@pytest.fixture
def config(tmp_path, tiny_model_dir, monkeypatch):
    """`config(every_steps=...)`: a file of a run of four steps."""
    write_task(tmp_path / "data", "call_format", num_episodes={"train": 8, "heldout": 5})
    (tmp_path / "heldout_judge.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)

    def write(**evaluation):
        keys = "\n".join(f"{key} = {value}" for key, value in evaluation.items())
        path = tmp_path / "c.toml"
        path.write_text(
            f"""
model = "{tiny_model_dir}"
data = "{tmp_path / "data"}"
[rollout]
environment = "heldout_judge:ByLetters"
max_action_tokens = 6
max_turns = 1
[grpo]
num_generations = 2
per_device_train_batch_size = 2
gradient_accumulation_steps = 2
max_completion_length = 8
max_steps = 4
save_steps = 3
learning_rate = 1e-3
bf16 = false
[evaluation]
{keys}
"""
        )
        return path

    return write


def rows(folder):
    return [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]


def test_it_is_played_before_between_and_after_and_changes_nothing(config, tmp_path, capsys):
    assert main(["train", str(config()), "--out", str(tmp_path / "plain")]) == 0
    assert not (tmp_path / "plain/heldout.jsonl").exists()
    assert json.loads((tmp_path / "plain/summary.json").read_text())["heldout"] is None
    path = config(every_steps=3, prompts=4)
    assert main(["train", str(path), "--out", str(tmp_path / "watched")]) == 0
    assert [row["step"] for row in rows(tmp_path / "watched")] == [0, 3, 4]
    assert {row["num_prompts"] for row in rows(tmp_path / "watched")} == {4}
    summary = json.loads((tmp_path / "watched/summary.json").read_text())
    assert summary["heldout"] == {
        "first": 0.0,
        "last": 0.0,
        "best": 0.0,
        "best_step": 0,
        "num_prompts": 4,
    }
    out = capsys.readouterr().out
    assert "held-out success 0% [0%, 49%], reward 0." in out
    plain, watched = (
        load_file(tmp_path / name / "model/model.safetensors") for name in ("plain", "watched")
    )
    assert all((plain[name] == watched[name]).all() for name in plain)
    # Its seconds are not a step's: a step's row is timed from its own beginning.
    metrics = (tmp_path / "watched/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2, 3, 4]


def test_a_resumed_run_plays_again_where_it_goes_on(config, tmp_path):
    path, run = config(every_steps=1, prompts=1), tmp_path / "run"
    assert main(["train", str(path), "--out", str(run)]) == 0
    whole = rows(run)
    (run / "summary.json").unlink()
    assert main(["train", str(path), "--out", str(run), "--resume"]) == 0
    again = rows(run)
    assert [row["step"] for row in again] == [row["step"] for row in whole]
    assert [row["reward"] for row in again] == [row["reward"] for row in whole]


def test_a_heldout_reward_that_falls_while_the_training_reward_rises_stops_the_run(
    config, tmp_path, capsys
):
    """The environment praises training prompts more and more, and held-out ones less and less."""
    path = config(every_steps=1, prompts=2)
    path.write_text(path.read_text().replace("ByLetters", "Drifts"))
    flags = ["--set", "grpo.max_steps=5", "--out", str(tmp_path / "run")]
    assert main(["train", str(path), *flags]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "Stopped at step 4 by guards.heldout_evaluations" in error
    assert "held-out reward fell from 1 at step 2 to 0.5 (standard error 0.063)" in error
    found = rows(tmp_path / "run")
    assert [row["reward"] for row in found] == pytest.approx([1, 1, 1, 0.7, 0.3])
    assert [row["reward_se"] for row in found] == pytest.approx([0, 0, 0, 0.1, 0.1])


def test_data_without_a_heldout_split_is_refused_before_the_model_loads(config, tmp_path, capsys):
    path = config(every_steps=1)
    for file in (tmp_path / "data/heldout").iterdir():
        file.unlink()
    (tmp_path / "data/heldout").rmdir()
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "has no heldout/ folder" in capsys.readouterr().err


def test_scores_name_the_first_last_and_best():
    made = [
        {"step": step, "success": success, "num_prompts": 8}
        for step, success in ((0, 0.0), (4, 0.75), (8, 0.75), (12, 0.5))
    ]
    assert heldout_scores(made) == HeldoutScores(0.0, 0.5, 0.75, 4, 8)
    assert heldout_scores([]) is None
