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
