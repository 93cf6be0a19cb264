"""The three losses from a model's plain forward: full logits, one unpadded row at a time.

Nothing of `composer_replication.step` or `.losses` is used here; only rendering is shared.
"""

import torch
from torch.nn.functional import logsigmoid


def full_logits(model, ids):
    """Logits of one row `[T, V]` from the model's own head, in the model's precision or fp32."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits if logits.dtype == torch.float64 else logits.float()


def action_logits(model, row):
    """The logits that predict each action token of an `ActionRow`."""
    first, last = len(row.context_ids) - 1, len(row.token_ids) - 1
    return full_logits(model, row.token_ids)[first:last]


def grpo_sum(model, rollouts, temperature=1.0, epsilon=0.2):
    """dr_grpo's sum: minus the clipped ratio times the advantage over the sampled tokens."""
    total = 0.0
    for rollout in rollouts:
        ids = [*rollout.prompt_ids, *rollout.completion_ids]
        logp = (full_logits(model, ids) / temperature).log_softmax(-1)
        for i, token in enumerate(rollout.completion_ids):
            if rollout.action_mask[i]:
                token_logp = logp[len(rollout.prompt_ids) + i - 1, token]
                old = token_logp.detach() if rollout.old_logp is None else rollout.old_logp[i]
                ratio = (token_logp - old).exp()
                clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
                total = total - torch.min(ratio * rollout.advantage, clipped * rollout.advantage)
    return total


def jsd(p_logits, q_logits, beta=0.5):
    """Sum over rows of beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q."""
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    if beta == 0:
        return (q * (q.log() - p.log())).sum()
    if beta == 1:
        return (p * (p.log() - q.log())).sum()
    m = (1 - beta) * p + beta * q
    return beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()


def sdpo_sum(model, sites, collator, teacher=None, beta=0.5):
    """The divergence of every action token; `teacher` is a model, None: the policy itself."""
    total = 0.0
    for site in sites:
        student_row, teacher_row, _ = collator.site_rows(site)
        with torch.no_grad():
            q_logits = action_logits(teacher or model, teacher_row)
        total = total + jsd(action_logits(model, student_row), q_logits, beta)
    return total


def action_logp(model, row):
    """Log-prob of the row's action at temperature 1."""
    logp = action_logits(model, row).log_softmax(-1)
    return logp.gather(-1, torch.tensor(row.action_ids)[:, None]).sum()


def dpo_sum(model, pairs, collator, beta=0.1):
    """Weighted -log sigmoid of the margin over the reference sums that the pairs carry."""
    total = 0.0
    for pair in pairs:
        chosen, rejected, _ = collator.pair_rows(pair)
        margin = (action_logp(model, chosen) - pair.ref_chosen_logp) - (
            action_logp(model, rejected) - pair.ref_rejected_logp
        )
        total = total - pair.weight * logsigmoid(beta * margin)
    return total


def sums(model, batch, collator, *, temperature=1.0, teacher=None):
    """All three sums of a step batch."""
    return {
        "grpo": grpo_sum(model, batch.rollouts, temperature),
        "sdpo": sdpo_sum(model, batch.hint_sites, collator, teacher),
        "dpo": dpo_sum(model, batch.pairs, collator),
    }
