"""Time of sampling rollouts of several turns: transformers alone, by group, and from turn to turn.

    python bench/rollout_turns.py --turns 4 --json
    python bench/rollout_turns.py --turns 1 --prompts 8 --rollouts 1 --system 384 --prompt 128

- `generate`: each turn computes every row's whole context again, as TRL's own loop does.
- `groups`: each turn computes each distinct context once.
- `ours`: and of that only what the turn before has not computed (`shared_prefill` around all).
- `copied`: ours, but for transformers' own cache, which copies all of itself for each token.

Checks first that all sample the same tokens (exit 1 if not). Prompts, and what the environment
answers, are random ids; every action has the same number of tokens. The median over repeats that
take turns in one process.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast
from unittest import mock

import torch
from step_measure import PROCESS_ENV, Seconds, machine_name, timed
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

import composer_replication.training.shared_prefill as shared_prefill_module
from composer_replication.training.model_source import load_model
from composer_replication.training.shared_prefill import shared_prefill

Contexts = list[list[int]]
NAMES = ("generate", "groups", "copied", "ours")
SIZES = ("prompts", "rollouts", "system", "prompt", "action", "answer", "turns", "repeats")


def parse_args() -> argparse.Namespace:
    """Flags of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rollouts", type=int, default=4, help="of each prompt")
    parser.add_argument("--system", type=int, default=0, help="tokens that all prompts begin with")
    parser.add_argument("--prompt", type=int, default=128, help="further tokens of each prompt")
    parser.add_argument("--action", type=int, default=16, help="tokens")
    parser.add_argument("--answer", type=int, default=32, help="tokens of the environment")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def make_texts(args: argparse.Namespace, num_ids: int) -> tuple[Contexts, list[Contexts]]:
    """The prompt of each rollout, and for each turn the answer to each."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, tokens: int) -> Contexts:
        return torch.randint(5, num_ids, (rows, tokens), generator=generator).tolist()

    system = draw(1, args.system)[0] if args.system else []
    own = draw(args.prompts, args.prompt)
    prompts = [[*system, *ids] for ids in own for _ in range(args.rollouts)]
    return prompts, [draw(len(prompts), args.answer) for _ in range(args.turns)]


def play(
    model: PreTrainedModel,
    args: argparse.Namespace,
    around_turn: Callable[[], AbstractContextManager[None]],
) -> Contexts:
    """All turns of all rollouts; returns what each holds at the end."""
    contexts, answers = make_texts(args, model.config.vocab_size)
    settings = GenerationConfig(
        max_new_tokens=args.action,
        min_new_tokens=args.action,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    for turn in answers:
        ids = torch.tensor(contexts, device=model.device)
        with around_turn(), torch.no_grad():
            rows = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
            ).tolist()
        contexts = [row + answer for row, answer in zip(rows, turn, strict=True)]
    return contexts


def variants(model: PreTrainedModel, args: argparse.Namespace) -> dict[str, Callable[[], Contexts]]:
    """What is timed."""
    module = cast(nn.Module, model)

    def ours() -> Contexts:
        with shared_prefill(module):
            return play(model, args, contextlib.nullcontext)

    def copied() -> Contexts:
        with mock.patch.object(shared_prefill_module, "let_grow", lambda cache: cache):
            return ours()

    return {
        "generate": lambda: play(model, args, contextlib.nullcontext),
        "groups": lambda: play(model, args, lambda: shared_prefill(module)),
        "copied": copied,
        "ours": ours,
    }


def main() -> int:
    """Exit 1 where the sampled tokens differ."""
    args = parse_args()
    model = load_model(args.model).model.eval()
    runs = variants(model, args)
    # Also the untimed round.
    expected = runs["generate"]()
    for name, run in runs.items():
        if run() != expected:
            print(f"{name} samples other tokens than generate", file=sys.stderr)
            return 1
    seconds: dict[str, list[Seconds]] = {name: [] for name in NAMES}
    for _ in range(args.repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run, model.device))
    wall = {name: statistics.median(s.wall for s in found) for name, found in seconds.items()}
    processor = {
        name: statistics.median(s.processor for s in found) for name, found in seconds.items()
    }
    sizes = {name: getattr(args, name) for name in SIZES}
    report = {
        "command": " ".join(["python", "bench/rollout_turns.py", *sys.argv[1:]]),
        "machine": machine_name(model.device),
        "model": args.model,
        "sizes": sizes,
        "rollout_s": wall,
        "ratios": {name: wall[name] / wall["ours"] for name in NAMES[:-1]},
        "processor_ratios": {name: processor[name] / processor["ours"] for name in NAMES[:-1]},
    }
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return 0


def as_text(report: dict[str, Any]) -> str:
    """The same for a reader."""
    lines = [f"{report['machine']}, {report['model']}, {report['sizes']}"]
    lines += [f"{name:10} {seconds:8.2f} s" for name, seconds in report["rollout_s"].items()]
    lines += [f"{name:10} {ratio:8.2f} of ours" for name, ratio in report["ratios"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in PROCESS_ENV.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **PROCESS_ENV})
    sys.exit(main())
