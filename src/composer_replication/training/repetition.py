"""How much sampled text repeats itself: the share of its n-grams that it had said before."""

from collections.abc import Mapping, Sequence

from torch import Tensor

NGRAM_TOKENS = 4
"""Shorter ones come back in any text; a JSON call of 40 tokens has none that comes back."""


def repeated_share(spans: Sequence[Sequence[int]]) -> float:
    """Of all n-grams of the spans, those that came earlier in the same span.

    Args:
        spans: token ids that the model sampled in one piece, a turn each.

    Returns:
        0 for text without repetition, or too short for one; near 1 for a loop.
    """
    total = repeated = 0
    for span in spans:
        ngrams = [tuple(span[i : i + NGRAM_TOKENS]) for i in range(len(span) - NGRAM_TOKENS + 1)]
        total += len(ngrams)
        repeated += len(ngrams) - len(set(ngrams))
    return repeated / total if total else 0.0


def mean_repetition(generation: Mapping[str, Tensor]) -> float:
    """Mean of `repeated_share` over the rollouts of a generation on this rank.

    Args:
        generation: TRL's `completion_ids`, `completion_mask` and, where an environment wrote into
            the completions, `tool_mask`; all [B, T].
    """
    mask_BT = generation["completion_mask"]
    if "tool_mask" in generation:
        mask_BT = mask_BT * generation["tool_mask"]
    rows = zip(generation["completion_ids"].tolist(), mask_BT.tolist(), strict=True)
    shares = [repeated_share(_spans(ids, mask)) for ids, mask in rows]
    return sum(shares) / max(1, len(shares))


def _spans(ids: Sequence[int], mask: Sequence[int]) -> list[list[int]]:
    """The runs of sampled tokens: an environment's answer ends one."""
    spans: list[list[int]] = [[]]
    for token, is_sampled in zip(ids, mask, strict=True):
        if is_sampled:
            spans[-1].append(token)
        elif spans[-1]:
            spans.append([])
    return spans
