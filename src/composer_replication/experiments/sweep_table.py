"""What a sweep found: one row a point, ranked, with mean and spread over its seeds."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from rich.console import Console

from composer_replication.experiments.sweep_grid import SweepMember
from composer_replication.runs.run_directory import SUMMARY_FILE
from composer_replication.runs.summary import Summary

SCORE_SHARE = 0.25
"""The last part of a run whose rewards are averaged into its score."""

Figure = float | None
ScoredBy = Literal["heldout success", "training reward"]


class MemberResult(BaseModel):
    """One member as its run directory tells it.

    Example:
        >>> MemberResult(name="seed-0", point={}, seed=0, status="passed", folder="members/seed-0")
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: str
    """Of its folder in `members/`."""
    point: dict[str, str]
    """The keys that vary."""
    seed: int
    """Of the run."""
    status: Literal["passed", "failed", "stopped", "missing"]
    """`missing`: it has not run."""
    folder: str
    """Its run directory."""
    score: Figure = None
    """Mean training reward over the last quarter of the steps; null: no reward was logged."""
    heldout_success: Figure = None
    """Held-out success after the last step; null: `[evaluation]` did not measure it."""
    channels: dict[str, Figure] = Field(default_factory=dict[str, Figure])
    """Last loss of each channel."""
    median_step_s: Figure = None
    """Median seconds of a step."""
    peak_gib: Figure = None
    """Peak memory in GiB."""
    wall_s: Figure = None
    """Seconds of the whole run."""
    cost_usd: Figure = None
    """What it cost; null where nothing was billed."""
    error: str | None = None
    """Why it did not end well."""


class SweepRow(BaseModel):
    """One point over its seeds.

    Example:
        >>> rank([result]).rows[0].score_mean
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    rank: int
    """1 has the highest mean score; points without a score come last."""
    point: dict[str, str]
    """The keys that vary."""
    num_passed: int
    """Seeds whose run passed."""
    num_seeds: int
    """Seeds in all."""
    scored_by: ScoredBy
    """What the score is: held-out success where every run that passed has it."""
    score_mean: Figure
    """Over the seeds that passed."""
    score_spread: Figure
    """Sample standard deviation over them; null for fewer than two."""
    channels: dict[str, Figure]
    """Mean last loss of each channel."""
    median_step_s: Figure
    """Mean over the seeds."""
    peak_gib: Figure
    """The highest of them."""
    cost_usd: Figure
    """The sum of them."""


class SweepReport(BaseModel):
    """A sweep's answer, as `sweep.json` and `--json` hold it.

    Example:
        >>> SweepReport(status="passed", rows=[], members=[])
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    """Version of this layout."""
    status: Literal["passed", "failed", "stopped"]
    """`failed`: at least one member did, twice."""
    rows: list[SweepRow]
    """The points, the best first."""
    members: list[MemberResult]
    """Every run."""
    num_parallel: int = 1
    """Members that ran at a time."""
    wall_s: Figure = None
    """Seconds from the first start to the last end, of this call."""
    least_wall_s: Figure = None
    """The longest member, or all of them shared out evenly: no schedule is shorter."""
    cost_usd: Figure = None
    """Of all members, by their seconds; null where nothing was billed."""
    billed_usd: Figure = None
    """Modal's bill for all of them, where it is there yet."""


