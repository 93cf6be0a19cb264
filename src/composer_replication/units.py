"""Units used in names and messages: GiB for memory, seconds for time."""

BYTES_PER_GIB = 1024**3


def gib(num_bytes: float) -> float:
    """Bytes as GiB (2**30 bytes)."""
    return num_bytes / BYTES_PER_GIB
