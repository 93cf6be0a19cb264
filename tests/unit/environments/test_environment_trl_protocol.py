import inspect
import json
import typing

import pytest
from transformers.utils import get_json_schema

from composer_replication.environments.api_drift import ApiDrift
from composer_replication.environments.api_drift_rules import TOOL_KEYS
from composer_replication.environments.api_drift_tasks import task_from_seed
from composer_replication.environments.protocol import ToolError


def public_methods():
    members = inspect.getmembers(ApiDrift, predicate=inspect.isfunction)
    return {name: method for name, method in members if not name.startswith("_")}


def test_the_public_methods_are_reset_get_reward_and_one_per_tool():
    assert public_methods().keys() == {"reset", "get_reward", *TOOL_KEYS}


@pytest.mark.parametrize("tool", TOOL_KEYS)
def test_each_tool_has_hints_a_docstring_and_a_json_schema(tool):
    method = getattr(ApiDrift(), tool)
    hints = typing.get_type_hints(method)
    assert hints["return"] is str
    assert hints.keys() == {"arguments", "return"}
    function = get_json_schema(method)["function"]
    assert function["name"] == tool
    assert function["description"]
    described = function["parameters"]["properties"]["arguments"]["description"]
    assert all(key in described for key in TOOL_KEYS[tool])


def test_reset_takes_a_whole_row_and_adds_nothing_to_the_prompt():
    environment = ApiDrift()
    row = {"prompt": task_from_seed(0, "train").prompt(), "task_seed": 0}
    assert environment.reset(**row) is None


@pytest.mark.parametrize("is_nested", [False, True])
def test_tools_called_as_functions_give_the_same_reward_as_text(is_nested):
    environment, task = ApiDrift(), task_from_seed(0, "train")
    environment.reset(task_seed=0)
    with pytest.raises(ToolError) as refused:
        environment.read(path=task.target)
    assert refused.value.kind == "unknown_key"
    right = {"file": task.target}
    content = environment.read(arguments=right) if is_nested else environment.read(**right)
    assert content == task.files[task.target]
    assert environment.get_reward() == 0.7


@pytest.mark.parametrize("is_shown", [True, False])
def test_str_of_a_tool_error_is_what_the_model_may_see(is_shown):
    environment, task = ApiDrift(), task_from_seed(0, "train")
    environment.reset(task_seed=0, is_example_shown=is_shown)
    with pytest.raises(ToolError) as refused:
        environment.read(path=task.target)
    assert str(refused.value).startswith('Use the key "file".')
    assert ("Example: {" in str(refused.value)) is is_shown


def test_a_function_call_cannot_name_another_tool():
    environment, task = ApiDrift(), task_from_seed(0, "train")
    environment.reset(task_seed=0)
    assert json.dumps(environment.read(tool="delete", file=task.target))
    assert environment.get_reward() == 1.0
