"""The reports of `run_reports.py` as a terminal shows them."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from composer_replication.planner.run_reports import PlannerReport, Prediction, RunComparison

_TITLES = {
    "step_s": ("step", "s"),
    "tensor_gib": ("tensors", "GiB"),
    "wall_s": ("whole run", "s"),
}
"""What a reader calls each figure, and its unit."""


def print_planner_report(report: PlannerReport, console: Console) -> None:
    """The median errors first, then a row for each run."""
    shown = ", ".join(
        f"{_TITLES[name][0]} {_percent(error)}"
        for name, error in report.median_absolute_error.items()
    )
    of = "one run" if len(report.runs) == 1 else f"median of {len(report.runs)} runs"
    console.print(Text(f"error   {shown} ({of})"), soft_wrap=True)
    figures = (f"{name}, {unit}" for name, unit in _TITLES.values())
    table = _table("run", "device", "model", *figures, "planned for a step", "held")
    for run in report.runs:
        cells = [_pair(each) for each in (run.step_s, run.tensor_gib, run.wall_s)]
        low, high = run.planned_range_s
        between = f"{_number(low)} to {_number(high)} s"
        held = "yes" if run.is_in_range else "no"
        table.add_row(run.run, run.device, run.model, *cells, between, held)
    console.print(table, crop=False)
    console.print(
        Text(
            "each    predicted / measured (error: -50% is half of what it took); held: the step's "
            "median is within what was planned for it"
        ),
        soft_wrap=True,
    )


def print_comparison(report: RunComparison, console: Console) -> None:
    """Which runs, then a row for each figure."""
    for name, facts in report.runs.items():
        known = ", ".join(str(fact) for fact in facts.values() if fact is not None)
        console.print(Text(f"{name}       {known}"), soft_wrap=True)
    table = _table("figure", "a", "b", "b / a")
    for figure in report.figures:
        table.add_row(figure.name, _number(figure.a), _number(figure.b), _number(figure.ratio))
    console.print(table, crop=False)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title, no_wrap=True)
    return table


def _pair(prediction: Prediction) -> str:
    return (
        f"{_number(prediction.predicted)} / {_number(prediction.measured)} "
        f"({_percent(prediction.error, signed=True)})"
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _percent(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "unknown"
    return f"{value:+.0%}" if signed else f"{value:.0%}"
