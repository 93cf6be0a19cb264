"""How sure a success rate and its change are: intervals for few prompts, paired by prompt.

A row of outcomes is one prompt; several samples of a prompt count as its mean, since they are not
independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""Standard deviations of a 95 % interval of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Proportion:
    """A success rate with its 95 % interval.

    Example: `proportion([1.0, 0.0, 1.0, 1.0])` -> rate 0.75, low 0.301, high 0.954.
    """

    rate: float
    low: float
    high: float
    num_prompts: int


@dataclass(frozen=True, slots=True)
class PairedChange:
    """The change of a success rate on the same prompts, with its 95 % interval.

    Example: `paired_change([0.0] * 8, [1.0] * 8)` -> change 1.0, p_value 0.0078.
    """

    change: float
    low: float
    high: float
    p_value: float | None
    """McNemar's exact test, two-sided; None where a prompt has several samples."""
    num_better: int
    num_worse: int


def proportion(outcomes: Sequence[float]) -> Proportion:
    """The mean with Wilson's interval over the prompts, which holds for rates of 0 and 1 too.

    Args:
        outcomes: for each prompt the share of its episodes that succeeded, 0 to 1.

    Source: Wilson 1927. Means of several samples vary less than single ones, so that the interval
    is then wider than it need be.
    """
    num = len(outcomes)
    rate = math.fsum(outcomes) / num
    spread = Z_95 * math.sqrt(rate * (1 - rate) / num + Z_95**2 / (4 * num**2))
    scale = 1 + Z_95**2 / num
    middle = rate + Z_95**2 / (2 * num)
    # At rates of 0 and 1 the bound is exact, and rounding would miss it.
    low = 0.0 if rate == 0 else (middle - spread) / scale
    high = 1.0 if rate == 1 else (middle + spread) / scale
    return Proportion(rate, low, high, num)


def paired_change(before: Sequence[float], after: Sequence[float]) -> PairedChange:
    """The mean change over the same prompts, its interval and McNemar's exact test.

    Args:
        before: outcomes as in `proportion`, in the prompts' order.
        after: of the same prompts.

    Source: Newcombe 1998 (Statistics in Medicine 17:2635), method 10: the limits of both Wilson
    intervals squared and added, less the correlation of the pairs, continuity corrected; McNemar
    1947. For means of several samples the correlation is the covariance over the deviations that
    single outcomes would have: the interval is then wider than it need be, as Wilson's is.
    """
    changes = [now - then for then, now in zip(before, after, strict=True)]
    num_better, num_worse = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    is_binary = set(before) | set(after) <= {0.0, 1.0}
    change = math.fsum(changes) / len(changes)
    low, high = _newcombe(before, after, change)
    return PairedChange(
        change=change,
        low=low,
        high=high,
        p_value=_mcnemar(num_better, num_worse) if is_binary else None,
        num_better=num_better,
        num_worse=num_worse,
    )


def _newcombe(
    before: Sequence[float], after: Sequence[float], change: float
) -> tuple[float, float]:
    first, second = proportion(before), proportion(after)
    num = len(before)
    covariance = math.fsum(x * y for x, y in zip(before, after, strict=True)) / num
    covariance -= first.rate * second.rate
    if covariance > 0:
        covariance = max(0.0, covariance - 1 / (2 * num))
    spread = math.sqrt(first.rate * (1 - first.rate) * second.rate * (1 - second.rate))
    # Of a constant no correlation is known.
    phi = covariance / spread if spread else 0.0

    def width(down: float, up: float) -> float:
        return math.sqrt(max(0.0, down**2 - 2 * phi * down * up + up**2))

    low = change - width(second.rate - second.low, first.high - first.rate)
    high = change + width(second.high - second.rate, first.rate - first.low)
    return max(-1.0, low), min(1.0, high)


def _mcnemar(num_better: int, num_worse: int) -> float:
    """Two-sided probability of so uneven a split of the changed prompts, were each a coin toss."""
    num = num_better + num_worse
    tail = sum(math.comb(num, k) for k in range(min(num_better, num_worse) + 1))
    return min(1.0, 2 * tail / 2**num)
