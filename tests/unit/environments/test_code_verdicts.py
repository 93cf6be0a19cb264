"""Hidden tests decide: honest code passes, and no trick of the code's process makes a test pass."""

import re
from fractions import Fraction

import numpy as np
import pytest
from sandboxed_runs import SAFE, mechanism_id, verdict_of

from composer_replication.environments.sandbox import judge_script
from composer_replication.environments.sandbox.code_verdict import CodeVerdict
from composer_replication.environments.sandbox.launching import Mechanism
from composer_replication.errors import DataError

STRONGEST = SAFE[0] or Mechanism.UNSAFE
TESTS = """
import math, unittest

assert double(2) == 4
def test_of_a_list():
    assert double([1]) == [1, 1]
class TestOfMethods(unittest.TestCase):
    def test_text(self):
        self.assertEqual(double("a"), "aa")
    def test_error(self):
        self.assertRaises(TypeError, double, None)
assert all(math.isclose(double(x), x + x) for x in (0.1, 7.0))
"""
HONEST = "def double(x):\n    return x * 2\n"
WRONG = "def double(x):\n    return None\n"

TRICKS = {
    "wrong": WRONG,
    "nothing": "",
    "exit_at_import": "import sys\nsys.exit(0)",
    "hard_exit_at_import": "import os\nos._exit(0)",
    "hard_exit_in_a_call": "import os\ndef double(x):\n    os._exit(0)",
    "exit_in_a_call": "import sys\ndef double(x):\n    sys.exit(0)",
    "exit_at_the_end": f"{WRONG}import atexit, os\natexit.register(os._exit, 0)",
    "raises_what_a_test_catches": "def double(x):\n    raise TypeError",
    "raises_skip": "import unittest\ndef double(x):\n    raise unittest.SkipTest('later')",
    "equal_to_everything": (
        "class Any:\n    def __eq__(self, other): return True\n"
        "    def __bool__(self): return True\n"
        "def double(x):\n    return Any()"
    ),
    "number_equal_to_everything": (
        "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
        "def double(x):\n    return Any(3)"
    ),
    "list_equal_to_everything": (
        "class Any(list):\n    def __eq__(self, other): return True\n"
        "    __len__ = lambda self: 0\ndef double(x):\n    return Any()"
    ),
    "patched_unittest": (
        f"{WRONG}import unittest\nfor name in dir(unittest.TestCase):\n"
        "    if name.startswith('assert'):\n"
        "        setattr(unittest.TestCase, name, lambda *a, **k: None)\n"
        "unittest.TestCase.run = lambda *a, **k: None"
    ),
    "patched_builtins": (
        f"{WRONG}import builtins, math\nbuiltins.all = lambda *a: True\n"
        "builtins.AssertionError = type('Never', (BaseException,), {})\n"
        "math.isclose = lambda *a: True"
    ),
    "names_of_the_tests": (
        f"{WRONG}def all(*a):\n    return True\ndef isclose(*a):\n    return True\n"
        "def test_of_a_list():\n    pass\nclass math:\n    isclose = all"
    ),
    "patched_modules": (
        f"{WRONG}import sys, types\nfor name in ('unittest', 'pytest', 'math', 'json', 'ast'):\n"
        "    sys.modules[name] = types.ModuleType(name)"
    ),
    "prints_a_report": (
        f"{WRONG}import json, os\nline = json.dumps({{'is_complete': True}}) + '\\n'\n"
        "print(line)\n"
        "for number in range(3, 64):\n    try:\n        os.write(number, line.encode())\n"
        "    except OSError:\n        pass"
    ),
    "answers_before_it_is_asked": (
        f"{WRONG}import os\nfor number in range(3, 64):\n    try:\n"
        '        os.write(number, b\'{"value": {"dict": []}}\\n\' * 99)\n'
        "    except OSError:\n        pass"
    ),
    "answers_nonsense": (
        f"{WRONG}import os\nfor number in range(3, 64):\n    try:\n"
        "        os.write(number, b'[[[[\\n' * 99)\n    except OSError:\n        pass"
    ),
    "patched_harness": (
        "import sys\nmain = sys.modules['__main__']\nmain.encode = lambda value: True\n"
        "main._answer = lambda module, call: {'value': True}\ndef double(x):\n    return 1"
    ),
    "forks_and_answers": "import os\nos.fork()\ndef double(x):\n    return None",
    "stop_iteration": "def double(x):\n    raise StopIteration",
    "stop_async_iteration": "def double(x):\n    raise StopAsyncIteration",
    "deep_answer": (
        "def double(x):\n    deep = []\n    for _ in range(900):\n        deep = [deep]\n"
        "    return deep"
    ),
    "huge_answer": "def double(x):\n    return 'x' * (3 << 20)",
    "huge_number": "def double(x):\n    return 10 ** 100_000",
    "too_much_output": "def double(x):\n    while True: print('x' * 1000)",
}


