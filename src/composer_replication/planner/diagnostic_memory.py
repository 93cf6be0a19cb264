"""Bytes beside what stays while `diagnostics.gradients_every` measures each channel's gradient.

Every graph of the step is kept for the step's own backward; a tree that was cut has none, and each
of its parts is computed again for every channel. The channels take turns: each one's
backward leaves a whole gradient, which is then added to that channel's sum. All sums stay.
"""

from itertools import islice

from composer_replication.planner.forwards import Forward, forwards_of
from composer_replication.planner.head_memory import HeadMemory, head_memory
from composer_replication.planner.layer_memory import FP32, LayerMemory, Precision, layer_memory
from composer_replication.planner.memory import (
    Gradients,
    gradients_of,
    graph_bytes,
    layer_bytes,
    trained_bytes,
)
from composer_replication.planner.model_shape import ModelShape, model_shape
from composer_replication.planner.step_case import StepCase


def measuring_bytes(case: StepCase) -> int:
    """The most while the gradient of every channel is measured, one channel after another."""
    shape, layer, head = model_shape(case.model), layer_memory(case), head_memory(case)
    grads, trained = gradients_of(case, shape), trained_bytes(case)
    forwards = forwards_of(case)
    held = sum(graph_bytes(case, shape, layer, f) + head.saved_bytes(f) for f in forwards)
    # Norms and cosines come from products of two sums in fp32, one weight at a time.
    num_copies = 1 if Precision.of(case).weights == FP32 else 3
    products = trained if case.lora_r is not None else num_copies * FP32 * shape.largest_matrix
    most = len(case.channels) * trained + products
    for number, own in enumerate(_by_channel(case, forwards), 1):
        # Sums of an earlier micro-batch are all there.
        sums = (len(case.channels) if case.accumulates else number) * trained
        walk = _channel_bytes(case, shape, layer, head, grads, own)
        most = max(most, sums + walk)
    return held + most


def _by_channel(case: StepCase, forwards: list[Forward]) -> list[list[Forward]]:
    """The forwards that each channel's gradient goes through; a tree is every channel's."""
    if case.executor == "packed":
        return [forwards for _ in case.channels]
    left = iter(forwards)
    return [list(islice(left, 2 if name == "dpo" else 1)) for name in case.channels]


def _channel_bytes(
    case: StepCase,
    shape: ModelShape,
    layer: LayerMemory,
    head: HeadMemory,
    grads: Gradients,
    forwards: list[Forward],
) -> int:
    """One backward that frees no graph: the gradient that grows, and what works beside it."""
    most = waiting = 0
    whole = grads.layers + grads.head * (1 if shape.is_tied else 2)
    for forward in reversed(forwards):
        most = max(most, waiting + head.backward_bytes(forward))
        for piece in reversed(forward.pieces):
            tokens = piece.num_tokens
            again = layer_bytes(layer, piece) if case.checkpoints else 0
            working = layer.working_per_token * tokens + grads.matrix + again
            held = waiting + (0 if waiting else grads.head + grads.layers)
            if forward.cuts:
                held += graph_bytes(case, shape, layer, piece)
                held += 2 * layer.output_per_token * forward.output_tokens
            ends = grads.head * (2 if shape.is_tied else 1)
            stream = layer.output_per_token * tokens
            most = max(most, held + working, held + stream + ends)
            waiting = whole
    return most
