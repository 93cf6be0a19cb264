"""What a model may have lost while it learned a task: general text, and the convention it knew.

Two figures to be compared before and after. *Nats a token* of two dozen everyday replies that ship
with the package, under the model's own chat template. And where the task replaced a convention,
success under the old one *when told so*: the same requests, an environment that kept the old
convention, and a sentence in the prompt that says which one holds.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from composer_replication.experiments.pair_margins import action_logps
from composer_replication.experiments.policy_sampling import evaluating
from composer_replication.traces.json_lines import Row
from composer_replication.traces.pairs import PreferencePair
from composer_replication.traces.trace import messages_from

OLD_CONVENTION_TEXT = "Use the old keys, exactly as in the examples above."
"""Ends the request of an old-convention prompt."""


@dataclass(frozen=True, slots=True)
class TextLoss:
    """How well a model predicts the everyday replies.

    Example: `TextLoss(nats_per_token=1.2, num_tokens=400).perplexity` -> `3.32`.
    """

    nats_per_token: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.nats_per_token)


def text_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, is_bf16: bool = False
) -> TextLoss:
    """Mean loss of the everyday replies over all of their tokens, end of turn included."""
    with evaluating(model, seed=0, is_bf16=is_bf16):
        scored = list(action_logps(model, tokenizer, everyday_replies(), "chosen"))
    num_tokens = sum(count for _, count in scored)
    return TextLoss(-sum(logp for logp, _ in scored) / num_tokens, num_tokens)


def everyday_replies() -> list[PreferencePair]:
    """The replies as the chosen side of pairs, which is what can be scored; the other is unused."""
    folder = resources.files("composer_replication.experiments") / "data"
    rows = map(json.loads, (folder / "forgetting_texts.jsonl").read_text("utf-8").splitlines())
    return [
        PreferencePair(messages_from(row["prompt"]), chosen=row["reply"], rejected="I do not know.")
        for row in rows
    ]


def _old_api_drift(row: Mapping[str, object]) -> Row:
    prompt = [dict(message) for message in cast(Sequence[Mapping[str, str]], row["prompt"])]
    prompt[-1]["content"] += f"\n\n{OLD_CONVENTION_TEXT}"
    return {**row, "prompt": prompt, "num_drifted_tools": 0}


_OLD_CONVENTIONS: Mapping[str, Callable[[Mapping[str, object]], Row]] = MappingProxyType(
    {"api_drift": _old_api_drift}
)


def old_convention_rows(task: str, rows: Sequence[Mapping[str, object]]) -> list[Row]:
    """The task's rows under the convention that it replaced, which each prompt names; or none."""
    convert = _OLD_CONVENTIONS.get(task)
    return [] if convert is None else [convert(row) for row in rows]