@pytest.mark.parametrize("mechanism", [*SAFE, Mechanism.UNSAFE], ids=mechanism_id)
def test_honest_code_passes_every_kind_of_test(mechanism):
    verdict = verdict_of(HONEST, TESTS, mechanism)
    assert verdict == (
        CodeVerdict("passed", num_tests=5, num_passed=5)
        if mechanism
        else CodeVerdict("failed", 0, 0)
    )
    assert (verdict.is_passed, verdict.passed_share) == ((True, 1.0) if mechanism else (False, 0.0))


@pytest.mark.parametrize("name", TRICKS)
def test_no_trick_passes(name):
    verdict = verdict_of(TRICKS[name], TESTS, STRONGEST, wall_s=8.0)
    assert not verdict.is_passed
    assert verdict.num_passed <= 1, "only the test of the error may pass"


@pytest.mark.parametrize("mechanism", SAFE, ids=mechanism_id)
def test_the_tests_are_nowhere_in_the_codes_reach(mechanism):
    search = (
        "import glob, time\ntime.sleep(0.5)\n"
        "found = glob.glob('/tmp/**/tests.py', recursive=True)\n"
        "found += glob.glob('/proc/*/cwd/tests.py')\n"
        "def num_found():\n    return len(found)"
    )
    assert verdict_of(search, "assert num_found() > 0").is_passed
    assert verdict_of(search, "assert num_found() == 0", mechanism).is_passed == bool(mechanism)


def test_code_that_stops_the_judgement_is_named_with_its_limit():
    slow = "def double(x):\n    while True: pass"
    assert verdict_of(slow, TESTS, STRONGEST, wall_s=1.0).kind == "timeout"
    assert verdict_of(TRICKS["too_much_output"], TESTS, STRONGEST).kind == "output"
    ended = verdict_of("import os\nos._exit(3)", TESTS, STRONGEST)
    assert (ended.kind, ended.passed_share) == ("incomplete", 0.0)
    assert ended.problems == ("not all tests could be run: the solution ended its process",)


def test_the_share_counts_tests_and_not_their_set_up():
    tests = "import random\nrandom.seed(0)\nx = half(4)\nassert x == 2\nassert half(3) == 1.5"
    verdict = verdict_of("def half(x):\n    return x // 2", tests)
    assert (verdict.num_tests, verdict.passed_share) == (2, 0.5)
    assert verdict.problems == ("line 5: AssertionError: ",)


def test_tests_run_in_their_order_and_stop_where_their_set_up_fails():
    tests = "x = f(1)\nassert x == 1\nx = f(2)\nassert x == 2"
    assert verdict_of("def f(x):\n    return x", tests).is_passed
    verdict = verdict_of("def f(x):\n    return [1][x - 1]", tests)
    assert (verdict.kind, verdict.num_passed, verdict.passed_share) == ("incomplete", 1, 0.0)
    assert verdict.problems == (
        "not all tests could be run: line 3, their set-up: IndexError: list index out of range",
    )


