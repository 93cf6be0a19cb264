"""What the user's own code raises, told with its place: reward functions and environments."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from composer_replication.errors import ComposerError, RewardError
from composer_replication.training.out_of_memory import is_out_of_memory

_PACKAGE = Path(__file__).parents[1]


@contextmanager
def users_code(what: str, remedy: str) -> Iterator[None]:
    """Around a call of the user's code.

    Args:
        what: is called, as the start of a sentence.
        remedy: what to do about it, as a sentence.

    Raises:
        RewardError: in place of what the code raised; this package's own errors and a lack of
            memory pass through.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ComposerError) or is_out_of_memory(error):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        path = Path(frame.filename)
        # A call that did not even start, such as one with a missing argument, has no place there.
        place = f" ({path.name}, line {frame.lineno}, in {frame.name})"
        raise RewardError(
            f"{what} raised {type(error).__name__}: {error}"
            f"{'' if path.is_relative_to(_PACKAGE) else place}. {remedy}"
        ) from error
