"""`EvaluationReport`: what an evaluation found, as `evaluation.json` and `--json` hold it."""

import json
from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic.dataclasses import dataclass

from composer_replication.experiments.evaluate import EvaluationResult
from composer_replication.experiments.proportions import PairedChange, Proportion, paired_change

EVALUATION_SCHEMA = 1
MAX_P_VALUE = 0.05
_CONFIG = ConfigDict(use_attribute_docstrings=True)

Direction = Literal["better", "worse", "not shown"]


@dataclass(frozen=True, config=_CONFIG)
class Played:
    """The episodes of one model under one decoding.

    Example: `report.model.greedy.success.rate` -> `0.85`.
    """

    success: Proportion
    """Exact success over the prompts, with its 95 % interval (Wilson)."""
    mean_reward: float
    """Of the graded reward."""
    error_kinds: dict[str, int]
    """How many actions the environment refused, by the kind of error, most frequent first."""
    num_episodes: int
    num_failed: int
    """Episodes whose environment failed; they count as not succeeded."""
    num_actions: int
    num_tokens: int
    """Sampled by the model."""
    outcomes: list[float]
    """For each prompt the share of its episodes that succeeded."""
    num_cut: int = 0
    """Actions that reached their token limit before they ended."""


@dataclass(frozen=True, config=_CONFIG)
class Margin:
    """Which action of the held-out preference pairs the model prefers.

    Example: `report.model.pairs.mean_nats` -> `3.1`.
    """

    mean_nats: float
    """Mean of log p(chosen) - log p(rejected), each summed over its tokens."""
    preferred: Proportion
    """Pairs whose chosen action is the likelier one."""
    num_pairs: int


@dataclass(frozen=True, config=_CONFIG)
class Forgetting:
    """What a model may have lost while it learned the task; compare it with the model before.

    Example: `report.model.forgetting.nats_per_token` -> `1.21`.
    """

    nats_per_token: float
    """Loss on everyday replies that ship with the package."""
    num_tokens: int
    old_convention: Played | None
    """Success under the convention that the task replaced, where a prompt asks for it; null where
    the task replaced none."""


@dataclass(frozen=True, config=_CONFIG)
class ModelFigures:
    """All that was measured of one model.

    Example: `report.against.label` -> `"SmolLM2-135M-Instruct (embedded)"`.
    """

    given: str
    """As the user named it."""
    label: str
    greedy: Played
    sampled: Played
    pairs: Margin | None
    """Null where the data has no pairs."""
    forgetting: Forgetting
    seconds: float
    """Load and all measurements."""
    load_seconds: float | None = None
    """Of these the load; null where it was not measured."""


@dataclass(frozen=True, config=_CONFIG)
class Change:
    """From the model before to the model after, on the same prompts.

    Example: `report.change.greedy.low` -> `0.62`.
    """

    greedy: PairedChange
    sampled: PairedChange
    pairs_nats: float | None
    """Change of the mean margin; null where the data has no pairs."""
    nats_per_token: float
    """Of the everyday replies; above 0 the model predicts them less well."""
    old_convention: PairedChange | None
    direction: Direction
    """Of greedy success: `better` or `worse` where McNemar's exact test is under 5 %."""


class EvaluationReport(BaseModel):
    """One model on held-out episodes, and the change from another where one was given.

    Example: `EvaluationReport.model_validate_json(Path("evaluation.json").read_text())`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: Literal[1] = Field(default=EVALUATION_SCHEMA, alias="schema")
    """Version of this layout."""
    task: str
    """Environment that was played."""
    data: str
    """Where the prompts come from."""
    num_prompts: int
    num_samples: int
    """Sampled episodes of each prompt."""
    temperature: float
    """Of the sampled episodes."""
    seed: int
    """Of the sampling."""
    model: ModelFigures
    against: ModelFigures | None = None
    """The model before; null where none was given."""
    change: Change | None = None
    device: str
    versions: dict[str, str]
    total_s: float

    def to_json(self) -> str:
        """As `evaluation.json` holds it."""
        return self.model_dump_json(by_alias=True, indent=2)

    @classmethod
    def of(cls, model: ModelFigures, against: ModelFigures | None, **facts: object) -> Self:
        """The report of one or two models.

        Args:
            model: after.
            against: before.
            facts: the other fields.
        """
        change = None if against is None else change_of(against, model)
        return cls(model=model, against=against, change=change, **facts)  # pyright: ignore[reportArgumentType]


def played(result: EvaluationResult) -> Played:
    """The figures of played episodes."""
    return Played(
        success=result.success,
        mean_reward=result.mean_reward,
        error_kinds=result.error_kinds,
        num_episodes=len(result.episodes),
        num_failed=result.num_failed,
        num_actions=result.num_actions,
        num_tokens=result.num_tokens,
        outcomes=result.outcomes(),
        num_cut=result.num_cut,
    )


def change_of(before: ModelFigures, after: ModelFigures) -> Change:
    """What changed on the same prompts, each change with its interval."""
    greedy = _paired(before.greedy, after.greedy)
    old = before.forgetting.old_convention, after.forgetting.old_convention
    pairs = before.pairs, after.pairs
    return Change(
        greedy=greedy,
        sampled=_paired(before.sampled, after.sampled),
        pairs_nats=pairs[1].mean_nats - pairs[0].mean_nats if pairs[0] and pairs[1] else None,
        nats_per_token=after.forgetting.nats_per_token - before.forgetting.nats_per_token,
        old_convention=_paired(old[0], old[1]) if old[0] and old[1] else None,
        direction=_direction(greedy),
    )


def evaluation_json_schema() -> str:
    """The JSON schema of `evaluation.json`."""
    return json.dumps(EvaluationReport.model_json_schema(by_alias=True), indent=2) + "\n"


def episode_rows(prompts: Sequence[Mapping[str, object]], result: EvaluationResult) -> list[str]:
    """A JSON line for each episode: what was asked, said and answered."""
    return [
        json.dumps(
            {
                "decoding": result.decoding,
                "row": episode.row,
                "reward": episode.reward,
                "error_kinds": episode.error_kinds,
                "failure": episode.failure or None,
                "prompt": prompts[episode.row]["prompt"],
                "turns": episode.turns,
            },
            ensure_ascii=False,
        )
        for episode in result.episodes
    ]


def _direction(change: PairedChange) -> Direction:
    # Greedy outcomes are 0 or 1, so that the test is always there.
    if change.p_value is None or change.p_value >= MAX_P_VALUE:
        return "not shown"
    return "better" if change.num_better > change.num_worse else "worse"


def _paired(before: Played, after: Played) -> PairedChange:
    return paired_change(before.outcomes, after.outcomes)
