"""Verdicts and figures of a run's metrics rows, channel by channel."""

import statistics
from collections.abc import Sequence

from composer_replication.runs.summary import Check
from composer_replication.step.channels import CHANNELS
from composer_replication.training.metrics import MetricsRow


def channel_checks(rows: Sequence[MetricsRow], channels: Sequence[str]) -> list[Check]:
    """Whether GRPO and each further channel had data and something to push with."""
    return [_channel_check(rows, name) for name in ("grpo", *channels)]


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
    unit = CHANNELS[name].unit
    amount = sum(values(rows, f"{unit}/{name}"))
    losses = values(rows, f"loss/{name}")
    # On-policy GRPO's loss may be 0; the spread of its rewards is what pushes.
    spreads = values(rows, "reward_std") if name == "grpo" else [abs(loss) for loss in losses]
    signal = max(spreads, default=0.0)
    cause = None
    if amount == 0:
        cause = f"No {unit} reached {name} in {len(rows)} steps. Check its data."
    elif signal == 0 and name == "grpo":
        cause = "Every reward was equal, so no advantage differs from 0. Use an easier task."
    elif signal == 0:
        cause = f"The {name} loss was exactly 0 at every step: its two sides do not differ."
    return Check(
        f"channels_live/{name}", passed=cause is None, value=signal, bound="> 0", cause=cause
    )
