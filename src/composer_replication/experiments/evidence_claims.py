"""What the evidence is to show, claim by claim: measured value, interval, and whether it holds.

A claim holds where the whole 95 % interval is on its side of the bound, and does not where all of
it is on the other; an interval with the bound inside leaves it to the mean, and says so. Each is
measured a second time on the seeds that were not looked at before the settings stood.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from composer_replication.experiments.evidence_arms import CHOICE_DRIFTS, FIRST_FRESH_SEED
from composer_replication.experiments.evidence_report import (
    Cell,
    Interval,
    interval_text,
    over_seeds,
)

GRPO_AT_MOST = 0.10
ALL_AT_LEAST = 0.90
LEARNED = 0.50
"""A rule counts as learned from this held-out success on."""
FORGETTING_POINTS = 5.0
TOKENS_SHARE = 0.25

Found = Mapping[tuple[str, str, int], Cell]
"""Cells by task, arm and drift; 0 is the shipped drift."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a claim is judged by.

    Example: `Measured("91% (85% to 97%)", (0.91, 0.85, 0.97), 4)`.
    """

    text: str
    interval: Interval
    num_seeds: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A bound on something that runs measure.

    Example: `CLAIMS[0].measure(found)` -> `Measured("0% (0% to 3%)", (0.0, 0.0, 0.03), 3)`.
    """

    words: str
    bound: float
    side: Literal["at least", "at most"]
    measure: Callable[[Found], Measured | None]
    """None: an arm that it needs has no result."""

    def verdict(self, measured: Measured | None) -> str:
        """`yes`, `by its mean`, `not by its mean`, `no` or `not measured`."""
        if measured is None:
            return "not measured"
        middle, *ends = measured.interval
        is_met = self._is_met(middle)
        if all(self._is_met(end) == is_met for end in ends):
            return "yes" if is_met else "no"
        return "by its mean" if is_met else "not by its mean"

    def _is_met(self, value: float) -> bool:
        return value >= self.bound if self.side == "at least" else value <= self.bound


def claims_table(cells: Sequence[Cell]) -> list[str]:
    """Lines of a Markdown table: every claim of the evidence, measured and judged."""
    every = _found(cells)
    fresh = _found(list(_fresh(cells)))
    lines = [
        "| claim | measured | seeds | holds | fresh seeds alone |",
        "| --- | --- | --- | --- | --- |",
    ]
    for claim in CLAIMS:
        measured, again = claim.measure(every), claim.measure(fresh)
        row = [claim.words, *_texts(measured), claim.verdict(measured)]
        row += [f"{again.text}, {again.num_seeds}" if again else ""]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def untried_drifts(cells: Iterable[Cell]) -> list[Cell]:
    """All three channels under the drifts that the settings were not chosen on, in their order."""
    own = [c for c in cells if (c.task, c.arm) == ("api_drift", "all")]
    return sorted((c for c in own if c.drift not in CHOICE_DRIFTS), key=lambda cell: cell.drift)


def tokens_to_reach(cell: Cell, other: Cell) -> list[float]:
    """Share of the other's sampled tokens at which `cell` first had the other's last score.

    One for each seed that both have; infinite where it never got there.
    """
    shares: list[float] = []
    for result, base in _by_seed(cell, other):
        if not base["curve"]:
            continue
        last = base["curve"][-1]
        reached = [p for p in result["curve"] if p["heldout_success"] >= last["heldout_success"]]
        tokens = reached[0]["generated_tokens"] if reached else math.inf
        shares.append(tokens / last["generated_tokens"])
    return shares


def _found(cells: Sequence[Cell]) -> Found:
    return {(cell.task, cell.arm, cell.drift): cell for cell in cells}


def _fresh(cells: Sequence[Cell]) -> Iterator[Cell]:
    for cell in cells:
        results = tuple(r for r in cell.results if r["seed"] >= FIRST_FRESH_SEED)
        if results:
            yield replace(cell, results=results)


def _texts(measured: Measured | None) -> tuple[str, str]:
    return ("", "") if measured is None else (measured.text, str(measured.num_seeds))


