"""Files, overrides and the way back to TOML."""

import pytest
from pydantic import ValidationError

from composer_replication.cli.entry import main
from composer_replication.config.config_keys import changed_keys, known_keys
from composer_replication.config.loading import dump_config, load_config
from composer_replication.config.run_config import RunConfig
from composer_replication.errors import ConfigError

EVERY_SECTION = [
    "name=second-try_2.1",
    "model=org/model",
    "alpha_sdpo=1",
    "teacher=live",
    "data=/data/with = and \\ signs",
    "grpo.learning_rate=1e-5",
    "grpo.bf16=true",
    "grpo.model_init_kwargs.dtype=bfloat16",
    "grpo.reward_weights=[1, 2.5]",
    "sdpo={top_k = 20, tail = true, clip = 'entry', clip_value = 0.05}",
    "batch={max_context_tokens = 64, truncation = 'middle'}",
    "rollout.environment=my_package.tasks:Drift",
    'lora={r = 8, target_modules = ["q_proj", "v_proj"]}',
    "channels.length=0.01",
    "smoke.fixed_shapes=[2, 1024]",
]


@pytest.mark.parametrize("overrides", [[], EVERY_SECTION], ids=["defaults", "every_section"])
def test_a_dumped_configuration_loads_as_an_equal_one(tmp_path, overrides):
    config = load_config(None, overrides)
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config))
    assert load_config(path, []) == config


def test_defaults_are_those_of_the_objective():
    config = load_config(None, [])
    assert (config.alpha_sdpo, config.beta_replay) == (0.1, 0.05)
    assert (config.model, config.teacher, config.data, config.lora) == (None, None, None, None)
    assert config.grpo == {}
    assert config == RunConfig()


def test_later_overrides_win_over_earlier_ones_and_over_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("seed = 1\n[sdpo]\nbeta = 0.25\nsites_per_step = 3\n")
    config = load_config(path, ["seed=2", "sdpo.beta=1", "seed = 3"])
    assert (config.seed, config.sdpo.beta, config.sdpo.sites_per_step) == (3, 1.0, 3)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("run-1", "run-1"),
        ("'quoted'", "quoted"),
        ('"a.b"', "a.b"),
        ("2026-01-31", "2026-01-31"),
    ],
)
def test_text_needs_no_quotes_in_an_override(text, name):
    assert load_config(None, [f"name={text}"]).name == name


def test_a_line_break_in_an_override_adds_no_key():
    assert load_config(None, ["model=1\nseed = 5"]) == RunConfig(model="1\nseed = 5")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "seed",
            "--set 'seed' names no key and value. Write --set KEY=VALUE, such as "
            "--set sdpo.top_k=20.",
        ),
        (
            "sdpo..beta=1",
            "--set 'sdpo..beta=1' names no key and value. Write --set KEY=VALUE, such as "
            "--set sdpo.top_k=20.",
        ),
        (
            "alpha_sdpo=",
            "--set 'alpha_sdpo=' gives alpha_sdpo no value. Write --set alpha_sdpo=VALUE, or leave "
            "it out for the default.",
        ),
        (
            "smoke.fixed_shapes=[2,",
            "--set 'smoke.fixed_shapes=[2,': the value is not valid TOML: Invalid value (at end of "
            "document). Quote the whole of it for the shell, such as "
            "--set 'smoke.fixed_shapes=[2, 1024]'.",
        ),
    ],
)
def test_an_override_that_cannot_be_parsed_says_how_to_write_it(override, text):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert str(caught.value) == text


def test_a_key_below_a_plain_value_is_refused():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["seed=1", "seed.low=2"])
    assert str(caught.value) == (
        "--set 'seed.low=2': seed is 1, which is a value and has no keys. "
        "Set seed itself, or a key of a section."
    )


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "absent.toml"
    with pytest.raises(ConfigError) as caught:
        load_config(path, [])
    assert str(caught.value) == (
        f"{path} does not exist, so there is no configuration to read. "
        "Check the path; configs/ holds examples."
    )


def test_a_folder_or_binary_file_is_refused_with_its_reason(tmp_path):
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    for path in (tmp_path, binary):
        with pytest.raises(ConfigError, match=r"cannot be read as text: .*Give a TOML file\."):
            load_config(path, [])


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 7\n")
    assert load_config(path, []).seed == 7


def test_invalid_toml_is_reported_with_its_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("seed = 1\nmodel = Qwen\n")
    with pytest.raises(ConfigError, match=r"is not valid TOML: .*line 2.*text needs quotes"):
        load_config(path, [])


def test_configurations_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().seed = 1  # pyright: ignore


def test_python_cannot_pass_through_what_toml_cannot_hold():
    with pytest.raises(ValueError, match=r"grpo\.a\.b\[0\] is None, which TOML cannot hold"):
        RunConfig(grpo={"a": {"b": [None]}})


def test_every_key_has_a_description():
    keys = known_keys()
    assert [key for key, text in keys.items() if not text] == []
    assert {"alpha_sdpo", "sdpo.beta", "lora.r", "smoke.fixed_shapes", "grpo"} <= keys.keys()


def test_changed_keys_names_differences_but_not_the_length_of_the_run():
    before = load_config(None, ["grpo.learning_rate=1e-5", "grpo.max_steps=4", "smoke.steps=2"])
    after = load_config(None, ["grpo.max_steps=9", "lora.r=8", "sdpo.beta=1"])
    assert changed_keys(before, before) == []
    assert changed_keys(before, after) == [
        "grpo.learning_rate",
        "lora.alpha",
        "lora.dropout",
        "lora.r",
        "lora.target_modules",
        "sdpo.beta",
    ]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("fsdp=full_shard", "sharded weights are not supported"),
        ("deepspeed=zero3.json", "sharded weights are not supported"),
        ("torch_compile=true", "does not run the hook"),
        ("model_init_kwargs={torch_dtype='bfloat16'}", "reads dtype alone"),
        ("model_init_kwargs.dtype=auto", "must be 'float32', 'bfloat16' or 'float16'"),
        ("model_init_kwargs.dtype=int4", "must be 'float32', 'bfloat16' or 'float16'"),
    ],
)
def test_what_no_run_does_is_refused_before_it_is_planned(override, reason, capsys):
    """A plan would price it, and the paid container refuse it."""
    with pytest.raises(ConfigError, match=reason):
        load_config(None, [f"grpo.{override}"])
    assert main(["plan", "--set", "model=shape:qwen2.5-0.5b", "--set", f"grpo.{override}"]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "override",
    ["fsdp=[]", "torch_compile=false", "deepspeed=''", "model_init_kwargs.dtype=float16"],
)
def test_what_is_switched_off_loads(override):
    load_config(None, [f"grpo.{override}"])
