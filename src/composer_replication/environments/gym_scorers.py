"""Finds, in the code of a reasoning-gym generator, what would execute a model's answer.

Some scorers pass the answer to `eval` or to sympy, whose parser evaluates it too: what a model
wrote would then run in the training process, with all rights of its user.
"""

import inspect
import types
from collections.abc import Iterator

_EVALUATING = {
    "eval",
    "exec",
    "__import__",
    "import_module",
    "parse_expr",
    "parse_latex",
    "sympify",
}
_EVALUATING_PACKAGES = {"sympy", "pickle", "subprocess"}
"""sympy: its numbers, polynomials and most of its functions evaluate a text that they are given."""


def evaluating_names(generator_class: type) -> list[str]:
    """What can execute a text and is reached by the generator's scorer, sorted.

    It follows every name that the scorer's code uses to functions, methods and classes of the same
    package. A scorer that evaluates only its own texts is found as well.

    Example: `evaluating_names(BinaryMatrixDataset)` -> `["eval"]`.
    """
    package = _root(generator_class.__module__)
    found: set[str] = set()
    seen: set[object] = set()
    waiting: list[object] = [inspect.getattr_static(generator_class, "score_answer")]
    while waiting:
        reached = _unwrapped(waiting.pop())
        if not isinstance(reached, types.FunctionType | type) or reached in seen:
            continue
        seen.add(reached)
        if isinstance(reached, type):
            waiting += [member for member in vars(reached).values() if _is_code(member)]
            continue
        for name in _names_in(reached.__code__):
            value = reached.__globals__.get(name)
            is_own = value is not None and _root(_module_of(value)) == package
            if name in _EVALUATING and not is_own:
                found.add(name)
            for root in (_root(_module_of(value)), _root(name)):
                if root in _EVALUATING_PACKAGES:
                    found.add(root)
            if is_own:
                waiting.append(value)
            waiting.append(inspect.getattr_static(generator_class, name, None))
    return sorted(found)


def _names_in(code: types.CodeType) -> Iterator[str]:
    """Names that a function and its inner ones use, attributes and imports among them."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _is_code(member: object) -> bool:
    return isinstance(member, types.FunctionType | staticmethod | classmethod | property)


def _unwrapped(member: object) -> object:
    if isinstance(member, property):
        member = member.fget
    if isinstance(member, staticmethod | classmethod):
        member = member.__func__
    return inspect.unwrap(member) if isinstance(member, types.FunctionType) else member


def _module_of(value: object) -> str:
    if isinstance(value, types.ModuleType):
        return value.__name__
    module = getattr(value, "__module__", None)
    return module if isinstance(module, str) else ""


def _root(module: str) -> str:
    return module.partition(".")[0]
