"""The rows that a task gives for one split, and the data folder that holds them."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from composer_replication.traces.hints import HintSite, hint_site_row
from composer_replication.traces.json_lines import Row
from composer_replication.traces.pairs import PreferencePair, pair_row


@dataclass(frozen=True, slots=True)
class TaskRows:
    """What one split of a task holds.

    Example: `task_rows("call_format", "heldout").prompts[0]["task_seed"]` -> `0`.
    """

    prompts: list[Row]
    """Rows with `prompt` and what the environment's `reset` takes."""
    hint_sites: list[HintSite]
    pairs: list[PreferencePair]
    episodes: list[Row] = field(default_factory=list[Row])
    """ATIF v1.8 trajectories that the hint sites and pairs come from; empty: not kept."""
    facts: Row = field(default_factory=dict[str, object])
    """What a reader of the manifest should know of the task."""


def write_split(folder: Path, rows: TaskRows) -> Row:
    """Write the files of one split; returns their counts."""
    files = {
        "prompts": rows.prompts,
        "hint_sites": [hint_site_row(site) for site in rows.hint_sites],
        "pairs": [pair_row(pair) for pair in rows.pairs],
    }
    if rows.episodes:
        files["episodes"] = rows.episodes
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        write_ascii(folder / f"{name}.jsonl", "\n".join(json.dumps(line) for line in lines))
    counts: Row = {name: len(lines) for name, lines in files.items()}
    kinds = Counter(site.error_kind for site in rows.hint_sites)
    return counts | {"error_kinds": dict(sorted(kinds.items()))}


def write_manifest(folder: Path, manifest: Mapping[str, object]) -> None:
    """Write `manifest.json`, the last file of a folder."""
    write_ascii(folder / "manifest.json", json.dumps(manifest, indent=2))


def write_ascii(path: Path, text: str) -> None:
    """The text with one line end after it, the same bytes on every system."""
    path.write_text(f"{text}\n", encoding="ascii", newline="\n")
