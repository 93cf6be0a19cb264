"""The sweep: every member a run of its own, side by side, and what they found as one table.

Which members are done is read from their own run directories, so that a sweep that is killed at
any instant knows on its return what not to run again.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console

from composer_replication.config.config_keys import changed_keys
from composer_replication.config.loading import dump_config, load_config
from composer_replication.errors import InputError
from composer_replication.experiments.sweep_grid import SweepMember
from composer_replication.experiments.sweep_picture import sweep_page
from composer_replication.experiments.sweep_table import (
    MemberResult,
    SweepReport,
    print_table,
    rank,
    read_member,
)
from composer_replication.launch.job import Job
from composer_replication.launch.local import run_local
from composer_replication.launch.pool import Attempt, largest_first, least_wall_s, run_all
from composer_replication.runs.atomic_files import write_text_atomically
from composer_replication.runs.run_directory import RunDirectory, has_passed
from composer_replication.runs.summary import Check, Summary

_EXIT_STOPPED = 130
"""Of a member that somebody ended."""

REPORT_FILE = "sweep.json"
PICTURE_FILE = "report.html"


class MemberCarrier(Protocol):
    """Where members run: here, or on Modal."""

    def start(self, member: SweepMember, folder: Path, stops: threading.Event) -> int:
        """Carry a member out in its run directory and return the exit code."""
        ...

    def ask_on_interrupt(self) -> None:
        """Ctrl-C: decide what happens to the members that run; `stops` is set after that."""
        ...


@dataclass(frozen=True, slots=True)
class SweepFolders:
    """Where the parts of a sweep lie.

    Example: `SweepFolders(Path("runs/sweep")).member("seed-0")`.
    """

    root: Path

    def member(self, name: str) -> Path:
        """A member's run directory."""
        return self.root / "members" / name

    def config(self, name: str) -> Path:
        """What a member is started with."""
        return self.root / "configs" / f"{name}.toml"

    def log(self, name: str) -> Path:
        """What a member printed, all attempts after one another."""
        return self.root / "logs" / f"{name}.log"


def run_sweep(
    members: Sequence[SweepMember],
    run: RunDirectory,
    console: Console,
    *,
    carrier: MemberCarrier,
    num_parallel: int,
    planned_s: Mapping[str, float],
    billed_usd: Callable[[], float | None] = lambda: None,
) -> Summary:
    """Run the members that are not done, `num_parallel` at a time; rank all of them.

    Args:
        members: in the order of the table.
        run: the sweep's own directory; gets `members/`, `logs/`, `sweep.json`, `report.html`.
        console: shows a line for each attempt, then the table.
        carrier: carries a member out.
        num_parallel: how many at a time.
        planned_s: seconds of each member by its name; the longest starts first.
        billed_usd: what the whole has been billed, where somebody bills it.

    Raises:
        KeyboardInterrupt: after what was running has ended; `sweep.json` holds what is known.
    """
    folders = SweepFolders(run.path)
    for member in members:
        folders.config(member.name).parent.mkdir(exist_ok=True)
        write_text_atomically(folders.config(member.name), dump_config(member.config))
    waiting = members_to_run(members, run.path)
    _say(
        console,
        f"sweep {len(members)} members, {len(members) - len(waiting)} done before, "
        f"{min(num_parallel, max(len(waiting), 1))} at a time",
    )
    walls_s: dict[str, float] = {}
    stops = threading.Event()
    started_s = time.monotonic()

    def note(attempt: Attempt[SweepMember, int]) -> None:
        name = attempt.member.name
        walls_s[name] = walls_s.get(name, 0.0) + attempt.wall_s
        ending = _ending(attempt)
        _say(console, f"  {ending:<8} {name}  {attempt.wall_s:.1f} s")
        if ending != "passed":
            result = read_member(attempt.member, folders.member(name))
            _say(console, f"           {_reason(result)}")

    is_complete = False
    try:
        run_all(
            largest_first(waiting, lambda member: planned_s.get(member.name, 0.0)),
            lambda member, _: carrier.start(member, folders.member(member.name), stops),
            num_parallel=num_parallel,
            # One that somebody ended is not started again.
            has_passed=lambda exit_code: exit_code in (0, _EXIT_STOPPED),
            on_end=note,
            stops=stops,
            on_interrupt=carrier.ask_on_interrupt,
        )
        is_complete = True
    finally:
        report = _report(members, folders, walls_s, num_parallel)
        report.wall_s, report.billed_usd = time.monotonic() - started_s, billed_usd()
        if not is_complete and report.status == "failed":
            report.status = "stopped"
        write_text_atomically(
            run.path / REPORT_FILE, report.model_dump_json(by_alias=True, indent=2) + "\n"
        )
        page = sweep_page(report, f"Sweep {run.path.name}")
        write_text_atomically(run.path / PICTURE_FILE, page)
    return _finish(report, run, console)


def members_to_run(members: Sequence[SweepMember], sweep_folder: Path) -> list[SweepMember]:
    """Those that no earlier start of the sweep has finished."""
    folders = SweepFolders(sweep_folder)
    return [member for member in members if not has_passed(folders.member(member.name))]


