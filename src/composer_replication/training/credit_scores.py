"""Per-token log-probs and slopes of hint sites and pairs, scored once more for credit files.

Nothing here has a gradient to the policy, and dropout is off. Letters: M action tokens over all
hint sites or pairs, n of them in a tile, P pairs, V vocabulary.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from composer_replication.batch.collate import StepTensors
from composer_replication.losses.acceptance import prefix_acceptance
from composer_replication.losses.head import selected_logp, tiles
from composer_replication.losses.sdpo import generalized_jsd
from composer_replication.step.channels import CHANNELS
from composer_replication.step.hidden_states import (
    final_hidden_states,
    in_eval_mode,
    output_head,
    rows_before,
)
from composer_replication.step.scores import Scores
from composer_replication.step.separate import live_teacher
from composer_replication.step.settings import SDPOSettings, StepSettings, TeacherContext

_TILE_ROWS = 16
"""Tokens whose fp64 logits exist at once, of policy and teacher: 19 MiB each at 151,936 entries."""


class SiteTokens(NamedTuple):
    """Every action token of the hint sites, in the order of `sdpo_student_index`; fp64."""

    token_ids: Int[Tensor, " M"]
    policy_logp: Float[Tensor, " M"]
    teacher_logp: Float[Tensor, " M"]
    divergence: Float[Tensor, " M"]
    slope: Float[Tensor, " M"]
    """Divergence by the taken token's log-prob while only its own logit moves."""


class ActionTokens(NamedTuple):
    """Every action token of one side of the pairs."""

    places: Int[Tensor, "M 2"]
    """(row, position)."""
    policy_logp: Float[Tensor, " M"]
    """Nats, at temperature 1."""
    slope: Float[Tensor, " M"]
    """The channel's sum by the token's log-prob."""


@torch.no_grad()
def score_site_tokens(
    policy: nn.Module,
    tensors: StepTensors,
    settings: SDPOSettings,
    teacher: TeacherContext | None,
) -> SiteTokens:
    """Divergences, and the taken tokens' log-probs at the divergence's temperature, in nats.

    Args:
        policy: in any mode; it is scored in eval mode.
        tensors: the collator's.
        settings: of the divergence.
        teacher: opens the teacher's weights; None: the live policy.
    """
    with (teacher or live_teacher(policy))() as teacher_model:
        hidden = final_hidden_states(
            teacher_model, tensors["ctx_teacher_input_ids"], tensors["ctx_teacher_attention_mask"]
        )
        teacher_rows = rows_before(hidden, tensors["sdpo_teacher_index"])
        teacher_head = output_head(teacher_model)
    index = tensors["sdpo_student_index"]
    with in_eval_mode(policy):
        hidden = final_hidden_states(policy, tensors["input_ids"], tensors["attention_mask"])
    policy_rows, policy_head = rows_before(hidden, index), output_head(policy)
    token_ids = tensors["input_ids"][index[:, 0], index[:, 1]]
    parts = [
        _site_tile(
            policy_head.logits(policy_rows[rows]).double(),
            teacher_head.logits(teacher_rows[rows]).double(),
            token_ids[rows],
            settings,
        )
        for rows in tiles(len(token_ids), _TILE_ROWS)
    ]
    tokens = SiteTokens(*(torch.cat(column) for column in zip(*parts, strict=True)))
    if settings.prefix_weight == "off":
        return tokens
    weight = prefix_acceptance(tokens.policy_logp, tokens.teacher_logp, index[:, 0])
    return tokens._replace(divergence=tokens.divergence * weight, slope=tokens.slope * weight)


def _site_tile(
    policy_logits: Float[Tensor, "n V"],
    teacher_logits: Float[Tensor, "n V"],
    token_ids: Int[Tensor, " n"],
    settings: SDPOSettings,
) -> SiteTokens:
    """In fp64, since a token of probability near 1 divides two small differences."""
    taken = token_ids[:, None]
    with torch.enable_grad():
        divergence = generalized_jsd(
            policy_logits.requires_grad_(),
            teacher_logits,
            beta=settings.beta,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_k_from=settings.top_k_from,
            tail=settings.tail,
            clip=settings.clip,
            clip_value=settings.clip_value,
            entropy_scale=settings.entropy_scale,
        )
        (logit_slope,) = torch.autograd.grad(divergence.sum(), policy_logits)
    logps = [
        (logits.detach() / settings.temperature).log_softmax(-1).gather(-1, taken).squeeze(-1)
        for logits in (policy_logits, teacher_logits)
    ]
    # d(log p)/d(its own logit) = (1 - p) / temperature.
    own_slope = -torch.expm1(logps[0]) / settings.temperature
    slope = logit_slope.gather(-1, taken).squeeze(-1) / own_slope
    return SiteTokens(token_ids, logps[0], logps[1], divergence.detach(), slope)


def score_pair_tokens(
    policy: nn.Module, tensors: StepTensors, settings: StepSettings
) -> tuple[ActionTokens, ActionTokens, Float[Tensor, " P"]]:
    """Tokens of the chosen and of the rejected actions, and each pair's margin in nats.

    The slopes are those of DPO's own sum over the pairs: one number for all tokens of an action,
    since the loss reads only their sum.

    Args:
        policy: in any mode; it is scored in eval mode.
        tensors: the collator's, with the reference sums.
        settings: of the step.
    """
    sides = [_score_actions(policy, tensors, f"dpo_{side}") for side in ("chosen", "rejected")]
    num_pairs = len(tensors["dpo_pair_weights"])
    with torch.enable_grad():
        leaves = [logp.requires_grad_() for _, logp in sides]
        chosen, rejected = (
            leaf.new_zeros(num_pairs).index_add(0, index[:, 0], leaf)
            for (index, _), leaf in zip(sides, leaves, strict=True)
        )
        scores = Scores(chosen_logp=chosen, rejected_logp=rejected)
        loss = CHANNELS["dpo"].sum_loss(scores, tensors, settings).loss_sum
        slopes = torch.autograd.grad(loss, leaves)
    chosen_gain = chosen.detach() - tensors["dpo_chosen_ref_logprobs"]
    rejected_gain = rejected.detach() - tensors["dpo_rejected_ref_logprobs"]
    chosen_tokens, rejected_tokens = (
        ActionTokens(index, leaf.detach(), slope)
        for (index, _), leaf, slope in zip(sides, leaves, slopes, strict=True)
    )
    return chosen_tokens, rejected_tokens, settings.dpo.beta * (chosen_gain - rejected_gain)


@torch.no_grad()
def _score_actions(
    policy: nn.Module, tensors: StepTensors, side: str
) -> tuple[Int[Tensor, "M 2"], Float[Tensor, " M"]]:
    ids = tensors[f"{side}_input_ids"]
    index = tensors[f"{side}_response_mask"].nonzero()
    with in_eval_mode(policy):
        hidden = final_hidden_states(policy, ids, tensors[f"{side}_attention_mask"])
    head = output_head(policy)
    return index, selected_logp(rows_before(hidden, index), head, ids[index[:, 0], index[:, 1]])
