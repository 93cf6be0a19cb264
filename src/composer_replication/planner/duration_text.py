"""Seconds as a reader says them."""


def duration(seconds: float) -> str:
    """`42 s`, `7 min`, `5.5 h` or `3.2 days`.

    Example: `duration(330)` -> `"6 min"`.
    """
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
