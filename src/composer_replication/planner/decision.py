"""Which candidate to take, and why, in one sentence that names what binds."""

from collections.abc import Sequence
from dataclasses import dataclass

from composer_replication.errors import BudgetError
from composer_replication.planner.candidate import Candidate
from composer_replication.planner.cost import MAX_TIMEOUT_S, check_cap, timeout_for_s
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
    """The cheapest place that can run it, and a local one unless set-up pays."""
    possible = [c for c in candidates if c.is_launchable]
    if not possible:
        return Decision(None, _nothing_fits(candidates), EXIT_NOTHING_FITS)
    allowed = [c for c in possible if budget_usd is None or c.worst_usd <= budget_usd]
    if not allowed:
        assert budget_usd is not None, "only a cap forbids what fits"
        return Decision(None, _over_cap(possible, budget_usd, retries), EXIT_OVER_CAP)
    local = min((c for c in allowed if _is_local(c)), key=lambda c: c.wall_s, default=None)
    remote = min((c for c in allowed if not _is_local(c)), key=_remote_order, default=None)
    if local is None:
        assert remote is not None, "something is allowed"
        return Decision(remote, _why_remote(remote, candidates, budget_usd), EXIT_DONE)
    if remote is None:
        return Decision(local, _why_alone(local, candidates), EXIT_DONE)
    if remote.ends_in_one_call and local.wall_s - remote.wall_s > remote.clock.setup_s:
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
    """The dearest place that is too small, and where the run would cost less than in `chosen`."""
    # A local run costs 0.
    limit = float("inf") if chosen is None else chosen.expected_usd
    too_small = [c for c in candidates if _is_too_small(c) and c.expected_usd < limit]
    return max(too_small, key=lambda c: (c.expected_usd, c.place.capacity_gib), default=None)


def _is_too_small(candidate: Candidate) -> bool:
    """Whether memory alone keeps the run from it."""
    return not candidate.fits and candidate.obstacle is None


def _remote_order(candidate: Candidate) -> tuple[bool, float, float]:
    """What ends within its time-out first; then by dollars, then by time."""
    return not candidate.ends_in_one_call, candidate.expected_usd, candidate.wall_s


def _is_local(candidate: Candidate) -> bool:
    return candidate.place.where == "local"


