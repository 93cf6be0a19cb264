"""The memory of a training step by formula: what stays, and the most of every instant of a step.

Terms that do not live together are never added. A step runs its forwards one after another and
keeps their graphs until the backward, which takes them back in reverse: `_walk` follows it and
notes the peak of each phase. Everything is tensors; what a device adds is in `run_memory.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from composer_replication.planner.forwards import Forward, forwards_of
from composer_replication.planner.head_memory import HeadMemory, head_memory
from composer_replication.planner.layer_memory import (
    BF16,
    FP32,
    LayerMemory,
    Precision,
    layer_memory,
)
from composer_replication.planner.model_shape import ModelShape, adapted_linears, model_shape
from composer_replication.planner.step_case import StepCase
from composer_replication.units import gib


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a step holds, from formulas or from a simulation; GiB of tensors on one device.

    Example: `predict(case).peak_gib`.
    """

    phases_gib: dict[str, float]
    """The most in each phase, what stays included: teacher, policy_forward, loss, backward,
    optimizer."""
    persistent_gib: dict[str, float]
    """What stays: weights, teacher, optimizer, gradients where they accumulate."""

    @property
    def peak_gib(self) -> float:
        """The most at any instant."""
        return max(self.phases_gib.values())

    @property
    def peak_phase(self) -> str:
        """Where that is."""
        return max(self.phases_gib, key=self.phases_gib.__getitem__)


