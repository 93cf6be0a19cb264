"""The extra channels inside TRL's step: normalisation, schedule, refusals."""

import pytest
import torch
from tiny_training import all_equal, run
from trl import GRPOConfig

from composer_replication import ComposerConfig
from composer_replication.errors import ConfigError, TrainingError
from composer_replication.step.channels import CHANNELS, Channel, ChannelSum, num_pairs
from composer_replication.training.channel_plan import scheduled


def test_accumulating_over_1_2_and_4_micro_batches_gives_the_same_step(build):
    """Equal rewards switch GRPO off, so only the extra channels move the weights."""
    weights, rows = [], []
    for accumulation in (1, 2, 4):
        trainer = build(
            reward=all_equal,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            alpha_sdpo=1.0,
            beta_replay=1.0,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
        )
        rows.append(run(trainer)[0])
        weights.append(torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]))
    for other, row in zip(weights[1:], rows[1:], strict=True):
        assert torch.allclose(other, weights[0], rtol=0, atol=1e-8)
        for name in ("loss/sdpo", "loss/dpo", "tokens/sdpo", "pairs/dpo", "tokens/grpo"):
            assert row[name] == pytest.approx(rows[0][name], rel=1e-5), name


def test_the_extra_channels_alone_move_the_policy(build, tiny_llama):
    for weights in (
        {"alpha_sdpo": 1.0, "beta_replay": 0.0},
        {"alpha_sdpo": 0.0, "beta_replay": 1.0},
    ):
        trainer = build(reward=all_equal, max_steps=1, **weights)
        run(trainer)
        before = tiny_llama()
        moved = [
            float((a - b).detach().abs().max())
            for a, b in zip(trainer.model.parameters(), before.parameters(), strict=True)
        ]
        assert max(moved) > 0, weights


def test_resampled_actions_come_from_the_policy_and_recorded_ones_from_the_data(build):
    planned = {}
    for kind in ("recorded", "resampled"):
        trainer = build(hint_site_actions=kind, max_steps=1, hint_sites_per_step=2)
        run(trainer)
        (micro_batch,) = trainer._plan
        mask = micro_batch.tensors["sdpo_loss_mask"]
        ids = micro_batch.tensors["input_ids"]
        planned[kind] = [
            trainer.processing_class.decode(row[m]) for row, m in zip(ids, mask, strict=True)
        ]
    assert all(text.startswith('{"path":') for text in planned["recorded"])
    assert not any(text.startswith('{"path":') for text in planned["resampled"])


def test_alternating_channels_take_turns_and_say_so_in_their_counts(build):
    rows = run(build(channel_schedule="alternate", max_steps=4))
    assert [row["tokens/sdpo"] > 0 for row in rows] == [True, False, True, False]
    assert [row["pairs/dpo"] for row in rows] == [0, 4, 0, 4]
    assert ["loss/sdpo" in row for row in rows] == [True, False, True, False]


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("every_step", 3, ("sdpo", "dpo")),
        ("alternate", 0, ("sdpo",)),
        ("alternate", 1, ("dpo",)),
        ("alternate", 2, ("sdpo",)),
    ],
)
def test_the_schedule_of_the_extra_channels(schedule, step, expected):
    assert scheduled(("sdpo", "dpo"), schedule, step) == expected
    assert scheduled((), schedule, step) == ()


def test_several_optimizer_steps_a_generation_each_get_their_own_records(build):
    trainer = build(
        per_device_train_batch_size=4,
        steps_per_generation=2,
        num_generations=4,
        hint_sites_per_step=2,
        pairs_per_step=1,
    )
    rows = run(trainer)
    assert [row["pairs/dpo"] for row in rows] == [1, 1]
    assert len(trainer._plan) == 2
    first, second = (plan.tensors["ctx_teacher_input_ids"] for plan in trainer._plan)
    assert first.tolist() != second.tolist()


def test_each_iteration_over_the_same_rollouts_takes_its_own_turn_and_records(build):
    rows = run(build(channel_schedule="alternate", num_iterations=2, max_steps=4))
    assert [row["tokens/sdpo"] > 0 for row in rows] == [True, False, True, False]
    assert [row["pairs/dpo"] for row in rows] == [0, 4, 0, 4]


def test_overridden_channel_methods_are_what_the_step_calls(build):
    trainer = build(max_steps=1, alpha_sdpo=0.5, beta_replay=0.25)
    trainer._compute_sdpo_loss = lambda model, inputs: (
        inputs["input_ids"].new_zeros((), dtype=torch.float32) + 3.0
    )
    trainer._compute_trace_replay_loss = lambda model, inputs: torch.tensor(7.0)
    (row,) = run(trainer)
    assert row["loss/sdpo"] == 3.0
    assert row["loss/dpo"] == 7.0
    assert row["loss"] == pytest.approx(row["loss/grpo"] + 0.5 * 3 + 0.25 * 7, abs=1e-5)


