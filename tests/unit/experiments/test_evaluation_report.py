"""What an evaluation says of two models: changes, their intervals and the verdict."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import composer_replication.experiments.evaluation_report as evaluation_report
from composer_replication.experiments.evaluate import EpisodeOutcome, EvaluationResult
from composer_replication.experiments.evaluation_report import (
    EvaluationReport,
    Forgetting,
    Margin,
    ModelFigures,
    change_of,
    episode_rows,
    evaluation_json_schema,
    played,
)
from composer_replication.experiments.evaluation_table import print_evaluation
from composer_replication.experiments.proportions import proportion


def episodes(outcomes, decoding="greedy", num_samples=1):
    """One or more episodes a prompt; 1: right, 0: refused for `bad_key`, None: failed."""
    return EvaluationResult(
        decoding,
        tuple(
            EpisodeOutcome(
                row=index // num_samples,
                reward=None if outcome is None else float(outcome),
                error_kinds=() if outcome else ("bad_key",),
                num_actions=1,
                num_tokens=10,
                turns=({"role": "assistant", "content": "{}"},),
                failure="TimeoutError: late" if outcome is None else "",
            )
            for index, outcome in enumerate(outcomes)
        ),
        num_samples,
    )


def figures(greedy, sampled=(0, 0), nats=1.0, old=None, margin=None, given="m"):
    return ModelFigures(
        given=given,
        label=given.upper(),
        greedy=played(episodes(greedy)),
        sampled=played(episodes(sampled, "sampled", num_samples=2)),
        pairs=None if margin is None else Margin(margin, proportion([1.0]), 1),
        forgetting=Forgetting(nats, 400, None if old is None else played(episodes(old))),
        seconds=1.0,
    )


def report(after, before=None):
    return EvaluationReport.of(
        after,
        before,
        task="api_drift",
        data="api_drift, heldout, seed 0",
        num_prompts=12,
        num_samples=2,
        temperature=1.0,
        seed=0,
        device="2-thread CPU",
        versions={"torch": "2.13.0"},
        total_s=2.0,
    )


def shown(value):
    console = Console(width=110, file=io.StringIO())
    print_evaluation(value, console)
    return console.file.getvalue()


def test_a_change_is_better_only_where_chance_does_not_explain_it():
    zeros, ones = [0] * 12, [1] * 12
    assert change_of(figures(zeros), figures(ones)).direction == "better"
    assert change_of(figures(ones), figures(zeros)).direction == "worse"
    # Five more right of twelve: a fair coin does that once in 16.
    few = change_of(figures(zeros), figures([1] * 5 + [0] * 7))
    assert (few.direction, few.greedy.num_better, few.greedy.p_value) == ("not shown", 5, 0.0625)
    assert change_of(figures(ones), figures(ones)).direction == "not shown"


def test_a_long_list_of_refusals_takes_several_lines_and_cuts_no_name():
    kinds = ["not_json", "unknown_tool", "not_found", "unknown_key"]
    wrong = episodes([0] * 12)
    each = zip(wrong.episodes, kinds * 3, strict=True)
    wrong = dataclasses.replace(
        wrong, episodes=tuple(dataclasses.replace(e, error_kinds=(kind,)) for e, kind in each)
    )
    before, after = (
        dataclasses.replace(figures([0] * 12, old=[1] * 12, given=name), greedy=played(wrong))
        for name in ("before", "after")
    )
    text = shown(report(after, before))
    assert "…" not in text
    lines = text.splitlines()
    assert all(len(line) <= 110 for line in lines)
    firsts = {line.split("  ")[0] for line in lines}
    assert {"greedy success", "old convention, greedy", "nats a token, everyday"} <= firsts
    # Names of what was refused are whole as well.
    assert all(text.count(kind) == 2 for kind in kinds)


def test_every_figure_changes_from_before_to_after():
    before = figures([0] * 4, sampled=(0, 1, 0, 0), nats=1.0, old=[1, 1], margin=-2.0)
    after = figures([1] * 4, sampled=(1, 1, 0, 0), nats=1.25, old=[1, 0], margin=3.0)
    change = change_of(before, after)
    assert change.greedy.change == 1.0
    assert (change.sampled.change, change.sampled.p_value) == (0.25, None)
    assert (change.nats_per_token, change.pairs_nats) == (0.25, 5.0)
    assert change.old_convention is not None
    assert change.old_convention.change == -0.5
    bare = change_of(figures([0]), figures([1]))
    assert (bare.pairs_nats, bare.old_convention) == (None, None)


def test_a_failed_environment_counts_as_not_succeeded_and_is_said():
    value = report(figures([1, None, 1, 1]))
    assert value.model.greedy.success.rate == 0.75
    assert (value.model.greedy.num_failed, value.model.greedy.num_episodes) == (1, 4)
    assert "failed environments     1 + 0" in shown(value)


def test_the_terminal_answers_first():
    before = figures([0] * 12, old=[1] * 12, margin=-1.0)
    text = shown(report(figures([1] * 12, old=[1] * 12, margin=2.5), before))
    first = text.splitlines()[0]
    assert first.rstrip() == (
        "better  greedy success 0% -> 100% (+100 points [+66, +100], p = 0.0005)"
    )
    assert "refused, greedy         bad_key 12" in text
    assert "old convention, greedy" in text
    alone = shown(report(figures([1, 0, 0, 0])))
    assert alone.splitlines()[0].rstrip() == "success 25% [5%, 70%]  M, greedy"
    assert "change" not in alone


def test_the_report_reads_back_as_it_was_written_and_refuses_another_layout():
    value = report(figures([1], old=[1], margin=1.0), figures([0], old=[1], margin=0.0))
    assert EvaluationReport.model_validate_json(value.to_json()) == value
    other = json.loads(value.to_json()) | {"schema": 2}
    with pytest.raises(ValueError, match="schema"):
        EvaluationReport.model_validate(other)


def test_every_episode_has_a_line_with_what_was_said():
    rows = [json.loads(line) for line in episode_rows([{"prompt": ["p0"]}], episodes([None]))]
    assert rows == [
        {
            "decoding": "greedy",
            "row": 0,
            "reward": None,
            "error_kinds": ["bad_key"],
            "failure": "TimeoutError: late",
            "prompt": ["p0"],
            "turns": [{"role": "assistant", "content": "{}"}],
        }
    ]


def test_the_published_schema_is_what_the_code_says():
    path = Path(evaluation_report.__file__).with_name("evaluation_schema.json")
    assert path.read_text() == evaluation_json_schema()
