"""Actions at recorded states as a rollout kind: G actions a state, one turn each, then a step."""

import json

from datasets import Dataset

from composer_replication import ComposerConfig, ComposerReplicationTrainer, EnvironmentRollouts
from composer_replication.batch.render import render_state
from composer_replication.environments.recorded_state import RecordedState
from composer_replication.experiments.task_registry import task_rows
from composer_replication.traces.trace import messages_from


def test_a_group_acts_once_at_a_recorded_state_and_its_errors_train(
    tmp_path, tiny_llama, smollm2_tokenizer
):
    rows = task_rows("fix_call", "train", num_episodes=10)
    late = [row for row in rows.prompts if row["prompt"][-1]["role"] == "tool"]
    prompts = [rows.prompts[0], late[0]]
    trainer = ComposerReplicationTrainer(
        model=tiny_llama(),
        args=ComposerConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=8,
            max_steps=1,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(prompts),
        processing_class=smollm2_tokenizer,
        rollout_func=EnvironmentRollouts(RecordedState, prompts, max_turns=1, max_action_tokens=6),
        pairs=rows.pairs,
    )
    out = trainer.rollout_func([row["prompt"] for row in (*prompts, *prompts)], trainer)
    for row, ids in zip((*prompts, *prompts), out["prompt_ids"], strict=True):
        assert ids == render_state(smollm2_tokenizer, messages_from(row["prompt"]))
    assert all(set(mask) == {1} for mask in out["env_mask"])
    assert out["environment_reward"] == [0.0] * 4
    for row, sites in zip((*prompts, *prompts), out["rollout_hint_sites"], strict=True):
        (site,) = sites
        assert site.is_on_policy
        assert site.hint.startswith(f"Hint: {row['error_message']}")
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["tokens/sdpo"] > 0
    assert logged["pairs/dpo"] > 0
    text = (tmp_path / "rollouts/step_000001.jsonl").read_text()
    written = [json.loads(line) for line in text.splitlines()]
    assert [len(rollout["turns"]) for rollout in written] == [2] * 4
