"""`[lora]` is held against the modules of the model before its weights load."""

import sys

import pytest

from composer_replication.config.execution_sections import LoraConfig
from composer_replication.errors import ConfigError, MissingDependencyError
from composer_replication.experiments.lora_settings import check_lora, peft_config


@pytest.fixture
def config(tiny_llama):
    return tiny_llama().config


def test_the_settings_reach_peft(config):
    lora = LoraConfig(r=4, alpha=8, dropout=0.1, target_modules=["q_proj", "mlp.up_proj"])
    check_lora(lora, config)
    found = peft_config(lora)
    assert (found.r, found.lora_alpha, found.lora_dropout) == (4, 8, 0.1)
    assert set(found.target_modules) == {"q_proj", "mlp.up_proj"}


def test_a_module_that_the_model_does_not_have_is_named_with_the_nearest(config):
    with pytest.raises(ConfigError) as caught:
        check_lora(LoraConfig(target_modules=["v_proj", "q_prj"]), config)
    assert str(caught.value) == (
        "lora.target_modules names 'q_prj', and no linear module of this model is called that. "
        "Did you mean 'q_proj'? Correct the name, or set 'all-linear'."
    )


def test_an_adapter_on_the_output_head_is_refused(config):
    with pytest.raises(ConfigError, match="names lm_head, the output head"):
        check_lora(LoraConfig(target_modules=["lm_head"]), config)


def test_a_missing_peft_is_told_before_the_model_loads(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"Install composer-replication\[lora\]"):
        check_lora(LoraConfig(), config)
