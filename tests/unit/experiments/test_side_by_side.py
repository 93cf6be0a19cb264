"""Two computations at once: both results, either error, and a fork that dies."""

import os
import signal

import pytest
import torch

from composer_replication.errors import ModelError
from composer_replication.experiments import side_by_side as module
from composer_replication.experiments.side_by_side import side_by_side


@pytest.fixture(autouse=True)
def _can_fork(monkeypatch):
    monkeypatch.setattr(module, "_can_fork", lambda: True)


def test_both_results_come_back_and_the_second_is_from_another_process():
    changed = []
    here, there = side_by_side(os.getpid, lambda: (changed.append(1), os.getpid())[1])
    assert here == os.getpid() != there
    assert changed == []


def test_where_no_fork_is_safe_both_run_here(monkeypatch):
    monkeypatch.setattr(module, "_can_fork", lambda: False)
    assert side_by_side(os.getpid, os.getpid) == (os.getpid(), os.getpid())


def test_a_fork_computes_on_tensors_after_its_parent_did():
    numbers = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0))
    # OpenMP's threads are there before the fork, and a large sort would ask for them.
    expected = numbers.sort().values.sum()
    here, there = side_by_side(lambda: numbers.sort().values.sum(), lambda: numbers.sort().values)
    assert torch.equal(here, expected)
    assert torch.equal(there, numbers.sort().values)


@pytest.mark.parametrize("which", ["first", "second"])
def test_what_either_raises_is_raised(which):
    def fail():
        raise ModelError("The layers do not repeat. Plan without --simulate.")

    pair = (fail, os.getpid) if which == "first" else (os.getpid, fail)
    with pytest.raises(ModelError, match="do not repeat"):
        side_by_side(*pair)


def test_what_a_killed_fork_owed_is_computed_here():
    parent = os.getpid()

    def second():
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return "whole"

    assert side_by_side(os.getpid, second) == (parent, "whole")


def test_a_result_that_cannot_be_sent_is_computed_here():
    _, there = side_by_side(os.getpid, lambda: lambda: 5)
    assert there() == 5


def test_no_fork_is_left_when_the_first_fails():
    def fail():
        raise ModelError("no")

    def wait():
        signal.pause()

    with pytest.raises(ModelError):
        side_by_side(fail, wait)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