def test_the_check_function_of_a_benchmark_is_one_test():
    tests = "def check(candidate):\n    assert candidate(2) == 4\n\ncheck(double)"
    assert verdict_of(HONEST, tests) == CodeVerdict("passed", 1, 1)
    assert verdict_of(WRONG, tests) == CodeVerdict("failed", 1, 0, ("line 4: AssertionError: ",))


def test_a_function_named_like_a_built_in_is_imported_by_its_tests():
    code = "def sum(values):\n    return -1"
    with pytest.raises(DataError, match="call no function of the solution"):
        verdict_of(code, "assert sum([1]) == -1")
    assert verdict_of(code, "from solution import sum\nassert sum([1]) == -1").is_passed
    assert verdict_of(code, "import solution\nassert solution.sum([1]) == -1").is_passed


PLAIN = [
    None, True, -1, 1.5, float("inf"), "text", b"\x00\xff", 2j, [1, [2]], (1, (2,)), {1, 2},
    frozenset({3}), {"a": 1, 2: (3,)}, 10**30, -(2**63), 10**5000, bytearray(b"x"), [], {},
    "\ud800", range(3), range(10**30, 0, -(10**20)),
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: str(type(value)))
def test_plain_data_crosses_with_its_type(value):
    back = judge_script.decode(judge_script.encode(value))
    assert back == value
    assert type(back) is (bytes if isinstance(value, bytearray) else type(value))


@pytest.mark.parametrize(
    ("value", "plain"), [(np.int64(3), 3), (np.float32(0.5), 0.5), ([np.uint8(1)], [1])]
)
def test_numbers_of_numpy_cross_as_plain_ones(value, plain):
    back = judge_script.decode(judge_script.encode(value))
    assert (back, type(back)) == (plain, type(plain))


def test_what_is_no_plain_data_is_refused():
    with pytest.raises(TypeError, match="a Fraction is no plain data"):
        judge_script.encode(Fraction(1, 3))
    with pytest.raises(TypeError, match="a object is no plain data"):
        judge_script.encode([object()])
    verdict = verdict_of("def f():\n    return iter([1])", "assert list(f()) == [1]")
    assert verdict.problems == ("line 1: TypeError: a list_iterator is no plain data",)


STOPS = "import unittest\ndef double(x):\n    raise {}\n"
LOOPS = """
import unittest
def test_loop():
    for got in map(double, [1, 2]):
        assert got in (2, 4)
class TestOfMap(unittest.TestCase):
    def test_all(self):
        self.assertTrue(all(map(lambda x: double(x) == x + x, [1, 2])))
    def test_iter(self):
        for got in iter(lambda: double(1), 0):
            self.assertEqual(got, 2)
assert all(map(lambda x: double(x) == x + x, [1, 2]))
for x in (double(x) for x in [1]):
    assert x == 2
"""


@pytest.mark.parametrize("name", ["StopIteration", "StopAsyncIteration", "GeneratorExit"])
def test_no_error_of_the_solution_ends_a_loop_of_the_tests(name):
    verdict = verdict_of(STOPS.format(name), LOOPS, STRONGEST)
    assert (verdict.kind, verdict.num_tests, verdict.num_passed) == ("failed", 5, 0)
    assert all(f"SolutionError: {name}" in problem for problem in verdict.problems)


BLOCKS = """
import contextlib
for x in range(3):
    assert double(x) == x + x
with contextlib.suppress(KeyError):
    if double(1) != 3:
        check = lambda f: None
        check(double)
try:
    assert double(2) == 5
except KeyError:
    pass
"""


def test_a_loop_a_condition_and_a_block_with_an_assertion_are_tests():
    assert verdict_of(HONEST, BLOCKS) == CodeVerdict("failed", 3, 2, ("line 9: AssertionError: ",))
    assert verdict_of("def double(x):\n    return 5 if x else 0", BLOCKS) == CodeVerdict(
        "failed", 3, 2, ("line 3: AssertionError: ",)
    )


