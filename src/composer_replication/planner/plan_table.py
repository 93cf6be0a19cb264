"""A plan as a reader decides by it: the answer, the table, and the next command."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from composer_replication.planner.candidate import Candidate
from composer_replication.planner.duration_text import duration
from composer_replication.planner.plan import Plan
from composer_replication.planner.solving import Solved
from composer_replication.planner.wall_clock import num_steps


@dataclass(frozen=True, slots=True)
class NextOptions:
    """What a plan was made with and a run of it has to be told.

    Example: `NextOptions(["lora.r=8"], budget_usd=5.0)`.
    """

    overrides: Sequence[str]
    """`KEY=VALUE` of every `--set`."""
    budget_usd: float | None
    """The cap that was given."""
    gpu: str | None = None
    """The card that was asked for, as it was written: `H100!` pins it."""


def print_plan(
    plan: Plan,
    console: Console,
    *,
    config_path: Path | None,
    solved: list[Solved],
    next_options: NextOptions | None = None,
) -> None:
    """Print the plan.

    Args:
        plan: to print.
        console: to print on.
        config_path: of the configuration, for the next command.
        solved: what `--solve` found; empty where it was not asked for.
        next_options: that the next command takes along; None: it is being carried out already.
    """

    def line(title: str, text: str) -> None:
        console.print(Text(f"{title:<8}{text}"), soft_wrap=True)

    chosen = plan.chosen
    if chosen is None:
        line("run", "nowhere")
    else:
        low, expected, high = chosen.step_s
        count = num_steps(chosen.shape, chosen.step_s)
        line(
            "run",
            f"{chosen.place.label}, {chosen.place.where}: "
            f"{chosen.memory.peak_gib:.1f} of {chosen.place.capacity_gib:.1f} GiB; "
            f"{count} {_unit(chosen)}{'' if count == 1 else 's'} of {duration(expected)} "
            f"({duration(low)} to {duration(high)}); "
            f"{duration(chosen.wall_s)}; {_dollars(chosen)}",
        )
    line("why", plan.decision.reason)
    if plan.cheaper_fit is not None:
        line("cheaper", plan.cheaper_fit)
    for each in solved:
        line("solved", each.text)
    console.print(_table(plan), crop=False)
    for warning in plan.warnings:
        line("note", warning)
    cap = "" if plan.budget_usd is None else f"; the cap on it is {plan.budget_usd:g}"
    line("prices", f"of {plan.prices_as_of}, USD; worst is every attempt at its time-out{cap}")
    if chosen is not None and next_options is not None:
        place = chosen.place
        where = f"on a machine with {place.name}: " if place.is_assumed else ""
        line("next", where + _next_command(chosen, config_path, next_options))


def _table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title, justify in (
        ("", "left"),
        ("where", "left"),
        ("gpu", "left"),
        ("fits", "left"),
        ("GiB", "right"),
        ("of", "right"),
        (_unit(plan.candidates[0]), "right"),
        ("wall", "right"),
        ("usd", "right"),
        ("worst", "right"),
    ):
        table.add_column(title, justify=justify, no_wrap=True)  # pyright: ignore[reportArgumentType]
    for candidate in plan.candidates:
        is_chosen = candidate is plan.chosen
        style = "bold" if is_chosen else "" if candidate.is_launchable else "dim"
        table.add_row(*_cells(candidate, is_chosen=is_chosen, plan=plan), style=style)
    return table


def _cells(candidate: Candidate, *, is_chosen: bool, plan: Plan) -> list[str]:
    is_remote = candidate.place.where == "modal"
    return [
        "->" if is_chosen else "",
        candidate.place.where,
        candidate.place.label,
        _verdict(candidate, plan.budget_usd),
        f"{candidate.memory.peak_gib:.1f}",
        f"{candidate.place.capacity_gib:.1f}",
        duration(candidate.step_s.expected),
        duration(candidate.wall_s),
        f"${candidate.expected_usd:.2f}" if is_remote else "$0",
        f"${candidate.worst_usd:.2f}" if is_remote else "$0",
    ]


def _verdict(candidate: Candidate, budget_usd: float | None) -> str:
    """Whether it can run there; otherwise what forbids it, in two words."""
    if candidate.is_launchable:
        is_over = budget_usd is not None and candidate.worst_usd > budget_usd
        return "over cap" if is_over else "yes"
    if candidate.obstacle is not None and (candidate.fits or not candidate.is_sharded):
        return candidate.obstacle
    return f"misses {candidate.memory.peak_gib - candidate.place.capacity_gib:.1f}"


def _unit(candidate: Candidate) -> str:
    """What the seconds are of."""
    return "model" if candidate.shape.verb == "evaluate" else "step"


def _dollars(candidate: Candidate) -> str:
    if candidate.place.where == "local":
        return "0 USD"
    expected = f"{candidate.expected_usd:.2f} USD expected"
    if candidate.ends_in_one_call:
        return f"{expected}, {candidate.worst_usd:.2f} at worst"
    return (
        f"{expected} to its end, at worst {candidate.worst_usd:.2f} for this call, the first of "
        f"{candidate.calls.num_calls}"
    )


def _next_command(chosen: Candidate, config_path: Path | None, options: NextOptions) -> str:
    """What does as it was planned, quoted for a shell."""
    words = ["composer-replication", chosen.shape.verb]
    if config_path is not None:
        words.append(str(config_path))
    elif chosen.shape.verb == "train":
        # It takes a file, which may hold nothing but what `--set` says here.
        words.append("CONFIG.toml")
    words += [word for override in options.overrides for word in ("--set", override)]
    if chosen.place.where == "modal":
        words += ["--on", "modal", "--gpu", options.gpu or chosen.place.label]
        words += [] if options.budget_usd is None else ["--budget", f"{options.budget_usd:g}"]
    elif chosen.place.num_gpus > 1:
        words += ["--on", "local"]
    return shlex.join(words)
