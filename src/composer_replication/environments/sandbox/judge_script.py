"""The script of the two processes that judge a solution; each is confined on its own.

    solution    holds the model's code and answers calls of its functions
    tests       holds the hidden tests; a name of the solution here is a function that asks

Only plain data crosses between them, as JSON with the types spelled out. The tests' process never
executes the model's code, so nothing that code patches, compares or exits can reach the tests.
Imports the standard library alone: the package is not there inside a sandbox.
"""

import ast
import builtins
import json
import numbers
import symtable
import sys
import types
import unittest
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

MAX_MESSAGE_BYTES = 8 << 20
"""Of one answer as JSON."""
_MAX_ARGUMENTS = 1 << 16
"""Characters of an error's arguments as JSON; beyond, its text stands for them."""
_SCALARS = (bool, int, float, str)
_LARGEST_JSON_NUMBER = 1 << 63
"""Numbers beyond cross as hexadecimal text: Python reads and writes no decimal of 4300 digits."""
_CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class SolutionError(Exception):
    """What the model's code raised, where no test may see it as the built-in that it is named."""


class SolutionEndedError(BaseException):
    """The model's process ended or answered nonsense; no `except Exception` of a test hides it.

    Its text is empty where the process ended.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)


def main() -> None:
    """Be one of the two processes: ROLE, then the numbers of its file descriptors."""
    role, *numbers = sys.argv[1:]
    if role == "solution":
        serve(*(int(number) for number in numbers))
    else:
        run_tests(*(int(number) for number in numbers))


def encode(value: object) -> object:
    """A value as JSON that keeps the type.

    Raises:
        TypeError: something else than None, bool, int, float, str, bytes, complex, list, tuple,
            dict, set, frozenset, range, and numbers of numpy.
    """
    for kind in _SCALARS:
        if isinstance(value, kind):
            plain = kind(value)
            is_large = type(plain) is int and abs(plain) >= _LARGEST_JSON_NUMBER
            return {"int": f"{plain:x}"} if is_large else plain
    if value is None:
        return None
    for name, container in _CONTAINERS.items():
        if isinstance(value, container):
            return {name: [encode(item) for item in cast(Iterable[object], value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, numbers.Integral):
        return encode(int(value))
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):
        return float(value)
    raise TypeError(f"a {type(value).__name__} is no plain data")


def decode(value: object) -> object:
    """The value that `encode` made the JSON of; always of built-in types.

    Raises:
        Exception: JSON that `encode` cannot have made, of whatever kind comes up.
    """
    if isinstance(value, list):
        raise TypeError("a list that says no type")
    if not isinstance(value, dict):
        return value
    ((name, items),) = value.items()
    if name == "dict":
        return {decode(key): decode(item) for key, item in items}
    if name == "int":
        return int(items, 16)
    if name == "bytes":
        return bytes.fromhex(items)
    if name == "complex":
        return complex(*items)
    if name == "range":
        start, stop, step = cast(list[int], [decode(item) for item in items])
        return range(start, stop, step)
    return _CONTAINERS[name](decode(item) for item in items)


def serve(read_fd: int, write_fd: int) -> None:
    """Execute the model's code and answer one call a line."""
    with open(read_fd, encoding="ascii") as calls, open(write_fd, "w", encoding="ascii") as answers:
        module = types.ModuleType("solution")
        sys.modules["solution"] = module
        try:
            code = compile(Path("solution.py").read_text("utf-8"), "solution.py", "exec")
            exec(code, vars(module))
            problem = None
        except BaseException as error:
            problem = _raised(error)
        for line in calls:
            print(_answer(module, json.loads(line), problem), file=answers, flush=True)


def _answer(module: types.ModuleType, call: dict, problem: dict | None) -> str:
    """The line that answers a call; `problem` is why the code could not be loaded, if it could not.

    A call without a name asks for that alone.
    """
    try:
        if problem is not None or call["name"] is None:
            return json.dumps(problem or {"value": None})
        arguments = [decode(value) for value in call["arguments"]]
        keywords = {name: decode(value) for name, value in call["keywords"].items()}
        line = json.dumps({"value": encode(getattr(module, call["name"])(*arguments, **keywords))})
        if len(line) < MAX_MESSAGE_BYTES:
            return line
        sizes = f"{len(line) / (1 << 20):.1f} MiB; at most {MAX_MESSAGE_BYTES >> 20} MiB"
        return json.dumps({"raised": [], "message": f"its value takes {sizes} can be judged"})
    except BaseException as error:
        return json.dumps(_raised(error))


