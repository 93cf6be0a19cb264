"""The memory of a whole run on one device: the step, its rollouts, and the device's own share.

`memory.py` knows the project's step. A run adds TRL's tiles for GRPO's head, the mask of padded
rows, the key-value cache of its rollouts and, on several cards, sharding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from composer_replication.planner.diagnostic_memory import measuring_bytes
from composer_replication.planner.layer_memory import BF16, FP32, Precision, keeps_scores
from composer_replication.planner.memory import (
    MemoryEstimate,
    persistent_bytes,
    predict,
    trained_bytes,
)
from composer_replication.planner.model_shape import ModelShape, model_shape
from composer_replication.planner.run_shape import RunShape
from composer_replication.planner.sampling_memory import sampling_bytes, scoring_bytes
from composer_replication.planner.step_case import StepCase
from composer_replication.units import gib

CUDA_CONTEXT_GIB = 0.77
"""CUDA's context with torch's kernels; an H100 with torch 2.11 had 0.74 to 0.76."""

FRAGMENTATION, MAX_FRAGMENTATION_GIB, FRAGMENTATION_BEYOND = 0.15, 2.3, 0.01
"""Blocks that the allocator holds and nothing uses: a share of the tensors up to so many GiB, and
another share of all of them. Steps on an H100 that took 7 to 70 GiB had 0.2 to 2.6 GiB of them, so
that small steps have the larger share (`bench/plan_memory.py cuda`)."""

LIBRARIES_GIB = 0.6
"""Python with torch and transformers imported, in a process on a CPU."""

STATED_ERROR = 0.07
"""The peak of tensors is promised within this share."""

_TRL_TOKENS, _TRL_VOCAB = 4096, 32_768
"""Rows and vocabulary entries of one tile of TRL's head."""

_TRL_CPU_COPIES = {"loss": 3.0, "backward": 7.25}
"""fp32 arrays beside a tile that its torch operations fold on a CPU: in the forward scaled logits,
their exponentials and products; in the backward logits before and after the temperature, log-probs,
probabilities, the gradient, a bool and two temporaries."""

Predictor = Callable[[StepCase], MemoryEstimate]


@dataclass(frozen=True, slots=True)
class RunMemory:
    """What a run takes of one device; GiB.

    Example: `run_memory(shape, 1).peak_gib`.
    """

    terms_gib: dict[str, float]
    """Add up to `peak_gib`: what stays, the phase with the most, and the device's own share."""
    peak_phase: str

    @property
    def peak_gib(self) -> float:
        """All of it."""
        return sum(self.terms_gib.values())

    @property
    def kept_gib(self) -> float:
        """What stays from step to step, however short the rows are."""
        passing = (*_DEVICE_TERMS, f"{self.peak_phase}_phase")
        return sum(part for name, part in self.terms_gib.items() if name not in passing)

    @property
    def phase_words(self) -> str:
        """The phase as a sentence has it."""
        return self.peak_phase.replace("_", " ")

    @property
    def peak_tensor_gib(self) -> float:
        """Tensors alone, as a run measures them."""
        return sum(v for name, v in self.terms_gib.items() if name not in _DEVICE_TERMS)


_DEVICE_TERMS = ("context", "fragmentation", "libraries")


def run_memory(
    shape: RunShape, num_gpus: int, predictor: Predictor = predict, *, card_gib: float = 0.0
) -> RunMemory:
    """The memory of a run on each of `num_gpus` cards, which each hold the whole step (DDP).

    Args:
        shape: of the run.
        num_gpus: cards; several exchange gradients through buckets of their size.
        predictor: of a step on one card; formulas, or a simulation.
        card_gib: memory of a card, of which vLLM takes a share.
    """
    if shape.verb == "evaluate":
        return _sampling_memory(shape)
    found: list[RunMemory] = []
    for case in _cases(shape):
        estimate = predictor(case)
        if num_gpus > 1:
            estimate = _with_buckets(estimate, gib(trained_bytes(case)))
        found.append(_of_case(shape, case, estimate, card_gib))
    return max(found, key=lambda memory: memory.peak_gib)


def sharded_memory(shape: RunShape, num_gpus: int) -> RunMemory:
    """By formula, with weights, moments and gradients spread over the cards (FSDP).

    `train` does not run so: its losses read the output head as one tensor.
    """
    found = (_of_case(shape, case, predict(case, num_gpus), 0.0) for case in _cases(shape))
    return max(found, key=lambda memory: memory.peak_gib)


def _with_buckets(estimate: MemoryEstimate, buckets_gib: float) -> MemoryEstimate:
    """A step whose gradients are copied into buckets that stay."""
    return MemoryEstimate(
        phases_gib={name: peak + buckets_gib for name, peak in estimate.phases_gib.items()},
        persistent_gib={**estimate.persistent_gib, "gradient_buckets": buckets_gib},
    )


def _sampling_memory(shape: RunShape) -> RunMemory:
    """Weights and what sampling takes beside them: nothing is trained."""
    terms = {
        "weights": weights_gib(shape.case),
        "rollout_phase": gib(sampling_bytes(shape.rollouts, shape.case)),
    }
    return RunMemory(terms | device_gib(shape.case, sum(terms.values())), "rollout")


def _cases(shape: RunShape) -> list[StepCase]:
    """The kinds of step: channels that take turns are never in memory together."""
    case = shape.case
    if not (shape.alternates and case.num_sites and case.num_pairs):
        return [case]
    return [replace(case, num_pairs=0), _without_sites(case)]


