"""`RunConfig`: one run as data, as `CONFIG.toml` holds it."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, field_validator

from composer_replication.config.channel_sections import BatchConfig, DpoConfig, SdpoConfig
from composer_replication.config.config_model import ConfigModel
from composer_replication.config.diagnostic_sections import (
    DiagnosticsConfig,
    EvaluationConfig,
    GuardsConfig,
)
from composer_replication.config.execution_sections import (
    LoraConfig,
    ModalConfig,
    RolloutConfig,
    SmokeConfig,
)

CORE_CHANNEL_WEIGHTS = {"grpo": None, "sdpo": "alpha_sdpo", "dpo": "beta_replay"}
"""The key of each core channel's weight; GRPO's is fixed at 1."""


class RunConfig(ConfigModel):
    """One run: `total = GRPO + alpha_sdpo * SDPO + beta_replay * DPO`.

    Example:
        >>> RunConfig(alpha_sdpo=0.2, grpo={"learning_rate": 1e-5, "num_generations": 4})
    """

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run directory, `runs/<name>`: letters, digits, '.', '_' and '-', the first of them
    a letter or digit."""
    model: str | None = Field(default=None, min_length=1)
    """Hugging Face id or local folder; None: the default model for the device."""
    alpha_sdpo: float = Field(default=0.1, ge=0)
    """Weight of SDPO; 0 turns the channel off."""
    beta_replay: float = Field(default=0.05, ge=0)
    """Weight of trace-replay DPO; 0 turns the channel off."""
    teacher: Literal["live", "ema", "frozen"] | None = None
    """Weights of the hint-conditioned teacher: the policy's own, a slow copy of them, or the
    start's; None: `ema`, or `frozen` under LoRA."""
    tree: Literal["auto", "always", "off"] = "auto"
    """Executor of the step: `auto` runs one forward of the prefix tree of all rows where an extra
    channel is on and the model allows it; `always` does so for GRPO alone too, which is then not
    TRL's step bit for bit; `off` runs one forward for each role."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seeds Python, NumPy and torch."""
    data: str | None = Field(default=None, min_length=1)
    """Folder of prompts, hint sites and pairs; None: the `api_drift` data shipped with the
    package."""
    grpo: dict[str, JsonValue] = Field(default_factory=dict[str, JsonValue])
    """`[grpo]`: GRPOConfig's own keys, passed through to TRL, which checks them when it starts."""
    sdpo: SdpoConfig = SdpoConfig()
    """`[sdpo]`: the hint channel."""
    dpo: DpoConfig = DpoConfig()
    """`[dpo]`: the trace-replay channel."""
    batch: BatchConfig = BatchConfig()
    """`[batch]`: rows of the dense channels."""
    rollout: RolloutConfig = RolloutConfig()
    """`[rollout]`: fresh rollouts and their reward."""
    lora: LoraConfig | None = None
    """`[lora]`: the adapter; None: every weight is trained."""
    channels: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict[str, float])
    """`[channels]`: the weight of each further channel that you registered, by its name."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """`[evaluation]`: held-out episodes while a train run goes on."""
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    """`[diagnostics]`: what is measured beside training."""
    guards: GuardsConfig = GuardsConfig()
    """`[guards]`: when a run that cannot learn is stopped."""
    smoke: SmokeConfig = SmokeConfig()
    """`[smoke]`: length and shapes of the smoke."""
    modal: ModalConfig = ModalConfig()
    """`[modal]`: resources and repeats of a remote run."""

    @field_validator("grpo")
    @classmethod
    def _writable_as_toml(cls, grpo: dict[str, JsonValue]) -> dict[str, JsonValue]:
        _refuse_none("grpo", grpo)
        return grpo

    @field_validator("grpo")
    @classmethod
    def _groups_of_two(cls, grpo: dict[str, JsonValue]) -> dict[str, JsonValue]:
        num_generations = grpo.get("num_generations", 2)
        if isinstance(num_generations, int) and num_generations < 2:
            raise ValueError(
                f"grpo.num_generations is {num_generations}; it must be at least 2. One rollout "
                "is its own baseline, so every advantage would be 0 and GRPO would not train. "
                "Raise grpo.num_generations."
            )
        return grpo

    @field_validator("channels")
    @classmethod
    def _core_weights_have_keys_of_their_own(cls, channels: dict[str, float]) -> dict[str, float]:
        for name in channels.keys() & CORE_CHANNEL_WEIGHTS.keys():
            key = CORE_CHANNEL_WEIGHTS[name]
            what_to_do = "GRPO's weight is always 1" if key is None else f"Set {key} instead"
            raise ValueError(
                f"channels.{name} is {channels[name]}; [channels] weighs further channels, and "
                f"{name!r} is a core one. {what_to_do}."
            )
        return channels


def _refuse_none(key: str, value: JsonValue) -> None:
    """Walk a passed-through table; the error names the dotted key."""
    if value is None:
        raise ValueError(
            f"{key} is None, which TOML cannot hold. Leave it out to keep TRL's default."
        )
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_none(f"{key}.{name}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _refuse_none(f"{key}[{index}]", inner)
