"""Rollouts through the real trainer: exact ids, masks, error turns as hint sites, files on disk."""

import json

import pytest
from datasets import Dataset

from composer_replication import ComposerConfig, ComposerReplicationTrainer, EnvironmentRollouts
from composer_replication.batch.render import render_next_turn, render_state
from composer_replication.environments.protocol import Observation, ToolError
from composer_replication.errors import ConfigError, DataError, RewardError
from composer_replication.traces.trace import Message, messages_from
from composer_replication.training.action_sampling import SampledAction
from composer_replication.training.rollout_episode import Limits
from composer_replication.training.rollouts import _prompt_key

ROWS = [
    {"prompt": [{"role": "user", "content": f"Task {i}"}], "goal": f"goal {i}"} for i in range(4)
]


class AlwaysWrong:
    """Refuses every action; the episode ends after the second."""

    def reset(self, *, goal, **row):
        self.goal = goal
        self.num_actions = 0

    def _step_text(self, action):
        self.num_actions += 1
        error = ToolError("bad_key", f"wrong call {self.num_actions}.", '{"file": "x"}')
        return Observation(f"error: {error.message}", is_done=self.num_actions == 2, error=error)

    def get_reward(self):
        return 0.5 if self.goal.endswith("1") else 0.25


def make_trainer(tmp_path, model, tokenizer, environment=AlwaysWrong, rows=ROWS, **changes):
    values = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 64,
        "max_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "learning_rate": 1e-3,
    }
    return ComposerReplicationTrainer(
        model=model,
        args=ComposerConfig(**(values | changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        rollout_func=EnvironmentRollouts(environment, rows, max_turns=2, max_action_tokens=6),
    )


@pytest.fixture
def played(tmp_path, tiny_llama, smollm2_tokenizer):
    """A trainer and the rollouts of two tasks, twice each."""
    trainer = make_trainer(tmp_path, tiny_llama(), smollm2_tokenizer)
    prompts = [row["prompt"] for row in (ROWS[0], ROWS[0], ROWS[1], ROWS[1])]
    return trainer, trainer.rollout_func(prompts, trainer)


def test_the_prompt_is_what_the_template_renders(played, smollm2_tokenizer):
    _, out = played
    expected = render_state(smollm2_tokenizer, [Message("user", "Task 0")])
    assert out["prompt_ids"][0] == expected


def test_the_mask_marks_sampled_turns_and_the_environments_words_between_them(
    played, smollm2_tokenizer
):
    _, out = played
    for ids, mask in zip(out["completion_ids"], out["env_mask"], strict=True):
        assert len(ids) == len(mask)
        first = mask.index(0)
        last = len(mask) - mask[::-1].index(0)
        between = ids[first:last]
        assert set(mask[first:last]) == {0}
        answer = Message("tool", "error: wrong call 1.")
        has_ended = ids[first - 1] == smollm2_tokenizer.eos_token_id
        assert between == render_next_turn(smollm2_tokenizer, answer, has_ended)
        assert 1 <= first <= 6
        assert 1 <= len(mask) - last <= 6


def test_every_error_turn_is_a_site_with_the_exact_ids_the_sampler_saw(played):
    _, out = played
    for prompt, ids, mask, sites in zip(
        out["prompt_ids"],
        out["completion_ids"],
        out["env_mask"],
        out["rollout_hint_sites"],
        strict=True,
    ):
        assert len(sites) == 2
        first, second = sites
        cut = mask.index(0)
        resumes = len(mask) - mask[::-1].index(0)
        assert list(first.state_ids) == prompt
        assert list(first.action_ids) == ids[:cut]
        assert list(second.state_ids) == prompt + ids[:resumes]
        assert list(second.action_ids) == ids[resumes:]
        assert all(site.is_on_policy and site.error_kind == "bad_key" for site in sites)
        assert first.hint == 'Hint: wrong call 1. Example of a correct call: {"file": "x"}'
        assert second.state[-1] == Message("tool", "error: wrong call 1.")


def test_sites_found_on_the_fly_collate_with_their_hint_in_the_last_message(
    played, smollm2_tokenizer
):
    trainer, out = played
    from composer_replication import StepBatch

    sites = tuple(site for sites in out["rollout_hint_sites"] for site in sites)
    tensors = trainer.collator(StepBatch(hint_sites=sites))
    for row, site in zip(tensors["ctx_teacher_input_ids"], sites, strict=True):
        assert site.hint in smollm2_tokenizer.decode(row)
        assert site.hint not in smollm2_tokenizer.decode(site.state_ids)


def test_the_environments_reward_reaches_each_rollout(played):
    _, out = played
    assert out["environment_reward"] == [0.25, 0.25, 0.5, 0.5]


def test_a_whole_step_trains_on_error_turns_and_writes_readable_rollouts(
    tmp_path, tiny_llama, smollm2_tokenizer
):
    trainer = make_trainer(tmp_path, tiny_llama(), smollm2_tokenizer, hint_sites_per_step=3)
    assert trainer.channel_weights == {"sdpo": 0.1}  # rollouts feed it; there are no pairs
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["tokens/sdpo"] > 0
    assert row["loss/sdpo"] > 0
    text = (tmp_path / "rollouts/step_000001.jsonl").read_text()
    written = [json.loads(line) for line in text.splitlines()]
    assert len(written) == 4
    for rollout in written:
        assert [turn["role"] for turn in rollout["turns"]] == [
            "assistant",
            "tool",
            "assistant",
            "tool",
        ]
        assert rollout["rewards"]["environment_reward"] in (0.25, 0.5)
        assert [error["kind"] for error in rollout["errors"]] == ["bad_key", "bad_key"]
        assert rollout["num_sampled_tokens"] > 0


def test_a_prompt_that_the_environment_was_not_given_is_named(played):
    trainer, _ = played
    with pytest.raises(DataError, match="not among the rows"):
        trainer.rollout_func([[{"role": "user", "content": "Unknown"}]], trainer)


def test_an_environment_without_a_text_action_is_refused_before_any_rollout():
    with pytest.raises(ConfigError, match="lacks reset, _step_text or get_reward"):
        EnvironmentRollouts(object, ROWS)


def test_rows_that_a_prompt_cannot_tell_apart_are_refused():
    same = [ROWS[0], {**ROWS[0], "goal": "another"}]
    with pytest.raises(
        DataError, match="Row 1 has the prompt of an earlier row and another 'goal'"
    ):
        EnvironmentRollouts(AlwaysWrong, same)
    EnvironmentRollouts(AlwaysWrong, [ROWS[0], dict(ROWS[0])])  # one row, twice


def test_an_answer_that_is_no_observation_is_told_by_name(smollm2_tokenizer):
    class AnswersText(AlwaysWrong):
        def _step_text(self, action):
            return "fine"

    rollouts = EnvironmentRollouts(AnswersText, ROWS)

    def act(contexts, num_tokens):
        return [SampledAction([5], None) for _ in contexts]

    with pytest.raises(RewardError, match=r"AnswersText\._step_text returned 'fine'"):
        rollouts.play([ROWS[0]["prompt"]], smollm2_tokenizer, act, Limits(8, 64, None))


def test_a_refused_empty_action_is_an_error_and_no_hint_site(smollm2_tokenizer):
    def act(contexts, num_tokens):
        return [SampledAction([], None) for _ in contexts]

    (episode,) = EnvironmentRollouts(AlwaysWrong, ROWS).play(
        [ROWS[0]["prompt"]], smollm2_tokenizer, act, Limits(8, 64, None)
    )
    assert episode.error_kinds == ["bad_key", "bad_key"]
    assert episode.hint_sites == []


def test_an_answer_without_text_is_in_the_state_of_the_next_error_turn(smollm2_tokenizer):
    """As a shell's is where a command prints nothing."""

    class Silent(AlwaysWrong):
        def _step_text(self, action):
            self.num_steps = getattr(self, "num_steps", 0) + 1
            if self.num_steps == 1:
                return Observation("", is_done=False)
            return super()._step_text(action)

    def act(contexts, num_tokens):
        return [SampledAction([5, smollm2_tokenizer.eos_token_id], None) for _ in contexts]

    (episode,) = EnvironmentRollouts(Silent, ROWS, max_turns=2).play(
        [ROWS[0]["prompt"]], smollm2_tokenizer, act, Limits(8, 256, None)
    )
    (site,) = episode.hint_sites
    assert [message.role for message in site.state[-2:]] == ["assistant", "tool"]
    assert site.state[-1].content == ""


def test_actions_that_reach_their_limit_are_counted(smollm2_tokenizer):
    def act(contexts, num_tokens):
        return [SampledAction([5] * 20, None) for _ in contexts]

    def end(contexts, num_tokens):
        return [SampledAction([5, smollm2_tokenizer.eos_token_id], None) for _ in contexts]

    for sample, num_cut in ((act, 2), (end, 0)):
        (episode,) = EnvironmentRollouts(AlwaysWrong, ROWS, max_turns=2).play(
            [ROWS[0]["prompt"]], smollm2_tokenizer, sample, Limits(8, 256, None)
        )
        assert episode.num_cut == num_cut


def test_generation_settings_are_put_back_after_a_rollout(played):
    trainer, _ = played
    assert trainer.generation_config.max_new_tokens == trainer.args.max_completion_length


def test_text_that_reset_returns_joins_the_prompt(tmp_path, tiny_llama, smollm2_tokenizer):
    class Opens(AlwaysWrong):
        def reset(self, *, goal, **row):
            super().reset(goal=goal)
            return " Start now."

    trainer = make_trainer(tmp_path, tiny_llama(), smollm2_tokenizer, environment=Opens)
    out = trainer.rollout_func([ROWS[0]["prompt"]], trainer)
    assert "Task 0 Start now." in smollm2_tokenizer.decode(out["prompt_ids"][0])


def test_an_error_during_the_very_first_token_budget_still_gives_one_action(
    tmp_path, tiny_llama, smollm2_tokenizer
):
    trainer = make_trainer(tmp_path, tiny_llama(), smollm2_tokenizer, max_completion_length=4)
    out = trainer.rollout_func([ROWS[0]["prompt"]], trainer)
    assert len(out["completion_ids"][0]) >= 1
    assert out["env_mask"][0][0] == 1


def test_prompts_are_found_again_whatever_the_order_of_their_keys():
    messages = messages_from(ROWS[0]["prompt"], "x")
    turned = [{"content": m.content, "role": m.role} for m in messages]
    assert _prompt_key(turned) == _prompt_key(ROWS[0]["prompt"])
