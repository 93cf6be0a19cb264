"""An evaluation as a terminal shows it: the answer, then a row for each figure."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from composer_replication.experiments.evaluation_report import (
    EvaluationReport,
    ModelFigures,
    Played,
)
from composer_replication.experiments.proportions import PairedChange, Proportion

_MAX_KINDS = 4


def print_evaluation(report: EvaluationReport, console: Console) -> None:
    """The answer in one sentence; then the model after, the one before, and the change."""
    console.print(Text(_answer(report)), soft_wrap=True)
    console.print(
        Text(
            f"on      {report.data}: {report.num_prompts} prompts, {report.num_samples} samples of "
            f"each at T = {report.temperature:g}; 95 % intervals over prompts"
        ),
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    figures = ["model"] if report.against is None else ["before", "after", "change"]
    table.add_column("figure", no_wrap=True)
    for title in figures:
        # Where the width is short, a list of refusals takes several lines and no name is cut.
        table.add_column(title, overflow="fold", no_wrap=title == "change")
    columns = [_cells(report.model)]
    if report.against is not None:
        columns = [_cells(report.against), *columns, _changes(report)]
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns))
    console.print(table, crop=False)


def _answer(report: EvaluationReport) -> str:
    after = report.model.greedy.success
    if report.change is None or report.against is None:
        return f"success {_rate(after)}  {report.model.label}, greedy"
    change = report.change.greedy
    before = report.against.greedy.success
    verdict = {"better": "better", "worse": "worse", "not shown": "no change shown"}
    return (
        f"{verdict[report.change.direction]}  greedy success {before.rate:.0%} -> {after.rate:.0%} "
        f"({_paired(change)})"
    )


def _cells(model: ModelFigures) -> dict[str, str]:
    cells = {
        "greedy success": _rate(model.greedy.success),
        "sampled success": _rate(model.sampled.success),
        "mean reward, greedy": f"{model.greedy.mean_reward:.2f}",
        "tokens an action": f"{model.greedy.num_tokens / max(1, model.greedy.num_actions):.0f}",
        "refused, greedy": _kinds(model.greedy),
        "nats a token, everyday": f"{model.forgetting.nats_per_token:.3f}",
    }
    if model.greedy.num_failed or model.sampled.num_failed:
        cells["failed environments"] = f"{model.greedy.num_failed} + {model.sampled.num_failed}"
    if model.greedy.num_cut:
        cells["cut off, greedy actions"] = f"{model.greedy.num_cut} of {model.greedy.num_actions}"
    if model.forgetting.old_convention is not None:
        cells["old convention, greedy"] = _rate(model.forgetting.old_convention.success)
    if model.pairs is not None:
        cells["margin of pairs, nats"] = f"{model.pairs.mean_nats:+.2f}"
        cells["pairs preferred"] = _rate(model.pairs.preferred)
    return cells


def _changes(report: EvaluationReport) -> dict[str, str]:
    change = report.change
    if change is None:
        return {}
    shown = {
        "greedy success": _paired(change.greedy),
        "sampled success": _paired(change.sampled),
        "nats a token, everyday": f"{change.nats_per_token:+.3f}",
    }
    if change.old_convention is not None:
        shown["old convention, greedy"] = _paired(change.old_convention)
    if change.pairs_nats is not None:
        shown["margin of pairs, nats"] = f"{change.pairs_nats:+.2f}"
    return shown


def _kinds(result: Played) -> str:
    kinds = list(result.error_kinds.items())
    shown = ", ".join(f"{name} {count}" for name, count in kinds[:_MAX_KINDS])
    rest = sum(count for _, count in kinds[_MAX_KINDS:])
    return (f"{shown}, others {rest}" if rest else shown) or "none"


def _rate(found: Proportion) -> str:
    return f"{found.rate:.0%} [{found.low:.0%}, {found.high:.0%}]"


def _paired(change: PairedChange) -> str:
    test = "" if change.p_value is None else f", p = {_p(change.p_value)}"
    return (
        f"{100 * change.change:+.0f} points [{100 * change.low:+.0f}, {100 * change.high:+.0f}]"
        f"{test}"
    )


def _p(value: float) -> str:
    return f"{value:.1g}" if value >= 1e-4 else "< 1e-4"
