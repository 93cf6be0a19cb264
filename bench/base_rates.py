"""How an untrained model does on a shipped task: reward spread, success, errors, token counts.

Samples groups of rollouts over all turns and prints what decides whether GRPO can start: the share
of groups whose rewards differ. Each turn is rendered from text; observations are user turns.

    python bench/base_rates.py smollm2-135m --groups 32
    python bench/base_rates.py smollm2-135m --task call_format --set num_matching_demos=0
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from composer_replication.environments.protocol import Observation, TextEnvironment
from composer_replication.environments.registry import environment_class
from composer_replication.experiments.doctor import cpu_bf16_line
from composer_replication.experiments.task_registry import TASKS, find_task, task_rows
from composer_replication.training.model_source import load_model


@dataclass
class Episode:
    """One rollout in progress."""

    environment: TextEnvironment
    messages: list[dict[str, str]]
    is_done: bool = False
    error_kinds: list[str] = field(default_factory=list)
    action_tokens: list[int] = field(default_factory=list)
    observation_tokens: list[int] = field(default_factory=list)

    def take(self, action: str, observation: Observation) -> None:
        """Record one turn and what the environment answered."""
        self.messages.append({"role": "assistant", "content": action})
        self.messages.append({"role": "user", "content": observation.content})
        self.is_done = observation.is_done
        if observation.error:
            self.error_kinds.append(observation.error.kind)


def started_episodes(args: argparse.Namespace) -> list[Episode]:
    """Group by group, `args.group_size` fresh episodes of one prompt."""
    knobs = {key: json.loads(value) for key, _, value in (t.partition("=") for t in args.knobs)}
    find_task(args.task).check_knobs(knobs)
    rows = task_rows(args.task, args.split, seed=args.seed, num_episodes=args.groups, **knobs)
    episodes: list[Episode] = []
    for row in rows.prompts:
        for _ in range(args.group_size):
            environment = environment_class(args.task)()
            environment.reset(**row)
            episodes.append(Episode(environment, list(row["prompt"])))
    return episodes


@torch.no_grad()
def sample_actions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    episodes: Sequence[Episode],
    args: argparse.Namespace,
) -> tuple[list[int], list[list[int]]]:
    """Prompt lengths, and the token ids of one sampled action per episode, end token included."""
    prompts = [
        tokenizer.apply_chat_template(
            episode.messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for episode in episodes
    ]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    sampled = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=args.temperature > 0,
        temperature=args.temperature or None,
        top_k=0,
        top_p=1.0,
        max_new_tokens=args.max_action_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = sampled[:, batch["input_ids"].shape[1] :].tolist()
    return [len(prompt) for prompt in prompts], [_cut(row, tokenizer.eos_token_id) for row in rows]


def _cut(row: list[int], eos_token_id: int) -> list[int]:
    return row[: row.index(eos_token_id) + 1] if eos_token_id in row else row


def run_episodes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    episodes: Sequence[Episode],
    args: argparse.Namespace,
) -> list[int]:
    """Play every episode to its end; returns the token counts of the first prompts."""
    first_lengths: list[int] = []
    while active := [episode for episode in episodes if not episode.is_done]:
        for start in range(0, len(active), args.batch_size):
            chunk = active[start : start + args.batch_size]
            lengths, actions = sample_actions(model, tokenizer, chunk, args)
            is_first_turn = not chunk[0].action_tokens
            first_lengths += lengths if is_first_turn else []
            for episode, ids in zip(chunk, actions, strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                observation = episode.environment._step_text(text)
                episode.take(text, observation)
                episode.action_tokens.append(len(ids))
                episode.observation_tokens.append(len(tokenizer(observation.content)["input_ids"]))
    return first_lengths


def summary_of(
    episodes: Sequence[Episode], first_lengths: Sequence[int], args: argparse.Namespace
) -> dict[str, object]:
    """The numbers that are printed."""
    rewards = [episode.environment.get_reward() for episode in episodes]
    size = args.group_size
    groups = [rewards[start : start + size] for start in range(0, len(rewards), size)]
    turns = {
        "prompt_tokens": list(first_lengths),
        "action_tokens": [count for episode in episodes for count in episode.action_tokens],
        "observation_tokens": [n for episode in episodes for n in episode.observation_tokens],
    }
    return {
        "task": args.task,
        "split": args.split,
        "knobs": args.knobs,
        "seed": args.seed,
        "groups": len(groups),
        "group_size": size,
        "temperature": args.temperature,
        "share_of_groups_with_spread": sum(len(set(group)) > 1 for group in groups) / len(groups),
        "mean_group_std": statistics.fmean(statistics.pstdev(group) for group in groups),
        "mean_reward": statistics.fmean(rewards),
        "exact_success": sum(reward == 1.0 for reward in rewards) / len(rewards),
        "completed": sum(reward >= 0.4 for reward in rewards) / len(rewards),
        "rewards": dict(sorted(Counter(map(str, rewards)).items())),
        "errors": dict(Counter(kind for e in episodes for kind in e.error_kinds).most_common()),
        **{
            name: {"mean": round(statistics.fmean(counts), 1), "max": max(counts)}
            for name, counts in turns.items()
        },
    }


def parsed_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model spec or folder, as in the configuration")
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--split", default="train", choices=("train", "heldout"))
    parser.add_argument("--task", default="api_drift", choices=sorted(TASKS))
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=JSON", dest="knobs")
    parser.add_argument("--max-action-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="print this many episodes to stderr")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parsed_arguments()
    torch.manual_seed(args.seed)
    source = load_model(args.model)
    # bf16 for sampling only: several times faster than fp32 on a CPU with AMX, slower without.
    has_bf16 = torch.cuda.is_available() or cpu_bf16_line(Path("/proc/cpuinfo")).is_ok is True
    dtype = torch.bfloat16 if has_bf16 else torch.float32
    model = source.model.to(dtype).eval()
    start_s = time.perf_counter()
    episodes = started_episodes(args)
    first_lengths = run_episodes(model, source.tokenizer, episodes, args)
    summary = summary_of(episodes, first_lengths, args)
    summary["sampling_s"] = round(time.perf_counter() - start_s, 1)
    for episode in episodes[:: args.group_size][: args.show]:
        print(json.dumps(episode.messages[-6:]), episode.environment.get_reward(), file=sys.stderr)
    if args.json:
        print(json.dumps(summary))
        return
    for name, value in summary.items():
        print(f"{name:30} {value}")


if __name__ == "__main__":
    main()
