"""Keeps what libraries print apart from what a verb says."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import transformers
from transformers import PrinterCallback, Trainer


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars, and no warnings about names that TRL sets and users cannot change.

    Works as a decorator too.
    """
    had_progress_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            yield
    finally:
        if had_progress_bars:
            transformers.utils.logging.enable_progress_bar()


def without_printed_logs(trainer: Trainer) -> None:
    """Remove the callback that prints every log as a dictionary; the live table shows them."""
    trainer.remove_callback(PrinterCallback)