def _raised(error: BaseException) -> dict:
    """An error as JSON: the names of its classes, nearest first, its text and its arguments."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return {"raised": kinds, "message": _text_of(error), "arguments": _arguments_of(error)}


def _arguments_of(error: BaseException) -> object:
    try:
        arguments = encode(tuple(error.args))
        return arguments if len(json.dumps(arguments)) <= _MAX_ARGUMENTS else None
    # They are the model's, and may be anything.
    except BaseException:
        return None


def _text_of(error: BaseException) -> str:
    try:
        return str(error)[:200]
    # The text of an error of the model's is its code too, and a number may be too long for one.
    except BaseException:
        return ""


class Solution(types.ModuleType):
    """Stands for the model's module: any name is a function that asks the other process."""

    def __init__(self, ask: Callable[[str, tuple, dict], object]) -> None:
        super().__init__("solution")
        self._ask = ask

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **keywords: self._ask(name, arguments, keywords)


def run_tests(read_fd: int, write_fd: int, report_fd: int) -> None:
    """Run the hidden tests; report each as a JSON line, and then that all of them were run."""
    with (
        open(read_fd, "rb") as answers,
        open(write_fd, "w", encoding="ascii") as calls,
        open(report_fd, "w", encoding="utf-8") as report,
    ):
        ended: list[SolutionEndedError] = []
        asked: set[str | None] = set()

        def ask(name: str | None, arguments: tuple, keywords: dict) -> object:
            asked.add(name)
            try:
                return exchange(name, arguments, keywords)
            except SolutionEndedError as error:
                ended.append(error)
                raise

        def exchange(name: str | None, arguments: tuple, keywords: dict) -> object:
            call = {
                "name": name,
                "arguments": [encode(value) for value in arguments],
                "keywords": {key: encode(value) for key, value in keywords.items()},
            }
            try:
                print(json.dumps(call), file=calls, flush=True)
            except BrokenPipeError as error:
                raise SolutionEndedError from error
            return _value_of(answers.readline(MAX_MESSAGE_BYTES))

        def tell(**row: object) -> None:
            # A bare `except` of a test, or unittest, may have caught it.
            for error in ended:
                raise error
            print(json.dumps(row), file=report, flush=True)

        try:
            if _run(ask, tell):
                tell(is_complete=True, asks=bool(asked - {None}))
        except SolutionEndedError as error:
            print(json.dumps({"stopped": str(error)}), file=report, flush=True)


def _run(ask: Callable[[str | None, tuple, dict], object], tell: Callable[..., None]) -> bool:
    """Whether all tests were run."""
    solution = Solution(ask)
    sys.modules["solution"] = solution
    tests = Path("tests.py").read_text("utf-8")
    tree = ast.parse(tests)
    space: dict = {"__name__": "hidden_tests"}
    space |= {name: getattr(solution, name) for name in names_of_solution(tests)}
    try:
        # Tests that ask for nothing would pass for code that does not compile.
        ask(None, (), {})
    except Exception as error:
        tell(stopped=f"the solution could not be loaded: {_problem_text(error)}")
        return False
    for node in tree.body:
        code = compile(ast.Module([node], []), "tests.py", "exec")
        problem = _problem_of(lambda code=code: exec(code, space))
        if is_test_statement(node):
            tell(test=f"line {node.lineno}", problem=problem)
        elif problem is not None:
            # What follows needs what failed here.
            tell(stopped=f"line {node.lineno}, their set-up: {problem}")
            return False
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            tell(test=node.name, problem=_problem_of(space[node.name]))
        elif isinstance(node, ast.ClassDef) and issubclass(space[node.name], unittest.TestCase):
            for name, problem in _problems_of_methods(space[node.name]).items():
                tell(test=name, problem=problem)
    return True


