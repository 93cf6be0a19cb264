import inspect
import json

import pytest
from transformers.utils import get_json_schema

from composer_replication.environments.api_drift import ApiDrift
from composer_replication.environments.api_drift_rules import DEFAULT_DRIFT
from composer_replication.environments.api_drift_tasks import task_from_seed
from composer_replication.environments.protocol import TextEnvironment, ToolError
from composer_replication.environments.recorded_state import (
    RecordedState,
    environment_judge,
    validator_judge,
)
from composer_replication.errors import DataError

RIGHT = '{"tool": "read", "file": "a.py"}'
WRONG = '{"tool": "read", "path": "a.py"}'
ROW = {
    "teacher_actions": [RIGHT, RIGHT, WRONG],
    "recorded_action": WRONG,
    "error_kind": "unknown_key",
    "error_message": 'Use the key "file".',
    "error_example": '{"tool": "read", "file": "b.py"}',
    "source": "s",
}


def acted(action, judge=None, **changes):
    environment = RecordedState() if judge is None else RecordedState(judge)
    environment.reset(**(ROW | changes))
    assert environment.get_reward() == 0.0
    return environment, environment._step_text(action)


def test_it_follows_the_text_protocol():
    assert isinstance(RecordedState(), TextEnvironment)


@pytest.mark.parametrize(
    "action", [RIGHT, ' {"file": "a.py","tool":"read"}\n', f"```json\n{RIGHT}\n```<|im_end|>"]
)
def test_what_most_teachers_did_earns_one_in_any_spelling(action):
    environment, observation = acted(action)
    assert (observation.error, observation.is_done) == (None, True)
    assert environment.get_reward() == 1.0


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (WRONG, "unknown_key"),
        ('{"path": "a.py", "tool": "read"}', "unknown_key"),
        ("", "not_json"),
        (f"Sure: {RIGHT}", "not_json"),
        (f"{RIGHT}{RIGHT}", "not_json"),
        ('{"tool": "read", "file": "x", "file": "a.py"}', "not_json"),
        ("[" * 1999, "not_json"),
        (RIGHT.replace("a.py", "b.py"), "other_call"),
        ('{"tool": "read", "file": "a.py", "path": "a.py"}', "other_call"),
        ("{}", "other_call"),
    ],
)
def test_everything_else_earns_nothing_and_is_told_the_recorded_error(action, kind):
    environment, observation = acted(action)
    assert environment.get_reward() == 0.0
    assert (observation.error.kind, observation.error.message) == (kind, 'Use the key "file".')
    assert observation.error.example == ROW["error_example"]


def test_only_the_first_action_counts():
    environment, _ = acted(WRONG)
    assert environment._step_text(RIGHT).error.kind == "episode_over"
    assert environment.get_reward() == 0.0
    environment.reset(**ROW)
    environment._step_text(RIGHT)
    environment._step_text(WRONG)
    assert environment.get_reward() == 1.0


def test_teachers_without_a_majority_or_as_wrong_as_the_agent_reward_nothing():
    for teachers in ([RIGHT, WRONG], [WRONG, WRONG, RIGHT]):
        for action in (RIGHT, WRONG):
            environment, _ = acted(action, teacher_actions=teachers)
            assert environment.get_reward() == 0.0


def test_teachers_of_plain_text_are_matched_as_text():
    for action, reward in (("ls -l\n", 1.0), ("ls  -l", 0.0)):
        environment, _ = acted(action, teacher_actions=["ls -l"], recorded_action="ls")
        assert environment.get_reward() == reward


def test_an_environment_judges_after_replaying_the_recorded_actions():
    task = task_from_seed(2, "train")  # an edit, which needs a read first
    read, edit = (json.dumps(DEFAULT_DRIFT.translate(call)) for call in task.steps(DEFAULT_DRIFT))
    row = {"episode": {"task_seed": 2}, "past_actions": [read]}
    judge = environment_judge(ApiDrift)
    for action, reward, kind in ((edit, 1.0, None), (read, 0.6, None), ("no", 0.6, "not_json")):
        environment = RecordedState(judge)
        environment.reset(**row)
        observation = environment._step_text(action)
        assert environment.get_reward() == reward
        assert (observation.error and observation.error.kind) == kind
    environment.reset(**(row | {"past_actions": []}))
    environment._step_text(edit)
    assert environment.get_reward() == 0.3


def test_a_validator_gives_a_reward_or_an_error():
    def validate(row, action):
        if action == "bad":
            return ToolError("bad_action", f"Not {row['source']}.")
        return len(action) / 10

    environment, observation = acted("four", validator_judge(validate))
    assert (environment.get_reward(), observation.error) == (0.4, None)
    environment, observation = acted("bad", validator_judge(validate))
    assert (environment.get_reward(), observation.error.kind) == (0.0, "bad_action")


def test_its_one_tool_is_act():
    members = inspect.getmembers(RecordedState, predicate=inspect.isfunction)
    assert {n for n, _ in members if not n.startswith("_")} == {"reset", "get_reward", "act"}
    assert get_json_schema(RecordedState().act)["function"]["name"] == "act"
    environment = RecordedState()
    environment.reset(**ROW)
    with pytest.raises(ToolError, match="Use the key"):
        environment.act(WRONG)
    environment.reset(**ROW)
    assert environment.act(RIGHT) == "ok"
    assert environment.get_reward() == 1.0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"teacher_actions": []}, "at least one action"),
        ({"teacher_actions": [" "]}, "at least one action"),
        ({"teacher_actions": RIGHT}, "at least one action"),
        ({"recorded_action": None}, "recorded_action = None; it must be text"),
        ({"error_kind": 3}, "error_kind = 3"),
    ],
)
def test_a_row_without_teachers_or_error_is_refused(changes, match):
    with pytest.raises(DataError, match=match):
        RecordedState().reset(**(ROW | changes))
