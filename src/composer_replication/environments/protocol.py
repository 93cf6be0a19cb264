"""What an environment is: TRL's duck-typed protocol, plus structured errors and a text action.

An environment class has `reset(**row)`, public methods with type hints and docstrings that are its
tools, and `get_reward()`. The same class therefore works as TRL's `environment_factory` where the
model's chat template has tool calls, and from this project's rollout loop, which lets a model
answer in plain text (`step_text`), where it has none.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


class ToolError(Exception):
    """A tool call that the environment refused.

    Attributes:
        kind: stable class of the error, such as `unknown_key`.
        message: one sentence for a reader.
        example: a corrected call on another argument, or None.
        demonstrations: (request, right call) of other requests, for a hint alone; may be empty.

    `str(error)` is what a model is shown, so TRL's tool loop passes the example on too.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        example: str | None = None,
        demonstrations: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message if example is None else f"{message} Example: {example}")
        self.kind = kind
        self.message = message
        self.example = example
        self.demonstrations = demonstrations


@dataclass(frozen=True, slots=True)
class Observation:
    """What the environment answers to one action.

    Example: `Observation("error: unknown key 'path'", is_done=False, error=ToolError(...))`.
    """

    content: str
    """The text of the tool turn that the model sees next."""
    is_done: bool
    """True when the episode ended; the model then takes no further turn."""
    error: ToolError | None = None
    """Set where this action was the error turn."""


@runtime_checkable
class TextEnvironment(Protocol):
    """An episode driven by plain-text actions; one instance serves one rollout at a time."""

    def reset(self, **row: object) -> str | None:
        """Start the episode that `row` describes; text returned is appended to the prompt."""
        ...

    def _step_text(self, action: str) -> Observation:
        """Parse and carry out one action; never raises on what a model wrote."""
        ...

    def get_reward(self) -> float:
        """The graded reward of the episode so far, from 0 to 1."""
        ...
