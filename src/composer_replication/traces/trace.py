"""Messages, turns and recorded episodes: the form in which agent work enters the project.

An *action* is an assistant turn, a *state* is everything before it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from composer_replication.errors import DataError, nearest

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
    rows: Iterable[Mapping[str, object] | Message], where: str
) -> tuple[Message, ...]:
    """Messages from `{"role", "content"}` rows.

    Args:
        rows: chat messages as a dataset or a JSON file holds them.
        where: what is being read, for the error text.

    Raises:
        DataError: a row without a role or with content that is not text.
    """
    messages: list[Message] = []
    for index, row in enumerate(rows):
        if isinstance(row, Message):
            messages.append(row)
            continue
        if not isinstance(row.get("role"), str) or not isinstance(row.get("content"), str):
            raise DataError(
                f"{where}, message {index}: {dict(row)!r} needs a text 'role' and a text 'content'."
            )
        messages.append(Message(cast(Role, row["role"]), cast(str, row["content"])))
    return tuple(messages)


def message_rows(messages: Iterable[Message]) -> list[dict[str, str]]:
    """The `{"role", "content"}` rows that chat templates and JSON files take."""
    return [{"role": message.role, "content": message.content} for message in messages]
