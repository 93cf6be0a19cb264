"""The package's own step under its executors, and the reference that every step must equal."""

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from step_baselines import (
    CHANNELS,
    SIDES,
    WEIGHTS,
    Setting,
    pair_rows,
    rollout_rows,
)
from step_flops import Forward
from step_workload import Ids, Pair, Workload, step_tensors, unique_tokens
from torch import Tensor
from transformers.integrations import sdpa_attention

from composer_replication.batch.batches import Rollout
from composer_replication.step.channels import CHANNELS as CHANNEL_TABLE
from composer_replication.step.optimizer_step import channel_sums
from composer_replication.step.packed import is_riding_cheaper
from composer_replication.step.scores import Executor
from composer_replication.step.separate import score_separately
from composer_replication.training.out_of_memory import is_out_of_memory

DRIFT = 0.2
"""Nats that sampler and reference differ from the policy by, so that ratios clip and pairs pull."""


class OurStep:
    """The package's step under one of its executors."""

    def __init__(
        self, name: str, setting: Setting, executor: Executor, channels: tuple[str, ...] = CHANNELS
    ) -> None:
        self.name = name
        self.channels = channels
        self._setting = setting
        self._executor = executor

    def loss(self, part: Workload) -> Tensor:
        """Channel sums over the counts of the whole step."""
        setting = self._setting
        sums = channel_sums(
            setting.model,
            step_tensors(part, setting.device),
            self.channels,
            setting.step_settings(),
            setting.own_teacher,
            executor=self._executor,
        )
        # `total_loss` without its look at the value, which a tensor without memory does not have.
        shares = [
            WEIGHTS[name] * channel.loss_sum / max(setting.counts[name], 1)
            for name, channel in sums.items()
        ]
        return torch.stack(shares).sum()

    def work(self, part: Workload) -> list[Forward]:
        """Each merged token once; a teacher that shares too little has a tree of its own."""
        policy = rollout_rows(part)
        scored = _sampled_prefixes(part)
        teacher: list[tuple[Ids, Ids]] = []
        if "sdpo" in self.channels:
            students = [(site.context, site.action) for site in part.sites]
            pairs = [row for side in SIDES for row in pair_rows(part, side)]
            policy += students + pairs
            scored |= _action_prefixes(students + pairs)
            teacher = [(site.hinted, site.action) for site in part.sites]
        tokens, attended = _merged(policy)
        work = [Forward(tokens, attended, len(scored))]
        if teacher:
            num_tokens, num_attended = _merged(teacher)
            all_tokens, all_attended = _merged(policy + teacher)
            num_own = all_tokens - tokens
            if self._setting.own_teacher is None and is_riding_cheaper(num_tokens, num_own):
                # Riding in the policy's tree, the teacher adds what it does not share with it.
                num_tokens, num_attended = num_own, all_attended - attended
            num_hinted = len(_action_prefixes(teacher))
            work.append(Forward(num_tokens, num_attended, num_hinted, is_trained=False))
        return work


@dataclass(frozen=True)
class Reference:
    """The step by the `separate` executor, one row at a time."""

    workload: Workload
    """With the log-probs of sampler and reference filled in."""
    loss: dict[str, float]
    """Of each set of channels, joined by `+`."""
    loss_scale: float
    """Sum of the absolute losses of all rows: what a loss error is relative to."""
    grads: dict[str, list[Tensor]]
    """Of each parameter that trains, for each set of channels; on the CPU."""


def reference_step(setting: Setting, workload: Workload, seed: int) -> Reference:
    """Score each row alone, draw sampler and reference around the policy, and backpropagate.

    GRPO's rows come first, so that its gradient alone is known too.
    """
    generator = torch.Generator().manual_seed(seed)
    rollouts: list[Rollout] = []
    pairs: list[Pair] = []
    losses: dict[str, float] = dict.fromkeys(CHANNELS, 0.0)
    loss_scale = 0.0
    grpo_grads: list[Tensor] = []
    for part in _single_rows(workload):
        if not part.rollouts and not grpo_grads:
            grpo_grads = gradients(setting, copy=True)
        tensors = step_tensors(part, setting.device)
        scored = [c for c in CHANNELS if CHANNEL_TABLE[c].count(tensors) > 0]
        needs = frozenset(CHANNEL_TABLE[c].data for c in scored)
        scores = score_separately(
            setting.model, tensors, needs, setting.step_settings(), setting.own_teacher
        )
        if scores.policy_logp is not None:
            drift = torch.randn(scores.policy_logp.shape, generator=generator) * DRIFT
            old_logp = scores.policy_logp.detach() + drift.to(setting.device)
            tensors["old_per_token_logps"] = old_logp
            rollouts.append(replace(part.rollouts[0], old_logp=tuple(old_logp[0].tolist())))
        if scores.chosen_logp is not None and scores.rejected_logp is not None:
            drift = torch.randn(2, generator=generator) * 10 * DRIFT
            chosen = float(scores.chosen_logp.detach()) + float(drift[0])
            rejected = float(scores.rejected_logp.detach()) + float(drift[1])
            tensors["dpo_chosen_ref_logprobs"] = torch.tensor([chosen], device=setting.device)
            tensors["dpo_rejected_ref_logprobs"] = torch.tensor([rejected], device=setting.device)
            pairs.append(replace(part.pairs[0], ref_chosen_logp=chosen, ref_rejected_logp=rejected))
        for name in scored:
            channel = CHANNEL_TABLE[name].sum_loss(scores, tensors, setting.step_settings())
            loss = WEIGHTS[name] * channel.loss_sum / setting.counts[name]
            loss.backward()
            losses[name] += float(loss.detach())
            loss_scale += abs(float(loss.detach()))
    whole = gradients(setting, copy=True)
    setting.model.zero_grad(set_to_none=True)
    return Reference(
        Workload(tuple(rollouts), workload.sites, tuple(pairs)),
        {"grpo": losses["grpo"], "+".join(CHANNELS): sum(losses.values())},
        loss_scale,
        {"grpo": grpo_grads or whole, "+".join(CHANNELS): whole},
    )


