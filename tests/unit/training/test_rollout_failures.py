"""Environments that are slow or break, completions that are empty or too long: nothing is lost."""

import json
import threading
import time

import pytest
from datasets import Dataset

from composer_replication import ComposerConfig, ComposerReplicationTrainer, EnvironmentRollouts
from composer_replication.environments.protocol import Observation, ToolError
from composer_replication.errors import DataError, RewardError
from composer_replication.training.rewards import environment_reward

ROWS = [{"prompt": [{"role": "user", "content": f"Task {i}"}], "number": i} for i in range(4)]
NEVER = threading.Event()


class Fragile:
    """Task 1 does `how` at the place `where`; the others answer as they should."""

    where, how = "", ""

    def fail_at(self, place):
        if self.number == 1 and place == self.where:
            if self.how == "hang":
                NEVER.wait(timeout=30)
            raise OSError("the disk is gone")

    def reset(self, *, number):
        self.number = number
        self.fail_at("reset")

    def _step_text(self, action):
        self.fail_at("step")
        return Observation("error: no.", is_done=True, error=ToolError("bad", "No."))

    def get_reward(self):
        self.fail_at("reward")
        return self.number / 10


class Slow(Fragile):
    def _step_text(self, action):
        time.sleep(0.25)
        return super()._step_text(action)


class Talkative(Fragile):
    """Its answers are longer than any completion may be."""

    def _step_text(self, action):
        return Observation("word " * 500, is_done=False, error=ToolError("bad", "No."))


def make_trainer(
    tmp_path, model, tokenizer, environment, kind=ComposerReplicationTrainer, **rollout
):
    args = ComposerConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8,
        num_generations=2,
        max_completion_length=48,
        max_steps=1,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        scale_rewards="none",
    )
    rollouts = EnvironmentRollouts(
        environment, ROWS, max_action_tokens=4, **({"step_timeout_s": 0.5} | rollout)
    )
    return kind(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        rollout_func=rollouts,
    )


@pytest.fixture
def trainer_of(tmp_path, tiny_llama, smollm2_tokenizer):
    def make(environment, **changes):
        return make_trainer(tmp_path, tiny_llama(), smollm2_tokenizer, environment, **changes)

    return make


def fragile(where, how):
    return type("Fragile", (Fragile,), {"where": where, "how": how})


def prompts(*numbers):
    return [ROWS[number]["prompt"] for number in numbers]


@pytest.mark.parametrize("where", ["reset", "step", "reward"])
@pytest.mark.parametrize(("how", "metric"), [("hang", "timeouts"), ("raise", "crashes")])
def test_a_failed_environment_is_counted_and_the_others_keep_their_rewards(
    trainer_of, where, how, metric
):
    trainer = trainer_of(fragile(where, how))
    trainer.model.train()
    out = trainer.rollout_func(prompts(0, 1, 2, 1), trainer)
    assert out["environment_reward"] == [0.0, None, 0.2, None]
    failures = out["environment_failure"]
    assert [bool(failure) for failure in failures] == [False, True, False, True]
    assert failures[1].startswith("timeout: no answer within 0.5 s" if how == "hang" else "crash: ")
    assert how == "hang" or "raised OSError: the disk is gone" in failures[1]
    counts = {"timeouts": 0, "crashes": 0} | {metric: 2}
    for name, count in counts.items():
        assert trainer._metrics["train"][f"rollouts/{name}"] == [count]
    assert all(len(ids) > 0 for ids in out["completion_ids"])


def test_a_whole_step_trains_around_a_broken_environment(trainer_of, tmp_path):
    trainer = trainer_of(fragile("step", "raise"))
    trainer.train()
    assert trainer.state.log_history[0]["rollouts/crashes"] == 2.0
    text = (tmp_path / "rollouts/step_000001.jsonl").read_text()
    for rollout in map(json.loads, text.splitlines()):
        is_broken = rollout["prompt"][0]["content"] == "Task 1"
        assert ("raised OSError: the disk is gone" in rollout["failure"]) == is_broken
        assert is_broken or rollout["failure"] == ""
        assert (rollout["rewards"]["environment_reward"] is None) == is_broken
        if is_broken:
            assert rollout["advantage"] == 0.0


