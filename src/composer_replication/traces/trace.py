"""Messages, turns and recorded episodes: the form in which agent work enters the project.

An *action* is an assistant turn, a *state* is everything before it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
