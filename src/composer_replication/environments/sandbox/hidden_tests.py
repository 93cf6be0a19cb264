"""Which hidden tests are taken: those of which every test runs and counts.

What would never run, or could never pass, is refused with its line before any code is judged.
"""

import ast
from collections import Counter
from collections.abc import Iterator, Sequence

from composer_replication.environments.sandbox.judge_script import (
    is_test_statement,
    names_of_solution,
    statements_in,
)
from composer_replication.errors import DataError, shown

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Flaw = tuple[int, str]
"""A line, and what is wrong there and what to do."""

_FIXTURES = {"setUp", "tearDown", "setUpClass", "tearDownClass"}
_UNCALLED = {
    "setUpModule", "tearDownModule", "setup_module", "teardown_module", "setup_function",
    "teardown_function", "setup_method", "teardown_method", "setup_class", "teardown_class",
}  # fmt: skip
_SKIPPING = {"skip", "skipif", "skipIf", "skipUnless", "skipTest", "SkipTest", "importorskip"}
_SKIPPING |= {"xfail", "expectedFailure"}
_TEST_MODULES = ("unittest", "pytest")


def check_tests(tests: str) -> None:
    """Refuse tests that cannot be compiled, or of which a part would not run or not count.

    Raises:
        DataError: with the first line at fault and what to do.
    """
    try:
        tree = ast.parse(tests)
        compile(tree, "tests.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise DataError(
            f"The tests {shown(tests)} are no Python: {error}. Every solution would fail them. "
            "Correct the tests."
        ) from error
    flaws = sorted([*_flaws_at_the_top(tree), *_flaws_of_classes(tree), *_skips(tree)])
    flaws = flaws or sorted(_uncalled_assertions(tree))
    if flaws:
        line, text = flaws[0]
        raise DataError(f"The tests {shown(tests)} would not all be run: line {line}: {text}")
    if not _has_test(tree):
        raise DataError(
            f"The tests {shown(tests)} hold no test, so every solution would pass. "
            "Give asserts, functions named test..., or a unittest.TestCase."
        )
    if not names_of_solution(tests) and not _imports(tree, "solution"):
        raise DataError(
            f"The tests {shown(tests)} call no function of the solution, so every solution would "
            "pass. Call one by a name that the tests do not define, or import it from solution."
        )


def _has_test(tree: ast.Module) -> bool:
    functions = [node for node in tree.body if _is_test_function(node)]
    methods = [node for found in _classes(tree) for node in _test_methods(found)]
    return bool(functions or methods) or any(map(is_test_statement, tree.body))


def _flaws_at_the_top(tree: ast.Module) -> Iterator[_Flaw]:
    functions = [node for node in tree.body if isinstance(node, _Function)]
    yield from _flaws_of_functions(functions, num_given=0)
    for node in tree.body:
        yield from _misplaced(node)
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            kept = [inner for inner in node.body if not _is_main_call(inner)]
            if kept:
                yield (
                    kept[0].lineno,
                    "it stands under `if __name__ ...`, which does not hold here. Move it out.",
                )
        if _is_main_call(node):
            yield node.lineno, "it would end the tests' process. Leave it out: tests are found."
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            names = [ast.unparse(target) for target in node.targets]
            if any(name.startswith("test") for name in names):
                yield node.lineno, f"{names[0]} is a lambda, which is no test. Write a def."


def _flaws_of_functions(functions: Sequence[_Function], *, num_given: int) -> Iterator[_Flaw]:
    """Of the functions at the top, or of a class's methods, which are given one argument."""
    times = Counter(node.name for node in functions)
    for node in functions:
        name = node.name
        if name in _UNCALLED:
            yield (
                node.lineno,
                f"nothing calls {name}. Write the set-up at the top, or as setUp or setUpClass of "
                "a unittest.TestCase.",
            )
        if not name.startswith("test"):
            continue
        if isinstance(node, ast.AsyncFunctionDef):
            yield node.lineno, f"{name} is async, which nothing awaits. Write a def."
        if times[name] > 1:
            yield node.lineno, f"{name} is defined {times[name]} times. Give each another name."
        if any(isinstance(inner, ast.Yield | ast.YieldFrom) for inner in _own_nodes(node)):
            yield node.lineno, f"{name} holds a yield, so a call runs none of it. Use a loop."
        parameters = node.args
        needed = len(parameters.posonlyargs + parameters.args) - len(parameters.defaults)
        is_static = any(ast.unparse(found) == "staticmethod" for found in node.decorator_list)
        given = 0 if is_static else num_given
        if needed > given or any(default is None for default in parameters.kw_defaults):
            yield (
                node.lineno,
                f"{name} needs arguments, which nothing gives it. Loop over the cases inside it.",
            )


