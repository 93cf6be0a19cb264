"""Modal's prices: a dated table in the package, or newer ones that `plan --refresh` fetched."""

import json
import os
import subprocess
import sys
from datetime import date
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from composer_replication.errors import ConfigError, MissingDependencyError
from composer_replication.planner.hardware import GPUS
from composer_replication.runs.atomic_files import write_text_atomically

OLD_AFTER_DAYS = 90
"""A table older than this is still used, with a warning: prices have moved about once a year."""

_REFRESH_TIMEOUT_S = 90.0
"""Without a network Modal's client gives up after about a minute."""

_RATE_KEYS = {
    name: "gpu_hour_cost_"
    + {"A10": "a10g", "RTX-PRO-6000": "rtx6000"}.get(name, name.lower().replace("-", "_"))
    for name, gpu in GPUS.items()
    if gpu.is_on_modal
}

Usd = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A price, a size or a factor, none of which is negative."""


class PriceTable(BaseModel):
    """What Modal charges, in USD.

    Example:
        >>> shipped_prices().gpu_usd_per_hour["L4"]
        0.8
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    """Version of this layout."""
    as_of: date
    """Day on which the prices were read."""
    source: str
    """Where they were read."""
    gpu_usd_per_hour: dict[str, Usd]
    """By the card's name; all that Modal rents."""
    cpu_core_usd_per_hour: Usd
    """A physical core is two virtual ones."""
    memory_gib_usd_per_hour: Usd
    """Of RAM."""
    volume_gib_usd_per_month: Usd
    """Of stored files beyond `volume_free_gib`."""
    volume_free_gib: Usd
    """Stored without charge."""
    broad_region_factor: Usd
    """Multiplies every rate where a continent is asked for, such as `eu`."""
    narrow_region_factor: Usd
    """Where one region is asked for, such as `us-east`."""
    monthly_credit_usd: Usd
    """Credit of the plan without a fee."""

    @field_validator("gpu_usd_per_hour")
    @classmethod
    def _every_rented_card(cls, rates: dict[str, float]) -> dict[str, float]:
        missing = [name for name in _RATE_KEYS if name not in rates]
        if missing:
            raise ValueError(f"no price of {', '.join(missing)}")
        return rates

    def age_warning(self, today: date) -> str | None:
        """A sentence about a table too old to trust; None while it is not."""
        age_days = (today - self.as_of).days
        if age_days <= OLD_AFTER_DAYS:
            return None
        return (
            f"The prices are of {self.as_of}, {age_days} days old. "
            "Read today's with: composer-replication plan --refresh"
        )


@cache
def shipped_prices() -> PriceTable:
    """The table in the package."""
    text = files("composer_replication.planner").joinpath("modal_prices.json").read_text()
    return PriceTable.model_validate_json(text)


def current_prices() -> PriceTable:
    """The fetched table where it is newer than the shipped one.

    Raises:
        ConfigError: a fetched file that cannot be read.
    """
    shipped, path = shipped_prices(), fetched_prices_path()
    if not path.is_file():
        return shipped
    try:
        fetched = PriceTable.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise ConfigError(
            f"{path} does not hold a price table ({_reason(error)}). Delete it, or write it "
            "again with: composer-replication plan --refresh"
        ) from None
    return fetched if fetched.as_of > shipped.as_of else shipped


def _reason(error: Exception) -> str:
    """Where a table is wrong, in a few words."""
    if not isinstance(error, ValidationError):
        return type(error).__name__
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")


def refresh_prices(today: date) -> PriceTable:
    """Ask Modal for today's rates and keep them; needs the `modal` package and its credentials.

    Raises:
        MissingDependencyError: `modal` is not installed.
        ConfigError: Modal did not answer with rates.
    """
    command = [sys.executable, "-m", "modal", "billing", "rates", "--json"]
    try:
        # The client is asked as a program: this package starts without it.
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_REFRESH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"Modal did not answer within {_REFRESH_TIMEOUT_S:.0f} s. Check the network; without "
            f"--refresh the table of {current_prices().as_of} is used."
        ) from None
    if "No module named" in answer.stderr:
        raise MissingDependencyError(
            "modal is not installed, so its prices cannot be read. pip install modal, or leave "
            f"--refresh out: the table of {current_prices().as_of} is used then."
        )
    if answer.returncode != 0:
        lines = (answer.stderr or answer.stdout).strip().splitlines()
        raise ConfigError(
            f"Modal refused to name its prices: {lines[-1] if lines else 'no reason given'} "
            f"Set it up with `modal setup`; without --refresh the table of "
            f"{current_prices().as_of} is used."
        )
    table = with_rates(shipped_prices(), parse_rates(answer.stdout), today)
    path = fetched_prices_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, table.model_dump_json(by_alias=True, indent=2) + "\n")
    return table


def parse_rates(text: str) -> dict[str, float]:
    """`modal billing rates --json` as numbers in USD an hour; a name without a number is left out.

    Raises:
        ConfigError: not a JSON object of rates.
    """
    try:
        rates = json.loads(text)
        numbers = {
            str(key): float(value)
            for key, value in rates.items()
            if isinstance(value, str | int | float)
        }
    except (ValueError, AttributeError):
        raise ConfigError(
            f"Modal's answer holds no rates: {text.strip()[:80]!r}. Update the modal package, or "
            "leave --refresh out."
        ) from None
    return numbers


def with_rates(table: PriceTable, rates: dict[str, float], today: date) -> PriceTable:
    """The table with the fetched rates in place of its own; what Modal did not name stays.

    Raises:
        ConfigError: the answer names no card of the table.
    """
    gpus = {name: rates[key] for name, key in _RATE_KEYS.items() if rates.get(key, 0) > 0}
    if not gpus:
        raise ConfigError(
            "Modal's answer names no GPU rate that is known here. Update composer-replication, or "
            "leave --refresh out."
        )
    return table.model_copy(
        update={
            "as_of": today,
            "source": "modal billing rates --json",
            "gpu_usd_per_hour": {**table.gpu_usd_per_hour, **gpus},
            "cpu_core_usd_per_hour": rates.get("cpu_hour_cost", table.cpu_core_usd_per_hour),
            "memory_gib_usd_per_hour": rates.get(
                "mem_gib_hour_cost", table.memory_gib_usd_per_hour
            ),
            "volume_gib_usd_per_month": rates.get(
                "volume_storage_gib_month_cost", table.volume_gib_usd_per_month
            ),
        }
    )


def fetched_prices_path() -> Path:
    """`modal_prices.json` in `$COMPOSER_CACHE`, else in `~/.cache/composer-replication`."""
    chosen = os.environ.get("COMPOSER_CACHE")
    root = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "composer-replication"
    return root / "modal_prices.json"
