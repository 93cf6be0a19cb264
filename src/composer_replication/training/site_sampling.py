"""Actions at recorded states: the policy's own answer where a hint site was recorded."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from composer_replication.batch.render import render_state
from composer_replication.step.hidden_states import causal_lm
from composer_replication.traces.hints import HintSite
from composer_replication.training.action_sampling import sample_actions
from composer_replication.training.trl_hooks import GRPOTrainer

DEFAULT_ACTION_TOKENS = 64


def sample_site_actions(
    trainer: GRPOTrainer, sites: Sequence[HintSite], seed: int
) -> list[HintSite]:
    """The sites with an action sampled now, so that SDPO stays on-policy.

    An action ends where the model has no further positions. A site whose new action is empty is
    left out: there is no token to score.

    The sampling has a random state of its own: GRPO's rollouts are the same with and without it.
    """
    tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
    most = min(_action_tokens(trainer), int(trainer.max_completion_length or 0))
    # Models without position limits, such as state-space ones, have no such value.
    config = causal_lm(cast(nn.Module, trainer.model)).config.get_text_config()
    max_positions = getattr(config, "max_position_embeddings", None)
    found: list[tuple[HintSite, list[int], int]] = []
    for site in sites:
        state_ids = list(site.state_ids or render_state(tokenizer, site.state))
        room = most if max_positions is None else min(most, max_positions - len(state_ids))
        if room > 0:
            found.append((site, state_ids, room))
    if not found:
        return []
    devices = [trainer.accelerator.device] if trainer.accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + trainer.accelerator.process_index)
        longest = max(room for _, _, room in found)
        actions = sample_actions(trainer, [state_ids for _, state_ids, _ in found], longest)
    sampled = [action.cut(room) for action, (_, _, room) in zip(actions, found, strict=True)]
    return [
        replace(
            site,
            action=cast(str, tokenizer.decode(action.ids, skip_special_tokens=True)),
            state_ids=tuple(state_ids),
            action_ids=tuple(action.ids),
            is_on_policy=True,
        )
        for action, (site, state_ids, _) in zip(sampled, found, strict=True)
        if action.ids
    ]


def _action_tokens(trainer: GRPOTrainer) -> int:
    from_rollouts = getattr(trainer.rollout_func, "max_action_tokens", None)
    return int(from_rollouts) if from_rollouts is not None else DEFAULT_ACTION_TOKENS
