"""`credit/step_000001.jsonl`: how much each channel pushes each token of a step, a line a row.

Credit is minus the derivative of the step's total loss (weights and normalisation included) by the
token's log-prob under the policy: above 0 the step makes the token likelier, below 0 less likely.
One pair gives one line. Texts are of single tokens, so a character that is spread over several
tokens shows as replacement characters.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypedDict, cast

from composer_replication.errors import DataError
from composer_replication.runs.atomic_files import write_text_atomically
from composer_replication.runs.json_text import without_non_finite

CREDIT_SCHEMA = 1


class GrpoCreditRow(TypedDict):
    """A rollout: what its advantage does to each of its tokens.

    Example: `{"schema": 1, "step": 7, "channel": "grpo", "context": "<user>List /src.",
    "token_ids": [504, 2], "tokens": ["ls", "<end>"], "is_sampled": [true, true],
    "policy_logp": [-0.4, -0.1], "advantage": 0.5, "credit": [0.0625, 0.0625]}`
    """

    schema: int
    step: int
    """The optimizer step, from 1, as in `metrics.jsonl`."""
    channel: Literal["grpo"]
    context: str
    """The prompt as the policy saw it, special tokens included."""
    token_ids: list[int]
    """The completion: actions and what the environment wrote between them."""
    tokens: list[str]
    """The text of each token."""
    is_sampled: list[bool]
    """False where the environment wrote the token; its credit is 0."""
    policy_logp: list[float]
    """Log-prob under the policy at the sampling temperature, in nats."""
    advantage: float
    credit: list[float]
    """Through the token's own log-prob in TRL's loss, its KL term included; what an entropy bonus
    or a router's auxiliary loss adds is not in it."""


class SdpoCreditRow(TypedDict):
    """A hint site: where the hinted teacher disagrees with the policy about an action.

    Example: `{"schema": 1, "step": 7, "channel": "sdpo", "source": "trace-3",
    "hint": "Use the key file.", "context": "<user>Read /a.", "token_ids": [1187, 2],
    "tokens": ["path", "<end>"], "policy_logp": [-0.2, -0.1],
    "teacher_minus_policy_logp": [-3.1, 0.0], "divergence": [0.41, 0.01], "loss_weight": 0.05,
    "credit": [-0.031, 0.0]}`
    """

    schema: int
    step: int
    channel: Literal["sdpo"]
    source: str
    """Trace or episode id of the site."""
    hint: str
    """What only the teacher was told."""
    context: str
    """The state as the policy saw it: without the hint."""
    token_ids: list[int]
    """The action, which both scored."""
    tokens: list[str]
    policy_logp: list[float]
    """Log-prob of the taken token at `sdpo.temperature`, in nats."""
    teacher_minus_policy_logp: list[float]
    """The same under the teacher minus that: above 0 the hint makes the token likelier."""
    divergence: list[float]
    """Nats between both distributions, over the vocabulary."""
    loss_weight: float
    """Channel weight over the step's hinted tokens: `divergence` times this, summed over all rows
    of the step, is what SDPO adds to the total loss."""
    credit: list[float | None]
    """By the taken token's log-prob while only its own logit moves; null where its probability is
    1, so that it cannot move."""


class CreditedAction(TypedDict):
    """One side of a pair."""

    token_ids: list[int]
    tokens: list[str]
    policy_logp: list[float]
    """At temperature 1, in nats."""
    credit: list[float]
    """Equal for all tokens of an action, since DPO reads only their sum."""


class DpoCreditRow(TypedDict):
    """A preference pair: how hard both of its actions are pushed apart.

    Example: `{"schema": 1, "step": 7, "channel": "dpo", "source": "trace-3",
    "context": "<user>Read /a.", "pair_weight": 1.0, "margin": 0.2,
    "chosen": {"token_ids": [504], "tokens": ["file"], "policy_logp": [-1.2], "credit": [0.0011]},
    "rejected": {"token_ids": [9], "tokens": ["path"], "policy_logp": [-0.2], "credit": [-0.0011]}}`
    """

    schema: int
    step: int
    channel: Literal["dpo"]
    source: str
    """Trace or episode id of the pair."""
    context: str
    """The state before the action."""
    pair_weight: float
    margin: float
    """`dpo.beta` times the chosen action's gain over the reference minus that of the rejected one,
    in nats; 0 before the first step."""
    chosen: CreditedAction
    rejected: CreditedAction


CreditRow = GrpoCreditRow | SdpoCreditRow | DpoCreditRow


def write_credit(folder: Path, step: int, rows: Iterable[CreditRow]) -> Path:
    """Replace the file of `step`, whole or not at all; figures that are not finite are null."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06d}.jsonl"
    lines = (
        json.dumps(without_non_finite(row), ensure_ascii=False, allow_nan=False) for row in rows
    )
    write_text_atomically(path, "".join(f"{line}\n" for line in lines))
    return path


def read_credit(path: Path) -> list[CreditRow]:
    """The rows of one step.

    Raises:
        DataError: a line that is not a row of this version.
    """
    rows: list[CreditRow] = []
    # Only line feeds end a line here: a token may hold what else Python takes for one.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            schema = row["schema"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}, is not a credit row ({error!r}). Let the step be written "
                "again, or remove the line."
            ) from error
        if schema != CREDIT_SCHEMA:
            raise DataError(
                f"{path}, line {number}, has schema {schema} and this version reads "
                f"{CREDIT_SCHEMA}. Read it with the version that wrote it."
            )
        rows.append(cast(CreditRow, row))
    return rows
