"""A smoke without a file runs what the shipped files run, and keeps what was given."""

from pathlib import Path

import pytest

from composer_replication.config.loading import dump_config, load_config
from composer_replication.config.smoke_defaults import with_smoke_defaults
from composer_replication.config.unused_options import check_used_options

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize(
    ("kind", "name"), [("cpu", "smoke_smollm2_135m.toml"), ("cuda", "smoke_qwen2.5_0.5b.toml")]
)
def test_the_defaults_are_those_of_the_shipped_file(kind, name):
    shipped = load_config(CONFIGS / name, [])
    config = with_smoke_defaults(load_config(None, []), kind)
    ignored = {"logging_steps"}
    assert config.grpo == {k: v for k, v in shipped.grpo.items() if k not in ignored}
    for section in ("rollout", "dpo", "batch", "smoke", "sdpo"):
        assert getattr(config, section) == getattr(shipped, section), section


def test_what_was_given_is_kept_and_a_group_stays_whole():
    given = ["grpo.num_generations=8", "rollout.max_turns=5", "smoke.steps=3"]
    config = with_smoke_defaults(load_config(None, given), "cpu")
    assert config.grpo["num_generations"] == config.grpo["per_device_train_batch_size"] == 8
    assert (config.rollout.max_turns, config.rollout.max_action_tokens) == (5, 24)
    assert config.smoke.steps == 3


def test_the_resolved_configuration_reloads_as_it_is(tmp_path):
    config = with_smoke_defaults(load_config(None, ["smoke.fixed_shapes=[2, 128]"]), "cuda")
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config))
    assert load_config(path, []) == config


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize(("num_rows", "expected"), [(1, (1, 2, 2)), (2, (2, 1, 2)), (6, (6, 1, 6))])
def test_a_fixed_shape_has_its_own_number_of_rows_in_whole_groups(kind, num_rows, expected):
    config = with_smoke_defaults(
        load_config(None, [f"smoke.fixed_shapes=[{num_rows}, 2048]"]), kind
    )
    rows = config.grpo["per_device_train_batch_size"]
    steps = config.grpo.get("gradient_accumulation_steps", 1)
    assert (rows, steps, config.grpo["num_generations"]) == expected
    assert check_used_options(config) == []


@pytest.mark.parametrize(
    "options", [["beta_replay=0"], ["rollout.reward=package.module:score"], ["alpha_sdpo=0"]]
)
def test_no_default_is_put_where_this_run_would_ignore_it(options):
    assert check_used_options(with_smoke_defaults(load_config(None, options), "cuda")) == []
