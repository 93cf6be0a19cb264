"""Makes the data of the API-drift task from the environment alone: no model, the same every time.

Two scripts play every task. The *agent* believes in the old convention and errs in one of three
styles; the *teacher* knows the drift. A hint site is an episode's first error turn; a pair sets the
teacher's call against an old-convention call. Training pairs cover every second drifted tool only,
so what the hints alone teach can be told from what the pairs teach; held-out pairs cover all.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from composer_replication.environments.action_json import parse_action
from composer_replication.environments.api_drift import ApiDrift
from composer_replication.environments.api_drift_rules import TOOL_KEYS, Drift, drift_from_seed
from composer_replication.environments.api_drift_tasks import Task, task_from_seed
from composer_replication.environments.episode_spec import EpisodeSpec
from composer_replication.environments.protocol import Observation, ToolError
from composer_replication.errors import DataError
from composer_replication.traces.hints import HintSite, hint_from_error, hint_site_row
from composer_replication.traces.pairs import PreferencePair, pair_row
from composer_replication.traces.trace import Message, TurnError, messages_from

DATA_SCHEMA = 1
NUM_EPISODES = {"train": 64, "heldout": 24}
TASK_SEEDS_PER_SEED = 1000
"""Data of seed s uses the task seeds from 1000 s on; a multiple of the eight tools."""

_SLIPS = ("prose", "two_objects", "foreign_tool", "no_target", "nested_target", "gone_target")
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class ScriptedTurn:
    """One action of the scripted agent, its answer, and the teacher's call at the same state."""

    action: str
    observation: Observation
    chosen: str


@dataclass(frozen=True, slots=True)
class ScriptedEpisode:
    """What the scripted agent did at one task.

    Example: `scripted_episode(EpisodeSpec(task_seed=0), 0).reward` -> `0.7`.
    """

    spec: EpisodeSpec
    task: Task
    turns: tuple[ScriptedTurn, ...]
    reward: float

    @property
    def source(self) -> str:
        """The id that splits never cut through."""
        return f"{self.spec.split}-{self.spec.task_seed:04d}"

    def state(self, turn: int) -> tuple[Message, ...]:
        """What the model sees before a turn; answers are user turns, as ChatML has no tool role."""
        messages = list(messages_from(self.task.prompt(), self.source))
        for past in self.turns[:turn]:
            messages.append(Message("assistant", past.action))
            messages.append(Message("user", past.observation.content))
        return tuple(messages)


def scripted_episode(spec: EpisodeSpec, index: int) -> ScriptedEpisode:
    """Let the old-convention agent play one task.

    Args:
        spec: the episode.
        index: position in the data; it decides the agent's style, so each style meets every tool.
    """
    environment = ApiDrift()
    environment.reset(**asdict(spec))
    task = task_from_seed(spec.task_seed, spec.split)
    drift = drift_from_seed(spec.drift_seed, spec.num_drifted_tools)
    plan = [json.dumps(drift.translate(call)) for call in task.steps(drift)]
    errors = _opening_errors(task, drift, index, spec.split)
    turns: list[ScriptedTurn] = []
    while not (turns and turns[-1].observation.is_done):
        action = errors.pop(0) if errors else plan[0]
        observation = environment._step_text(action)
        turns.append(ScriptedTurn(action, observation, plan[0]))
        if action == plan[0]:
            plan.pop(0)
    return ScriptedEpisode(spec, task, tuple(turns), environment.get_reward())


def _opening_errors(task: Task, drift: Drift, index: int, split: str) -> list[str]:
    """What the agent tries first: the old call; twice where stubborn; after a slip where clumsy."""
    old_call = json.dumps(dict(task.old_call))
    if drift.rule_of(task.tool) is None:
        return []
    block = index // len(TOOL_KEYS)
    if split == "heldout":
        return [old_call]
    if block % 8 >= 6:
        return [_slip(task, drift, _SLIPS[index % len(_SLIPS)]), old_call]
    return [old_call] * (1 + block % 2)


def _slip(task: Task, drift: Drift, name: str) -> str:
    """An error that has nothing to do with the drift."""
    old_call = json.dumps(dict(task.old_call))
    step = task.steps(drift)[0]
    target_key = TOOL_KEYS[step["tool"]][0]
    right = drift.translate(step)
    new_key = drift.key_of(step["tool"], target_key)
    # A write makes its file, so no target can be missing.
    if name == "prose" or (name == "gone_target" and task.tool == "write"):
        return f"Sure: {task.request}"
    if name == "two_objects":
        return f"{old_call}\n{old_call}"
    if name == "foreign_tool":
        return json.dumps(dict(task.old_call) | {"tool": f"{task.tool}_now"})
    if name == "no_target":
        return json.dumps({key: value for key, value in right.items() if key != new_key})
    if name == "nested_target":
        return json.dumps(right | {new_key: [task.target]})
    return json.dumps(drift.translate({**step, target_key: f"{step[target_key]}.bak"}))


def pair_tools(drift: Drift) -> tuple[str, ...]:
    """The tools that training pairs cover: every second drifted one."""
    return tuple(rule.tool for rule in drift.rules[::2])


