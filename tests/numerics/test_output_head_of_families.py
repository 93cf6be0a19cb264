"""What the head reads is found on every family, and a family where it is not known is refused."""

import pytest
import tiny_families
import torch
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from composer_replication.errors import ModelError
from composer_replication.step.hidden_states import (
    check_output_head,
    final_hidden_states,
    output_head,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}


def other_model(model_type, **changes):
    config = AutoConfig.for_model(model_type, **(SIZES | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_of_every_family_passes_the_check_and_keeps_its_mode(family, dtype):
    model = tiny_families.tiny_model(family, dtype=dtype)
    check_output_head(model)
    assert model.training


def test_hidden_states_are_found_where_the_base_model_is_never_called():
    """OPT's causal model calls the decoder inside its base model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=64,
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                init_std=0.2,
            )
        ).eval()
    check_output_head(model)
    ids = torch.arange(5, 15).view(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    logits = output_head(model).logits(final_hidden_states(model, ids, mask)[mask.bool()])
    own_logits = model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(logits, own_logits[mask.bool()], atol=1e-5)


def test_a_model_that_hides_its_decoder_is_refused_by_name():
    model = other_model(
        "llama4_text",
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
    )
    with pytest.raises(ModelError, match="Llama4ForCausalLM does not say which of its modules"):
        final_hidden_states(model, torch.ones(1, 3).long(), torch.ones(1, 3).long())


def test_a_transform_between_hidden_states_and_head_is_refused_by_name():
    model = other_model("roberta", is_decoder=True)
    with pytest.raises(ModelError, match="logits of RobertaForCausalLM differ by"):
        check_output_head(model)


def test_a_head_of_another_width_than_the_hidden_states_is_refused_by_name():
    model = other_model("electra", is_decoder=True, embedding_size=16)
    with pytest.raises(ModelError, match="ElectraForCausalLM has hidden states of 32 numbers"):
        check_output_head(model)


def test_a_soft_cap_under_an_unknown_name_is_refused():
    model = other_model("recurrent_gemma", logits_soft_cap=1.0, num_key_value_heads=2, lru_width=32)
    with pytest.raises(ModelError, match="logits of RecurrentGemmaForCausalLM differ by"):
        check_output_head(model)


def test_a_scale_that_the_config_does_not_tell_is_refused():
    model = tiny_families.tiny_model("cohere", dtype=torch.float32)
    model.config.logit_scale = 1.0  # the model itself still multiplies by 0.25
    with pytest.raises(ModelError, match="logits of CohereForCausalLM differ by 300"):
        check_output_head(model)
