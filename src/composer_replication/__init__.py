"""Train a small agent with one step of GRPO + alpha_sdpo * SDPO + beta_replay * DPO.

The names below are loaded when first used, so that importing the package starts no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from composer_replication.batch.batches import Rollout, StepBatch
    from composer_replication.batch.collate import ComposerDataCollator
    from composer_replication.losses.sdpo import fused_generalized_jsd, generalized_jsd_loss
    from composer_replication.traces.hints import HintSite
    from composer_replication.traces.pairs import PreferencePair
    from composer_replication.traces.trace import Message
    from composer_replication.training.composer_config import ComposerConfig
    from composer_replication.training.rollouts import EnvironmentRollouts
    from composer_replication.training.trainer import ComposerReplicationTrainer

__version__ = "0.1.0"

_HOMES = {
    "ComposerConfig": "composer_replication.training.composer_config",
    "ComposerDataCollator": "composer_replication.batch.collate",
    "ComposerReplicationTrainer": "composer_replication.training.trainer",
    "EnvironmentRollouts": "composer_replication.training.rollouts",
    "HintSite": "composer_replication.traces.hints",
    "Message": "composer_replication.traces.trace",
    "PreferencePair": "composer_replication.traces.pairs",
    "Rollout": "composer_replication.batch.batches",
    "StepBatch": "composer_replication.batch.batches",
    "fused_generalized_jsd": "composer_replication.losses.sdpo",
    "generalized_jsd_loss": "composer_replication.losses.sdpo",
}

__all__ = [
    "ComposerConfig",
    "ComposerDataCollator",
    "ComposerReplicationTrainer",
    "EnvironmentRollouts",
    "HintSite",
    "Message",
    "PreferencePair",
    "Rollout",
    "StepBatch",
    "fused_generalized_jsd",
    "generalized_jsd_loss",
]


def __getattr__(name: str) -> object:
    """Load a public name from its home module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'composer_replication' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
