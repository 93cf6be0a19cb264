"""The examples run as their docstrings say."""

import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_plain_loop_trains_all_three_channels_without_trl(monkeypatch, capsys, tiny_model_dir):
    run(
        monkeypatch, "plain_loop.py", "--model", str(tiny_model_dir), "--steps", "2", "--lr", "1e-3"
    )
    first, second = capsys.readouterr().out.strip().splitlines()
    assert "dpo +0.6931" in first  # the reference is the policy before its first step
    assert "dpo +0.6931" not in second
    assert all("sdpo +0." in line for line in (first, second))


def test_the_plain_loop_imports_no_trl_and_stays_short():
    source = (EXAMPLES / "plain_loop.py").read_text()
    assert "import trl" not in source
    assert "from trl" not in source
    assert len(source.splitlines()) <= 220


def test_the_data_script_writes_a_folder_that_a_run_takes(monkeypatch, capsys, tmp_path):
    from composer_replication.experiments.run_data import load_run_data

    run(
        monkeypatch, "make_api_drift_data.py", str(tmp_path / "data"), "--seed", "3", "--drift", "5"
    )
    data = load_run_data(str(tmp_path / "data"))
    assert data.task == "api_drift"
    assert len(data.prompts) > 0
    assert len(data.hint_sites) > 0
    assert len(data.pairs) > 0
