"""What we override and call of TRL keeps its shape, and both weights 0 are TRL, bit for bit."""

import inspect

import pytest
import torch
from datasets import Dataset

from composer_replication import ComposerConfig, ComposerReplicationTrainer
from composer_replication.training.trl_hooks import GRPOConfig, GRPOTrainer

PROMPTS = [{"prompt": [{"role": "user", "content": f"Read file {i}."}]} for i in range(8)]


def even_tokens(completion_ids, **columns):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def config(tmp_path, kind=GRPOConfig, **changes):
    values = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return kind(**(values | changes))


def train(trainer):
    trainer.train()
    return trainer.state.log_history, list(trainer.model.parameters())


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_prepare_inputs", ["self", "generation_batch"]),
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_compute_loss", ["self", "model", "inputs"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_get_output_dir", ["self", "trial"]),
        ("_get_per_token_logps_and_entropies", ["self", "model", "input_ids"]),
        ("_get_train_sampler", ["self", "dataset"]),
        (
            "_generate_single_turn",
            ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
        ),
    ],
)
def test_a_method_we_override_or_call_keeps_its_parameters(method, parameters):
    found = list(inspect.signature(getattr(GRPOTrainer, method)).parameters)
    assert found[: len(parameters)] == parameters


def test_loading_a_checkpoint_keeps_its_parameters():
    found = list(inspect.signature(GRPOTrainer._load_from_checkpoint).parameters)
    assert found == ["self", "resume_from_checkpoint", "model"]


def test_trl_does_not_divide_by_accumulation_for_us():
    assert "loss_is_scaled_for_ga" in inspect.getsource(inspect.getmodule(GRPOTrainer))


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
def test_without_data_a_whole_run_equals_trl_bit_for_bit(
    tmp_path, tiny_llama, smollm2_tokenizer, loss_type
):
    runs = []
    for kind in (GRPOTrainer, ComposerReplicationTrainer):
        trainer = kind(
            model=tiny_llama(),
            reward_funcs=even_tokens,
            args=config(tmp_path, loss_type=loss_type),
            train_dataset=Dataset.from_list(PROMPTS),
            processing_class=smollm2_tokenizer,
        )
        runs.append(train(trainer))
    (logs, weights), (our_logs, our_weights) = runs
    for row, our_row in zip(logs[:-1], our_logs[:-1], strict=True):
        for name in row.keys() - {"step_time"}:
            assert row[name] == our_row[name], name
    assert all(torch.equal(a, b) for a, b in zip(weights, our_weights, strict=True))


def test_with_data_and_both_weights_0_a_whole_run_equals_trl_bit_for_bit(
    tmp_path, tiny_llama, smollm2_tokenizer, records
):
    sites, pairs = records
    theirs = train(
        GRPOTrainer(
            model=tiny_llama(),
            reward_funcs=even_tokens,
            args=config(tmp_path, loss_type="dr_grpo", scale_rewards="none"),
            train_dataset=Dataset.from_list(PROMPTS),
            processing_class=smollm2_tokenizer,
        )
    )
    ours = train(
        ComposerReplicationTrainer(
            model=tiny_llama(),
            reward_funcs=even_tokens,
            args=config(tmp_path, kind=ComposerConfig, alpha_sdpo=0.0, beta_replay=0.0),
            train_dataset=Dataset.from_list(PROMPTS),
            processing_class=smollm2_tokenizer,
            hint_sites=sites,
            pairs=pairs,
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(theirs[1], ours[1], strict=True))


def test_a_trl_script_needs_two_new_arguments_and_keeps_its_grpo_config(
    tmp_path, tiny_llama, smollm2_tokenizer, records
):
    sites, pairs = records
    args = config(tmp_path)
    trainer = ComposerReplicationTrainer(
        model=tiny_llama(),
        reward_funcs=even_tokens,
        args=args,
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=smollm2_tokenizer,
        hint_sites=sites,
        pairs=pairs,
    )
    assert trainer.channel_weights == {"sdpo": 0.1, "dpo": 0.05}
    assert trainer.loss_type == args.loss_type == "dapo"
    logs, _ = train(trainer)
    for row in logs[:-1]:
        assert row["loss/sdpo"] > 0
        assert row["tokens/sdpo"] > 0
        assert row["pairs/dpo"] == 2
        # What was logged as the loss is the weighted sum of the channels.
        total = row["loss/grpo"] + 0.1 * row["loss/sdpo"] + 0.05 * row["loss/dpo"]
        assert row["loss"] == pytest.approx(total, abs=1e-5)
    assert logs[0]["loss/dpo"] == pytest.approx(0.693147, abs=1e-5)


def test_the_extra_channels_leave_grpos_rollouts_as_they_were(
    tmp_path, tiny_llama, smollm2_tokenizer, records
):
    """The loaders and the sampling at hint sites have random states of their own."""
    sites, pairs = records
    first_rewards = []
    for given in ({}, {"hint_sites": sites, "pairs": pairs}):
        trainer = ComposerReplicationTrainer(
            model=tiny_llama(),
            reward_funcs=even_tokens,
            # At this rate no token changes, so the rollouts depend on the random state alone.
            args=config(tmp_path, learning_rate=1e-12),
            train_dataset=Dataset.from_list(PROMPTS),
            processing_class=smollm2_tokenizer,
            **given,
        )
        first_rewards.append([row["reward"] for row in train(trainer)[0][:-1]])
    assert first_rewards[0] == first_rewards[1]