CLASS = """
import unittest
class Mixin:
    def test_of_the_mixin(self):
        self.assertEqual(double(self.given), 6)
class TestOfAClass(Mixin, unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.given, cls.torn_down = double(1.5), []
    def tearDown(self):
        self.torn_down.append(self.id())
    def test_fails(self):
        self.assertEqual(double(2), 5)
    def test_later(self):
        self.assertEqual(len(self.torn_down), double(0.5))
    def test_parts(self):
        for x in (1, 2, 3):
            with self.subTest(x=x):
                self.assertEqual(double(x), 4)
"""


def test_a_test_case_is_run_with_its_class_its_tear_down_and_its_parts():
    assert verdict_of(HONEST, CLASS) == CodeVerdict(
        "failed",
        4,
        2,
        (
            "TestOfAClass.test_fails: AssertionError: 4 != 5",
            "TestOfAClass.test_parts: AssertionError: 2 != 4",
        ),
    )


def test_a_class_whose_set_up_fails_passes_nothing():
    verdict = verdict_of("def double(x):\n    return 1 // 0", CLASS)
    assert (verdict.kind, verdict.num_tests, verdict.num_passed) == ("failed", 1, 0)
    assert "setUpClass" in verdict.problems[0]
    assert "ZeroDivisionError" in verdict.problems[0]


def test_no_handler_of_the_tests_hides_that_the_solution_ended():
    tests = """
import unittest
class TestOfMethods(unittest.TestCase):
    def test_text(self):
        try:
            double(1)
        except:
            pass
"""
    verdict = verdict_of("import os\ndef double(x):\n    os._exit(0)", tests)
    assert (verdict.kind, verdict.num_passed) == ("incomplete", 0)
    assert verdict.problems == ("not all tests could be run: the solution ended its process",)


@pytest.mark.parametrize("code", ["double = (", "1 / 0", "import sys\nsys.exit(0)", "'\ud800'"])
def test_code_that_cannot_be_loaded_passes_no_test(code):
    tests = "assert max([1, 2]) == 2\nassert callable(double)\nassert double(1) == 2"
    assert verdict_of(HONEST, tests).is_passed
    verdict = verdict_of(code, tests)
    assert (verdict.kind, verdict.num_passed) == ("incomplete", 0)
    reasons = "could not be loaded: |holds half of a surrogate"
    assert re.match(f"not all tests could be run: the solution ({reasons})", verdict.problems[0])


@pytest.mark.parametrize("condition", ["callable(double)", "[double]", "not double"])
def test_tests_that_never_called_the_solution_are_an_error_and_no_verdict(condition):
    with pytest.raises(DataError, match=r"never called the solution.*Call its functions"):
        verdict_of(HONEST, f"assert {condition}")
    with pytest.raises(DataError, match="never called"):
        verdict_of(WRONG, f"assert {condition}")


NAMES = """
import unittest
def other():
    area = 3
    return [area for area in [area]]
def test_area():
    assert area(2) == 4
def test_volume():
    area = 3
    assert volume(area) == 27
class TestOfArea(unittest.TestCase):
    area = 5
    def test_of_a_class(self):
        self.assertEqual(area(self.area), 25)
assert [area for area in other()] == [3]
assert (lambda volume: volume)(1) == 1
"""


def test_a_name_that_is_bound_in_one_place_is_the_solutions_in_another():
    code = "def area(x): return x * x\ndef volume(x): return x ** 3"
    assert judge_script.names_of_solution(NAMES) == {"area", "volume"}
    assert verdict_of(code, NAMES) == CodeVerdict("passed", 5, 5)


@pytest.mark.parametrize(
    ("tests", "names"),
    [
        ("def set_up():\n    global f\n    f = g\nset_up()\nassert f(1)", {"g"}),
        ("assert f(1)\nf = len", set()),
        ("import os.path as f\nassert f.join(g(1))", {"g"}),
        ("try:\n    f(1)\nexcept ValueError as error:\n    assert h(error)", {"f", "h"}),
        ("assert [y := f(1)] and y", {"f"}),
        ("def test_it(n=f(1)):\n    assert n", {"f"}),
    ],
)
def test_the_solutions_names_follow_pythons_scopes(tests, names):
    assert judge_script.names_of_solution(tests) == names


