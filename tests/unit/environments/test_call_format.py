import dataclasses
import inspect
import json

import pytest
from transformers.utils import get_json_schema

from composer_replication.environments.api_drift_tasks import POOLS
from composer_replication.environments.call_format import FORMAT_ERROR_KINDS, CallFormat
from composer_replication.environments.call_format_tasks import (
    CALL_KEYS,
    FormatSpec,
    call_text,
    format_task,
)
from composer_replication.environments.protocol import TextEnvironment, ToolError
from composer_replication.errors import DataError

TOOLS = tuple(CALL_KEYS)
SEED_OF = {tool: seed for seed, tool in enumerate(TOOLS)}


def started(tool="read", **row):
    environment = CallFormat()
    environment.reset(task_seed=SEED_OF[tool], **row)
    return environment, format_task(FormatSpec(task_seed=SEED_OF[tool], **row))


def test_it_follows_the_text_protocol():
    assert isinstance(CallFormat(), TextEnvironment)


@pytest.mark.parametrize("tool", TOOLS)
def test_the_right_call_earns_one_and_ends_the_episode(tool):
    environment, task = started(tool)
    observation = environment._step_text(call_text(task.call))
    assert (observation.error, observation.is_done) == (None, True)
    assert environment.get_reward() == 1.0


def test_the_order_of_keys_and_a_code_fence_are_forgiven():
    environment, task = started("copy")
    turned = json.dumps(dict(reversed(task.call.items())))
    environment._step_text(f"```json\n{turned}\n```<|im_end|>")
    assert environment.get_reward() == 1.0


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        ("", "not_json"),
        ("Sure: {right}", "not_json"),
        ("{right}{right}", "not_json"),
        ("[{right}]", "not_json"),
        ('{{"tool": "read", "path": "{target}", "path": "{target}"}}', "not_json"),
        ("{{}}", "unknown_tool"),
        ('{{"tool": "read_file", "path": "{target}"}}', "unknown_tool"),
        ('{{"tool": ["read"], "path": "{target}"}}', "unknown_tool"),
        ('{{"tool": "list", "path": "{target}"}}', "wrong_tool"),
        ('{{"tool": "read", "file": "{target}"}}', "unknown_key"),
        ('{{"tool": "read", "path": "{target}", "text": "x"}}', "unknown_key"),
        ('{{"tool": "read"}}', "missing_key"),
        ('{{"tool": "read", "path": ["{target}"]}}', "wrong_type"),
        ('{{"tool": "read", "path": "/{target}"}}', "wrong_value"),
        ('{{"tool": "read", "path": "{target} "}}', "wrong_value"),
        ('{{"tool": "read", "path": ""}}', "wrong_value"),
    ],
)
def test_everything_else_is_an_error_of_its_kind_and_earns_nothing(action, kind):
    environment, task = started("read")
    text = action.format(right=call_text(task.call), target=task.call["path"])
    observation = environment._step_text(text)
    assert observation.error.kind == kind
    assert kind in FORMAT_ERROR_KINDS
    assert observation.is_done
    environment._step_text(call_text(task.call))
    assert environment.get_reward() == 0.0


def test_a_second_action_earns_nothing_and_takes_nothing_away():
    environment, task = started()
    environment._step_text(call_text(task.call))
    assert environment._step_text(call_text(task.call)).error.kind == "episode_over"
    assert environment.get_reward() == 1.0


def test_the_shown_calls_and_the_calls_of_other_tasks_earn_nothing():
    for seed in range(40):
        task = format_task(FormatSpec(task_seed=seed))
        others = [format_task(FormatSpec(task_seed=s)).call for s in range(40) if s != seed]
        for call in [*(call for _, call in task.demos), task.example, *others]:
            environment = CallFormat()
            environment.reset(task_seed=seed)
            environment._step_text(call_text(call))
            assert environment.get_reward() == 0.0 or call == task.call


def test_reset_forgets_the_episode_before():
    environment, task = started()
    environment._step_text(call_text(task.call))
    environment.reset(task_seed=SEED_OF["read"])
    assert environment.get_reward() == 0.0
    environment._step_text(call_text(task.call))
    assert environment.get_reward() == 1.0


