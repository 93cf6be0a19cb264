"""Keeps what libraries print apart from what a verb says."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import transformers
from transformers import PrinterCallback, Trainer


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars, and no warnings about what is right as it is.

    Works as a decorator too.
    """
    trainer_log = logging.getLogger("transformers.trainer")
    is_outermost = _is_alarming not in trainer_log.filters
    trainer_log.addFilter(_is_alarming)
    had_progress_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # A name that TRL sets and users cannot change.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            yield
    finally:
        if is_outermost:
            trainer_log.removeFilter(_is_alarming)
        if had_progress_bars:
            transformers.utils.logging.enable_progress_bar()


def _is_alarming(record: logging.LogRecord) -> bool:
    """A head tied to the embedding is in no checkpoint; it comes back with the embedding."""
    return not record.getMessage().endswith(
        "missing keys in the checkpoint model loaded: ['lm_head.weight']."
    )


def without_printed_logs(trainer: Trainer) -> None:
    """Remove the callback that prints every log as a dictionary; the live table shows them."""
    trainer.remove_callback(PrinterCallback)
