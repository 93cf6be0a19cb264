"""Run the cases of docs/performance.md, each in a process of its own, and store what they print.

    python bench/step_sweep.py               # all of this device's; hours on a CPU
    python bench/step_sweep.py one_state_naive disjoint

Every case takes turns with ours in one process, so its ratios hold whatever the machine does beside
it; figures of different cases are not compared with each other.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

BENCH = Path(__file__).resolve().parent

SMALL = "--prefix 256 --action 32 --hint 24 --repeats 1"
"""What a busy CPU measures in minutes."""

CASES = {
    "small_naive": f"{SMALL} --variants naive ours",
    "small_peers": f"{SMALL} --variants good grpo_trl grpo_ours ours",
    "small_ema": f"{SMALL} --teacher ema --variants good grpo_trl grpo_ours ours",
    "small_whole": f"{SMALL} --variants good ours --whole-step",
    "one_state_naive": "--prefix 1024 --repeats 1 --variants naive ours",
    "one_state_good": "--prefix 1024 --repeats 1 --variants good ours --whole-step",
    "one_state_trl": "--prefix 1024 --repeats 1 --variants grpo_trl grpo_ours ours",
    "one_state_ema": "--prefix 1024 --repeats 1 --teacher ema --variants grpo_trl ours",
    "large": "--prefix 2048 --rollouts 8 --memory-gib 12 --variants naive ours --repeats 1",
    "trajectories": "--trajectories --prefix 256 --action 16 --hint 24 --variants naive good ours",
    "disjoint": "--disjoint --prefix 256 --action 32 --pairs 0 --repeats 7 --variants good ours",
    "bf16": "--precision bf16 --prefix 1024 --repeats 5 --variants naive good ours",
}

SMALL_SHAPE = "--model shape:qwen2.5-0.5b --device cuda --precision bf16"
LARGE_SHAPE = "--model shape:qwen2.5-7b --device cuda --precision bf16 --weights bf16 --checkpoint"

GPU_CASES = {
    "cuda_05b": f"{SMALL_SHAPE} --prefix 4096 --rollouts 8 --action 128 --repeats 5",
    "cuda_05b_ema": f"{SMALL_SHAPE} --prefix 4096 --rollouts 8 --action 128 --teacher ema "
    "--repeats 5 --variants good grpo_trl ours",
    "cuda_05b_32k": f"{SMALL_SHAPE} --weights bf16 --checkpoint --prefix 32768 --rollouts 4 "
    "--repeats 2 --variants good grpo_trl grpo_ours ours",
    "cuda_7b": f"{LARGE_SHAPE} --prefix 4096 --rollouts 4 --variants naive good grpo_trl ours",
}
"""For one card of 80 GB; the first two fill it without checkpointing."""


def main() -> int:
    """Exit 1 if a case failed; the others are stored."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags = CASES | GPU_CASES
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(flags))
    own = GPU_CASES if torch.cuda.is_available() else CASES
    names = parser.parse_args().cases or list(own)
    unknown = [name for name in names if name not in flags]
    if unknown:
        parser.error(f"there is no case {unknown[0]!r}; the cases are {', '.join(flags)}")
    failed = 0
    for name in names:
        command = [sys.executable, str(BENCH / "step.py"), "--json", *flags[name].split()]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed += 1
            continue
        path = BENCH / "results" / f"step_{name}.json"
        path.write_text(json.dumps(json.loads(done.stdout), indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
