"""The memory of a training step without running it: fake tensors at two depths, extrapolated.

The project's own `step` runs on tensors without memory, once with few layers and once with more.
Each stretch of it (`step_phases.py`) peaks at a level that is affine in the number of layers, so
the two give the peak at the full depth; the step's peak is the largest of them. One total alone
could not be extrapolated: which stretch is the largest changes with the depth.
"""

import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from composer_replication.batch.collate import StepTensors
from composer_replication.errors import ConfigError, ModelError
from composer_replication.experiments.case_step import CaseStep, case_policy, case_tensors, remake
from composer_replication.experiments.fake_floats import FakeFloatsMemory
from composer_replication.experiments.side_by_side import side_by_side
from composer_replication.experiments.step_phases import OPTIMIZER, StepPhases, Stretch
from composer_replication.losses.divergence import blocks_of
from composer_replication.losses.head import alike_tiles_skipped
from composer_replication.planner.layer_memory import keeps_scores
from composer_replication.planner.memory import MemoryEstimate
from composer_replication.planner.run_memory import Predictor
from composer_replication.planner.step_case import StepCase
from composer_replication.training.teacher import CopyTeacher
from composer_replication.training.tensor_memory import TensorMemory
from composer_replication.units import gib

_MAX_PERIOD = 6
"""Layers of a repeating pattern, at most: Gemma 3 has five of one kind and one of another."""


@dataclass(frozen=True, slots=True)
class _Traced:
    peaks: dict[Stretch, int]
    persistent: dict[str, int]


def simulate(case: StepCase) -> MemoryEstimate:
    """The memory of a case's step.

    Raises:
        ConfigError: attention that a CPU computes in another way.
        ModelError: an architecture whose layers are not alike.
    """
    if keeps_scores(case):
        raise ConfigError(
            "fp32 attention with grouped heads keeps its softmax on CUDA, where the simulation's "
            "keeps none. Plan without --simulate, or with tree = 'auto' or grpo.bf16 = true."
        )
    tensors = case_tensors(case)
    shallow_depth, deep_depth = _two_depths(case)
    with warnings.catch_warnings(), alike_tiles_skipped(), blocks_of(case.device_type):
        # Copying a teacher asks each tensor for its address, and copes without one.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        # The run itself says so, of its own rows.
        warnings.filterwarnings("ignore", "A step is cut", UserWarning)
        # A name of transformers' own, which no user can change.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        shallow, deep = side_by_side(
            partial(_trace_fake, _at_depth(case, shallow_depth), tensors),
            partial(_trace_fake, _at_depth(case, deep_depth), tensors),
        )
    # Depths beyond the deeper one add layers like those between the two.
    share = (_num_layers(case) - shallow_depth) / (deep_depth - shallow_depth)
    return _estimate(shallow, deep, share=share)


def simulate_once_a_case() -> Predictor:
    """`simulate` that remembers: cards of one kind run the same step."""
    known: dict[str, MemoryEstimate] = {}

    def predictor(case: StepCase) -> MemoryEstimate:
        key = repr(case)
        if key not in known:
            known[key] = simulate(case)
        return known[key]

    return predictor


def measure(case: StepCase, policy: nn.Module) -> MemoryEstimate:
    """The same of the step on real tensors at the full depth.

    Args:
        case: of the step.
        policy: of `case_policy` or `wrapped_policy`, on the CPU.
    """
    tensors = case_tensors(case)
    held = (*tensors.values(), *policy.parameters(), *policy.buffers())
    traced = _trace(case, tensors, policy, TensorMemory(held=held))
    return _estimate(traced, traced, share=0.0)


def _estimate(shallow: _Traced, deep: _Traced, *, share: float) -> MemoryEstimate:
    def at_full_depth(of_shallow: int, of_deep: int) -> float:
        return gib(of_shallow + share * (of_deep - of_shallow))

    phases: dict[str, float] = {}
    for stretch, peak in deep.peaks.items():
        # A single layer is the first and the last; a middle one peaks between those two.
        counterpart = stretch if stretch in shallow.peaks else replace(stretch, part="first")
        if stretch.part != "middle" or counterpart is stretch:
            peak_gib = at_full_depth(shallow.peaks[counterpart], peak)
            phases[stretch.phase] = max(phases.get(stretch.phase, 0.0), peak_gib)
    return MemoryEstimate(
        phases_gib=phases,
        persistent_gib={
            name: at_full_depth(num_bytes, deep.persistent[name])
            for name, num_bytes in shallow.persistent.items()
        },
    )


def _trace_fake(case: StepCase, tensors: StepTensors) -> _Traced:
    return _trace(case, tensors, case_policy(case, device="meta"), FakeFloatsMemory())


def _trace(
    case: StepCase, tensors: StepTensors, policy: nn.Module, memory: TensorMemory
) -> _Traced:
    """The peaks of one step after a first one, on the tensors that `memory` computes with."""
    with memory:
        built = CaseStep(case, tensors, policy)
        if isinstance(built.teacher, CopyTeacher):
            # A view of a deep copy of a fake tensor has a storage of its own, and would count.
            remake(built.models()[1], lambda tensor: isinstance(tensor, FakeTensor))
        persistent = built.persistent_bytes()
        phases = StepPhases(memory)
        for model in built.models():
            phases.watch(model)
        loss = built.loss()
        phases.start(Stretch("backward", 0, "head"))
        loss.backward()
        del loss
        phases.start(Stretch(OPTIMIZER, 0, OPTIMIZER))
        built.update()
        phases.start(Stretch(OPTIMIZER, 0, "end"))
    return _Traced(phases.peaks, persistent)


def _two_depths(case: StepCase) -> tuple[int, int]:
    """Numbers of layers to trace: one period of layer kinds apart, ending on the same kind.

    Raises:
        ModelError: layers that do not repeat.
    """
    kinds = case.model.get("layer_types")
    num_layers = _num_layers(case)
    period = 1
    if isinstance(kinds, list):
        period = next(
            n for n in range(1, num_layers + 1) if kinds == (kinds[:n] * num_layers)[:num_layers]
        )
    if period > _MAX_PERIOD:
        raise ModelError(
            f"The layers of this {case.model['model_type']} repeat after {period}, so a few of "
            "them do not tell what all need. Plan without --simulate."
        )
    # Under LoRA nothing below the first layer has a gradient, so that layer keeps less than others.
    fewest = 1 if case.lora_r is None else 2
    shallow = fewest if period == 1 else period + num_layers % period
    return shallow, shallow + period


def _at_depth(case: StepCase, num_layers: int) -> StepCase:
    """The same case with fewer layers; lists with an entry a layer are cut with them."""
    full = _num_layers(case)
    model = {
        name: value[:num_layers] if isinstance(value, list) and len(value) == full else value
        for name, value in case.model.items()
    }
    return replace(case, model=model | {"num_hidden_layers": num_layers})


def _num_layers(case: StepCase) -> int:
    return cast(int, case.model["num_hidden_layers"])
