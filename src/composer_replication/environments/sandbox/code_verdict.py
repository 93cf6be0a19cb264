"""Judges a model's code by hidden tests: the tests never enter the process that runs the code.

Two confined processes: one holds the code and answers calls with plain data, the other holds the
tests. What passed is what the tests' process reports to this one over a pipe of its own; exit codes
and printed text of the code's process count for nothing.
"""

import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from composer_replication.environments.sandbox.confined_process import ConfinedProcess, is_utf8
from composer_replication.environments.sandbox.hidden_tests import check_tests
from composer_replication.environments.sandbox.launching import Mechanism
from composer_replication.environments.sandbox.mechanisms import choose_mechanism
from composer_replication.environments.sandbox.sandbox_limits import Ending, SandboxLimits
from composer_replication.errors import DataError, shown

VerdictKind = Literal["passed", "failed", "incomplete", "timeout", "memory", "processes", "output"]
"""`failed`: all tests ran. `incomplete`: the code could not be loaded, or ended its process, or the
tests' set-up failed. The others name the limit that the code reached."""

_SCRIPT = Path(__file__).with_name("judge_script.py")
_MAX_REPORT_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class CodeVerdict:
    """What the hidden tests say of one solution.

    Example: `CodeVerdict("failed", num_tests=3, num_passed=2, problems=("line 2: ...",))`.
    """

    kind: VerdictKind
    num_tests: int
    """Tests that were run; all of them where the solution did not stop the judgement."""
    num_passed: int
    problems: tuple[str, ...] = ()
    """A line for each test that failed, for a reader: it may quote the hidden tests."""

    @property
    def is_passed(self) -> bool:
        """Every test ran and passed."""
        return self.kind == "passed"

    @property
    def passed_share(self) -> float:
        """Share of the tests that passed, from 0 to 1; 0 where not all of them could be run."""
        return self.num_passed / self.num_tests if self.kind in ("passed", "failed") else 0.0


def judge_code(
    code: str,
    tests: str,
    *,
    limits: SandboxLimits | None = None,
    mechanism: Mechanism | None = None,
) -> CodeVerdict:
    """Run hidden tests against a model's code.

    Example:
        >>> judge_code("def add(a, b): return a + b", "assert add(1, 2) == 3").is_passed
        True

    Args:
        code: Python; what the tests name are its functions.
        tests: Python with asserts at the top, `test` functions or `unittest.TestCase`s. A name that
            nothing in it defines is a function of the solution; its arguments and values are plain
            data, copied between the processes, a value of at most 8 MiB as JSON.
        limits: for each of the two processes.
        mechanism: how they are confined; None: the strongest that works here.

    Raises:
        DataError: tests that could not be run, or that would not all count; see `check_tests`. Or
            tests that ran and called nothing.
        SandboxUnavailableError: the code could not be confined, so it did not run.
    """
    check_tests(tests)
    limits = limits or SandboxLimits()
    mechanism = mechanism or choose_mechanism()
    if not is_utf8(code):
        problem = "not all tests could be run: the solution holds half of a surrogate pair"
        return CodeVerdict("incomplete", 0, 0, (problem,))
    report, endings, last_words = _run_both(code, tests, limits, mechanism)
    rows = [json.loads(line) for line in report.decode().splitlines()]
    is_complete = bool(rows) and "is_complete" in rows[-1]
    if is_complete and not rows[-1]["asks"]:
        raise DataError(
            f"The tests {shown(tests)} never called the solution, so every one would pass that can "
            "be loaded. Call its functions."
        )
    ran = [row for row in rows if "test" in row]
    problems = [f"{row['test']}: {row['problem']}" for row in ran if row["problem"]]
    num_passed = len(ran) - len(problems)
    if is_complete and ran and not problems:
        return CodeVerdict("passed", len(ran), num_passed)
    if is_complete:
        return CodeVerdict("failed", len(ran), num_passed, tuple(problems))
    limits_reached = [ending for ending in endings if ending not in ("exit", "stopped")]
    kind = cast(VerdictKind, (limits_reached or ["incomplete"])[0])
    stopped = rows[-1].get("stopped") if rows else None
    problems.append(f"not all tests could be run: {_reason(kind, stopped, last_words)}")
    return CodeVerdict(kind, len(ran), num_passed, tuple(problems))


def _run_both(
    code: str, tests: str, limits: SandboxLimits, mechanism: Mechanism
) -> tuple[bytes, list[Ending], str]:
    """The report of the tests, how the two processes ended, and the solution's last error line."""
    calls_read, calls_write = os.pipe()
    answers_read, answers_write = os.pipe()
    report_read, report_write = os.pipe()
    script = _SCRIPT.read_text(encoding="utf-8")

    def start(role: str, text: str, numbers: Sequence[int]) -> ConfinedProcess:
        return ConfinedProcess(
            [sys.executable, "-I", "judge.py", role, *map(str, numbers)],
            mechanism=mechanism,
            limits=limits,
            files={"judge.py": script, f"{role}.py": text},
            pass_fds=numbers,
        )

    with ExitStack() as stack, ThreadPoolExecutor(max_workers=2) as threads:
        stack.callback(os.close, report_read)
        try:
            judged = stack.enter_context(start("solution", code, (calls_read, answers_write)))
            numbers = (answers_read, calls_write, report_write)
            judging = stack.enter_context(start("tests", tests, numbers))
        finally:
            # An end of a pipe that stays open here would hide that its process has ended.
            for number in (calls_read, calls_write, answers_read, answers_write, report_write):
                os.close(number)
        watched = threads.submit(judged.wait)
        report = threads.submit(_read_all, report_read)
        try:
            tests_ending = judging.wait().ending
        finally:
            judged.stop()
        solution = watched.result()
        endings: list[Ending] = [solution.ending, tests_ending]
        return report.result(), endings, (solution.stderr.strip().splitlines() or [""])[-1]


def _read_all(number: int) -> bytes:
    pieces: list[bytes] = []
    while sum(map(len, pieces)) < _MAX_REPORT_BYTES and (piece := os.read(number, 1 << 16)):
        pieces.append(piece)
    return b"".join(pieces)


def _reason(kind: VerdictKind, stopped: str | None, last_words: str) -> str:
    if kind != "incomplete":
        return f"the solution reached the limit of {kind}"
    if stopped is None:
        return "the tests ended their own process"
    return stopped or last_words or "the solution ended its process"
