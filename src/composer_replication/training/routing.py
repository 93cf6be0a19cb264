"""Failures to SDPO, successes to GRPO: which channel a rollout trains.

Distilling a rollout that succeeded teaches the policy the hint's style and nothing else, and a
failed one that GRPO pushes down as a whole is told nothing about the turn that went wrong. Routed,
each rollout has one teacher.

Source: SRPO, arXiv:2604.02288, the routing of its section 3, with error turns in place of whole
answers.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from torch import Tensor

from composer_replication.traces.hints import HintSite

Rows = Sequence[Mapping[str, object]]

ROUNDING = 1e-6
"""A reward that is so much under another counts as equal: sums of parts of 1 end beside it."""


def sites_of_rollouts(rows: Rows) -> list[HintSite]:
    """Every error turn of these rollouts."""
    return [site for row in rows for site in _sites(row)]


def sites_of_failures(rows: Rows, success_reward: float) -> list[HintSite]:
    """Error turns of the rollouts whose environment gave less than `success_reward`.

    A rollout that erred and still succeeded stays with GRPO alone. One whose environment failed
    has no reward and no share in GRPO.

    Args:
        rows: of this rank's rollouts, as `EnvironmentRollouts` filled them in.
        success_reward: from this reward on a rollout counts as a success.
    """
    least = success_reward - ROUNDING
    rewards = [cast("float | None", row["environment_reward"]) for row in rows]
    return [
        site
        for row, reward in zip(rows, rewards, strict=True)
        if reward is None or reward < least
        for site in _sites(row)
    ]


def leave_grpo(sites: Iterable[HintSite], rows: Rows, advantages: Tensor) -> int:
    """Set the advantage of every rollout that owns one of `sites` to 0; returns how many.

    Their rewards have already entered the group's baseline, so the successes beside them keep the
    advantage that they earned.

    Args:
        sites: the error turns that SDPO trains on, out of `rows`.
        rows: of this rank's rollouts.
        advantages: of the same rollouts, in their order; changed in place.
    """
    chosen = {id(site) for site in sites}
    routed = [i for i, row in enumerate(rows) if any(id(s) in chosen for s in _sites(row))]
    advantages[routed] = 0.0
    return len(routed)


def _sites(row: Mapping[str, object]) -> Sequence[HintSite]:
    return cast(Sequence[HintSite], row.get("rollout_hint_sites") or ())
