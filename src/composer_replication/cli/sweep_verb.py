"""`sweep`: one configuration at many points, side by side, and what they found as one table."""

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from composer_replication.cli.launching import ON, is_elsewhere
from composer_replication.cli.modal_run import MODAL_OPTIONS
from composer_replication.cli.modal_sweep import modal_members, sweep_bill
from composer_replication.cli.recorded_run import carry_out_in_run
from composer_replication.cli.verb import (
    JSON,
    OUT,
    RESUME,
    SET,
    Answer,
    Argument,
    Option,
    Verb,
    whole_number,
)
from composer_replication.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from composer_replication.experiments.sweep_grid import SweepMember
    from composer_replication.runs.run_directory import RunDirectory
    from composer_replication.runs.summary import Summary

_EPILOG = """\
Writes runs/<name>-sweep/: members/ with a run directory each, logs/, sweep.json (the table),
report.html (the picture). A member that fails is retried once and stops no other. --resume runs
what is not done, and takes a wider grid.

examples:
  composer-replication sweep configs/train_qwen2.5_7b.toml --grid alpha_sdpo=0,0.1 --seeds 3
  composer-replication sweep runs/first/config.toml --grid alpha_sdpo=0,0.05,0.1,0.2 \\
      --grid beta_replay=0,0.05 --parallel 4 --out runs/weights

exit codes: 0 every member passed, 1 one failed twice, 2 your input, 130 Ctrl-C"""


def _sweep(options: argparse.Namespace) -> Answer:
    from composer_replication.config.loading import load_config
    from composer_replication.experiments.sweep_grid import sweep_members

    base = load_config(options.config, options.set)
    base = base.model_copy(update={"name": f"{base.name}-sweep"})
    members = sweep_members(
        options.config,
        options.set,
        grid=options.grid,
        points=options.point,
        num_seeds=whole_number("--seeds", options.seeds, default=1),
    )
    is_remote = is_elsewhere(options) and options.on == "modal"
    asked = whole_number("--parallel", options.parallel, default=len(members) if is_remote else 1)
    bill = sweep_bill(options, members) if is_remote else None
    num_parallel = _slots(asked, members) if bill is None else bill.slots(asked)
    answers: list[str] = []

    def run_it(run: "RunDirectory", console: "Console") -> "Summary":
        from composer_replication.experiments.sweep import (
            REPORT_FILE,
            local_member,
            refuse_other_members,
            run_sweep,
        )

        refuse_other_members(run, members)
        carrier = (
            contextlib.nullcontext(local_member(run.path, num_parallel))
            if bill is None
            else modal_members(options, bill, run.path, num_parallel)
        )
        summary: Summary | None = None
        # Modal's client takes Ctrl-C for the wish to detach and would let it end in its own block.
        with carrier as start, contextlib.suppress(KeyboardInterrupt):
            summary = run_sweep(members, run, console, start=start, num_parallel=num_parallel)
        if summary is None:
            raise KeyboardInterrupt
        answers.append((run.path / REPORT_FILE).read_text(encoding="utf-8").rstrip())
        return summary

    text, code = carry_out_in_run(base, options, run_it)
    return answers[0] if answers else text, code


def _slots(asked: int, members: "Sequence[SweepMember]") -> int:
    """As many at a time as were asked for and fit the memory here, by the plan of the largest."""
    from datetime import UTC, datetime

    from composer_replication.launch.pool import num_slots
    from composer_replication.planner.local_machine import this_machine
    from composer_replication.planner.plan import PlanRequest, make_plan
    from composer_replication.planner.prices import current_prices

    if asked == 1:
        return 1
    largest_gib, free_gib, today = 0.0, None, datetime.now(UTC).date()
    for member in {m.config.model_dump_json(exclude={"name", "seed"}): m for m in members}.values():
        request = PlanRequest(config=member.config, on="local", verb="train")
        try:
            plan = make_plan(request, this_machine(), prices=current_prices(), today=today)
        except ModelError:
            # A family that the formulas do not know: its memory is the user's to judge.
            return num_slots(asked, num_members=len(members), member_gib=None, free_gib=None)
        largest_gib = max(largest_gib, plan.candidates[0].memory.peak_gib)
        free_gib = plan.candidates[0].place.capacity_gib
    slots = num_slots(asked, num_members=len(members), member_gib=largest_gib, free_gib=free_gib)
    if slots < min(asked, len(members)):
        sys.stderr.write(
            f"note  {slots} at a time instead of {asked}: a member is planned with "
            f"{largest_gib:.1f} GiB, and there are {free_gib:.1f}.\n"
        )
    return slots


SWEEP = Verb(
    name="sweep",
    summary="many runs of one configuration, side by side, and their ranked table",
    purpose="Runs CONFIG.toml at every point of a grid or a list, and ranks what came out.",
    epilog=_EPILOG,
    options=(
        Option("--grid", "KEY=V1,V2", "one axis; every combination of axes is run", "repeated"),
        Option("--point", "KEY=V,KEY=V", "one point of a list, in place of --grid", "repeated"),
        Option("--seeds", "N", "runs of each point, from the configuration's seed on; default 1"),
        Option(
            "--parallel", "N", "members at a time, as far as memory allows; default 1, on modal all"
        ),
        SET,
        OUT,
        RESUME,
        JSON,
        ON,
        *(option for option in MODAL_OPTIONS if option.flag not in ("--dry-run", "--detach")),
    ),
    carry_out=_sweep,
    argument=Argument("config", "CONFIG.toml", is_required=True),
    computes=False,
)