def test_where_every_rollout_fails_the_reason_is_raised(trainer_of):
    trainer = trainer_of(fragile("step", "raise"))
    with pytest.raises(
        RewardError, match=r"Fragile\._step_text.* raised OSError: the disk is gone"
    ):
        trainer.rollout_func(prompts(1, 1), trainer)
    trainer = trainer_of(fragile("step", "hang"))
    with pytest.raises(RewardError, match=r"all 2 rollouts.*Raise rollout.step_timeout_s"):
        trainer.rollout_func(prompts(1, 1), trainer)


def test_an_environment_that_leaves_the_program_everywhere_says_so(trainer_of):
    """`unittest.main()` in an environment does."""

    class Leaves(Fragile):
        def _step_text(self, action):
            raise SystemExit(0)

    trainer = trainer_of(Leaves)
    with pytest.raises(RewardError, match=r"raised SystemExit\(0\) in all 2 rollouts"):
        trainer.rollout_func(prompts(1, 1), trainer)


def test_a_row_that_reset_refuses_is_the_datas_fault_and_stops_the_run(trainer_of):
    class Picky(Fragile):
        def reset(self, *, number):
            if number == 1:
                raise DataError("row 1 is no task")
            super().reset(number=number)

    trainer = trainer_of(Picky)
    with pytest.raises(DataError, match="row 1 is no task"):
        trainer.rollout_func(prompts(0, 1), trainer)


def test_eight_slow_environments_take_the_time_of_one(trainer_of):
    trainer = trainer_of(Slow, step_timeout_s=10.0)
    trainer.rollout_func(prompts(0, 2), trainer)
    started_s = time.perf_counter()
    out = trainer.rollout_func(prompts(0, 1, 2, 3, 0, 1, 2, 3), trainer)
    # 2 s one after another; sampling four tokens takes the rest.
    assert time.perf_counter() - started_s < 1.5
    assert out["environment_reward"] == [0.0, 0.1, 0.2, 0.3, 0.0, 0.1, 0.2, 0.3]


def test_an_answer_that_leaves_no_room_ends_the_rollout_within_its_limit(trainer_of):
    trainer = trainer_of(Talkative)
    out = trainer.rollout_func(prompts(0, 2), trainer)
    assert all(0 < len(ids) <= 4 for ids in out["completion_ids"])
    assert all(set(mask) == {1} for mask in out["env_mask"])
    assert [turn["role"] for turn in out["turns"][0]] == ["assistant", "tool"]


def test_a_prompt_longer_than_the_models_context_gets_no_action_and_does_not_raise(trainer_of):
    trainer = trainer_of(Fragile)
    trainer.model.config.max_position_embeddings = 20
    out = trainer.rollout_func(prompts(2), trainer)
    assert out["env_mask"] == [[0]]
    assert out["turns"] == [[]]
    assert out["environment_reward"] == [0.2]


class SilentTrainer(ComposerReplicationTrainer):
    """Samples nothing for every second context, as a server may."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations):
        ids, logps = super()._generate_single_turn(
            prompt_ids, images, multimodal_fields, num_generations
        )
        return [[] if index % 2 else row for index, row in enumerate(ids)], logps


def test_an_empty_completion_is_judged_like_any_other_and_never_raises(trainer_of):
    trainer = trainer_of(Fragile, kind=SilentTrainer)
    out = trainer.rollout_func(prompts(0, 2), trainer)
    eos = trainer.processing_class.eos_token_id
    assert (out["completion_ids"][1], out["env_mask"][1]) == ([eos], [0])
    assert out["turns"][1][0] == {"role": "assistant", "content": ""}
    assert out["environment_reward"] == [0.0, 0.2]
    assert [len(sites) for sites in out["rollout_hint_sites"]] == [1, 0]
    trainer.train()
    assert trainer.state.log_history[0]["completions/min_length"] == 0.0


def test_beside_a_run_the_same_task_is_played_in_environments_of_its_own(trainer_of):
    trainer = trainer_of(Fragile)
    fresh = trainer.rollout_func.fresh()
    assert fresh._pool is not trainer.rollout_func._pool
    assert fresh(prompts(3), trainer)["environment_reward"] == [0.3]


def test_a_reward_that_is_missing_without_a_failure_is_an_error():
    with pytest.raises(RewardError, match="a reward is a number"):
        environment_reward(environment_reward=[1.0, None], environment_failure=["", ""])
    assert environment_reward(
        environment_reward=[1.0, None], environment_failure=["", "timeout: x"]
    ) == [1.0, None]
