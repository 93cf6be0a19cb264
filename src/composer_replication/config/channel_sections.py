"""The sections of the two dense channels, `[sdpo]` and `[dpo]`, and of their rows, `[batch]`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from composer_replication.config.config_model import ConfigModel


class SdpoConfig(ConfigModel):
    """`[sdpo]`: how the hint-conditioned teacher's distribution reaches the student."""

    beta: float = Field(default=0.5, ge=0, le=1)
    """Mixture of the divergence: 0 is KL(teacher || policy), 1 is KL(policy || teacher), between
    them a Jensen-Shannon divergence; the endpoints are larger in scale than their neighbours."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of student and teacher before the softmax."""
    top_k: int | None = Field(default=None, ge=1)
    """Vocabulary entries compared at each token; None: all of them."""
    top_k_from: Literal["teacher", "policy"] = "teacher"
    """Which model's largest logits choose the `top_k` entries."""
    tail: bool = False
    """Adds the mass outside `top_k` as one more entry; False renormalises inside it."""
    clip: Literal["token", "entry"] | None = None
    """What `clip_value` limits: a `token`'s divergence, or each vocabulary `entry` of it; None:
    nothing. Clipping by entry biases the value and can turn the gradient around."""
    clip_value: float | None = Field(default=None, gt=0)
    """Largest divergence that passes, in nats; goes with `clip`."""
    entropy_scale: float | None = Field(default=None, gt=0)
    """Weighs each token by exp(-entropy / entropy_scale) of the teacher's distribution, in nats, so
    that a teacher who is not sure pulls less; None: all tokens alike."""
    prefix_weight: Literal["off", "acceptance"] = "off"
    """`acceptance` weighs each token by how likely the teacher would have accepted the action's
    tokens before it: what it says after a token that it would not have written teaches the policy
    to repair, not to do it right. `off`: all tokens alike, as published."""
    routing: Literal["off", "failures"] = "off"
    """`failures`: a failed rollout's error turns train SDPO and that rollout leaves GRPO, so GRPO
    keeps the successes and whatever SDPO has no room for; `off`: both train on all they have."""
    success_reward: float = 1.0
    """With `routing`: from this reward of the environment on a rollout is a success."""
    hint_placement: Literal["append", "user_turn", "restate", "demonstrate"] = "append"
    """Where the hint stands in the teacher's state: at the end of the last message; there, with the
    message said once more after it (small models copy the arguments of an example that they read
    last); as a user turn of its own; or, with `demonstrate`, the example of the hint, what follows
    "Example of a correct call: ", as a turn before the message, and where the hint says which
    request it answers ("Example request: "), in answer to that: small models follow that best."""
    actions: Literal["resampled", "recorded"] = "resampled"
    """Whose action tokens are scored: sampled anew by the policy, or as the trace recorded them.
    Another model's recorded actions are off-policy."""
    sites_per_step: int = Field(default=2, ge=1)
    """Hint sites in one optimizer step."""
    teacher_ema_rate: float = Field(default=0.05, gt=0, le=1)
    """Share of the policy that enters an `ema` teacher at each optimizer step."""

    @model_validator(mode="after")
    def _options_that_need_each_other(self) -> Self:
        if self.clip is not None and self.clip_value is None:
            raise ValueError(
                f"sdpo.clip is {self.clip!r} and sdpo.clip_value is not set, "
                "so there is no bound to clip at. Set sdpo.clip_value, or leave sdpo.clip out."
            )
        if self.clip is None and self.clip_value is not None:
            raise ValueError(
                f"sdpo.clip_value is {self.clip_value} and sdpo.clip is not set, "
                "so nothing would be clipped. Set sdpo.clip to 'token' or 'entry'."
            )
        if self.tail and self.top_k is None:
            raise ValueError(
                "sdpo.tail is true and sdpo.top_k is not set. The whole vocabulary is compared "
                "then and leaves no tail. Set sdpo.top_k, or leave sdpo.tail out."
            )
        if self.top_k_from == "policy" and self.top_k is None:
            raise ValueError(
                "sdpo.top_k_from is 'policy' and sdpo.top_k is not set. The whole vocabulary is "
                "compared then and nothing is chosen. Set sdpo.top_k, or leave "
                "sdpo.top_k_from out."
            )
        return self


class DpoConfig(ConfigModel):
    """`[dpo]`: the preference loss on replayed traces."""

    beta: float = Field(default=0.1, gt=0)
    """DPO's inverse temperature, which scales the log-ratio to the reference; it is not the
    channel's weight, which is `beta_replay`."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs assumed to be labelled the wrong way round. At 0.5 a pair would say nothing
    about which action is better."""
    pairs_per_step: int = Field(default=2, ge=1)
    """Preference pairs in one optimizer step."""


class BatchConfig(ConfigModel):
    """`[batch]`: the length of the rows of both dense channels, and when each one runs."""

    max_context_tokens: int | None = Field(default=None, ge=2)
    """Longest row in tokens: state, hint and action together; None: no limit."""
    truncation: Literal["refuse", "middle"] = "refuse"
    """A row over `max_context_tokens` stops the run, or loses the middle of its state."""
    tree_max_tokens: int | None = Field(default=65_536, ge=1)
    """Most tokens of one forward under `tree = "auto"`; a larger step is cut into several, whose
    activations never exist together; None: no limit."""
    channel_schedule: Literal["every_step", "alternate"] = "every_step"
    """Both dense channels at every step, or SDPO and DPO in turn, which lowers the peak memory."""

    @model_validator(mode="after")
    def _truncation_needs_a_limit(self) -> Self:
        if self.truncation == "middle" and self.max_context_tokens is None:
            raise ValueError(
                "batch.truncation is 'middle' and batch.max_context_tokens is not set, so no row "
                "is ever too long. Set batch.max_context_tokens, or leave batch.truncation out."
            )
        return self
