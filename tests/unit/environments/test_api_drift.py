import itertools
import json

import pytest

from composer_replication.environments.api_drift import ERROR_KINDS, GRADES, ApiDrift, Progress
from composer_replication.environments.api_drift_rules import (
    DEFAULT_DRIFT,
    TOOL_KEYS,
    drift_from_seed,
)
from composer_replication.environments.api_drift_tasks import POOLS, task_from_seed
from composer_replication.environments.protocol import TextEnvironment
from composer_replication.errors import DataError

TOOLS = tuple(TOOL_KEYS)
SEED_OF = {tool: seed for seed, tool in enumerate(TOOLS)}


def started(tool="read", **row):
    environment = ApiDrift()
    environment.reset(task_seed=SEED_OF[tool], **row)
    return environment, task_from_seed(SEED_OF[tool], row.get("split", "train"))


def old_call(task, **changes):
    return json.dumps(dict(task.old_call) | changes)


def right_calls(task):
    return [json.dumps(DEFAULT_DRIFT.translate(call)) for call in task.steps(DEFAULT_DRIFT)]


def played(environment, *actions):
    return [environment._step_text(action) for action in actions]


def test_it_follows_the_text_protocol():
    assert isinstance(ApiDrift(), TextEnvironment)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_teacher_who_knows_the_drift_earns_one(tool):
    environment, task = started(tool)
    observations = played(environment, *right_calls(task))
    assert [o.error for o in observations] == [None] * len(observations)
    assert [o.is_done for o in observations] == [False] * (len(observations) - 1) + [True]
    assert environment.get_reward() == 1.0


@pytest.mark.parametrize("tool", TOOLS)
def test_an_old_call_that_is_corrected_in_time_earns_seven_tenths(tool):
    environment, task = started(tool)
    first, *_, last = played(environment, old_call(task), *right_calls(task))
    assert first.error is not None
    assert not first.is_done
    assert last.is_done
    assert environment.get_reward() == 0.7


@pytest.mark.parametrize("tool", TOOLS)
def test_an_error_shows_todays_form_on_arguments_that_are_not_the_tasks(tool):
    environment, task = started(tool)
    error = environment._step_text(old_call(task)).error
    example = json.loads(error.example)
    assert example != json.loads(right_calls(task)[0])
    answers = {value for key, value in task.old_call.items() if key not in ("tool", "mode")}
    assert not answers & {str(value).removeprefix("/") for value in example.values()}
    assert example.keys() == json.loads(right_calls(task)[0]).keys()


@pytest.mark.parametrize(
    ("tool", "action", "kind"),
    [
        ("read", "Sure, I read it.", "not_json"),
        ("read", '{"tool": "cat", "file": "a"}', "unknown_tool"),
        ("read", '{"file": "a"}', "unknown_tool"),
        ("read", '{"tool": ["read"], "file": "a"}', "unknown_tool"),
        ("read", '{"tool": "read", "path": "a"}', "unknown_key"),
        ("read", '{"tool": "read"}', "missing_key"),
        ("read", '{"tool": "read", "file": {"a": [1]}}', "wrong_type"),
        ("delete", '{"tool": "delete", "path": "a"}', "missing_flag"),
        ("write", '{"tool": "write", "path": "a", "text": "b"}', "relative_path"),
        ("test", '{"tool": "test", "path": "a", "mode": "quick"}', "bad_value"),
        ("edit", '{"tool": "edit", "path": "a", "text": "b"}', "not_read"),
        ("read", '{"tool": "read", "file": "nowhere.py"}', "not_found"),
        ("list", '{"tool": "list", "folder": "nowhere"}', "not_found"),
        ("search", '{"tool": "search", "pattern": "nothing"}', "not_found"),
    ],
)
def test_each_error_kind_is_reported_and_costs_a_turn(tool, action, kind):
    environment, _ = started(tool, num_spare_turns=0)
    turns = played(environment, action, *[action] * environment._max_turns)
    assert turns[0].error.kind == kind
    assert turns[0].content.startswith(f"error: {turns[0].error.message}")
    assert (turns[0].error.example is None) == (kind == "not_found")
    assert turns[-1].error.kind == "episode_over"


def test_the_listed_error_kinds_are_all_that_garbage_can_cause():
    texts = ["", "null", "NaN", "[" * 5000, '{"tool": null}', '{"tool": 1e999}', "\ud800", "\x00"]
    texts += [json.dumps({"tool": t, k: v}) for t in TOOLS for k in "pf" for v in (None, 1, {}, [])]
    for tool in TOOLS:
        for text in texts:
            environment, _ = started(tool)
            observation = environment._step_text(text)
            assert observation.error.kind in ERROR_KINDS
            assert observation.content.isascii()


