"""The API-drift environment: a small repository whose tools left the convention a model expects.

The model answers a request with one JSON call a turn; a refused call costs its turn and gets a
structured error. Reward, as a ladder on the *first* action plus completion (`GRADES`):

    0.1  the first action is one JSON object
    0.1  ... it calls a tool of the plan
    0.1  ... with the right target, under the old or today's key
    0.3  ... and is accepted as the plan's first call: no drift violation
    0.4  the request was carried out within the turn limit, at whichever turn

Repeating calls, harmless calls and many objects in one action therefore earn nothing, and an
accepted call that changes anything else than what was asked ends the episode without the 0.4.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from composer_replication.environments.action_json import parse_action
from composer_replication.environments.api_drift_rules import (
    PATH_KEYS,
    TOOL_KEYS,
    drift_from_seed,
)
from composer_replication.environments.api_drift_tasks import task_from_seed
from composer_replication.environments.episode_spec import spec_from_row
from composer_replication.environments.protocol import Observation, ToolError
from composer_replication.environments.simulated_repository import SimulatedRepository
from composer_replication.errors import DataError

GRADES = {"is_json": 0.1, "is_tool": 0.1, "is_target": 0.1, "is_clean": 0.3, "is_completed": 0.4}
"""What each rung adds to the reward; they sum to 1."""

ERROR_KINDS = (
    "not_json",
    "unknown_tool",
    "unknown_key",
    "missing_key",
    "wrong_type",
    "missing_flag",
    "relative_path",
    "bad_value",
    "not_read",
    "not_found",
    "episode_over",
)
"""Every kind of `ToolError` that this environment raises."""

# Arguments of an example that the demonstrations, which show one tool, do not have.
_FILLERS = {"path": "x.txt", "to": "y", "text": "x", "mode": "quick"}
_CHANGING_TOOLS = frozenset({"write", "edit", "delete", "move"})


@dataclass(slots=True)
class Progress:
    """Which rungs of the reward an episode has reached."""

    is_json: bool = False
    is_tool: bool = False
    is_target: bool = False
    is_clean: bool = False
    is_completed: bool = False

    def reward(self) -> float:
        """The sum of the reached rungs, from 0 to 1."""
        reached = [GRADES[name] for name, is_reached in asdict(self).items() if is_reached]
        return round(sum(reached), 6)


class ApiDrift:
    """One episode at a time; `reset` with a row of `prompts.jsonl` before anything else.

    Also TRL's `environment_factory`: every public method but `reset` and `get_reward` is a tool.
    Their documented keys are the old convention, on purpose; today's keys go in `arguments`.

    Example:
        >>> environment = ApiDrift()
        >>> environment.reset(task_seed=0)
        >>> environment._step_text('{"tool": "read", "path": "app/query.py"}').error.kind
        'unknown_key'
    """

    def reset(self, **row: object) -> None:
        """Start the episode that a row describes; the prompt is already in the row.

        Args:
            **row: the fields of `EpisodeSpec`, and `prompt`, which must fit the seed.

        Raises:
            DataError: a field that is missing, unknown, of the wrong type, or a foreign prompt.
        """
        spec = spec_from_row(row)
        self._spec = spec
        self._drift = drift_from_seed(spec.drift_seed, spec.num_drifted_tools)
        self._task = task_from_seed(spec.task_seed, spec.split)
        if row.get("prompt") is not None and row["prompt"] != self._task.prompt():
            raise DataError(
                f"The prompt of task_seed {spec.task_seed}, split {spec.split!r}, is not the one "
                "this version makes. Make the data again with examples/make_task_data.py."
            )
        self._steps = self._task.steps(self._drift)
        self._max_turns = len(self._steps) + spec.num_spare_turns
        self._num_turns = 0
        self._is_over = False
        self._progress = Progress()
        self._files = SimulatedRepository(self._task.files)

    def get_reward(self) -> float:
        """The reward of the episode so far, from 0 to 1; see the module's table."""
        return self._progress.reward()

    def read(self, **arguments: str | bool) -> str:
        """Read a file of the repository.

        Args:
            arguments: path, the file to read.

        Returns:
            The text of the file.
        """
        return self._call_tool("read", arguments)

    def write(self, **arguments: str | bool) -> str:
        """Write a text to a file, which need not exist.

        Args:
            arguments: path, the file to write; text, what to write.

        Returns:
            A confirmation.
        """
        return self._call_tool("write", arguments)

    def edit(self, **arguments: str | bool) -> str:
        """Add a text to the end of a file.

        Args:
            arguments: path, the file to edit; text, what to add.

        Returns:
            A confirmation.
        """
        return self._call_tool("edit", arguments)

    def list(self, **arguments: str | bool) -> str:
        """List the files under a folder.

        Args:
            arguments: path, the folder to list.

        Returns:
            The names of the files.
        """
        return self._call_tool("list", arguments)

    def search(self, **arguments: str | bool) -> str:
        """Search the repository for a text.

        Args:
            arguments: text, what to search for.

        Returns:
            The files that hold the text.
        """
        return self._call_tool("search", arguments)

    def test(self, **arguments: str | bool) -> str:
        """Run the tests in a file.

        Args:
            arguments: path, the file with the tests; mode, quick or full.

        Returns:
            The result of the tests.
        """
        return self._call_tool("test", arguments)

    def delete(self, **arguments: str | bool) -> str:
        """Delete a file.

        Args:
            arguments: path, the file to delete.

        Returns:
            A confirmation.
        """
        return self._call_tool("delete", arguments)

    def move(self, **arguments: str | bool) -> str:
        """Move a file to another folder.

        Args:
            arguments: path, the file to move; to, the folder.

        Returns:
            A confirmation.
        """
        return self._call_tool("move", arguments)

    def _step_text(self, action: str) -> Observation:
        """Parse and carry out one action; never raises on what a model wrote."""
        try:
            self._start_turn()
            content = self._carry_out(self._parsed(action))
            return Observation(content, self._is_over)
        except ToolError as error:
            text = str(error) if self._spec.is_example_shown else error.message
            return Observation(f"error: {text}", self._is_over, error)

    def _call_tool(self, tool: str, arguments: Mapping[str, object]) -> str:
        """A call that came as a function call; its error shows the example only where allowed."""
        # Models that follow the schema literally nest the keys under `arguments`.
        nested = arguments.get("arguments")
        flat = nested if isinstance(nested, dict) and len(arguments) == 1 else arguments
        try:
            self._start_turn()
            return self._carry_out({**flat, "tool": tool})
        except ToolError as error:
            if self._spec.is_example_shown:
                raise
            raise ToolError(error.kind, error.message) from error

    def _start_turn(self) -> None:
        """Spend a turn, whatever comes of it."""
        if self._is_over:
            raise ToolError("episode_over", "The episode is over.")
        self._num_turns += 1
        self._is_over = self._num_turns == self._max_turns

    def _parsed(self, action: str) -> dict[str, object]:
        try:
            return parse_action(action)
        except ToolError as error:
            raise self._refusal(error.kind, error.message) from error

    def _carry_out(self, call: Mapping[str, object]) -> str:
        if self._num_turns == 1:
            self._grade_first(call)
        tool = call.get("tool")
        if not isinstance(tool, str) or tool not in TOOL_KEYS:
            raise self._refusal("unknown_tool", f'Use the tool "{self._next_tool()}".')
        arguments = {key: value for key, value in call.items() if key != "tool"}
        try:
            accepted = {"tool": tool} | self._drift.accept(tool, arguments)
        except ToolError as error:
            raise self._refusal(error.kind, error.message, tool) from error
        if self._drift.needs_read_first(tool) and accepted["path"] not in self._files.read_paths:
            raise self._refusal("not_read", 'Use the tool "read" first.', "read")
        try:
            content = self._files.run(accepted)
        except ToolError as error:
            raise ToolError(error.kind, error.message, None, self._demonstrations()) from error
        self._grade_accepted(accepted)
        return content

    def _refusal(self, kind: str, message: str, tool: str = "") -> ToolError:
        """The error with its example: today's call of the tool, on a demonstration's arguments.

        Measured on SmolLM2-135M: made-up arguments such as x.txt are copied into the answer
        (P(right target) 0.05), those of a demonstration are known to be another request's (0.3).
        """
        example = self._example(tool or self._next_tool(), self._task.demos[-1][1])
        return ToolError(kind, message, example, self._demonstrations())

    def _demonstrations(self) -> tuple[tuple[str, str], ...]:
        """For a hint: the prompt's last requests, each with the call that answers it today.

        The call is of the tool that the plan wants next, whichever the model called.
        """
        demos = self._task.demos[len(self._task.demos) - self._spec.num_hint_demos :]
        tool = self._next_tool()
        return tuple((request, self._example(tool, call)) for request, call in demos)

    def _example(self, tool: str, old_call: Mapping[str, str]) -> str:
        """Today's call of a tool on the arguments of an old call."""
        values = {**_FILLERS, **old_call}
        call = {"tool": tool} | {key: values[key] for key in TOOL_KEYS[tool]}
        return json.dumps(self._drift.translate(call))

    def _next_tool(self) -> str:
        """The tool of the plan's next step; only a read can come before another step."""
        is_read = self._task.target in self._files.read_paths
        return self._steps[-1 if is_read else 0]["tool"]

    def _grade_first(self, call: Mapping[str, object]) -> None:
        """The rungs that need no accepted call; two target keys at once earn no target."""
        tool = call.get("tool")
        self._progress.is_json = True
        if not isinstance(tool, str) or tool not in [step["tool"] for step in self._steps]:
            return
        self._progress.is_tool = True
        old_key = TOOL_KEYS[tool][0]
        given = [call[key] for key in {old_key, self._drift.key_of(tool, old_key)} if key in call]
        # Compared and never hashed: a model may put a list there.
        is_rooted = old_key in PATH_KEYS and given == [f"/{self._task.target}"]
        self._progress.is_target = given == [self._task.target] or is_rooted

    def _grade_accepted(self, call: Mapping[str, str]) -> None:
        if self._num_turns == 1:
            self._progress.is_clean = call == self._steps[0]
        self._progress.is_completed = call == self._steps[-1]
        if self._progress.is_completed or call["tool"] in _CHANGING_TOOLS:
            self._is_over = True
