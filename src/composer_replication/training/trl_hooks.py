"""The one door to TRL: what we subclass and call, pinned in `tests/contract/test_trl_hooks.py`.

Overridden: `__init__`, `_prepare_inputs`, `_generate_and_score_completions`, `_compute_loss`,
`_save_checkpoint`, `_load_from_checkpoint`, `_get_output_dir`, `_get_train_sampler`,
`_get_grad_norm`, `_get_per_token_logps_and_entropies`. Called: `_generate_single_turn`. Kept in
checkpoints: `_step`, `_buffered_inputs`. Read: `aux_loss_enabled`.
"""

import os

# Our rollout loop uses `rollout_func` on purpose; its "experimental" notice says nothing to users.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer"]
