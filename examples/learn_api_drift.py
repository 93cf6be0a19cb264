"""From a base model to one that knows a drifted API: data, training, before and after, a plot.

    python examples/learn_api_drift.py                  # prints a row a step
    python examples/learn_api_drift.py --arm grpo       # the outcome reward alone

The prompts show calls in the old convention and the environment takes only today's, which its
errors tell. What each arm reached, under how many seeds, is in docs/evidence.md.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from composer_replication.experiments.evidence import run_evidence
from composer_replication.experiments.evidence_arms import ARMS, SETTINGS, EvidenceRun

TASK = "api_drift"


def rate(result: dict, tools: list[str] | None = None) -> str:
    """Held-out success in words, of all tools or of some."""
    pairs = zip(result["greedy"]["outcomes"], result["tools"], strict=True)
    outcomes = [outcome for outcome, tool in pairs if tools is None or tool in tools]
    return f"{sum(outcomes)} of {len(outcomes)}"


def plot(curve: list[dict], path: Path) -> None:
    """Held-out success and training reward over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylim=(-0.03, 1.03))
    steps = [point["step"] for point in curve]
    axes.plot(steps, [point["heldout_success"] for point in curve], "o-", label="held-out success")
    axes.plot(steps, [point["train_reward"] for point in curve], "o--", label="training reward")
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Measure the base, train, measure again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arm", default="all", choices=[arm for arm in ARMS if arm != "base"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="another model than the embedded one")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--heldout", type=int, default=40, help="requests to be tried on")
    parser.add_argument("--curve-every", type=int, default=4, help="steps between two points")
    parser.add_argument("--plot", type=Path, default=Path("learn_api_drift.svg"))
    args = parser.parse_args()

    # The settings of the evidence, so that this shows one of its runs.
    settings = SETTINGS[TASK]
    config = dict(settings.config)
    config["model"] = args.model or config["model"]
    if args.steps:
        config["grpo"] = {**config["grpo"], "max_steps": args.steps}
    settings = dataclasses.replace(
        settings, config=config, num_heldout=args.heldout, curve_every=args.curve_every
    )

    with TemporaryDirectory() as folder:
        runs = [EvidenceRun(TASK, arm, args.seed) for arm in ("base", args.arm)]
        before, after = [run_evidence(run, Path(folder), print, settings) for run in runs]

    print(f"held-out requests answered right at the first try: {rate(before)} -> {rate(after)}")
    covered = after["pair_tools"]
    others = sorted(set(after["tools"]) - set(covered))
    print(f"  tools that pairs show   {rate(before, covered)} -> {rate(after, covered)}")
    print(f"  tools that none shows   {rate(before, others)} -> {rate(after, others)}")
    lost = [result["forgetting"]["nats_per_token"] for result in (before, after)]
    print(f"everyday replies: {lost[0]:.2f} -> {lost[1]:.2f} nats a token")
    kept = [result["forgetting"]["old_convention"] for result in (before, after)]
    print(f"the old calls, where a prompt asks for them: {kept[0]:.0%} -> {kept[1]:.0%}")
    print(f"errors left: {json.dumps(after['greedy']['error_kinds'])}")
    plot(after["curve"], args.plot)
    print(f"curve: {args.plot}")


if __name__ == "__main__":
    main()
