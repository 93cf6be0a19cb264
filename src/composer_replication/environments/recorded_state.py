"""One action at a recorded state: judged by the teachers' consensus, an environment or a validator.

No episode is run: the prompt is the state of a trace, the policy acts once, and a *judge* says what
that is worth. G rollouts of such a prompt share the whole state and differ in one action.

    EnvironmentRollouts(RecordedState, rows, max_turns=1)                              # teachers
    EnvironmentRollouts(lambda: RecordedState(environment_judge(ApiDrift)), rows)      # environment
    EnvironmentRollouts(lambda: RecordedState(validator_judge(is_valid)), rows)        # your own
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from composer_replication.environments.action_json import parse_action
from composer_replication.environments.protocol import Observation, TextEnvironment, ToolError
from composer_replication.errors import DataError, shown

Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one action at a recorded state is worth.

    Example: `Verdict(0.0, ToolError("other_call", "Do it otherwise."))`.
    """

    reward: float
    error: ToolError | None = None
    """Set where the action was an error turn; it becomes a hint."""
    content: str = "ok"
    """What the model would have been told."""


Judge = Callable[[Row, str], Verdict]
"""(row without its prompt, action) -> verdict; it never raises on what a model wrote."""


def consensus_judge(row: Row, action: str) -> Verdict:
    """1 for what most teachers did at the state, else 0 with the recorded error.

    Row keys: `teacher_actions`, and of the recorded error `recorded_action`, `error_kind`,
    `error_message`, `error_example` (all text). JSON calls are compared as values.
    """
    counts = Counter(_comparable(text) for text in cast(Sequence[str], row["teacher_actions"]))
    answer = _comparable(action)
    agreed, num_agreed = counts.most_common(1)[0]
    # A tie is no consensus, and a recorded error stays one whoever repeats it.
    is_tie = list(counts.values()).count(num_agreed) > 1
    if answer == agreed and not is_tie and answer != _comparable(str(row["recorded_action"])):
        return Verdict(1.0)
    example = str(row.get("error_example") or "") or None
    is_same = answer == _comparable(str(row["recorded_action"]))
    kind = str(row["error_kind"]) if is_same else _kind_of_other(action)
    return Verdict(0.0, ToolError(kind, str(row["error_message"]), example))


def environment_judge(make: Callable[[], TextEnvironment]) -> Judge:
    """The environment's own reward after the recorded actions and this one.

    Row keys: `episode`, what `reset` takes, and `past_actions`, the texts of the actions before.
    """

    def judge(row: Row, action: str) -> Verdict:
        environment = make()
        environment.reset(**cast(Mapping[str, object], row["episode"]))
        for past in cast(Sequence[str], row["past_actions"]):
            environment._step_text(past)
        observation = environment._step_text(action)
        return Verdict(environment.get_reward(), observation.error, observation.content)

    return judge


def validator_judge(validate: Callable[[Row, str], float | ToolError]) -> Judge:
    """A function of the row and the action: its reward, or the error that the action is."""

    def judge(row: Row, action: str) -> Verdict:
        found = validate(row, action)
        return Verdict(0.0, found) if isinstance(found, ToolError) else Verdict(float(found))

    return judge


class RecordedState:
    """One recorded state at a time; the first action is judged, and the episode is over.

    Also TRL's `environment_factory`, with the one tool `act`.

    Example:
        >>> environment = RecordedState()
        >>> environment.reset(
        ...     teacher_actions=['{"tool": "read", "file": "a"}'],
        ...     recorded_action='{"tool": "read", "path": "a"}',
        ...     error_kind="unknown_key",
        ...     error_message='Use the key "file".',
        ... )
        >>> environment._step_text('{"file": "a", "tool": "read"}').is_done
        True
    """

    def __init__(self, judge: Judge = consensus_judge) -> None:
        """Remember who judges."""
        self._judge = judge

    def reset(self, **row: object) -> None:
        """Take up the state that a row describes; its prompt is what the model sees.

        Args:
            **row: what the judge reads.

        Raises:
            DataError: a key that the teachers' consensus needs is missing or of another type.
        """
        self._row = {key: value for key, value in row.items() if key != "prompt"}
        if self._judge is consensus_judge:
            _check_consensus_row(self._row)
        self._verdict: Verdict | None = None

    def get_reward(self) -> float:
        """What the judge gave for the first action; 0 before it."""
        return 0.0 if self._verdict is None else self._verdict.reward

    def act(self, action: str) -> str:
        """Carry out an action.

        Args:
            action: the whole action as text.

        Returns:
            What came of it.
        """
        observation = self._step_text(action)
        if observation.error is not None:
            raise observation.error
        return observation.content

    def _step_text(self, action: str) -> Observation:
        """Judge the first action; a further one is an error and changes nothing."""
        if self._verdict is not None:
            error = ToolError("episode_over", "The episode is over.")
            return Observation(f"error: {error}", is_done=True, error=error)
        self._verdict = self._judge(self._row, action)
        error = self._verdict.error
        content = self._verdict.content if error is None else f"error: {error}"
        return Observation(content, is_done=True, error=error)


def _comparable(action: str) -> str:
    """A call with its keys in order and its spacing gone; other text as it is."""
    try:
        return json.dumps(parse_action(action), sort_keys=True)
    except ToolError:
        return f"text {action.strip()}"


def _kind_of_other(action: str) -> str:
    try:
        parse_action(action)
    except ToolError as error:
        return error.kind
    return "other_call"


def _check_consensus_row(row: Row) -> None:
    actions = row.get("teacher_actions")
    if (
        not isinstance(actions, list | tuple)
        or not actions
        or not all(isinstance(text, str) and text.strip() for text in actions)
    ):
        raise DataError(
            f"A recorded state has teacher_actions = {shown(actions)}; it must be a list of at "
            "least one action as text. Without teachers, judge by an environment or a validator."
        )
    for key in ("recorded_action", "error_kind", "error_message"):
        if not isinstance(row.get(key), str):
            raise DataError(
                f"A recorded state has {key} = {shown(row.get(key))}; it must be text. "
                "traces.recorded_states writes such rows."
            )
