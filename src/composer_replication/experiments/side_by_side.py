"""Two computations at once, the second in a fork of this process.

What is traced on tensors without memory is Python's own work, which threads would only take turns
at; a fork has all modules and objects already, and a second core.
"""

import contextlib
import multiprocessing
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar, cast

import torch

A = TypeVar("A")
B = TypeVar("B")


def side_by_side(first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
    """Both results, the second from a forked process where that is safe and there is a core for it.

    Args:
        first: runs here.
        second: what it returns has to be picklable; what it changes stays in the fork. It runs here
            where the fork dies or its outcome cannot be sent.

    Raises:
        Exception: what either raised.
    """
    if not _can_fork():
        return first(), second()
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_send_outcome, args=(sender, second), daemon=True)
    with warnings.catch_warnings():
        # Newer Pythons warn of threads, which a fork does not have: see `_send_outcome`.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    try:
        here = first()
        try:
            outcome = pickle.loads(receiver.recv_bytes())
            there, error = cast("tuple[B, Exception | None]", outcome)
        except EOFError:
            return here, second()
    finally:
        process.terminate()
        process.join()
        receiver.close()
    if error is not None:
        raise error
    return here, there


def _can_fork() -> bool:
    """A fork cannot use a CUDA context that was there before it."""
    is_linux = sys.platform == "linux"
    return is_linux and not torch.cuda.is_initialized() and len(os.sched_getaffinity(0)) > 1


def _send_outcome(sender: Connection, work: Callable[[], object]) -> None:
    # OpenMP's threads are not in the fork, and a parallel loop would wait for them for ever.
    torch.set_num_threads(1)
    try:
        outcome = work(), None
    except Exception as error:
        outcome = None, error
    # Plain bytes: torch's own way lends tensors from a process that is about to end.
    with contextlib.suppress(pickle.PicklingError, AttributeError, TypeError):
        sender.send_bytes(pickle.dumps(outcome))
