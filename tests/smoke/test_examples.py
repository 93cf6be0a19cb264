"""The examples run as their docstrings say."""

import runpy
import sys
from pathlib import Path

import pytest

from composer_replication.experiments.run_data import load_run_data

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


def test_the_plain_loop_trains_all_three_channels_without_trl(monkeypatch, capsys, tiny_model_dir):
    run(
        monkeypatch, "plain_loop.py", "--model", str(tiny_model_dir), "--steps", "2", "--lr", "1e-3"
    )
    first, second = capsys.readouterr().out.strip().splitlines()
    assert "dpo +0.6931" in first  # the reference is the policy before its first step
    assert "dpo +0.6931" not in second
    assert all("sdpo +0." in line for line in (first, second))


def test_the_learning_example_says_before_and_after_and_draws_its_curve(
    monkeypatch, capsys, tmp_path, tiny_model_dir
):
    arguments = [
        "--model",
        str(tiny_model_dir),
        "--steps",
        "1",
        "--curve-every",
        "1",
        "--heldout",
        "8",
    ]
    run(monkeypatch, "learn_api_drift.py", *arguments, "--plot", str(tmp_path / "curve.svg"))
    out = capsys.readouterr().out
    assert "answered right at the first try: 0 of 8 -> 0 of 8" in out
    assert "tools that none shows   0 of 4 -> 0 of 4" in out
    assert (tmp_path / "curve.svg").read_text().lstrip().startswith("<?xml")


def test_the_plain_loop_imports_no_trl_and_stays_short():
    source = (EXAMPLES / "plain_loop.py").read_text()
    assert "import trl" not in source
    assert "from trl" not in source
    assert len(source.splitlines()) <= 220


@pytest.mark.parametrize(
    ("task", "knob"), [("api_drift", "drift_seed=5"), ("call_format", "num_demos=4")]
)
def test_the_data_script_writes_a_folder_that_a_run_takes(monkeypatch, tmp_path, task, knob):
    folder = tmp_path / "data"
    flags = ["--seed", "3", "--set", knob, "--episodes", "9"]
    assert run(monkeypatch, "make_task_data.py", task, str(folder), *flags) == 0
    data = load_run_data(str(folder))
    assert data.task == task
    assert len(data.prompts) == 9
    assert len(data.hint_sites) > 0
    assert len(data.pairs) > 0
    name, _, value = knob.partition("=")
    assert {row[name] for row in data.prompts} == {int(value)}


@pytest.mark.parametrize(
    ("knob", "match"),
    [("seed=3", "no knob 'seed'"), ("split=train", "no knob 'split'"), ("num_demos=x", "must be")],
)
def test_the_data_script_refuses_what_is_no_knob(monkeypatch, tmp_path, capsys, knob, match):
    folder = tmp_path / "data"
    code = run(monkeypatch, "make_task_data.py", "call_format", str(folder), "--set", knob)
    assert code == 2
    assert match in capsys.readouterr().err
    assert not folder.exists()
