"""Whole runs of the verbs on a tiny model: files, figures, exit codes, reruns, resume."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer_replication.cli import main
from composer_replication.runs.step_rows import without_measurements
from composer_replication.training.trl_hooks import GRPOTrainer

TASK = [
    "--set", "rollout.environment=letters_environment:EvenLetters",
    "--set", "grpo.num_generations=4",
    "--set", "grpo.per_device_train_batch_size=4",
    "--set", "grpo.max_completion_length=40",
    "--set", "grpo.learning_rate=1e-3",
    "--set", "grpo.bf16=false",
    "--set", "rollout.max_action_tokens=8",
]  # fmt: skip


def smoke(model, out, *options):
    return main(["smoke", "--model", str(model), "--out", str(out), *TASK, *options])


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def results_of(out):
    return [without_measurements(row) for row in rows_of(out)]


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tmp_path_factory):
    """One finished smoke of three steps."""
    out = tmp_path_factory.mktemp("runs") / "first"
    code = smoke(tiny_model_dir, out, "--steps", "3")
    return code, out


def test_a_smoke_passes_and_writes_the_whole_run_directory(finished):
    code, out = finished
    assert code == 0
    names = {path.name for path in out.iterdir()}
    assert {"config.toml", "metrics.jsonl", "summary.json", "rollouts", "model"} <= names
    # The resume check's checkpoint and second run are no products.
    assert not {"checkpoints", "resume_check"} & names
    assert sorted(path.name for path in (out / "rollouts").iterdir()) == [
        f"step_{step:06d}.jsonl" for step in (1, 2, 3)
    ]


def test_every_step_has_a_row_under_the_documented_names(finished):
    rows = rows_of(finished[1])
    assert [row["step"] for row in rows] == [1, 2, 3]
    names = {
        "loss", "loss/grpo", "loss/sdpo", "loss/dpo", "tokens/grpo", "tokens/sdpo", "pairs/dpo",
        "grad_norm", "step_s", "peak_gib", "reward", "reward_std", "frac_reward_zero_std",
        "entropy", "completions/mean_length", "rewards/margins",
    }  # fmt: skip
    for row in rows:
        assert names <= row.keys()
        assert row["tokens/sdpo"] > 0
        assert row["loss/sdpo"] > 0
    assert rows[0]["loss/dpo"] == pytest.approx(0.693147, abs=1e-4)


def test_the_summary_holds_the_notes_figures_and_no_zero_stands_for_unknown(finished):
    summary = json.loads((finished[1] / "summary.json").read_text())
    assert summary["status"] == "passed"
    assert {check["name"] for check in summary["checks"]} == {
        "channels_live/grpo", "channels_live/sdpo", "channels_live/dpo", "parameters_moved",
        "hint_effect", "dpo_reference", "gradient_rows", "token_alignment", "zero_weight_parity",
        "packed_parity",
        "resume",
    }  # fmt: skip
    assert summary["steps"] == 3
    assert 0 < summary["median_step_s"] <= summary["p95_step_s"] <= summary["total_s"]
    assert 0 < summary["peak_gib"] <= summary["peak_gib_max_shape"]
    phases_s = summary["phases_s"]
    assert {"load", "rollout", "step", "save", "checks", "resume", "cold_start"} <= phases_s.keys()
    assert phases_s["download"] == 0
    assert 0 < phases_s["rollout"] < phases_s["step"]
    assert set(summary["channels"]) == {"grpo", "sdpo", "dpo"}
    assert any("top_k = 100" in note for note in summary["notes"])
    assert summary["cost_usd"] is None
    assert 0 < summary["peak_tensor_gib"] < summary["peak_gib_max_shape"]


def test_the_saved_model_loads_as_it_is_and_has_moved(finished, tiny_model_dir):
    folder = finished[1] / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert model.config.model_type == "llama"
    saved = load_file(folder / "model.safetensors")
    start = load_file(tiny_model_dir / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert float((saved[name] - start[name]).abs().max()) > 0


def test_rerunning_the_resolved_configuration_gives_the_same_numbers(finished, tmp_path):
    code = main(["smoke", str(finished[1] / "config.toml"), "--out", str(tmp_path / "again")])
    assert code == 0
    assert results_of(tmp_path / "again") == results_of(finished[1])


def test_json_prints_the_summary_and_nothing_else_on_stdout(tiny_model_dir, tmp_path, capsys):
    code = smoke(tiny_model_dir, tmp_path / "run", "--steps", "1", "--json")
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["steps"] == 2
    assert any("the resume check needs the second" in note for note in summary["notes"])
    assert code == 0
    assert "median step" in captured.err


def test_fixed_shapes_sample_nothing_and_fill_every_row(tiny_model_dir, tmp_path, monkeypatch):
    def generate(*arguments, **options):
        pytest.fail("something was sampled")

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)
    out = tmp_path / "run"
    options = ("--steps", "2", "--fixed-shapes", "4,96", "--set", "grpo.max_completion_length=32")
    # Without the environment: nothing is sampled, so nothing is judged.
    code = main(["smoke", "--model", str(tiny_model_dir), "--out", str(out), *TASK[2:-2], *options])
    assert code == 0
    rows = rows_of(out)
    assert [row["tokens/grpo"] for row in rows] == [4 * 32, 4 * 32]
    assert all(row["num_tokens"] == 4 * 96 * step for step, row in enumerate(rows, 1))
    assert rows[0]["loss/dpo"] == pytest.approx(0.693147, abs=1e-4)
    summary = json.loads((out / "summary.json").read_text())
    assert any("Fixed shapes" in note for note in summary["notes"])
    assert 0 < summary["peak_tensor_gib"] < summary["peak_gib"]


def test_a_channel_switched_off_leaves_no_trace(tiny_model_dir, tmp_path):
    out = tmp_path / "run"
    code = smoke(tiny_model_dir, out, "--steps", "2", "--set", "beta_replay=0")
    assert code == 0
    for row in rows_of(out):
        assert "loss/dpo" not in row
        assert "loss/sdpo" in row
    assert not (out / "reference_logps").exists()
    summary = json.loads((out / "summary.json").read_text())
    assert "DPO is off: dpo_reference is not checked." in summary["notes"]


@pytest.mark.parametrize(
    "options",
    [
        ["teacher=live", "batch.channel_schedule=alternate", "sdpo.hint_placement=user_turn"],
        ["teacher=frozen", "grpo.bf16=true"],
        ["lora.r=4", "lora.dropout=0.1", "grpo.steps_per_generation=2", "grpo.beta=0.05",
         "sdpo.top_k=20", "sdpo.tail=true"],
        ["alpha_sdpo=0"],
        ["grpo.gradient_accumulation_steps=2", "grpo.gradient_checkpointing=true"],
    ],
    ids=",".join,
)  # fmt: skip
def test_every_kind_of_run_passes_its_own_checks(tiny_model_dir, tmp_path, options):
    settings = [word for option in options for word in ("--set", option)]
    code = smoke(tiny_model_dir, tmp_path / "run", "--steps", "2", *settings)
    checks = json.loads((tmp_path / "run/summary.json").read_text())["checks"]
    assert [check["name"] for check in checks if not check["passed"]] == []
    assert code == 0


def test_the_checks_leave_the_run_as_it_is_without_them(finished, tiny_model_dir, tmp_path):
    config = finished[1] / "config.toml"
    options = ("--out", str(tmp_path / "train"), "--set", "grpo.max_steps=3")
    assert main(["train", str(config), *options, "--set", 'grpo.save_strategy="no"']) == 0
    assert results_of(tmp_path / "train") == results_of(finished[1])
    for step in (1, 2, 3):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (tmp_path / "train" / name).read_text() == (finished[1] / name).read_text()


def test_a_random_state_that_a_checkpoint_loses_is_found_by_the_rollouts(
    tiny_model_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(GRPOTrainer, "_load_rng_state", lambda self, folder: None)
    assert smoke(tiny_model_dir, tmp_path / "run", "--steps", "2") == 1
    assert "check resume: inf" in capsys.readouterr().out
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_task_without_reward_spread_fails_with_its_cause(tiny_model_dir, tmp_path, capsys):
    """A random model never writes JSON, so every reward of api_drift is equal."""
    code = main(
        ["smoke", "--model", str(tiny_model_dir), "--out", str(tmp_path / "run"), *TASK[2:],
         "--steps", "1"]
    )  # fmt: skip
    assert code == 1
    assert "no advantage differs from 0" in capsys.readouterr().out


def test_training_resumes_and_the_rows_equal_an_uninterrupted_run(tiny_model_dir, tmp_path):
    config = tmp_path / "train.toml"
    config.write_text(
        f'model = "{tiny_model_dir}"\n[grpo]\nnum_generations = 4\n'
        "per_device_train_batch_size = 4\nmax_completion_length = 40\nlearning_rate = 1e-3\n"
        'bf16 = false\nsave_steps = 2\nmax_steps = 4\nlr_scheduler_type = "constant"\n'
        '[rollout]\nenvironment = "letters_environment:EvenLetters"\nmax_action_tokens = 8\n'
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(["train", str(config), "--out", str(whole)]) == 0
    halfway = ["train", str(config), "--out", str(stopped), "--set", "grpo.max_steps=2"]
    assert main(halfway) == 0
    assert main(["train", str(config), "--out", str(stopped), "--resume"]) == 0
    first, second = results_of(whole), results_of(stopped)
    for row in (*first, *second):
        row.pop("epoch")
    assert second == first
    assert (stopped / "model/model.safetensors").is_file()
    summary = json.loads((whole / "summary.json").read_text())
    assert 0 < summary["peak_tensor_gib"] < summary["peak_gib"]
    assert {"cold_start", "download", "load", "rollout", "step", "save"} == set(summary["phases_s"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "smollm2-136m"], "Did you mean 'smollm2-135m'"),
        (["--model", "shape:qwen2.5-0.6b"], "Did you mean 'qwen2.5-0.5b'"),
        (["--set", "grpo.learning_rte=1"], "Unknown key grpo.learning_rte. Did you mean"),
        (["--set", "grpo.seed=1"], "grpo.seed is set, but seed is owned by seed"),
        (["--set", "alpha_sdop=1"], "alpha_sdpo"),
        (["--set", "grpo.generation_batch_size=3"], "Make it a multiple of 4"),
        (["--set", "grpo.debug=foo"], "refused by TRL"),
        (["--data", "/does/not/exist"], "does not exist"),
        (["--set", "rollout.environment=letters_environment:Missing"], "cannot be imported"),
        (["--set", "channels.spdo=1.0"], "Did you mean 'sdpo'"),
    ],
)
def test_a_mistake_is_named_with_its_remedy_and_exit_code_2_before_a_model_loads(
    tiny_model_dir, tmp_path, capsys, monkeypatch, options, message
):
    def load(parts, on_progress):
        pytest.fail("the model was loaded")

    monkeypatch.setattr("composer_replication.experiments.smoke.load_run_model", load)
    arguments = ["smoke", "--model", str(tiny_model_dir), "--out", str(tmp_path / "run")]
    assert main([*arguments, *TASK, "--steps", "1", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_trl_that_cannot_run_on_a_cpu_is_named_before_a_model_loads(
    tiny_model_dir, tmp_path, capsys, monkeypatch
):
    setup = "composer_replication.experiments.trainer_setup"
    monkeypatch.setattr(f"{setup}.version", lambda name: "1.15.0")
    monkeypatch.setattr(f"{setup}.device", lambda: torch.device("cpu"))
    assert smoke(tiny_model_dir, tmp_path / "run") == 2
    assert "Install trl>=1.16,<1.17" in capsys.readouterr().err


def test_data_that_cannot_feed_a_channel_is_refused_before_the_model_loads(
    tiny_model_dir, tmp_path, capsys
):
    data = tmp_path / "data"
    data.mkdir()
    (data / "prompts.jsonl").write_text('{"prompt": [{"role": "user", "content": "x"}]}\n')
    assert smoke(tiny_model_dir, tmp_path / "run", "--data", str(data)) == 2
    assert "has no pairs.jsonl" in capsys.readouterr().err
