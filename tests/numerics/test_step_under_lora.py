"""`step` on a LoRA policy: gradients on the adapter alone, and the base model as the teacher."""

import contextlib
from functools import partial

import pytest
import slow_oracle
import tiny_families
import torch
from test_step_on_every_family import SETTINGS, TEMPERATURE, assert_equal_gradients, gradients

from composer_replication import ComposerDataCollator
from composer_replication.errors import ModelError
from composer_replication.step import step
from composer_replication.step.hidden_states import in_eval_mode
from composer_replication.training.teacher import PolicyTeacher

# PEFT's and transformers' own deprecations are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ("llama", "qwen3", "gemma3", "phi")


@pytest.fixture(scope="module")
def collator():
    return ComposerDataCollator(tiny_families.chat_tokenizer())


def lora_model(family, **options):
    """A policy whose adapter is random and so does something, without dropout."""
    from peft import LoraConfig, get_peft_model

    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(
            tiny_families.tiny_model(family),
            LoraConfig(r=4, init_lora_weights=False, **settings),
            autocast_adapter_dtype=False,
        )
    return model.double().train()


def adapters_off(model):
    return partial(
        PolicyTeacher(model, contextlib.nullcontext, without_adapters=True).open,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("teacher_kind", ["live", "frozen"])
def test_every_channel_equals_the_oracle_on_the_adapter_alone(family, teacher_kind, collator):
    model = lora_model(family)
    is_frozen = teacher_kind == "frozen"
    # The oracle's frozen teacher is another model that never had an adapter.
    base = tiny_families.tiny_model(family) if is_frozen else None
    ours = step(
        model,
        tiny_families.BATCH,
        collator,
        settings=SETTINGS,
        teacher=adapters_off(model) if is_frozen else None,
    )
    theirs = slow_oracle.sums(
        model, tiny_families.BATCH, collator, temperature=TEMPERATURE, teacher=base
    )
    tolerance = 1e-6 if family == "gemma3" else 1e-11
    for name, expected in theirs.items():
        assert ours[name].loss_sum.item() == pytest.approx(expected.item(), rel=tolerance)
        ours_by_name = gradients(model, ours[name].loss_sum)
        assert all("lora_" in parameter for parameter in ours_by_name)
        assert_equal_gradients(ours_by_name, gradients(model, expected), tolerance)


def test_the_frozen_and_the_live_teacher_differ_under_a_random_adapter(collator):
    model = lora_model("llama")
    sums = [
        step(model, tiny_families.BATCH, collator, channels=("sdpo",), teacher=teacher)["sdpo"]
        for teacher in (None, adapters_off(model))
    ]
    assert sums[1].loss_sum.item() > 2 * sums[0].loss_sum.item()


def test_a_head_that_trains_beside_the_adapter_is_read_with_and_without_it(collator):
    model = lora_model("phi", modules_to_save=["lm_head"])
    with torch.no_grad():
        for parameter in model.get_output_embeddings().modules_to_save.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    base = tiny_families.tiny_model("phi")
    ours = step(
        model, tiny_families.BATCH, collator, channels=("sdpo",), teacher=adapters_off(model)
    )["sdpo"].loss_sum
    theirs = slow_oracle.sdpo_sum(model, tiny_families.SITES, collator, teacher=base)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-11)
    ours_by_name = gradients(model, ours)
    assert sum("modules_to_save" in name for name in ours_by_name) == 2  # weight and bias
    assert_equal_gradients(ours_by_name, gradients(model, theirs), 1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [6], "lm_head": [6]}},
    ],
)
def test_an_adapter_on_the_head_is_refused_since_its_weight_alone_is_not_the_head(
    options, collator
):
    model = lora_model("llama_untied", **options)
    with pytest.raises(ModelError, match="adapter on its output head"):
        step(model, tiny_families.BATCH, collator, channels=("dpo",))


def test_the_teachers_mode_leaves_every_modules_own_mode_as_it_was():
    model = lora_model("llama", lora_dropout=0.1)
    model.get_base_model().model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with in_eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == before
