"""From a base model to one that knows a drifted API: data, trainer, before and after, a plot.

    python examples/learn_api_drift.py                     # some ten minutes on two cores
    python examples/learn_api_drift.py --channels grpo     # the outcome reward alone

The prompts show calls in the old convention, and the environment takes only today's. Its errors say
what is wrong: they become the hints of SDPO. Preference pairs show half of the new rules. What each
channel taught under how many seeds is in docs/evidence.md; the settings here are the same.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure

from composer_replication import ComposerConfig, ComposerReplicationTrainer, EnvironmentRollouts
from composer_replication.environments.api_drift import ApiDrift
from composer_replication.experiments.evaluate import EvaluationResult, evaluate
from composer_replication.experiments.evaluation_data import EvaluationData
from composer_replication.experiments.evidence import heldout_rows, training_rows
from composer_replication.experiments.evidence_arms import EvidenceRun
from composer_replication.experiments.heldout_evaluation import HeldoutEvaluation
from composer_replication.experiments.proportions import paired_change
from composer_replication.experiments.quiet_libraries import quiet_libraries, without_printed_logs
from composer_replication.experiments.task_rows import TaskRows
from composer_replication.training.metrics import StepMetricsCallback
from composer_replication.training.model_source import LoadedModel, load_model
from composer_replication.training.rewards import environment_reward

TASK = "api_drift"
Row = Mapping[str, Any]


def trainer_config(channels: Sequence[str], out: Path, seed: int, steps: int) -> ComposerConfig:
    """GRPOConfig's own fields first, then those of the two channels beside it."""
    return ComposerConfig(
        output_dir=str(out / "checkpoints"),
        seed=seed,
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="linear",
        warmup_steps=2,
        # All hints say "not as shown": at the usual 0.9 and 1e-8 Adam overshoots in that.
        adam_beta1=0.3,
        adam_beta2=0.99,
        adam_epsilon=1e-4,
        per_device_train_batch_size=10,
        num_generations=2,
        max_completion_length=84,
        temperature=0.6,
        # In order: every step has a prompt of each tool.
        shuffle_dataset=False,
        # GRPO + alpha * SDPO + beta * DPO.
        alpha_sdpo=1.0 if "sdpo" in channels else 0.0,
        beta_replay=0.1 if "dpo" in channels else 0.0,
        teacher="frozen",
        sdpo_beta=0.0,
        sdpo_temperature=0.6,
        hint_placement="demonstrate",
        hint_sites_per_step=10,
        pairs_per_step=2,
        # One forward for the rows of all channels.
        tree="always",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )


def make_trainer(
    loaded: LoadedModel, train: TaskRows, config: ComposerConfig
) -> ComposerReplicationTrainer:
    """Rollouts play the environment; their error turns feed SDPO, the recorded pairs DPO."""
    rollouts = EnvironmentRollouts(ApiDrift, train.prompts, max_turns=2, max_action_tokens=36)
    return ComposerReplicationTrainer(
        loaded.model,
        environment_reward,
        config,
        train_dataset=Dataset.from_list(train.prompts),
        processing_class=loaded.tokenizer,
        rollout_func=rollouts,
        pairs=train.pairs if config.beta_replay else None,
    )


def measure(loaded: LoadedModel, heldout: TaskRows) -> EvaluationResult:
    """Greedy episodes on prompts whose files and words are in no training prompt."""
    return evaluate(loaded.model, loaded.tokenizer, TASK, heldout.prompts, decoding="greedy")


def plot(points: Sequence[Row], steps: Sequence[Row], path: Path) -> None:
    """Held-out success between steps, and the reward of each step's rollouts."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="task A", ylim=(-0.03, 1.03))
    axes.plot(
        [point["step"] for point in points],
        [point["success"] for point in points],
        "o-",
        label="held-out success",
    )
    axes.plot(
        [row["step"] for row in steps], [row["reward"] for row in steps], "--", label="reward"
    )
    axes.legend(frameon=False)
    figure.savefig(path)


def show(row: Row) -> None:
    """A line a step: the mean reward of its rollouts, and the loss of each channel that is on."""
    losses = [f"{name} {row[name]:.3f}" for name in ("loss/sdpo", "loss/dpo") if row.get(name)]
    print(f"step {row['step']:2}  reward {row['reward']:.2f}", *losses, sep="  ")


@quiet_libraries()
def main() -> None:
    """Measure the base, train, measure again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", default="grpo,sdpo,dpo", help="of these, with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2-135m", help="the embedded one, or a folder")
    parser.add_argument("--steps", type=int, default=32, help="optimizer steps")
    parser.add_argument("--heldout", type=int, default=40, help="requests to be tried on")
    parser.add_argument("--out", type=Path, default=Path("runs/learn_api_drift"))
    args = parser.parse_args()
    channels = args.channels.split(",")
    if not {"grpo"} <= set(channels) <= {"grpo", "sdpo", "dpo"}:
        parser.error(f"--channels is {args.channels}; give grpo, with sdpo, dpo or both of them")

    run = EvidenceRun(TASK, "all", args.seed)
    train, heldout = training_rows(run), heldout_rows(run, num_prompts=args.heldout)
    loaded = load_model(args.model, on_progress=print)
    before = measure(loaded, heldout)

    config = trainer_config(channels, args.out, args.seed, args.steps)
    trainer = make_trainer(loaded, train, config)
    points: list[Row] = []
    steps: list[Row] = []
    curve = HeldoutEvaluation(
        EvaluationData("held-out", TASK, heldout.prompts[:16], []),
        loaded.tokenizer,
        every_steps=8,
        num_prompts=16,
        write=points.append,
        say=print,
    )
    trainer.add_callback(curve)
    trainer.add_callback(
        StepMetricsCallback(trainer.args.device, lambda row: steps.append(row), show)
    )
    without_printed_logs(trainer)
    trainer.train()

    after = measure(loaded, heldout)
    trainer.save_model(str(args.out / "model"))
    plot(points, steps, args.out / "curve.svg")

    change = paired_change(before.outcomes(), after.outcomes())
    print(f"held-out requests answered right: {before.success.rate:.0%} -> ", end="")
    print(f"{after.success.rate:.0%}, {change.change:+.0%} [{change.low:+.0%}, {change.high:+.0%}]")
    print(f"errors left: {json.dumps(after.error_kinds)}")
    print(f"model: {args.out / 'model'}\ncurve: {args.out / 'curve.svg'}")


if __name__ == "__main__":
    main()