def _by_seed(cell: Cell, other: Cell) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Results of the seeds that both have."""
    others = {result["seed"]: result for result in other.results}
    for result in cell.results:
        if result["seed"] in others:
            yield result, others[result["seed"]]


def _success(arm: str) -> Callable[[Found], Measured | None]:
    """Greedy success of an arm of task A."""

    def measure(found: Found) -> Measured | None:
        cell = found.get(("api_drift", arm, 0))
        return None if cell is None else _of_rate(cell, cell.rate())

    return measure


def _of_rate(cell: Cell, rate: Interval) -> Measured:
    return Measured(interval_text(rate), rate, len(cell.results))


def _from_best_to_worst(values: Sequence[float]) -> Interval:
    """The mean, with the extremes for an interval: of values too few, or infinite, for another."""
    return sum(values) / len(values), min(values), max(values)


def _other_drifts(found: Found) -> Measured | None:
    """The same, each drift that the settings were not chosen on for one value."""
    cells = untried_drifts(found.values())
    if not cells:
        return None
    rates = [cell.rate()[0] for cell in cells]
    each = ", ".join(f"{rate:.0%}" for rate in rates)
    num_seeds = max(len(cell.results) for cell in cells)
    return Measured(f"{each} (by drift)", _from_best_to_worst(rates), num_seeds)


def _success_without_pairs(found: Found) -> Measured | None:
    cell = found.get(("api_drift", "sdpo", 0))
    if cell is None:
        return None
    covered = {tool for result in cell.results for tool in result["pair_tools"]}
    others = {tool for result in cell.results for tool in result["tools"]} - covered
    return _of_rate(cell, cell.rate(tools=others))


def _points_lost(found: Found) -> Measured | None:
    """Old convention, base less all three channels, seed by seed: both have the same prompts."""
    base, everything = found.get(("api_drift", "base", 0)), found.get(("api_drift", "all", 0))
    if base is None or everything is None:
        return None
    lost = [
        100 * (before["forgetting"]["old_convention"] - after["forgetting"]["old_convention"])
        for after, before in _by_seed(everything, base)
    ]
    if not lost:
        return None
    # One seed says nothing of others: its interval is all of the line.
    middle, low, high = over_seeds(lost) if len(lost) > 1 else (lost[0], -math.inf, math.inf)
    text = f"{middle:.0f} points"
    if len(lost) > 1:
        text += f" ({low:.0f} to {high:.0f})"
    return Measured(text, (middle, low, high), len(lost))


def _tokens_share(found: Found) -> Measured | None:
    grpo, everything = found.get(("call_format", "grpo", 0)), found.get(("call_format", "all", 0))
    shares = [] if grpo is None or everything is None else tokens_to_reach(everything, grpo)
    if not shares:
        return None
    each = ", ".join("never" if math.isinf(share) else f"{share:.0%}" for share in shares)
    return Measured(f"{each} (by seed)", _from_best_to_worst(shares), len(shares))


CLAIMS: Sequence[Claim] = (
    Claim(
        f"GRPO alone stays at or under {GRPO_AT_MOST:.0%}",
        GRPO_AT_MOST,
        "at most",
        _success("grpo"),
    ),
    Claim(f"three channels reach {ALL_AT_LEAST:.0%}", ALL_AT_LEAST, "at least", _success("all")),
    Claim("the same on drifts that nothing was chosen on", ALL_AT_LEAST, "at least", _other_drifts),
    Claim(
        f"+SDPO learns rules that no pair covers ({LEARNED:.0%} of their prompts)",
        LEARNED,
        "at least",
        _success_without_pairs,
    ),
    Claim("shuffled hints do not teach", GRPO_AT_MOST, "at most", _success("shuffled_hint")),
    Claim("wrong hints do not teach", GRPO_AT_MOST, "at most", _success("wrong_hint")),
    Claim(
        f"the old convention, when asked for, loses at most {FORGETTING_POINTS:.0f} points",
        FORGETTING_POINTS,
        "at most",
        _points_lost,
    ),
    Claim(
        f"task B: three channels reach GRPO's last score with {TOKENS_SHARE:.0%} of its tokens",
        TOKENS_SHARE,
        "at most",
        _tokens_share,
    ),
)
