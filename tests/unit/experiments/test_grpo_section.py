"""`[grpo]`: each key that TRL would take and misuse, take and ignore, or refuse too late."""

import dataclasses

import pytest

from composer_replication.config.loading import load_config
from composer_replication.errors import ConfigError, MissingDependencyError
from composer_replication.experiments import grpo_section_options
from composer_replication.experiments.grpo_section_options import check_grpo_section
from composer_replication.training.composer_config import ComposerConfig
from composer_replication.training.trl_hooks import GRPOConfig


def section(*overrides):
    return load_config(None, [f"grpo.{override}" for override in overrides]).grpo


def refusal(*overrides, device_type="cpu"):
    with pytest.raises(ConfigError) as caught:
        check_grpo_section(section(*overrides), device_type=device_type)
    return str(caught.value)


VALUES = {
    "misspelt": (
        ["learning_rte=1"],
        "Unknown key grpo.learning_rte. Did you mean 'learning_rate'?",
    ),
    "like_nothing": (
        ["zzz=1"],
        "Unknown key grpo.zzz, and no key of TRL's GRPOConfig is like it. Keys of other sections "
        "are listed in docs/configuration.md.",
    ),
    "of_another_trainer": (
        ["use_peft=true"],
        "Unknown key grpo.use_peft. What you want is set by [lora]: the section turns the adapter "
        "on.",
    ),
    "tools": (
        ["tools=['a']"],
        "Unknown key grpo.tools. What you want is set by rollout.environment: an environment's "
        "methods are its tools.",
    ),
    "owned_at_the_top": (["seed=1"], "grpo.seed is set, but seed is owned by seed. Set it there."),
    "owned_by_a_section": (
        ["sdpo_beta=0.1"],
        "grpo.sdpo_beta is set, but sdpo_beta is owned by sdpo.beta. Set it there.",
    ),
    "text_for_a_number": (
        ["learning_rate=fast"],
        "grpo.learning_rate is 'fast'; it must be a number. ... "
        "Change it in the file or with --set grpo.learning_rate=VALUE.",
    ),
    "fraction_for_a_whole_number": (
        ["max_completion_length=7.5"],
        "grpo.max_completion_length is 7.5; it must be a whole number. ... "
        "Change it in the file or with --set grpo.max_completion_length=VALUE.",
    ),
    "text_for_a_switch": (
        ["gradient_checkpointing='yes'"],
        "grpo.gradient_checkpointing is 'yes'; it must be true or false. ... "
        "Change it in the file or with --set grpo.gradient_checkpointing=VALUE.",
    ),
    "out_of_bounds": (
        ["adam_beta1=2"],
        "grpo.adam_beta1 is 2; it must be at least 0 and below 1. ... "
        "Change it in the file or with --set grpo.adam_beta1=VALUE.",
    ),
    "no_steps": (
        ["max_steps=0"],
        "grpo.max_steps is 0; it must be at least 1, or -1 for num_train_epochs. ... "
        "Change it in the file or with --set grpo.max_steps=VALUE.",
    ),
    "choice_that_trl_checks_at_the_first_step": (
        ["scale_rewards=grup"],
        "grpo.scale_rewards is 'grup', which TRL does not know. Did you mean 'group'? It takes "
        "none, group, batch.",
    ),
    "member_of_an_enumeration": (
        ["save_strategy=stps"],
        "grpo.save_strategy is 'stps', which TRL does not know. Did you mean 'steps'? It takes "
        "no, steps, epoch, best.",
    ),
}


@pytest.mark.parametrize(("overrides", "text"), VALUES.values(), ids=VALUES)
def test_a_mistyped_key_or_value_is_refused_in_words(overrides, text):
    """`...` stands for the first sentence of TRL's own help, whose words are TRL's."""
    found = refusal(*overrides)
    start, _, end = text.partition("... ")
    assert found == text if not end else found.startswith(start) and found.endswith(end)


OUT_OF_BOUNDS = [
    "temperature=0", "temperature=-1", "top_p=0", "top_p=2", "min_p=-0.1", "learning_rate=-1",
    "max_completion_length=0", "per_device_train_batch_size=0", "gradient_accumulation_steps=0",
    "num_iterations=0", "max_grad_norm=-1", "weight_decay=-1", "beta=-1", "epsilon=-0.1",
    "warmup_steps=-1", "save_steps=0", "top_entropy_quantile=2", "num_train_epochs=0",
    "steps_per_generation=0", "repetition_penalty=0", "adam_epsilon=0", "top_k=-1",
]  # fmt: skip


@pytest.mark.parametrize("override", OUT_OF_BOUNDS)
def test_a_value_that_no_step_could_use_is_refused(override):
    key, _, value = override.partition("=")
    assert refusal(override).startswith(f"grpo.{key} is {value}; it must be ")


