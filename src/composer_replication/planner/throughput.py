"""Seconds of a step from counted FLOPs and bytes: low, expected, high.

A card computes at its dense rate times a utilisation that small batches do not reach, moves what
its element-wise kernels read and write, and is never faster than kernels can be launched; sampling
a token reads every weight once. Ranges are wide until a run on the same device narrows them
(`calibration.py`).
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

from composer_replication.planner.forwards import Forward, forwards_of
from composer_replication.planner.hardware import Gpu
from composer_replication.planner.layer_memory import Precision, layer_memory
from composer_replication.planner.memory import persistent_bytes, trained_bytes
from composer_replication.planner.model_shape import ModelShape, model_shape
from composer_replication.planner.run_shape import RunShape
from composer_replication.planner.sampling_shape import RolloutShape
from composer_replication.planner.step_case import StepCase


class Range(NamedTuple):
    """Seconds: the least, the expected, the most.

    Example: `Range(1.0, 2.0, 4.0) + Range(1.0, 1.0, 1.0)` -> 2, 3, 5.
    """

    low: float
    expected: float
    high: float

    def plus(self, other: "Range") -> "Range":
        """Both, one after the other."""
        return Range(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> "Range":
        """Several times as long."""
        return Range(*(factor * value for value in self))


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a device is, as three guesses: good, expected, bad."""

    matrix_flops: tuple[float, float, float]
    """FLOP/s of matrix products in the run's precision, large enough to fill the device."""
    fp32_flops: tuple[float, float, float]
    """Of products that stay in fp32; a run in half precision has TF32 do them on a GPU."""
    bytes_per_s: tuple[float, float, float]
    layer_launch_s: tuple[float, float, float]
    """Least time of one layer's forward, whatever its tokens."""
    half_tokens: float
    """Tokens of hidden size 1024 at which half of the rate is reached."""
    link_bytes_per_s: float = float("inf")


_TF32_SHARE = 0.5
"""Of the dense bf16 rate, on every card that has TF32."""

_UTILISATION = (0.65, 0.42, 0.2)
_BANDWIDTH_SHARE = (0.85, 0.65, 0.4)
_LAUNCH_S = (0.25e-3, 0.5e-3, 1.2e-3)
"""Of a decoder layer that eager transformers runs: 40 to 60 kernels, launched from Python."""
_HALF_TOKENS_PER_TFLOPS = 4.0
_BACKWARD_LAUNCHES = 1.6
_BACKWARD_SHARE = 2 / 3
"""Of a forward and its backward."""
_STEP_OVERHEAD = Range(0.03, 0.15, 0.6)
"""Logging, metrics, the data loader and files, once an optimizer step."""

_FORWARD_TRAFFIC, _BACKWARD_TRAFFIC = 2.5, 4.0
"""Bytes that a layer's kernels move, for each byte that it keeps for its backward."""

_CPU_THREAD_FLOPS = {"avx512f": 180e9, "avx2": 110e9, "": 12e9}
"""fp32; AVX2 does 32 operations a cycle."""


def gpu_speed(gpu: Gpu, shape: RunShape) -> Speed:
    """What a card does in this run's precision."""
    case = shape.case
    is_half = case.autocasts or case.weights_dtype == "bfloat16"
    # A card without bf16 units runs bf16 at its fp32 rate.
    on_tensor_cores = is_half and (gpu.has_bf16 or not shape.uses_bf16)
    rate = gpu.bf16_tflops if on_tensor_cores else gpu.fp32_tflops
    fp32_rate = _TF32_SHARE * gpu.bf16_tflops if on_tensor_cores else gpu.fp32_tflops
    return Speed(
        matrix_flops=_scaled(rate * 1e12, _UTILISATION),
        fp32_flops=_scaled(fp32_rate * 1e12, _UTILISATION),
        bytes_per_s=_scaled(gpu.bandwidth_gb_s * 1e9, _BANDWIDTH_SHARE),
        layer_launch_s=_LAUNCH_S,
        half_tokens=_HALF_TOKENS_PER_TFLOPS * rate,
        link_bytes_per_s=gpu.link_gb_s * 1e9,
    )


def cpu_speed(num_threads: int, flags: frozenset[str]) -> Speed:
    """What a CPU does; beside other busy processes it is several times slower, hence the width."""
    units = next((unit for unit in ("avx512f", "avx2") if unit in flags), "")
    rate = num_threads * _CPU_THREAD_FLOPS[units]
    return Speed(
        matrix_flops=_scaled(rate, (1.4, 0.85, 0.2)),
        fp32_flops=_scaled(rate, (1.4, 0.85, 0.2)),
        bytes_per_s=(30e9, 12e9, 3e9),
        layer_launch_s=(0.2e-3, 0.6e-3, 4e-3),
        half_tokens=16.0,
    )


