"""Makes the data of the reasoning-gym task: questions, each with a wrong answer and its hint."""

from collections.abc import Sequence
from dataclasses import asdict

from composer_replication.environments.reasoning_gym_task import GymSpec, ReasoningGym, gym_task
from composer_replication.experiments.task_rows import TaskRows
from composer_replication.traces.error_turns import hint_sites_from_trace, pairs_from_trace
from composer_replication.traces.trace import Message, Trace, TurnError, messages_from


def reasoning_gym_rows(specs: Sequence[GymSpec]) -> TaskRows:
    """The rows of the questions of one split; a question that comes twice is taken once.

    The wrong answer is that of another question.
    """
    rows = TaskRows(prompts=[], hint_sites=[], pairs=[])
    seen: set[str] = set()
    for spec in specs:
        task = gym_task(spec)
        if task.question in seen:
            continue
        seen.add(task.question)
        trace = _wrong_trace(spec)
        rows.prompts.append({"prompt": task.prompt(), **asdict(spec)})
        rows.hint_sites.extend(hint_sites_from_trace(trace))
        rows.pairs.extend(pairs_from_trace(trace))
    return rows


def _wrong_trace(spec: GymSpec) -> Trace:
    task = gym_task(spec)
    prompt = messages_from(task.prompt())
    environment = ReasoningGym()
    environment.reset(**asdict(spec))
    action = task.example[1]
    observation = environment._step_text(action)
    error = observation.error
    assert error is not None, f"{action!r} is an answer to another question"
    return Trace(
        messages=(*prompt, Message("assistant", action), Message("tool", observation.content)),
        errors={len(prompt): TurnError(error.kind, error.message)},
        teacher_actions={len(prompt): (task.answer,)},
        num_context_messages=len(prompt),
        source=f"{spec.split}-{spec.task_seed:04d}",
    )
