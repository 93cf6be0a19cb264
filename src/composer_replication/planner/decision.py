"""Which candidate to take, and why, in one sentence that names what binds."""

from collections.abc import Sequence
from dataclasses import dataclass

from composer_replication.errors import BudgetError
from composer_replication.planner.candidate import Candidate
from composer_replication.planner.cost import check_cap
from composer_replication.planner.duration_text import duration

EXIT_DONE, EXIT_NOTHING_FITS, EXIT_OVER_CAP = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Decision:
    """The choice among candidates.

    Example: `decide(candidates, budget_usd=5.0, retries=1).chosen`.
    """

    chosen: Candidate | None
    reason: str
    exit_code: int


def decide(candidates: Sequence[Candidate], *, budget_usd: float | None, retries: int) -> Decision:
    """The cheapest place that fits; local before remote unless remote ends sooner by its set-up."""
    fitting = [c for c in candidates if c.fits]
    if not fitting:
        return Decision(None, _nothing_fits(candidates), EXIT_NOTHING_FITS)
    allowed = [c for c in fitting if budget_usd is None or c.worst_usd <= budget_usd]
    if not allowed:
        assert budget_usd is not None, "only a cap forbids what fits"
        return Decision(None, _over_cap(fitting, budget_usd, retries), EXIT_OVER_CAP)
    local = min((c for c in allowed if _is_local(c)), key=lambda c: c.wall_s, default=None)
    remote = min((c for c in allowed if not _is_local(c)), key=_remote_order, default=None)
    if local is None:
        assert remote is not None, "something is allowed"
        return Decision(remote, _why_remote(remote, candidates), EXIT_DONE)
    if remote is None:
        return Decision(local, _why_alone(local), EXIT_DONE)
    if local.wall_s - remote.wall_s > remote.clock.setup_s:
        text = (
            f"{remote.place.label} on Modal ends in {duration(remote.wall_s)}, its set-up of "
            f"{duration(remote.clock.setup_s)} included, for {remote.expected_usd:.2f} USD; the "
            f"local {local.place.label} would take {duration(local.wall_s)}."
        )
        return Decision(remote, text, EXIT_DONE)
    text = (
        f"The local {local.place.label} ends in {duration(local.wall_s)} for nothing; "
        f"{remote.place.label} on Modal would take {duration(remote.wall_s)}, "
        f"{duration(remote.clock.setup_s)} of it set-up, and {remote.expected_usd:.2f} USD."
    )
    return Decision(local, text, EXIT_DONE)


def next_cheaper(candidates: Sequence[Candidate], chosen: Candidate | None) -> Candidate | None:
    """The dearest place that is cheaper than the chosen one and too small; local ones cost 0."""
    limit = float("inf") if chosen is None else chosen.usd_per_hour
    too_small = [c for c in candidates if not c.fits and c.usd_per_hour < limit]
    return max(too_small, key=lambda c: (c.usd_per_hour, c.place.capacity_gib), default=None)


def _remote_order(candidate: Candidate) -> tuple[bool, float, float]:
    """A card without bf16 last; then by dollars, then by time."""
    gpu = candidate.place.gpu
    lacks_bf16 = gpu is not None and not gpu.has_bf16
    return lacks_bf16, candidate.expected_usd, candidate.wall_s


def _is_local(candidate: Candidate) -> bool:
    return candidate.place.where == "local"


def _why_alone(chosen: Candidate) -> str:
    return (
        f"{chosen.place.label} is what there is, and {_memory(chosen)} are enough; the most is in "
        f"the {chosen.memory.peak_phase.replace('_', ' ')}."
    )


def _why_remote(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    smaller = [
        c
        for c in candidates
        if not _is_local(c) and c.usd_per_hour < chosen.usd_per_hour and c is not chosen
    ]
    missing = [c for c in smaller if not c.fits]
    local = [c for c in candidates if _is_local(c) and not c.fits]
    text = f"{chosen.place.label} costs least of what fits ({_memory(chosen)})"
    if local:
        text += f"; the local {local[0].place.label} misses by {_miss(local[0]):.1f} GiB"
    if missing:
        cheaper = max(missing, key=lambda c: c.usd_per_hour)
        text += f"; memory binds: {cheaper.place.label} is cheaper and misses by "
        text += f"{_miss(cheaper):.1f} GiB"
    elif any(c.place.gpu is not None and not c.place.gpu.has_bf16 for c in smaller):
        text += "; T4 is cheaper by the hour and has no bf16"
    elif smaller:
        text += f"; {smaller[-1].place.label} is cheaper by the hour and slower"
    return text + "."


def _nothing_fits(candidates: Sequence[Candidate]) -> str:
    nearest = min(candidates, key=lambda c: _miss(c))
    return (
        f"Nothing fits: {nearest.place.label} comes nearest and misses by {_miss(nearest):.1f} GiB "
        f"({_memory(nearest)}); the most is in the "
        f"{nearest.memory.peak_phase.replace('_', ' ')}."
    )


def _over_cap(fitting: Sequence[Candidate], budget_usd: float, retries: int) -> str:
    cheapest = min(fitting, key=lambda c: c.worst_usd)
    try:
        check_cap(
            cheapest.worst_usd,
            budget_usd,
            cheapest.usd_per_hour,
            retries=retries,
            timeout_s=cheapest.timeout_s,
        )
    except BudgetError as error:
        return f"{cheapest.place.label}: {error}"
    raise AssertionError("the cheapest was over the cap")


def _memory(candidate: Candidate) -> str:
    return f"{candidate.memory.peak_gib:.1f} of {candidate.place.capacity_gib:.1f} GiB"


def _miss(candidate: Candidate) -> float:
    return candidate.memory.peak_gib - candidate.place.capacity_gib
