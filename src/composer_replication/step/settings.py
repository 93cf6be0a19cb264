"""What the channels of one step compute: plain numbers, fixed for a run."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

# Opens the weights that score as the teacher; None stands for the live policy.
TeacherContext = Callable[[], AbstractContextManager[nn.Module]]
TeacherKind = Literal["live", "ema", "frozen"]


@dataclass(frozen=True, slots=True)
class GRPOSettings:
    """The clipped objective for callers without TRL; the trainer uses TRL's own."""

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dr_grpo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    max_completion_length: int = 512
    """Tokens; the constant that dr_grpo divides by."""
    temperature: float = 1.0
    """The sampling temperature, at which rollout log-probs are taken."""


@dataclass(frozen=True, slots=True)
class SDPOSettings:
    """The divergence between the policy and its hint-conditioned teacher."""

    beta: float = 0.5
    """Mixture: 0 is KL(teacher || policy), 1 is KL(policy || teacher)."""
    temperature: float = 1.0
    top_k: int | None = None
    top_k_from: Literal["teacher", "policy"] = "teacher"
    tail: bool = False
    clip: Literal["token", "entry"] | None = None
    clip_value: float | None = None
    entropy_scale: float | None = None
    """Nats; a token counts exp(-teacher's entropy / entropy_scale). None: all tokens alike."""
    prefix_weight: Literal["off", "acceptance"] = "off"
    """`acceptance`: a token counts as much as the teacher would have accepted the tokens before it
    (`losses/acceptance.py`). `off`: all tokens alike."""


@dataclass(frozen=True, slots=True)
class DPOSettings:
    """The preference loss on replayed states."""

    beta: float = 0.1
    label_smoothing: float = 0.0


@dataclass(frozen=True, slots=True)
class StepSettings:
    """The settings of every channel."""

    grpo: GRPOSettings = field(default_factory=GRPOSettings)
    sdpo: SDPOSettings = field(default_factory=SDPOSettings)
    dpo: DPOSettings = field(default_factory=DPOSettings)
