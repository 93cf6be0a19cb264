"""Bytes that autograd keeps for one forward of a decoder, read off the operations of its layers.

Letters: H hidden, Q all query heads, K all key-value heads, I intermediate, r rank of an adapter.
A norm keeps its input in fp32 and, where its weight is trained, the normalised input; a matrix
keeps its input where the weight is trained; attention keeps q, k, v, its output and one fp32 number
a head; the gated MLP keeps gate, up, silu(gate) and their product. Under autocast every matrix
casts its own copy of its input, and each forward keeps the bf16 weights that it cast.
"""

from dataclasses import dataclass

from composer_replication.planner.model_shape import ModelShape, adapted_linears, model_shape
from composer_replication.planner.step_case import StepCase

FP32, BF16 = 4, 2


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes of a number, by where it is."""

    weights: int
    """Of the base's weights."""
    stream: int
    """Of the residual stream."""
    compute: int
    """Of what matrices read and write."""

    @classmethod
    def of(cls, case: StepCase) -> "Precision":
        """The precisions of a case."""
        weights = BF16 if case.weights_dtype == "bfloat16" else FP32
        return cls(weights, weights, BF16 if case.autocasts else weights)


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes of a model's forward, per token and per layer.

    Example: fp32 Qwen2.5-0.5B keeps 102,000 bytes a token and layer: 4 (6H + 2Q + 2K + 4I) and
    4 for each head.
    """

    saved_per_token: int
    """Kept by one layer for its backward."""
    weight_copies: int
    """bf16 copies of trained weights that one layer's graph keeps; autocast keeps them too."""
    frozen_copies: int
    """Of frozen ones, which pass their input's gradient on; autocast forgets them."""
    input_per_token: int
    """A layer's input: all that gradient checkpointing keeps."""
    working_per_token: int
    """Most beside what is kept: gradients of the MLP, of an adapter, and one of the stream."""
    forward_per_token: int
    """Most of a forward without gradient."""
    ends_per_token: int
    """Kept once a forward: the last norm, cosines and sines."""
    output_per_token: int
    """The hidden states that leave the model."""
    score_bytes: int
    """Kept of each score of a row's attention, all heads; 0: a fused kernel keeps none."""

    @property
    def graph_copies(self) -> int:
        """All that one layer's graph keeps of weights."""
        return self.weight_copies + self.frozen_copies


def layer_memory(case: StepCase) -> LayerMemory:
    """The bytes of one forward of this case's model."""
    shape, precision = model_shape(case.model), Precision.of(case)
    stream, compute = precision.stream, precision.compute
    is_adapter = case.lora_r is not None
    kept = (
        _kept_by_adapters(case, shape, precision)
        if is_adapter
        else _kept_by_weights(shape, precision)
    )
    if keeps_scores(case):
        # Keys and values are repeated for every query head, and all three are fp32 in it.
        kept += 2 * FP32 * (shape.q_dim - shape.kv_dim)
        kept += (FP32 - compute) * (shape.q_dim + 2 * shape.kv_dim)
    copies = 0
    # An adapter is fp32 on any base; weights that are bf16 already are used as they are.
    if case.autocasts and (is_adapter or precision.weights == FP32):
        trained = (
            shape.lora_layer_parameters(case.lora_r, case.lora_targets)
            if case.lora_r is not None
            else shape.layer_linear_parameters
        )
        copies = BF16 * trained
    casts_frozen = is_adapter and case.autocasts and precision.weights == FP32
    hidden, inner = shape.hidden, shape.intermediate
    working = 2 * compute * inner
    if (
        case.lora_r is not None
        and compute == BF16
        and "down_proj" in adapted_linears(case.lora_targets)
    ):
        # The adapter's input is cast to fp32, so its gradient comes back in fp32 and is cast again,
        # beside that of the base.
        working += FP32 * inner
    last_norm = FP32 * hidden + (0 if is_adapter else stream * hidden)
    return LayerMemory(
        saved_per_token=kept,
        weight_copies=copies,
        frozen_copies=BF16 * shape.layer_linear_parameters if casts_frozen else 0,
        input_per_token=stream * hidden,
        working_per_token=working + stream * hidden,
        forward_per_token=3 * compute * inner + 3 * stream * hidden,
        ends_per_token=last_norm + 2 * stream * shape.head_dim,
        output_per_token=stream * hidden,
        score_bytes=FP32 * shape.num_heads if keeps_scores(case) else 0,
    )


def keeps_scores(case: StepCase) -> bool:
    """Whether attention is torch's plain one, which keeps a softmax of every row.

    On CUDA the flash kernel alone takes grouped heads, in half precision, and the other fused one
    refuses bf16 where there is no flash; a tree's own kernels keep no softmax.
    """
    if case.device_type != "cuda" or case.executor != "separate":
        return False
    is_half = Precision.of(case).compute == BF16
    if is_half and case.has_flash:
        return False
    num_heads = case.model.get("num_attention_heads")
    return is_half or case.model.get("num_key_value_heads") not in (None, num_heads)


def _kept_by_weights(shape: ModelShape, precision: Precision) -> int:
    """Per token of one layer whose every weight is trained."""
    hidden = shape.hidden
    stream, compute = precision.stream, precision.compute
    norms = 2 * (FP32 + stream) * hidden
    # q, k, v and gate, up: one shared input, or a cast of it each.
    inputs = 2 * compute * hidden if stream == compute else 5 * compute * hidden
    return (
        norms
        + inputs
        + _attention(shape, compute)
        + 4 * compute * shape.intermediate
        + _qk_norms(shape, compute, has_trained_norms=True)
    )


def _kept_by_adapters(case: StepCase, shape: ModelShape, precision: Precision) -> int:
    """Per token of one layer whose base is frozen under LoRA."""
    stream, compute = precision.stream, precision.compute
    assert case.lora_r is not None
    adapted = adapted_linears(case.lora_targets)
    # PEFT casts an adapter's input to the adapter's fp32, and autocast that to bf16.
    adapter = BF16 if case.autocasts else FP32
    shares_inputs = stream == compute == FP32
    inputs = {name: size for name, (size, _) in shape.linear_sizes.items() if name in adapted}
    if shares_inputs:
        # What attention and the MLP keep anyway serves o_proj and down_proj.
        groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
        copied = sum(shape.hidden for group in groups if set(group) & set(adapted))
        product = shape.intermediate if "down_proj" in adapted else 0
    else:
        copied = sum(inputs.values())
        product = 0
    return (
        2 * FP32 * shape.hidden
        + adapter * (copied + product + case.lora_r * len(adapted))
        + _attention(shape, compute)
        + 3 * compute * shape.intermediate
        + _qk_norms(shape, compute, has_trained_norms=False)
    )


def _attention(shape: ModelShape, compute: int) -> int:
    """q, k, v, the output, and the log-sum-exp of each head."""
    return compute * 2 * (shape.q_dim + shape.kv_dim) + FP32 * shape.num_heads


def _qk_norms(shape: ModelShape, compute: int, *, has_trained_norms: bool) -> int:
    if not shape.has_qk_norm:
        return 0
    normalised = compute if has_trained_norms else 0
    return (FP32 + normalised) * (shape.q_dim + shape.kv_dim)
