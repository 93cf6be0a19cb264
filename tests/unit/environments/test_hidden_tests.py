"""Hidden tests of which a part would not run or not count are refused, with line and remedy."""

import pytest

from composer_replication.environments.sandbox.hidden_tests import check_tests
from composer_replication.errors import DataError

CASE = "import unittest\nclass TestIt(unittest.TestCase):\n"
TAKEN = [
    "assert f(1) == 1",
    "from f import *\nassert f(1) == 1",
    "def check(candidate):\n    assert candidate(1) == 1\ncheck(f)",
    "def test_it(times=2):\n    assert f(times) == 2",
    "def test_it():\n    def test_part(x):\n        assert f(x) == x\n    test_part(1)",
    "def test_it():\n    assert list((lambda: (yield f(1)))()) == [1]",
    "for x in range(3):\n    assert f(x) == x",
    "import numpy as np\nnp.testing.assert_equal(f(1), 1)",
    "test_cases = [1, 2]\nfor x in test_cases:\n    assert f(x) == x",
    "import solution\nassert solution.skip([1]) == 1",
    "assert skip([1]) == 1",
    f"{CASE}    def test_it(self):\n        self.assertEqual(f(1), 1)",
    f"{CASE}    def test_it(self):\n        assert f(1) == 1\nif __name__ == '__main__':\n"
    "    unittest.main()",
    f"{CASE}    def check(self, x):\n        self.assertEqual(f(x), x)\n"
    "    def test_it(self):\n        self.check(1)",
    f"{CASE}    @staticmethod\n    def test_it():\n        assert f(1) == 1",
    "from unittest import TestCase as Case\nclass Mixin:\n    def test_it(self):\n"
    "        assert f(1) == 1\nclass Own(Case):\n    pass\nclass TestIt(Mixin, Own):\n    pass",
    "import unittest as u\nclass TestIt(u.TestCase):\n    def setUp(self):\n"
    "        self.assertEqual(f(1), 1)\n    def test_it(self):\n        assert f(2)",
]
REFUSED = {
    "async_function": ("async def test_b():\n    assert f(2)", 2, "is async, which nothing awaits"),
    "async_method": (f"{CASE}    async def test_b(self):\n        f(2)", 4, "is async"),
    "generator": ("def test_b():\n    yield f(2)", 2, "holds a yield"),
    "needs_arguments": ("def test_b(n):\n    assert f(n)", 2, "needs arguments"),
    "needs_a_keyword": ("def test_b(*, n):\n    assert f(n)", 2, "needs arguments"),
    "method_needs_more": (f"{CASE}    def test_b(self, n):\n        f(n)", 4, "needs arguments"),
    "defined_twice": ("def test_b():\n    f(1)\ndef test_b():\n    f(2)", 2, "defined 2 times"),
    "under_a_condition": ("if True:\n    def test_b():\n        assert f(2)", 3, "is not found"),
    "in_a_handler": ("try:\n    pass\nexcept E:\n    def test_b():\n        f(2)", 5, "not found"),
    "in_a_match": (
        "match 1:\n    case 1:\n        def test_b():\n            f(2)",
        4,
        "not found",
    ),
    "class_in_a_loop": (
        f"import unittest\nfor _ in [1]:\n    {CASE.splitlines()[1]}\n"
        "        def test_b(self):\n            f(2)",
        4,
        "is not found. Move it to the top",
    ),
    "method_under_a_condition": (
        f"{CASE}    if True:\n        def test_b(self):\n            f(2)",
        5,
        "is not found",
    ),
    "class_in_a_class": (
        "class Outer:\n    class Inner:\n        def test_b(self):\n            f(2)",
        3,
        "stands in another class",
    ),
    "class_without_a_case": (
        "class TestB:\n    def test_b(self):\n        f(2)",
        2,
        "is no unittest.",
    ),
    "main_guard": ("if __name__ == '__main__':\n    assert f(2)", 3, "does not hold here"),
    "main": ("import unittest\nunittest.main()", 3, "would end the tests' process"),
    "lambda": ("test_b = lambda: f(2)", 2, "is a lambda"),
    "module_set_up": ("def setUpModule():\n    x = f(0)", 2, "nothing calls setUpModule"),
    "pytest_set_up": (
        f"{CASE}    def setup_method(self):\n        x = f(0)",
        4,
        "calls setup_method",
    ),
    "skipped": (
        f"{CASE}    @unittest.skip('no')\n    def test_b(self):\n        f(2)",
        4,
        "skip: ",
    ),
    "marked": ("import pytest\n@pytest.mark.xfail\ndef test_b():\n    f(2)", 3, "xfail: "),
    "skips_itself": (f"{CASE}    def test_b(self):\n        self.skipTest('')", 5, "skipTest: "),
    "imported_skip": ("from unittest import skipIf", 2, "skipIf: "),
    "never_called": ("def check_b():\n    assert f(2)", 2, "name it test_check_b"),
    "method_never_called": (
        f"{CASE}    def check(self):\n        self.assertEqual(f(2), 2)",
        4,
        "nothing calls check",
    ),
}


@pytest.mark.parametrize("tests", TAKEN)
def test_tests_of_which_all_count_are_taken(tests):
    check_tests(tests)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_run_or_not_count_is_refused_beside_tests_that_do(name):
    part, line, problem = REFUSED[name]
    with pytest.raises(DataError) as caught:
        check_tests(f"assert f(1) == 1\n{part}")
    assert f"would not all be run: line {line}: " in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("tests", "match"),
    [
        ("assert f(2 == 4", "are no Python: "),
        ("return f(2)", "are no Python: 'return' outside function"),
        ("x = f(1)", "hold no test, so every solution would pass"),
        ("import unittest\nclass T(unittest.TestCase):\n    x = f(1)", "hold no test"),
        ("assert max([1, 2]) == 2", "call no function of the solution"),
    ],
)
def test_tests_that_cannot_judge_are_refused(tests, match):
    with pytest.raises(DataError, match=match):
        check_tests(tests)