class LocalMembers:
    """Each member a process of its own on this machine, its output in `logs/`."""

    def __init__(self, sweep_folder: Path, num_parallel: int) -> None:
        """Members of the sweep in that folder, so many at a time."""
        self._folders = SweepFolders(sweep_folder)
        # Each member would otherwise take every core, and together they would wait for one another.
        threads = max((os.cpu_count() or 1) // num_parallel, 1)
        environment = {"OMP_NUM_THREADS": str(threads)} if num_parallel > 1 else {}
        self._environment = {k: v for k, v in environment.items() if k not in os.environ}

    def start(self, member: SweepMember, folder: Path, stops: threading.Event) -> int:
        """One attempt; the exit code of its process."""
        config, log_path = self._folders.config(member.name), self._folders.log(member.name)
        job = Job(job_id=member.name, verb="train", arguments=(str(config),))
        folder.parent.mkdir(exist_ok=True)
        log_path.parent.mkdir(exist_ok=True)
        with log_path.open("ab") as log:
            return run_local(
                job, folder, output=log, environment=self._environment, stops=stops
            ).exit_code

    def ask_on_interrupt(self) -> None:
        """Processes of this machine end with their sweep."""


def refuse_other_members(run: RunDirectory, members: Sequence[SweepMember]) -> None:
    """A resumed sweep may get more members, but its table holds all, and what it holds compares.

    Raises:
        InputError: the folder holds a member that this sweep does not have, or one that ran with
            other values than it would have now.
    """
    names = {member.name for member in members}
    folder = run.path / "configs"
    strangers = sorted(path.stem for path in folder.glob("*.toml") if path.stem not in names)
    if strangers:
        raise InputError(
            f"{run.path} holds {strangers[0]!r}, which is no member of this sweep. Give the grid "
            "and seeds it was started with (more are fine), or another --out."
        )
    folders = SweepFolders(run.path)
    for member in members:
        if not has_passed(folders.member(member.name)):
            continue
        begun = load_config(folders.member(member.name) / "config.toml", [])
        changed = [
            key for key in changed_keys(begun, member.config, with_length=True) if key != "name"
        ]
        if changed:
            raise InputError(
                f"{member.name} ran with other values of {', '.join(changed)}, and one table "
                f"cannot rank it among members that run with these. Leave {changed[0]} as it was, "
                "or give another --out."
            )


def _report(
    members: Sequence[SweepMember],
    folders: SweepFolders,
    walls_s: dict[str, float],
    num_parallel: int,
) -> SweepReport:
    results = [read_member(member, folders.member(member.name)) for member in members]
    costs = [result.cost_usd for result in results if result.cost_usd is not None]
    return SweepReport(
        status="passed" if all(result.status == "passed" for result in results) else "failed",
        rows=rank(results),
        members=results,
        num_parallel=num_parallel,
        least_wall_s=least_wall_s(walls_s, num_parallel),
        cost_usd=sum(costs) if costs else None,
    )


def _finish(report: SweepReport, run: RunDirectory, console: Console) -> Summary:
    summary = Summary(
        status=report.status,
        checks=[
            Check(
                f"member/{result.name}",
                passed=result.status == "passed",
                value=result.score,
                cause=None if result.status == "passed" else _reason(result),
            )
            for result in report.members
        ],
        total_s=report.wall_s,
        cost_usd=report.cost_usd,
        notes=[f"The table is in {REPORT_FILE}, its picture in {PICTURE_FILE}."],
    )
    run.write_summary(summary)
    num_passed = sum(check.passed for check in summary.checks)
    console.print()
    _say(console, f"{summary.status}  {num_passed} of {len(summary.checks)} members passed")
    print_table(report, console)
    folders = SweepFolders(run.path)
    for result in report.members:
        if result.status != "passed":
            log = folders.log(result.name)
            _say(console, f"{result.status}  {result.name}: {_reason(result)} Its log: {log}")
    if report.billed_usd is not None:
        reckoned = "" if report.cost_usd is None else f"; by their seconds {report.cost_usd:.4f}"
        _say(console, f"bill    {report.billed_usd:.4f} USD for all members so far{reckoned}")
    if report.least_wall_s:
        _say(
            console,
            f"time    {report.wall_s:.1f} s; no schedule of these members is under "
            f"{report.least_wall_s:.1f} s",
        )
    _say(console, f"files   {run.path / REPORT_FILE}, {run.path / PICTURE_FILE}")
    best = next((result for result in report.members if result.point == report.rows[0].point), None)
    if best is not None and report.rows[0].score_mean is not None:
        _say(console, f"next    composer-replication train {best.folder}/config.toml --out DIR")
    return summary


def _reason(result: MemberResult) -> str:
    return (result.error or "It ended without a summary.").splitlines()[0]


def _ending(attempt: Attempt[SweepMember, int]) -> str:
    if attempt.outcome == 0:
        return "passed"
    if attempt.outcome == _EXIT_STOPPED:
        return "stopped"
    return "failed" if attempt.is_last else "retried"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