def hint_site(episode: ScriptedEpisode) -> HintSite | None:
    """The episode's first error turn, with the hint that its error makes; None without errors."""
    for number, turn in enumerate(episode.turns):
        error = turn.observation.error
        if error is not None:
            return HintSite(
                state=episode.state(number),
                hint=_hint(error),
                action=turn.action,
                error_kind=error.kind,
                source=episode.source,
            )
    return None


def _hint(error: ToolError) -> str:
    return hint_from_error(TurnError(error.kind, error.message, error.example))


def preference_pairs(episode: ScriptedEpisode, tools: Iterable[str]) -> list[PreferencePair]:
    """The teacher's call over the agent's at every refused old-convention call of these tools."""
    old_call = json.dumps(dict(episode.task.old_call))
    return [
        PreferencePair(episode.state(number), turn.chosen, turn.action, source=episode.source)
        for number, turn in enumerate(episode.turns)
        if episode.task.tool in tools and turn.action == old_call and turn.observation.error
    ]


def trajectory(episode: ScriptedEpisode) -> Row:
    """The episode as an ATIF v1.8 trajectory; what ATIF has no field for is under `extra`."""
    prompt = episode.task.prompt()
    steps: list[Row] = []
    for position, row in enumerate(prompt):
        source = {"assistant": "agent"}.get(row["role"], row["role"])
        step: Row = {"step_id": len(steps) + 1, "source": source, "message": row["content"]}
        # The demonstrations: ATIF's mark for steps that must not be trained on.
        if 0 < position < len(prompt) - 1:
            step["is_copied_context"] = True
        steps.append(step)
    steps += [_agent_step(turn, len(steps) + 1 + n) for n, turn in enumerate(episode.turns)]
    return {
        "schema_version": "ATIF-v1.8",
        "session_id": episode.source,
        "agent": {"name": "old-convention-script", "version": "1"},
        "steps": steps,
        "extra": {"composer": {"reward": episode.reward, "spec": asdict(episode.spec)}},
    }


def _agent_step(turn: ScriptedTurn, step_id: int) -> Row:
    error = turn.observation.error
    result: Row = {"content": turn.observation.content}
    step: Row = {"step_id": step_id, "source": "agent", "message": turn.action}
    try:
        arguments = parse_action(turn.action)
    except ToolError:
        pass
    else:
        name, call_id = arguments.pop("tool"), f"call-{step_id}"
        call = {"tool_call_id": call_id, "function_name": name, "arguments": arguments}
        step["tool_calls"] = [call]
        result = {"source_call_id": call_id, **result}
    step["observation"] = {"results": [result]}
    flags: Row = {"is_error": error is not None}
    if error is not None:
        flags |= {"error_kind": error.kind, "hint": _hint(error)}
    step["extra"] = {"composer": flags}
    return step


def write_data(folder: Path, seed: int = 0, spec: EpisodeSpec | None = None) -> Row:
    """Write one data directory, held-out split included; returns its manifest.

    Args:
        folder: made where it does not exist.
        seed: which tasks; data of different seeds shares no task seed.
        spec: drift and difficulty; its `task_seed` and `split` are not used.

    Raises:
        DataError: a seed below 0.
    """
    if seed < 0:
        raise DataError(f"seed is {seed}; it must be 0 or more.")
    settings = asdict(spec or EpisodeSpec(task_seed=0))
    drift = drift_from_seed(settings["drift_seed"], settings["num_drifted_tools"])
    counts: dict[str, object] = {}
    for split, num_episodes in NUM_EPISODES.items():
        first = seed * TASK_SEEDS_PER_SEED
        episodes = [
            scripted_episode(
                EpisodeSpec(**settings | {"task_seed": first + index, "split": split}), index
            )
            for index in range(num_episodes)
        ]
        tools = pair_tools(drift) if split == "train" else tuple(TOOL_KEYS)
        split_folder = folder if split == "train" else folder / split
        counts[split] = _write_split(split_folder, episodes, tools)
    manifest: Row = {
        "schema": DATA_SCHEMA,
        "task": "api_drift",
        "seed": seed,
        "counts": counts,
        "drift": [asdict(rule) for rule in drift.rules],
        "pair_tools": list(pair_tools(drift)),
        "splits": {"train": ".", "heldout": "heldout"},
    }
    _write_text(folder / "manifest.json", json.dumps(manifest, indent=2))
    return manifest


def _write_split(folder: Path, episodes: list[ScriptedEpisode], tools: Iterable[str]) -> Row:
    sites = [site for episode in episodes if (site := hint_site(episode))]
    files = {
        "prompts": [{"prompt": e.task.prompt(), **asdict(e.spec)} for e in episodes],
        "hint_sites": [hint_site_row(site) for site in sites],
        "pairs": [pair_row(pair) for e in episodes for pair in preference_pairs(e, tools)],
    }
    if folder.name != "heldout":
        files["episodes"] = [trajectory(episode) for episode in episodes]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        _write_text(folder / f"{name}.jsonl", "\n".join(json.dumps(row) for row in rows))
    counts: Row = {name: len(rows) for name, rows in files.items()}
    kinds = Counter(cast(Mapping[str, str], row)["error_kind"] for row in files["hint_sites"])
    return counts | {"error_kinds": dict(sorted(kinds.items()))}


def _write_text(path: Path, text: str) -> None:
    path.write_text(f"{text}\n", encoding="ascii", newline="\n")