def _without_sites(case: StepCase) -> StepCase:
    """The teacher stays in memory when its channel rests: one site without tokens keeps it."""
    return replace(
        case, num_sites=1, num_rollout_sites=0, state_tokens=1, hint_tokens=0, action_tokens=1
    )


def _of_case(
    shape: RunShape, case: StepCase, estimate: MemoryEstimate, card_gib: float
) -> RunMemory:
    model = model_shape(case.model)
    persistent = dict(estimate.persistent_gib)
    total = sum(persistent.values())
    is_separate = case.executor == "separate"
    # A tree has no padding, and its own head scores GRPO's tokens too. Attention that keeps scores
    # is that of rows without padding: a mask has another kernel, which keeps none.
    has_mask = shape.is_padded and is_separate and not keeps_scores(case)
    extra = gib(_padding_bytes(case, model) if has_mask else 0)
    phases = {phase: peak - total for phase, peak in estimate.phases_gib.items()}
    for phase in ("loss", "backward"):
        head = _trl_head_bytes(case, model, phase) if is_separate else 0
        phases[phase] += extra + gib(head)
    phases["policy_forward"] += extra
    if shape.num_measured_steps:
        head = _trl_head_bytes(case, model, "backward") if is_separate else 0
        phases["diagnostics"] = gib(measuring_bytes(case) + head) + extra
    if shape.has_reference:
        persistent["reference"] = gib(Precision.of(case).weights * model.num_parameters)
    engine = shape.vllm
    engine_gib = 0.0 if engine is None else engine.card_share * card_gib
    if engine is not None and engine.card_share > 0 and not engine.sleeps:
        persistent["vllm"] = engine_gib
    phases |= _between_steps(shape, case, asleep_gib=engine_gib - persistent.get("vllm", 0.0))
    # Gradients accumulate within a step, and nothing is sampled there.
    held = persistent["gradients"]
    phase = max(phases, key=lambda name: phases[name] - held * (name in _BETWEEN_STEPS))
    if phase in _BETWEEN_STEPS:
        del persistent["gradients"]
    terms = {**persistent, f"{phase}_phase": phases[phase]}
    return RunMemory(terms | device_gib(case, sum(terms.values())), phase)


_BETWEEN_STEPS = ("rollout", "scoring", "evaluation")


def _between_steps(shape: RunShape, case: StepCase, *, asleep_gib: float) -> dict[str, float]:
    """GiB beside what stays while rows are sampled or scored.

    Args:
        shape: of the run.
        case: of a step.
        asleep_gib: that vLLM takes while it samples and not while the run trains.
    """
    rollouts = shape.rollouts
    is_engine = shape.vllm is not None
    found = {"rollout": asleep_gib if is_engine else gib(sampling_bytes(rollouts, case))}
    if rollouts.num_rows and (rollouts.is_scored or shape.compares_reference):
        found["scoring"] = gib(scoring_bytes(rollouts, case))
    if shape.evaluation.num_rows:
        found["evaluation"] = asleep_gib + gib(sampling_bytes(shape.evaluation, case))
    return found


def device_gib(case: StepCase, tensors_gib: float) -> dict[str, float]:
    """The device's own share beside tensors that take `tensors_gib` at their peak, by name."""
    if case.device_type == "cuda":
        some = min(FRAGMENTATION * tensors_gib, MAX_FRAGMENTATION_GIB)
        fragmentation = some + FRAGMENTATION_BEYOND * tensors_gib
        return {"context": CUDA_CONTEXT_GIB, "fragmentation": fragmentation}
    return {"libraries": LIBRARIES_GIB}


def _trl_head_bytes(case: StepCase, model: ModelShape, phase: str) -> int:
    """What TRL's head takes beyond ours for the rollouts.

    On CUDA it projects the completions alone; elsewhere every row of the micro-batch, and folds
    each tile with operations that make copies of it.
    """
    if case.num_rollouts == 0:
        return 0
    compute = Precision.of(case).compute
    on_cuda = case.device_type == "cuda"
    row = case.completion_tokens if on_cuda else case.prompt_tokens + case.completion_tokens
    rows = min(case.num_rollouts * row, _TRL_TOKENS)
    columns = min(model.vocab, _TRL_VOCAB)
    copies = 0.0 if on_cuda else _TRL_CPU_COPIES[phase]
    tile = round(rows * columns * (compute + copies * FP32))
    if phase == "backward" and case.lora_r is None and compute != Precision.of(case).weights:
        # Under autocast the part of the head that a tile meets is cast.
        tile += BF16 * columns * model.hidden
    return tile


def _padding_bytes(case: StepCase, model: ModelShape) -> int:
    """A mask a forward, and with a mask keys and values are repeated for every query head."""
    rollout_row = case.prompt_tokens + case.completion_tokens
    site_row = case.state_tokens + case.hint_tokens + case.action_tokens
    pair_row = case.pair_state_tokens + case.pair_action_tokens
    rows = (
        (case.num_rollouts, rollout_row),
        (case.num_sites, site_row),
        (case.num_pairs, pair_row),
    )
    rows += ((case.num_pairs, pair_row),)
    mask = sum(number * length**2 for number, length in rows)
    if case.checkpoints:
        return mask
    tokens = sum(number * length for number, length in rows)
    repeated = 2 * Precision.of(case).compute * (model.q_dim - model.kv_dim)
    return mask + tokens * repeated * model.num_layers


def weights_gib(case: StepCase) -> float:
    """The weights alone, which are downloaded, loaded and saved."""
    return gib(persistent_bytes(case)["weights"])