def step_terms(
    shape: RunShape, speed: Speed, num_gpus: int = 1, *, is_sharded: bool = False
) -> dict[str, Range]:
    """Seconds of one optimizer step: rollout, teacher, train and other.

    An evaluation's step is all that one model plays: rollout and other.

    Args:
        shape: of the run; typical rows set the expected time and the largest ones the high.
        speed: of the device.
        num_gpus: each computes its own rollouts and rows.
        is_sharded: weights are gathered for each forward; otherwise gradients are summed once.
    """
    model = model_shape(shape.case.model)
    # A generation serves as many steps as it was sampled for.
    generation = _sampling_s(shape.rollouts, shape, model, speed)
    generation = generation.plus(_scoring_s(shape, model, speed))
    rollout = generation.times(shape.generations_a_step)
    if shape.verb == "evaluate":
        return {"rollout": rollout, "other": _STEP_OVERHEAD}
    micro = _micro_batch(shape, model, speed)
    case = shape.case
    update_bytes = 7 * trained_bytes(case) + 3 * persistent_bytes(case)["teacher"]
    update = _over(update_bytes, speed.bytes_per_s)
    train = micro["train"].times(shape.num_micro_batches).plus(update)
    if num_gpus > 1:
        # Weights are gathered for the forward and again for the backward, gradients scattered;
        # whole gradients are scattered and gathered.
        weights = Precision.of(case).compute * model.num_parameters
        moved_bytes = 3 * weights if is_sharded else 2 * trained_bytes(case)
        moved_s = moved_bytes * (num_gpus - 1) / num_gpus / speed.link_bytes_per_s
        moved = Range(0.3 * moved_s, moved_s, 2 * moved_s)
        times = shape.num_micro_batches * len(forwards_of(case)) if is_sharded else 1
        train = train.plus(moved.times(times))
    return {
        "rollout": rollout,
        "teacher": micro["teacher"].times(shape.num_micro_batches),
        "train": train,
        "other": _STEP_OVERHEAD,
    }


def evaluation_range(shape: RunShape, speed: Speed) -> Range:
    """Seconds of all held-out evaluations of a run."""
    model = model_shape(shape.case.model)
    by_transformers = replace(shape, vllm=None)
    batch = _sampling_s(shape.evaluation, by_transformers, model, speed)
    return batch.times(shape.num_evaluation_batches)


def measuring_range(shape: RunShape, terms: dict[str, Range]) -> Range:
    """Seconds of all that `[diagnostics]` asks for.

    That is a backward a channel for gradients, and for credit a forward of the other channels' rows
    and of the teacher's.

    Args:
        shape: of the run.
        terms: of a step, by `step_terms`.
    """
    if shape.num_measured_steps == shape.num_credit_steps == 0:
        return Range(0.0, 0.0, 0.0)
    case, train = shape.case, terms["train"]
    num_channels = sum(map(bool, (case.num_rollouts, case.num_sites, case.num_pairs)))
    gradients = train.times(_BACKWARD_SHARE * num_channels * shape.num_measured_steps)
    forward = train.times(1 - _BACKWARD_SHARE).plus(terms["teacher"])
    return gradients.plus(forward.times(shape.num_credit_steps))


def step_range(terms: dict[str, Range]) -> Range:
    """Seconds of a step: its terms, one after the other."""
    total = Range(0.0, 0.0, 0.0)
    for term in terms.values():
        total = total.plus(term)
    return total


def forward_flops(model: ModelShape, num_tokens: float, row_tokens: float) -> float:
    """Of the decoder's layers: 2 a parameter and token, and causal attention."""
    linear = 2 * model.num_layers * model.layer_linear_parameters * num_tokens
    attention = 2 * model.num_layers * model.q_dim * num_tokens * (row_tokens + 1)
    return linear + attention


def _micro_batch(shape: RunShape, model: ModelShape, speed: Speed) -> dict[str, Range]:
    case = shape.case
    teacher = train = Range(0.0, 0.0, 0.0)
    row = case.prompt_tokens + case.completion_tokens
    # Gradients of activations, and of weights where they are trained; checkpoints compute twice.
    passes = (3 if case.lora_r is None else 2.2) + (1 if case.checkpoints else 0)
    launches = 1 + _BACKWARD_LAUNCHES + (1 if case.checkpoints else 0)
    on_time = 0.5 if shape.alternates and case.num_sites and case.num_pairs else 1.0
    for number, forward in enumerate(forwards_of(case)):
        share = 1.0 if number == 0 else on_time
        layers = _forward_s(
            shape,
            model,
            speed,
            forward.num_tokens,
            row,
            passes,
            launches,
            max_tokens=case.tree_max_tokens if forward.cuts else None,
        )
        train = train.plus(layers.times(share)).plus(_head_s(case, model, speed, forward, shape))
        if forward.num_teacher_tokens:
            scored = _forward_s(shape, model, speed, forward.num_teacher_tokens, row, 1, 1)
            teacher = teacher.plus(scored.times(share))
    return {"teacher": teacher, "train": train}


