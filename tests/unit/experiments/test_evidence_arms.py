"""The evidence's plan: arms differ in what they say, and the most telling run comes first."""

import dataclasses
from collections import Counter

import pytest

from composer_replication.errors import ConfigError
from composer_replication.experiments.evidence import run_config
from composer_replication.experiments.evidence_arms import (
    ARMS,
    SETTINGS,
    TASKS,
    EvidenceRun,
    fingerprint,
    next_runs,
    planned_runs,
)

MAIN = {"base", "grpo", "sdpo", "dpo", "all"}


def config_of(arm, task="api_drift", seed=3):
    return run_config(EvidenceRun(task, arm, seed), SETTINGS[task], "data").model_dump()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_has_the_settings_of_all_three_channels_but_for_what_it_names(task, arm):
    whole, mine = config_of("all", task), config_of(arm, task)
    differing = {key for key in whole if whole[key] != mine[key]} - {"name"}
    named = {*ARMS[arm].switches_off, *(["teacher"] if ARMS[arm].teacher else [])}
    assert differing == named
    assert all(mine[key] == 0 for key in ARMS[arm].switches_off)
    assert whole["alpha_sdpo"] > 0
    assert whole["beta_replay"] > 0


def test_every_control_trains_the_same_channels_as_sdpo():
    for name in set(ARMS) - MAIN:
        assert ARMS[name].switches_off == ARMS["sdpo"].switches_off
        assert ARMS[name].control is not None or ARMS[name].teacher is not None


def test_the_plan_has_five_seeds_of_the_main_arms_and_three_of_the_controls():
    runs = list(planned_runs())
    assert len(runs) == len(set(runs)) == len({run.key for run in runs})
    counts = Counter((run.task, run.arm) for run in runs)
    assert all(counts[task, arm] == 5 for task in TASKS for arm in MAIN)
    assert all(counts[task, arm] == 3 for task in TASKS for arm in set(ARMS) - MAIN)


def test_seed_0_of_every_arm_of_task_a_comes_first_then_task_b():
    runs = next_runs(set(), {})
    assert {run.arm for run in runs[: len(ARMS)]} == set(ARMS)
    assert all((run.task, run.seed) == ("api_drift", 0) for run in runs[: len(ARMS)])
    after = runs[len(ARMS) : 2 * len(ARMS)]
    assert {run.arm for run in after} == set(ARMS)
    assert {(run.task, run.seed) for run in after} == {("call_format", 0)}


def test_a_finished_run_is_not_run_again():
    first, second, *_ = next_runs(set(), {})
    assert next_runs({first.key}, {})[0] == second


def test_filters_keep_what_fits_and_make_runs_outside_the_plan():
    runs = next_runs(set(), {"task": "api_drift", "arm": "all,grpo", "seed": "0"})
    assert {run.key for run in runs} == {"api_drift-all-s0", "api_drift-grpo-s0"}
    (run,) = next_runs(set(), {"arm": "all", "seed": "9", "drift": "4", "task": "api_drift"})
    assert run.key == "api_drift-all-s9-d4"


@pytest.mark.parametrize(
    ("only", "words"),
    [
        ({"arms": "all"}, "no filter 'arms'. Did you mean 'arm'"),
        ({"arm": "al"}, "no arm 'al'. Did you mean 'all'"),
        ({"task": "api"}, "no task 'api'"),
        ({"seed": "one"}, "seed is 'one'; it is a number"),
    ],
)
def test_a_filter_that_fits_nothing_is_refused(only, words):
    with pytest.raises(ConfigError, match=words):
        next_runs(set(), only)


def test_any_changed_setting_changes_the_fingerprint():
    settings = SETTINGS["api_drift"]
    seen = {fingerprint(task, arm, SETTINGS[task]) for task in TASKS for arm in ARMS.values()}
    assert len(seen) == len(TASKS) * len(ARMS)
    for change in ({"num_heldout": 8}, {"knobs": {"num_spare_turns": 1}}, {"config": {}}):
        other = dataclasses.replace(settings, **change)
        assert fingerprint("api_drift", ARMS["all"], other) not in seen
    assert fingerprint("api_drift", ARMS["all"], settings) in seen


def with_config(settings, **changes):
    return dataclasses.replace(settings, config={**settings.config, **changes})


@pytest.mark.parametrize("task", SETTINGS)
def test_results_stay_where_only_what_their_arm_does_not_train_has_changed(task):
    settings = SETTINGS[task]
    more_pairs = with_config(settings, dpo={"pairs_per_step": 9}, beta_replay=0.9)
    other_teacher = with_config(settings, teacher="ema", sdpo={"beta": 0.5}, alpha_sdpo=0.9)
    faster = with_config(settings, grpo={**settings.config["grpo"], "learning_rate": 1.0})
    kept = {
        name: [
            fingerprint(task, arm, changed) == fingerprint(task, arm, settings)
            for changed in (more_pairs, other_teacher, faster)
        ]
        for name, arm in ARMS.items()
    }
    assert kept["grpo"] == [True, True, False]
    assert kept["base"] == [True, True, False]
    assert kept["sdpo"] == kept["wrong_hint"] == [True, False, False]
    assert kept["dpo"] == [False, True, False]
    assert kept["all"] == [False, False, False]
