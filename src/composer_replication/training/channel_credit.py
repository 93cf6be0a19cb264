"""Rows of a credit file: what each channel of a step does to each token's log-prob.

GRPO's credit comes from autograd through TRL's own loss; for SDPO and DPO `credit_scores.py` scores
the rows once more. Letters: B rollouts, C completion tokens, P pairs, T tokens of a row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from composer_replication.batch.collate import StepTensors
from composer_replication.runs.credit_files import (
    CREDIT_SCHEMA,
    CreditedAction,
    DpoCreditRow,
    GrpoCreditRow,
    SdpoCreditRow,
)
from composer_replication.step.settings import SDPOSettings, StepSettings, TeacherContext
from composer_replication.training.credit_scores import (
    ActionTokens,
    score_pair_tokens,
    score_site_tokens,
)
from composer_replication.training.record_texts import record_texts
from composer_replication.training.trl_hooks import GRPOTrainer


@contextmanager
def recorded_policy_logp(trainer: GRPOTrainer) -> Iterator[list[Tensor]]:
    """Keeps, with their graph, the log-probs that TRL's loss reads: one `[B, C]` tensor a call."""
    score = trainer._get_per_token_logps_and_entropies
    seen: list[Tensor] = []

    def record(*positional: object, **keywords: object) -> object:
        outputs = score(*positional, **keywords)  # pyright: ignore[reportArgumentType]
        seen.append(outputs[0])
        return outputs

    trainer._get_per_token_logps_and_entropies = record
    try:
        yield seen
    finally:
        # The instance's attribute hid the method of the class.
        del trainer._get_per_token_logps_and_entropies


def grpo_rows(
    loss: Float[Tensor, ""],
    policy_logp: Float[Tensor, "B C"],
    tensors: StepTensors,
    tokenizer: PreTrainedTokenizerBase,
    *,
    step: int,
    num_ranks: int,
) -> list[GrpoCreditRow]:
    """One row a rollout of this micro-batch.

    Args:
        loss: TRL's, of this rank and micro-batch; its graph stays.
        policy_logp: the log-probs that the loss was made of.
        tensors: TRL's inputs.
        tokenizer: of the policy.
        step: the optimizer step, from 1.
        num_ranks: processes whose losses are averaged into the total.
    """
    (slope,) = torch.autograd.grad(loss, policy_logp, retain_graph=True)
    credit_BC = -slope / num_ranks
    mask = tensors["completion_mask"].bool()
    sampled = mask & tensors["tool_mask"].bool() if "tool_mask" in tensors else mask
    rows: list[GrpoCreditRow] = []
    for index in range(len(mask)):
        here = mask[index]
        token_ids = cast(list[int], tensors["completion_ids"][index][here].tolist())
        prompt_ids = tensors["prompt_ids"][index][tensors["prompt_mask"][index].bool()]
        rows.append(
            {
                "schema": CREDIT_SCHEMA,
                "step": step,
                "channel": "grpo",
                "context": _text(tokenizer, prompt_ids.tolist()),
                "token_ids": token_ids,
                "tokens": token_texts(tokenizer, token_ids),
                "is_sampled": sampled[index][here].tolist(),
                "policy_logp": policy_logp[index][here].detach().float().tolist(),
                "advantage": float(tensors["advantages"][index].float().mean()),
                "credit": credit_BC[index][here].float().tolist(),
            }
        )
    return rows


def sdpo_rows(
    policy: nn.Module,
    tensors: StepTensors,
    settings: SDPOSettings,
    teacher: TeacherContext | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    step: int,
    loss_weight: float,
) -> list[SdpoCreditRow]:
    """One row a hint site of this micro-batch.

    Args:
        policy: not wrapped by DDP, whose forwards all ranks would have to run together.
        tensors: the collator's, record texts included.
        settings: of the divergence.
        teacher: opens the teacher's weights; None: the live policy.
        tokenizer: of the policy.
        step: the optimizer step, from 1.
        loss_weight: the channel's weight over its tokens in the whole step.
    """
    found = score_site_tokens(policy, tensors, settings, teacher)
    index = tensors["sdpo_student_index"]
    rows: list[SdpoCreditRow] = []
    for number, texts in enumerate(record_texts(tensors)["sites"]):
        here = index[:, 0] == number
        token_ids = cast(list[int], found.token_ids[here].tolist())
        context_ids = tensors["input_ids"][number][: int(index[here][0, 1])]
        rows.append(
            {
                "schema": CREDIT_SCHEMA,
                "step": step,
                "channel": "sdpo",
                "source": texts["source"],
                "hint": texts["hint"],
                "context": _text(tokenizer, context_ids.tolist()),
                "token_ids": token_ids,
                "tokens": token_texts(tokenizer, token_ids),
                "policy_logp": found.policy_logp[here].tolist(),
                "teacher_minus_policy_logp": (found.teacher_logp - found.policy_logp)[
                    here
                ].tolist(),
                "divergence": found.divergence[here].tolist(),
                "loss_weight": loss_weight,
                "credit": (-loss_weight * found.slope)[here].tolist(),
            }
        )
    return rows


def dpo_rows(
    policy: nn.Module,
    tensors: StepTensors,
    settings: StepSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    step: int,
    loss_weight: float,
) -> list[DpoCreditRow]:
    """One row a pair of this micro-batch.

    Args:
        policy: not wrapped by DDP, as above.
        tensors: the collator's, record texts included.
        settings: of the step.
        tokenizer: of the policy.
        step: the optimizer step, from 1.
        loss_weight: the channel's weight over its pairs in the whole step.
    """
    chosen, rejected, margins = score_pair_tokens(policy, tensors, settings)
    actions = [
        _credited_actions(tensors[f"dpo_{side}_input_ids"], found, loss_weight, tokenizer)
        for side, found in (("chosen", chosen), ("rejected", rejected))
    ]
    first = tensors["dpo_chosen_response_mask"].int().argmax(-1)
    return [
        {
            "schema": CREDIT_SCHEMA,
            "step": step,
            "channel": "dpo",
            "source": source,
            "context": _text(
                tokenizer, tensors["dpo_chosen_input_ids"][pair][: int(first[pair])].tolist()
            ),
            "pair_weight": float(tensors["dpo_pair_weights"][pair]),
            "margin": float(margins[pair]),
            "chosen": actions[0][pair],
            "rejected": actions[1][pair],
        }
        for pair, source in enumerate(record_texts(tensors)["pair_sources"])
    ]


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text of each token by itself, special ones included."""
    return [_text(tokenizer, [token_id]) for token_id in token_ids]


def _text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    return cast(str, tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))


def _credited_actions(
    input_ids: Int[Tensor, "P T"],
    found: ActionTokens,
    loss_weight: float,
    tokenizer: PreTrainedTokenizerBase,
) -> list[CreditedAction]:
    actions: list[CreditedAction] = []
    for pair in range(len(input_ids)):
        here = found.places[:, 0] == pair
        token_ids = cast(list[int], input_ids[pair][found.places[here][:, 1]].tolist())
        actions.append(
            {
                "token_ids": token_ids,
                "tokens": token_texts(tokenizer, token_ids),
                "policy_logp": found.policy_logp[here].tolist(),
                "credit": (-loss_weight * found.slope)[here].tolist(),
            }
        )
    return actions
