"""`PlanRequest`: what is to be planned."""

from dataclasses import dataclass

from composer_replication.config.run_config import RunConfig
from composer_replication.planner.evaluation_shape import EvaluationSize
from composer_replication.planner.hardware import GpuRequest
from composer_replication.planner.places import On
from composer_replication.planner.run_shape import RunVerb


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is to be planned.

    Example: `PlanRequest(config, on="modal", budget_usd=5.0)`.
    """

    config: RunConfig
    on: On = "all"
    gpu: GpuRequest | None = None
    budget_usd: float | None = None
    """Cap on the worst case; None: 5 USD for a smoke, none for a train run."""
    fills_smoke_defaults: bool = False
    """Without a configuration file a smoke takes sizes that suit the device."""
    verb: RunVerb | None = None
    """That runs it; None: as `run_shape` reads it off the configuration."""
    evaluation: EvaluationSize | None = None
    """What an evaluation of the configuration's `model` plays, in place of a run."""