def _forward_s(
    shape: RunShape,
    model: ModelShape,
    speed: Speed,
    num_tokens: int,
    row_tokens: int,
    passes: float,
    launches: float,
    *,
    max_tokens: int | None = None,
) -> Range:
    """Layers of one forward and its backward; what is cut is computed again for its gradient."""
    shares = _shares(shape)
    num_parts = [1 if max_tokens is None else ceil(s * num_tokens / max_tokens) for s in shares]
    filled = num_tokens / (num_tokens + speed.half_tokens * 1024 / model.hidden)
    num_forwards = 2 if shape.case.checkpoints and passes > 1 else 1
    backward_traffic = _BACKWARD_TRAFFIC if passes > 1 else 0
    kept = model.num_layers * layer_memory(shape.case).saved_per_token * num_tokens
    found: list[float] = []
    for guess, share in enumerate(shares):
        again = 1 if num_parts[guess] > 1 else 0
        flops = forward_flops(model, share * num_tokens, share * row_tokens)
        compute_s = (passes + again) * flops / (speed.matrix_flops[guess] * filled)
        traffic = _FORWARD_TRAFFIC * (num_forwards + again) + backward_traffic
        move_s = share * traffic * kept / speed.bytes_per_s[guess]
        num_launches = num_parts[guess] * (launches + again)
        launch_s = num_launches * model.num_layers * speed.layer_launch_s[guess]
        found.append(max(compute_s + move_s, launch_s))
    return Range(*found)


def _head_s(
    case: StepCase, model: ModelShape, speed: Speed, forward: Forward, shape: RunShape
) -> Range:
    """Tiles: the forward, again in the backward, and the gradients; both sides of a divergence."""
    products = (6 if forward.is_divergence else 4) - (1 if case.lora_r is not None else 0)
    rates = speed.matrix_flops if case.weights_dtype == "bfloat16" else speed.fp32_flops
    work = 2.0 * products * forward.num_scored * model.head_parameters
    return Range(*(share * work / rate for share, rate in zip(_shares(shape), rates, strict=True)))


def _sampling_s(rollouts: RolloutShape, shape: RunShape, model: ModelShape, speed: Speed) -> Range:
    """Prompts, then one token after another; rows end early, at the earliest after a third."""
    if rollouts.sampled_tokens == 0:
        return Range(0.0, 0.0, 0.0)
    # vLLM launches a step's kernels as one graph.
    num_launches = 2 * model.num_layers if shape.vllm is None else 0
    prompts = rollouts.num_contexts * rollouts.prompt_tokens
    prefill = _forward_s(shape, model, speed, prompts, rollouts.prompt_tokens, 1, 1)
    sequential = rollouts.sampled_tokens + rollouts.resampled_tokens
    read_bytes = Precision.of(shape.case).compute * model.num_parameters
    per_token = [
        max(read_bytes / rate, num_launches * launch)
        + 2 * rollouts.num_rows * model.num_parameters / flops
        for rate, launch, flops in zip(
            speed.bytes_per_s, speed.layer_launch_s, speed.matrix_flops, strict=True
        )
    ]
    decode = Range(
        *(s * sequential * seconds for s, seconds in zip((0.3, 0.6, 1.0), per_token, strict=True))
    )
    return prefill.plus(decode)


def _scoring_s(shape: RunShape, model: ModelShape, speed: Speed) -> Range:
    """The forwards without gradient in which TRL scores a generation before it is trained on."""
    rollouts, case = shape.rollouts, shape.case
    num_passes = int(rollouts.is_scored) + int(shape.compares_reference)
    row = case.prompt_tokens + case.completion_tokens
    forward = _forward_s(shape, model, speed, rollouts.num_rows * row, row, 1, 1)
    return forward.times(num_passes)


def _shares(shape: RunShape) -> tuple[float, float, float]:
    """Of the largest row's tokens; records that share a prefix are one path of a tree."""
    typical = shape.typical_share
    if typical == 1:
        return 1.0, 1.0, 1.0
    shared = shape.tree_share if shape.case.executor == "packed" else 1.0
    return 0.7 * typical * shared, typical, 1.0


def _over(num_bytes: float, rates: tuple[float, float, float]) -> Range:
    return Range(*(num_bytes / rate for rate in rates))


def _scaled(value: float, shares: tuple[float, float, float]) -> tuple[float, float, float]:
    good, expected, bad = (value * share for share in shares)
    return good, expected, bad
