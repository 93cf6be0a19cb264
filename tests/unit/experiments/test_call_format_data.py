import pytest

from composer_replication.environments.call_format import FORMAT_ERROR_KINDS, CallFormat
from composer_replication.environments.call_format_tasks import CALL_KEYS, FormatSpec, format_task
from composer_replication.experiments.call_format_data import SLIPS, wrong_trace
from composer_replication.experiments.task_registry import task_rows
from composer_replication.traces.hints import demonstrations_in


def judged(site_or_pair, action):
    split, seed = site_or_pair.source.split("-")
    environment = CallFormat()
    environment.reset(task_seed=int(seed), split=split)
    return environment._step_text(action).error


def test_hint_sites_cover_every_error_kind_and_every_tool():
    sites = task_rows("call_format", "train").hint_sites
    assert {site.error_kind for site in sites} == set(FORMAT_ERROR_KINDS) - {"episode_over"}
    tools = {format_task(FormatSpec(int(site.source[-4:]))).call["tool"] for site in sites}
    assert tools == set(CALL_KEYS)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_chosen_action_is_right_and_its_rejected_one_is_refused(split):
    for pair in task_rows("call_format", split).pairs:
        assert judged(pair, pair.chosen) is None
        assert judged(pair, pair.rejected) is not None


def test_a_hint_carries_an_example_and_never_the_answer():
    rows = task_rows("call_format", "train")
    for site, pair in zip(rows.hint_sites, rows.pairs, strict=True):
        assert "Example of a correct call: {" in site.hint
        assert pair.chosen not in site.hint


def test_a_hint_that_answers_requests_holds_none_of_the_heldout_split():
    rows = task_rows("call_format", "train", num_hint_demos=3)
    heldout = task_rows("call_format", "heldout").prompts
    asked = {row["prompt"][-1]["content"] for row in heldout}
    for site, pair in zip(rows.hint_sites, rows.pairs, strict=True):
        _, shown = demonstrations_in(site.hint)
        assert len(shown) == 3
        assert not asked & {request for request, _ in shown}
        assert pair.chosen not in site.hint


@pytest.mark.parametrize("slip", SLIPS)
def test_each_slip_is_an_error_at_every_tool_and_difficulty(slip):
    for seed in range(len(CALL_KEYS)):
        for num_demos, num_matching in ((3, 2), (0, 0), (3, 3)):
            trace = wrong_trace(FormatSpec(seed, "train", num_demos, num_matching), slip)
            assert len(trace.errors) == 1
