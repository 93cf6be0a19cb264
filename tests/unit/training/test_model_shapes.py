"""Models of a public shape: their sizes, their random weights and their tokenizer."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from composer_replication.errors import ModelError
from composer_replication.planner.model_files import shipped_shapes
from composer_replication.training.shape_models import (
    build_shape_model,
    shape_config,
)

SHAPE = "qwen2.5-0.5b"


def build(
    tokenizer: PreTrainedTokenizerBase, seed: int, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    return build_shape_model(SHAPE, tokenizer, dtype=dtype, attn_implementation="sdpa", seed=seed)


@pytest.fixture(scope="module")
def shape_model(smollm2_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return build(smollm2_tokenizer, seed=0)


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name: str, num_parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name))
    assert model.num_parameters() == num_parameters


def test_every_shape_is_tested_and_sorted_by_size() -> None:
    assert shipped_shapes() == ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"]


def test_positions_and_norms_are_qwens() -> None:
    config = shape_config("qwen2.5-7b")
    assert config.rope_parameters["rope_theta"] == 1e6
    assert config.rms_norm_eps == 1e-6
    assert config.max_position_embeddings == 32768
    assert set(config.layer_types) == {"full_attention"}


def test_weights_start_out_as_the_architecture_says(shape_model: PreTrainedModel) -> None:
    for name, parameter in shape_model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if parameter.ndim > 1:
            assert parameter.float().std().item() == pytest.approx(0.02, rel=0.01), name
            assert abs(parameter.float().mean().item()) < 1e-3, name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


def test_no_two_rows_of_the_vocabulary_are_equal(shape_model: PreTrainedModel) -> None:
    rows_VD = shape_model.get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(1)
    direction_D = torch.randn(rows_VD.shape[1], generator=generator, dtype=torch.float64)
    fingerprints = torch.cat([rows.double() @ direction_D for rows in rows_VD.split(16384)])
    assert fingerprints.unique().numel() == rows_VD.shape[0] == 151_936


def test_layers_do_not_share_their_numbers(shape_model: PreTrainedModel) -> None:
    first, second = (layer.mlp.up_proj.weight.float() for layer in shape_model.model.layers[:2])
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(correlation.item()) < 0.01


def test_small_shapes_are_tied_and_generate_in_smollm2_tokens(
    shape_model: PreTrainedModel, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert shape_model.get_output_embeddings().weight is shape_model.get_input_embeddings().weight
    assert shape_model.config.vocab_size > len(smollm2_tokenizer)
    assert shape_model.generation_config.eos_token_id == smollm2_tokenizer.eos_token_id
    assert shape_model.generation_config.pad_token_id == smollm2_tokenizer.pad_token_id
    logits_BTV = shape_model(torch.tensor([[1, 4093, 198]])).logits
    assert logits_BTV.isfinite().all()
    assert logits_BTV.float().std().item() == pytest.approx(0.02 * 896**0.5, rel=0.1)


def test_the_seed_alone_decides_the_weights(
    shape_model: PreTrainedModel, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(123)
    state_before = torch.random.get_rng_state()
    again = build(smollm2_tokenizer, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state_before)
    for expected, weight in zip(shape_model.parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, expected)
    other = build(smollm2_tokenizer, seed=1)
    assert not torch.equal(
        other.get_input_embeddings().weight, shape_model.get_input_embeddings().weight
    )


def test_unknown_shape_is_told_with_the_nearest() -> None:
    with pytest.raises(ModelError) as raised:
        shape_config("qwen2.5-0.6b")
    assert str(raised.value) == (
        "shape:qwen2.5-0.6b is not a shape that this package ships. Did you mean 'qwen2.5-0.5b'? "
        "A model of your own can be given as a folder."
    )
