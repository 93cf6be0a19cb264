"""The evidence as tables: what every arm reached on held-out prompts, and which claims that bears.

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
GRPO_AT_MOST = 0.10
ALL_AT_LEAST = 0.90
LEARNED = 0.50
"""A rule counts as learned from this held-out success on."""
FORGETTING_POINTS = 5.0
TOKENS_SHARE = 0.25


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

    def rate(
        self, decoding: str = "greedy", tools: Iterable[str] | None = None
    ) -> tuple[float, float, float]:
        """Success and its 95 % interval: over three seeds or more, else over the prompts."""
        by_seed = self.outcomes(decoding, tools)
        if not any(by_seed):
            return math.nan, math.nan, math.nan
        means = [sum(seed) / len(seed) for seed in by_seed]
        if len(means) >= 3:
            half = (
                _T_95[min(len(means) - 2, len(_T_95) - 1)]
                * statistics.stdev(means)
                / math.sqrt(len(means))
            )
            middle = statistics.fmean(means)
            return middle, max(0.0, middle - half), min(1.0, middle + half)
        pooled = proportion([outcome for seed in by_seed for outcome in seed])
        return pooled.rate, pooled.low, pooled.high

    def mean(self, *keys: str) -> float | None:
        """The mean over seeds of one number of the results; None where one has none."""
        values = [_at(result, keys) for result in self.results]
        known = [float(value) for value in values if value is not None]
        return statistics.fmean(known) if known and len(known) == len(values) else None


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
            _interval(cell.rate()),
            _interval(cell.rate("sampled")),
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


def verdicts(cells: Sequence[Cell]) -> list[str]:
    """Lines of a Markdown table: every claim of the issue, what was measured, whether it holds."""
    found = {(cell.task, cell.arm): cell for cell in cells if cell.drift == 0}
    lines = ["| claim | measured | holds |", "| --- | --- | --- |"]
    for claim, measured, holds in (*_task_a(found), *_task_b(found)):
        verdict = "not measured" if holds is None else "yes" if holds else "no"
        lines.append(f"| {claim} | {measured} | {verdict} |")
    return lines


_Found = Mapping[tuple[str, str], Cell]
_Claim = tuple[str, str, bool | None]


def _task_a(found: _Found) -> list[_Claim]:
    cells = {arm: found.get(("api_drift", arm)) for arm in ARMS}
    claims = [
        _bound(f"GRPO alone stays at or under {GRPO_AT_MOST:.0%}", cells["grpo"], GRPO_AT_MOST, -1),
        _bound(f"three channels reach {ALL_AT_LEAST:.0%}", cells["all"], ALL_AT_LEAST, 1),
    ]
    sdpo = cells["sdpo"]
    rate = None if sdpo is None else sdpo.rate(tools=_uncovered(sdpo))[0]
    claims.append(
        (
            f"+SDPO learns rules that no pair covers ({LEARNED:.0%} of their prompts)",
            _share(rate),
            None if rate is None else rate >= LEARNED,
        )
    )
    for arm, words in (("shuffled_hint", "shuffled"), ("wrong_hint", "wrong")):
        claims.append(_bound(f"{words} hints do not teach", cells[arm], GRPO_AT_MOST, -1))
    base, everything = cells["base"], cells["all"]
    lost = None
    if base is not None and everything is not None:
        before = base.mean("forgetting", "old_convention")
        after = everything.mean("forgetting", "old_convention")
        lost = None if before is None or after is None else 100 * (before - after)
    claims.append(
        (
            f"the old convention, when asked for, loses at most {FORGETTING_POINTS:.0f} points",
            "" if lost is None else f"{lost:.0f} points",
            None if lost is None else lost <= FORGETTING_POINTS,
        )
    )
    return claims


def _task_b(found: _Found) -> list[_Claim]:
    grpo, everything = found.get(("call_format", "grpo")), found.get(("call_format", "all"))
    share = None
    if grpo is not None and everything is not None:
        share = tokens_to_reach(everything, grpo)
    measured = "" if grpo is None or everything is None else "never reached"
    if share is not None:
        measured = f"{share:.0%} of its tokens"
    claim = f"task B: three channels reach GRPO's last score with {TOKENS_SHARE:.0%} of its tokens"
    is_known = grpo is not None and everything is not None
    return [(claim, measured, (share or math.inf) <= TOKENS_SHARE if is_known else None)]


def tokens_to_reach(cell: Cell, other: Cell) -> float | None:
    """Share of the other's sampled tokens at which `cell` first had the other's last score.

    The mean over the seeds that both have; None where a seed never got there.
    """
    shares: list[float] = []
    others = {result["seed"]: result for result in other.results}
    for result in cell.results:
        if result["seed"] not in others or not others[result["seed"]]["curve"]:
            continue
        last = others[result["seed"]]["curve"][-1]
        reached = [p for p in result["curve"] if p["heldout_success"] >= last["heldout_success"]]
        if not reached:
            return None
        shares.append(reached[0]["generated_tokens"] / last["generated_tokens"])
    return statistics.fmean(shares) if shares else None


def _bound(claim: str, cell: Cell | None, bound: float, sign: int) -> _Claim:
    if cell is None:
        return claim, "", None
    rate = cell.rate()
    return claim, _interval(rate), sign * rate[0] >= sign * bound


def _uncovered(cell: Cell) -> set[str]:
    covered = {tool for result in cell.results for tool in result["pair_tools"]}
    return {tool for result in cell.results for tool in result["tools"]} - covered


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


def _interval(rate: tuple[float, float, float]) -> str:
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
