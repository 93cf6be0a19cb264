"""Sampling after a shared prefill is sampling, token for token, and costs the prompt once."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MambaConfig,
    Qwen3Config,
)

import composer_replication.training.shared_prefill as shared_prefill_module
from composer_replication.training.shared_prefill import shared_prefill

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    # Its window is shorter than the longest context.
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=5, query_pre_attn_scalar=8),
}
A, B, C = [5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15], [5, 6, 7]
CONTEXTS = [A, B, A, C, B, A, B, C]


def build(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def padded(contexts):
    width = max(map(len, contexts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in contexts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in contexts])
    return {"input_ids": ids, "attention_mask": mask}


def sampled(model, contexts=CONTEXTS, **settings):
    how = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    torch.manual_seed(3)
    with torch.no_grad():
        return model.generate(
            **padded(contexts), generation_config=GenerationConfig(**(how | settings))
        )


@pytest.mark.parametrize("settings", [{}, {"do_sample": False}, {"temperature": 0.5}])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_tokens_are_drawn(name, settings):
    model = build(name)
    expected = sampled(model, **settings)
    with shared_prefill(model):
        assert torch.equal(sampled(model, **settings), expected)
    # The samples of one context differ, or a shared cache that leaks would not show.
    if settings != {"do_sample": False}:
        assert not torch.equal(expected[0], expected[2])
    assert "generate" not in vars(model)


def test_contexts_that_are_all_different_or_of_one_token_are_sampled_too():
    model = build("llama")
    for contexts in ([A, B, C], [[5], [5], [9]], [A]):
        expected = sampled(model, contexts)
        with shared_prefill(model):
            assert torch.equal(sampled(model, contexts), expected)


def test_an_adapter_takes_part():
    model = get_peft_model(
        build("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    expected = sampled(model)
    with model.disable_adapter():
        assert not torch.equal(sampled(model), expected)
    with shared_prefill(model):
        assert torch.equal(sampled(model), expected)


def test_a_prompt_is_computed_once_for_its_group():
    model = build("llama")

    def flops():
        with FlopCounterMode(display=False) as counter:
            sampled(model, [A * 4] * 8, max_new_tokens=1)
        return counter.get_total_flops()

    alone = flops()
    with shared_prefill(model):
        shared = flops()
    # 31 tokens once and 8 last ones, instead of 32 tokens eight times.
    assert shared / alone == pytest.approx(39 / 256, rel=0.15)


def real_rows(output, contexts):
    """Each row's context and what was sampled after it, without padding on the left."""
    width = max(map(len, contexts))
    return [row[width - len(c) :] for row, c in zip(output.tolist(), contexts, strict=True)]


def next_contexts(rows):
    """Of the turn after: longer by a different number of tokens each, one row gone, two new.

    One is cut within what was sampled, as an action over its budget is; the last differs from a row
    in its first token alone.
    """
    first, second, third, _, fifth, *_, last = rows
    other_start = [40, *first[1:], 23]
    new = [30, 31, 32, 33]
    return [[*third, 20, 21], [*first, 22], new, second, [*fifth, *C], last[:5], other_start]


@pytest.mark.parametrize("settings", [{"eos_token_id": 9}, {"do_sample": False}])
@pytest.mark.parametrize("name", CONFIGS)
def test_turns_go_on_from_the_caches_of_the_turn_before(name, settings):
    model = build(name)
    expected = [sampled(model, **settings)]
    contexts = [CONTEXTS]
    for _ in range(2):
        contexts.append(next_contexts(real_rows(expected[-1], contexts[-1])))
        expected.append(sampled(model, contexts[-1], **settings))
    with shared_prefill(model):
        for turn, whole in zip(contexts, expected, strict=True):
            # Inside a rollout the sampler opens its own, which must not end the caches.
            with shared_prefill(model):
                assert torch.equal(sampled(model, turn, **settings), whole)


def test_a_turn_costs_its_new_tokens_alone():
    model = build("llama")
    with shared_prefill(model):
        before = sampled(model, [A * 3, A * 2], max_new_tokens=4)
        rows = real_rows(before, [A * 3, A * 2])
        turn = [[*rows[0], *B], [*rows[1], *B]]
        with FlopCounterMode(display=False) as shared:
            after = sampled(model, turn, max_new_tokens=1)
    with FlopCounterMode(display=False) as alone:
        assert torch.equal(sampled(model, turn, max_new_tokens=1), after)
    # The last sampled token and 3 of the answer in each row, instead of 31 columns.
    assert shared.get_total_flops() / alone.get_total_flops() == pytest.approx(4 / 31, rel=0.2)


SYSTEM = list(range(20, 44))
"""A prompt that all contexts begin with."""


@pytest.mark.parametrize("system", [SYSTEM, SYSTEM[:3]])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_all_contexts_begin_with_may_have_a_forward_of_its_own(name, system, monkeypatch):
    monkeypatch.setattr(shared_prefill_module, "_WORTH_A_FORWARD", 1)
    model = build(name)
    first = [[*system, *rest] for rest in (A, B, [*A, *B], A, [50])]
    expected = sampled(model, first)
    turn = [[*row, 21, *C] for row in real_rows(expected, first)]
    with shared_prefill(model):
        assert torch.equal(sampled(model, first), expected)
        after = sampled(model, turn)
    assert torch.equal(after, sampled(model, turn))
    # One of the contexts is all that the others begin with.
    nested = [system, [*system, *A], [*system, *B]]
    with shared_prefill(model):
        found = sampled(model, nested)
    assert torch.equal(found, sampled(model, nested))


@pytest.mark.parametrize(("worth", "tokens"), [(24, 24 + 3 * 8), (49, 3 * 31 + 1)])
def test_a_common_start_is_computed_once_where_it_saves_enough(worth, tokens, monkeypatch):
    """3 contexts of 32 tokens, 24 of them common: 48 are saved, whatever is alike after that."""
    monkeypatch.setattr(shared_prefill_module, "_WORTH_A_FORWARD", worth)
    model = build("llama")
    contexts = [[*SYSTEM, first, *A[1:]] for first in (50, 51, 52)]
    with FlopCounterMode(display=False) as alone:
        sampled(model, contexts, max_new_tokens=1)
    with shared_prefill(model), FlopCounterMode(display=False) as shared:
        sampled(model, contexts, max_new_tokens=1)
    assert shared.get_total_flops() / alone.get_total_flops() == pytest.approx(tokens / 96, rel=0.1)


@pytest.mark.parametrize("settings", [{"num_return_sequences": 2}, {"num_beams": 2}])
def test_several_rows_a_context_are_left_to_generate(settings):
    model = build("llama")
    expected = sampled(model, [A, B], **settings)
    with shared_prefill(model):
        assert torch.equal(sampled(model, [A, B], **settings), expected)


@pytest.mark.parametrize(
    "settings", [{"use_cache": False}, {"cache_implementation": "static", "max_new_tokens": 2}]
)
def test_a_cache_of_another_kind_is_left_to_generate(settings):
    model = build("llama")
    expected = sampled(model, **settings)
    with shared_prefill(model):
        assert torch.equal(sampled(model, **settings), expected)


def test_a_model_without_keys_and_values_is_left_alone():
    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with shared_prefill(model):
        assert "generate" not in vars(model)


def test_generate_is_the_models_own_again_after_an_error():
    model = build("llama")
    context = shared_prefill(model)
    context.__enter__()
    assert "generate" in vars(model)
    assert not context.__exit__(KeyError, KeyError(), None)
    assert "generate" not in vars(model)
