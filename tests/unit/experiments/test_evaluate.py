"""An evaluation plays what the model says, and leaves model and random state as they were."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from composer_replication.environments.registry import environment_class
from composer_replication.experiments import evaluate as evaluate_module
from composer_replication.experiments.evaluate import (
    EpisodeOutcome,
    EvaluationResult,
    evaluate,
)
from composer_replication.experiments.forgetting_probe import (
    OLD_CONVENTION_TEXT,
    everyday_replies,
    old_convention_rows,
    text_loss,
)
from composer_replication.experiments.pair_margins import pair_margin
from composer_replication.experiments.policy_sampling import PolicySampler, evaluating
from composer_replication.experiments.task_registry import TASKS, task_rows
from composer_replication.training.action_sampling import SampledAction
from composer_replication.training.rollout_episode import Limits
from composer_replication.training.rollouts import EnvironmentRollouts

LIMITS = Limits(max_action_tokens=64, max_completion_tokens=512, max_context_tokens=None)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(seed=3)


def greedy_ids(model, context, num_tokens):
    """Argmax by a whole forward for each token: no cache, no padding."""
    ids = list(context)
    for _ in range(num_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


def test_greedy_actions_are_the_likeliest_tokens_whatever_shares_their_batch(
    model, smollm2_tokenizer
):
    contexts = [[5, 6, 7], [11] * 9, [8], [9, 10, 11, 12, 13]]
    wanted = [greedy_ids(model, context, 6) for context in contexts]
    for batch_size in (1, 3, 64):
        sampler = PolicySampler(model, smollm2_tokenizer, "greedy", batch_size=batch_size)
        with evaluating(model, seed=0, is_bf16=False):
            assert [action.ids for action in sampler(contexts, 6)] == wanted


@pytest.mark.parametrize("decoding", ["greedy", "sampled"])
def test_a_models_own_settings_do_not_enter(model, smollm2_tokenizer, decoding, monkeypatch):
    """Qwen2.5-Instruct ships a repetition penalty, which pushes down what a task asks to copy."""
    contexts = [[5, 6, 7, 5, 6, 7], [11] * 9]

    def actions():
        sampler = PolicySampler(model, smollm2_tokenizer, decoding)
        with evaluating(model, seed=0, is_bf16=False):
            return [action.ids for action in sampler(contexts, 12)]

    plain = actions()
    own = GenerationConfig(
        repetition_penalty=8.0, no_repeat_ngram_size=2, min_p=0.9, suppress_tokens=plain[0][:2]
    )
    monkeypatch.setattr(model, "generation_config", own)
    assert actions() == plain
    assert model.generation_config is own


def test_limits_of_the_environment_reach_its_pool(model, smollm2_tokenizer, monkeypatch):
    made = []

    class Noted(EnvironmentRollouts):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append((self._pool.timeout_s, self._pool.max_concurrency))

    monkeypatch.setattr(evaluate_module, "EnvironmentRollouts", Noted)
    rows = task_rows("call_format", "heldout", num_episodes=1).prompts
    evaluate(model, smollm2_tokenizer, "call_format", rows, decoding="greedy",
             step_timeout_s=300.0, max_concurrency=4, max_action_tokens=2)  # fmt: skip
    assert made == [(300.0, 4)]


def test_a_model_in_training_goes_on_as_if_nothing_had_been_evaluated(model, smollm2_tokenizer):
    rows = task_rows("call_format", "heldout", num_episodes=2).prompts
    model.train()
    torch.manual_seed(7)
    before = torch.get_rng_state()

    def sampled(seed):
        return evaluate(
            model,
            smollm2_tokenizer,
            "call_format",
            rows,
            decoding="sampled",
            max_action_tokens=6,
            seed=seed,
        )

    first = sampled(1)
    assert sampled(1) == first
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sampled(2) != first
    model.eval()


def test_every_sample_of_a_prompt_is_counted_under_it(model, smollm2_tokenizer):
    rows = task_rows("call_format", "heldout", num_episodes=2).prompts
    result = evaluate(
        model,
        smollm2_tokenizer,
        "call_format",
        rows,
        decoding="sampled",
        num_samples=3,
        max_action_tokens=5,
    )
    assert [episode.row for episode in result.episodes] == [0, 0, 0, 1, 1, 1]
    assert result.outcomes() == [0.0, 0.0]
    assert (result.success.rate, result.success.num_prompts) == (0.0, 2)
    assert result.num_actions == 6
    assert 6 <= result.num_tokens <= 30
    assert result.error_kinds == {"not_json": 6}
    assert [turn["role"] for turn in result.episodes[0].turns] == ["assistant", "tool"]


def test_a_rate_is_the_mean_over_prompts_of_their_samples():
    def episode(row, reward, kinds=()):
        return EpisodeOutcome(row, reward, kinds, 1, 4, ())

    result = EvaluationResult(
        "sampled",
        (
            episode(0, 1.0),
            episode(0, 0.9, ("b", "a")),
            episode(1, 0.6 + 0.4),
            episode(1, 0.1 + 0.1 + 0.1 + 0.3 + 0.4, ("a",)),
            episode(2, None),
            episode(2, 0.6, ("a",)),
        ),
        num_samples=2,
    )
    assert result.outcomes() == [0.5, 1.0, 0.0]
    assert result.success.rate == 0.5
    assert result.mean_reward == pytest.approx(4.5 / 6)
    assert list(result.error_kinds.items()) == [("a", 3), ("b", 1)]


def answers(tokenizer, texts):
    """A policy that says these texts, one a turn, to every context."""
    waiting = list(texts)

    def sample(contexts, max_new_tokens):
        ids = tokenizer(waiting.pop(0) + "<|im_end|>")["input_ids"]
        assert len(ids) <= max_new_tokens
        return [SampledAction(ids, None) for _ in contexts]

    return sample


def test_a_rollout_takes_its_actions_from_whoever_samples_them(smollm2_tokenizer):
    row = task_rows("api_drift", "heldout", num_episodes=1).prompts[0]
    old = {"tool": "read", "path": row["prompt"][-1]["content"][5:-1]}
    new = {"tool": "read", "file": old["path"]}
    rollouts = EnvironmentRollouts(environment_class("api_drift"), [row], max_turns=4)
    sample = answers(smollm2_tokenizer, [json.dumps(old), json.dumps(new)])
    (episode,) = rollouts.play([row["prompt"]], smollm2_tokenizer, sample, LIMITS)
    assert episode.reward == 0.7
    assert [site.error_kind for site in episode.hint_sites] == ["unknown_key"]


def test_the_old_convention_works_where_a_prompt_names_it(smollm2_tokenizer):
    rows = task_rows("api_drift", "heldout", num_episodes=1).prompts
    (row,) = old_convention_rows("api_drift", rows)
    request = rows[0]["prompt"][-1]["content"]
    assert row["prompt"][-1]["content"] == f"{request}\n\n{OLD_CONVENTION_TEXT}"
    assert row["prompt"][:-1] == rows[0]["prompt"][:-1]
    old = json.dumps({"tool": "read", "path": request[5:-1]})
    rollouts = EnvironmentRollouts(environment_class("api_drift"), [row], max_turns=4)
    sample = answers(smollm2_tokenizer, [old])
    (episode,) = rollouts.play([row["prompt"]], smollm2_tokenizer, sample, LIMITS)
    assert episode.reward == 1.0
    assert not old_convention_rows("call_format", rows)


def test_the_everyday_replies_are_no_text_of_a_task():
    replies = everyday_replies()
    assert len(replies) == 24
    for task in TASKS:
        for split in ("train", "heldout"):
            texts = {
                message["content"]
                for row in task_rows(task, split).prompts
                for message in row["prompt"]
            }
            assert not texts & {reply.chosen for reply in replies}


def test_the_text_loss_is_that_of_a_plain_forward(model, smollm2_tokenizer):
    found = text_loss(model, smollm2_tokenizer)
    total, count = 0.0, 0
    for reply in everyday_replies():
        messages = [{"role": m.role, "content": m.content} for m in reply.state]
        state = smollm2_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        action = smollm2_tokenizer(reply.chosen + "<|im_end|>")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([state + action])).logits[0, len(state) - 1 : -1]
        logps = logits.double().log_softmax(-1)
        total -= float(logps[range(len(action)), action].sum())
        count += len(action)
    assert found.num_tokens == count
    assert found.nats_per_token == pytest.approx(total / count, rel=1e-5)
    # Random weights know nothing: every token of the vocabulary is about as likely.
    assert found.nats_per_token == pytest.approx(torch.tensor(49152.0).log().item(), rel=0.05)


def test_the_margin_turns_with_the_sides_of_the_pairs(model, smollm2_tokenizer):
    pairs = task_rows("api_drift", "heldout", num_episodes=8).pairs[:5]
    turned = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    there = pair_margin(model, smollm2_tokenizer, pairs)
    back = pair_margin(model, smollm2_tokenizer, turned)
    assert there.mean_nats == pytest.approx(-back.mean_nats, rel=1e-5)
    assert there.preferred.rate == pytest.approx(1 - back.preferred.rate)