def predict(case: StepCase, num_shards: int = 1) -> MemoryEstimate:
    """The memory of a case's step, by formula.

    Args:
        case: of one device.
        num_shards: devices that weights, moments and gradients are spread over (FSDP). Each gathers
            two layers, or the head, to use them, and keeps its part of a gradient once it is whole.

    Raises:
        ModelError: an architecture that the formulas do not know.
    """
    persistent = {name: part // num_shards for name, part in persistent_bytes(case).items()}
    base = sum(persistent.values())
    if num_shards > 1:
        shape = model_shape(case.model)
        gathered = max(2 * shape.layer_parameters, shape.head_parameters)
        base += Precision.of(case).compute * gathered
    peaks: dict[str, int] = {}
    for phase, num_bytes in _walk(case, num_shards):
        peaks[phase] = max(peaks.get(phase, 0), base + num_bytes)
    return MemoryEstimate(
        phases_gib={phase: gib(peak) for phase, peak in peaks.items()},
        persistent_gib={name: gib(part) for name, part in persistent.items()},
    )


def trained_bytes(case: StepCase) -> int:
    """Of the weights that are trained."""
    shape = model_shape(case.model)
    if case.lora_r is not None:
        adapters = shape.lora_layer_parameters(case.lora_r, case.lora_targets)
        return FP32 * shape.num_layers * adapters
    return Precision.of(case).weights * shape.num_parameters


def persistent_bytes(case: StepCase) -> dict[str, int]:
    """What stays from step to step."""
    shape = model_shape(case.model)
    trained = trained_bytes(case)
    base = Precision.of(case).weights * shape.num_parameters
    return {
        "weights": base + (trained if case.lora_r is not None else 0),
        "teacher": _teacher_bytes(case, shape, base),
        "optimizer": _optimizer_bytes(case, shape, trained),
        "gradients": trained if case.accumulates else 0,
    }


def checkpoint_bytes(case: StepCase) -> int:
    """Of a checkpoint's files: what is trained, its moments, and a teacher's own weights."""
    parts = persistent_bytes(case)
    return trained_bytes(case) + parts["optimizer"] + parts["teacher"]


def _teacher_bytes(case: StepCase, shape: ModelShape, base: int) -> int:
    if case.num_sites == 0 or case.teacher == "live":
        return 0
    if case.lora_r is None:
        return base
    if case.teacher == "frozen":
        return 0
    # The average of the adapter's product, a full matrix for each adapted one.
    sizes = shape.linear_sizes
    adapted = sum(sizes[n][0] * sizes[n][1] for n in adapted_linears(case.lora_targets))
    return FP32 * shape.num_layers * adapted


def _optimizer_bytes(case: StepCase, shape: ModelShape, trained: int) -> int:
    """Moments have the dtype of what is trained."""
    if case.optimizer in ("adamw_torch_fused", "adamw_torch"):
        return 2 * trained
    if case.optimizer == "sgd":
        return 0
    if case.optimizer == "adamw_8bit":
        # Two moments of one byte, and an fp32 scale for every 256 of them.
        size = FP32 if case.lora_r is not None else Precision.of(case).weights
        return round(2 * (1 + FP32 / 256) * trained / size)
    return _adafactor_bytes(case, shape)


def _adafactor_bytes(case: StepCase, shape: ModelShape) -> int:
    """A row and a column of second moments for each matrix; vectors keep all of theirs."""
    sizes = list(shape.linear_sizes.values())
    if case.lora_r is not None:
        r = case.lora_r
        adapted = [shape.linear_sizes[name] for name in adapted_linears(case.lora_targets)]
        pairs = [(a + r, r + b) for a, b in adapted]
        return FP32 * shape.num_layers * sum(a + b for a, b in pairs)
    vectors = shape.layer_parameters - sum(a * b for a, b in sizes)
    layer = sum(a + b for a, b in sizes) + vectors
    heads = (shape.vocab + shape.hidden) * (1 if shape.is_tied else 2)
    return FP32 * (shape.num_layers * layer + heads + shape.hidden)


def _walk(case: StepCase, num_shards: int) -> Iterator[tuple[str, int]]:
    """(phase, bytes beside what stays) at every instant that could be the largest."""
    shape = model_shape(case.model)
    layer, head = layer_memory(case), head_memory(case)
    forwards = forwards_of(case)
    held = 0
    for forward in forwards:
        if forward.num_teacher_tokens:
            yield "teacher", held + _teacher_forward(case, shape, layer, forward)
            held += layer.output_per_token * forward.teacher_output_tokens
        graph = graph_bytes(case, shape, layer, forward)
        yield "policy_forward", held + graph + _forward_peak(case, shape, layer, forward)
        held += graph
        output = layer.output_per_token * forward.output_tokens
        yield "loss", held + output + head.forward_bytes(forward)
        held += head.saved_bytes(forward)
        if forward.num_teacher_tokens:
            held -= layer.output_per_token * forward.teacher_output_tokens
    yield from _walk_back(case, layer, head, forwards, held, num_shards)
    yield (
        "optimizer",
        (trained_bytes(case) * (not case.accumulates) + _optimizer_peak(case, shape)) // num_shards,
    )


def graph_bytes(case: StepCase, shape: ModelShape, layer: LayerMemory, forward: Forward) -> int:
    """What a forward keeps for its backward; a cut tree keeps nothing."""
    if forward.cuts:
        return 0
    tokens, layers = forward.num_tokens, shape.num_layers
    per_layer = layer.input_per_token * tokens if case.checkpoints else layer_bytes(layer, forward)
    return layers * per_layer + layer.ends_per_token * tokens


def layer_bytes(layer: LayerMemory, forward: Forward) -> int:
    """What the graph of one layer keeps."""
    per_token = layer.saved_per_token + layer.score_bytes * forward.row_tokens
    return per_token * forward.num_tokens + layer.graph_copies


def _teacher_forward(
    case: StepCase, shape: ModelShape, layer: LayerMemory, forward: Forward
) -> int:
    """One layer at a time; a live teacher's weights are cast once and kept until it is done."""
    cast = 0
    if case.casts_trained_weights:
        is_live = case.teacher == "live"
        cast = BF16 * (shape.num_parameters if is_live else shape.hidden * shape.intermediate)
    most_tokens = max(forward.teacher_cuts, default=forward.num_teacher_tokens)
    return cast + layer.forward_per_token * most_tokens


def _forward_peak(case: StepCase, shape: ModelShape, layer: LayerMemory, forward: Forward) -> int:
    """Beside the graph: the cast head; where nothing is kept a layer and all cast weights too."""
    casts_head = case.autocasts and Precision.of(case).weights == FP32
    head = BF16 * shape.head_parameters if casts_head else 0
    if not (case.checkpoints or forward.cuts):
        return head
    most_tokens = max(piece.num_tokens for piece in forward.pieces)
    layers = layer.forward_per_token * most_tokens + shape.num_layers * layer.weight_copies
    return head + layers + (layer.output_per_token * forward.output_tokens if forward.cuts else 0)


def _walk_back(
    case: StepCase,
    layer: LayerMemory,
    head: HeadMemory,
    forwards: list[Forward],
    held: int,
    num_shards: int,
) -> Iterator[tuple[str, int]]:
    """The backward: graphs in reverse, each from its head over its layers to the embedding."""
    shape = model_shape(case.model)
    grads = gradients_of(case, shape)
    # Gradients of a weight wait in autograd until every forward that used it has sent its part;
    # with one forward they go straight into what accumulates.
    waits = not case.accumulates or sum(len(forward.pieces) for forward in forwards) > 1
    is_first, waiting = True, 0
    for forward in reversed(forwards):
        yield "backward", held + waiting + head.backward_bytes(forward)
        held -= head.saved_bytes(forward)
        if waiting and case.device_type == "cpu":
            # Autograd adds to what waits in place, but not while tensors are counted, as on a CPU.
            yield "backward", held + waiting + 2 * grads.head + head.rows_gradient_bytes(forward)
        # The parts of a cut tree have one gradient of what left the model.
        shared = 2 * layer.output_per_token * forward.output_tokens if forward.cuts else 0
        for piece in reversed(forward.pieces):
            tokens, graph = piece.num_tokens, graph_bytes(case, shape, layer, piece)
            if forward.cuts:
                held += graph
                yield "backward", held + waiting + shared + _forward_peak(case, shape, layer, piece)
            # A tied head's gradient waits for the embedding's in any case.
            head_waits = is_first and (waits or shape.is_tied)
            new_head = grads.head // num_shards if head_waits else 0
            new_layers = grads.layers // num_shards if is_first and waits else 0
            ends = layer.ends_per_token * tokens
            again = layer_bytes(layer, piece) if case.checkpoints else 0
            working = layer.working_per_token * tokens + grads.matrix + again
            stream = layer.output_per_token * tokens
            # The top: everything is kept, and the last norm or the last layer works.
            kept = held + waiting + shared + new_head
            yield "backward", kept + stream + 3 * FP32 * shape.hidden * tokens
            yield "backward", kept + working - ends
            # The bottom: one layer is left, and every gradient is there.
            held -= graph
            kept = held + waiting + shared + new_head + new_layers
            yield "backward", kept + working + (graph - ends) // shape.num_layers
            # A tied head's gradient, the embedding's, and their sum; or what waits and its sum.
            adds = shape.is_tied or (waiting and case.device_type == "cpu")
            yield "backward", kept + stream + grads.head * (2 if adds else 1)
            if is_first and waits:
                heads = grads.head * (1 if shape.is_tied else 2)
                waiting = (heads + grads.layers) // num_shards
            is_first = False


@dataclass(frozen=True, slots=True)
class Gradients:
    """Bytes of the gradients of one forward; adapters have none at the head."""

    head: int
    layers: int
    matrix: int
    """Of the largest matrix of a layer."""


def gradients_of(case: StepCase, shape: ModelShape) -> Gradients:
    """Of everything that is trained."""
    trained = trained_bytes(case)
    if case.lora_r is not None:
        return Gradients(0, trained, 0)
    weight = Precision.of(case).weights
    head = weight * shape.head_parameters
    heads = head * (1 if shape.is_tied else 2)
    return Gradients(head, trained - heads, weight * shape.hidden * shape.intermediate)


def _optimizer_peak(case: StepCase, shape: ModelShape) -> int:
    """What the update of the weights takes beside gradients and moments."""
    trained = trained_bytes(case)
    if case.optimizer == "adamw_torch":
        # On CUDA every weight is updated at once, on a CPU one after another.
        one = 2 * Precision.of(case).weights * shape.largest_matrix
        return trained if case.device_type == "cuda" else min(one, trained)
    if case.optimizer == "adafactor" and case.lora_r is None:
        return 2 * FP32 * shape.largest_matrix
    return 0
