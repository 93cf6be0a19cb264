"""The requests of the call-format task: a few shown calls, and a request to answer in their form.

Nothing is hidden: the demonstrations show the accepted form, and an untrained small model gets it
right in some of its samples, so GRPO alone has something to reinforce.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from composer_replication.environments.api_drift_tasks import POOLS
from composer_replication.errors import DataError, nearest

CALL_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "read": ("path",),
        "delete": ("path",),
        "list": ("path",),
        "copy": ("path", "to"),
        "move": ("path", "to"),
        "append": ("path", "text"),
    }
)
"""Tool -> its keys, in the order in which the demonstrations give them."""

SYSTEM_TEXT = "You are a helpful AI assistant. Reply with one JSON tool call."
MAX_DEMOS = 6
MAX_HINT_DEMOS = 3
ALL_DEMOS = -1

_REQUESTS = {
    "read": "Read {path}.",
    "delete": "Delete {path}.",
    "list": "List {path}.",
    "copy": "Copy {path} to {to}.",
    "move": "Move {path} to {to}.",
    "append": "Add {text} to {path}.",
}


@dataclass(frozen=True, slots=True)
class FormatSpec:
    """What a row of `prompts.jsonl` says about its episode, besides `prompt`.

    Example: `FormatSpec(task_seed=3, split="heldout", num_matching_demos=0)`.
    """

    task_seed: int
    split: str = "train"
    """Content pool: `train`, `validation` or `heldout`."""
    num_demos: int = 3
    """Calls shown before the request, 0 to 6."""
    num_matching_demos: int = ALL_DEMOS
    """How many of them show the tool that the request asks for; -1: all, and the field says how
    many that are."""
    num_hint_demos: int = 0
    """Further requests for the tool that a hint answers, 0 to 3; 0: it shows one call."""

    def __post_init__(self) -> None:
        if self.split not in POOLS:
            raise DataError(
                f"The call-format task has no split {self.split!r}. {nearest(self.split, POOLS)}"
            )
        if not 0 <= self.num_demos <= MAX_DEMOS:
            raise DataError(
                f"num_demos is {self.num_demos}; the task shows 0 to {MAX_DEMOS} calls. "
                f"Choose 0 to {MAX_DEMOS}."
            )
        if self.num_matching_demos == ALL_DEMOS:
            object.__setattr__(self, "num_matching_demos", self.num_demos)
        if not 0 <= self.num_matching_demos <= self.num_demos:
            raise DataError(
                f"num_matching_demos is {self.num_matching_demos} and num_demos is "
                f"{self.num_demos}. Choose 0 to {self.num_demos}, or {ALL_DEMOS} for all."
            )
        if not 0 <= self.num_hint_demos <= MAX_HINT_DEMOS:
            raise DataError(
                f"num_hint_demos is {self.num_hint_demos}; a hint answers 0 to {MAX_HINT_DEMOS} "
                f"other requests. Choose 0 to {MAX_HINT_DEMOS}."
            )


@dataclass(frozen=True, slots=True)
class FormatTask:
    """One request, its only right call, and what is shown before it.

    Example: the request "Read src/auth.py." with the call `{"tool": "read", "path": ...}`.
    """

    request: str
    call: Mapping[str, str]
    demos: tuple[tuple[str, Mapping[str, str]], ...]
    """(request, call), other files, words and folders than the call's."""
    example: Mapping[str, str]
    """A call of the right tool that answers another request: what a hint may show."""
    hint_demos: tuple[tuple[str, Mapping[str, str]], ...] = ()
    """(request, call) of the right tool, in neither the prompt nor each other."""

    def prompt(self) -> list[dict[str, str]]:
        """The chat messages that a model gets."""
        messages = [{"role": "system", "content": SYSTEM_TEXT}]
        for request, call in self.demos:
            messages.append({"role": "user", "content": request})
            messages.append({"role": "assistant", "content": call_text(call)})
        return [*messages, {"role": "user", "content": self.request}]


def call_text(call: Mapping[str, str]) -> str:
    """The call as the demonstrations write it."""
    return json.dumps(dict(call))


def format_task(spec: FormatSpec) -> FormatTask:
    """The task of a spec; as many seeds in a row as there are tools ask for all of them."""
    rng = random.Random(f"call-format:{spec.split}:{spec.task_seed}")
    pool = POOLS[spec.split]
    tools = tuple(CALL_KEYS)
    tool = tools[spec.task_seed % len(tools)]
    others = [other for other in tools if other != tool]
    num_others = spec.num_demos - spec.num_matching_demos
    shown = [tool] * spec.num_matching_demos + [rng.choice(others) for _ in range(num_others)]
    rng.shuffle(shown)
    stems = rng.sample(pool.stems, spec.num_demos + 2)
    # The answer's word and destination are its own: no demonstration and no hint holds them.
    word, *words = rng.sample(pool.words, len(pool.words))
    folder, to, *folders = rng.sample(pool.folders, len(pool.folders))
    call = _call(tool, stems[0], word, folder, to)
    examples = [
        _call(shown_tool, stem, rng.choice(words), *rng.sample([*folders, folder], 2))
        for shown_tool, stem in zip([tool, *shown], stems[1:], strict=True)
    ]
    unused_stems = [stem for stem in pool.stems if stem not in stems]
    hint_calls = [
        _call(tool, stem, rng.choice(words), *rng.sample([*folders, folder], 2))
        for stem in rng.sample(unused_stems, spec.num_hint_demos)
    ]
    demos = examples[1:]
    # A demonstration's arguments are known to be another request's; made-up ones get copied.
    matching = [demo for demo in demos if demo["tool"] == tool]
    return FormatTask(
        request=_request(call),
        call=MappingProxyType(call),
        demos=_answered(demos),
        example=MappingProxyType(matching[-1] if matching else examples[0]),
        hint_demos=_answered(hint_calls),
    )


def _answered(calls: Sequence[dict[str, str]]) -> tuple[tuple[str, Mapping[str, str]], ...]:
    """Each with the request that it answers."""
    return tuple((_request(call), MappingProxyType(call)) for call in calls)


def _call(tool: str, stem: str, word: str, folder: str, to: str) -> dict[str, str]:
    values = {
        "path": f"{folder}/{stem}" if tool == "list" else f"{folder}/{stem}.py",
        "to": to,
        "text": word,
    }
    return {"tool": tool} | {key: values[key] for key in CALL_KEYS[tool]}


def _request(call: Mapping[str, str]) -> str:
    return _REQUESTS[call["tool"]].format_map(call)
