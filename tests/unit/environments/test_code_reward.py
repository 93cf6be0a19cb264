import inspect

import pytest
from sandboxed_runs import SAFE

from composer_replication.environments.registry import imported_object
from composer_replication.environments.sandbox import code_reward as module
from composer_replication.environments.sandbox.code_reward import (
    code_in,
    code_reward,
    make_code_reward,
)
from composer_replication.environments.sandbox.sandbox_limits import SandboxLimits
from composer_replication.errors import DataError, SandboxUnavailableError

RIGHT, WRONG = "def add(a, b):\n    return a + b", "def add(a, b):\n    return 3"
TESTS = "assert add(1, 2) == 3\nassert add(1, 3) == 4"
REWARD = make_code_reward(allow_unsafe=True)


def test_each_completion_is_judged_by_its_own_tests():
    completions = [RIGHT, WRONG, WRONG, "I cannot do that."]
    tests = [TESTS, TESTS, "assert add(1, 2) == 3", TESTS]
    assert REWARD(completions=completions, tests=tests, prompts=[""] * 4) == [1.0, 0.0, 1.0, 0.0]


def test_a_graded_reward_is_the_share_of_tests():
    graded = make_code_reward(is_graded=True, allow_unsafe=True, limits=SandboxLimits(wall_s=5))
    assert graded(completions=[RIGHT, WRONG], tests=[TESTS] * 2) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```py\nx = 0\n```\nBetter:\n```python\nx = 1\n```", "x = 1\n"),
        ("```\nx = 0\n```\nBetter:\n```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("```python\nx = 1\n```\nRun it:\n```bash\npython x.py\n```\nDone.", "x = 1\n"),
        ("```python\nx = 1\n```\nIt prints:\n```\n1\n```", "x = 1\n"),
        ("```Python3\nx = 1\n```\nprose", "x = 1\n"),
        ("```{.python}\nx = 1\n```", "x = 1\n"),
        ("```python\r\nx = 1\r\n```\r\nDone.", "x = 1\n"),
        ("````python\nx = 1\n```\n````", "x = 1\n```\n"),
        ("~~~py\nx = 1\n~~~", "x = 1\n"),
        ("1. First\n   ```python\n   x = 1\n   ```", "x = 1\n"),
        ("```c\nint x;\n```", "int x;\n"),
        ("```pypy\nx = 0\n```\n```\nx = 1\n```", "x = 1\n"),
        ([{"role": "user", "content": "y"}, {"role": "assistant", "content": "x = 1"}], "x = 1"),
    ],
)
def test_the_last_block_of_python_is_an_answers_code(completion, code):
    assert code_in(completion) == code


def test_a_run_can_name_the_reward_and_trl_its_metric():
    name = "composer_replication.environments.sandbox.code_reward:code_reward"
    assert imported_object(name, "The reward") is code_reward
    assert code_reward.__name__ == REWARD.__name__ == "code_reward"
    kinds = {parameter.kind for parameter in inspect.signature(REWARD).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}


def test_without_a_sandbox_nothing_runs(monkeypatch):
    def refuse(*, allow_unsafe):
        assert not allow_unsafe
        raise SandboxUnavailableError("no sandbox")

    monkeypatch.setattr(module, "choose_mechanism", refuse)
    with pytest.raises(SandboxUnavailableError):
        code_reward(completions=[RIGHT], tests=[TESTS])


def test_the_default_reward_confines_or_refuses():
    if SAFE == [None]:
        with pytest.raises(SandboxUnavailableError):
            code_reward(completions=[RIGHT], tests=[TESTS])
    else:
        assert code_reward(completions=[RIGHT], tests=[TESTS]) == [1.0]


def test_tests_that_are_missing_or_unusable_are_refused_before_any_code_runs():
    with pytest.raises(DataError, match="got 0 tests for 1 completions"):
        REWARD(completions=[RIGHT])
    with pytest.raises(DataError, match=r"A row has tests = \['assert x'\]; tests are one text"):
        REWARD(completions=[RIGHT], tests=[["assert x"]])
    with pytest.raises(DataError, match="are no Python"):
        REWARD(completions=[RIGHT], tests=["assert ("])
