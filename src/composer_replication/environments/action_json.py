"""One JSON object per action: what is forgiven in a model's text, and what is refused.

Forgiven, in this order: white space around the text; end tokens after it (`END_TOKENS`); one code
fence around all of it, with or without the tag `json`. What is left must be exactly one JSON object
of standard JSON (RFC 8259, no NaN, no repeated key) with nothing before or after it.
"""

import json
import re

from composer_replication.environments.protocol import ToolError

END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "</s>")
"""Trailing end tokens that decoding may leave in the text."""
MAX_ACTION_CHARS = 2000
"""Longer text is refused unread: the longest correct call of the shipped task has under 120."""

_FENCE = re.compile(r"```(?:json)?[ \t]*\n?(.*?)\n?```", re.DOTALL)


def parse_action(text: str) -> dict[str, object]:
    """The JSON object that `text` holds.

    Example: `parse_action('{"tool": "read"}<|im_end|>')` -> `{"tool": "read"}`.

    Raises:
        ToolError: kind `not_json`, whatever the text is; no other exception leaves.
    """
    if len(text) > MAX_ACTION_CHARS:
        raise ToolError("not_json", f"An action has at most {MAX_ACTION_CHARS} characters.")
    try:
        value = json.loads(
            _without_wrapping(text),
            object_pairs_hook=_object_of_unique_keys,
            parse_constant=_refuse_constant,
        )
    # RecursionError: a few hundred opening brackets are short enough to reach the parser.
    except (ValueError, RecursionError) as error:
        raise ToolError("not_json", "Reply with one JSON object only.") from error
    if not isinstance(value, dict):
        raise ToolError("not_json", "Reply with one JSON object only.")
    return value


def _without_wrapping(text: str) -> str:
    text = text.strip()
    while text.endswith(END_TOKENS):
        for token in END_TOKENS:
            text = text.removesuffix(token).rstrip()
    fenced = _FENCE.fullmatch(text)
    return fenced[1] if fenced else text


def _object_of_unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        # Python keeps the last of equal keys; a model could then answer twice in one object.
        raise ValueError("a key is given twice")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
