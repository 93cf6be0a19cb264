"""Makes the data of the fix-the-call task: recorded runs whose error turns the policy does anew.

The runs are those of the API-drift script, written as ATIF trajectories and read back as any
recorded run is, with what three scripted teachers did at each error turn; one of them is sometimes
as wrong as the agent. `fix_call_rows_of` takes traces of your own.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from composer_replication.environments.episode_spec import EpisodeSpec
from composer_replication.errors import DataError
from composer_replication.experiments.api_drift_data import scripted_episode, trajectory
from composer_replication.experiments.task_rows import TaskRows
from composer_replication.traces.atif import trace_from_atif
from composer_replication.traces.error_turns import hint_sites_from_trace, pairs_from_trace
from composer_replication.traces.json_lines import Row
from composer_replication.traces.recorded_states import recorded_state_rows
from composer_replication.traces.trace import Trace

_WRONG_TEACHER_EVERY = 4
"""In every fourth run one teacher does what the agent did."""


@dataclass(frozen=True, slots=True)
class FixCallSpec:
    """Which run is recorded.

    Example: `FixCallSpec(task_seed=3, split="heldout", drift_seed=7)`.
    """

    task_seed: int
    split: str = "train"
    drift_seed: int = 0
    num_teachers: int = 3
    """Teachers asked at each error turn, at least 1."""

    def __post_init__(self) -> None:
        if self.num_teachers < 1:
            raise DataError(
                f"num_teachers is {self.num_teachers}; without one nothing says what would have "
                "been better. Choose at least 1."
            )


def fix_call_rows(specs: Sequence[FixCallSpec]) -> TaskRows:
    """The rows of the recorded runs of one split."""
    episodes = [recorded_run(spec, index) for index, spec in enumerate(specs)]
    return fix_call_rows_of(
        (trace_from_atif(row, f"run {row['session_id']}") for row in episodes), episodes
    )


def fix_call_rows_of(traces: Iterable[Trace], episodes: Sequence[Row] = ()) -> TaskRows:
    """The rows of any traces: states to act at, hint sites and pairs.

    Args:
        traces: with errors and teachers' actions; a state that comes twice is taken once.
        episodes: the trajectories, where they are to be kept.
    """
    rows = TaskRows(prompts=[], hint_sites=[], pairs=[], episodes=list(episodes))
    seen: set[str] = set()
    for trace in traces:
        for row in recorded_state_rows(trace):
            # A rollout finds its row again by its prompt.
            key = json.dumps(row["prompt"])
            if key not in seen:
                seen.add(key)
                rows.prompts.append(row)
        rows.hint_sites.extend(hint_sites_from_trace(trace))
        rows.pairs.extend(pairs_from_trace(trace))
    return rows


def recorded_run(spec: FixCallSpec, index: int) -> Row:
    """The trajectory of one run, with the teachers' actions at its error turns."""
    episode = scripted_episode(
        EpisodeSpec(task_seed=spec.task_seed, split=spec.split, drift_seed=spec.drift_seed), index
    )
    row = trajectory(episode)
    steps = cast(list[Row], row["steps"])[-len(episode.turns) :]
    for step, turn in zip(steps, episode.turns, strict=True):
        notes = cast(Row, cast(Row, step["extra"])["composer"])
        error = turn.observation.error
        if error is not None:
            actions = [turn.chosen] * spec.num_teachers
            if spec.num_teachers > 2 and index % _WRONG_TEACHER_EVERY == 0:
                actions[-1] = turn.action
            notes |= {
                "error_message": error.message,
                "error_example": error.example,
                "teacher_actions": actions,
            }
    return row
