"""The tools of the API-drift task, and the drift: the rules by which their API left the old one.

A *call* is a flat dict with the key `tool`; "old" is the convention that demonstrations show.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from composer_replication.environments.protocol import ToolError
from composer_replication.errors import ConfigError

RuleKind = Literal["renamed_key", "required_flag", "absolute_path", "read_first", "changed_value"]

TOOL_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "read": ("path",),
        "write": ("path", "text"),
        "edit": ("path", "text"),
        "list": ("path",),
        "search": ("text",),
        "test": ("path", "mode"),
        "delete": ("path",),
        "move": ("path", "to"),
    }
)
"""Tool -> its keys under the old convention; the first one holds the target."""

PATH_KEYS = frozenset({"path", "to"})
MODES = ("quick", "full")
"""The values of `mode` under the old convention."""

_NEW_KEYS = {
    "path": ("file", "filename", "target", "location"),
    "text": ("pattern", "content", "query"),
    "to": ("dest", "into"),
}
_FLAGS = ("confirm", "force", "apply")
_NEW_MODES = ("fast", "smoke", "brief")
_CHANGES_A_FILE = ("edit", "delete", "move")


@dataclass(frozen=True, slots=True)
class Rule:
    """One way in which one tool left the old convention.

    Example: `Rule("read", "renamed_key", "path", "file")`.
    """

    tool: str
    kind: RuleKind
    old: str = ""
    """The old key or value; empty for the other kinds."""
    new: str = ""
    """The new key, flag or value; empty for `absolute_path` and `read_first`."""


@dataclass(frozen=True, slots=True)
class Drift:
    """The whole drift: at most one rule per tool, so that one error shows all there is to learn.

    Example: `drift_from_seed(0, num_drifted_tools=1)` -> only `read` drifted.
    """

    rules: tuple[Rule, ...]

    def rule_of(self, tool: str) -> Rule | None:
        """The rule that hits `tool`, if one does."""
        return next((rule for rule in self.rules if rule.tool == tool), None)

    def key_of(self, tool: str, old_key: str) -> str:
        """The key that `tool` takes today where the old convention had `old_key`."""
        rule = self.rule_of(tool)
        if rule and rule.kind == "renamed_key" and rule.old == old_key:
            return rule.new
        return old_key

    def needs_read_first(self, tool: str) -> bool:
        """Whether `tool` wants the file read earlier in the episode."""
        rule = self.rule_of(tool)
        return rule is not None and rule.kind == "read_first"

    def translate(self, old_call: Mapping[str, str]) -> dict[str, str | bool]:
        """Today's form of an old-convention call (a read that must come first is not in it)."""
        tool = old_call["tool"]
        rule = self.rule_of(tool)
        call: dict[str, str | bool] = {self.key_of(tool, k): v for k, v in old_call.items()}
        if rule and rule.kind == "required_flag":
            call[rule.new] = True
        if rule and rule.kind == "changed_value" and call["mode"] == rule.old:
            call["mode"] = rule.new
        if rule and rule.kind == "absolute_path":
            call |= {key: f"/{old_call[key]}" for key in PATH_KEYS & old_call.keys()}
        return call

    def accept(self, tool: str, arguments: Mapping[str, object]) -> dict[str, str]:
        """The arguments under their old keys and values, if today's `tool` takes them.

        Checks keys, then types, then the values that the rule of this tool names.

        Raises:
            ToolError: kind `unknown_key`, `missing_key`, `missing_flag`, `wrong_type`,
                `relative_path` or `bad_value`; the message is one short imperative.
        """
        rule = self.rule_of(tool)
        old_keys = {self.key_of(tool, key): key for key in TOOL_KEYS[tool]}
        flag = rule.new if rule and rule.kind == "required_flag" else None
        _check_keys(arguments, list(old_keys), flag)
        values = {key: _text(key, arguments[key]) for key in old_keys}
        if flag and arguments.get(flag) is not True:
            raise ToolError("missing_flag", f'Add "{flag}": true.')
        for key in PATH_KEYS & values.keys():
            if rule and rule.kind == "absolute_path" and not values[key].startswith("/"):
                raise ToolError("relative_path", "Start the path with /.")
        if "mode" in values:
            values["mode"] = _old_mode(rule, values["mode"])
        return {
            old: values[key].removeprefix("/") if old in PATH_KEYS else values[key]
            for key, old in old_keys.items()
        }


def _check_keys(arguments: Mapping[str, object], needed: list[str], flag: str | None) -> None:
    unknown = [key for key in arguments if key not in needed and key != flag]
    missing = [key for key in needed if key not in arguments]
    # Small models follow a short imperative; listing what was wrong halved their use of the key.
    if missing:
        kind = "unknown_key" if unknown else "missing_key"
        raise ToolError(kind, f'Use the key "{missing[0]}".')
    if unknown:
        raise ToolError("unknown_key", f"Leave out the key {_quoted(unknown[0])}.")


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ToolError("wrong_type", f'Give text under "{key}".')
    return value


def _old_mode(rule: Rule | None, mode: str) -> str:
    today = {value: value for value in MODES}
    if rule and rule.kind == "changed_value":
        today = {rule.new if value == rule.old else value: value for value in MODES}
    if mode not in today:
        raise ToolError("bad_value", f'Use the mode "{next(iter(today))}".')
    return today[mode]


def _quoted(text: str) -> str:
    """Model text for an error message: ASCII, so it can always be written, and short."""
    return json.dumps(text if len(text) <= 16 else f"{text[:13]}...")


DEFAULT_DRIFT = Drift(
    (
        Rule("read", "renamed_key", "path", "file"),
        Rule("move", "renamed_key", "to", "dest"),
        Rule("delete", "required_flag", new="confirm"),
        Rule("edit", "read_first"),
        Rule("write", "absolute_path"),
        Rule("list", "renamed_key", "path", "folder"),
        Rule("search", "renamed_key", "text", "pattern"),
        Rule("test", "changed_value", "quick", "fast"),
    )
)
"""The shipped drift: all five kinds of rule over all eight tools."""


def drift_from_seed(seed: int, num_drifted_tools: int = len(TOOL_KEYS)) -> Drift:
    """The drift of a seed; seed 0 is `DEFAULT_DRIFT`, cut to its first tools.

    Raises:
        ConfigError: a number of tools that does not exist.
    """
    if not 0 <= num_drifted_tools <= len(TOOL_KEYS):
        raise ConfigError(
            f"num_drifted_tools is {num_drifted_tools}; the task has {len(TOOL_KEYS)} tools. "
            f"Choose 0 to {len(TOOL_KEYS)}."
        )
    if seed == 0:
        return Drift(DEFAULT_DRIFT.rules[:num_drifted_tools])
    rng = random.Random(f"api-drift:{seed}")
    tools = rng.sample(sorted(TOOL_KEYS), num_drifted_tools)
    return Drift(tuple(_drawn_rule(rng, tool) for tool in tools))


def _drawn_rule(rng: random.Random, tool: str) -> Rule:
    keys = TOOL_KEYS[tool]
    rules = [Rule(tool, "required_flag", new=rng.choice(_FLAGS))]
    rules += [
        Rule(tool, "renamed_key", key, rng.choice(_NEW_KEYS[key]))
        for key in keys
        if key in _NEW_KEYS
    ]
    if "path" in keys:
        rules.append(Rule(tool, "absolute_path"))
    if "mode" in keys:
        rules.append(Rule(tool, "changed_value", MODES[0], rng.choice(_NEW_MODES)))
    if tool in _CHANGES_A_FILE:
        rules.append(Rule(tool, "read_first"))
    return rng.choice(rules)