def test_the_inputs_carry_the_notes_names(build):
    seen = {}
    trainer = build(max_steps=1)
    original = trainer._compute_sdpo_loss

    def spy(model, inputs):
        seen.update(inputs)
        return original(model, inputs)

    trainer._compute_sdpo_loss = spy
    run(trainer)
    assert {
        "ctx_teacher_input_ids",
        "sdpo_loss_mask",
        "sdpo_student_index",
        "sdpo_teacher_index",
        "dpo_chosen_input_ids",
        "dpo_chosen_response_mask",
        "dpo_chosen_ref_logprobs",
        "dpo_rejected_input_ids",
        "dpo_rejected_response_mask",
        "dpo_rejected_ref_logprobs",
        "prompt_ids",
        "completion_ids",
        "advantages",
    } <= seen.keys()


def test_a_fourth_channel_trains_by_its_table_entry_and_a_weight(build, monkeypatch):
    def imitate(scores, tensors, settings):
        return ChannelSum(-scores.chosen_logp.sum(), num_pairs(tensors))

    monkeypatch.setitem(
        CHANNELS, "imitate", Channel("imitate", "pairs", "pairs", num_pairs, imitate)
    )
    rows = run(build(channel_weights={"imitate": 0.5}, max_steps=3, learning_rate=1e-2))
    losses = [row["loss/imitate"] for row in rows]
    assert losses[-1] < losses[0]
    assert rows[0]["pairs/imitate"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hint_sites": None, "alpha_sdpo": 0.3}, "alpha_sdpo is 0.3 and no hint_sites were given"),
        ({"pairs": None, "beta_replay": 0.3}, "beta_replay is 0.3 and no pairs were given"),
        ({"channel_weights": {"spdo": 1.0}}, "no channel 'spdo'. Did you mean 'sdpo'"),
        ({"channel_weights": {"dpo": 1.0}}, "has a setting of its own"),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
            "multiple of gradient_accumulation_steps",
        ),
    ],
)
def test_a_combination_that_could_not_train_is_refused_with_a_remedy(build, changes, message):
    with pytest.raises(ConfigError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("alpha_sdpo", -0.1, "alpha_sdpo is -0.1"),
        ("beta_replay", float("nan"), "beta_replay is nan"),
        ("teacher_ema_rate", 0.0, "teacher_ema_rate is 0.0"),
        ("pairs_per_step", 0, "pairs_per_step is 0"),
        ("sdpo_clip", "token", "without a bound"),
    ],
)
def test_a_field_out_of_bounds_is_refused_where_it_is_declared(tmp_path, field, value, message):
    with pytest.raises(ConfigError, match=message):
        ComposerConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{field: value})


def test_the_defaults_follow_the_composer_report(tmp_path):
    config = ComposerConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert config.loss_type == "dr_grpo"
    assert config.scale_rewards == "none"
    assert config.beta == 0.0
    assert config.num_iterations == 1
    assert config.mask_truncated_completions is False


def test_a_grpo_config_keeps_its_own_values(tmp_path):
    theirs = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, epsilon=0.3)
    ours = ComposerConfig.from_grpo_config(theirs)
    assert ours.epsilon == 0.3
    assert ours.loss_type == theirs.loss_type
    assert ours.sdpo_beta == 0.5
    assert ours.channel_weights == {}


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(build, tiny_llama):
    trainer = build(max_steps=1)
    trainer._compute_trace_replay_loss = lambda model, inputs: torch.tensor(float("nan"))
    with pytest.raises(TrainingError, match="not finite in dpo"):
        trainer.train()
    for after, before in zip(trainer.model.parameters(), tiny_llama().parameters(), strict=True):
        assert torch.equal(after, before)


def test_gradient_checkpointing_changes_no_number(build):
    rows = [run(build(gradient_checkpointing=on, max_steps=1))[0] for on in (False, True)]
    for name in ("loss/grpo", "loss/sdpo", "loss/dpo", "grad_norm"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5), name


def test_under_lora_only_the_adapter_trains_and_the_base_is_teacher_and_reference(
    build, tiny_llama
):
    from peft import LoraConfig

    trainer = build(
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        max_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
    )
    rows = run(trainer)
    assert rows[0]["loss/dpo"] == pytest.approx(0.693147, abs=1e-5)
    assert rows[-1]["loss/dpo"] < rows[0]["loss/dpo"]
    assert all(row["loss/sdpo"] > 0 for row in rows)
    base = dict(tiny_llama().named_parameters())
    for name, parameter in trainer.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")]), name
    with trainer.teacher.open() as teacher:
        assert teacher is trainer.model
    assert trainer.teacher.state() == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_weights_move(build, value):
    trainer = build()
    weight = trainer.model.get_input_embeddings().weight
    weight.register_hook(lambda gradient: torch.full_like(gradient, value))
    before = weight.detach().clone()
    with pytest.raises(TrainingError, match="The gradient norm of step 1 is"):
        trainer.train()
    assert torch.equal(weight, before)
