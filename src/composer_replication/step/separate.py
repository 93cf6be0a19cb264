"""The reference executor: one forward for each role, nothing shared.

Letters: B rollouts, C completion tokens, T tokens of a row, M action tokens, P pairs, H hidden.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from composer_replication.batch.collate import StepTensors
from composer_replication.losses.acceptance import prefix_acceptance
from composer_replication.losses.head import OutputHead, selected_logp
from composer_replication.losses.sdpo import fused_generalized_jsd
from composer_replication.step.hidden_states import (
    final_hidden_states,
    in_eval_mode,
    output_head,
    rows_before,
)
from composer_replication.step.scores import Scores
from composer_replication.step.settings import SDPOSettings, StepSettings, TeacherContext


def score_separately(
    model: nn.Module,
    tensors: StepTensors,
    needs: frozenset[str],
    settings: StepSettings,
    teacher: TeacherContext | None = None,
    *,
    tile_rows: int | None = None,
) -> Scores:
    """Score every role with a forward of its own.

    Args:
        model: the policy, wrapped or not.
        tensors: what `ComposerDataCollator` returned, on the model's device.
        needs: any of `rollouts`, `hint_sites`, `pairs`; a part without data is left None.
        settings: temperatures and the divergence.
        teacher: opens the teacher's weights; None: the live policy, without gradient.
        tile_rows: rows that meet the output head at once; None: by device.
    """
    scores = Scores()
    if "rollouts" in needs and "completion_ids" in tensors:
        scores.policy_logp, scores.entropy = _score_rollouts(
            model, tensors, settings.grpo.temperature, tile_rows
        )
    if "hint_sites" in needs and "sdpo_student_index" in tensors:
        scores.divergence = score_hint_sites(
            model, tensors, settings.sdpo, teacher, tile_rows=tile_rows
        )
    if "pairs" in needs and "dpo_chosen_input_ids" in tensors:
        scores.chosen_logp = score_actions(model, tensors, "dpo_chosen", tile_rows=tile_rows)
        scores.rejected_logp = score_actions(model, tensors, "dpo_rejected", tile_rows=tile_rows)
    return scores


def score_hint_sites(
    model: nn.Module,
    tensors: StepTensors,
    settings: SDPOSettings,
    teacher: TeacherContext | None,
    *,
    tile_rows: int | None = None,
) -> Float[Tensor, " M"]:
    """Divergence of each action token from its hinted teacher, times the token's prefix weight."""
    with torch.no_grad(), (teacher or live_teacher(model))() as teacher_model:
        teacher_hidden = final_hidden_states(
            teacher_model, tensors["ctx_teacher_input_ids"], tensors["ctx_teacher_attention_mask"]
        )
        teacher_head = output_head(teacher_model)
    policy_hidden = final_hidden_states(model, tensors["input_ids"], tensors["attention_mask"])
    policy_rows = rows_before(policy_hidden, tensors["sdpo_student_index"])
    policy_head = output_head(model)
    teacher_rows = rows_before(teacher_hidden, tensors["sdpo_teacher_index"]).detach()
    divergence = fused_generalized_jsd(
        policy_rows,
        policy_head,
        teacher_rows,
        teacher_head,
        beta=settings.beta,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_k_from=settings.top_k_from,
        tail=settings.tail,
        clip=settings.clip,
        clip_value=settings.clip_value,
        entropy_scale=settings.entropy_scale,
        tile_rows=tile_rows,
    )
    if settings.prefix_weight == "off":
        return divergence
    index = tensors["sdpo_student_index"]
    return divergence * acceptance_weights(
        (policy_rows, policy_head),
        (teacher_rows, teacher_head),
        tensors["input_ids"][index[:, 0], index[:, 1]],
        index[:, 0],
        settings.temperature,
        tile_rows=tile_rows,
    )


@torch.no_grad()
def acceptance_weights(
    policy: tuple[Float[Tensor, "M H"], OutputHead],
    teacher: tuple[Float[Tensor, "M G"], OutputHead],
    token_ids: Int[Tensor, " M"],
    site: Int[Tensor, " M"],
    temperature: float,
    *,
    tile_rows: int | None = None,
) -> Float[Tensor, " M"]:
    """What each action token counts under `prefix_weight = "acceptance"`.

    Args:
        policy: the hidden rows that predict the tokens, and their head.
        teacher: the same of the teacher.
        token_ids: the sampled tokens.
        site: the action that each belongs to, ascending.
        temperature: of the divergence, and so of both probabilities.
        tile_rows: as of `score_separately`.
    """
    policy_logp, teacher_logp = (
        selected_logp(
            hidden.detach(), head, token_ids, temperature=temperature, tile_rows=tile_rows
        )
        for hidden, head in (policy, teacher)
    )
    return prefix_acceptance(policy_logp, teacher_logp, site)


def score_actions(
    model: nn.Module, tensors: StepTensors, side: str, *, tile_rows: int | None = None
) -> Float[Tensor, " P"]:
    """Log-prob of each row's action, summed over its tokens, in nats at temperature 1.

    Args:
        model: the policy, or the frozen reference under `no_grad`.
        tensors: of the collator.
        side: `dpo_chosen` or `dpo_rejected`.
        tile_rows: as of `score_separately`.
    """
    ids, mask = tensors[f"{side}_input_ids"], tensors[f"{side}_response_mask"]
    attention = tensors[f"{side}_attention_mask"]
    logp_PT, _ = _logp_at(model, ids, attention, mask, temperature=1.0, tile_rows=tile_rows)
    return logp_PT.sum(-1)


def live_teacher(policy: nn.Module) -> TeacherContext:
    """The policy's own current weights as the teacher."""
    return lambda: in_eval_mode(policy)


def _score_rollouts(
    model: nn.Module, tensors: StepTensors, temperature: float, tile_rows: int | None
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    prompt_ids, completion_ids = tensors["prompt_ids"], tensors["completion_ids"]
    action_mask = (tensors["completion_mask"] * tensors["tool_mask"]).bool()
    mask = torch.cat([torch.zeros_like(prompt_ids).bool(), action_mask], dim=1)
    logp, entropy = _logp_at(
        model,
        torch.cat([prompt_ids, completion_ids], dim=1),
        torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], dim=1),
        mask,
        temperature=temperature,
        tile_rows=tile_rows,
    )
    start = prompt_ids.shape[1]
    return logp[:, start:], entropy[:, start:]


def _logp_at(
    model: nn.Module,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Int[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    temperature: float,
    tile_rows: int | None,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Log-prob and entropy at `loss_mask`, 0 elsewhere; only those rows meet the head."""
    hidden = final_hidden_states(model, input_ids, attention_mask)
    index = loss_mask.nonzero()
    logp, entropy = selected_logp(
        rows_before(hidden, index),
        output_head(model),
        input_ids[loss_mask],
        temperature=temperature,
        return_entropy=True,
        tile_rows=tile_rows,
    )
    empty = logp.new_zeros(input_ids.shape)
    at = (index[:, 0], index[:, 1])
    return empty.index_put(at, logp), empty.index_put(at, entropy)
