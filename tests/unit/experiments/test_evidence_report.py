"""The evidence's tables: rates, intervals, claims judged, and stale results left out."""

import json
import math

import pytest

from composer_replication.experiments.evidence_arms import ARMS, SETTINGS, fingerprint
from composer_replication.experiments.evidence_report import (
    Cell,
    finished,
    load_cells,
    rule_table,
    table,
    tokens_to_reach,
    verdicts,
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


def judged(*results):
    groups = {}
    for one in results:
        groups.setdefault((one["task"], one["arm"]), []).append(one)
    lines = verdicts([cell(arm, *group) for (_, arm), group in groups.items()])
    return {line.split(" | ")[0].strip("| "): line.split(" | ")[2].strip(" |") for line in lines}


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
    assert set(judged(result("base", (0, 0, 0, 0))).values()) == {"holds", "---", "not measured"}


def test_claims_hold_or_not_by_what_was_measured():
    good = judged(
        result("base", (0, 0, 0, 0), old=0.50),
        result("grpo", (0, 0, 0, 0)),
        result("sdpo", (0, 1, 0, 1)),
        result("all", (1, 1, 1, 1), old=0.46),
        result("shuffled_hint", (0, 0, 0, 0)),
        result("wrong_hint", (1, 0, 0, 0)),
    )
    assert good["GRPO alone stays at or under 10%"] == "yes"
    assert good["three channels reach 90%"] == "yes"
    assert good["+SDPO learns rules that no pair covers (50% of their prompts)"] == "yes"
    assert good["shuffled hints do not teach"] == "yes"
    assert good["wrong hints do not teach"] == "no"
    assert good["the old convention, when asked for, loses at most 5 points"] == "yes"
    bad = judged(
        result("base", (0, 0, 0, 0), old=0.50),
        result("grpo", (1, 0, 0, 0)),
        result("sdpo", (1, 0, 1, 0)),
        result("all", (1, 1, 1, 0), old=0.44),
    )
    assert bad["GRPO alone stays at or under 10%"] == "no"
    assert bad["three channels reach 90%"] == "no"
    assert bad["+SDPO learns rules that no pair covers (50% of their prompts)"] == "no"
    assert bad["the old convention, when asked for, loses at most 5 points"] == "no"


def test_tokens_are_counted_to_the_first_point_that_has_the_others_last_score():
    grpo = cell("grpo", result("grpo", (0, 0, 0, 1), task="call_format"))
    early = cell("all", result("all", (1, 1, 1, 1), task="call_format"))
    late = cell("all", result("all", (0, 1, 1, 1), task="call_format"))
    never = cell("all", result("all", (0, 0, 0, 0), task="call_format"))
    assert tokens_to_reach(early, grpo) == 0.25
    assert tokens_to_reach(late, grpo) == 1.0
    assert tokens_to_reach(never, grpo) is None


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
