"""Where several runs go: one card of one's own, run after run, or a container each at once."""

from dataclasses import dataclass

from composer_replication.errors import ConfigError
from composer_replication.planner.candidate import Candidate
from composer_replication.planner.duration_text import duration
from composer_replication.planner.wall_clock import Where

MAX_CONTAINERS = 10
"""Cards that the plan without a fee gives at once."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a number of equal runs end soonest within the cap.

    Example: `place_runs(8, local, remote, budget_usd=None).where`.
    """

    where: Where
    makespan_s: float
    usd: float
    worst_usd: float
    reason: str


def place_runs(
    num_runs: int,
    local: Candidate | None,
    remote: Candidate | None,
    *,
    budget_usd: float | None,
    max_containers: int = MAX_CONTAINERS,
) -> Placement:
    """The place where `num_runs` runs end soonest; a single one stays local unless set-up pays.

    Args:
        num_runs: equal runs, none of which waits for another.
        local: the card of one's own; None: there is none, or it is too small.
        remote: one container's run; None: remote is out of the question.
        budget_usd: cap on the worst case of all of them together.
        max_containers: at once.

    Raises:
        ConfigError: no place, or a cap that only the missing local card would have kept.
    """
    if local is None and remote is None:
        raise ConfigError(
            "No place can hold these runs: neither a local card nor a remote one fits. Plan one of "
            "them first: composer-replication plan CONFIG.toml --on all."
        )
    waves = -(-num_runs // max_containers)
    local_s = None if local is None else num_runs * local.wall_s
    remote_s = None if remote is None else waves * remote.wall_s
    usd = 0.0 if remote is None else num_runs * remote.expected_usd
    worst = 0.0 if remote is None else num_runs * remote.worst_usd
    is_allowed = remote is not None and (budget_usd is None or worst <= budget_usd)
    if local_s is None or local is None:
        if not is_allowed:
            raise ConfigError(
                f"The worst case of {num_runs} remote runs is {worst:.2f} USD, over the cap of "
                f"{budget_usd:g} USD, and there is no local card. Raise --budget, or run fewer."
            )
        assert remote is not None
        assert remote_s is not None
        reason = (
            f"None fits here; {num_runs} containers of {remote.place.label} end in "
            f"{duration(remote_s)} for {usd:.2f} USD."
        )
        return Placement("modal", remote_s, usd, worst, reason)
    if not is_allowed or remote is None or remote_s is None:
        why = "is over the cap" if remote is not None else "is not asked for"
        reason = f"Remote {why}; {num_runs} runs one after another take {duration(local_s)}."
        return Placement("local", local_s, 0.0, 0.0, reason)
    if local_s - remote_s > remote.clock.setup_s:
        reason = (
            f"{num_runs} containers of {remote.place.label} end in {duration(remote_s)} for "
            f"{usd:.2f} USD; one local {local.place.label} takes {duration(local_s)}."
        )
        return Placement("modal", remote_s, usd, worst, reason)
    reason = (
        f"The local {local.place.label} ends in {duration(local_s)} for nothing; remote takes "
        f"{duration(remote_s)} and {usd:.2f} USD."
    )
    return Placement("local", local_s, 0.0, 0.0, reason)
