"""What no equality of losses proves: every setting has an effect, and every row is what was run.

The flaws behind these claims are listed in `bench/flaw_patches.toml`; each is planted there and
must make a test here, or elsewhere, fail.
"""

import dataclasses
import importlib
import inspect
import re

import pytest
import tiny_families
import tiny_trainer
import torch

from composer_replication import ComposerConfig, ComposerDataCollator, HintSite, StepBatch
from composer_replication.batch.render import render_next_turn, render_state
from composer_replication.config.run_config import RunConfig
from composer_replication.experiments.trainer_setup import composer_config
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.step import step
from composer_replication.step.channels import ChannelSum
from composer_replication.step.optimizer_step import total_loss
from composer_replication.step.settings import StepSettings
from composer_replication.traces.trace import Message
from composer_replication.training.channel_weights import channel_weights

# TRL's and its dependencies' own warnings are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")

# A field of each channel's settings: what must stand beside it, and its value beside the default.
STEP_CHANGES = {
    ("grpo", "loss_type"): ({}, "grpo"),
    ("grpo", "importance_sampling_level"): ({}, "sequence"),
    ("grpo", "epsilon_low"): ({}, 0.9),
    ("grpo", "epsilon_high"): ({}, 3.0),
    ("grpo", "max_completion_length"): ({}, 7),
    ("grpo", "temperature"): ({}, 0.7),
    ("sdpo", "beta"): ({}, 0.25),
    ("sdpo", "temperature"): ({}, 1.5),
    ("sdpo", "top_k"): ({}, 3),
    ("sdpo", "top_k_from"): ({"top_k": 3}, "policy"),
    ("sdpo", "tail"): ({"top_k": 3}, True),
    ("sdpo", "clip"): ({"clip": "token", "clip_value": 1e-3}, "entry"),
    ("sdpo", "clip_value"): ({"clip": "token", "clip_value": 1e-3}, 1e-4),
    ("sdpo", "entropy_scale"): ({}, 1.5),
    ("sdpo", "prefix_weight"): ({}, "acceptance"),
    ("dpo", "beta"): ({}, 0.4),
    ("dpo", "label_smoothing"): ({}, 0.2),
}

# The same for the fields of `ComposerConfig` that a channel's settings are made of.
CONFIG_CHANGES = {f"{channel}_{name}": v for (channel, name), (_, v) in STEP_CHANGES.items()}
CONFIG_CHANGES |= {"sdpo_clip": "token", "sdpo_clip_value": 0.5}

# The same for the keys of a run's file, and the field of `ComposerConfig` that each becomes.
KEY_CHANGES = {
    "alpha_sdpo": ("alpha_sdpo", 0.7),
    "beta_replay": ("beta_replay", 0.7),
    "channels": ("channel_weights", {"imitate": 0.7}),
    "teacher": ("teacher", "frozen"),
    "seed": ("seed", 7),
    "sdpo.beta": ("sdpo_beta", 0.25),
    "sdpo.temperature": ("sdpo_temperature", 1.5),
    "sdpo.top_k": ("sdpo_top_k", 3),
    "sdpo.top_k_from": ("sdpo_top_k_from", "policy"),
    "sdpo.tail": ("sdpo_tail", True),
    "sdpo.clip": ("sdpo_clip", "token"),
    "sdpo.clip_value": ("sdpo_clip_value", 0.5),
    "sdpo.entropy_scale": ("sdpo_entropy_scale", 1.5),
    "sdpo.prefix_weight": ("sdpo_prefix_weight", "acceptance"),
    "sdpo.routing": ("rollout_routing", "failures"),
    "sdpo.success_reward": ("success_reward", 0.7),
    "sdpo.hint_placement": ("hint_placement", "user_turn"),
    "sdpo.actions": ("hint_site_actions", "recorded"),
    "sdpo.sites_per_step": ("hint_sites_per_step", 5),
    "sdpo.teacher_ema_rate": ("teacher_ema_rate", 0.3),
    "dpo.beta": ("dpo_beta", 0.4),
    "dpo.label_smoothing": ("dpo_label_smoothing", 0.2),
    "dpo.pairs_per_step": ("pairs_per_step", 5),
    "batch.max_context_tokens": ("max_context_tokens", 77),
    "batch.truncation": ("truncation", "middle"),
    "batch.channel_schedule": ("channel_schedule", "alternate"),
    "batch.tree_max_tokens": ("tree_max_tokens", 777),
}
COMPANIONS = {
    "sdpo.top_k_from": {"top_k": 3},
    "sdpo.tail": {"top_k": 3},
    "sdpo.clip": {"clip_value": 0.5},
    "sdpo.clip_value": {"clip": "token"},
    "batch.truncation": {"max_context_tokens": 77},
}