def read_member(member: SweepMember, folder: Path) -> MemberResult:
    """What a member left behind; `missing` where it left no summary."""
    result = MemberResult(
        name=member.name,
        point=member.point,
        seed=member.seed,
        status="missing",
        folder=str(folder),
    )
    try:
        text = (folder / SUMMARY_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return result
    try:
        summary = Summary.model_validate_json(text)
    except ValidationError:
        problem = f"{folder / SUMMARY_FILE} is of another version or damaged."
        return result.model_copy(update={"status": "failed", "error": problem})
    failed = [check.cause for check in summary.checks if not check.passed]
    return result.model_copy(
        update={
            "status": summary.status,
            "score": _last_rewards(folder / "metrics.jsonl"),
            "heldout_success": summary.heldout.last if summary.heldout else None,
            "channels": {n: figures.get("loss_last") for n, figures in summary.channels.items()},
            "median_step_s": summary.median_step_s,
            "peak_gib": summary.peak_gib,
            "wall_s": summary.total_s,
            "cost_usd": summary.cost_usd,
            "error": summary.error or next(iter(failed), None),
        }
    )


def rank(results: Sequence[MemberResult]) -> list[SweepRow]:
    """One row a point, the highest mean score first."""
    groups: dict[tuple[tuple[str, str], ...], list[MemberResult]] = {}
    for result in results:
        groups.setdefault(tuple(result.point.items()), []).append(result)
    # Some members' training rewards cannot be ranked among others' held-out success.
    passed = [result for result in results if result.status == "passed"]
    has_heldout = bool(passed) and all(r.heldout_success is not None for r in passed)
    scored_by: ScoredBy = "heldout success" if has_heldout else "training reward"
    rows = [_row(dict(point), members, scored_by) for point, members in groups.items()]
    rows.sort(key=lambda row: (row.score_mean is None, -(row.score_mean or 0.0)))
    return [row.model_copy(update={"rank": number}) for number, row in enumerate(rows, 1)]


def print_table(report: SweepReport, console: Console) -> None:
    """The ranked points."""
    keys = list(dict.fromkeys(key for row in report.rows for key in row.point))
    channels = list(dict.fromkeys(name for row in report.rows for name in row.channels))
    titles = [
        *("#", *keys, report.rows[0].scored_by if report.rows else "score", "spread", "seeds"),
        *(f"loss/{name}" for name in channels),
        *("step s", "GiB", "USD"),
    ]
    lines = [titles, *(_table_line(row, keys, channels) for row in report.rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        console.print("  ".join(cells), highlight=False, soft_wrap=True)


def _table_line(row: SweepRow, keys: Sequence[str], channels: Sequence[str]) -> list[str]:
    return [
        str(row.rank),
        *(row.point.get(key, "base") for key in keys),
        _cell(row.score_mean, ".4f"),
        _cell(row.score_spread, ".4f"),
        f"{row.num_passed}/{row.num_seeds}",
        *(_cell(row.channels.get(name), ".3g") for name in channels),
        _cell(row.median_step_s, ".2f"),
        _cell(row.peak_gib, ".2f"),
        _cell(row.cost_usd, ".2f"),
    ]


def sweep_json_schema() -> dict[str, JsonValue]:
    """The JSON schema of `sweep.json`, published as `sweep_schema.json` beside this module."""
    return SweepReport.model_json_schema(by_alias=True, mode="serialization")


def _row(point: dict[str, str], members: Sequence[MemberResult], scored_by: ScoredBy) -> SweepRow:
    passed = [member for member in members if member.status == "passed"]
    is_heldout = scored_by == "heldout success"
    found = [member.heldout_success if is_heldout else member.score for member in passed]
    scores = [score for score in found if score is not None]
    names = dict.fromkeys(name for member in passed for name in member.channels)
    peaks = [member.peak_gib for member in passed if member.peak_gib is not None]
    # What a failed member cost was paid too.
    costs = [member.cost_usd for member in members if member.cost_usd is not None]
    return SweepRow(
        rank=0,
        point=point,
        num_passed=len(passed),
        num_seeds=len(members),
        scored_by=scored_by,
        score_mean=statistics.fmean(scores) if scores else None,
        score_spread=statistics.stdev(scores) if len(scores) > 1 else None,
        channels={name: _mean([member.channels.get(name) for member in passed]) for name in names},
        median_step_s=_mean([member.median_step_s for member in passed]),
        peak_gib=max(peaks, default=None),
        cost_usd=sum(costs) if costs else None,
    )


def _last_rewards(path: Path) -> Figure:
    """Mean of the logged rewards of the last quarter of the steps."""
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rewards = [row["reward"] for row in rows if isinstance(row.get("reward"), int | float)]
    if not rewards:
        return None
    return statistics.fmean(rewards[-max(1, round(len(rewards) * SCORE_SHARE)) :])


def _mean(figures: Sequence[Figure]) -> Figure:
    known = [figure for figure in figures if figure is not None]
    return statistics.fmean(known) if known else None


def _cell(figure: Figure, form: str) -> str:
    return "-" if figure is None else format(figure, form)
