"""Models that a prefix tree does not reproduce are told apart before they train."""

import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from composer_replication.step import packed_support, tree_attention
from composer_replication.step.packed_support import why_not_packed

sys.path.insert(0, str(Path(__file__).parents[2] / "numerics"))
import tiny_families

# Some architectures warn about their own configuration.
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
REFUSED = {
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "it has conv layers"),
    "llama4_text": (
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 8,
        },
        "it has chunked_attention layers",
    ),
    "gpt_oss": (
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        "passes s_aux",
    ),
    # Biases by distance in the row, and attention of its own that no interface reaches.
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "away from those of separate forwards"),
    "gpt_neo": (
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
        "away from those of separate forwards",
    ),
    "bloom": ({"n_layer": 2, "n_head": 4}, "its forward refuses a tree"),
    # A window longer than the probe's sequences, in the mask and nowhere else.
    "qwen2_moe": (
        {
            "use_sliding_window": True,
            "sliding_window": 600,
            "layer_types": ["sliding_attention"] * 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
        "its window of 600 tokens is in its mask alone",
    ),
    "opt": (
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1},
        "so it draws random numbers",
    ),
    "seed_oss": (
        {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.1},
        "so it draws random numbers",
    ),
    "starcoder2": ({"residual_dropout": 0.1}, "so it draws random numbers"),
    "mixtral": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
        "so it draws random numbers",
    ),
    "phimoe": (
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        "so it draws random numbers",
    ),
    "biogpt": ({"attention_probs_dropout_prob": 0.1}, "so it draws random numbers"),
}
ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 256,
    },
}


def model_of(model_type, **settings):
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | settings))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


@pytest.mark.parametrize("model_type", REFUSED)
def test_attention_that_a_tree_does_not_reproduce_is_found(model_type):
    settings, reason = REFUSED[model_type]
    assert reason in why_not_packed(model_of(model_type, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_every_family_that_is_tested_packs(family, dtype):
    assert why_not_packed(tiny_families.tiny_model(family, dtype=dtype)) is None


def test_the_probe_says_nothing_of_its_own_precision(monkeypatch):
    """It is without autocast; training, which may be with it, warns for itself."""
    warned = []

    def warn(_query, _value, _scoring):
        warned.append(True)
        tree_attention._warn_of_plain_products("queries are torch.float32")
        return "it is CUDA's"

    monkeypatch.setattr(tree_attention, "why_no_flash", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert why_not_packed(tiny_families.tiny_model("llama")) is None
    assert warned


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_frequencies_of_the_longest_sequence_are_refused(kind):
    """One long pair in a step would turn the positions of every rollout."""
    model = model_of("llama", head_dim=8, rope_parameters=ROPES[kind])
    assert f"its {kind} rotary frequencies follow the longest sequence" in why_not_packed(model)


def test_rotary_frequencies_of_each_kind_of_layer_are_looked_at():
    ropes = {"full_attention": ROPES["dynamic"], "sliding_attention": {"rope_type": "default"}}
    model = tiny_families.tiny_model("llama")
    model.config.rope_parameters = ropes
    assert "its dynamic rotary frequencies" in why_not_packed(model)


def test_fixed_rotary_frequencies_pack():
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4,
            "original_max_position_embeddings": 256}  # fmt: skip
    assert why_not_packed(model_of("llama", head_dim=8, rope_parameters=rope)) is None


def test_a_skipped_layer_is_a_reason_whatever_the_probe_saw():
    model = tiny_families.tiny_model("llama")
    model.model.layerdrop = 0.01
    assert "model drops 1% of its values" in why_not_packed(model)


def test_an_adapter_that_starts_at_a_token_is_refused():
    adapter = peft.LoraConfig(r=2, alora_invocation_tokens=[20, 21], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_families.tiny_model("llama", dtype=torch.float32), adapter)
    assert "its adapter starts at a token of each sequence" in why_not_packed(model)


def test_what_the_probe_draws_leaves_the_generator_and_the_checkpoints_alone():
    model = model_of("starcoder2", residual_dropout=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    before = torch.get_rng_state()
    assert "so it draws random numbers" in why_not_packed(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


@pytest.mark.parametrize("rate", ["attention_dropout", "resid_pdrop"])
def test_dropout_is_a_reason_with_its_place_and_rate(rate):
    family = "llama" if rate == "attention_dropout" else "gpt2"
    reason = why_not_packed(tiny_families.tiny_model(family, **{rate: 0.25}))
    assert "drops 25% of its values" in reason
    assert "layers.0" in reason or "h.0" in reason


def test_a_model_that_reads_images_is_not_packed():
    model = tiny_families.tiny_model("llama")
    model.config.vision_config = {}
    assert "it reads images" in why_not_packed(model)


def test_the_probe_changes_nothing_of_the_model():
    model = tiny_families.tiny_model("qwen3", dtype=torch.float32)
    state, random_state = model.config._attn_implementation, torch.get_rng_state()
    ids = torch.arange(6, 26)[None]
    before = model(input_ids=ids).logits
    assert why_not_packed(model) is None
    assert model.training
    assert model.config._attn_implementation == state
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_probe_multiplies_in_fp32_where_a_run_has_tf32(monkeypatch):
    """TF32 is as far off as the probe allows, so a sound model would lose its tree."""
    products = torch.backends.cuda.matmul
    own_forward = packed_support.tree_hidden_states
    seen: list[str] = []

    def forward(*args):
        seen.append(products.fp32_precision)
        return own_forward(*args)

    monkeypatch.setattr(packed_support, "tree_hidden_states", forward)
    model = tiny_families.tiny_model("llama", dtype=torch.float32)
    before = products.fp32_precision, torch.backends.fp32_precision
    try:
        # Not set of its own, as in a fresh process; another test of this one may have set it.
        products.fp32_precision, torch.backends.fp32_precision = "none", "tf32"
        assert why_not_packed(model) is None
        assert (seen, products.fp32_precision) == (["ieee"], "tf32")
        torch.backends.fp32_precision = "ieee"
        assert products.fp32_precision == "ieee"
        products.fp32_precision = "tf32"
        assert why_not_packed(model) is None
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision, torch.backends.fp32_precision = before


def test_a_tree_without_its_mask_is_caught_by_the_probe(monkeypatch):
    class BlindKernel(packed_support.RectangleKernel):
        """Every row sees all rows before it, of other branches too."""

        def __init__(self, tree, device):
            super().__init__(tree, device)
            self._tree = packed_support.PrefixTree([tree.token_ids.numpy()])

    monkeypatch.setattr(packed_support, "RectangleKernel", BlindKernel)
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_families.tiny_model("llama", dtype=dtype)
        assert "away from those of separate forwards" in why_not_packed(model)