def told(environment, action):
    return environment._step_text(json.dumps(action)).error


def old_forms(drift, calls):
    """The calls under their old keys; raises where today's API would refuse one."""
    parsed = [json.loads(call) for call in calls]
    tools = [call.pop("tool") for call in parsed]
    return [{"tool": tool, **drift.accept(tool, c)} for tool, c in zip(tools, parsed, strict=True)]


@pytest.mark.parametrize("num_shown", range(4))
@pytest.mark.parametrize("drift_seed", range(8))
@pytest.mark.parametrize("tool", TOOLS)
def test_an_error_demonstrates_todays_answer_to_the_last_requests_in_the_prompt(
    tool, drift_seed, num_shown
):
    environment, task = started(tool, drift_seed=drift_seed, num_hint_demos=num_shown)
    drift = drift_from_seed(drift_seed)
    first = task.steps(drift)[0]["tool"]
    error = told(environment, {"tool": tool, "no_such_key": "x"})
    demos = task.demos[3 - num_shown :]
    assert [request for request, _ in error.demonstrations] == [request for request, _ in demos]
    shown = old_forms(drift, [call for _, call in error.demonstrations])
    assert shown == [
        {"tool": first} | {key: old_call[key] for key in TOOL_KEYS[first]} for _, old_call in demos
    ]
    assert json.loads(error.example) == drift.translate(task.demos[-1][1])


@pytest.mark.parametrize("num_shown", [-1, 4])
def test_a_hint_cannot_demonstrate_more_than_the_prompt_shows(num_shown):
    with pytest.raises(DataError, match=rf"num_hint_demos is {num_shown}; a prompt shows 3"):
        started(num_hint_demos=num_shown)


def test_the_demonstrated_tool_is_the_one_that_the_request_asks_for():
    environment, task = started("read", num_hint_demos=3)
    error = told(environment, {"tool": "list", "path": task.target})
    assert error.kind == "unknown_key"
    assert {json.loads(call)["tool"] for _, call in error.demonstrations} == {"read"}
    assert json.loads(error.example)["tool"] == "list"


@pytest.mark.parametrize("num_shown", [0, 2])
def test_a_call_for_a_file_that_is_not_there_is_demonstrated_too(num_shown):
    environment, task = started("read", num_hint_demos=num_shown)
    error = told(environment, {"tool": "read", "file": "nowhere.py"})
    shown = old_forms(DEFAULT_DRIFT, [call for _, call in error.demonstrations])
    assert shown == [dict(call) for _, call in task.demos[3 - num_shown :]]
    assert error.kind == "not_found"


@pytest.mark.parametrize("is_shown", [True, False])
def test_a_hidden_example_is_recorded_but_not_shown(is_shown):
    environment, task = started(is_example_shown=is_shown)
    observation = environment._step_text(old_call(task))
    assert observation.error.example is not None
    assert ("Example" in observation.content) is is_shown


def test_the_grades_sum_to_one_and_each_rung_adds_its_own():
    assert sum(GRADES.values()) == pytest.approx(1.0)
    for name, grade in GRADES.items():
        assert Progress(**{name: True}).reward() == grade


@pytest.mark.parametrize(
    ("action", "reward"),
    [
        ("no json", 0.0),
        ("{call}{call}", 0.0),
        ('{{"tool": "list", "path": "x"}}', 0.1),
        ('{{"path": "{target}"}}', 0.1),
        ('{{"tool": "read", "path": "other.py"}}', 0.2),
        ('{{"tool": "read", "name": "{target}"}}', 0.2),
        ('{{"tool": "read", "path": "{target}"}}', 0.3),
        ('{{"tool": "read", "path": "/{target}"}}', 0.3),
        ('{{"tool": "read", "path": "{target}", "file": "{target}"}}', 0.2),
        ('{{"tool": "read", "path": ["{target}"]}}', 0.2),
        ('{{"tool": "read", "file": "{target}"}}', 1.0),
        ('{{"tool": "read", "file": "/{target}"}}', 1.0),
    ],
)
def test_the_first_action_is_graded_by_the_documented_table(action, reward):
    environment, task = started("read")
    environment._step_text(action.format(target=task.target, call=old_call(task)))
    assert environment.get_reward() == reward


