"""A reward for generated code, in TRL's signature: the data set's hidden tests decide.

Name it `rollout.reward = "composer_replication.environments.sandbox.code_reward:code_reward"`; each
row of `prompts.jsonl` then has `tests` beside its `prompt`, which no model is shown.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from markdown_it import MarkdownIt

from composer_replication.environments.sandbox.code_verdict import judge_code
from composer_replication.environments.sandbox.hidden_tests import check_tests
from composer_replication.environments.sandbox.mechanisms import choose_mechanism
from composer_replication.environments.sandbox.sandbox_limits import SandboxLimits
from composer_replication.errors import DataError, shown

Completion = str | Sequence[Mapping[str, str]]

_PYTHON = re.compile(r"\{?\.?py(thon)?\d?\b", re.IGNORECASE)
"""How a fence of Python names its language, such as `python3` or `{.python}`."""


def code_reward(
    *, completions: Sequence[Completion], tests: Sequence[str] = (), **columns: object
) -> list[float]:
    """1.0 for each completion whose code passes every one of its hidden tests, else 0.0.

    Example: `code_reward(completions=["def add(a, b): return a + b"],
    tests=["assert add(1, 2) == 3"])` -> `[1.0]`.

    Args:
        completions: texts, or chat messages of which the last counts; see `code_in`.
        tests: the column of that name; see `judge_code`.
        **columns: what else TRL hands over.

    Raises:
        DataError: no column of tests, or tests that cannot be run.
        SandboxUnavailableError: this machine cannot confine code.
    """
    return make_code_reward()(completions=completions, tests=tests, **columns)


def make_code_reward(
    *,
    limits: SandboxLimits | None = None,
    is_graded: bool = False,
    allow_unsafe: bool = False,
    num_workers: int | None = None,
) -> Callable[..., list[float]]:
    """A `code_reward` with other settings.

    Args:
        limits: for each judgement.
        is_graded: reward the share of tests that passed. It pays for special-casing some of them.
        allow_unsafe: run the code unconfined where this machine has no sandbox.
        num_workers: judgements at one time; None: one for each two processors.
    """

    def code_reward(
        *, completions: Sequence[Completion], tests: Sequence[str] = (), **columns: object
    ) -> list[float]:
        del columns
        if len(tests) != len(completions):
            raise DataError(
                f"code_reward got {len(tests)} tests for {len(completions)} completions. Give each "
                "row of the prompts its hidden tests under the key 'tests'."
            )
        mechanism = choose_mechanism(allow_unsafe=allow_unsafe)
        for text in tests:
            if not isinstance(text, str):
                raise DataError(f"A row has tests = {shown(text)}; tests are one text of Python.")
            check_tests(text)

        def reward(completion: Completion, hidden: str) -> float:
            verdict = judge_code(code_in(completion), hidden, limits=limits, mechanism=mechanism)
            return verdict.passed_share if is_graded else float(verdict.is_passed)

        workers = num_workers or max(1, (os.cpu_count() or 1) // 2)
        with ThreadPoolExecutor(workers) as threads:
            return list(threads.map(reward, completions, tests))

    return code_reward


def code_in(completion: Completion) -> str:
    """The code of an answer: its last block of Python, or all of it where nothing is fenced.

    Where no block says Python, the last without a language, and else the last of all.
    """
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    blocks = [token for token in MarkdownIt().parse(text) if token.type == "fence"]
    python = [block for block in blocks if _PYTHON.match(block.info.strip())]
    unnamed = [block for block in blocks if not block.info.strip()]
    chosen = python or unnamed or blocks
    return chosen[-1].content if chosen else text
