"""Final hidden states and the output head of any Hugging Face causal LM, wrapped or not.

The forward goes through the model that was passed in (DDP, PEFT, autocast wrappers and all) and a
hook on its backbone captures what the head would read, so no `[B, T, V]` logits are ever built.
Letters: B sequences, T tokens, H hidden.
"""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from composer_replication.losses.head import OutputHead


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside DDP (`module`) and PEFT (`get_base_model`) wrappers."""
    inner: nn.Module = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(getattr(inner, "module", None), nn.Module):
            inner = cast(nn.Module, inner.module)
        else:
            inner = cast(nn.Module, inner.get_base_model())  # pyright: ignore[reportCallIssue]
    return inner


def final_hidden_states(
    model: nn.Module, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]
) -> Float[Tensor, "B T H"]:
    """Hidden states after the last norm; row `t` predicts token `t + 1`.

    Positions are counted over real tokens, so padding on either side changes nothing.
    """
    captured: list[Tensor] = []

    def capture(_module: nn.Module, _args: object, output: object) -> None:
        captured.append(cast(Tensor, output[0]))  # pyright: ignore[reportIndexIssue]

    handle = causal_lm(model).base_model.register_forward_hook(capture)
    try:
        model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
        )
    finally:
        handle.remove()
    return captured[0]


def output_head(model: nn.Module) -> OutputHead:
    """The output head, with the scaling and soft-capping of the architecture's logits."""
    lm = causal_lm(model)
    head = cast(nn.Linear, lm.get_output_embeddings())
    config = lm.config.get_text_config()
    return OutputHead(
        weight=head.weight,
        bias=head.bias,
        logit_scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _logit_scale(config: PreTrainedConfig) -> float:
    # Families name the same factor differently; Granite and MiniCPM3 divide by theirs.
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def rows_before(
    hidden_BTH: Float[Tensor, "B T H"], index: Int[Tensor, "M 2"]
) -> Float[Tensor, "M H"]:
    """The hidden rows that predict the tokens at `index` (row, position)."""
    return hidden_BTH[index[:, 0], index[:, 1] - 1]


def zero_in_graph(model: nn.Module) -> Float[Tensor, ""]:
    """A zero that a trainable parameter produced, so an empty channel still backpropagates."""
    parameter = next(p for p in model.parameters() if p.requires_grad)
    return parameter.reshape(-1)[:0].sum(dtype=torch.float32)
