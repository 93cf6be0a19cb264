"""Tiny random models of many architectures, one small chat tokenizer, and one step batch for all.

Sizes are the smallest that keep what sets a family apart: grouped heads, soft caps, scaled
embeddings, sliding windows shorter than every row, several experts.
"""

import dataclasses
import functools

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from composer_replication import HintSite, Message, PreferencePair, StepBatch
from composer_replication.batch.batches import Rollout
from composer_replication.training.model_source import own_attention

SPECIALS = ("<pad>", "<end>", "<system>", "<user>", "<assistant>", "<tool>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz ./{}:,\"_\n0123456789AHR'"
NUM_VOCAB = len(SPECIALS) + len(CHARACTERS)
PAD, END = 0, 1
WINDOW = 8

TEMPLATE = (
    "{# knows tool turns #}"
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

_SHAPE = {
    "vocab_size": NUM_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": END,
    "eos_token_id": END,
    # Large enough that logits and router choices differ; the usual 0.02 leaves all near uniform.
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}

FAMILIES = {
    "llama": ("llama", {}),
    "llama_untied": ("llama", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen2_untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mistral_sliding": ("mistral", {"sliding_window": WINDOW, "tie_word_embeddings": False}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": WINDOW,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 5.0,
        },
    ),
    "granite": (
        "granite",
        {"logits_scaling": 4.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.5},
    ),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    # A head with a bias.
    "phi": ("phi", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    # Learned positions, which padding on the left shifts unless they count real tokens.
    "gpt2": (
        "gpt2",
        {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "mixtral": ("mixtral", {**_EXPERTS, "tie_word_embeddings": False}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.1,
        },
    ),
}

MIXTURES = ("mixtral", "qwen3_moe")


def tiny_model(family, *, dtype=torch.float64, seed=0, **changes):
    """A random model of that family in training mode; every parameter is random, biases too."""
    model_type, settings = FAMILIES[family]
    config = transformers.AutoConfig.for_model(model_type, **(_SHAPE | settings | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The grouped kernels of experts take no float64.
        experts = {"experts_implementation": "eager"} if family in MIXTURES else {}
        attention = own_attention(config)
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, **experts
        )
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def exact_norms(model):
    """The model with norms in its own precision; transformers computes them in fp32 whatever it is.

    An fp32 backward rounds the sum of two gradients differently from two gradients, by 1e-8.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_rms_norm, module)
        elif type(module).__name__ == "CohereLayerNorm":
            module.forward = functools.partial(_centred_norm, module)
    return model


def _rms_norm(module, hidden):
    eps = getattr(module, "variance_epsilon", None) or module.eps
    scale = module.weight + 1 if "Gemma" in type(module).__name__ else module.weight
    return scale * hidden * (hidden.square().mean(-1, keepdim=True) + eps).rsqrt()


def _centred_norm(module, hidden):
    centred = hidden - hidden.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return module.weight * centred * (variance + module.variance_epsilon).rsqrt()


def chat_tokenizer():
    """One token for each character, whose template knows every role."""
    ids = {token: i for i, token in enumerate([*SPECIALS, *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=list(SPECIALS[2:]),
        padding_side="left",
    )
    fast.chat_template = TEMPLATE
    return fast


SHORT = (Message("user", "read a.py"),)
LONG = (Message("system", "call tools."), Message("user", "list all files of src, please."))

SITES = (
    HintSite(LONG, 'use "file".', '{"path": 1}', source="a"),
    HintSite(SHORT, "give the whole path, with a slash.", "read a", source="b"),
    HintSite(
        (*LONG, Message("assistant", "ls"), Message("tool", "no such tool")),
        "try list",
        "find",
        source="c",
    ),
)
# The sums are exact in float32, in which the collator keeps them.
PAIRS = (
    PreferencePair(LONG, '{"file": 1}', '{"path": 1}', 1.0, -40.0, -38.0, "a"),
    PreferencePair(SHORT, "read", "no", 0.5, -20.5, -9.25, "b"),
)
ROLLOUTS = (
    Rollout(
        (3, 20, 21, 22, 4),
        (8, 9, 10, 11, 12, 13, 14),
        (True, True, False, False, True, True, True),
        advantage=0.75,
    ),
    Rollout(tuple(range(6, 26)), (14, 15, 1), (True,) * 3, advantage=-0.25),
    Rollout((3, 8), tuple(range(7, 20)), (True,) * 13, advantage=-0.5),
)
BATCH = StepBatch(ROLLOUTS, SITES, PAIRS)


def off_policy(rollouts, seed=0):
    """The rollouts with log-probs of another policy: some ratios are clipped, some are not."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        dataclasses.replace(
            row,
            # Quarters are exact in float32, in which the collator keeps them.
            old_logp=tuple(
                (
                    -torch.randint(4, 33, (len(row.completion_ids),), generator=generator) / 4
                ).tolist()
            ),
        )
        for row in rollouts
    )