def test_a_right_second_action_after_prose_earns_completion_only():
    environment, task = started("read")
    played(environment, "Let me see.", *right_calls(task))
    assert environment.get_reward() == 0.4


def test_reading_first_earns_the_clean_rung_of_an_edit_and_nothing_more():
    environment, task = started("edit")
    played(environment, right_calls(task)[0])
    assert environment.get_reward() == 0.6


@pytest.mark.parametrize("tool", TOOLS)
def test_repeating_the_old_call_earns_no_more_than_saying_it_once(tool):
    environment, task = started(tool)
    once = environment._step_text(old_call(task))
    reward = environment.get_reward()
    turns = played(environment, *[old_call(task)] * 5)
    assert once.error is not None
    assert environment.get_reward() == reward == 0.3
    assert turns[-1].is_done


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool != "list"])
def test_a_harmless_call_that_was_not_asked_for_earns_only_its_json(tool):
    environment, task = started(tool)
    folder = next(iter(task.files)).partition("/")[0]
    observation = environment._step_text(json.dumps({"tool": "list", "folder": folder}))
    assert observation.error is None
    assert environment.get_reward() == 0.1


def test_changing_anything_else_ends_the_episode_without_completion():
    environment, task = started("delete")
    other = next(path for path in task.files if path != task.target)
    wrong = json.dumps({"tool": "delete", "path": other, "confirm": True})
    observation = environment._step_text(wrong)
    assert (observation.error, observation.is_done) == (None, True)
    played(environment, *right_calls(task))
    assert environment.get_reward() == 0.2


def test_nothing_is_earned_after_the_last_turn():
    environment, task = started("read", num_spare_turns=0)
    played(environment, "prose", *right_calls(task))
    assert environment.get_reward() == 0.0


def test_a_call_within_prose_or_many_calls_in_one_action_are_not_carried_out():
    environment, task = started("read", num_spare_turns=3)
    right = right_calls(task)[0]
    for action in (
        f"I call {right}",
        f"{right}\n{right}",
        f"[{right}]",
        f"{right}{old_call(task)}",
    ):
        assert environment._step_text(action).error.kind == "not_json"
    assert environment.get_reward() == 0.0


def test_reset_forgets_the_episode_before():
    environment, task = started("edit")
    played(environment, *right_calls(task))
    environment.reset(task_seed=SEED_OF["edit"])
    assert environment.get_reward() == 0.0
    assert environment._step_text(right_calls(task)[1]).error.kind == "not_read"


def test_equal_seeds_give_equal_episodes_and_other_seeds_other_ones():
    assert task_from_seed(3, "train") == task_from_seed(3, "train")
    requests = [task_from_seed(seed, "train").request for seed in range(64)]
    assert len(set(requests)) > 56
    assert task_from_seed(3, "heldout").request != task_from_seed(3, "train").request


def test_another_drift_refuses_what_the_default_drift_accepts():
    refused = 0
    for tool in TOOLS:
        environment, task = started(tool, drift_seed=3)
        refused += environment._step_text(right_calls(task)[0]).error is not None
    assert refused >= 6


def test_an_undrifted_tool_takes_the_old_call():
    environment, task = started("test", num_drifted_tools=3)
    environment._step_text(old_call(task))
    assert environment.get_reward() == 1.0


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(POOLS, 2)))
def test_no_two_pools_share_a_folder_stem_or_word(one, other):
    for part in ("folders", "stems", "words"):
        assert not set(getattr(POOLS[one], part)) & set(getattr(POOLS[other], part))


def test_no_demonstration_is_about_the_target():
    for split in POOLS:
        for seed in range(200):
            task = task_from_seed(seed, split)
            answers = {v for k, v in task.old_call.items() if k not in ("tool", "mode")}
            for _, call in task.demos:
                shared = answers & {v for k, v in call.items() if k not in ("tool", "mode")}
                assert not shared


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({}, "no 'task_seed'"),
        ({"task_seed": "3"}, "must be int"),
        ({"task_seed": 3, "num_spare_turns": -1}, "0 or more"),
        ({"task_seed": True}, "must be"),
        ({"task_seed": 3, "num_spare_turn": 2}, "num_spare_turns"),
        ({"task_seed": 3, "split": "test"}, "no split"),
        ({"task_seed": 3, "prompt": [{"role": "user", "content": "hi"}]}, "Make the data again"),
    ],
)
def test_a_row_that_cannot_be_an_episode_is_refused(row, match):
    with pytest.raises(DataError, match=match):
        ApiDrift().reset(**row)
