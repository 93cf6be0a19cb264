"""What a kill, a finished run and a full disk do to a training run."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from composer_replication.cli import main

CONFIG = """
model = "{model}"
[grpo]
num_generations = 4
per_device_train_batch_size = 4
max_completion_length = 40
learning_rate = 1e-3
bf16 = false
save_steps = 2
max_steps = {steps}
lr_scheduler_type = "constant"
[rollout]
environment = "letters_environment:EvenLetters"
max_action_tokens = 8
"""


@pytest.fixture
def config(tiny_model_dir, tmp_path):
    """`config(steps)` writes a training configuration and returns its path."""

    def write(steps):
        path = tmp_path / "train.toml"
        path.write_text(CONFIG.format(model=tiny_model_dir, steps=steps))
        return str(path)

    return write


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_kills_at_random_instants_change_nothing():
    script = Path(__file__).parents[2] / "bench" / "kill_resume.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "4", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] >= 4
    assert result["kills_after_a_checkpoint"] > 0
    assert result["all_equal"] is True


def test_a_finished_run_is_not_trained_further_when_it_is_resumed(config, tmp_path):
    out = tmp_path / "run"
    assert main(["train", config(3), "--out", str(out)]) == 0
    rows, model = rows_of(out), (out / "model" / "model.safetensors").read_bytes()
    (out / "model" / "model.safetensors").unlink()  # as if killed while it was saved
    (out / "summary.json").unlink()
    assert main(["train", config(3), "--out", str(out), "--resume"]) == 0
    assert rows_of(out) == rows
    assert (out / "model" / "model.safetensors").read_bytes() == model
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["status"] == "passed"
    assert summary["median_step_s"] == pytest.approx(sum(r["step_s"] for r in rows[1:]) / 2)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(config, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", config(4), "--out", str(out)]) == 0
    model = (out / "model" / "model.safetensors").read_bytes()
    damaged = out / "checkpoints" / "checkpoint-4" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(["train", config(4), "--out", str(out), "--resume"]) == 0
    said = capsys.readouterr().out
    assert "checkpoint-4 cannot be used: model.safetensors has" in said
    assert "resumed from step 2" in said
    assert [row["step"] for row in rows_of(out)] == [1, 2, 3, 4]
    assert (out / "model" / "model.safetensors").read_bytes() == model


def test_a_disk_that_takes_no_checkpoint_stops_the_run_in_words(config, tmp_path):
    """The kernel refuses files above 1 MB, as a full disk refuses the rest of one."""
    out = tmp_path / "run"
    arguments = ["train", config(2), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", "from composer_replication.cli import main; import sys; "
         f"sys.path.insert(0, {str(Path(__file__).parent)!r}); sys.exit(main({arguments!r}))"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    error = done.stderr[done.stderr.index("error: ") :]
    assert error.startswith("error: The checkpoint of step 2 could not be written")
    assert "File too large" in error
    assert "There is none before it" in error
    assert "go on with --resume" in error
    assert [row["step"] for row in rows_of(out)] == [1, 2]
    assert not list((out / "checkpoints").glob("checkpoint-*"))
    assert json.loads((out / "summary.json").read_text())["status"] == "failed"
