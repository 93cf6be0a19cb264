"""Ways to spread a run over processes in which its losses would not be computed."""

from typing import cast

from accelerate import Accelerator
from accelerate.utils import DistributedType

from composer_replication.errors import ConfigError
from composer_replication.training.composer_config import ComposerConfig

_SHARDS = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def check_processes(args: ComposerConfig, accelerator: Accelerator) -> None:
    """Nothing, where a run of several forwards a step can be spread as it is.

    Raises:
        ConfigError: weights in shards, or DDP with reentrant checkpointing.
    """
    _refuse_shards(accelerator)
    _refuse_reentrant_checkpointing(args, accelerator.num_processes)


def _refuse_shards(accelerator: Accelerator) -> None:
    """The losses read the output head as one tensor."""
    kind = accelerator.distributed_type
    if kind not in _SHARDS:
        return
    plugin = accelerator.state.deepspeed_plugin if kind == DistributedType.DEEPSPEED else None
    if plugin is None or plugin.zero_stage == 3:
        raise ConfigError(
            f"The run is distributed by {kind.value}, which spreads weights over processes, and "
            "the losses read the output head as one tensor. Use one process, or DDP."
        )


def _refuse_reentrant_checkpointing(args: ComposerConfig, num_processes: int) -> None:
    """DDP cannot average the gradients of several forwards under reentrant checkpointing.

    Raises:
        ConfigError: both at once.
    """
    kinds = cast(dict[str, object], args.gradient_checkpointing_kwargs or {})
    if args.gradient_checkpointing and kinds.get("use_reentrant") and num_processes > 1:
        raise ConfigError(
            "gradient_checkpointing_kwargs has use_reentrant = true and there are "
            f"{num_processes} processes. Each channel runs a forward of its own, and DDP takes a "
            "parameter's gradient as whole after the first of them. Set use_reentrant = false."
        )
