"""What container seconds cost: rates, expected and worst dollars, and what a cap buys.

A card of one's own costs nothing here; electricity is not counted. Everything remote is billed by
the second on what was asked for: cards, CPU cores and RAM, times the region's factor.
"""

import math
import re
from dataclasses import dataclass

from composer_replication.errors import BudgetError, ConfigError, shown
from composer_replication.planner.hardware import check_count, find_gpu
from composer_replication.planner.prices import PriceTable, current_prices

TIMEOUT_FACTOR = 2.0
"""The time-out is this many times the high estimate of wall clock."""

SMOKE_TIMEOUT_S = 1800.0
SMOKE_BUDGET_USD = 5.0
"""Defaults of the smoke, from the founding note."""

MAX_TIMEOUT_S = 24 * 3600.0
"""Modal ends a call after a day; a longer run resumes in another."""

ENDING_S = 30.0
"""Most that an attempt leaves of its time-out for its summary and the last commit."""

_HOUR_S = 3600.0
_MONTH_DAYS = 30.0
_IS_PART = re.compile(r"(north|south|east|west|central)+(-?[0-9]+)?|melbourne|[a-z]+-[0-9]+")
"""`east`, `northeast`, `west-1`, `central1`, and towns with a number, such as `ashburn-1`."""
_BROAD_REGIONS = ("us", "eu", "ap", "uk", "ca", "me", "sa", "af", "jp")


@dataclass(frozen=True, slots=True)
class Cost:
    """The bill of one call.

    Example: 420 s on an L4 with 4 cores and 16 GiB cost 0.093 + 0.022 + 0.015 = 0.130 USD:
        >>> round(estimate("L4", 1, 420, cpu_cores=4, memory_gib=16).usd, 3)
        0.13
    """

    gpu_usd: float
    cpu_usd: float
    memory_usd: float
    usd_per_hour: float
    """All three, the region's factor included."""
    retries_usd: float
    """What retries add if every attempt takes as long."""
    prices_as_of: str

    @property
    def usd(self) -> float:
        """Of one attempt."""
        return self.gpu_usd + self.cpu_usd + self.memory_usd

    @property
    def worst_usd(self) -> float:
        """Of every attempt that may be made."""
        return self.usd + self.retries_usd


def estimate(
    gpu: str,
    num_gpus: int,
    seconds: float,
    *,
    cpu_cores: float,
    memory_gib: float,
    region: str | None = None,
    retries: int = 0,
    prices: PriceTable | None = None,
) -> Cost:
    """The bill for a container that is held for `seconds`.

    Args:
        gpu: a name of the hardware table; a local card costs 0.
        num_gpus: cards in the container.
        seconds: from the container's start to its end, loading included. With the time-out here,
            `worst_usd` is the most that the call can cost.
        cpu_cores: physical cores asked for, or used where that is more.
        memory_gib: RAM asked for, or used where that is more.
        region: None: anywhere; `eu` and such cost more, `us-east` and such still more.
        retries: attempts after the first; the platform's own restarts after a preemption go on
            within the run's deadline.
        prices: None: the newest table at hand.

    Raises:
        ConfigError: an unknown card or region, a count that no machine has or is no whole number,
            a negative number, or what is none.
    """
    if not isinstance(gpu, str):
        raise ConfigError(
            f"gpu is {shown(gpu)}; a bill needs a card's name. Write for example 'L4'."
        )
    card = find_gpu(gpu)
    _check_number("num_gpus", num_gpus, is_count=True)
    check_count(card, num_gpus)
    _check_number("seconds", seconds)
    _check_number("cpu_cores", cpu_cores)
    _check_number("memory_gib", memory_gib)
    _check_number("retries", retries, is_count=True)
    table = prices or current_prices()
    if not card.is_on_modal:
        return Cost(0.0, 0.0, 0.0, 0.0, 0.0, table.as_of.isoformat())
    factor = region_factor(region, table) / _HOUR_S
    rates = (
        num_gpus * table.gpu_usd_per_hour[card.name] * factor,
        cpu_cores * table.cpu_core_usd_per_hour * factor,
        memory_gib * table.memory_gib_usd_per_hour * factor,
    )
    usd = sum(rates) * seconds
    return Cost(
        gpu_usd=rates[0] * seconds,
        cpu_usd=rates[1] * seconds,
        memory_usd=rates[2] * seconds,
        usd_per_hour=sum(rates) * _HOUR_S,
        retries_usd=retries * usd,
        prices_as_of=table.as_of.isoformat(),
    )


def _check_number(name: str, value: object, *, is_count: bool = False) -> None:
    """Refuse what no bill can be reckoned with: callers may be notebooks, which check no types."""
    kind = "whole number" if is_count else "number"
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value >= 0
        and not (is_count and value % 1)
    ):
        return
    raise ConfigError(
        f"{name} is {shown(value)}; a bill needs a finite {kind} of at least 0. "
        f"Give for example {name} = 1."
    )


