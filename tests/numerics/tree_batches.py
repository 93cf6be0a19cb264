"""A step batch whose sequences share prefixes at several depths, and how packed runs compare."""

import dataclasses

import tiny_families
import torch

from composer_replication import ComposerDataCollator, StepBatch
from composer_replication.batch.batches import Rollout
from composer_replication.batch.render import render_state
from composer_replication.step import step
from composer_replication.step.separate import score_separately
from composer_replication.step.settings import GRPOSettings, StepSettings

SETTINGS = StepSettings(grpo=GRPOSettings(max_completion_length=16, temperature=0.8))
WEIGHTS = {"grpo": 1.0, "sdpo": 0.7, "dpo": 0.3}


def collator():
    return ComposerDataCollator(tiny_families.chat_tokenizer())


def shared_batch(seed=0, *, sites=tiny_families.SITES, pairs=tiny_families.PAIRS):
    """Two groups of rollouts: at the state of a hint site and a pair, and at that of others.

    Within a group two rollouts are equal, one is a prefix of another, and two part late; one has
    a turn of a tool in its middle.
    """
    tokenizer = tiny_families.chat_tokenizer()
    rng = torch.Generator().manual_seed(seed)

    def tokens(num):
        return tuple(torch.randint(6, 40, (num,), generator=rng).tolist())

    rollouts = []
    for state in (tiny_families.LONG, tiny_families.SHORT):
        prompt = tuple(render_state(tokenizer, state))
        stem = tokens(4)
        for completion in (stem, stem, (*stem, *tokens(3)), (*stem, *tokens(5)), tokens(6)):
            mask = tuple(place != 2 for place in range(len(completion)))
            advantage = float(torch.randn((), generator=rng))
            rollouts.append(Rollout(prompt, completion, mask, advantage=round(advantage, 3)))
    return StepBatch(tiny_families.off_policy(tuple(rollouts)), sites, pairs)


def losses_and_gradients(model, batch, executor=score_separately, **options):
    """Each channel's sum, and the gradient of their weighted total by parameter."""
    sums = step(model, batch, collator(), settings=SETTINGS, executor=executor, **options)
    total = sum(WEIGHTS[name] * part.loss_sum for name, part in sums.items())
    model.zero_grad()
    total.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: part.loss_sum.item() for name, part in sums.items()}, grads


def largest_errors(ours, theirs):
    """Of the losses and of the gradients by parameter, relative to `theirs`."""
    assert ours[1].keys() == theirs[1].keys()
    loss_error = max(abs(ours[0][name] - value) / abs(value) for name, value in theirs[0].items())
    grad_error = max(
        float((ours[1][name] - grad).norm() / grad.norm().clamp(min=1e-9))
        for name, grad in theirs[1].items()
    )
    return loss_error, grad_error


def only(batch, *parts):
    """The batch with these parts alone."""
    empty = {field.name: () for field in dataclasses.fields(batch) if field.name not in parts}
    return dataclasses.replace(batch, **empty)
