import json

import pytest

from composer_replication.environments.recorded_state import RecordedState
from composer_replication.errors import DataError
from composer_replication.experiments.fix_call_data import FixCallSpec, recorded_run
from composer_replication.experiments.task_registry import task_rows
from composer_replication.traces.atif import trace_from_atif
from composer_replication.traces.recorded_states import recorded_state_rows, replayed_state_rows


def played(row, action):
    environment = RecordedState()
    environment.reset(**row)
    observation = environment._step_text(action)
    return environment.get_reward(), observation.error


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_majority_scores_and_the_recorded_error_and_the_wrong_teacher_do_not(split):
    num_dissenting = 0
    for row in task_rows("fix_call", split).prompts:
        assert played(row, row["teacher_actions"][0]) == (1.0, None)
        reward, error = played(row, row["recorded_action"])
        assert (reward, error.kind) == (0.0, row["error_kind"])
        num_dissenting += row["teacher_actions"][-1] == row["recorded_action"]
    assert num_dissenting > 0


def test_every_recorded_error_turn_is_a_state_a_site_and_a_pair():
    rows = task_rows("fix_call", "train")
    assert len(rows.prompts) == len(rows.hint_sites) == len(rows.pairs) > 64
    for prompt, site, pair in zip(rows.prompts, rows.hint_sites, rows.pairs, strict=True):
        assert prompt["recorded_action"] == site.action == pair.rejected
        assert pair.chosen == prompt["teacher_actions"][0]
        assert pair.weight == pytest.approx(
            prompt["teacher_actions"].count(pair.chosen) / len(prompt["teacher_actions"])
        )


def test_states_of_a_second_error_hold_the_first_one():
    rows = task_rows("fix_call", "train").prompts
    second = [row for row in rows if any(m["role"] == "tool" for m in row["prompt"])]
    assert second
    for row in second:
        assert "error: " in row["prompt"][-1]["content"]


def test_hints_hold_no_action_that_scores():
    rows = task_rows("fix_call", "train")
    for prompt, site in zip(rows.prompts, rows.hint_sites, strict=True):
        assert prompt["teacher_actions"][0] not in site.hint


def test_another_drift_gives_other_right_calls():
    answers = [
        {row["teacher_actions"][0] for row in task_rows("fix_call", "train", drift_seed=d).prompts}
        for d in (0, 7)
    ]
    assert len(answers[0] & answers[1]) < len(answers[0]) / 4


def test_a_run_replayed_gives_a_row_for_each_action_with_those_before_it():
    run = recorded_run(FixCallSpec(task_seed=8), 8)
    spec = run["extra"]["composer"]["spec"]
    rows = replayed_state_rows(trace_from_atif(run, "run"), spec)
    assert [len(row["past_actions"]) for row in rows] == list(range(len(rows)))
    assert rows[0]["episode"] == spec
    assert json.dumps(rows[1]["prompt"]).count('"role": "tool"') == 1


def test_states_on_which_teachers_are_not_agreed_are_left_out():
    run = recorded_run(FixCallSpec(task_seed=1, num_teachers=2), 1)
    trace = trace_from_atif(run, "run")
    index = min(trace.errors)
    right, wrong = trace.teacher_actions[index][0], trace.messages[index].content
    assert len(recorded_state_rows(trace)) == len(trace.errors)
    for teachers in ((right, wrong), (wrong, wrong)):
        disagreed = type(trace)(
            trace.messages, trace.errors, {index: teachers}, trace.num_context_messages, "s"
        )
        assert recorded_state_rows(disagreed) == []


def test_no_teachers_is_refused():
    with pytest.raises(DataError, match="at least 1"):
        task_rows("fix_call", "train", num_teachers=0)