def region_factor(region: str | None, prices: PriceTable) -> float:
    """What a choice of region multiplies every rate by.

    Raises:
        ConfigError: a name that is no region.
    """
    if region is None:
        return 1.0
    name = region if isinstance(region, str) else ""
    continent, separator, part = name.partition("-")
    if continent in _BROAD_REGIONS and (not separator or _IS_PART.fullmatch(part)):
        return prices.narrow_region_factor if separator else prices.broad_region_factor
    raise ConfigError(
        f"region is {shown(region)}, which is no region. Known: {', '.join(_BROAD_REGIONS)}, or a "
        "part of one such as us-east or eu-west-1. Leave it out: any region is cheapest."
    )


def volume_usd(stored_gib: float, days: float, prices: PriceTable | None = None) -> float:
    """What files in a volume cost; nothing below the free amount."""
    table = prices or current_prices()
    billed_gib = max(stored_gib - table.volume_free_gib, 0.0)
    return billed_gib * table.volume_gib_usd_per_month * days / _MONTH_DAYS


def timeout_s(high_wall_s: float) -> float:
    """When a run that takes far longer than planned is ended: twice the high estimate."""
    return min(float(math.ceil(TIMEOUT_FACTOR * high_wall_s)), MAX_TIMEOUT_S)


def working_s(limit_s: float) -> float:
    """After how many seconds an attempt with that time-out is asked to end."""
    return limit_s - min(ENDING_S, 0.1 * limit_s)


def timeout_for_s(work_s: float) -> int:
    """The shortest time-out, in whole seconds, in which so much is done: see `working_s`."""
    return math.ceil(work_s + min(ENDING_S, work_s / 9))


def affordable_s(budget_usd: float, usd_per_hour: float, *, retries: int = 0) -> float:
    """The longest time-out whose worst case, every retry included, stays within the cap."""
    if usd_per_hour == 0:
        return math.inf
    return budget_usd / usd_per_hour * _HOUR_S / (retries + 1)


def check_budget(budget_usd: float) -> float:
    """`budget_usd` where it is a cap that something could stay under.

    Raises:
        ConfigError: zero, negative or not a number.
    """
    if not math.isfinite(budget_usd):
        raise ConfigError(
            f"--budget is {budget_usd:g} USD; a cap must be a finite number, or it caps nothing. "
            f"Give a positive number such as {SMOKE_BUDGET_USD:g}, or leave it out."
        )
    if budget_usd > 0:
        return budget_usd
    raise ConfigError(
        f"--budget is {budget_usd:g} USD; a cap of 0 or less forbids every run. Give a positive "
        f"number such as {SMOKE_BUDGET_USD:g}, or leave it out. Local runs cost nothing."
    )


def whole_cents(usd: float) -> float:
    """The least cap in whole cents that is not under it."""
    return math.ceil(round(usd * 100, 6)) / 100


def check_cap(
    worst_usd: float,
    budget_usd: float,
    usd_per_hour: float,
    *,
    retries: int,
    timeout_s: float,
    expected_s: float,
    holding_usd: float | None = None,
    num_calls: int = 1,
) -> None:
    """Refuse a run whose worst case is over the cap, with what would hold it to its end.

    Args:
        worst_usd: of every attempt at its time-out.
        budget_usd: the cap.
        usd_per_hour: of the container.
        retries: attempts after the first.
        timeout_s: of each attempt.
        expected_s: of the whole run in one call; no time-out is named that would cut it.
        holding_usd: the cap under which all calls of the run can be made; None: `worst_usd`.
        num_calls: that the run needs with its time-out.

    Raises:
        BudgetError: the numbers, and the ways out.
    """
    if worst_usd <= budget_usd:
        return
    held = "this run" if num_calls == 1 else f"the {num_calls} calls of this run"
    raise BudgetError(
        f"The worst case is {worst_usd:.2f} USD ({usd_per_hour:.2f} USD an hour x {retries + 1} "
        f"attempts x a time-out of {timeout_s:.0f} s), over the cap of {budget_usd:g} USD. "
        f"{_fitting_timeout(budget_usd, usd_per_hour, retries, expected_s)}; a cap of "
        f"{whole_cents(holding_usd or worst_usd):.2f} USD would hold {held}."
    )


def _fitting_timeout(
    budget_usd: float, usd_per_hour: float, retries: int, expected_s: float
) -> str:
    """The longest time-out under the cap in which the run ends, with its retries or without."""
    for num_retries in dict.fromkeys((retries, 0)):
        longest_s = affordable_s(budget_usd, usd_per_hour, retries=num_retries)
        fitting_s = math.floor(min(longest_s, MAX_TIMEOUT_S))
        if working_s(fitting_s) >= expected_s:
            without = "" if num_retries == retries else " with modal.retries = 0"
            return f"A time-out of {fitting_s} s{without} would fit under it"
    return (
        f"No time-out under it holds the run in one call: it is expected to take "
        f"{math.ceil(expected_s)} s"
    )
