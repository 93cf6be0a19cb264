"""The evidence as tables: what every arm reached on held-out prompts.

Results are read from one small file a run. Only results of today's settings are counted.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_replication.experiments.evidence_arms import (
    ARMS,
    SETTINGS,
    fingerprint,
    sampling_temperature,
)
from composer_replication.experiments.proportions import proportion

Result = Mapping[str, Any]

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; more than these are
# given the last, which is too wide rather than too narrow.
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Interval = tuple[float, float, float]
"""A mean with the lower and the upper end of its 95 % interval."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm of one task over its seeds.

    Example: `Cell("api_drift", 0, "grpo", (...,)).greedy()` -> `(0.0, 0.0, 0.06)`.
    """

    task: str
    drift: int
    arm: str
    results: tuple[Result, ...]
    """One a seed."""

    def outcomes(self, decoding: str, tools: Iterable[str] | None = None) -> list[list[int]]:
        """Success of every held-out prompt, seed by seed; of these tools only, or of all."""
        return [
            [
                outcome
                for outcome, tool in zip(result[decoding]["outcomes"], result["tools"], strict=True)
                if tools is None or tool in tools
            ]
            for result in self.results
        ]

    def rate(self, decoding: str = "greedy", tools: Iterable[str] | None = None) -> Interval:
        """Success and its 95 % interval: over seeds where three or more differ, else over prompts.

        Prompts of all seeds are pooled; equal seeds have no spread of their own to go by.
        """
        by_seed = self.outcomes(decoding, tools)
        if not any(by_seed):
            return math.nan, math.nan, math.nan
        means = [sum(seed) / len(seed) for seed in by_seed]
        if len(means) >= 3 and len(set(means)) > 1:
            middle, low, high = over_seeds(means)
            return middle, max(0.0, low), min(1.0, high)
        pooled = proportion([outcome for seed in by_seed for outcome in seed])
        return pooled.rate, pooled.low, pooled.high

    def mean(self, *keys: str) -> float | None:
        """The mean over seeds of one number of the results; None where one has none."""
        values = [_at(result, keys) for result in self.results]
        known = [float(value) for value in values if value is not None]
        return statistics.fmean(known) if known and len(known) == len(values) else None


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of two seeds' values or more, with Student's interval."""
    half = _T_95[min(len(values) - 2, len(_T_95) - 1)] * statistics.stdev(values)
    half /= math.sqrt(len(values))
    middle = statistics.fmean(values)
    return middle, middle - half, middle + half


def load_cells(folder: Path) -> tuple[list[Cell], list[str]]:
    """The cells that have a result, in the order of the arms, and the files that were left out.

    Args:
        folder: with `TASK-ARM-sSEED.json` files.
    """
    groups: dict[tuple[str, int, str], list[Result]] = {}
    stale: list[str] = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        task, arm = result["task"], result["arm"]
        if result["settings"] != fingerprint(task, ARMS[arm], SETTINGS[task]):
            stale.append(path.name)
            continue
        groups.setdefault((task, result["drift"], arm), []).append(result)
    order = {arm: number for number, arm in enumerate(ARMS)}
    keys = sorted(groups, key=lambda key: (key[0], key[1], order[key[2]]))
    cells = [
        Cell(*key, tuple(sorted(groups[key], key=lambda result: result["seed"]))) for key in keys
    ]
    return cells, stale


def finished(folder: Path) -> set[str]:
    """Names of the result files that count, without their ending: the runs that are done."""
    _, stale = load_cells(folder)
    return {path.stem for path in folder.glob("*.json") if path.name not in stale}


def table(cells: Sequence[Cell]) -> list[str]:
    """Lines of a Markdown table over the cells of one task and drift."""
    base = next((cell for cell in cells if cell.arm == "base"), None)
    has_rules = any(result["pair_tools"] for cell in cells for result in cell.results)
    temperature = sampling_temperature(SETTINGS[cells[0].task])
    head = ["arm", "seeds", "greedy", f"at T = {temperature:g}"]
    head += ["rules with pairs", "rules without"] if has_rules else []
    head += ["old convention", "nats a token", "sampled tokens"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for cell in cells:
        row = [
            ARMS[cell.arm].title,
            str(len(cell.results)),
            interval_text(cell.rate()),
            interval_text(cell.rate("sampled")),
        ]
        if has_rules:
            covered = cell.results[0]["pair_tools"]
            others = {tool for r in cell.results for tool in r["tools"]} - {*covered}
            row += [_percent(cell.rate(tools=covered)[0]), _percent(cell.rate(tools=others)[0])]
        row += [_share(cell.mean("forgetting", "old_convention"))]
        row += [_change(cell, base, "forgetting", "nats_per_token")]
        row += [_count(cell.mean("generated_tokens"))]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _at(result: Result, keys: Sequence[str]) -> float | None:
    value: Any = result
    for key in keys:
        value = value[key]
    return value


def _change(cell: Cell, base: Cell | None, *keys: str) -> str:
    value = cell.mean(*keys)
    before = None if base is None else base.mean(*keys)
    if value is None:
        return ""
    if before is None or cell.arm == "base":
        return f"{value:.2f}"
    return f"{value:.2f} ({value - before:+.2f})"


def interval_text(rate: Interval) -> str:
    """A rate and its interval in percent."""
    return f"{rate[0]:.0%} ({rate[1]:.0%} to {rate[2]:.0%})"


def rule_table(cells: Sequence[Cell]) -> list[str]:
    """Lines of a Markdown table: greedy success on the prompts of each tool; none without tools.

    Args:
        cells: of one task and drift.
    """
    tools = list(dict.fromkeys(tool for cell in cells for r in cell.results for tool in r["tools"]))
    if not any(tools):
        return []
    covered = cells[0].results[0]["pair_tools"]
    head = ["arm", *(f"`{tool}`{' (pairs)' if tool in covered else ''}" for tool in tools)]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for cell in cells:
        rates = [_percent(cell.rate(tools=[tool])[0]) for tool in tools]
        lines.append(f"| {' | '.join([ARMS[cell.arm].title, *rates])} |")
    return lines


def _percent(rate: float) -> str:
    return "" if math.isnan(rate) else f"{rate:.0%}"


def _share(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.0%}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
