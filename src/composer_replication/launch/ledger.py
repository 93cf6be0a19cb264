"""`Ledger`: what jobs under one cap have spent and may still spend, on disk.

A job reserves its worst case before anything is sent and settles what it cost afterwards. Each
attempt of a job settles under its own name, so settling twice changes nothing and a dollar is
counted once. Whoever crashes in between leaves the reservation standing: the cap holds, at the
price of room that the next `reserve` or `settle` of that job gives back.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from filelock import FileLock

from composer_replication.errors import BudgetError, RunDirectoryError
from composer_replication.runs.atomic_files import write_text_atomically
from composer_replication.runs.json_text import to_json_text

LEDGER_SCHEMA = 1

_CENT_SLACK = 1e-9
"""USD by which sums of floats may miss."""


@dataclass(slots=True)
class JobAccount:
    """One job's dollars.

    Example: `JobAccount(0.5, {"fc-1": 0.12}).usd` -> 0.62.
    """

    reserved_usd: float = 0.0
    """The most that what is running may still cost."""
    spent_usd: dict[str, float] = field(default_factory=dict[str, float])
    """What each attempt cost, by its name."""

    @property
    def usd(self) -> float:
        """What counts against the cap."""
        return self.reserved_usd + sum(self.spent_usd.values())


class Ledger:
    """One file of accounts that several processes may use at once.

    Example:
        >>> ledger = Ledger(Path("runs/sweep/ledger.json"))
        >>> ledger.reserve("a", 1.0, cap_usd=5.0)
        >>> ledger.settle("a", "fc-1", 0.2)
        >>> ledger.total_usd()
        0.2
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        """The file; made by the first reservation."""

    def reserve(self, job_id: str, worst_usd: float, *, cap_usd: float | None) -> None:
        """Set aside what the next attempts of a job may cost, in place of what it had set aside.

        Raises:
            BudgetError: the accounts and this would be over the cap; nothing is reserved.
        """
        with self._locked():
            accounts = self._read()
            account = accounts.setdefault(job_id, JobAccount())
            account.reserved_usd = 0.0
            counted_usd = sum(other.usd for other in accounts.values())
            if cap_usd is not None and counted_usd + worst_usd > cap_usd + _CENT_SLACK:
                raise BudgetError(self._refusal(job_id, worst_usd, counted_usd, cap_usd))
            account.reserved_usd = worst_usd
            self._write(accounts)

    def settle(self, job_id: str, attempt: str, spent_usd: float) -> None:
        """Note what an attempt cost and free what was set aside; again: nothing changes.

        Args:
            job_id: of the job.
            attempt: its name, such as the id of the call; a later figure replaces an earlier one.
            spent_usd: what it cost.
        """
        with self._locked():
            accounts = self._read()
            account = accounts.setdefault(job_id, JobAccount())
            account.reserved_usd = 0.0
            account.spent_usd[attempt] = spent_usd
            self._write(accounts)

    def accounts(self) -> dict[str, JobAccount]:
        """Every job's dollars."""
        with self._locked():
            return self._read()

    def total_usd(self) -> float:
        """What counts against the cap: spent and set aside."""
        return sum(account.usd for account in self.accounts().values())

    def _locked(self) -> FileLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path.with_name(f".{self.path.name}.lock"))

    def _read(self) -> dict[str, JobAccount]:
        if not self.path.exists():
            return {}
        try:
            payload = json.loads(self.path.read_text(encoding="utf-8"))
            if payload["schema"] != LEDGER_SCHEMA:
                raise ValueError(f"schema {payload['schema']}")
            jobs = cast("Mapping[str, Mapping[str, object]]", payload["jobs"])
            return {
                job_id: JobAccount(
                    cast("float", job["reserved_usd"]), cast("dict[str, float]", job["spent_usd"])
                )
                for job_id, job in jobs.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunDirectoryError(
                f"{self.path} is not a ledger that this version reads ({error}), so what its jobs "
                "spent is not known. Name another one with --ledger."
            ) from None

    def _write(self, accounts: Mapping[str, JobAccount]) -> None:
        jobs = {
            job_id: {"reserved_usd": account.reserved_usd, "spent_usd": account.spent_usd}
            for job_id, account in accounts.items()
        }
        text = to_json_text({"schema": LEDGER_SCHEMA, "jobs": jobs}, indent=2)
        write_text_atomically(self.path, text + "\n")

    def _refusal(self, job_id: str, worst_usd: float, counted_usd: float, cap_usd: float) -> str:
        left_usd = max(cap_usd - counted_usd, 0.0)
        return (
            f"{job_id} may cost {worst_usd:.2f} USD, and {left_usd:.2f} of the cap of "
            f"{cap_usd:g} USD is left: {counted_usd:.2f} USD is spent or set aside in {self.path}. "
            "Raise --budget, or wait for what is running: the part it does not use comes back."
        )
