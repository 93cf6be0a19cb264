"""JSON as other tools read it: a figure that is nan or infinite is null, never a bare NaN."""

import json
import math
from collections.abc import Mapping, Sequence


def to_json_text(payload: object, *, indent: int | None = None) -> str:
    """`payload` as strict JSON; tuples become arrays and non-finite floats null.

    Raises:
        TypeError: a value that JSON cannot hold.
    """
    return json.dumps(without_non_finite(payload), indent=indent, allow_nan=False)


def without_non_finite(value: object) -> object:
    """The same value with tuples as lists and None for every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [without_non_finite(inner) for inner in value]
    return value
