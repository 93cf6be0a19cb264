import json

import pytest

from composer_replication.environments.action_json import MAX_ACTION_CHARS, parse_action
from composer_replication.environments.protocol import ToolError

CALL = '{"tool": "read", "path": "a.py"}'
VALUE = {"tool": "read", "path": "a.py"}


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        f"  \n{CALL}\n",
        f"{CALL}<|im_end|>",
        f"{CALL} <|im_end|>\n<|endoftext|>",
        f"{CALL}</s>",
        f"```json\n{CALL}\n```",
        f"```\n{CALL}\n```",
        f"```json {CALL}```",
        f"```json\n{CALL}\n```<|im_end|>",
    ],
)
def test_stated_wrappings_are_forgiven(text):
    assert parse_action(text) == VALUE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure! " + CALL,
        CALL + " done",
        CALL + "\n" + CALL,
        f"<|im_end|>{CALL}",
        f"```json\n{CALL}",
        f"```json\n{CALL}\n```\n```json\n{CALL}\n```",
        CALL.replace('"', "'"),
        '{"tool": "read", "path": "a.py",}',
        '{"tool": "read", "tool": "edit"}',
        '{"tool": "read", "path": {"a": 1, "a": 2}}',
        '{"tool": NaN}',
        '{"tool": -Infinity}',
        "null",
        "7",
        '"read"',
        f"[{CALL}]",
        "[" * MAX_ACTION_CHARS,
        '{"a":' * 300,
        CALL + " " * MAX_ACTION_CHARS,
        "x" * 1_000_000,
        "\x00",
        "\ud800",
    ],
)
def test_everything_else_is_not_json(text):
    with pytest.raises(ToolError) as refused:
        parse_action(text)
    assert refused.value.kind == "not_json"


def test_unicode_and_nested_values_are_json_and_left_to_the_tool_checks():
    value = {"tool": "read", "path": "\u00e9\u6f22", "x": [1, {"y": None}]}
    assert parse_action(json.dumps(value)) == value
    assert parse_action(json.dumps(value, ensure_ascii=False)) == value
