"""The examples run as their docstrings say."""

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest

from composer_replication.experiments.evidence import run_config
from composer_replication.experiments.evidence_arms import SETTINGS, EvidenceRun
from composer_replication.experiments.run_data import load_run_data
from composer_replication.experiments.trainer_setup import composer_config
from composer_replication.runs.run_directory import RunDirectory

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


def test_the_learning_example_says_before_and_after_and_keeps_model_and_curve(
    monkeypatch, capsys, tmp_path, tiny_model_dir
):
    arguments = ["--model", str(tiny_model_dir), "--steps", "1", "--heldout", "8"]
    run(monkeypatch, "learn_api_drift.py", *arguments, "--out", str(tmp_path / "out"))
    out = capsys.readouterr().out
    assert "held-out requests answered right: 0% -> 0%, +0% [" in out
    assert "held-out success 0%" in out
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "curve.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize("arm", ["all", "sdpo", "grpo"])
def test_the_learning_example_has_the_settings_of_the_evidence(tmp_path, arm):
    channels = {"all": ["grpo", "sdpo", "dpo"], "sdpo": ["grpo", "sdpo"], "grpo": ["grpo"]}[arm]
    example = runpy.run_path(str(EXAMPLES / "learn_api_drift.py"))
    shown = dataclasses.asdict(example["trainer_config"](channels, tmp_path, 3, 32))
    file = run_config(EvidenceRun("api_drift", arm, 3), SETTINGS["api_drift"], str(tmp_path))
    with RunDirectory.create(tmp_path / "run", resume=False) as directory:
        run_values = composer_config(file, directory, {}, reference_cache=tmp_path)
    ran = dataclasses.asdict(run_values)
    folders = {name for name in ran if name.endswith("_dir")}
    differ = {name for name in ran.keys() - folders if shown[name] != ran[name]}
    assert differ <= {"disable_tqdm", "guard_heldout_evaluations"}


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
