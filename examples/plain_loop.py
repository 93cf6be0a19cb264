"""The three-channel step in plain PyTorch: no TRL, no trainer, no configuration file.

Letters: G rollouts of one prompt. Every step samples G answers to one prompt, rewards and compares
them, resamples an action at a hint site, takes a preference pair, and calls `step`. Run it with

    python examples/plain_loop.py --steps 3
"""

import argparse
import copy
import json
import time
from contextlib import nullcontext

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from composer_replication import (
    ComposerDataCollator,
    HintSite,
    Message,
    PreferencePair,
    Rollout,
    StepBatch,
)
from composer_replication.batch.render import end_of_turn_ids, render_state
from composer_replication.losses.grpo import group_advantages
from composer_replication.step import step, total_loss
from composer_replication.step.separate import score_actions
from composer_replication.step.settings import GRPOSettings, StepSettings
from composer_replication.training.model_source import load_model

WEIGHTS = {"grpo": 1.0, "sdpo": 0.1, "dpo": 0.05}
NUM_ROLLOUTS = 4
MAX_TOKENS = 24

DEMO = (
    Message("user", "Read notes.md"),
    Message("assistant", '{"tool": "read", "path": "notes.md"}'),
)
FILES = ("app.py", "main.c", "index.html", "setup.cfg", "tests.py", "data.csv")


def state(file: str) -> tuple[Message, ...]:
    """One demonstration in the old convention, then the task."""
    return (*DEMO, Message("user", f"Read {file}"))


def reward(action: str, file: str) -> float:
    """0.25 for a JSON object, 0.25 for the right tool, 0.5 for the key that the tool now wants."""
    try:
        call = json.loads(action)
    except json.JSONDecodeError:
        return 0.0
    if not isinstance(call, dict):
        return 0.0
    return 0.25 + 0.25 * (call.get("tool") == "read") + 0.5 * (call.get("file") == file)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[Message, ...],
    num_samples: int,
) -> list[list[int]]:
    """Token ids of sampled actions, each up to and with its end of turn."""
    context = torch.tensor([render_state(tokenizer, messages)] * num_samples)
    out = model.generate(
        context,
        attention_mask=torch.ones_like(context),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
    )
    ends = end_of_turn_ids(tokenizer)
    actions: list[list[int]] = []
    for row in out[:, context.shape[1] :].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        actions.append(row[:stop])
    return actions


def make_rollouts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: str
) -> tuple[Rollout, ...]:
    """G rollouts of one prompt with their advantages."""
    actions = sample(model, tokenizer, state(file), NUM_ROLLOUTS)
    rewards = torch.tensor(
        [reward(tokenizer.decode(ids, skip_special_tokens=True), file) for ids in actions]
    )
    advantages = group_advantages(rewards, NUM_ROLLOUTS)
    prompt = tuple(render_state(tokenizer, state(file)))
    return tuple(
        Rollout(prompt, tuple(ids), (True,) * len(ids), float(a), float(r))
        for ids, a, r in zip(actions, advantages, rewards, strict=True)
    )


def make_site(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: str) -> HintSite:
    """The policy's own action at a state where a hint is known, so SDPO stays on-policy."""
    (action_ids,) = sample(model, tokenizer, state(file), 1)
    return HintSite(
        state=state(file),
        hint='Hint: the key is "file". Example: {"tool": "read", "file": "x.txt"}',
        action=tokenizer.decode(action_ids, skip_special_tokens=True),
        action_ids=tuple(action_ids),
        is_on_policy=True,
        source=file,
    )


@torch.no_grad()
def make_pairs(model: PreTrainedModel, collator: ComposerDataCollator) -> list[PreferencePair]:
    """New convention over old, with the log-probs of both under the weights before training."""
    pairs: list[PreferencePair] = []
    for file in FILES:
        chosen = f'{{"tool": "read", "file": "{file}"}}'
        rejected = f'{{"tool": "read", "path": "{file}"}}'
        pair = PreferencePair(state(file), chosen, rejected, source=file)
        tensors, _ = collator.collate_pairs([pair])
        sums = [float(score_actions(model, tensors, f"dpo_{s}")) for s in ("chosen", "rejected")]
        pairs.append(PreferencePair(state(file), chosen, rejected, 1.0, *sums, file))
    return pairs


@torch.no_grad()
def follow(teacher: PreTrainedModel, policy: PreTrainedModel, rate: float = 0.05) -> None:
    """Move the EMA teacher a little of the way to the policy."""
    for slow, fast in zip(teacher.parameters(), policy.parameters(), strict=True):
        slow.lerp_(fast, rate)


def main() -> None:
    """Train for a few steps and print what each channel did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-5)
    options = parser.parse_args()

    torch.manual_seed(0)
    loaded = load_model(options.model)
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    teacher = copy.deepcopy(model).requires_grad_(False)
    collator = ComposerDataCollator(tokenizer)
    pairs = make_pairs(model, collator)
    settings = StepSettings(grpo=GRPOSettings(max_completion_length=MAX_TOKENS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)

    for index in range(options.steps):
        started_s = time.perf_counter()
        file = FILES[index % len(FILES)]
        rollouts = make_rollouts(model, tokenizer, file)
        batch = StepBatch(
            rollouts=rollouts,
            hint_sites=(make_site(model, tokenizer, file),),
            pairs=(pairs[index % len(pairs)],),
        )
        sums = step(model, batch, collator, settings=settings, teacher=lambda: nullcontext(teacher))
        total_loss(sums, WEIGHTS).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        follow(teacher, model)
        means = {name: part.loss_sum.item() / max(part.count, 1) for name, part in sums.items()}
        shown = "  ".join(f"{name} {value:+.4f}" for name, value in means.items())
        mean_reward = sum(rollout.reward for rollout in rollouts) / len(rollouts)
        print(
            f"step {index + 1}  reward {mean_reward:.2f}  {shown}  grad {norm:.2f}  "
            f"{time.perf_counter() - started_s:.1f} s"
        )


if __name__ == "__main__":
    main()
