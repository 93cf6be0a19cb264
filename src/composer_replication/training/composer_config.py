"""`ComposerConfig`: TRL's GRPOConfig plus the fields of the two extra channels."""

import math
from dataclasses import dataclass, field, fields
from typing import Literal, Self

from composer_replication.batch.collate import Truncation
from composer_replication.batch.render import HintPlacement
from composer_replication.errors import ConfigError
from composer_replication.step.settings import (
    DPOSettings,
    GRPOSettings,
    SDPOSettings,
    StepSettings,
    TeacherKind,
)
from composer_replication.training.trl_hooks import GRPOConfig

DEFAULT_ALPHA_SDPO = 0.1
DEFAULT_BETA_REPLAY = 0.05


@dataclass
class ComposerConfig(GRPOConfig):
    """GRPOConfig with the settings of SDPO and trace-replay DPO; nothing of TRL's is renamed.

    Four of TRL's defaults follow the Composer 2 report (arXiv:2603.24477): `dr_grpo`, no scaling of
    rewards, no KL, and truncated rollouts count. Every field here can be set in TOML too.
    """

    loss_type: str = "dr_grpo"
    """GRPO variant; any of TRL's."""
    scale_rewards: str = "none"
    """How advantages are scaled: none, group or batch."""

    alpha_sdpo: float | None = None
    """Weight of SDPO. None: 0.1 where `hint_sites` or error turns of rollouts feed it, else 0."""
    beta_replay: float | None = None
    """Weight of trace-replay DPO. None: 0.05 where `pairs` are given, else 0."""
    channel_weights: dict[str, float] = field(default_factory=dict)
    """Weights of further channels in `step.channels.CHANNELS`."""
    channel_schedule: Literal["every_step", "alternate"] = "every_step"
    """`alternate`: the extra channels take turns, one an optimizer step."""
    teacher: TeacherKind | None = None
    """Weights of the hint-conditioned teacher. None: ema, or frozen under LoRA."""
    teacher_ema_rate: float = 0.05
    """Share of the policy that enters the EMA teacher at each optimizer step."""
    tree: Literal["auto", "always", "off"] = "auto"
    """`auto`: one forward of the prefix tree of all rows, where an extra channel is on and the
    model allows it; `always`: for GRPO alone too; `off`: one forward for each role, and rollouts
    in TRL's order."""
    tree_max_tokens: int | None = 65_536
    """Most tokens of one forward of the tree; more are cut at its nodes into several, whose
    activations never exist together. None: no limit."""

    sdpo_beta: float = 0.5
    """0 is KL(teacher || policy), 1 is KL(policy || teacher), between: Jensen-Shannon."""
    sdpo_temperature: float = 1.0
    """Temperature of both distributions."""
    sdpo_top_k: int | None = None
    """Keep the k likeliest tokens. None: all."""
    sdpo_top_k_from: Literal["teacher", "policy"] = "teacher"
    """Whose k likeliest tokens are kept."""
    sdpo_tail: bool = False
    """With top_k: one entry for the rest, no renormalising."""
    sdpo_clip: Literal["token", "entry"] | None = None
    """`token`: scale large divergences down; `entry`: OPSD's element-wise clip."""
    sdpo_clip_value: float | None = None
    """The bound of sdpo_clip, in nats."""
    sdpo_entropy_scale: float | None = None
    """A token counts exp(-teacher's entropy / this), in nats. None: all tokens alike."""
    sdpo_prefix_weight: Literal["off", "acceptance"] = "off"
    """`acceptance`: a token counts as much as the teacher accepts what stands before it."""
    rollout_routing: Literal["off", "failures"] = "off"
    """`failures`: a failed rollout's error turns train SDPO and that rollout leaves GRPO, which
    keeps the successes and what SDPO has no room for."""
    success_reward: float = 1.0
    """From this reward of the environment on a rollout is a success, for `rollout_routing`."""
    hint_placement: HintPlacement = "append"
    """`append` to the state's last message, the same and the message once more (`restate`), a
    `user_turn` of its own, or `demonstrate` the hint's example as a turn before that message."""
    hint_site_actions: Literal["resampled", "recorded"] = "resampled"
    """Actions at the given hint sites: sampled anew from the policy, or `recorded` ones, which are
    off-policy."""
    hint_sites_per_step: int = 2
    """Hint sites an optimizer step trains on, per device."""

    dpo_beta: float = 0.1
    """DPO's inverse temperature."""
    dpo_label_smoothing: float = 0.0
    """cDPO: chance that a preference is wrong."""
    pairs_per_step: int = 2
    """Pairs an optimizer step trains on, per device."""

    max_context_tokens: int | None = None
    """Longest row of a hint site or pair, in tokens. None: no limit."""
    truncation: Truncation = "refuse"
    """Over max_context_tokens: refuse, or cut the `middle` of the state."""
    rollouts_dir: str | None = None
    """Where every rollout is written. None: `rollouts` in output_dir."""
    reference_cache_dir: str | None = None
    """Where reference log-probs are kept. None: `reference_logps` in output_dir."""

    gradients_every: int | None = None
    """Steps between two measurements of each channel's own gradient, which cost the memory of one
    gradient a channel. 0 or None: never."""
    credit_every: int | None = None
    """Steps between two files of every token's credit. 0 or None: never."""
    credit_dir: str | None = None
    """Where credit is written. None: `credit` in output_dir."""

    guard_enabled: bool = True
    """False: no guard stops the run. Each of the `steps` below turns its own off with 0 or None;
    `docs/diagnostics.md` says what each sees."""
    guard_no_spread_steps: int | None = 100
    """Steps in a row without reward spread in any group."""
    guard_no_effect_steps: int | None = 100
    """SDPO's own steps in a row whose divergence is under guard_effect_floor."""
    guard_effect_floor: float | None = None
    """Nats a token. None: 1e-6 in fp32, 1e-3 in half precision."""
    guard_no_data_steps: int | None = 100
    """A channel's own steps in a row without tokens or pairs."""
    guard_entropy_steps: int | None = 50
    """Steps in a row whose mean token entropy is under guard_entropy_floor."""
    guard_entropy_floor: float = 0.01
    """Nats a token."""
    guard_short_steps: int | None = 20
    """Steps in a row whose mean completion has at most guard_short_tokens."""
    guard_short_tokens: float = 2.0
    """Tokens, the end-of-turn token included."""
    guard_repetition_steps: int | None = 50
    """Steps in a row whose completions repeat themselves by at least guard_repetition_share."""
    guard_repetition_share: float = 0.5
    """Of the 4-grams of a completion."""
    guard_cut_off_steps: int | None = 200
    """Steps in a row in which every completion was cut off."""
    guard_non_finite_steps: int | None = 1
    """Steps in a row whose gradient norm is not finite; under fp16 at least 20."""
    guard_heldout_evaluations: int | None = 2
    """Evaluations in a row (of `eval_dataset`, in at least two batches) under the best as many by
    guard_heldout_drop and more than their noise while the training reward rose."""
    guard_heldout_drop: float = 0.1
    """Of the held-out reward."""

    def __post_init__(self) -> None:
        """Check our fields, then let TRL check its own."""
        self.check_composer_fields()
        super().__post_init__()

    def check_composer_fields(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: the value, why it cannot work, and what to set.
        """
        weights = {"alpha_sdpo": self.alpha_sdpo, "beta_replay": self.beta_replay}
        weights |= {f"channel_weights[{name!r}]": w for name, w in self.channel_weights.items()}
        for name, weight in weights.items():
            if weight is not None and not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(
                    f"{name} is {weight}; a channel's weight is a finite number of at least 0. "
                    "Set 0 to turn the channel off."
                )
        if not 0 < self.teacher_ema_rate <= 1:
            raise ConfigError(
                f"teacher_ema_rate is {self.teacher_ema_rate}; it must be above 0 and at most 1. "
                "For a teacher that never moves set teacher = 'frozen'."
            )
        if self.tree_max_tokens is not None and self.tree_max_tokens < 1:
            raise ConfigError(
                f"tree_max_tokens is {self.tree_max_tokens}; a forward needs at least 1 token. Set "
                "None for no limit, or tree = 'off' for a forward of each role."
            )
        for name in ("hint_sites_per_step", "pairs_per_step"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; it must be at least 1. To turn a channel "
                    "off set its weight to 0."
                )
        for item in fields(ComposerConfig):
            if item.name.startswith("guard_") or item.name in ("gradients_every", "credit_every"):
                value = getattr(self, item.name)
                if value is not None and not value >= 0:
                    raise ConfigError(
                        f"{item.name} is {value}; it must be at least 0. Set 0 to turn it off."
                    )
        if self.rollout_routing == "failures" and self.channel_schedule == "alternate":
            raise ConfigError(
                "rollout_routing is 'failures' and channel_schedule is 'alternate'. In the steps "
                "without SDPO its failures would train nothing. Set one of them back."
            )
        if self.sdpo_clip is not None and self.sdpo_clip_value is None:
            raise ConfigError(
                f"sdpo_clip is {self.sdpo_clip!r} without a bound. Set sdpo_clip_value, in nats."
            )

    @classmethod
    def from_grpo_config(cls, args: GRPOConfig) -> Self:
        """The same settings with our fields at their defaults, so TRL scripts keep their config."""
        config = object.__new__(cls)
        config.__dict__.update(args.__dict__)
        for item in fields(cls):
            if item.name not in args.__dict__:
                factory = item.default_factory
                value = factory() if callable(factory) else item.default
                object.__setattr__(config, item.name, value)
        return config

    def step_settings(self) -> StepSettings:
        """What the channels compute under these fields."""
        return StepSettings(
            grpo=GRPOSettings(
                max_completion_length=self.max_completion_length or 0, temperature=self.temperature
            ),
            sdpo=SDPOSettings(
                beta=self.sdpo_beta,
                temperature=self.sdpo_temperature,
                top_k=self.sdpo_top_k,
                top_k_from=self.sdpo_top_k_from,
                tail=self.sdpo_tail,
                clip=self.sdpo_clip,
                clip_value=self.sdpo_clip_value,
                entropy_scale=self.sdpo_entropy_scale,
                prefix_weight=self.sdpo_prefix_weight,
            ),
            dpo=DPOSettings(beta=self.dpo_beta, label_smoothing=self.dpo_label_smoothing),
        )
