import pytest

from composer_replication.environments.api_drift_rules import (
    DEFAULT_DRIFT,
    PATH_KEYS,
    TOOL_KEYS,
    Drift,
    Rule,
    drift_from_seed,
)
from composer_replication.environments.api_drift_tasks import task_from_seed
from composer_replication.environments.protocol import ToolError
from composer_replication.errors import ConfigError


def test_the_default_drift_hits_every_tool_once_with_every_kind_of_rule():
    assert sorted(rule.tool for rule in DEFAULT_DRIFT.rules) == sorted(TOOL_KEYS)
    assert {rule.kind for rule in DEFAULT_DRIFT.rules} == {
        "renamed_key",
        "required_flag",
        "absolute_path",
        "read_first",
        "changed_value",
    }


def test_equal_seeds_give_equal_drifts_and_other_seeds_other_rules():
    assert drift_from_seed(5) == drift_from_seed(5)
    assert len({drift_from_seed(seed).rules for seed in range(20)}) == 20


def test_seed_zero_is_the_default_drift_cut_to_its_first_tools():
    assert drift_from_seed(0) == DEFAULT_DRIFT
    assert drift_from_seed(0, 3).rules == DEFAULT_DRIFT.rules[:3]


@pytest.mark.parametrize("num_tools", [-1, 9])
def test_a_number_of_tools_that_does_not_exist_is_refused(num_tools):
    with pytest.raises(ConfigError, match="8 tools"):
        drift_from_seed(1, num_tools)


@pytest.mark.parametrize("seed", range(12))
def test_under_any_drift_the_translated_call_is_accepted_and_means_the_old_one(seed):
    drift = drift_from_seed(seed)
    for task_seed in range(8):
        old_call = dict(task_from_seed(task_seed, "train").old_call)
        call = drift.translate(old_call)
        tool = str(call.pop("tool"))
        assert {"tool": tool, **drift.accept(tool, call)} == old_call


@pytest.mark.parametrize("seed", range(12))
def test_under_any_drift_the_old_call_of_every_drifted_tool_is_refused(seed):
    drift = drift_from_seed(seed)
    for task_seed in range(8):
        old_call = dict(task_from_seed(task_seed, "train").old_call)
        tool = old_call.pop("tool")
        if drift.needs_read_first(tool):
            continue
        with pytest.raises(ToolError):
            drift.accept(tool, old_call)


def test_without_rules_the_old_call_is_accepted():
    for task_seed in range(8):
        old_call = dict(task_from_seed(task_seed, "train").old_call)
        tool = old_call.pop("tool")
        assert Drift(()).accept(tool, old_call) == old_call


@pytest.mark.parametrize(
    ("tool", "arguments", "kind", "message"),
    [
        ("read", {"path": "a"}, "unknown_key", 'Use the key "file".'),
        ("read", {"file": "a", "path": "a"}, "unknown_key", 'Leave out the key "path".'),
        ("read", {}, "missing_key", 'Use the key "file".'),
        ("read", {"file": None}, "wrong_type", 'Give text under "file".'),
        ("read", {"file": ["a"]}, "wrong_type", 'Give text under "file".'),
        ("read", {"file": ""}, "wrong_type", 'Give text under "file".'),
        ("delete", {"path": "a"}, "missing_flag", 'Add "confirm": true.'),
        ("delete", {"path": "a", "confirm": 1}, "missing_flag", 'Add "confirm": true.'),
        ("delete", {"path": "a", "confirm": "true"}, "missing_flag", 'Add "confirm": true.'),
        ("write", {"path": "a", "text": "b"}, "relative_path", "Start the path with /."),
        ("test", {"path": "a", "mode": "quick"}, "bad_value", 'Use the mode "fast".'),
        ("move", {"path": "a", "to": "b"}, "unknown_key", 'Use the key "dest".'),
    ],
)
def test_each_refusal_has_its_kind_and_one_imperative(tool, arguments, kind, message):
    with pytest.raises(ToolError) as refused:
        DEFAULT_DRIFT.accept(tool, arguments)
    assert (refused.value.kind, refused.value.message) == (kind, message)


def test_a_key_of_the_model_is_quoted_short_and_in_ascii():
    with pytest.raises(ToolError) as refused:
        DEFAULT_DRIFT.accept("read", {"file": "a", "\ud800" + "\u6f22" * 100: "a"})
    assert refused.value.message.isascii()
    assert len(refused.value.message) < 120


def test_a_value_that_the_drift_left_alone_is_still_taken():
    assert DEFAULT_DRIFT.accept("test", {"path": "a", "mode": "full"})["mode"] == "full"


def test_an_absolute_rule_covers_every_path_of_its_tool():
    drift = Drift((Rule("move", "absolute_path"),))
    assert set(TOOL_KEYS["move"]) <= PATH_KEYS
    with pytest.raises(ToolError, match="Start the path"):
        drift.accept("move", {"path": "/a", "to": "b"})
    assert drift.accept("move", {"path": "/a", "to": "/b"}) == {"path": "a", "to": "b"}