def _flaws_of_classes(tree: ast.Module) -> Iterator[_Flaw]:
    run = _classes_that_run(tree)
    for found in _classes(tree):
        methods = [node for node in found.body if isinstance(node, _Function)]
        yield from _flaws_of_functions(methods, num_given=1)
        for node in found.body:
            yield from _misplaced(node)
            if isinstance(node, ast.ClassDef) and _test_methods(node):
                yield node.lineno, f"{node.name} stands in another class. Move it to the top."
        if _test_methods(found) and found.name not in run:
            yield (
                found.lineno,
                f"{found.name} is no unittest.TestCase, so its methods would not be run. Derive "
                "it from unittest.TestCase, or make them functions.",
            )


def _misplaced(node: ast.stmt) -> Iterator[_Flaw]:
    for inner in statements_in(node):
        is_class = isinstance(inner, ast.ClassDef) and bool(_test_methods(inner))
        if is_class or _is_test_function(inner):
            yield (
                inner.lineno,
                "a test that a condition, a loop or another block defines is not found. Move it "
                "to the top.",
            )


def _skips(tree: ast.Module) -> Iterator[_Flaw]:
    """Skipping by unittest and pytest: such a test could neither pass nor be left out."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner in (*_TEST_MODULES, "self", "pytest.mark"):
                names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and node.module in _TEST_MODULES:
            names = [alias.name for alias in node.names]
        skipping = sorted(_SKIPPING & set(names))
        if skipping:
            line = getattr(node, "lineno", 0)
            yield line, f"{skipping[0]}: every solution would fail here. Leave out that test."


def _uncalled_assertions(tree: ast.Module) -> Iterator[_Flaw]:
    """Functions that assert and that neither run as a test nor are named anywhere."""
    run = [node for node in tree.body if _is_test_function(node)]
    run += [node for found in _classes(tree) for node in _test_methods(found)]
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    named |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, _Function) or node in run or node.name in _FIXTURES | named:
            continue
        if any(map(is_test_statement, node.body)) and not node.name.startswith("__"):
            yield node.lineno, f"nothing calls {node.name}. Call it, or name it test_{node.name}."


def _classes(tree: ast.Module) -> list[ast.ClassDef]:
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def _is_test_function(node: ast.AST) -> bool:
    return isinstance(node, _Function) and node.name.startswith("test")


def _test_methods(found: ast.ClassDef) -> list[ast.stmt]:
    return [node for node in found.body if _is_test_function(node)]


def _classes_that_run(tree: ast.Module) -> set[str]:
    """Names of the classes at the top that are a `TestCase`, or that one inherits from."""
    cases = {"unittest.TestCase"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.asname for alias in node.names if alias.name == "unittest"]
            cases |= {f"{name}.TestCase" for name in found if name}
        if isinstance(node, ast.ImportFrom) and node.module == "unittest":
            cases |= {
                alias.asname or "TestCase" for alias in node.names if alias.name == "TestCase"
            }
    bases = {node.name: set(map(ast.unparse, node.bases)) for node in _classes(tree)}
    for name, own in bases.items():
        if own & cases:
            cases.add(name)
    # Bases stand above what is derived from them.
    for name, own in reversed(bases.items()):
        if name in cases:
            cases |= own
    return cases


def _imports(tree: ast.Module, module: str) -> bool:
    return any(
        (isinstance(node, ast.Import) and any(alias.name == module for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == module)
        for node in ast.walk(tree)
    )


def _is_main_call(node: ast.stmt) -> bool:
    call = node.value if isinstance(node, ast.Expr) else None
    names = [f"{module}.main" for module in _TEST_MODULES]
    return isinstance(call, ast.Call) and ast.unparse(call.func) in names


def _own_nodes(function: _Function) -> Iterator[ast.AST]:
    """The nodes of a function's body, without those of functions and lambdas inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, _Function | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)