def rounding_error(setting: Setting, reference: Reference, channels: str) -> float | None:
    """How far the reference's gradients are from fp32 ones: its forwards were in half precision.

    All gradients of the channels as one vector; weights are those of the reference, and so are the
    log-probs of sampler and reference. Call it outside autocast. None: fp32 does not fit.
    """
    model = setting.model
    held_in = next(model.parameters()).dtype
    model.zero_grad(set_to_none=True)
    step = OurStep("separate", setting, score_separately, tuple(channels.split("+")))
    rollouts = Workload(reference.workload.rollouts, (), ())
    whole = rollouts if channels == "grpo" else reference.workload
    try:
        model.float()
        with _repeated_keys():
            for part in whole.parts(1):
                step.loss(part).backward()
        norms = difference_norms(reference.grads[channels], gradients(setting, copy=False))
        return whole_gradient_error(norms)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        model.zero_grad(set_to_none=True)
        model.to(dtype=held_in)


@contextmanager
def _repeated_keys() -> Iterator[None]:
    """Attention with each key once for each of its queries, of which CUDA has a fused fp32 kernel.

    With grouped heads it keeps the scores instead, which long rows do not fit.
    """
    with mock.patch.object(sdpa_attention, "use_gqa_in_sdpa", return_value=False):
        yield


def gradients(setting: Setting, *, copy: bool) -> list[Tensor]:
    """Of each parameter that trains, in order; an unused one has zeros."""
    grads = [
        torch.zeros_like(p) if p.grad is None else p.grad
        for p in setting.model.parameters()
        if p.requires_grad
    ]
    # Copies do not crowd a device that a large model fills.
    return [grad.to("cpu", copy=True) for grad in grads] if copy else grads


def difference_norms(
    grads: Sequence[Tensor], expected: Sequence[Tensor]
) -> list[tuple[float, float]]:
    """For each parameter the norms of the difference and of what is expected."""
    norms: list[tuple[float, float]] = []
    for grad, want in zip(grads, expected, strict=True):
        want = want.to(grad.device)
        norms.append((float((grad - want).norm()), float(want.norm())))
    return norms


def gradient_errors(norms: Sequence[tuple[float, float]]) -> list[float]:
    """Of each parameter: the norm of the difference over the norm of what is expected."""
    return [off / max(norm, torch.finfo(torch.float32).tiny) for off, norm in norms]


def whole_gradient_error(norms: Sequence[tuple[float, float]]) -> float:
    """The same of all parameters as one vector."""
    off, norm = map(math.hypot, *norms)
    return off / norm


def _single_rows(workload: Workload) -> Iterator[Workload]:
    """Rollouts, then sites, then pairs, each alone."""
    for rollout in workload.rollouts:
        yield Workload((rollout,), (), ())
    for site in workload.sites:
        yield Workload((), (site,), ())
    for pair in workload.pairs:
        yield Workload((), (), (pair,))


def _merged(rows: Sequence[tuple[Ids, Ids]]) -> tuple[int, int]:
    """Tokens of the tree and what they attend to; a row's last token predicts nothing."""
    return unique_tokens([(*context, *action[:-1]) for context, action in rows])


def _action_prefixes(rows: Sequence[tuple[Ids, Ids]]) -> set[bytes]:
    """What precedes each scored token: distinct ones are distinct rows of the head."""
    return {prefix for context, action in rows for prefix in _prefixes(context, action)}


def _sampled_prefixes(part: Workload) -> set[bytes]:
    return {
        prefix
        for rollout in part.rollouts
        for prefix, is_sampled in zip(
            _prefixes(rollout.prompt_ids, rollout.completion_ids), rollout.action_mask, strict=True
        )
        if is_sampled
    }


def _prefixes(context: Ids, action: Ids) -> Iterator[bytes]:
    """What precedes each token of the action, as 16 bytes whatever its length."""
    digest = hashlib.blake2b(array("q", context).tobytes(), digest_size=16)
    for token in action:
        yield digest.digest()
        digest.update(array("q", [token]).tobytes())