IGNORED = [
    "eval_strategy=steps", "do_eval=true", "eval_steps=10", "num_generations_eval=4",
    "load_best_model_at_end=true", "save_strategy=best", "vllm_server_port=1",
    "vllm_gpu_memory_utilization=0.5", "deepspeed=zero3.json", "fsdp=full_shard",
    "torch_compile=true", "trust_remote_code=true", "chat_template_kwargs.thinking=false",
    "reward_weights=[1.0, 2.0]", "max_tool_calling_iterations=3", "logging_steps=10",
    "logging_strategy=epoch", "remove_unused_columns=true", "do_train=true", "data_seed=3",
    "label_smoothing_factor=0.1", "sync_ref_model=true", "use_bias_correction_kl=false",
    "ref_model_sync_steps=3", "entropy_target=0.3", "sapo_temperature_pos=2.0", "vespo_k_pos=3.0",
    "num_completions_to_print=3", "gradient_checkpointing_kwargs.use_reentrant=false",
    "hub_model_id=me/mine", "lr_scheduler_type=reduce_lr_on_plateau",
    "model_init_kwargs.attn_implementation=eager",
]  # fmt: skip


@pytest.mark.parametrize("override", IGNORED)
def test_an_option_that_would_be_ignored_or_cannot_work_is_refused(override):
    key = override.partition("=")[0].partition(".")[0]
    assert refusal(override).startswith(f"grpo.{key} ")


USED = [
    ["eval_strategy='no'", "vllm_mode=colocate", "logging_steps=1", "max_grad_norm=0"],
    ["sync_ref_model=true", "beta=0.1", "ref_model_sync_steps=3"],
    ["use_adaptive_entropy=true", "entropy_target=0.3"],
    ["loss_type=sapo", "sapo_temperature_pos=2.0"],
    ["log_completions=true", "num_completions_to_print=3"],
    ["gradient_checkpointing=true", "gradient_checkpointing_kwargs.use_reentrant=false"],
    ["scale_rewards=true", "max_steps=4", "num_train_epochs=3.0"],
    ["num_train_epochs=2"],
    ["model_init_kwargs.dtype=bfloat16"],
    ["per_device_train_batch_size=2", "gradient_accumulation_steps=4"],
    ["temperature=1", "learning_rate=0"],
]


@pytest.mark.parametrize("overrides", USED, ids=lambda overrides: overrides[0])
def test_what_is_read_passes(overrides):
    check_grpo_section(section(*overrides), device_type="cpu")


def test_every_key_at_its_default_passes():
    """So that a configuration which holds them all loads again."""
    trls = {item.name for item in dataclasses.fields(GRPOConfig)}
    owned = {"output_dir", "seed", "resume_from_checkpoint", "logging_steps"}
    values = {
        item.name: item.default
        for item in dataclasses.fields(ComposerConfig)
        if item.init and item.name in trls - owned and item.default is not dataclasses.MISSING
    }
    values = {key: getattr(value, "value", value) for key, value in values.items()}
    check_grpo_section(
        {key: value for key, value in values.items() if value is not None}, device_type="cpu"
    )


def test_the_length_of_a_run_is_said_once():
    assert refusal("max_steps=5", "num_train_epochs=2") == (
        "grpo.num_train_epochs is 2, and grpo.max_steps is set too, which alone says how long the "
        "run is. Leave one of them out."
    )


def test_a_group_that_would_be_cut_names_the_product_and_a_number_that_fits():
    assert refusal("per_device_train_batch_size=3", "num_generations=4") == (
        "grpo.per_device_train_batch_size 3 x gradient_accumulation_steps 1 makes 3 rollouts a "
        "step, and a group has grpo.num_generations = 4: one would be cut. Set "
        "grpo.per_device_train_batch_size = 4, or make the product another multiple of 4."
    )


def test_several_processes_count_for_a_group(monkeypatch):
    given = section("per_device_train_batch_size=2", "num_generations=4")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_grpo_section(given, device_type="cpu")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="x 3 processes makes 6 rollouts a step"):
        check_grpo_section(given, device_type="cpu")


def test_an_optimizer_step_of_several_generations_is_refused():
    assert refusal("steps_per_generation=3", "gradient_accumulation_steps=2").startswith(
        "grpo.steps_per_generation is 3 and grpo.gradient_accumulation_steps is 2, so an "
    )


def test_precision_and_device_are_those_of_the_machine():
    assert "a CPU has no fp16 arithmetic" in refusal("fp16=true")
    assert "would be measured and not used" in refusal("use_cpu=true", device_type="cuda")
    check_grpo_section(section("fp16=true"), device_type="cuda")
    check_grpo_section(section("use_cpu=true"), device_type="cpu")


@pytest.mark.parametrize(
    ("override", "package"),
    [
        ("use_vllm=true", "trl[vllm]"),
        ("report_to=wandb", "wandb"),
        ("report_to=['trackio']", "trackio"),
        ("optim=adamw_bnb_8bit", "bitsandbytes"),
        ("use_liger_kernel=true", "liger-kernel"),
    ],
)
def test_a_missing_package_is_named_before_anything_starts(monkeypatch, override, package):
    monkeypatch.setattr(grpo_section_options, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as caught:
        check_grpo_section(section(override), device_type="cpu")
    assert f"the package {package} is not installed. Run `pip install {package}`" in str(
        caught.value
    )


def test_a_service_that_transformers_cannot_report_to_is_named():
    assert refusal("report_to=wnadb").startswith(
        "grpo.report_to is 'wnadb', which transformers cannot report to. Did you mean 'wandb'?"
    )


def test_all_problems_are_told_at_once():
    text = refusal("learning_rte=1", "max_stps=3", "temperature=0")
    assert text.splitlines()[0] == "3 problems."
    assert len(text.splitlines()) == 4
