"""No test goes away quietly: what may be skipped, what must run, and what a name promises."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = ROOT / "tests" / "conftest.py"
FILES = sorted((ROOT / "tests").rglob("*.py"))

SKIPPING = {"skip", "skipif", "xfail", "importorskip", "SkipTest", "skipTest", "skipUnless"}
UNCOLLECTED = {"collect_ignore", "collect_ignore_glob", "__test__", "pytest_ignore_collect"}
TOLERANCES = {"allclose", "isclose", "approx", "assert_close"}
NEEDS_A_MACHINE = {"cuda", "modal", "hub"}
BIT_EQUALITY = re.compile("bit_for_bit|byte_for_byte|test_resuming_equals")


def parse(path):
    return ast.parse(path.read_text(), str(path))


def names_in(tree):
    """Every plain name, attribute and imported name of a tree, with its node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, node
        elif isinstance(node, ast.Name):
            yield node.id, node
        elif isinstance(node, ast.alias):
            yield node.name, node


def platform_skips(tree):
    """`skipif(sys.platform ...)`: a claim about one operating system."""
    return {
        id(call.func)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "skipif"
        and ast.unparse(call.args[0]).startswith("sys.platform ")
    }


def critical_tests():
    """Every test that a planted flaw names as its killer: file and function."""
    patches = tomllib.loads((ROOT / "bench" / "flaw_patches.toml").read_text())
    named = {
        test.partition("[")[0]
        for flaw in patches["flaw"]
        for mutant in flaw["mutant"]
        for test in mutant["tests"]
    }
    return sorted(tuple(test.split("::")) for test in named)


def functions_of(tree):
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def marks_of(function, tree):
    """Names in the function's decorators and in the module's `pytestmark`."""
    module_marks = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    return {
        name for part in (*function.decorator_list, *module_marks) for name, _ in names_in(part)
    }


def returns_early(function):
    """Whether a `return` of its own lets the function end before its last line."""
    waiting = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Return):
            return True
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return False


def with_its_helpers(function, functions):
    """The function and the functions of its module that it calls, and those they call."""
    found, waiting = {}, [function]
    while waiting:
        current = waiting.pop()
        found[current.name] = current
        called = {name for name, _ in names_in(current)} & functions.keys() - found.keys()
        waiting += [functions[name] for name in called]
    return found.values()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_skipped_but_by_the_markers_of_what_a_machine_lacks(path):
    tree = parse(path)
    allowed = platform_skips(tree)
    if path == CONFTEST:
        # The one place that skips: it adds the marker for what the machine lacks.
        hook = functions_of(tree)["pytest_collection_modifyitems"]
        allowed |= {id(node) for name, node in names_in(hook) if name == "skip"}
    found = [
        f"{name} in line {node.lineno}"
        for name, node in names_in(tree)
        if name in SKIPPING | UNCOLLECTED and id(node) not in allowed
    ]
    assert not found


def test_the_one_place_that_skips_knows_three_reasons():
    assert set(re.findall(r'"(\w+)": _why_no_', CONFTEST.read_text())) == NEEDS_A_MACHINE


def test_no_option_of_the_project_leaves_tests_out():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests"]
    assert options.keys() <= {"testpaths", "addopts", "filterwarnings", "markers"}
    assert re.findall(r"(?:^|\s)(-\S+)", options["addopts"]) == [
        "-rs", "--strict-markers", "--strict-config", options["addopts"].split()[-1]
    ]  # fmt: skip
    assert options["addopts"].split()[-1].startswith("--jaxtyping-packages=")
    command = (
        "\tHF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile "
        "--no-loadscope-reorder\n"
    )
    assert command in (ROOT / "Makefile").read_text()
    assert (ROOT / ".ci" / "run").read_text().endswith("make check\nmake test\n")


def test_the_critical_tests_run_on_every_machine():
    lost = []
    for file, name in critical_tests():
        tree = parse(ROOT / file)
        function = functions_of(tree).get(name)
        if function is None or not name.startswith("test_"):
            lost.append(f"{file}::{name} is not there")
        elif marks_of(function, tree) & NEEDS_A_MACHINE:
            lost.append(f"{file}::{name} needs a machine")
        elif returns_early(function):
            lost.append(f"{file}::{name} can end before its end")
    assert not lost


def test_a_test_that_claims_bit_equality_has_no_tolerance():
    loose, num_claims = [], 0
    for path in FILES:
        functions = functions_of(parse(path))
        for claim in functions.values():
            if not (claim.name.startswith("test_") and BIT_EQUALITY.search(claim.name)):
                continue
            num_claims += 1
            for function in with_its_helpers(claim, functions):
                used = {name for name, _ in names_in(function)} & TOLERANCES
                loose += [f"{claim.name}: {function.name} uses {name}" for name in used]
    assert not loose
    assert num_claims >= 4
