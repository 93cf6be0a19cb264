"""Which settings need less memory, in the order to try them, priced from what was measured.

Activations are taken to grow with rows of equal length: the rollouts of a micro-batch, its hint
sites, and both actions of its pairs.
"""

import math
from dataclasses import dataclass
from typing import Literal, cast

from composer_replication.config.run_config import RunConfig

Phase = Literal[
    "load", "teacher copy", "reference", "rollout", "teacher", "policy", "optimizer", "save"
]

# Fragmentation and buffers take a little that no sum over tensors shows.
_USABLE_SHARE = 0.95
# A step fails before its peak: what it would have needed is taken to be twice what it had.
_UNSEEN = 2.0
_TRL_DEFAULTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
    "max_completion_length": 512,
}


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """What was measured where an allocation failed; GiB.

    Example: `MemoryFigures(need=90.0, capacity=80.0, fixed=20.0, trained=5.0, lora=2.5)`.
    """

    need: float
    """The peak and what was asked for beyond it: the run needs at least this."""
    capacity: float
    fixed: float
    """What rows and tokens do not change: weights, gradients, moments, libraries."""
    trained: float
    """Of that the weights that are trained, and so have gradients and moments."""
    lora: float
    """What `fixed` would be if an adapter were trained instead."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """One change of settings.

    Example: `Remedy("sdpo.sites_per_step = 1", None)`.
    """

    setting: str
    need: float | None = None
    """GiB that the run would need at least; None: not known."""


def remedies(config: RunConfig, phase: Phase | None, figures: MemoryFigures) -> list[Remedy]:
    """What would lower the peak of that phase, without what is at its minimum already."""
    found: list[Remedy] = []
    if figures.fixed < figures.capacity:
        if phase == "rollout":
            found += _fewer_rollouts_at_a_time(config)
        elif phase == "reference":
            found += _shorter_rows(config) + _fewer_pairs(config)
        elif phase in (None, "teacher", "policy"):
            found += _fewer_rows(config, figures)
            if config.grpo.get("gradient_checkpointing") is not True:
                found.append(Remedy("grpo.gradient_checkpointing = true, a fifth slower"))
            found += _shorter_rows(config) + _fewer_sites(config) + _fewer_pairs(config)
    if config.lora is None and figures.trained > 0:
        activations = max(figures.need - figures.fixed, 0.0)
        found.append(Remedy("lora.r = 16: train an adapter", figures.lora + activations))
    return found or [Remedy("a smaller model, or a machine with more memory")]


def _fewer_rows(config: RunConfig, figures: MemoryFigures) -> list[Remedy]:
    """The largest micro-batch that should fit, with as many rollouts a step as before."""
    rows, accumulation = _count(config, "per_device_train_batch_size"), _accumulation(config)
    candidates = [n for n in range(rows - 1, 0, -1) if rows % n == 0]
    if not candidates:
        return []
    activations = max(figures.need - figures.fixed, 0.0)

    def num_scored(n: int) -> int:
        steps = accumulation * rows // n
        sites = math.ceil(config.sdpo.sites_per_step / steps) if config.alpha_sdpo > 0 else 0
        pairs = math.ceil(config.dpo.pairs_per_step / steps) if config.beta_replay > 0 else 0
        return n + sites + 2 * pairs

    needs = {n: figures.fixed + activations * num_scored(n) / num_scored(rows) for n in candidates}
    limit = _USABLE_SHARE * figures.capacity - figures.fixed
    chosen = next(
        (n for n in candidates if _UNSEEN * (needs[n] - figures.fixed) <= limit), candidates[-1]
    )
    factor = rows // chosen
    settings = [
        f"grpo.per_device_train_batch_size = {chosen}",
        f"grpo.gradient_accumulation_steps = {accumulation * factor}",
    ]
    per_generation = config.grpo.get("steps_per_generation")
    if isinstance(per_generation, int):
        settings.append(f"grpo.steps_per_generation = {per_generation * factor}")
    if config.smoke.fixed_shapes is not None:
        settings.append(f"smoke.fixed_shapes = [{chosen}, {config.smoke.fixed_shapes[1]}]")
    return [Remedy(_joined(settings), needs[chosen])]


def _fewer_rollouts_at_a_time(config: RunConfig) -> list[Remedy]:
    """All rollouts of a generation are sampled together, whatever the micro-batch is."""
    found: list[Remedy] = []
    rows, accumulation = _count(config, "per_device_train_batch_size"), _accumulation(config)
    group = _count(config, "num_generations")
    fewer = [n for n in range(accumulation - 1, 0, -1) if rows * n % group == 0]
    if fewer:
        found.append(
            Remedy(f"grpo.gradient_accumulation_steps = {fewer[len(fewer) // 2]}: a smaller step")
        )
    elif group >= 4 and group % 2 == 0:
        settings = [f"grpo.num_generations = {group // 2}"]
        if rows % 2 == 0:
            settings.append(f"grpo.per_device_train_batch_size = {rows // 2}")
        found.append(Remedy(_joined(settings)))
    completion = _count(config, "max_completion_length")
    if completion >= 2:
        found.append(Remedy(f"grpo.max_completion_length = {completion // 2}"))
    return found


def _shorter_rows(config: RunConfig) -> list[Remedy]:
    if config.smoke.fixed_shapes is not None:
        num_rows, num_tokens = config.smoke.fixed_shapes
        return [Remedy(f"smoke.fixed_shapes = [{num_rows}, {num_tokens // 2}]")]
    if config.alpha_sdpo == config.beta_replay == 0:
        return []
    limit = config.batch.max_context_tokens
    settings = [f"batch.max_context_tokens = {1024 if limit is None else limit // 2}"]
    if config.batch.truncation != "middle":
        settings.append("batch.truncation = 'middle'")
    no_limit = " (there is no limit yet)" if limit is None else ""
    return [Remedy(_joined(settings) + no_limit)]


def _fewer_sites(config: RunConfig) -> list[Remedy]:
    sites = config.sdpo.sites_per_step
    if config.alpha_sdpo == 0 or sites == 1:
        return []
    return [Remedy(f"sdpo.sites_per_step = {sites // 2}")]


def _fewer_pairs(config: RunConfig) -> list[Remedy]:
    pairs = config.dpo.pairs_per_step
    if config.beta_replay == 0 or pairs == 1:
        return []
    return [Remedy(f"dpo.pairs_per_step = {pairs // 2}")]


def _accumulation(config: RunConfig) -> int:
    return _count(config, "gradient_accumulation_steps")


def _count(config: RunConfig, key: str) -> int:
    return cast(int, config.grpo.get(key, _TRL_DEFAULTS[key]))


def _joined(settings: list[str]) -> str:
    if len(settings) == 1:
        return settings[0]
    return f"{', '.join(settings[:-1])} and {settings[-1]}"
