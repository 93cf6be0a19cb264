"""`report`: what finished runs say, side by side."""

import argparse
from pathlib import Path

from composer_replication.cli.verb import JSON, Answer, Argument, Verb
from composer_replication.errors import InputError, nearest

_KINDS = ("planner", "compare")
_WIDTH, _PIPE_WIDTH = 110, 400

_EPILOG = """\
kinds:
  planner RUNS   predicted against measured: seconds of a step, peak of tensors, the whole run
  compare A B    two runs side by side: first-step loss, seconds, memory, dollars

examples:
  composer-replication report planner runs
  composer-replication report compare runs/local runs/remote --json

Writes nothing.

exit codes: 0 done, 2 your input"""


def _report(options: argparse.Namespace) -> Answer:
    from rich.console import Console

    from composer_replication.planner.report_table import print_comparison, print_planner_report
    from composer_replication.planner.run_reports import compare_runs, planner_report

    console = Console()
    # A pipe has no width, and a table that breaks or cuts its lines cannot be read.
    console.width = max(console.width, _WIDTH if console.is_terminal else _PIPE_WIDTH)
    folders: list[Path] = options.folders
    if options.kind == "planner":
        report = planner_report(folders)
        if not options.json:
            print_planner_report(report, console)
        return report.model_dump_json(by_alias=True, indent=2), 0
    if options.kind != "compare":
        raise InputError(
            f"There is no report {options.kind!r}. {nearest(options.kind, _KINDS)} "
            "See 'composer-replication report --help'."
        )
    if len(folders) != 2:
        raise InputError(
            f"report compare was given {len(folders)} folder{'s' * (len(folders) != 1)}; it sets "
            "two runs side by side. Write: composer-replication report compare A B."
        )
    comparison = compare_runs(folders[0], folders[1])
    if not options.json:
        print_comparison(comparison, console)
    return comparison.model_dump_json(by_alias=True, indent=2), 0


REPORT = Verb(
    name="report",
    summary="what finished runs say: predicted against measured, or two side by side",
    purpose="Sets figures of finished runs side by side.",
    epilog=_EPILOG,
    options=(JSON,),
    carry_out=_report,
    argument=Argument("kind", "KIND", is_required=True, kind="text"),
    rest=Argument("folders", "FOLDER", is_required=True),
    computes=False,
)