def _why_alone(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    text = (
        f"{chosen.place.label} is what there is, and {_memory(chosen)} are enough; the most is in "
        f"the {chosen.memory.phase_words}."
    )
    endless = _endless(candidates)
    return text if endless is None else f"{text} {_never_ends(endless)}"


def _why_remote(
    chosen: Candidate, candidates: Sequence[Candidate], budget_usd: float | None
) -> str:
    """What keeps the run from each kind of place where it would cost less."""
    local = [c for c in candidates if _is_local(c) and not c.is_launchable]
    text = f"{chosen.place.label} costs least of what fits ({_memory(chosen)})"
    if local:
        text += f"; the local {local[0].place.label} {_hindrance(local[0])}"
    cheaper = [c for c in candidates if not _is_local(c) and c.expected_usd < chosen.expected_usd]
    too_small = [c for c in cheaper if _is_too_small(c)]
    over = [c for c in cheaper if c.is_launchable and _is_over(c, budget_usd)]
    late = [c for c in cheaper if c.is_launchable and not _is_over(c, budget_usd)]
    without_bf16 = [c for c in cheaper if c.obstacle == "no bf16"]
    endless = _endless(cheaper)
    if too_small:
        dearest = max(too_small, key=lambda c: c.expected_usd)
        text += f"; memory binds: {dearest.place.label} would take {dearest.expected_usd:.2f} USD "
        text += f"and misses by {_miss(dearest):.1f} GiB"
    if over:
        least = min(over, key=lambda c: c.expected_usd)
        text += f"; the cap of {budget_usd:g} USD binds: {least.place.label} would take "
        text += f"{least.expected_usd:.2f} USD, {least.worst_usd:.2f} at worst"
    if late:
        text += f"; the time-out binds: {late[0].place.label} would cost less and not end within it"
    elif endless is not None:
        text += f"; the time-out binds: no call on {endless.place.label} reaches a checkpoint"
    if without_bf16:
        text += f"; {without_bf16[0].place.label} would cost less and has no bf16"
    return text + "."


def _hindrance(candidate: Candidate) -> str:
    """What keeps a run from a place, as the end of a sentence."""
    if candidate.obstacle in ("no bf16", "no vLLM"):
        return f"has {candidate.obstacle}"
    if candidate.obstacle == "time-out":
        return "reaches no checkpoint within its time-out"
    if candidate.obstacle == "vLLM share":
        return f"leaves vLLM less than the {candidate.vllm_gib:.1f} GiB that it needs"
    if candidate.is_sharded:
        return f"has {_whole_miss(candidate):.1f} GiB a card too few for the whole step"
    return f"misses by {_miss(candidate):.1f} GiB"


def _endless(candidates: Sequence[Candidate]) -> Candidate | None:
    """The cheapest of those that only their time-out forbids."""
    endless = (c for c in candidates if c.obstacle == "time-out")
    return min(endless, key=lambda c: c.expected_usd, default=None)


def _never_ends(candidate: Candidate) -> str:
    """Why a call of a run there keeps nothing, and what to set."""
    stretch, limit_s = candidate.stretch, candidate.timeout_s
    is_whole = stretch.steps_a_checkpoint >= stretch.num_steps
    unit = "model" if candidate.shape.verb == "evaluate" else "step"
    kept = "its end" if is_whole else f"{unit} {stretch.steps_a_checkpoint}"
    whole_s, least_s = timeout_for_s(candidate.wall_s), timeout_for_s(stretch.first_kept_s)
    ways = [f"modal.timeout_s = {s}" for s in (whole_s, least_s) if s <= MAX_TIMEOUT_S][:1]
    num_steps = stretch.steps_within(limit_s)
    if num_steps > 0 and candidate.shape.verb == "train":
        ways.append(f"grpo.save_steps = {num_steps}")
    return (
        f"{candidate.place.label}: a call of {duration(limit_s)} ends before it has kept anything "
        "and the next begins anew, so the run would never end. Its set-up takes "
        f"{duration(stretch.setup_s)}, and it is first kept at {kept}, after "
        f"{duration(stretch.first_kept_s)}. "
        + (f"Set {' or '.join(ways)}." if ways else "Take a faster card, or make the run shorter.")
    )


def _nothing_fits(candidates: Sequence[Candidate]) -> str:
    endless = _endless(candidates)
    if endless is not None:
        return _never_ends(endless)
    sharded = [c for c in candidates if c.is_sharded and c.fits]
    on_one = [c for c in candidates if _is_too_small(c)]
    text = ""
    if on_one:
        nearest = min(on_one, key=_miss)
        text = (
            f"Nothing fits: {nearest.place.label} comes nearest and misses by "
            f"{_miss(nearest):.1f} GiB ({_memory(nearest)}); the most is in the "
            f"{nearest.memory.phase_words}."
        )
    if sharded:
        fewest = min(sharded, key=lambda c: c.expected_usd)
        text += (
            f" {fewest.place.label} would hold it sharded over its cards ({_memory(fewest)} each, "
            "by formula), and training here does not shard: each card holds the whole step, "
            f"{fewest.whole_gib:.1f} GiB."
        )
    elif not on_one:
        text = _no_place(candidates)
    return text.strip()


def _no_place(candidates: Sequence[Candidate]) -> str:
    """Neither a card that is too small alone, nor one that sharding would help."""
    short = next((c for c in candidates if c.obstacle == "vLLM share"), None)
    if short is not None:
        assert short.shape.vllm is not None, "it has a share"
        return (
            f"grpo.vllm_gpu_memory_utilization {short.shape.vllm.card_share:g} leaves vLLM "
            f"{short.shape.vllm.card_share * short.place.capacity_gib:.1f} GiB of the local "
            f"{short.place.label}, and it needs {short.vllm_gib:.1f}: the weights in half "
            "precision and room to compute. Raise it."
        )
    if any(c.obstacle == "no vLLM" for c in candidates):
        return (
            "grpo.use_vllm is true, and neither a CPU nor the image on Modal has vLLM. Run on a "
            "card of your own, or leave grpo.use_vllm out: transformers samples then."
        )
    without_bf16 = [c for c in candidates if c.obstacle == "no bf16"]
    if without_bf16:
        return (
            f"{without_bf16[0].place.label} has no bf16, which this run computes in. Take an L4 or "
            "a newer card, or compute in fp16 or fp32: grpo.fp16 = true or grpo.bf16 = false, and "
            "no bfloat16 weights."
        )
    nearest = min(candidates, key=_miss)
    return (
        f"Nothing fits: {nearest.place.label} misses by {_miss(nearest):.1f} GiB a card even "
        f"sharded over its cards ({_memory(nearest)} each, by formula), and training here holds "
        f"the whole step on each, {nearest.whole_gib:.1f} GiB."
    )


def _over_cap(possible: Sequence[Candidate], budget_usd: float, retries: int) -> str:
    cheapest = min(possible, key=lambda c: c.holding_usd)
    try:
        check_cap(
            cheapest.worst_usd,
            budget_usd,
            cheapest.usd_per_hour,
            retries=retries,
            timeout_s=cheapest.timeout_s,
            expected_s=cheapest.clock.total_s.expected,
            holding_usd=cheapest.holding_usd,
            num_calls=cheapest.calls.num_calls or 1,
        )
    except BudgetError as error:
        return f"{cheapest.place.label}: {error}"
    raise AssertionError("the cheapest was over the cap")


def _is_over(candidate: Candidate, budget_usd: float | None) -> bool:
    return budget_usd is not None and candidate.worst_usd > budget_usd


def _memory(candidate: Candidate) -> str:
    return f"{candidate.memory.peak_gib:.1f} of {candidate.place.capacity_gib:.1f} GiB"


def _miss(candidate: Candidate) -> float:
    return candidate.memory.peak_gib - candidate.place.capacity_gib


def _whole_miss(candidate: Candidate) -> float:
    return candidate.whole_gib - candidate.place.capacity_gib
