"""Runs a program under a mechanism that this machine has, or sees that none is offered."""

import sys

import pytest

from composer_replication.environments.sandbox.code_verdict import CodeVerdict, judge_code
from composer_replication.environments.sandbox.confined_process import run_confined
from composer_replication.environments.sandbox.launching import Mechanism
from composer_replication.environments.sandbox.mechanisms import (
    available_mechanisms,
    choose_mechanism,
)
from composer_replication.environments.sandbox.sandbox_limits import ConfinedResult, SandboxLimits
from composer_replication.errors import SandboxUnavailableError

SAFE = available_mechanisms() or [None]
"""None stands for a machine where nothing confines: there, running is refused."""


def mechanism_id(mechanism):
    return mechanism.value if mechanism else "refused"


def run_program(code, mechanism, **limits):
    """How `code` ends; where nothing confines, it must not have run."""
    if mechanism is None:
        with pytest.raises(SandboxUnavailableError):
            choose_mechanism()
        return ConfinedResult("exit", 1, "", "", 0.0)
    return run_confined(
        [sys.executable, "-I", "-S", "main.py"],
        mechanism=mechanism,
        limits=SandboxLimits(**({"wall_s": 10.0} | limits)),
        files={"main.py": code},
    )


def verdict_of(code, tests, mechanism=Mechanism.UNSAFE, **limits):
    """The verdict on `code`; where nothing confines, it must not have run."""
    if mechanism is None:
        with pytest.raises(SandboxUnavailableError):
            judge_code(code, tests)
        return CodeVerdict("failed", 0, 0)
    return judge_code(code, tests, mechanism=mechanism, limits=SandboxLimits(**limits))
