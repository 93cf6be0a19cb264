"""`[lora]` for PEFT, checked against the modules of the model before its weights load."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from composer_replication.config.execution_sections import LoraConfig
from composer_replication.errors import ConfigError, MissingDependencyError, nearest


def peft_config(lora: LoraConfig) -> object:
    """PEFT's own configuration of the adapter.

    Raises:
        MissingDependencyError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            "[lora] is set and the package peft is not installed. "
            "Install composer-replication[lora]."
        ) from error
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def check_lora(lora: LoraConfig, model_config: PreTrainedConfig) -> None:
    """Refuse target modules that the architecture does not have, and its output head.

    Args:
        lora: of the run.
        model_config: of the model; it is built without weights to see its modules.

    Raises:
        ConfigError: a name that no module has, with the nearest that one has.
        MissingDependencyError: peft is not installed.
    """
    peft_config(lora)
    if isinstance(lora.target_modules, str):
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    paths = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in lora.target_modules:
        if any(path == target or path.endswith(f".{target}") for path in paths):
            if target.rpartition(".")[2] == "lm_head":
                raise ConfigError(
                    "lora.target_modules names lm_head, the output head. Losses multiply hidden "
                    "states by its weight alone, so an adapter on it would neither count nor "
                    "train. Leave it out."
                )
            continue
        leaves = {path.rpartition(".")[2] for path in paths} - {"lm_head"}
        raise ConfigError(
            f"lora.target_modules names {target!r}, and no linear module of this model is called "
            f"that. {nearest(target, leaves)} Correct the name, or set 'all-linear'."
        )
