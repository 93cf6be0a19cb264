"""Makes the data of the API-drift task from the environment alone: no model, the same every time.

Two scripts play every task. The *agent* believes in the old convention and errs in one of three
styles; the *teacher* knows the drift. A hint site is an episode's first error turn; a pair sets the
teacher's call against an old-convention call. Training pairs cover every second drifted tool only,
so what the hints alone teach can be told from what the pairs teach; held-out pairs cover all.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from composer_replication.environments.action_json import parse_action
from composer_replication.environments.api_drift import ApiDrift
from composer_replication.environments.api_drift_rules import TOOL_KEYS, Drift, drift_from_seed
from composer_replication.environments.api_drift_tasks import Task, task_from_seed
from composer_replication.environments.episode_spec import EpisodeSpec
from composer_replication.environments.protocol import Observation, ToolError
from composer_replication.experiments.task_rows import TaskRows
from composer_replication.traces.hints import HintSite, hint_from_error
from composer_replication.traces.json_lines import Row
from composer_replication.traces.pairs import PreferencePair
from composer_replication.traces.trace import Message, messages_from

_SLIPS = ("prose", "two_objects", "foreign_tool", "no_target", "nested_target", "gone_target")


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
    if split != "train":
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
                hint=hint_from_error(error),
                action=turn.action,
                error_kind=error.kind,
                source=episode.source,
            )
    return None


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
        flags |= {"error_kind": error.kind, "hint": hint_from_error(error)}
    step["extra"] = {"composer": flags}
    return step


def api_drift_rows(specs: Sequence[EpisodeSpec]) -> TaskRows:
    """The rows of the episodes of one split; all of them have the same drift.

    Episodes as trajectories are kept of the training split only.
    """
    drift = drift_from_seed(specs[0].drift_seed, specs[0].num_drifted_tools)
    is_unseen = specs[0].split != "train"
    tools = tuple(TOOL_KEYS) if is_unseen else pair_tools(drift)
    episodes = [scripted_episode(spec, index) for index, spec in enumerate(specs)]
    return TaskRows(
        prompts=[{"prompt": e.task.prompt(), **asdict(e.spec)} for e in episodes],
        hint_sites=[site for episode in episodes if (site := hint_site(episode))],
        pairs=[pair for episode in episodes for pair in preference_pairs(episode, tools)],
        episodes=[] if is_unseen else [trajectory(episode) for episode in episodes],
        facts={
            "drift": [asdict(rule) for rule in drift.rules],
            "pair_tools": list(pair_tools(drift)),
        },
    )
