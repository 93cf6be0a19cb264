"""The requests of the API-drift task: content pools, one task per seed, and its short prompt."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from composer_replication.environments.api_drift_rules import TOOL_KEYS, Drift
from composer_replication.errors import DataError, nearest

NUM_DEMOS = 3
SYSTEM_TEXT = "You are a helpful AI assistant. Reply with one JSON tool call."

_REQUESTS = {
    "read": "Read {path}.",
    "write": "Write {text} to {path}.",
    "edit": "Add {text} to {path}.",
    "list": "List {path}.",
    "search": "Search for {text}.",
    "test": "Run {mode} tests in {path}.",
    "delete": "Delete {path}.",
    "move": "Move {path} to {to}.",
}


@dataclass(frozen=True, slots=True)
class ContentPool:
    """The words of one split; no stem and no folder is in two pools."""

    folders: tuple[str, ...]
    stems: tuple[str, ...]
    words: tuple[str, ...]


# fmt: off
POOLS: Mapping[str, ContentPool] = MappingProxyType(
    {
        "train": ContentPool(
            ("src", "lib", "app", "core"),
            (
                "auth", "cache", "client", "config", "cookie", "cursor", "decoder",
                "driver", "engine", "event", "filter", "format", "graph", "handler",
                "header", "index", "layout", "loader", "logger", "mapper", "menu", "model",
                "parser", "plugin", "query", "queue", "render", "report", "router",
                "schema", "server", "session",
            ),
            ("red", "blue", "green", "black", "white"),
        ),
        "validation": ContentPool(
            ("doc", "bin", "ext", "net"),
            (
                "anchor", "basket", "castle", "domain", "engraver", "falcon", "glyph", "harbor",
                "island", "jacket", "kernel", "lantern",
            ),
            ("tall", "slim", "dark", "mild"),
        ),
        "heldout": ContentPool(
            ("pkg", "api", "web", "sdk"),
            (
                "account", "badge", "budget", "camera", "canvas", "channel", "diary",
                "editor", "folio", "garden", "invoice", "journal", "ledger", "market",
                "notice", "orbit", "player", "profile", "recipe", "ticket",
            ),
            ("warm", "cold", "soft", "loud"),
        ),
    }
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Task:
    """One request, the old-convention call that would have answered it, and its repository.

    Example: the request "Read src/auth.py." with the call `{"tool": "read", "path": ...}`.
    """

    request: str
    old_call: Mapping[str, str]
    demos: tuple[tuple[str, Mapping[str, str]], ...]
    """(request, old-convention call): this task's tool on other arguments.

    Demonstrations of other tools cost SmolLM2-135M most of its base rate: at T=1 it copies the
    right old call with probability 0.12 when one of three shows the tool, 0.50 when all do.
    """
    files: Mapping[str, str]
    """Path -> content at the start of the episode."""

    @property
    def tool(self) -> str:
        """The tool that the request asks for."""
        return self.old_call["tool"]

    @property
    def target(self) -> str:
        """The value of the tool's first key: a path, or the text to search for."""
        return self.old_call[TOOL_KEYS[self.tool][0]]

    def steps(self, drift: Drift) -> tuple[Mapping[str, str], ...]:
        """The calls that answer the request, in order, in old-convention form."""
        if drift.needs_read_first(self.tool):
            return ({"tool": "read", "path": self.target}, self.old_call)
        return (self.old_call,)

    def prompt(self) -> list[dict[str, str]]:
        """The chat messages that a model gets: three old-convention demonstrations, one request."""
        messages = [{"role": "system", "content": SYSTEM_TEXT}]
        for request, call in self.demos:
            messages.append({"role": "user", "content": request})
            messages.append({"role": "assistant", "content": json.dumps(dict(call))})
        return [*messages, {"role": "user", "content": self.request}]


def task_from_seed(seed: int, split: str) -> Task:
    """The task of a seed; eight seeds in a row ask for the eight tools.

    Raises:
        DataError: a split without a content pool.
    """
    if split not in POOLS:
        raise DataError(f"The API-drift task has no split {split!r}. {nearest(split, POOLS)}")
    rng = random.Random(f"api-drift-task:{split}:{seed}")
    pool = POOLS[split]
    tools = tuple(TOOL_KEYS)
    tool = tools[seed % len(tools)]
    # Distinct stems, words and folders to move to: a demonstration never holds an answer.
    stems = rng.sample(pool.stems, NUM_DEMOS + 3)
    words = rng.sample(pool.words, NUM_DEMOS + 1)
    folders = rng.sample(pool.folders, NUM_DEMOS + 1)
    old_call, *demos = (
        _old_call(tool, stem, word, rng.choice([f for f in pool.folders if f != to]), to)
        for stem, word, to in zip(stems[2:], words, folders, strict=True)
    )
    files = {f"{rng.choice(pool.folders)}/{stem}.py": rng.choice(pool.words) for stem in stems[:2]}
    return Task(
        request=_request(old_call),
        old_call=MappingProxyType(old_call),
        demos=tuple((_request(call), MappingProxyType(call)) for call in demos),
        files=MappingProxyType(files | _target_file(old_call, rng.choice(pool.words))),
    )


def _old_call(tool: str, stem: str, word: str, folder: str, other_folder: str) -> dict[str, str]:
    values = {
        "path": f"{folder}/{stem}" if tool == "list" else f"{folder}/{stem}.py",
        "to": other_folder,
        "text": f"{stem}_id" if tool == "search" else word,
        "mode": "quick",
    }
    return {"tool": tool} | {key: values[key] for key in TOOL_KEYS[tool]}


def _request(old_call: Mapping[str, str]) -> str:
    return _REQUESTS[old_call["tool"]].format_map(old_call)


def _target_file(old_call: Mapping[str, str], word: str) -> dict[str, str]:
    """The file that the call is about; a write makes its own."""
    match old_call["tool"]:
        case "write":
            return {}
        case "list":
            return {f"{old_call['path']}/main.py": word}
        case "search":
            return {"main.py": old_call["text"]}
        case _:
            return {old_call["path"]: word}
