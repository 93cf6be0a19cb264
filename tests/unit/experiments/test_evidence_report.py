"""The evidence's tables: rates, intervals, claims judged, and stale results left out."""

import json
import math

import pytest

from composer_replication.experiments.evidence_arms import (
    ARMS,
    FIRST_FRESH_SEED,
    SETTINGS,
    fingerprint,
)
from composer_replication.experiments.evidence_claims import claims_table, tokens_to_reach
from composer_replication.experiments.evidence_report import (
    Cell,
    finished,
    load_cells,
    rule_table,
    table,
)

TOOLS = ["read", "list", "read", "list"]


def result(arm="all", outcomes=(1, 1, 1, 1), *, task="api_drift", seed=0, old=0.5, **changes):
    outcomes = list(outcomes)
    return {
        "schema": 1,
        "task": task,
        "arm": arm,
        "seed": seed,
        "drift": 0,
        "settings": fingerprint(task, ARMS[arm], SETTINGS[task]),
        "greedy": {"outcomes": outcomes},
        "sampled": {"outcomes": outcomes},
        "tools": TOOLS if task == "api_drift" else [""] * 4,
        "pair_tools": ["read"] if task == "api_drift" else [],
        "forgetting": {"nats_per_token": 2.0, "old_convention": old},
        "generated_tokens": 4000,
        "curve": [
            {"step": 4, "generated_tokens": 1000, "heldout_success": outcomes[0]},
            {"step": 8, "generated_tokens": 4000, "heldout_success": outcomes[-1]},
        ],
        **changes,
    }


def cell(arm, *results):
    return Cell(results[0]["task"], 0, arm, results)


def claims(*results):
    """Words of each claim -> its other columns: measured, seeds, holds, fresh seeds."""
    groups = {}
    for one in results:
        groups.setdefault((one["task"], one["drift"], one["arm"]), []).append(one)
    lines = claims_table([Cell(*key, tuple(group)) for key, group in groups.items()])
    rows = [[column.strip() for column in line.strip("|").split("|")] for line in lines[2:]]
    return {words: columns for words, *columns in rows}


def judged(*results):
    return {words: columns[2] for words, columns in claims(*results).items()}


def test_one_seed_has_wilsons_interval_over_prompts():
    rate, low, high = cell("all", result(outcomes=(1, 0, 1, 1))).rate()
    # Wilson at 3 of 4: (0.75 + 1.9207 / 4 +- 1.96 sqrt(0.1875 / 4 + 0.96036 / 16)) / 1.96036
    assert (rate, low, high) == pytest.approx((0.75, 0.3006, 0.9544), abs=1e-4)


def test_three_seeds_have_students_interval_over_their_means():
    seeds = [
        result(seed=i, outcomes=o) for i, o in enumerate([(1, 1, 1, 1), (1, 1, 0, 1), (1, 0, 0, 1)])
    ]
    rate, low, high = cell("all", *seeds).rate()
    # Means 1, 3/4, 1/2: standard deviation 1/4; 4.303 / 4 / sqrt(3) = 0.6211.
    assert (rate, low, high) == pytest.approx((0.75, 0.1289, 1.0), abs=1e-4)


def test_success_can_be_read_for_some_tools_alone():
    whole = cell("sdpo", result("sdpo", (1, 0, 1, 0)))
    assert whole.rate(tools=["read"])[0] == 1.0
    assert whole.rate(tools=["list"])[0] == 0.0
    assert math.isnan(whole.rate(tools=["move"])[0])


