"""Which extra channels a run has, and their weights."""

from composer_replication.errors import ConfigError
from composer_replication.step.channels import CHANNELS
from composer_replication.step.optimizer_step import find_channel
from composer_replication.training.composer_config import (
    DEFAULT_ALPHA_SDPO,
    DEFAULT_BETA_REPLAY,
    ComposerConfig,
)


def channel_weights(
    args: ComposerConfig, *, has_hint_sites: bool, has_pairs: bool
) -> dict[str, float]:
    """The extra channels that are on, with their weights.

    Raises:
        ConfigError: a weight above 0 whose channel could never have data.
    """
    has_data = {"hint_sites": has_hint_sites, "pairs": has_pairs, "rollouts": True}
    asked = {
        "sdpo": (args.alpha_sdpo, DEFAULT_ALPHA_SDPO, "alpha_sdpo"),
        "dpo": (args.beta_replay, DEFAULT_BETA_REPLAY, "beta_replay"),
    }
    weights: dict[str, float] = {}
    for name, (given, default, key) in asked.items():
        data = CHANNELS[name].data
        weight = given if given is not None else default * has_data[data]
        if weight > 0 and not has_data[data]:
            raise ConfigError(
                f"{key} is {weight} and no {data} were given, so the channel could never train. "
                f"Pass {data}= to the trainer, or set {key} = 0."
            )
        weights[name] = weight
    for name, weight in args.channel_weights.items():
        if find_channel(name).name in ("grpo", "sdpo", "dpo"):
            raise ConfigError(
                f"channel_weights has {name!r}, which has a setting of its own. Use alpha_sdpo or "
                "beta_replay; GRPO's weight is 1."
            )
        data = CHANNELS[name].data
        if weight > 0 and not has_data[data]:
            raise ConfigError(
                f"channel_weights[{name!r}] is {weight} and no {data} were given, so the channel "
                f"could never train. Pass {data}= to the trainer, or set the weight to 0."
            )
        weights[name] = weight
    return {name: weight for name, weight in weights.items() if weight > 0}
