"""`Summary`: how a run ended, as `summary.json` and `--json` hold it, and its JSON schema."""

import json
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic.dataclasses import dataclass

SUMMARY_SCHEMA = 1

_PACKAGES = (
    "composer-replication",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "peft",
)

Figure = int | float | None
"""A measured number; None where it is not known, never 0."""


@dataclass(frozen=True, config=ConfigDict(use_attribute_docstrings=True))
class Check:
    """One claim that the run tested.

    Example:
        >>> Check("finite_loss", passed=False, value=None, bound=None, cause="loss is nan at 3")
    """

    name: str
    """Stable name of the claim."""
    passed: bool
    """True where it held."""
    value: int | float | bool | str | None = None
    """What was measured; null where it is not a finite number."""
    bound: int | float | bool | str | None = None
    """What it was held against."""
    cause: str | None = None
    """Why it failed and what to do; None where it passed."""


@dataclass(frozen=True, config=ConfigDict(use_attribute_docstrings=True))
class HeldoutScores:
    """Greedy success on held-out prompts, 0 to 1.

    Example:
        >>> HeldoutScores(first=0.0, last=0.85, best=0.9, best_step=12, num_prompts=32)
    """

    first: float
    """Before the first step."""
    last: float
    """After the last step."""
    best: float
    """The highest of all evaluations."""
    best_step: int
    """Steps done at the first evaluation that reached it."""
    num_prompts: int
    """Played each time."""


class Summary(BaseModel):
    """How a run ended; every figure that is not known is null.

    Example:
        >>> Summary(status="failed", error="loss is nan at step 3").to_json()
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: Literal[1] = Field(default=SUMMARY_SCHEMA, alias="schema")
    """Version of this layout."""
    status: Literal["passed", "failed", "stopped"]
    """`stopped`: ended by the user before it was done."""
    checks: list[Check] = Field(default_factory=list[Check])
    """Every claim that was tested, in order."""
    model: str | None = None
    """Hugging Face id or folder of the model that ran."""
    device: str | None = None
    """The actual device, such as `NVIDIA L4` or `cpu`."""
    versions: dict[str, str | None] = Field(default_factory=lambda: versions())
    """Version of Python and of each package that computes; null where it is not installed."""
    steps: int | None = None
    """Optimizer steps done."""
    median_step_s: Figure = None
    """Median seconds of a step."""
    p95_step_s: Figure = None
    """Seconds within which 95 % of the steps ended."""
    total_s: Figure = None
    """Seconds of the whole run."""
    peak_gib: Figure = None
    """The allocator's peak on CUDA, the process's peak resident size on CPU; GiB."""
    peak_tensor_gib: Figure = None
    """Peak of the tensors alone, on both; GiB."""
    peak_gib_max_shape: Figure = None
    """`peak_gib` of the step at the largest shape that the run can meet; GiB."""
    phases_s: dict[str, Figure] = Field(default_factory=dict[str, Figure])
    """Seconds of each phase: cold_start (the process before the run), download (0: nothing to
    fetch; null: `load` fetched the weights), load, rollout, step (rollouts included),
    evaluate (held-out prompts while the run trained), save."""
    cost_usd: Figure = None
    """What was billed, in USD; null where nothing is billed."""
    executor: str | None = None
    """How the step was scored: `packed`, or `separate` and why."""
    heldout: HeldoutScores | None = None
    """Held-out success while the run went on; null where it was not measured."""
    channels: dict[str, dict[str, Figure]] = Field(default_factory=dict[str, dict[str, Figure]])
    """Figures of each channel by its name, such as `{"sdpo": {"loss": 0.12, "tokens": 64}}`."""
    notes: list[str] = Field(default_factory=list[str])
    """What a reader must know to believe the figures."""
    error: str | None = None
    """What ended the run early."""

    @model_validator(mode="after")
    def _passed_means_every_check_passed(self) -> Self:
        failed = [check.name for check in self.checks if not check.passed]
        assert self.status != "passed" or not failed, f"status is passed, but {failed} failed"
        return self

    def to_payload(self) -> dict[str, JsonValue]:
        """The same as Python values of JSON's types."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        """The summary as JSON text; figures that are not finite are null."""
        return self.model_dump_json(by_alias=True, indent=2)


def versions() -> dict[str, str | None]:
    """Version of Python and of each package that computes, without importing any of them."""
    return {"python": python_version()} | {name: _installed(name) for name in _PACKAGES}


def summary_json_schema() -> dict[str, JsonValue]:
    """The JSON schema of `summary.json`, published as `summary_schema.json` beside this module."""
    return Summary.model_json_schema(by_alias=True, mode="serialization")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
