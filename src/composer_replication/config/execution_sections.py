"""The sections that say what is run and where: `[rollout]`, `[lora]`, `[smoke]` and `[modal]`."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from composer_replication.config.config_model import ConfigModel
from composer_replication.errors import nearest

SHIPPED_ENVIRONMENTS = ("api_drift", "call_format", "fix_call", "reasoning_gym")

MIN_FIXED_TOKENS = 16
"""Fewest tokens of a fixed-shape row: a state, a hint and an action must each hold a few."""

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


STEP_TIMEOUT_S = 60.0
MAX_CONCURRENCY = 64


class RolloutConfig(ConfigModel):
    """`[rollout]`: where fresh rollouts come from and what judges them."""

    environment: str | None = None
    """`api_drift`, `call_format`, `fix_call`, `reasoning_gym`, or `package.module:Class` of your
    own; None: the task that the data's manifest names."""
    reward: str | None = None
    """`package.module:function` with the signature of a TRL reward function, for data without an
    environment; None: the environment's reward."""
    max_turns: int = Field(default=3, ge=1)
    """Most actions in one rollout; an environment may end it sooner."""
    max_action_tokens: int = Field(default=40, ge=1)
    """Tokens sampled for one action."""
    step_timeout_s: float = Field(default=STEP_TIMEOUT_S, gt=0)
    """Seconds in which an environment must answer one call; a rollout whose environment does not is
    counted and has no reward."""
    max_concurrency: int = Field(default=MAX_CONCURRENCY, ge=1)
    """Environments that may work at a time."""

    @field_validator("environment")
    @classmethod
    def _known_or_importable(cls, environment: str | None) -> str | None:
        if (
            environment is None
            or environment in SHIPPED_ENVIRONMENTS
            or _IMPORT_PATH.fullmatch(environment)
        ):
            return environment
        raise ValueError(
            f"rollout.environment is {environment!r}, which is neither a shipped environment nor "
            f"'package.module:Class'. {nearest(environment, SHIPPED_ENVIRONMENTS)}"
        )

    @field_validator("reward")
    @classmethod
    def _importable(cls, reward: str | None) -> str | None:
        if reward is None or _IMPORT_PATH.fullmatch(reward):
            return reward
        raise ValueError(
            f"rollout.reward is {reward!r}, which names no function to import. "
            "Write 'package.module:function'."
        )

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if self.environment is not None and self.reward is not None:
            raise ValueError(
                f"rollout.environment is {self.environment!r} and rollout.reward is "
                f"{self.reward!r}. An environment judges its own rollouts, so only one of them "
                "can give the reward. Leave one of them out."
            )
        return self


class LoraConfig(ConfigModel):
    """`[lora]`: train an adapter; without this section every weight is trained."""

    r: int = Field(default=16, ge=1)
    """Rank of the adapter."""
    alpha: int = Field(default=32, ge=1)
    """The adapter's product is scaled by `alpha / r`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs dropped while training."""
    target_modules: list[str] | Literal["all-linear"] = Field(default="all-linear", min_length=1)
    """Names of the modules that get an adapter, or every linear one."""


_FixedShape = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=MIN_FIXED_TOKENS)]]


class SmokeConfig(ConfigModel):
    """`[smoke]`: how long the smoke runs and at which shapes."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; None: as many as fit `time_budget_s`, up to the smoke's own maximum."""
    time_budget_s: float = Field(default=120.0, gt=0)
    """Seconds for the steps, loading not counted, where `steps` is None."""
    # strict=False: TOML has arrays and no tuples. The two numbers in it stay strict.
    fixed_shapes: _FixedShape | None = Field(default=None, strict=False)
    """`[B, T]`: B rows of T tokens, the same at every step and sampled from nothing; None: real
    rollouts. T holds a state, a hint and an action."""
    max_shape_tokens: int | None = Field(default=None, ge=2)
    """Row length in tokens of the one step that measures the largest shape a run can meet; None:
    the sum of the run's own length limits."""

    @model_validator(mode="after")
    def _one_shape_at_a_time(self) -> Self:
        if self.fixed_shapes is not None and self.max_shape_tokens is not None:
            raise ValueError(
                f"smoke.fixed_shapes is {list(self.fixed_shapes)} and smoke.max_shape_tokens is "
                f"{self.max_shape_tokens}. Every step already has the fixed shape, so there is "
                "no larger one to measure. Leave one of them out."
            )
        return self


MAX_MODAL_MEMORY_GIB = 336.0
"""Most RAM that Modal gives a container."""


class ModalConfig(ConfigModel):
    """`[modal]`: what a remote run asks for beside its card, and what may be repeated."""

    region: str | None = Field(default=None, pattern=r"^[a-z]{2}(-[a-z0-9]+)*$")
    """Continent or region such as `eu` or `us-east`, which costs more; None: any, the cheapest."""
    retries: int = Field(default=1, ge=0, le=10)
    """Attempts after the first; each resumes, and each may take the whole time-out."""
    cpu_cores: float = Field(default=4.0, gt=0, le=64)
    """Physical cores."""
    memory_gib: float | None = Field(default=None, gt=0, le=MAX_MODAL_MEMORY_GIB)
    """RAM; None: 16, or 1.5 times each card's weights where that is more, 336 at most."""
    timeout_s: float | None = Field(default=None, gt=0, le=86_400)
    """Seconds after which an attempt is ended; None: twice the planner's high estimate, and 1,800
    for a smoke."""