def settings_with(channel, values):
    part = dataclasses.replace(getattr(StepSettings(), channel), **values)
    return dataclasses.replace(StepSettings(), **{channel: part})


@pytest.mark.parametrize(("channel", "name"), STEP_CHANGES)
def test_every_setting_of_a_channel_changes_its_loss(channel, name):
    model = tiny_families.tiny_model("llama")
    collator = ComposerDataCollator(tiny_families.chat_tokenizer())
    batch = dataclasses.replace(
        tiny_families.BATCH, rollouts=tiny_families.off_policy(tiny_families.ROLLOUTS)
    )
    beside, value = STEP_CHANGES[channel, name]
    means = []
    for changes in (beside, {**beside, name: value}):
        sums = step(model, batch, collator, settings=settings_with(channel, changes))
        assert all(torch.isfinite(part.loss_sum) for part in sums.values())
        means.append({name: part.loss_sum.item() / part.count for name, part in sums.items()})
    before, after = means
    assert abs(after[channel] / before[channel] - 1) > 1e-3
    assert all(after[other] == before[other] for other in before if other != channel)


def test_no_setting_of_a_channel_is_left_out_above():
    found = {
        (part.name, item.name)
        for part in dataclasses.fields(StepSettings)
        for item in dataclasses.fields(getattr(StepSettings(), part.name))
    }
    assert found == STEP_CHANGES.keys()


@pytest.mark.parametrize(
    "field",
    [f.name for f in dataclasses.fields(ComposerConfig) if f.name.startswith(("sdpo_", "dpo_"))],
)
def test_every_channel_field_of_the_trainers_config_reaches_the_step(tmp_path, field):
    channel, name = field.split("_", 1)
    value = CONFIG_CHANGES[field]
    companions = {"sdpo_clip": {"sdpo_clip_value": 0.5}}.get(field, {})
    config = ComposerConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, **{field: value}, **companions
    )
    reached = getattr(getattr(config.step_settings(), channel), name)
    assert reached == value
    assert reached != getattr(getattr(StepSettings(), channel), name)


@pytest.mark.parametrize("key", KEY_CHANGES)
def test_every_key_of_a_channel_reaches_the_trainers_config(tmp_path, key):
    section, _, name = key.rpartition(".")
    field, value = KEY_CHANGES[key]
    run = RunDirectory.create(tmp_path / "run", resume=False)
    grpo = {"use_cpu": True, "bf16": False}
    found = []
    for changes in ({}, {name: value, **COMPANIONS.get(key, {})}):
        table = {section: changes} if section else changes
        config = RunConfig.model_validate({"grpo": grpo, **table})
        args = composer_config(config, run, {}, reference_cache=tmp_path)
        found.append(getattr(args, field))
    assert found[0] != value
    assert found[1] == value


def test_no_key_of_the_channel_sections_is_left_out_above():
    found = {
        f"{section}.{name}"
        for section in ("sdpo", "dpo", "batch")
        for name in type(getattr(RunConfig(), section)).model_fields
    }
    assert found == {key for key in KEY_CHANGES if "." in key}