@pytest.mark.parametrize("num_demos", range(7))
def test_unless_it_is_said_otherwise_all_demonstrations_show_the_tool(num_demos):
    spec = FormatSpec(task_seed=5, num_demos=num_demos)
    assert spec.num_matching_demos == num_demos
    assert spec == FormatSpec(task_seed=5, num_demos=num_demos, num_matching_demos=num_demos)
    with pytest.raises(DataError, match="or -1 for all"):
        FormatSpec(task_seed=5, num_demos=num_demos, num_matching_demos=num_demos + 1)


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize(("num_demos", "num_matching"), [(3, 2), (3, 3), (3, 0), (0, 0), (6, 6)])
def test_no_demonstration_and_no_hint_holds_an_answer(split, num_demos, num_matching):
    for seed in range(60):
        task = format_task(FormatSpec(seed, split, num_demos, num_matching, num_hint_demos=3))
        answers = {value for key, value in task.call.items() if key != "tool"}
        shown = (*task.demos, *task.hint_demos)
        for call in (*(call for _, call in shown), task.example):
            assert not answers & {value for key, value in call.items() if key != "tool"}
        assert task.example["tool"] == task.call["tool"]
        assert len(task.demos) == num_demos
        assert sum(call["tool"] == task.call["tool"] for _, call in task.demos) == num_matching


@pytest.mark.parametrize("split", POOLS)
@pytest.mark.parametrize("num_demos", [0, 3, 6])
def test_a_hint_answers_requests_of_the_tool_that_are_in_no_prompt(split, num_demos):
    for seed in range(30):
        plain = format_task(FormatSpec(seed, split, num_demos))
        task = format_task(FormatSpec(seed, split, num_demos, num_hint_demos=3))
        # The knob changes hints alone: prompts and answers are those of the seed.
        assert dataclasses.replace(task, hint_demos=()) == plain
        requests = [request for request, _ in task.hint_demos]
        assert len({*requests, task.request, *(r for r, _ in task.demos)}) == 4 + num_demos
        assert {call["tool"] for _, call in task.hint_demos} == {task.call["tool"]}
        environment = CallFormat()
        environment.reset(task_seed=seed, split=split, num_demos=num_demos, num_hint_demos=3)
        error = environment._step_text('{"tool": "nothing"}').error
        assert error.demonstrations == tuple((r, call_text(c)) for r, c in task.hint_demos)
        for request, call in error.demonstrations:
            other = CallFormat()
            other.reset(task_seed=seed, split=split, num_demos=num_demos)
            other._step_text(call)
            assert other.get_reward() == 0.0, request


def test_without_the_knob_a_hint_shows_one_call():
    environment, task = started()
    error = environment._step_text("Sure!").error
    assert (error.example, error.demonstrations) == (call_text(task.example), ())


def test_equal_seeds_give_equal_tasks_and_other_seeds_other_ones():
    assert format_task(FormatSpec(3)) == format_task(FormatSpec(3))
    requests = [format_task(FormatSpec(seed)).request for seed in range(96)]
    assert len(set(requests)) > 80


def test_the_public_methods_are_reset_get_reward_and_one_per_tool_with_a_schema():
    members = inspect.getmembers(CallFormat, predicate=inspect.isfunction)
    public = {name: method for name, method in members if not name.startswith("_")}
    assert public.keys() == {"reset", "get_reward", *TOOLS}
    for tool, keys in CALL_KEYS.items():
        function = get_json_schema(getattr(CallFormat(), tool))["function"]
        assert function["name"] == tool
        assert tuple(function["parameters"]["properties"]) == keys


@pytest.mark.parametrize("tool", TOOLS)
def test_a_function_call_gives_the_same_reward_as_text(tool):
    environment, task = started(tool)
    arguments = {key: value for key, value in task.call.items() if key != "tool"}
    assert getattr(environment, tool)(**arguments) == "ok"
    assert environment.get_reward() == 1.0
    environment, task = started(tool)
    with pytest.raises(ToolError, match=r"Copy .* Example: \{"):
        getattr(environment, tool)(**dict.fromkeys(arguments, "other"))
    assert environment.get_reward() == 0.0


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({}, "no 'task_seed'"),
        ({"task_seed": "3"}, "must be int"),
        ({"task_seed": 3, "num_demo": 2}, "num_demos"),
        ({"task_seed": 3, "split": "test"}, "no split"),
        ({"task_seed": 3, "num_demos": 7}, "0 to 6"),
        ({"task_seed": 3, "num_demos": 2, "num_matching_demos": 3}, "Choose 0 to 2"),
        ({"task_seed": 3, "num_hint_demos": 4}, "Choose 0 to 3"),
        ({"task_seed": 3, "num_hint_demos": -1}, "Choose 0 to 3"),
        ({"task_seed": 3, "prompt": [{"role": "user", "content": "hi"}]}, "Make the data again"),
    ],
)
def test_a_row_that_cannot_be_an_episode_is_refused(row, match):
    with pytest.raises(DataError, match=match):
        CallFormat().reset(**row)
