"""Final hidden states and the output head of any Hugging Face causal LM, wrapped or not.

The forward goes through the model that was passed in (DDP, PEFT, autocast wrappers and all) and a
hook on its decoder captures what the head would read, so no `[B, T, V]` logits are ever built.
Letters: B sequences, T tokens, H hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel

from composer_replication.errors import ConfigError, ModelError
from composer_replication.losses.head import OutputHead
from composer_replication.step.attention_interface import follow_trees
from composer_replication.step.tree_attention import TreeKernel
from composer_replication.step.trie import PrefixTree

_MAX_HEAD_ERROR = 0.02
"""Of the largest logit. bf16 rounds logits by 0.004 of their size; a soft cap or a scale that is
left out moves them by more."""

_WHAT_WORKS = (
    "Use a decoder-only model of a known family, such as Llama, Qwen, Gemma, Mistral or Granite."
)


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

    Raises:
        ConfigError: DDP that broadcasts buffers.
        ModelError: an architecture whose decoder cannot be told from its head.
    """
    hidden, _ = _hidden_and_last_logits(model, input_ids, attention_mask)
    return hidden


def tree_hidden_states(
    model: nn.Module, tree: PrefixTree, kernel: TreeKernel
) -> Float[Tensor, "T H"]:
    """The same for every row of a prefix tree, laid out as one long sequence.

    Raises:
        ConfigError: DDP that broadcasts buffers.
        ModelError: an architecture that a prefix tree does not reproduce.
    """
    follow_trees(causal_lm(model))
    device = next(model.parameters()).device
    hidden, _ = _forward(
        model,
        input_ids=tree.token_ids.to(device)[None],
        position_ids=tree.positions.to(device)[None],
        # Nothing reads it: the kernel knows the tree. Given in four dims it is taken as it is;
        # without one transformers would build a mask of all pairs from the positions.
        attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device),
        prefix_tree=kernel,
    )
    return hidden[0]


def _hidden_and_last_logits(
    model: nn.Module, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B V"]]:
    return _forward(
        model,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
    )


def _forward(
    model: nn.Module, **inputs: object
) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B V"]]:
    """Final hidden states and the last position's logits of one forward through every wrapper."""
    _refuse_buffer_broadcasts(model)
    captured: list[Tensor] = []

    def capture(_module: nn.Module, _args: object, output: object) -> None:
        captured.append(cast(Tensor, output[0]))  # pyright: ignore[reportIndexIssue]

    handle = _decoder(causal_lm(model)).register_forward_hook(capture)
    try:
        output = model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    if len(captured) != 1:
        raise ConfigError(
            f"One forward ran {len(captured)} decoders: nn.DataParallel splits its rows over the "
            "cards of one process. Start a process for each card, with torchrun or accelerate "
            "launch, or show the process one card with CUDA_VISIBLE_DEVICES."
        )
    return captured[0], output.logits[:, -1]


def _decoder(lm: PreTrainedModel) -> nn.Module:
    # Not `base_model`: OPT and the decoders of encoder-decoder families never call theirs.
    decoder = lm.get_decoder()
    if decoder is lm:
        raise ModelError(
            f"{type(lm).__name__} does not say which of its modules is the decoder, so the hidden "
            f"states that its output head reads cannot be captured. {_WHAT_WORKS}"
        )
    return decoder


def _refuse_buffer_broadcasts(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel) and model.will_sync_module_buffers():
        raise ConfigError(
            "DDP broadcasts buffers at every forward, and processes run different numbers of "
            "forwards: one without error turns runs none for SDPO. They would wait for each other "
            "forever. Set ddp_broadcast_buffers = False (DistributedDataParallel: "
            "broadcast_buffers=False); the buffers of causal language models are constants."
        )


def output_head(model: nn.Module) -> OutputHead:
    """The output head, with the scaling and soft-capping of the architecture's logits.

    Raises:
        ModelError: an adapter on the head, whose weight alone is not what the model computes.
    """
    lm = causal_lm(model)
    head = cast(nn.Linear, lm.get_output_embeddings())
    if hasattr(head, "base_layer") or hasattr(head, "token_adapter"):
        raise ModelError(
            "The model has an adapter on its output head. Losses multiply hidden states by the "
            "head's weight, so the adapter would neither count nor train. Take the head out of "
            "target_modules and trainable_token_indices; modules_to_save trains all of it."
        )
    config = lm.config.get_text_config()
    return OutputHead(
        weight=head.weight,
        bias=head.bias,
        logit_scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def check_output_head(model: nn.Module) -> None:
    """Refuse a model whose own logits are not what `output_head` makes of its hidden states.

    A transform before the head, or a soft cap or scale under an unknown name, would make every
    loss and gradient wrong without a sign. Costs one forward of a few tokens.

    Raises:
        ModelError: naming the architecture and the difference.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device)[None]
    with torch.no_grad(), in_eval_mode(model):
        hidden, own_logits = _hidden_and_last_logits(model, ids, torch.ones_like(ids))
        head = output_head(model)
        name = type(causal_lm(model)).__name__
        if hidden.shape[-1] != head.weight.shape[1]:
            raise ModelError(
                f"{name} has hidden states of {hidden.shape[-1]} numbers and an output head that "
                f"takes {head.weight.shape[1]}, so something stands between them. {_WHAT_WORKS}"
            )
        logits = head.logits(hidden[:, -1])
    error = float((logits - own_logits).abs().max() / own_logits.abs().max())
    if not error < _MAX_HEAD_ERROR:
        raise ModelError(
            f"The logits of {name} differ by {error:.1%} from its hidden states times its output "
            "head, so its architecture does something in between that is not known here, and every "
            f"loss would be wrong. {_WHAT_WORKS}"
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
    """A zero that a trainable parameter produced, so an empty channel still backpropagates.

    Of a model that trains nothing it is a plain zero.

    Under DDP one token goes through the model: a process without any forward would take no part in
    averaging the gradients, and the others would wait for it.
    """
    trainable = (parameter for parameter in model.parameters() if parameter.requires_grad)
    parameter = next(trainable, None)
    if parameter is None:
        return torch.zeros((), device=next(model.parameters()).device)
    if isinstance(model, DistributedDataParallel):
        token = torch.ones((1, 1), dtype=torch.long, device=parameter.device)
        _, logits = _hidden_and_last_logits(model, token, token)
        return logits.reshape(-1)[:0].sum(dtype=torch.float32)
    return parameter.reshape(-1)[:0].sum(dtype=torch.float32)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The model without dropout and without recomputation, every module's mode put back after."""
    with modes_kept(model):
        model.eval()
        yield model


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module's mode, training or not, back at the end."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training
