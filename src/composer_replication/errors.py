"""Errors a user can act on: each says what was given, why it cannot work and what to do.

Every class is also a standard-library error, so callers can catch either. The command line turns
`InputError` and its children into exit code 2 and every other `ComposerError` into exit code 1.
"""

import difflib
from collections.abc import Iterable, Sequence

_MAX_SHOWN_CHARS = 80


class ComposerError(Exception):
    """Root of every error this package raises on purpose."""


class InputError(ComposerError, ValueError):
    """What the user gave cannot work; what a run wrote before it was found stays."""


class ConfigError(InputError):
    """A configuration value, key or combination that cannot work."""


class DataError(InputError):
    """A record or a file of the user's data that cannot be used as it is."""


class AlignmentError(DataError):
    """Student and teacher rows of a hint site do not hold the same action tokens."""


class RecordTooLongError(DataError):
    """A record with more tokens than the limit, which the text names.

    Attributes:
        num_tokens: of its longest row.
    """

    def __init__(self, message: str, num_tokens: int) -> None:
        super().__init__(message)
        self.num_tokens = num_tokens


class RewardError(InputError):
    """A reward function or an environment that does not give one finite number a rollout."""


class MemoryLimitError(InputError, MemoryError):
    """The run needs more memory than there is."""


class ModelError(InputError):
    """A model that cannot be found, loaded or trained by this framework."""


class RunDirectoryError(InputError):
    """A run directory that is locked, foreign or of another schema version."""


class BudgetError(InputError):
    """The most that a run may cost is over the cap; nothing was started."""


class MissingDependencyError(InputError, ImportError):
    """An optional package that the asked-for feature needs is not installed."""


class SandboxUnavailableError(InputError, RuntimeError):
    """Model-written code that this machine cannot confine; it did not run."""


class TrainingError(ComposerError, RuntimeError):
    """A step that cannot train: a loss that is not finite, or a channel without data."""


class LaunchError(ComposerError, RuntimeError):
    """A run that could not be started elsewhere, or did not come back from there."""


class UnreachableError(LaunchError):
    """Nobody answered, so that what runs there may go on or not; asking again tells."""


class CallCancelledError(LaunchError):
    """A remote call that somebody ended; what it had committed is kept."""


class CheckpointError(ComposerError, RuntimeError):
    """A checkpoint that could not be written; those before it are whole."""


def shown(value: object) -> str:
    """`repr` of a value, cut to what fits in a sentence.

    Example: `shown("x" * 500)` ends in `...` and has 80 characters.
    """
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 3] + "..."


def listed(problems: Sequence[str]) -> str:
    """One problem as it is; several under their number, a line each."""
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{len(problems)} problems.", *(f"  {problem}" for problem in problems)])


def nearest(name: str, choices: Iterable[str]) -> str:
    """A sentence naming the closest valid choice, or all of them when none is close.

    Example: `nearest("aplha", ["alpha", "beta"])` -> `"Did you mean 'alpha'?"`.
    """
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(known)}."