def test_results_of_other_settings_are_left_out_and_named(tmp_path):
    for name, one in {
        "api_drift-all-s0": result(),
        "api_drift-all-s1": result(seed=1, settings="older"),
        "api_drift-grpo-s0": result("grpo", (0, 0, 0, 0)),
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    cells, stale = load_cells(tmp_path)
    assert [(c.arm, len(c.results)) for c in cells] == [("grpo", 1), ("all", 1)]
    assert stale == ["api_drift-all-s1.json"]
    assert finished(tmp_path) == {"api_drift-all-s0", "api_drift-grpo-s0"}


def test_a_claim_without_results_is_not_measured():
    assert set(judged(result("base", (0, 0, 0, 0))).values()) == {"not measured"}


MANY = {"tools": TOOLS * 10}


def many(arm, outcomes, **changes):
    """Forty prompts, so that an interval over them is narrow."""
    return result(arm, list(outcomes) * 10, **MANY, **changes)


OLD = "the old convention, when asked for, loses at most 5 points"
UNCOVERED = "+SDPO learns rules that no pair covers (50% of their prompts)"


def test_claims_hold_or_not_where_the_whole_interval_is_on_one_side():
    good = judged(
        many("base", (0, 0, 0, 0), old=0.50),
        many("base", (0, 0, 0, 0), old=0.51, seed=1),
        many("grpo", (0, 0, 0, 0)),
        many("sdpo", (0, 1, 0, 1)),
        many("all", (1, 1, 1, 1), old=0.48),
        many("all", (1, 1, 1, 1), old=0.49, seed=1),
        many("shuffled_hint", (0, 0, 0, 0)),
        many("wrong_hint", (1, 0, 0, 0)),
    )
    assert good["GRPO alone stays at or under 10%"] == "yes"
    assert good["three channels reach 90%"] == "yes"
    assert good[UNCOVERED] == "yes"
    assert good["shuffled hints do not teach"] == "yes"
    assert good["wrong hints do not teach"] == "no"
    assert good[OLD] == "yes"  # 2 points in each seed
    bad = judged(
        many("base", (0, 0, 0, 0), old=0.50),
        many("base", (0, 0, 0, 0), old=0.51, seed=1),
        many("grpo", (1, 0, 0, 0)),
        many("sdpo", (1, 0, 1, 0)),
        many("all", (1, 1, 1, 0), old=0.40),
        many("all", (1, 1, 1, 0), old=0.41, seed=1),
    )
    assert bad["GRPO alone stays at or under 10%"] == "no"
    assert bad["three channels reach 90%"] == "no"
    assert bad[UNCOVERED] == "no"
    assert bad[OLD] == "no"


def test_a_bound_inside_the_interval_leaves_a_claim_to_the_mean_and_says_so():
    few = judged(
        result("base", (0, 0, 0, 0), old=0.50),
        result("all", (1, 1, 1, 1), old=0.47),
        result("grpo", (1, 0, 0, 0)),
    )
    assert few["three channels reach 90%"] == "by its mean"
    assert few["GRPO alone stays at or under 10%"] == "not by its mean"
    assert few[OLD] == "by its mean"  # one seed, 3 points: nothing is known of others


def test_the_old_convention_is_compared_seed_by_seed():
    rows = [result("base", (0, 0, 0, 0), seed=s, old=o) for s, o in enumerate([0.9, 0.5, 0.7])]
    rows += [result("all", seed=s, old=o) for s, o in enumerate([0.8, 0.4, 0.6])]
    rows += [result("all", seed=3, old=0.0)]  # its base is not measured
    # Means over seeds would lose 0.70 - 0.45 = 25 points.
    assert claims(*rows)[OLD][:2] == ["10 points (10 to 10)", "3"]


def test_other_drifts_are_judged_apart_and_move_no_other_claim():
    rows = [many("all", (1, 1, 1, 1), drift=drift) for drift in (0, 2)]
    rows += [many("all", (1, 0, 1, 0), drift=5), many("grpo", (1, 1, 1, 1), drift=5)]
    rows += [many("all", (0, 0, 0, 0), drift=7)]  # the settings were chosen on it as well
    found = claims(*rows)
    assert found["the same on drifts that nothing was chosen on"][:3] == [
        "100%, 50% (by drift)",
        "1",
        "not by its mean",
    ]
    assert found["three channels reach 90%"][2] == "yes"
    assert found["GRPO alone stays at or under 10%"][2] == "not measured"


def test_seeds_from_before_the_last_settings_are_not_among_the_fresh_ones():
    first = FIRST_FRESH_SEED
    rows = [result("grpo", (1, 1, 1, 1), seed=s) for s in range(first)]
    rows += [result("grpo", (0, 0, 0, 0), seed=s) for s in (first, first + 1)]
    columns = claims(*rows)["GRPO alone stays at or under 10%"]
    assert columns[1] == str(first + 2)
    assert columns[3] == "0% (0% to 32%), 2"  # Wilson at 0 of 8


def test_equal_seeds_have_the_interval_of_all_their_prompts():
    same = cell("grpo", *[result("grpo", (0, 0, 0, 0), seed=s) for s in range(3)])
    # Wilson at 0 of 12: 3.8415 / 15.8415.
    assert same.rate() == pytest.approx((0.0, 0.0, 0.2425), abs=1e-4)


def test_tokens_are_counted_to_the_first_point_that_has_the_others_last_score():
    grpo = cell("grpo", result("grpo", (0, 0, 0, 1), task="call_format"))
    early = cell("all", result("all", (1, 1, 1, 1), task="call_format"))
    late = cell("all", result("all", (0, 1, 1, 1), task="call_format"))
    never = cell("all", result("all", (0, 0, 0, 0), task="call_format"))
    assert tokens_to_reach(early, grpo) == [0.25]
    assert tokens_to_reach(late, grpo) == [1.0]
    assert tokens_to_reach(never, grpo) == [math.inf]


def test_a_seed_that_never_reaches_the_score_fails_the_claim_on_tokens():
    grpo = [result("grpo", (0, 0, 0, 1), task="call_format", seed=s) for s in range(2)]
    reach = [result("all", (1, 1, 1, 1), task="call_format", seed=s) for s in range(2)]
    words = "task B: three channels reach GRPO's last score with 25% of its tokens"
    assert claims(*grpo, *reach)[words][:3] == ["25%, 25% (by seed)", "2", "yes"]
    reach[1] = result("all", (0, 0, 0, 0), task="call_format", seed=1)
    assert claims(*grpo, *reach)[words][:3] == ["25%, never (by seed)", "2", "not by its mean"]


def test_the_table_shows_seeds_intervals_covered_rules_and_the_change_from_the_base():
    base = cell("base", result("base", (0, 0, 0, 0), curve=[], generated_tokens=0))
    sdpo = cell(
        "sdpo",
        result("sdpo", (0, 1, 0, 1), forgetting={"nats_per_token": 2.5, "old_convention": 0.25}),
    )
    row = table([base, sdpo])[-1]
    assert row == (
        "| GRPO + SDPO | 1 | 50% (15% to 85%) | 50% (15% to 85%) | 0% | 100% | 25% | 2.50 (+0.50) "
        "| 4,000 |"
    )


def test_success_is_told_by_tool_and_which_of_them_have_pairs():
    lines = rule_table(
        [
            cell("grpo", result("grpo", (0, 0, 0, 0))),
            cell("all", result(outcomes=(1, 0, 1, 1)), result(outcomes=(1, 0, 0, 0), seed=1)),
        ]
    )
    assert lines == [
        "| arm | `read` (pairs) | `list` |",
        "| --- | --- | --- |",
        "| GRPO | 0% | 0% |",
        "| GRPO + SDPO + DPO | 75% | 25% |",
    ]
    assert rule_table([cell("all", result(task="call_format"))]) == []
