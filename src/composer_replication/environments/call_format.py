"""The call-format environment: answer a request with one JSON call, in the form that is shown.

One action an episode. Reward 1 for the right call and 0 for everything else, so there is nothing to
collect on the way; what was wrong is told as an error with an example of another request.
"""

from collections.abc import Mapping

from composer_replication.environments.action_json import parse_action
from composer_replication.environments.call_format_tasks import (
    CALL_KEYS,
    FormatSpec,
    call_text,
    format_task,
)
from composer_replication.environments.protocol import Observation, ToolError
from composer_replication.environments.spec_rows import read_spec
from composer_replication.errors import DataError

FORMAT_ERROR_KINDS = (
    "not_json",
    "unknown_tool",
    "wrong_tool",
    "unknown_key",
    "missing_key",
    "wrong_type",
    "wrong_value",
    "episode_over",
)
"""Every kind of `ToolError` that this environment raises."""


class CallFormat:
    """One episode at a time; `reset` with a row of `prompts.jsonl` before anything else.

    Also TRL's `environment_factory`: every public method but `reset` and `get_reward` is a tool.

    Example:
        >>> environment = CallFormat()
        >>> environment.reset(task_seed=0)
        >>> environment._step_text("Sure!").error.kind
        'not_json'
    """

    def reset(self, **row: object) -> None:
        """Start the episode that a row describes; the prompt is already in the row.

        Args:
            **row: the fields of `FormatSpec`, and `prompt`, which must fit the seed.

        Raises:
            DataError: a field that is missing, unknown, of the wrong type, or a foreign prompt.
        """
        spec = read_spec(row, FormatSpec, "A call-format row")
        self._task = format_task(spec)
        if row.get("prompt") is not None and row["prompt"] != self._task.prompt():
            raise DataError(
                f"The prompt of task_seed {spec.task_seed}, split {spec.split!r}, is not the one "
                "this version makes. Make the data again with examples/make_task_data.py."
            )
        self._is_over = False
        self._is_right = False

    def get_reward(self) -> float:
        """1 if the first action was the right call, else 0."""
        return float(self._is_right)

    def read(self, path: str) -> str:
        """Read a file.

        Args:
            path: the file to read.

        Returns:
            A confirmation.
        """
        return self._call_tool("read", {"path": path})

    def delete(self, path: str) -> str:
        """Delete a file.

        Args:
            path: the file to delete.

        Returns:
            A confirmation.
        """
        return self._call_tool("delete", {"path": path})

    def list(self, path: str) -> str:
        """List a folder.

        Args:
            path: the folder to list.

        Returns:
            A confirmation.
        """
        return self._call_tool("list", {"path": path})

    def copy(self, path: str, to: str) -> str:
        """Copy a file to a folder.

        Args:
            path: the file to copy.
            to: the folder.

        Returns:
            A confirmation.
        """
        return self._call_tool("copy", {"path": path, "to": to})

    def move(self, path: str, to: str) -> str:
        """Move a file to a folder.

        Args:
            path: the file to move.
            to: the folder.

        Returns:
            A confirmation.
        """
        return self._call_tool("move", {"path": path, "to": to})

    def append(self, path: str, text: str) -> str:
        """Add a text to the end of a file.

        Args:
            path: the file.
            text: what to add.

        Returns:
            A confirmation.
        """
        return self._call_tool("append", {"path": path, "text": text})

    def _step_text(self, action: str) -> Observation:
        """Parse and judge one action; never raises on what a model wrote."""
        try:
            self._start_turn()
            return Observation(self._judge(self._parsed(action)), is_done=True)
        except ToolError as error:
            return Observation(f"error: {error}", is_done=True, error=error)

    def _call_tool(self, tool: str, arguments: Mapping[str, object]) -> str:
        self._start_turn()
        return self._judge({"tool": tool, **arguments})

    def _start_turn(self) -> None:
        if self._is_over:
            raise ToolError("episode_over", "The episode is over.")
        self._is_over = True

    def _parsed(self, action: str) -> dict[str, object]:
        try:
            return parse_action(action)
        except ToolError as error:
            raise self._refusal(error.kind, error.message) from error

    def _judge(self, call: Mapping[str, object]) -> str:
        """Say what is wrong with a call, first things first."""
        right = self._task.call
        tool = call.get("tool")
        if tool != right["tool"]:
            # Compared as text only: a model may put a list there.
            is_known = isinstance(tool, str) and tool in CALL_KEYS
            kind = "wrong_tool" if is_known else "unknown_tool"
            raise self._refusal(kind, f'Use the tool "{right["tool"]}".')
        missing = [key for key in right if key not in call]
        unknown = [key for key in call if key not in right]
        if missing:
            kind = "unknown_key" if unknown else "missing_key"
            raise self._refusal(kind, f'Use the key "{missing[0]}".')
        if unknown:
            needed = ", ".join(f'"{key}"' for key in right)
            raise self._refusal("unknown_key", f"Use only the keys {needed}.")
        for key, value in right.items():
            if not isinstance(call[key], str):
                raise self._refusal("wrong_type", f'Give text under "{key}".')
            if call[key] != value:
                raise self._refusal("wrong_value", f'Copy "{key}" from the last request.')
        self._is_right = True
        return "ok"

    def _refusal(self, kind: str, message: str) -> ToolError:
        shown = tuple((request, call_text(call)) for request, call in self._task.hint_demos)
        return ToolError(kind, message, call_text(self._task.example), shown)
