"""A sweep planned as a whole: what its members take, which starts first, how many at a time."""

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TextIO

from composer_replication.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from composer_replication.config.run_config import RunConfig
    from composer_replication.experiments.sweep_grid import SweepMember
    from composer_replication.planner.candidate import Candidate
    from composer_replication.planner.placement import Placement
    from composer_replication.planner.places import On
    from composer_replication.planner.plan import Plan

SWEEP_PLAN_SCHEMA = 1

NOTHING_SENT = "next    nothing was sent: the same without --dry-run asks before it spends\n"
"""The end of a dry run on Modal."""


@dataclass(frozen=True, slots=True)
class SweepBill:
    """What a sweep may cost: its dearest member stands for each."""

    candidate: "Candidate"
    """The place of the member that needs the most memory; all members run there."""
    config: "RunConfig"
    """Of a member; its `[modal]` holds for all."""
    num_members: int
    expected_usd: float
    """Of all members, a call each."""
    budget_usd: float | None
    plan: "Plan"
    """Of the member that chooses the card."""

    @property
    def worst_usd(self) -> float:
        """Of all members, or the cap where that is less."""
        worst_usd = self.num_members * self.candidate.worst_usd
        return worst_usd if self.budget_usd is None else min(worst_usd, self.budget_usd)

    def slots(self, asked: int) -> int:
        """Members at a time whose worst cases fit the cap together."""
        if self.budget_usd is None:
            return asked
        return max(min(asked, int(self.budget_usd // self.candidate.worst_usd)), 1)


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What a sweep would do.

    Example: `plan_here(members, asked=4).starts()`.
    """

    members: "list[SweepMember]"
    """Those still to be run, as they were written."""
    candidates: "dict[str, Candidate]"
    """By the name of the member; a model that the formulas do not know has none."""
    num_parallel: int
    bill: SweepBill | None = None
    """None: it runs here, for nothing."""
    placement: "Placement | None" = None
    """Where it would end soonest, for one that runs here; None: not compared, or nowhere."""

    @property
    def planned_s(self) -> dict[str, float]:
        """Expected seconds of each member."""
        return {name: candidate.wall_s for name, candidate in self.candidates.items()}

    @property
    def wall_s(self) -> float | None:
        """Expected seconds of the whole; None where a member's are not known."""
        from composer_replication.launch.pool import planned_wall_s

        if len(self.candidates) < len(self.members):
            return None
        planned_s = self.planned_s
        return planned_wall_s([planned_s[m.name] for m in self.starts()], self.num_parallel)

    @property
    def expected_usd(self) -> float:
        """Of all members together; the cap ends them where that is less."""
        return 0.0 if self.bill is None else min(self.bill.expected_usd, self.bill.worst_usd)

    @property
    def worst_usd(self) -> float:
        """Of all members together, or the cap where that is less."""
        return 0.0 if self.bill is None else self.bill.worst_usd

    def starts(self) -> "list[SweepMember]":
        """The members in the order in which they start."""
        from composer_replication.launch.pool import largest_first

        planned_s = self.planned_s
        return largest_first(self.members, lambda member: planned_s.get(member.name, 0.0))


def distinct_members(members: "Sequence[SweepMember]") -> "dict[str, SweepMember]":
    """One member for each plan: seeds and names change none."""
    return {plan_key(member): member for member in members}


def plan_key(member: "SweepMember") -> str:
    """Equal for members that are planned alike."""
    return member.config.model_dump_json(exclude={"name", "seed"})


def plan_here(members: "list[SweepMember]", *, asked: int, compares: bool = False) -> SweepPlan:
    """The plan on this machine: as many at a time as were asked for and fit its memory.

    Args:
        members: still to be run.
        asked: of them at a time.
        compares: with Modal, too.

    Raises:
        DataError: data that no member could read.
    """
    from datetime import UTC, datetime

    from composer_replication.launch.pool import num_slots
    from composer_replication.planner.local_machine import this_machine
    from composer_replication.planner.placement import place_runs
    from composer_replication.planner.plan import PlanRequest, make_plan
    from composer_replication.planner.prices import current_prices

    machine, prices, today = this_machine(), current_prices(), datetime.now(UTC).date()

    def planned(member: "SweepMember", on: "On") -> "Plan":
        request = PlanRequest(config=member.config, on=on, verb="train")
        return make_plan(request, machine, prices=prices, today=today)

    distinct = distinct_members(members)
    found: dict[str, Candidate] = {}
    for key, member in distinct.items():
        try:
            found[key] = planned(member, "local").candidates[0]
        except (ModelError, ConfigError):
            # What the formulas do not know may well run: its memory is the user's to judge.
            slots = num_slots(asked, num_members=len(members), member_gib=None, free_gib=None)
            return SweepPlan(members, {}, slots)
    largest_key = max(found, key=lambda key: found[key].memory.peak_gib)
    largest = found[largest_key]
    member_gib, free_gib = largest.memory.peak_gib, largest.place.capacity_gib
    slots = num_slots(asked, num_members=len(members), member_gib=member_gib, free_gib=free_gib)
    if not largest.fits:
        sys.stderr.write(
            f"note  a member is planned with {member_gib:.1f} GiB, and there are {free_gib:.1f}: "
            "it may not fit here. `plan` says what would, and --on modal runs it elsewhere.\n"
        )
    elif slots < min(asked, len(members)):
        sys.stderr.write(
            f"note  {slots} at a time instead of {asked}: a member is planned with "
            f"{member_gib:.1f} GiB, and there are {free_gib:.1f}.\n"
        )
    placement = None
    if compares:
        fitting = largest if largest.fits else None
        with contextlib.suppress(ConfigError):
            remote = planned(distinct[largest_key], "modal").chosen
            placement = place_runs(len(members), fitting, remote, budget_usd=None)
    candidates = {m.name: found[plan_key(m)] for m in members}
    return SweepPlan(members, candidates, slots, placement=placement)


def show_sweep(
    plan: SweepPlan,
    options: argparse.Namespace,
    function: Mapping[str, object] | None,
    *,
    num_done: int,
) -> str:
    """The answer of `--dry-run`; without `--json` it is printed as a table, too.

    Args:
        plan: of the sweep.
        options: `json`.
        function: that would be created, each member a call of it; None: none.
        num_done: members that an earlier start has finished.
    """
    from composer_replication.planner.plan_json import candidate_answer
    from composer_replication.runs.json_text import to_json_text

    if not options.json:
        print_sweep(plan, num_done, sys.stdout)
        if function is not None:
            sys.stdout.write(to_json_text({"function": function}, indent=2) + "\n")
            sys.stdout.write(NOTHING_SENT)
    candidates = plan.candidates
    rows = [
        {
            "name": member.name,
            "point": member.point,
            "seed": member.seed,
            "wall_s": _rounded(candidates[member.name].wall_s if candidates else None, 2),
            "expected_usd": _rounded(candidates[member.name].call_usd if candidates else None, 4),
        }
        for member in plan.starts()
    ]
    payload = {
        "schema": SWEEP_PLAN_SCHEMA,
        "num_done": num_done,
        "members": rows,
        "num_parallel": plan.num_parallel,
        "wall_s": _rounded(plan.wall_s, 2),
        "function": function,
        "plan": None
        if plan.bill is None
        else candidate_answer(plan.bill.candidate).model_dump(mode="json"),
        "expected_usd": round(plan.expected_usd, 4),
        "worst_usd": round(plan.worst_usd, 4),
        "placement": None if plan.placement is None else asdict(plan.placement),
    }
    return to_json_text(payload, indent=2)


def print_sweep(plan: SweepPlan, num_done: int, stream: TextIO) -> None:
    """The members as they start, each with its time and dollars, and the whole.

    Args:
        plan: of the sweep.
        num_done: members that an earlier start has finished.
        stream: to write to.
    """
    from composer_replication.planner.duration_text import duration

    where = "here" if plan.bill is None else f"on {plan.bill.candidate.place.label}"
    whole = "" if plan.wall_s is None else f", about {duration(plan.wall_s)} in all"
    to_run = f"{len(plan.members)} members" + (f" ({num_done} more are done)" if num_done else "")
    lines = [f"sweep   {to_run}, {plan.num_parallel} at a time {where}{whole}"]
    width = max((len(member.name) for member in plan.members), default=0)
    for number, member in enumerate(plan.starts(), start=1):
        candidate = plan.candidates.get(member.name)
        known = "" if candidate is None else duration(candidate.wall_s)
        dollars = "" if candidate is None else f"${candidate.call_usd:.2f}"
        lines.append(f"{number:>5}   {member.name:<{width}}  {known:>8}  {dollars:>8}".rstrip())
    if plan.bill is None:
        lines.append("cost    0 USD")
        if plan.placement is not None:
            elsewhere = " --on modal takes it there." if plan.placement.where == "modal" else ""
            lines.append(f"place   {plan.placement.reason}{elsewhere}")
    else:
        lines.append(f"cost    {plan.expected_usd:.2f} USD expected, {_worst(plan.bill)}")
    stream.write("\n".join(lines) + "\n")


def _worst(bill: SweepBill) -> str:
    """The most that the members may cost, and where that comes from."""
    from composer_replication.planner.duration_text import duration

    each = bill.candidate
    attempts = f"{each.num_attempts} attempt{'s' * (each.num_attempts != 1)}"
    worst = (
        f"{bill.worst_usd:.2f} at worst: each member at most {each.worst_usd:.2f}, {attempts} of "
        f"{duration(each.timeout_s)}"
    )
    if bill.budget_usd is None:
        return f"{worst}; --budget USD caps them together"
    return f"{worst}, all of them at most the cap of {bill.budget_usd:g}"


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
