"""Slow float64 references in plain Python, written from the definitions: one number at a time."""

import math

import torch


def softmax(logits, temperature=1.0):
    scaled = [z / temperature for z in logits]
    top = max(scaled)
    weights = [math.exp(z - top) for z in scaled]
    total = math.fsum(weights)
    return [w / total for w in weights]


def plogp_ratio(a, b):
    """a log(a / b), with its limits."""
    if a == 0:
        return 0.0
    return math.inf if b == 0 else a * (math.log(a) - math.log(b))


def row_divergence(
    policy_logits,
    teacher_logits,
    *,
    beta=0.5,
    temperature=1.0,
    top_k=None,
    top_k_from="teacher",
    tail=False,
    clip=None,
    clip_value=None,
    entropy_scale=None,
):
    p, t = softmax(policy_logits, temperature), softmax(teacher_logits, temperature)
    if top_k is not None:
        chooser = t if top_k_from == "teacher" else p
        order = sorted(range(len(p)), key=lambda v: -chooser[v])
        kept, rest = order[:top_k], order[top_k:]
        rest_p, rest_t = math.fsum(p[v] for v in rest), math.fsum(t[v] for v in rest)
        p, t = [p[v] for v in kept], [t[v] for v in kept]
        if tail:
            p, t = [*p, rest_p], [*t, rest_t]
        else:
            p = [x / math.fsum(p) for x in p]
            t = [x / math.fsum(t) for x in t]
    if beta == 0:
        terms = [plogp_ratio(y, x) for x, y in zip(p, t, strict=True)]
    elif beta == 1:
        terms = [plogp_ratio(x, y) for x, y in zip(p, t, strict=True)]
    else:
        m = [(1 - beta) * x + beta * y for x, y in zip(p, t, strict=True)]
        terms = [
            beta * plogp_ratio(y, z) + (1 - beta) * plogp_ratio(x, z)
            for x, y, z in zip(p, t, m, strict=True)
        ]
    if clip == "entry":
        terms = [min(term, clip_value) for term in terms]
    total = math.fsum(terms)
    if entropy_scale is not None:
        entropy = -math.fsum(y * math.log(y) for y in t if y > 0)
        total *= math.exp(-entropy / entropy_scale)
    return min(total, clip_value) if clip == "token" else total


def divergence(policy_logits, teacher_logits, **options):
    """`row_divergence` of every row of [..., V] tensors."""
    policy = policy_logits.detach().double().flatten(0, -2).tolist()
    teacher = teacher_logits.detach().double().flatten(0, -2).tolist()
    values = [row_divergence(x, y, **options) for x, y in zip(policy, teacher, strict=True)]
    return torch.tensor(values, dtype=torch.float64).reshape(policy_logits.shape[:-1])


def logp_and_entropy(logits, targets, temperature=1.0):
    logps, entropies = [], []
    for row, target in zip(logits.detach().double().tolist(), targets.tolist(), strict=True):
        p = softmax(row, temperature)
        logps.append(math.log(p[target]))
        entropies.append(-math.fsum(x * math.log(x) for x in p if x > 0))
    return torch.tensor(logps).double(), torch.tensor(entropies).double()


def dpo_pair(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing):
    """cDPO as a cross-entropy: the label says "chosen wins" with probability 1 - smoothing."""
    wins = 1 / (1 + math.exp(-beta * ((chosen - ref_chosen) - (rejected - ref_rejected))))
    return -((1 - smoothing) * math.log(wins) + smoothing * math.log(1 - wins))


def grpo_token(ratio, advantage, low, high, delta=None):
    """Minus the pessimistic surrogate, by cases: which side of the clip the ratio is on."""
    unclipped = ratio if delta is None else min(ratio, delta)
    if advantage >= 0:
        return -advantage * min(unclipped, max(1 - low, min(ratio, 1 + high)))
    return -advantage * max(unclipped, max(1 - low, min(ratio, 1 + high)))


def grpo_tokens(policy_logp, old_logp, advantages, loss_mask, *, level, low, high, delta=None):
    """Rows of token losses on training tokens only."""
    rows = []
    for b in range(len(policy_logp)):
        tokens = [c for c in range(len(loss_mask[b])) if loss_mask[b][c]]
        gaps = {c: policy_logp[b][c] - old_logp[b][c] for c in tokens}
        if level == "sequence" and tokens:
            gaps = dict.fromkeys(tokens, math.fsum(gaps.values()) / len(tokens))
        rows.append(
            [grpo_token(math.exp(gaps[c]), advantages[b][c], low, high, delta) for c in tokens]
        )
    return rows
