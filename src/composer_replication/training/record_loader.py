"""Endless shuffled passes over hint sites or pairs, with a random generator of their own.

The order is a function of the seed and the position alone: it neither reads nor moves the global
random state, so a run with both weights at 0 equals TRL's, and a position restores it exactly.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import xxhash

from composer_replication.errors import DataError
from composer_replication.traces.hints import HintSite, hint_site_from_row
from composer_replication.traces.pairs import PreferencePair, pair_from_row

Record = TypeVar("Record")


class RecordLoader(Generic[Record]):
    """Yields every record once a pass, each pass in a new order.

    Attributes:
        position: records taken so far over all ranks; set it to resume.
    """

    def __init__(self, records: Sequence[Record], seed: int) -> None:
        self.records = tuple(records)
        self.seed = seed
        self.position = 0
        # One shuffle a pass, not one a record: a pass may hold 100,000.
        self._pass: tuple[int, list[int]] = (-1, [])

    def take(self, num_records: int, *, rank: int = 0, num_ranks: int = 1) -> list[Record]:
        """The next `num_records` for this rank; every rank moves past all of them."""
        first = self.position + rank * num_records
        self.position += num_records * num_ranks
        return [self._at(index) for index in range(first, first + num_records)]

    def _at(self, index: int) -> Record:
        pass_number, offset = divmod(index, len(self.records))
        if self._pass[0] != pass_number:
            order = list(range(len(self.records)))
            random.Random(f"{self.seed}-{pass_number}").shuffle(order)
            self._pass = (pass_number, order)
        return self.records[self._pass[1][offset]]


def records_fingerprint(records: Iterable[object]) -> str:
    """A hash that changes with any record or their order: a position means nothing without it."""
    digest = xxhash.xxh3_128()
    for record in records:
        digest.update(repr(record).encode())
    return digest.hexdigest()


def hint_sites_from(rows: Sequence[HintSite | Mapping[str, object]]) -> list[HintSite]:
    """Hint sites from records, rows of a dataset, or a mixture.

    Raises:
        DataError: no rows at all, or a row that cannot be used.
    """
    _refuse_empty(rows, "hint_sites", "alpha_sdpo")
    return [
        row if isinstance(row, HintSite) else hint_site_from_row(row, f"hint_sites[{index}]")
        for index, row in enumerate(rows)
    ]


def pairs_from(rows: Sequence[PreferencePair | Mapping[str, object]]) -> list[PreferencePair]:
    """Preference pairs from records, rows of a dataset, or a mixture.

    Raises:
        DataError: no rows at all, or a row that cannot be used.
    """
    _refuse_empty(rows, "pairs", "beta_replay")
    return [
        row if isinstance(row, PreferencePair) else pair_from_row(row, f"pairs[{index}]")
        for index, row in enumerate(rows)
    ]


def _refuse_empty(rows: Sequence[object], name: str, weight: str) -> None:
    if len(rows) == 0:
        raise DataError(
            f"{name} is empty, so its channel could never train. Give at least one record, or "
            f"leave {name} out and set {weight} = 0."
        )
