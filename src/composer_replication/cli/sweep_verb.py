"""`sweep`: one configuration at many points, side by side, and what they found as one table."""

import argparse
import contextlib
from typing import TYPE_CHECKING

from composer_replication.cli.launching import ON, is_elsewhere
from composer_replication.cli.modal_run import MODAL_OPTIONS
from composer_replication.cli.modal_sweep import (
    asks_for_sweep,
    modal_members,
    plan_sweep_on_modal,
    sweep_billed_usd,
    sweep_function,
)
from composer_replication.cli.recorded_run import RUNS_FOLDER, carry_out_in_run
from composer_replication.cli.sweep_plan import SweepPlan, plan_here, show_sweep
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

if TYPE_CHECKING:
    from rich.console import Console

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
  composer-replication sweep configs/train_qwen2.5_7b.toml --seeds 4 --on modal --dry-run

exit codes: 0 every member passed, 1 one failed twice, 2 your input, 130 Ctrl-C"""


def _sweep(options: argparse.Namespace) -> Answer:
    from composer_replication.config.loading import load_config
    from composer_replication.experiments.sweep import members_to_run
    from composer_replication.experiments.sweep_grid import sweep_members
    from composer_replication.planner.placement import MAX_CONTAINERS
    from composer_replication.runs.run_folders import latest_folder

    base = load_config(options.config, options.set)
    base = base.model_copy(update={"name": f"{base.name}-sweep"})
    members = sweep_members(
        options.config,
        options.set,
        grid=options.grid,
        points=options.point,
        num_seeds=whole_number("--seeds", options.seeds, default=1),
    )
    is_remote = is_elsewhere(options, may_dry_run=True) and options.on == "modal"
    if options.resume and options.out is None:
        options.out = latest_folder(RUNS_FOLDER, base.name)
    folder, function = options.out or RUNS_FOLDER / base.name, None
    waiting = members_to_run(members, folder) if options.resume else members
    at_once = min(len(members), MAX_CONTAINERS) if is_remote else 1
    asked = whole_number("--parallel", options.parallel, default=at_once)
    plan = SweepPlan([], {}, 1)
    if waiting:
        plan = (
            plan_sweep_on_modal(options, waiting, asked=asked)
            if is_remote
            else plan_here(waiting, asked=asked, compares=options.dry_run)
        )
    bill, num_parallel, num_done = plan.bill, plan.num_parallel, len(members) - len(waiting)
    if options.dry_run:
        if bill is not None:
            function = sweep_function(options, bill, folder, num_parallel)[1].to_payload()
        return show_sweep(plan, options, function, num_done=num_done), 0
    if bill is not None and not asks_for_sweep(options, plan, num_done=num_done):
        return "{}", 0
    answers: list[str] = []

    def run_it(run: "RunDirectory", console: "Console") -> "Summary":
        from composer_replication.experiments.sweep import (
            REPORT_FILE,
            LocalMembers,
            refuse_other_members,
            run_sweep,
        )

        refuse_other_members(run, members)
        carrier = (
            contextlib.nullcontext(LocalMembers(run.path, num_parallel))
            if bill is None
            else modal_members(options, bill, run.path, num_parallel)
        )
        summary: Summary | None = None
        # Modal's client takes Ctrl-C for the wish to detach and would let it end in its own block.
        with carrier as carried, contextlib.suppress(KeyboardInterrupt):
            summary = run_sweep(
                members,
                run,
                console,
                carrier=carried,
                num_parallel=num_parallel,
                planned_s=plan.planned_s,
                billed_usd=lambda: sweep_billed_usd(run.path) if is_remote else None,
            )
        if summary is None:
            raise KeyboardInterrupt
        answers.append((run.path / REPORT_FILE).read_text(encoding="utf-8").rstrip())
        return summary

    text, code = carry_out_in_run(base, options, run_it)
    return answers[0] if answers else text, code


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
            "--parallel",
            "N",
            "members at a time, as far as memory allows; default 1, on modal 10",
        ),
        SET,
        OUT,
        RESUME,
        JSON,
        ON,
        *(option for option in MODAL_OPTIONS if option.flag not in ("--dry-run", "--detach")),
        Option("--dry-run", None, "print the members as they would start; runs nothing", "switch"),
    ),
    carry_out=_sweep,
    argument=Argument("config", "CONFIG.toml", is_required=True),
    computes=False,
)