def names_of_solution(tests: str) -> set[str]:
    """Names that the tests use as globals and do not define: what they expect of the solution.

    A built-in is never among them, so a solution cannot put its own `all` or `len` into the tests;
    tests of a function with such a name import it: `from solution import sum`.
    """
    top = symtable.symtable(tests, "tests.py", "exec")
    bound, used = set(vars(builtins)) | {"__name__"}, set()
    waiting = [top]
    for table in waiting:
        waiting += table.get_children()
        for symbol in table.get_symbols():
            is_top = table is top
            if symbol.is_referenced() and (is_top or symbol.is_global()):
                used.add(symbol.get_name())
            is_bound = symbol.is_assigned() or symbol.is_imported()
            if is_bound and (is_top or symbol.is_declared_global()):
                bound.add(symbol.get_name())
    return used - bound


def is_test_statement(node: ast.stmt) -> bool:
    """Whether a statement at the top is a test by itself; what else stands there prepares tests.

    Tests are an assert, a call of a plain name, such as `check(solve)`, or of an `assert...`, and a
    loop, condition or `with` that holds one of these.
    """
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        called = node.value.func
        is_assertion = isinstance(called, ast.Attribute) and called.attr.startswith("assert")
        return is_assertion or isinstance(called, ast.Name)
    return isinstance(node, ast.Assert) or any(map(is_test_statement, statements_in(node)))


def statements_in(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements that run where this one does: all of its blocks, no body of a definition."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if not isinstance(child, ast.expr):
            yield from statements_in(child)


def _problems_of_methods(found: type[unittest.TestCase]) -> dict[str, str | None]:
    """Run the tests of a class; what is skipped or expected to fail has a problem too."""
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(found)
    names = [test.id() for test in suite if isinstance(test, unittest.TestCase)]
    result = unittest.TestResult()
    suite.run(result)
    skipped = [(test, f"it was skipped: {reason}") for test, reason in result.skipped]
    succeeded = [(test, "it was expected to fail") for test in result.unexpectedSuccesses]
    problems: dict[str, str | None] = {}
    for test, text in (
        *result.errors,
        *result.failures,
        *result.expectedFailures,
        *skipped,
        *succeeded,
    ):
        # Of the parts of a test made by `subTest`, the first that failed.
        problems.setdefault(getattr(test, "test_case", test).id(), _last_words(text))
    # Where setUpClass failed no test ran, and the problem has a name of its own.
    ran = dict.fromkeys(names) if result.testsRun else {}
    return {
        name.removeprefix("hidden_tests."): problem for name, problem in (ran | problems).items()
    }


def _last_words(traceback: str) -> str:
    """The error of a traceback's text: its first line of text that is not indented."""
    lines = [line for line in traceback.splitlines() if line and not line.startswith((" ", "Tra"))]
    return (lines or [traceback])[0][:200]


def _problem_of(test: Callable[[], object]) -> str | None:
    try:
        test()
    except Exception as error:
        return _problem_text(error)
    return None


def _problem_text(error: Exception) -> str:
    return f"{type(error).__name__}: {_text_of(error)}"


def _value_of(line: bytes) -> object:
    """The value in an answer; what the solution raised is raised here, as an `Exception` only."""
    if len(line) >= MAX_MESSAGE_BYTES:
        raise SolutionEndedError("the solution's answer is too long")
    if not line.endswith(b"\n"):
        raise SolutionEndedError
    try:
        answer = json.loads(line)
        if "raised" not in answer:
            return decode(answer["value"])
        kinds, message = list(map(str, answer["raised"])), str(answer["message"])
        arguments = cast(tuple | None, decode(answer.get("arguments")))
        raised = _error_of(kinds, (message,) if arguments is None else arguments)
    except Exception as error:
        raise SolutionEndedError(f"the solution's answer is malformed ({error})") from error
    raise raised or SolutionError(": ".join([*kinds[:1], message]))


def _error_of(kinds: list[str], arguments: tuple) -> Exception | None:
    """The nearest built-in error among an error's classes that a test may see.

    None where that is `Exception` itself, or one that would end a loop over `map` or a generator in
    the tests as if all had passed.
    """
    for name in kinds:
        found = getattr(builtins, name, None)
        if not isinstance(found, type) or not issubclass(found, Exception) or found is Exception:
            continue
        if issubclass(found, StopIteration | StopAsyncIteration):
            return None
        try:
            return found(*arguments)
        except Exception:
            # Arguments of a class of the model's own: the next one may take them.
            continue
    return None


if __name__ == "__main__":
    main()
