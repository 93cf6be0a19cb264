"""The configurations under configs/ load, and say what the founding note asks for."""

from pathlib import Path

import pytest

from composer_replication.config.loading import dump_config, load_config

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_a_shipped_configuration_loads_and_survives_the_run_directory(path, tmp_path):
    config = load_config(path, [])
    assert config.name == path.stem
    copy = tmp_path / "config.toml"
    copy.write_text(dump_config(config))
    assert load_config(copy, []) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_a_shipped_configuration_makes_whole_groups(path):
    grpo = load_config(path, []).grpo
    rows = grpo["per_device_train_batch_size"] * grpo.get("gradient_accumulation_steps", 1)
    assert rows % grpo["num_generations"] == 0


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_the_actions_of_a_rollout_fit_the_completion(path):
    config = load_config(path, [])
    sampled = config.rollout.max_turns * config.rollout.max_action_tokens
    assert sampled < config.grpo["max_completion_length"]


def test_the_reference_smoke_is_fifty_steps_of_two_rows_of_1024_tokens():
    config = load_config(CONFIGS / "smoke_qwen2.5_0.5b.toml", [])
    assert config.model == "Qwen/Qwen2.5-0.5B-Instruct"
    assert config.grpo["per_device_train_batch_size"] == 2
    assert config.batch.max_context_tokens == config.smoke.max_shape_tokens == 1024
    assert (config.smoke.steps, config.smoke.fixed_shapes) == (50, None)
    assert (config.alpha_sdpo, config.beta_replay) == (0.1, 0.05)
