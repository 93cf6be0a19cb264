"""Hints that should not teach: the same sites and form, and nothing of the right rule."""

import json
from dataclasses import replace

import pytest

from composer_replication.environments.api_drift_rules import TOOL_KEYS, drift_from_seed
from composer_replication.environments.protocol import ToolError
from composer_replication.experiments.hint_controls import WRONG_KEYS, empty, shuffled, wrong
from composer_replication.experiments.task_registry import task_rows
from composer_replication.traces.hints import demonstrations_in
from composer_replication.traces.trace import Message

TRAIN = {name: task_rows(name, "train").hint_sites for name in ("api_drift", "call_format")}


def examples_of(hint):
    return [json.loads(action) for _, action in demonstrations_in(hint)[1]]


def example_of(hint):
    return examples_of(hint)[-1]


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
        if examples_of(before.hint):
            assert example_of(after.hint)["tool"] != example_of(before.hint)["tool"]


def test_shuffling_follows_its_seed():
    sites = TRAIN["api_drift"]
    hints = [site.hint for site in sites]
    assert shuffled(hints, 1)(sites) == shuffled(hints, 1)(sites)
    assert shuffled(hints, 1)(sites) != shuffled(hints, 2)(sites)


@pytest.mark.parametrize("num_shown", range(4))
def test_a_wrong_hint_has_the_right_form_and_one_wrong_key_for_each_tool(num_shown):
    by_tool = {}
    sites = task_rows("api_drift", "train", num_hint_demos=num_shown).hint_sites
    for before, after in zip(sites, wrong(sites), strict=True):
        _, asked = demonstrations_in(before.hint)
        advice, shown = demonstrations_in(after.hint)
        if asked:
            assert [request for request, _ in shown] == [request for request, _ in asked]
        prompt = {before.state[n].content: before.state[n + 1].content for n in (1, 3, 5)}
        for request, action in shown:
            old_call = prompt[request] if request else before.state[2].content
            old, call = json.loads(old_call), json.loads(action)
            assert list(call.values()) == list(old.values())
            (key,) = call.keys() - old.keys()
            assert key in WRONG_KEYS
            assert advice == f'Hint: Use the key "{key}".'
            by_tool.setdefault(call["tool"], set()).add(key)
    assert by_tool.keys() == TOOL_KEYS.keys()
    assert all(len(keys) == 1 for keys in by_tool.values())


@pytest.mark.parametrize("num_shown", [0, 1, 3])
def test_a_wrong_hint_has_the_right_hints_requests_where_the_prompt_lacks_them(num_shown):
    """`call_format` demonstrates further requests, and has one convention alone."""
    sites = task_rows("call_format", "train", num_hint_demos=num_shown).hint_sites
    for before, after in zip(sites, wrong(sites), strict=True):
        _, asked = demonstrations_in(before.hint)
        _, shown = demonstrations_in(after.hint)
        assert len(shown) == max(num_shown, 1)
        assert [request for request, _ in shown] == [request for request, _ in asked]
        if num_shown:
            for (_, right), (_, wrongly) in zip(asked, shown, strict=True):
                (lost,), (found,) = right_and_wrong_keys(right, wrongly)
                assert lost not in WRONG_KEYS
                assert found in WRONG_KEYS


def right_and_wrong_keys(right, wrongly):
    right, wrongly = json.loads(right), json.loads(wrongly)
    assert list(right.values()) == list(wrongly.values())
    return right.keys() - wrongly.keys(), wrongly.keys() - right.keys()


@pytest.mark.parametrize("num_shown", [0, 3])
@pytest.mark.parametrize("drift_seed", range(12))
def test_nothing_of_todays_rule_is_left_in_a_wrong_hint(drift_seed, num_shown):
    drift = drift_from_seed(drift_seed)
    knobs = {"drift_seed": drift_seed, "num_hint_demos": num_shown}
    sites = task_rows("api_drift", "train", num_episodes=64, **knobs).hint_sites
    today = {rule.new for rule in drift.rules if rule.new}
    requested = set()
    for before, after in zip(sites, wrong(sites), strict=True):
        asked_for = json.loads(before.state[-2].content)["tool"]
        requested.add(asked_for)
        # The tool asked for, so no read that must come first; no flag, value or rooted path.
        for shown in examples_of(after.hint):
            assert shown["tool"] == asked_for
            assert not today & {*shown, *map(str, shown.values())}
            assert not any(str(value).startswith("/") or value is True for value in shown.values())
            with pytest.raises(ToolError):
                drift.accept(shown.pop("tool"), shown)
        assert not [name for name in today if f'"{name}"' in after.hint]
        assert "Start the path" not in after.hint
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
