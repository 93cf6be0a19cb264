"""Verdicts and figures of a run's metrics rows, channel by channel."""

import math
import statistics
from collections.abc import Sequence

from composer_replication.runs.summary import Check
from composer_replication.step.channels import CHANNELS
from composer_replication.training.metrics import MetricsRow


def channel_checks(rows: Sequence[MetricsRow], channels: Sequence[str]) -> list[Check]:
    """Whether GRPO and each further channel had data and something to push with."""
    return [_channel_check(rows, name) for name in ("grpo", *channels)]


def channel_signal(rows: Sequence[MetricsRow], name: str) -> float:
    """The most that the channel had to push with: its loss, or the spread of GRPO's rewards."""
    # On-policy GRPO's loss may be 0; the spread of its rewards is what pushes.
    metric = "reward_std" if name == "grpo" else f"loss/{name}"
    return max((abs(value) for value in values(rows, metric)), default=0.0)


def row_problem(rows: Sequence[MetricsRow], name: str, signal: float) -> str | None:
    """What the rows say is wrong with a channel, in words; None where nothing is.

    Args:
        rows: of every step.
        name: of the channel.
        signal: the most that it had to push with.
    """
    unit = CHANNELS[name].unit
    # GRPO is always on, so it answers for the loss and the gradient of the whole step.
    watched = [f"loss/{name}", f"{unit}/{name}"]
    watched += ["loss", "grad_norm"] if name == "grpo" else []
    for row in rows:
        for metric in watched:
            value = row.get(metric)
            if isinstance(value, int | float) and not math.isfinite(value):
                return (
                    f"{metric} was {value} at step {row.get('step')}. Lower grpo.learning_rate, or "
                    "look for nan in that step's rows; under bf16 try fp32."
                )
    if sum(values(rows, f"{unit}/{name}")) == 0:
        return f"No {unit} reached {name} in {len(rows)} steps. Check its data."
    if signal == 0 and name == "grpo":
        return "Every reward was equal, so no advantage differs from 0. Use an easier task."
    if signal == 0:
        return f"The {name} loss was exactly 0 at every step: its two sides do not differ."
    return None


def missing_rows(
    rows: Sequence[MetricsRow], name: str, channels: Sequence[str], *, alternates: bool
) -> str | None:
    """A step in which the channel had data and no loss was logged for it, in words.

    Args:
        rows: of every step.
        name: of the channel.
        channels: the extra ones that are on.
        alternates: they take turns.
    """
    schedule = "alternate" if alternates else "every_step"
    unit = CHANNELS[name].unit
    for row in rows:
        step = int(float(row["step"] or 0))
        in_turn = not alternates or channels[(step - 1) % len(channels)] == name
        due = name == "grpo" or in_turn
        has_loss = isinstance(row.get(f"loss/{name}"), int | float)
        if has_loss != due:
            return (
                f"Step {step} {'has' if has_loss else 'lacks'} a {name} loss, and the schedule "
                f"{schedule!r} gives it {'one' if due else 'none'} there. Look at the trainer's "
                "_compute_loss and at batch.channel_schedule."
            )
        if not due and sum(values([row], f"{unit}/{name}")) > 0:
            return f"Step {step} counts {unit} for {name}, which is not its turn."
    return None


def channel_figures(rows: Sequence[MetricsRow], name: str) -> dict[str, float | int | None]:
    """First and last loss, units a step, and what else tells of the channel; null if unknown."""
    losses = values(rows, f"loss/{name}")
    unit = CHANNELS[name].unit
    amounts = values(rows, f"{unit}/{name}")
    figures: dict[str, float | int | None] = {
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        f"{unit}_per_step": statistics.fmean(amounts) if amounts else None,
    }
    extra = {"grpo": ("reward", "frac_reward_zero_std"), "dpo": ("rewards/margins",)}
    for metric in extra.get(name, ()):
        found = values(rows, metric)
        figures[metric] = statistics.fmean(found) if found else None
    return figures


def percentile(figures: Sequence[float], share: float) -> float:
    """The smallest figure that at least `share` of them do not exceed."""
    ordered = sorted(figures)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def values(rows: Sequence[MetricsRow], name: str) -> list[float]:
    """A metric over the rows that have it."""
    found = (row.get(name) for row in rows)
    return [float(value) for value in found if isinstance(value, int | float)]


def _channel_check(rows: Sequence[MetricsRow], name: str) -> Check:
    signal = channel_signal(rows, name)
    cause = row_problem(rows, name, signal)
    return Check(
        f"channels_live/{name}", passed=cause is None, value=signal, bound="> 0", cause=cause
    )