def test_every_row_setting_of_the_trainers_config_reaches_the_collator(tmp_path):
    trainer = tiny_trainer.build_trainer(
        tmp_path, hint_placement="user_turn", max_context_tokens=333, truncation="middle"
    )
    assert trainer.collator.hint_placement == "user_turn"
    assert trainer.collator.max_length == 333
    assert trainer.collator.truncation == "middle"


def test_a_channels_weight_scales_its_share_of_the_total():
    sums = {"grpo": ChannelSum(torch.tensor(6.0), 3), "sdpo": ChannelSum(torch.tensor(8.0), 4)}
    for weight in (0.0, 0.25, 1.0):
        assert total_loss(sums, {"grpo": 1.0, "sdpo": weight}).item() == 2.0 + weight * 2.0


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_given_weight_is_the_channels_weight_and_0_is_off(tmp_path, weight):
    args = ComposerConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, alpha_sdpo=weight, beta_replay=weight
    )
    found = channel_weights(args, has_hint_sites=True, has_pairs=True)
    assert found == ({"sdpo": weight, "dpo": weight} if weight else {})


def test_channels_without_data_are_off_unless_they_were_asked_for(tmp_path):
    args = ComposerConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert channel_weights(args, has_hint_sites=False, has_pairs=False) == {}
    assert channel_weights(args, has_hint_sites=True, has_pairs=True) == {"sdpo": 0.1, "dpo": 0.05}


def test_every_site_of_a_batch_gets_its_own_hint():
    tokenizer = tiny_families.chat_tokenizer()
    tensors = ComposerDataCollator(tokenizer)(tiny_families.BATCH)
    for ids, site in zip(tensors["ctx_teacher_input_ids"], tiny_families.SITES, strict=True):
        text = tokenizer.decode(ids)
        assert [other.hint in text for other in tiny_families.SITES] == [
            other is site for other in tiny_families.SITES
        ]


def test_the_students_row_is_what_the_sampler_saw_and_wrote(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    first, answer = Message("user", "Read a.py."), Message("tool", "error: no such file")
    # "ab" sampled as two tokens, though the tokenizer would write one.
    sampled = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert tokenizer("ab").input_ids != sampled
    turn = [*sampled, tokenizer.eos_token_id]
    state_ids = [
        *render_state(tokenizer, (first,)),
        *turn,
        *render_next_turn(tokenizer, answer, has_ended=True),
    ]
    site = HintSite(
        (first, Message("assistant", "ab"), answer),
        "List the files first.",
        "ab",
        state_ids=tuple(state_ids),
        action_ids=tuple(turn),
    )
    tensors = ComposerDataCollator(tokenizer)(StepBatch(hint_sites=(site,)))
    assert tensors["input_ids"][0].tolist() == [*state_ids, *turn]
    teacher_ids = tensors["ctx_teacher_input_ids"][0].tolist()
    assert teacher_ids[-len(turn) :] == turn
    assert "List the files first." in tokenizer.decode(teacher_ids)


def public_functions():
    found = [pytest.param(step, id="step"), pytest.param(total_loss, id="total_loss")]
    for package in ("losses.head", "losses.sdpo", "losses.dpo", "losses.grpo", "step.separate"):
        module = importlib.import_module(f"composer_replication.{package}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if not name.startswith("_") and function.__module__ == module.__name__:
                found.append(pytest.param(function, id=f"{package}.{name}"))
    return found


@pytest.mark.parametrize("function", public_functions())
def test_documented_arguments_are_those_of_the_signature(function):
    text = inspect.getdoc(function)
    section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", text, flags=re.MULTILINE)
    documented = re.findall(r"^    (\w+):", section.group(1), flags=re.MULTILINE) if section else []
    assert set(documented) <= inspect.signature(function).parameters.keys()
