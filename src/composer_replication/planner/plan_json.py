"""What `plan --json` prints, as models, and its published JSON schema."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from composer_replication.planner.candidate import Candidate
from composer_replication.planner.plan import Plan
from composer_replication.planner.solving import Solved

PLAN_SCHEMA = 1


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class CandidateAnswer(_Answer):
    """One place."""

    where: Literal["local", "modal"]
    """This machine, or a container on Modal."""
    gpu: str
    """The card's name; `cpu` on a machine without one."""
    num_gpus: int
    """Cards in one machine; 0 for a CPU."""
    fits: bool
    """Whether `peak_gib` is at most `capacity_gib`."""
    obstacle: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """`FSDP only`, `no bf16`, `no vLLM`, `vLLM share` or `time-out` (no call of it reaches a
    checkpoint): cannot be run there, whether it fits or not; else left out."""
    peak_gib: float
    """The most on one card, the device's own share included."""
    capacity_gib: float
    """What the driver reports as usable; for a CPU the machine's memory."""
    terms_gib: dict[str, float]
    """They add up to `peak_gib`: weights, teacher, optimizer, gradients that accumulate, the phase
    of the step with the most, and the device's share."""
    step_s: tuple[float, float, float]
    """Seconds of an optimizer step, or of one model of an evaluation: low, expected, high."""
    step_terms_s: dict[str, float]
    """Expected seconds of rollout, teacher, train and other."""
    wall_s: float
    """Expected seconds from the command to its end, in all calls that its time-out makes it need;
    where that forbids it, without a time-out."""
    expected_usd: float
    """Of `wall_s`; 0 for a local run."""
    worst_usd: float
    """Every attempt at its time-out: what one call may cost. Less than `expected_usd` where that
    call ends before the run does."""


class SolvedAnswer(_Answer):
    """What `--solve` found in one place."""

    where: Literal["local", "modal"]
    """As of a candidate."""
    gpu: str
    """As of a candidate."""
    num_gpus: int
    """As of a candidate."""
    key: str
    """The setting."""
    value: int | None
    """Its largest value that fits; null where none does."""


class PlanAnswer(_Answer):
    """A plan."""

    schema_version: Literal[1] = Field(default=PLAN_SCHEMA, alias="schema")
    """Version of this layout."""
    chosen: CandidateAnswer | None
    """Where to run; null where nothing fits or everything is over the cap."""
    candidates: list[CandidateAnswer]
    """Every place that was looked at."""
    reason: str
    """One sentence that names what binds."""
    cheaper_fit: str | None
    """The smallest change after which the next cheaper place fits; null where there is none."""
    prices_as_of: str
    """Day on which Modal's prices were read."""
    warnings: list[str]
    """What a reader must know to believe the figures."""
    solved: list[SolvedAnswer] | None = None
    """With `--solve` alone."""


def plan_json(plan: Plan, solved: list[Solved]) -> str:
    """The plan as `--json` prints it."""
    chosen = plan.chosen
    answer = PlanAnswer(
        chosen=None if chosen is None else candidate_answer(chosen),
        candidates=[candidate_answer(candidate) for candidate in plan.candidates],
        reason=plan.decision.reason,
        cheaper_fit=plan.cheaper_fit,
        prices_as_of=plan.prices_as_of,
        warnings=plan.warnings,
        solved=[_solved_answer(each) for each in solved] or None,
    )
    exclude = None if solved else {"solved"}
    return answer.model_dump_json(by_alias=True, indent=2, exclude=exclude)


def plan_json_schema() -> dict[str, JsonValue]:
    """The JSON schema of `plan --json`, published as `plan_schema.json` beside this module."""
    return PlanAnswer.model_json_schema(by_alias=True, mode="serialization")


def candidate_answer(candidate: Candidate) -> CandidateAnswer:
    """A candidate with its figures rounded to what they are worth."""
    memory, place = candidate.memory, candidate.place
    low, expected, high = (round(value, 4) for value in candidate.step_s)
    return CandidateAnswer(
        where=place.where,
        gpu=place.name,
        num_gpus=place.num_gpus,
        fits=candidate.fits,
        obstacle=candidate.obstacle,
        peak_gib=round(memory.peak_gib, 4),
        capacity_gib=round(place.capacity_gib, 4),
        terms_gib={name: round(value, 4) for name, value in memory.terms_gib.items()},
        step_s=(low, expected, high),
        step_terms_s={name: round(term.expected, 4) for name, term in candidate.terms_s.items()},
        wall_s=round(candidate.wall_s, 2),
        expected_usd=round(candidate.expected_usd, 4),
        worst_usd=round(candidate.worst_usd, 4),
    )


def _solved_answer(solved: Solved) -> SolvedAnswer:
    place = solved.candidate.place
    return SolvedAnswer(
        where=place.where,
        gpu=place.name,
        num_gpus=place.num_gpus,
        key=solved.key,
        value=solved.value,
    )
