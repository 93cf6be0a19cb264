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
import sys
import types
import unittest
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

MAX_MESSAGE_BYTES = 1 << 20
_SCALARS = (bool, int, float, str)
_CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class SolutionError(Exception):
    """What the model's code raised, where it is no built-in exception."""


class SolutionEndedError(BaseException):
    """The model's process ended or answered nonsense; no `except Exception` of a test hides it."""


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
            dict, set and frozenset.
    """
    for kind in _SCALARS:
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    for name, container in _CONTAINERS.items():
        if isinstance(value, container):
            return {name: [encode(item) for item in cast(Iterable[object], value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": list(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
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
    if name == "bytes":
        return bytes(items)
    if name == "complex":
        return complex(*items)
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
            reply = problem or _answer(module, json.loads(line))
            print(json.dumps(reply), file=answers, flush=True)


def _answer(module: types.ModuleType, call: dict) -> dict:
    try:
        arguments = [decode(value) for value in call["arguments"]]
        keywords = {name: decode(value) for name, value in call["keywords"].items()}
        return {"value": encode(getattr(module, call["name"])(*arguments, **keywords))}
    except BaseException as error:
        return _raised(error)


def _raised(error: BaseException) -> dict:
    return {"raised": type(error).__name__, "message": str(error)[:200]}


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

        def ask(name: str, arguments: tuple, keywords: dict) -> object:
            call = {
                "name": name,
                "arguments": [encode(value) for value in arguments],
                "keywords": {key: encode(value) for key, value in keywords.items()},
            }
            try:
                print(json.dumps(call), file=calls, flush=True)
            except BrokenPipeError as error:
                raise SolutionEndedError("it has ended") from error
            return _value_of(answers.readline(MAX_MESSAGE_BYTES))

        solution = Solution(ask)
        sys.modules["solution"] = solution
        tree = ast.parse(Path("tests.py").read_text("utf-8"))
        space: dict = {"__name__": "hidden_tests"}
        space |= {name: getattr(solution, name) for name in names_of_solution(tree)}
        for name, test in _parts_of(tree, space):
            problem = _problem_of(test)
            if name is not None or problem is not None:
                print(json.dumps({"test": name, "problem": problem}), file=report, flush=True)
            if name is None and problem is not None:
                # What follows needs what failed here.
                return
        print(json.dumps({"is_complete": True}), file=report, flush=True)


def names_of_solution(tree: ast.Module) -> set[str]:
    """Names that the tests use and nobody defines: what they expect of the solution.

    A built-in is never among them, so a solution cannot put its own `all` or `len` into the tests;
    tests of a function with such a name import it: `from solution import sum`.
    """
    used, bound = set(), set(vars(builtins)) | {"__name__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return used - bound


def _parts_of(tree: ast.Module, space: dict) -> Iterator[tuple[str | None, Callable[[], object]]]:
    """The statements at the top in their order, then the tests that these defined.

    An assert and a call of a plain name, such as `check(solve)`, are tests and have a name; what
    else stands at the top prepares them and has none. A `test` function and each method of a
    `unittest.TestCase` is a test.
    """
    for node in tree.body:
        code = compile(ast.Module([node], []), "tests.py", "exec")
        call = node.value if isinstance(node, ast.Expr) else None
        is_call = isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        is_test = isinstance(node, ast.Assert) or is_call
        yield f"line {node.lineno}" if is_test else None, lambda code=code: exec(code, space)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            yield node.name, space[node.name]
        elif isinstance(node, ast.ClassDef):
            yield from _methods_of(space[node.name])


def _methods_of(found: type) -> Iterator[tuple[str, Callable[[], object]]]:
    if not issubclass(found, unittest.TestCase):
        return
    for name in unittest.defaultTestLoader.getTestCaseNames(found):
        yield f"{found.__name__}.{name}", found(name).debug


def _problem_of(test: Callable[[], object]) -> str | None:
    try:
        test()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def _value_of(line: bytes) -> object:
    """The value in an answer; what the solution raised is raised here, as an `Exception` only."""
    if not line.endswith(b"\n"):
        raise SolutionEndedError("it has ended, or its answer is too long")
    try:
        answer = json.loads(line)
        if "raised" not in answer:
            return decode(answer["value"])
        name, message = str(answer["raised"]), str(answer["message"])
    except Exception as error:
        raise SolutionEndedError(f"its answer is malformed ({error})") from error
    found = getattr(builtins, name, None)
    if not (isinstance(found, type) and issubclass(found, Exception)):
        raise SolutionError(f"{name}: {message}")
    try:
        raised = found(message)
    except TypeError:
        # Some, such as UnicodeDecodeError, are not made from one text.
        raised = SolutionError(f"{name}: {message}")
    raise raised


if __name__ == "__main__":
    main()
