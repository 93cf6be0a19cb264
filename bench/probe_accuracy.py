"""What `plan --probe` says of a step's seconds, beside the fifty steps that follow.

    python bench/probe_accuracy.py [--only NAME] [--steps 50]

Each case is probed by the command, in a folder without earlier runs; then the same configuration is
trained. Its `planned.json` has the range without calibration. Each case is written to
`bench/results/probe_accuracy.json` when it ends; `bench/render_docs.py` writes the table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from step_measure import PROCESS_ENV

RESULTS = Path(__file__).parent / "results" / "probe_accuracy.json"
CONFIG = Path(__file__).parents[1] / "configs" / "smoke_smollm2_135m.toml"
SHORT = {
    "grpo.max_completion_length": 24,
    "grpo.num_generations": 2,
    "grpo.per_device_train_batch_size": 2,
    "rollout.max_turns": 1,
}
"""Sixty steps in minutes."""
CASES: dict[str, dict[str, object]] = {
    "all three channels, live teacher, packed": SHORT | {"teacher": "live"},
    "all three channels, EMA teacher, separate": SHORT | {"tree": "off"},
}


def main() -> int:
    """Exit 1 where a command failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(CASES))
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    for name in [options.only] if options.only else CASES:
        try:
            row = {"name": name, **measure(CASES[name], options.steps)}
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error}\n{error.stderr[-2000:]}", file=sys.stderr)
            return 1
        print(json.dumps(row))
        others = [kept for kept in stored() if kept["name"] != name]
        RESULTS.write_text(json.dumps({"rows": [*others, row]}, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(overrides: dict[str, object], num_steps: int) -> dict[str, Any]:
    """One case: the uncalibrated range, the probed one, and what was measured."""
    sets = [f"--set={key}={value}" for key, value in overrides.items()]
    with tempfile.TemporaryDirectory(prefix="composer-probe-bench-") as folder:
        plan = _command(folder, "plan", "--on", "local", "--probe", *sets)
        (probed,) = [c for c in plan["candidates"] if c["where"] == "local"]
        _command(folder, "train", "--out", "run", *sets, f"--set=grpo.max_steps={num_steps}",
                 "--set=grpo.save_strategy=no")  # fmt: skip
        run = Path(folder) / "run"
        planned = json.loads((run / "planned.json").read_text(encoding="utf-8"))
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {
        "device": summary["device"],
        "steps": summary["steps"],
        "uncalibrated_s": planned["step_s"],
        "probed_s": probed["step_s"],
        "median_s": summary["median_step_s"],
    }


def _command(folder: str, verb: str, *arguments: str) -> dict[str, Any]:
    """What a verb prints as JSON."""
    command = [sys.executable, "-m", "composer_replication", verb, str(CONFIG), "--json"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, **PROCESS_ENV},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def stored() -> list[dict[str, Any]]:
    """The cases measured so far."""
    if not RESULTS.exists():
        return []
    return json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]


def probe_lines() -> list[str]:
    """The table of docs/planner.md."""
    order = list(CASES)
    rows = sorted(stored(), key=lambda row: order.index(row["name"]))
    lines = [
        "| run | device | uncalibrated, s | after the probe | median of the steps | probe off by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, _, high = row["uncalibrated_s"]
        expected = row["probed_s"][1]
        lines.append(
            f"| {row['name']} | {row['device']} | {low:.1f} to {high:.1f} | {expected:.2f} "
            f"| {row['median_s']:.2f} ({row['steps']}) | {expected / row['median_s'] - 1:+.1%} |"
        )
    return ["", *lines, ""]


if __name__ == "__main__":
    sys.exit(main())
