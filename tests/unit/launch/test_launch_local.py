"""`--on local`: the command line's own processes, with training bodies that are sums."""

import json
import os
import subprocess
import sys
import time

from composer_replication.cli import main
from composer_replication.launch.local import num_local_gpus
from composer_replication.launch.records import load_job, load_records

UNEQUAL = {".lock", ".lock_owner.json"}


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in UNEQUAL
    }


def cli(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "composer_replication", *arguments], capture_output=True, text=True
    )


def test_a_process_of_its_own_leaves_the_same_run_directory(workplace):
    assert cli("train", "base.toml", "--set", "seed=3", "--out", "here").returncode == 0
    assert main(["train", "base.toml", "--set", "seed=3", "--out", "there", "--on", "local"]) == 0
    assert files_of(workplace / "there") == files_of(workplace / "here")
    (record,) = load_records(workplace / "runs")
    assert (record.where, record.status, record.folder) == ("local", "passed", "there")
    assert load_job(workplace / "runs", record.job_id).arguments == ("base.toml", "--set", "seed=3")


def test_json_prints_the_summary_alone(workplace, capfd):
    assert main(["smoke", "base.toml", "--out", "run", "--on", "local", "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer == json.loads((workplace / "run" / "summary.json").read_text())


def test_a_failure_there_is_a_failure_here(workplace, monkeypatch, capfd):
    monkeypatch.setenv("STAND_IN_FAIL", '{"run": 1}')
    assert main(["train", "base.toml", "--out", "run", "--on", "local", "--json"]) == 1
    answer = json.loads(capfd.readouterr().out)
    assert answer["status"] == "failed"
    assert answer["error"].startswith("told to fail")
    assert main(["train", "base.toml", "--out", "run", "--on", "local", "--resume"]) == 0


def test_a_folder_with_results_is_refused_before_a_process_starts(workplace, capsys):
    assert main(["train", "base.toml", "--out", "run", "--on", "local"]) == 0
    before = files_of(workplace / "run")
    assert main(["train", "base.toml", "--out", "run", "--on", "local"]) == 2
    assert "run already holds a run" in capsys.readouterr().err
    assert len(load_records(workplace / "runs")) == 1
    assert files_of(workplace / "run") == before


def test_a_place_that_does_not_exist_is_the_users_input(workplace, capsys):
    assert main(["train", "base.toml", "--on", "mars"]) == 2
    assert capsys.readouterr().err == (
        "error: --on is 'mars', which is no place. Known: local, modal.\n"
    )


def test_cards_are_counted_as_a_run_would_see_them(monkeypatch):
    for visible, count in (("", 0), ("-1", 0), ("2", 1), ("0,3", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert num_local_gpus() == count


def test_the_other_processes_of_a_run_read_its_folder_and_write_nothing(workplace):
    command = [sys.executable, "-m", "composer_replication", "train", "base.toml", "--out", "run"]
    environment = {**os.environ, "STAND_IN_STEP_S": "0.5"}
    first = subprocess.Popen([*command, "--resume"], env={**environment, "RANK": "0"})
    while not (workplace / "run" / "metrics.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.05)
    second = subprocess.run([*command, "--resume"], env={**environment, "RANK": "1"})
    assert (second.returncode, first.wait()) == (0, 0)
    rows = (workplace / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]
