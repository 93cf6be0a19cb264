"""TRL's vLLM path passes through our rollout loop: limits, exact ids and the sampler's log-probs.

vLLM needs CUDA. Here its place in TRL is taken by an object with the part of TRL's `VLLMGeneration`
that TRL and we use, which the first test pins; what a GPU measures is marked `cuda` elsewhere.
"""

import inspect
import math

import pytest
from datasets import Dataset
from trl.generation.vllm_generation import VLLMGeneration

from composer_replication import ComposerConfig, ComposerReplicationTrainer, EnvironmentRollouts
from composer_replication.environments.protocol import Observation, ToolError
from composer_replication.training.trl_hooks import GRPOTrainer

ROWS = [{"prompt": [{"role": "user", "content": f"Task {i}"}]} for i in range(4)]


def test_trl_reads_the_length_limit_at_every_call_and_returns_ids_before_logps():
    parameters = list(inspect.signature(VLLMGeneration.generate).parameters)
    assert parameters == ["self", "prompts", "images", "num_generations", "profiler"]
    generate = inspect.getsource(VLLMGeneration.generate)
    assert "max_completion_length = self.max_completion_length" in generate
    assert "return prompt_ids, completion_ids, logprobs, logprob_token_ids" in generate
    single_turn = inspect.getsource(GRPOTrainer._generate_single_turn)
    assert "_, completion_ids, logprobs, _ = self.vllm_generation.generate(" in single_turn
    assert "[[lp[0] for lp in seq] for seq in logprobs]" in single_turn


class RecordedSampler:
    """Answers with fixed ids; keeps what it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.max_completion_length = 999
        self.limits = []
        self.num_syncs = 0

    def sync_weights(self):
        self.num_syncs += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        assert num_generations == 1
        self.limits.append(self.max_completion_length)
        ids = [self.answer[: self.max_completion_length] for _ in prompts]
        logps = [[[-0.5 - index] for index in range(len(row))] for row in ids]
        return prompts, ids, logps, None


class TwoTurns:
    def reset(self, **row):
        self.num_actions = 0

    def _step_text(self, action):
        self.num_actions += 1
        error = ToolError("bad", "No.")
        return Observation("error: No.", is_done=self.num_actions == 2, error=error)

    def get_reward(self):
        return 0.5


@pytest.fixture
def trainer(tmp_path, tiny_llama, smollm2_tokenizer):
    args = ComposerConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=64,
        max_steps=1,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        vllm_importance_sampling_mode="token_truncate",
    )
    made = ComposerReplicationTrainer(
        model=tiny_llama(),
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=smollm2_tokenizer,
        rollout_func=EnvironmentRollouts(TwoTurns, ROWS, max_turns=2, max_action_tokens=5),
    )
    made.use_vllm = True
    made.vllm_generation = RecordedSampler(answer=[10, 11, 12, smollm2_tokenizer.eos_token_id])
    made._last_loaded_step = -1
    return made


def test_ids_and_logps_of_the_sampler_arrive_in_place_and_its_limit_is_put_back(trainer):
    out = trainer.rollout_func([ROWS[0]["prompt"], ROWS[1]["prompt"]], trainer)
    sampler = trainer.vllm_generation
    assert sampler.limits == [5, 5]
    assert sampler.max_completion_length == 999
    for ids, mask, logps in zip(
        out["completion_ids"], out["env_mask"], out["logprobs"], strict=True
    ):
        assert len(ids) == len(mask) == len(logps)
        sampled = [i for i, is_sampled in enumerate(mask) if is_sampled]
        assert [ids[i] for i in sampled] == sampler.answer * 2
        assert [logps[i] for i in sampled] == [-0.5, -1.5, -2.5, -3.5] * 2
        assert {logps[i] for i, is_sampled in enumerate(mask) if not is_sampled} == {0.0}


def test_an_answer_longer_than_allowed_is_cut_with_its_logps(trainer):
    trainer.vllm_generation.answer = list(range(10, 40))
    trainer.rollout_func.max_action_tokens = 3
    out = trainer.rollout_func([ROWS[0]["prompt"]], trainer)
    assert trainer.vllm_generation.limits == [3, 3]
    assert sum(out["env_mask"][0]) == 6
    assert len(out["logprobs"][0]) == len(out["completion_ids"][0])


def test_a_sampler_that_answers_nothing_gives_a_rollout_that_trains_on_nothing(trainer):
    trainer.vllm_generation.answer = []
    out = trainer.rollout_func([ROWS[0]["prompt"]], trainer)
    assert sum(out["env_mask"][0]) == 0
    assert len(out["logprobs"][0]) == len(out["completion_ids"][0]) > 0


def test_a_step_with_trls_sampling_correction_trains(trainer):
    trainer.train()
    row = trainer.state.log_history[0]
    assert trainer.vllm_generation.num_syncs >= 1
    # The correction compares the sampler's log-probs with the policy's: there is a ratio.
    assert row["sampling/importance_sampling_ratio/mean"] > 0
    assert math.isfinite(row["loss"])
    assert row["tokens/sdpo"] > 0
