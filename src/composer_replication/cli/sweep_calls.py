"""`runs` of a sweep on Modal: its members listed, followed, fetched and ended as one."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from composer_replication.cli.launched_job import cancel_job, end_orphans, fetch_job, follow
from composer_replication.cli.verb import EXIT_FAILED, Answer
from composer_replication.errors import InputError, LaunchError, UnreachableError

if TYPE_CHECKING:
    from composer_replication.launch.records import LaunchRecord

Say = Callable[[str], None]

_STATUSES = ("launching", "running", "failed", "stopped", "cancelled", "killed", "passed")
"""What is open before what is done, and what is not well before what is."""


class SweepRow(TypedDict):
    """A sweep as one: what `runs list --json` says of it."""

    sweep: str
    folder: str
    status: str
    num_launched: int
    num_passed: int
    cost_usd: float | None
    created_s: float


def sweep_folder(members: "Sequence[LaunchRecord]") -> Path:
    """The sweep's own folder, which has `members/`."""
    return Path(members[0].folder).parents[1]


def member_name(record: "LaunchRecord") -> str:
    """As the sweep calls it."""
    return Path(record.folder).name


def sweep_row(members: "Sequence[LaunchRecord]") -> SweepRow:
    """The launched members as one, whose status is the first of `_STATUSES` that one has."""
    statuses = [record.status for record in members]
    costs = [record.cost_usd for record in members if record.cost_usd is not None]
    assert members[0].sweep is not None
    return {
        "sweep": members[0].sweep,
        "folder": str(sweep_folder(members)),
        "status": next(status for status in _STATUSES if status in statuses),
        "num_launched": len(members),
        "num_passed": statuses.count("passed"),
        "cost_usd": sum(costs) if costs else None,
        "created_s": members[0].created_s,
    }


def fetch_sweep(members: "Sequence[LaunchRecord]", say: Say) -> Answer:
    """Bring every member home that is not here yet, and settle what each cost.

    Raises:
        LaunchError: nobody answers.
        InputError: no credentials, or the sweep's own process brings them home.
    """
    from composer_replication.launch import modal_job
    from composer_replication.runs.run_directory import has_passed

    _refuse_carried_out(members)
    modal_job.check_credentials()
    modal_job.check_reachable()
    end_orphans(members)
    for record in members:
        if record.status == "passed" and has_passed(Path(record.folder)):
            continue
        try:
            fetch_job(record, lambda _: None)
        except UnreachableError:
            raise
        except LaunchError as error:
            if record.status != "running":
                say(f"note    {member_name(record)}: {error}")
        except InputError as error:
            say(f"note    {member_name(record)}: {error}")
    return _answer(members, say)


def cancel_sweep(members: "Sequence[LaunchRecord]", say: Say) -> Answer:
    """End every member that runs; those that had ended come home.

    Raises:
        LaunchError: nobody answers.
        InputError: no credentials, nothing runs, or the sweep's own process would send more.
    """
    _refuse_carried_out(members)
    running = [record for record in members if record.status in ("launching", "running")]
    if not running:
        raise InputError(f"No member of {members[0].sweep} is running: there is nothing to end.")
    for record in running:
        try:
            cancel_job(record, lambda _: None)
        except UnreachableError:
            raise
        except LaunchError as error:
            say(f"note    {member_name(record)}: {error}")
    return _answer(members, say)[0], 0


def follow_sweep(members: "Sequence[LaunchRecord]") -> Iterator[str]:
    """What the members print, as it comes, each line after the member's name."""
    from composer_replication.launch import modal_job

    lines: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
    width = max(len(member_name(record)) for record in members)

    def read(record: "LaunchRecord") -> None:
        rest = ""
        try:
            for text in follow(record):
                *whole, rest = (rest + text).split("\n")
                for line in whole:
                    lines.put(f"{member_name(record):<{width}}  {line}\n")
        except Exception as error:
            lines.put(error)
        if rest:
            lines.put(f"{member_name(record):<{width}}  {rest}\n")
        lines.put(None)

    known = [record for record in members if record.call_id is not None]
    modal_job.check_credentials()
    modal_job.check_reachable()
    for record in known:
        # They end with the process, so that Ctrl-C ends the command.
        threading.Thread(target=read, args=(record,), daemon=True).start()
    num_open = len(known)
    while num_open > 0:
        item = lines.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            num_open -= 1
        else:
            yield item


def to_json(members: "Sequence[LaunchRecord]") -> str:
    """What `--json` prints of a sweep."""
    from composer_replication.runs.json_text import to_json_text

    records = [record.model_dump(by_alias=True) for record in members]
    return to_json_text({"schema": 1, **sweep_row(members), "members": records}, indent=2)


def _answer(members: "Sequence[LaunchRecord]", say: Say) -> Answer:
    width = max(len(member_name(record)) for record in members)
    for record in members:
        usd = "-" if record.cost_usd is None else f"{record.cost_usd:.4f} USD"
        say(f"{record.status:<9} {member_name(record):<{width}}  {usd:>12}")
    folder = sweep_folder(members)
    cost = sweep_row(members)["cost_usd"]
    say(f"cost    {cost or 0:.4f} USD for {len(members)} members")
    say(f"files   {folder}/members")
    say(f"next    the sweep's own command with --out {folder} --resume, which ranks what is there")
    has_passed = all(record.status == "passed" for record in members)
    return to_json(members), 0 if has_passed else EXIT_FAILED


def _refuse_carried_out(members: "Sequence[LaunchRecord]") -> None:
    """Two that settle and bring home at once would mix."""
    from composer_replication.launch.records import run_status

    folder = sweep_folder(members)
    if run_status(folder) == "running":
        raise InputError(
            f"The command that carries out {members[0].sweep} still runs: it brings its members "
            f"home to {folder} and would send others. Press Ctrl-C there: it asks whether to "
            "cancel them."
        )
