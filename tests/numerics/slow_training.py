"""Whole SGD runs written out plainly: GRPO + SDPO + DPO in float64, one row at a time.

What a run of `ComposerReplicationTrainer` must equal, whatever its accumulation, processes or
checkpointing. The rollouts are taken from the trainer's own log of what it generated.
"""

import copy
import dataclasses

import slow_oracle
import tiny_families
import torch

from composer_replication import ComposerDataCollator
from composer_replication.batch.batches import Rollout


@dataclasses.dataclass
class Settings:
    """Of the run; the defaults are those of `tiny_trainer.build_trainer`."""

    learning_rate: float = 0.5
    num_generations: int = 2
    max_completion: int = 12
    ema_rate: float = 0.05
    weights: dict = dataclasses.field(
        default_factory=lambda: {"grpo": 1.0, "sdpo": 0.75, "dpo": 0.25}
    )
    schedule: tuple = (("sdpo", "dpo"),)
    """The extra channels of each optimizer step, repeated from the start."""
    num_steps: int = 2


def train(start, generations, pairs, settings, teacher_kind="ema", base=None):
    """Losses of every step, and the weights at the end.

    Args:
        start: the policy before the first step; not changed.
        generations: for each step the rows that `tiny_trainer.FixedRollouts` gave, all ranks'.
        pairs: without reference sums.
        settings: of the run.
        teacher_kind: ema, frozen or live.
        base: DPO's reference and the frozen teacher, where it is not the start (LoRA).
    """
    policy = copy.deepcopy(start).double().train()
    reference = copy.deepcopy(base or start).double()
    teacher = None if teacher_kind == "live" else copy.deepcopy(reference)
    collator = ComposerDataCollator(tiny_families.chat_tokenizer())
    pairs = [with_reference(pair, reference, collator) for pair in pairs]
    rows = []
    for step in range(settings.num_steps):
        live = settings.schedule[step % len(settings.schedule)]
        generation = generations[step]
        losses = {"grpo": grpo_loss(policy, generation, settings)}
        sites = [site for row in generation for site in row["rollout_hint_sites"]]
        if "sdpo" in live:
            num_tokens = sum(len(site.action_ids) for site in sites)
            divergence = slow_oracle.sdpo_sum(policy, sites, collator, teacher or policy)
            losses["sdpo"] = divergence / max(num_tokens, 1)
        if "dpo" in live:
            losses["dpo"] = slow_oracle.dpo_sum(policy, pairs, collator) / len(pairs)
        total = sum(settings.weights[name] * loss for name, loss in losses.items())
        descend(policy, total, settings.learning_rate)
        rows.append({name: float(loss) for name, loss in losses.items()})
        if teacher_kind == "ema":
            follow(teacher, policy, settings.ema_rate)
    return rows, {name: p.detach() for name, p in policy.named_parameters()}


@torch.no_grad()
def with_reference(pair, reference, collator):
    """The pair with the reference's sums of both actions."""
    chosen, rejected, _ = collator.pair_rows(pair)
    return dataclasses.replace(
        pair,
        ref_chosen_logp=float(slow_oracle.action_logp(reference, chosen)),
        ref_rejected_logp=float(slow_oracle.action_logp(reference, rejected)),
    )


def grpo_loss(policy, generation, settings):
    """dr_grpo with unscaled group advantages, over rollouts times the longest completion."""
    rollouts = []
    for index, row in enumerate(generation):
        first = index - index % settings.num_generations
        group = [r["fixed_reward"] for r in generation[first : first + settings.num_generations]]
        rollouts.append(
            Rollout(
                tuple(row["prompt_ids"]),
                tuple(row["completion_ids"]),
                tuple(map(bool, row["env_mask"])),
                advantage=row["fixed_reward"] - sum(group) / len(group),
            )
        )
    return slow_oracle.grpo_sum(policy, rollouts) / (len(rollouts) * settings.max_completion)


def descend(policy, loss, learning_rate):
    """One plain SGD step."""
    policy.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter -= learning_rate * parameter.grad


@torch.no_grad()
def follow(teacher, policy, rate):
    """The exponential moving average, after the policy's step."""
    for mine, theirs in zip(teacher.parameters(), policy.parameters(), strict=True):
        mine += rate * (theirs - mine)
