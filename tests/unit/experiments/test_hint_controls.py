"""Hints that should not teach: the same sites and form, and nothing of the right rule."""

import json

import pytest

from composer_replication.experiments.hint_controls import WRONG_KEYS, empty, shuffled, wrong
from composer_replication.experiments.task_registry import task_rows

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
    sites = [site for site in TRAIN["api_drift"] if "{" in site.hint]
    for before, after in zip(sites, wrong(sites), strict=True):
        right, shown = example_of(before.hint), example_of(after.hint)
        assert shown["tool"] == right["tool"]
        assert sorted(map(str, shown.values())) == sorted(map(str, right.values()))
        (key,) = shown.keys() - right.keys()
        assert key in WRONG_KEYS
        assert after.hint.startswith(f'Hint: Use the key "{key}". Example of a correct call: {{')
        by_tool.setdefault(shown["tool"], set()).add(key)
    assert all(len(keys) == 1 for keys in by_tool.values())


def test_an_empty_hint_is_no_hint():
    assert {site.hint for site in empty(TRAIN["api_drift"])} == {""}
