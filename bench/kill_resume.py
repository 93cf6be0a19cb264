"""Kills training runs at random instants, resumes them, and compares with a run never killed.

A run of a tiny random model with all three channels, an EMA teacher, resampled actions and
checkpoints inside a generation is started again and again with `--resume`; each start is killed
(SIGKILL) after a random delay, until it reaches its end. Every file that holds a result must then
equal that of the uninterrupted run, bit for bit, apart from times, memory and paths.

    python bench/kill_resume.py --kills 50 --write
"""

import argparse
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from composer_replication.runs.step_rows import without_measurements

RESULTS = Path(__file__).parent / "results" / "kill_resume.json"

CONFIG = """
model = "{model}"
seed = 3
[grpo]
num_generations = 4
per_device_train_batch_size = 4
steps_per_generation = 3
max_completion_length = 24
learning_rate = 1e-3
bf16 = false
max_steps = 7
save_steps = 2
[rollout]
environment = "kill_resume:EvenLetters"
max_action_tokens = 8
"""

# A fork of one process that has imported everything: a start takes a second instead of ten.
STARTER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from composer_replication.cli import main
import composer_replication.experiments.train
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 2)
        code = 1
        try:
            code = main(json.loads(line))
        finally:
            os._exit(code)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class EvenLetters:
    """Rewards the share of characters with an even code; every first action is an error turn."""

    def reset(self, **row: object) -> None:  # noqa: ARG002
        """Start an episode."""
        self.reward = 0.0
        self.num_actions = 0

    def _step_text(self, action: str) -> object:
        from composer_replication.environments.protocol import Observation, ToolError

        self.num_actions += 1
        codes = [ord(letter) for letter in action] or [1]
        self.reward = sum(code % 2 == 0 for code in codes) / len(codes)
        error = ToolError("odd", "Odd letters.", "Write evenly.") if self.num_actions == 1 else None
        return Observation("again", is_done=self.num_actions == 2, error=error)

    def get_reward(self) -> float:
        """What the last action earned."""
        return self.reward


class Starter:
    """Starts runs as forks and kills them."""

    def __init__(self, log: Path) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        here = str(Path(__file__).parent)
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, "-c", STARTER, here, str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )

    def run(
        self, arguments: list[str], is_due: Callable[[float], bool] | None
    ) -> tuple[int, float]:
        """Exit code (-9 where it was killed) and seconds of one start.

        Args:
            arguments: of the command line.
            is_due: asked with the seconds since the start whether to kill now; None: never.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        child = int(self._process.stdout.readline())
        started_s = time.perf_counter()
        while is_due is not None and not select.select([self._process.stdout], [], [], 0.001)[0]:
            if is_due(time.perf_counter() - started_s):
                os.kill(child, signal.SIGKILL)
                break
        code = int(self._process.stdout.readline())
        return code, time.perf_counter() - started_s

    def close(self) -> None:
        """End the process that forks."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def make_model(folder: Path) -> None:
    """A tiny Llama with random weights and the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from composer_replication.training.embedded_model import embedded_model_dir

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def results_of(run: Path) -> dict[str, object]:
    """Everything a run produced that must not depend on how often it was killed."""
    import torch
    from safetensors.torch import load_file

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = run / "checkpoints" / "checkpoint-7"
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    tensors = {
        **load_file(run / "model" / "model.safetensors"),
        **{f"teacher.{k}": v for k, v in load_file(last / "teacher.safetensors").items()},
        **{f"adam.{k}.{n}": t for k, s in optimizer["state"].items() for n, t in s.items()},
    }
    summary = json.loads((run / "summary.json").read_text())
    return {
        "metrics": [without_measurements(row) for row in rows],
        "rollouts": {p.name: p.read_text() for p in sorted((run / "rollouts").iterdir())},
        "tensors": {name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
        "positions": json.loads((last / "composer_state.json").read_text()),
        "summary": {k: summary[k] for k in ("status", "checks", "steps", "channels")},
        # How long a step took decides whether the plan missed.
        "notes": [note for note in summary["notes"] if not note.startswith("The plan missed")],
    }


def random_instant(instants: random.Random, run: Path, whole_s: float) -> Callable[[float], bool]:
    """Any instant of a start, or one shortly after a random number of further steps."""
    if instants.random() < 0.25:
        delay_s = instants.uniform(0.0, whole_s)
        return lambda elapsed_s: elapsed_s >= delay_s
    # Half of the time of a start is spent before its first step; saving and stepping matter more.
    metrics = run / "metrics.jsonl"
    num_bytes = metrics.stat().st_size if metrics.exists() else 0
    due_bytes = num_bytes + instants.randint(0, 3) * 600
    extra_s = instants.uniform(0.0, 0.3)
    reached_s: list[float] = []

    def is_due(elapsed_s: float) -> bool:
        if not reached_s and metrics.exists() and metrics.stat().st_size > due_bytes:
            reached_s.append(elapsed_s)
        return bool(reached_s) and elapsed_s >= reached_s[0] + extra_s

    return is_due


def kill_and_resume(num_kills: int, seed: int, scratch: Path) -> dict[str, object]:
    """Kill `num_kills` starts at random instants; every run they belong to must end equal."""
    make_model(scratch / "model")
    config = scratch / "run.toml"
    config.write_text(CONFIG.format(model=scratch / "model"))
    starter = Starter(scratch / "stderr.txt")
    order = ["train", str(config), "--resume", "--out"]
    code, whole_s = starter.run([*order, str(scratch / "whole")], None)
    assert code == 0, starter.log.read_text()
    whole = results_of(scratch / "whole")
    instants = random.Random(seed)
    kills = runs = resumed_starts = 0
    while kills < num_kills or runs == 0:
        out = scratch / f"killed-{runs}"
        while True:
            has_checkpoint = any(out.glob("checkpoints/checkpoint-*"))
            is_due = None if kills >= num_kills else random_instant(instants, out, whole_s)
            code, _ = starter.run([*order, str(out)], is_due)
            if code == 0:
                break
            assert code == -signal.SIGKILL, starter.log.read_text()
            kills += 1
            resumed_starts += has_checkpoint
        found = results_of(out)
        for name, expected in whole.items():
            assert found[name] == expected, f"{name} of run {runs} after {kills} kills differs"
        shutil.rmtree(out)
        runs += 1
    starter.close()
    return {
        "schema": 1,
        "kills": kills,
        "runs": runs,
        "kills_after_a_checkpoint": resumed_starts,
        "all_equal": True,
    }


def main() -> None:
    """Run it and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = kill_and_resume(options.kills, options.seed, Path(scratch))
    text = json.dumps(result, indent=2)
    print(text)
    if options.write:
        RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
