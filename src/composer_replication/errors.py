"""Errors a user can act on: each says what was given, why it cannot work and what to do.

Every class is also a standard-library error, so callers can catch either. The command line turns
`InputError` and its children into exit code 2 and every other `ComposerError` into exit code 1.
"""

import difflib
from collections.abc import Iterable


class ComposerError(Exception):
    """Root of every error this package raises on purpose."""


class InputError(ComposerError, ValueError):
    """What the user gave cannot work; nothing was started."""


class ConfigError(InputError):
    """A configuration value, key or combination that cannot work."""


class DataError(InputError):
    """A record or a file of the user's data that cannot be used as it is."""


class AlignmentError(DataError):
    """Student and teacher rows of a hint site do not hold the same action tokens."""


class ModelError(InputError):
    """A model that cannot be found, loaded or trained by this framework."""


class RunDirectoryError(InputError):
    """A run directory that is locked, foreign or of another schema version."""


class MissingDependencyError(InputError, ImportError):
    """An optional package that the asked-for feature needs is not installed."""


class TrainingError(ComposerError, RuntimeError):
    """A step that cannot train: a loss that is not finite, or a channel without data."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A sentence naming the closest valid choice, or all of them when none is close.

    Example: `nearest("aplha", ["alpha", "beta"])` -> `"Did you mean 'alpha'?"`.
    """
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(known)}."