def test_tests_that_end_their_own_process_are_named():
    verdict = verdict_of(HONEST, "assert double(1) == 2\nimport sys\nsys.exit(0)")
    assert verdict.problems == ("not all tests could be run: the tests ended their own process",)


def test_large_plain_data_can_be_judged():
    code = "import math\nfact, first = math.factorial, lambda n: list(range(n))"
    tests = (
        "import math\nassert fact(2000) == math.factorial(2000)\n"
        "assert first(200_000) == list(range(200_000))\n"
        "def is_even(n): return len(first(n % 3)) == 1\nassert is_even(10**5000)"
    )
    assert verdict_of(code, tests, STRONGEST) == CodeVerdict("passed", 3, 3)


def test_a_value_beyond_the_limit_fails_its_test_and_says_so():
    tests = "assert text(9_000_000) == 'x' * 9_000_000\nassert text(1) == 'x'"
    assert verdict_of("def text(n): return 'x' * n", tests) == CodeVerdict(
        "failed",
        2,
        1,
        ("line 1: SolutionError: its value takes 8.6 MiB; at most 8 MiB can be judged",),
    )


ERRORS = r"""
class TooSmall(ValueError): pass
class Plain(Exception): pass
class Odd(KeyError):
    args = property(lambda self: 1 / 0)
class Stops(StopIteration, ValueError): pass
import json
def f(kind):
    if kind == "json":
        return json.loads("{")
    if kind == "unicode":
        return b"\xff".decode()
    if kind == "key":
        return {}["k"]
    if kind == "long":
        raise ValueError("x" * 1000)
    if kind == "bare":
        raise ValueError
    raise {"own": TooSmall(3, "is small"), "plain": Plain(1), "odd": Odd(), "stops": Stops(),
           "file": FileNotFoundError(2, "gone")}[kind]
"""


@pytest.mark.parametrize(
    ("kind", "caught", "check"),
    [
        ("json", "ValueError", "'Expecting property name' in str(error)"),
        ("unicode", "UnicodeDecodeError", r"error.args[:2] == ('utf-8', b'\xff')"),
        ("key", "KeyError", "error.args == ('k',)"),
        ("long", "ValueError", "str(error) == 'x' * 1000"),
        ("own", "ValueError", "error.args == (3, 'is small')"),
        ("bare", "ValueError", "error.args == ()"),
        ("plain", "Exception", "type(error).__name__ == 'SolutionError'"),
        ("odd", "KeyError", "len(error.args) == 1"),
        ("stops", "Exception", "type(error).__name__ == 'SolutionError'"),
        ("file", "FileNotFoundError", "error.errno == 2"),
    ],
)
def test_an_error_is_the_nearest_built_in_one_with_its_arguments(kind, caught, check):
    tests = (
        f"def test_it():\n    try:\n        f({kind!r})\n    except {caught} as error:\n"
        f"        assert {check}, error\n    else:\n        assert False\n"
    )
    assert verdict_of(ERRORS, tests).problems == ()


def test_an_error_without_a_text_is_an_error_of_its_name():
    code = (
        "class Odd(Exception):\n    def __str__(self): raise SystemExit\n"
        "def double(x):\n    raise Odd if x else ValueError(10 ** 5000)"
    )
    assert verdict_of(code, "assert double(1) == 2\nassert double(0) == 0").problems == (
        "line 1: SolutionError: Odd: ",
        "line 2: ValueError: ",
    )


def test_a_test_that_is_skipped_or_expected_to_fail_never_passes():
    tests = """
import unittest as u
class TestIt(u.TestCase):
    @u.skip("no")
    def test_a(self):
        self.assertEqual(double(1), 2)
    @u.expectedFailure
    def test_b(self):
        self.assertEqual(double(1), 3)
    @u.expectedFailure
    def test_c(self):
        self.assertEqual(double(1), 2)
"""
    verdict = verdict_of(HONEST, tests)
    assert (verdict.kind, verdict.num_tests, verdict.num_passed) == ("failed", 3, 0)
