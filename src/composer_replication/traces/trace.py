"""Messages, turns and recorded episodes: the form in which agent work enters the project.

An *action* is an assistant turn, a *state* is everything before it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from composer_replication.errors import DataError, nearest, shown

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a trace.

    Example: `Message("user", "Read /src/app.py.")`.
    """

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(f"A message has role {self.role!r}. {nearest(self.role, ROLES)}")


@dataclass(frozen=True, slots=True)
class TurnError:
    """What went wrong at an action, as its environment said it.

    Example: `TurnError("unknown_key", "read_file has no argument 'path'", '{"tool": ...}')`.
    """

    kind: str
    """A stable class name, such as `unknown_key`."""
    message: str
    """One sentence for a reader."""
    example: str | None = None
    """A corrected call that shows the rule on another argument, where the environment knows one."""
    demonstrations: tuple[tuple[str, str], ...] = ()
    """(request, right call) of other requests: a hint shows these in place of `example`."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One recorded agent run, in the text form that a model is shown.

    Example: the agent reads under a wrong key, and a teacher would have known the right one:
        >>> Trace(
        ...     messages=(Message("user", "Read a.py."), Message("assistant", "read path=a.py")),
        ...     errors={1: TurnError("unknown_key", 'Use the key "file".', "read file=b.py")},
        ...     teacher_actions={1: ("read file=a.py",)},
        ...     source="session-7",
        ... )
    """

    messages: tuple[Message, ...]
    errors: Mapping[int, TurnError] = field(default_factory=dict[int, TurnError])
    """Index of the action that caused the error -> the error."""
    teacher_actions: Mapping[int, tuple[str, ...]] = field(
        default_factory=dict[int, tuple[str, ...]]
    )
    """Index of an action -> what each teacher did at the same state."""
    num_context_messages: int = 0
    """Messages at the start that are no work of this run, such as demonstrations: never trained
    on, though they are part of every state."""
    source: str = ""
    """Id of the run; splits never cut through a source."""

    def __post_init__(self) -> None:
        for index in (*self.errors, *self.teacher_actions):
            is_there = self.num_context_messages <= index < len(self.messages)
            if not is_there or self.messages[index].role != "assistant":
                raise DataError(
                    f"Trace {self.source!r}: message {index} is no action of this run, so it can "
                    "have no error and no teacher's action. Give the index of an assistant turn."
                )

    def state(self, index: int) -> tuple[Message, ...]:
        """What the model saw before the action at `index`."""
        return self.messages[:index]


def messages_from(
    rows: Iterable[Mapping[str, object] | Message], where: str = ""
) -> tuple[Message, ...]:
    """Messages from `{"role", "content"}` rows.

    Args:
        rows: chat messages as a dataset or a JSON file holds them.
        where: what is being read, for the error text; empty: the caller says it.

    Raises:
        DataError: a row that is no chat message of text, or whose tool calls would be lost.
    """
    prefix = f"{where}, " if where else ""
    return tuple(
        row if isinstance(row, Message) else _message_from(row, f"{prefix}message {index}")
        for index, row in enumerate(rows)
    )


def _message_from(row: object, where: str) -> Message:
    if not isinstance(row, Mapping):
        raise DataError(
            f"{where} is {shown(row)}; a message is an object with 'role' and 'content'. "
            'Write it as {"role": "user", "content": "..."}.'
        )
    fields = cast("Mapping[str, object]", row)
    role, content = fields.get("role"), fields.get("content")
    if fields.get("tool_calls"):
        raise DataError(
            f"{where} has 'tool_calls', and only 'content' is rendered: the call would be lost. "
            "Write the call into 'content' as the text that the model generates for it."
        )
    if not isinstance(role, str) or not isinstance(content, str):
        name, value = ("content", content) if isinstance(role, str) else ("role", role)
        raise DataError(
            f"{where}: {name!r} is {shown(value)}; it must be text. "
            'Write the message as {"role": "user", "content": "..."}.'
        )
    if role not in ROLES:
        raise DataError(f"{where}: the role is {role!r}. {nearest(role, ROLES)}")
    return Message(cast(Role, role), content)


def message_rows(messages: Iterable[Message]) -> list[dict[str, str]]:
    """The `{"role", "content"}` rows that chat templates and JSON files take."""
    return [{"role": message.role, "content": message.content} for message in messages]
