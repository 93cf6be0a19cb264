"""Hints that should not teach: the same sites and form, and nothing of the right rule."""

import json
from dataclasses import replace

import pytest

from composer_replication.environments.api_drift_rules import TOOL_KEYS, drift_from_seed
from composer_replication.environments.protocol import ToolError
from composer_replication.experiments.hint_controls import WRONG_KEYS, empty, shuffled, wrong
from composer_replication.experiments.task_registry import task_rows
from composer_replication.traces.trace import Message

TRAIN = {name: task_rows(name, "train").hint_sites for name in ("api_drift", "call_format")}


def example_of(hint):
    return json.loads(hint[hint.index("{") :])


@pytest.mark.parametrize("task", TRAIN)
@pytest.mark.parametrize("control", [shuffled, wrong, empty])
def test_a_control_changes_nothing_but_the_hint(task, control):
    sites = TRAIN[task]
    changed = shuffled([s.hint for s in sites], 0)(sites) if control is shuffled else control(sites)
    for before, after in zip(sites, changed, strict=True):
        assert after.hint != before.hint
        assert (after.state, after.action, after.source) == (
            before.state,
            before.action,
            before.source,
        )


def test_a_shuffled_hint_is_of_another_tool_than_the_request():
    sites = TRAIN["api_drift"]
    hints = [site.hint for site in sites]
    for before, after in zip(sites, shuffled(hints, 0)(sites), strict=True):
        assert after.hint in hints
        shown = json.loads(before.state[-2].content)
        assert example_of(after.hint)["tool"] != shown["tool"]
        if "{" in before.hint:
            assert example_of(after.hint)["tool"] != example_of(before.hint)["tool"]


def test_shuffling_follows_its_seed():
    sites = TRAIN["api_drift"]
    hints = [site.hint for site in sites]
    assert shuffled(hints, 1)(sites) == shuffled(hints, 1)(sites)
    assert shuffled(hints, 1)(sites) != shuffled(hints, 2)(sites)


def test_a_wrong_hint_has_the_right_form_and_one_wrong_key_for_each_tool():
    by_tool = {}
    sites = TRAIN["api_drift"]
    for before, after in zip(sites, wrong(sites), strict=True):
        old, shown = json.loads(before.state[2].content), example_of(after.hint)
        assert list(shown.values()) == list(old.values())
        (key,) = shown.keys() - old.keys()
        assert key in WRONG_KEYS
        assert after.hint.startswith(f'Hint: Use the key "{key}". Example of a correct call: {{')
        by_tool.setdefault(shown["tool"], set()).add(key)
    assert by_tool.keys() == TOOL_KEYS.keys()
    assert all(len(keys) == 1 for keys in by_tool.values())


@pytest.mark.parametrize("drift_seed", range(12))
def test_nothing_of_todays_rule_is_left_in_a_wrong_hint(drift_seed):
    drift = drift_from_seed(drift_seed)
    sites = task_rows("api_drift", "train", num_episodes=64, drift_seed=drift_seed).hint_sites
    today = {rule.new for rule in drift.rules if rule.new}
    requested = set()
    for before, after in zip(sites, wrong(sites), strict=True):
        asked_for = json.loads(before.state[-2].content)["tool"]
        requested.add(asked_for)
        shown = example_of(after.hint)
        # The tool asked for, so no read that must come first; no flag, value or rooted path.
        assert shown["tool"] == asked_for
        assert not today & {*shown, *map(str, shown.values())}
        assert not any(str(value).startswith("/") or value is True for value in shown.values())
        assert not [name for name in today if f'"{name}"' in after.hint]
        assert "Start the path" not in after.hint
        with pytest.raises(ToolError):
            drift.accept(shown.pop("tool"), shown)
    assert requested == TOOL_KEYS.keys()


def test_a_wrong_hint_shows_no_call_of_the_models_own():
    site = TRAIN["api_drift"][0]
    mine = (Message("assistant", '{"tool": "read", "file": "a.py"}'), Message("user", "error"))
    later = replace(site, state=(*site.state, *mine))
    assert wrong([later])[0].hint == wrong([site])[0].hint
    bare = replace(site, state=(Message("user", "Read a.py."),))
    assert wrong([bare])[0].hint == 'Hint: Use the key "uri".'


def test_an_empty_hint_is_no_hint():
    assert {site.hint for site in empty(TRAIN["api_drift"])} == {""}
