import json
import re
from importlib.resources import files

import pytest

from composer_replication.cli import main
from composer_replication.errors import DataError
from composer_replication.planner.run_reports import (
    compare_runs,
    planner_report,
    planner_report_schema,
    run_comparison_schema,
)
from composer_replication.runs.summary import Summary

PLANNED = {
    "verb": "smoke",
    "device": "NVIDIA L4",
    "model": "m",
    "step_s": [1.0, 2.0, 4.0],
    "bare_step_s": 2.0,
    "peak_tensor_gib": 5.0,
    "wall_s": 100.0,
}


def ended(folder, *, loss=0.5, planned=PLANNED, **figures):
    folder.mkdir(parents=True)
    summary = Summary(status="passed", model="m", device="NVIDIA L4", **figures)
    (folder / "summary.json").write_text(summary.to_json())
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss}) + "\n")
    if planned is not None:
        (folder / "planned.json").write_text(json.dumps(planned))
    return folder


@pytest.fixture
def runs(tmp_path):
    ended(tmp_path / "a", median_step_s=2.5, peak_tensor_gib=4.0, total_s=80.0)
    ended(tmp_path / "b", median_step_s=8.0, total_s=None, loss=0.6)
    return tmp_path


def test_predictions_stand_beside_measurements_with_their_error(runs):
    report = planner_report([runs])
    first, second = sorted(report.runs, key=lambda run: run.run)
    assert first.step_s.error == pytest.approx(2.0 / 2.5 - 1)
    assert first.tensor_gib.error == pytest.approx(0.25)
    assert (first.is_in_range, second.is_in_range) == (True, False)
    # What was not measured is unknown, and no error of 0.
    assert second.tensor_gib.measured is second.tensor_gib.error is None
    assert report.median_absolute_error["step_s"] == pytest.approx((0.2 + 0.75) / 2)
    assert report.median_absolute_error["tensor_gib"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    "damage",
    [
        {"bare_step_s": 0},
        {"bare_step_s": None},
        {"wall_s": "100"},
        {"step_s": [1.0, "2", 4.0]},
        {"step_s": [1.0, 2.0]},
        {"step_s": [0.0, 0.0, 0.0]},
        {"peak_tensor_gib": []},
        {"device": 3},
        {"model": ["m"]},
        {"wall_s": float("nan")},
    ],
)
def test_a_run_whose_plan_is_damaged_is_passed_over(damage, runs, capsys):
    ended(runs / "c", planned=PLANNED | damage, median_step_s=2.5)
    assert {run.run for run in planner_report([runs]).runs} == {"a", "b"}


@pytest.mark.parametrize(
    "damage",
    [
        {"median_step_s": "2"},
        {"total_s": "80"},
        {"phases_s": {"load": "3"}},
        {"phases_s": 3},
        {"peak_tensor_gib": True},
    ],
)
def test_a_run_whose_summary_is_damaged_is_passed_over(damage, runs):
    ended(runs / "c", median_step_s=2.5)
    path = runs / "c" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    assert {run.run for run in planner_report([runs]).runs} == {"a", "b"}


def test_two_runs_are_compared_figure_by_figure(runs):
    report = compare_runs(runs / "a", runs / "b")
    figures = {figure.name: figure for figure in report.figures}
    assert figures["first_step_loss"].ratio == pytest.approx(1.2)
    assert figures["median_step_s"].ratio == pytest.approx(3.2)
    assert figures["peak_tensor_gib"].b is figures["peak_tensor_gib"].ratio is None
    assert report.runs["a"]["device"] == "NVIDIA L4"


def test_the_command_prints_tables_and_one_object(runs, capsys):
    assert main(["report", "planner", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = "error   step 48%, tensors 25%, whole run 25% (median of 2 runs)"
    assert lines[0].startswith(start)
    assert any(re.search(r"  1 to 4 s +yes *$", line) for line in lines), lines
    assert main(["report", "compare", str(runs / "a"), str(runs / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["planer", "x"], "Did you mean 'planner'?"),
        (["compare", "x"], "was given 1 folder;"),
        (["compare", "x", "y", "z"], "was given 3 folders;"),
        (["compare", "x", "y"], "holds no readable summary.json"),
        (["planner", "x"], "holds no run with planned.json"),
    ],
)
def test_what_cannot_be_reported_is_told(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_a_run_without_a_plan_is_no_row(tmp_path):
    ended(tmp_path / "a", planned=None, median_step_s=1.0)
    with pytest.raises(DataError, match="holds no run with planned"):
        planner_report([tmp_path])


@pytest.mark.parametrize(
    ("name", "schema"),
    [("planner_report", planner_report_schema()), ("run_comparison", run_comparison_schema())],
)
def test_the_published_schemas_are_the_generated_ones(name, schema):
    published = (files("composer_replication.planner") / f"{name}_schema.json").read_text()
    assert published == json.dumps(schema, indent=2) + "\n"


@pytest.mark.parametrize("text", ["[]", "{}", '{"phases_s": 3}', "3"])
def test_a_summary_that_is_none_is_told(text, runs, capsys, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "summary.json").write_text(text)
    assert main(["report", "compare", str(broken), str(broken)]) == 2
    assert "is no summary of a run" in capsys.readouterr().err


def test_a_piped_report_cuts_none_of_its_figures(tmp_path, capsys):
    name = "a_run_with_a_name_that_leaves_no_room_for_anything_else_in_a_hundred_columns"
    ended(tmp_path / name, median_step_s=2.5, peak_tensor_gib=4.0, total_s=80.0)
    assert main(["report", "planner", str(tmp_path)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(name)]
    for cell in ("2 / 2.5 (-20%)", "5 / 4 (+25%)", "100 / 80 (+25%)", "yes"):
        assert cell in row
