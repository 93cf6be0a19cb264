"""`evaluate` from the command line: what it takes, what it refuses, what it writes."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from composer_replication.cli import main
from composer_replication.config.loading import dump_config
from composer_replication.config.run_config import RunConfig
from composer_replication.experiments.evaluated_model import load_evaluated_model, model_place
from composer_replication.experiments.evaluation_report import EvaluationReport
from composer_replication.experiments.task_registry import write_task
from composer_replication.launch.records import load_records
from composer_replication.planner.calibration import measured_runs
from composer_replication.runs.summary import Summary


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_llama, smollm2_tokenizer):
    """`saved("a", seed)`: the folder of a tiny model."""
    root = tmp_path_factory.mktemp("models")

    def save(name, seed=0):
        folder = root / name
        if not folder.exists():
            tiny_llama(seed=seed).save_pretrained(folder)
            smollm2_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


LOAD = "composer_replication.experiments.evaluation.load_evaluated_model"


def evaluate(*arguments):
    """The exit code; an argument with spaces holds several."""
    return main(["evaluate", *(word for each in arguments for word in str(each).split())])


def run_folder(path, data, model=None):
    path.mkdir(parents=True)
    config = RunConfig(data=str(data), rollout={"max_turns": 1, "max_action_tokens": 5})
    (path / "config.toml").write_text(dump_config(config))
    if model is not None:
        shutil.copytree(model, path / "model")
    return path


def test_a_folder_is_played_by_the_limits_of_the_run_or_by_those_that_were_asked_for(
    saved, capsys, tmp_path
):
    write_task(tmp_path / "data", "call_format", num_episodes={"train": 2, "heldout": 3})
    run = run_folder(tmp_path / "runs/first", tmp_path / "elsewhere", saved("a"))
    report = tmp_path / "runs/evaluate-call_format/evaluation.json"

    def tokens(model, *flags):
        assert evaluate(model, "--data data --samples 1", *flags) == 0
        capsys.readouterr()
        greedy = json.loads(report.read_text())["model"]["greedy"]
        shutil.rmtree(report.parent)
        return greedy["num_tokens"] / greedy["num_actions"]

    assert tokens(run) == 5
    assert tokens(saved("c"), f"--against {run}") == 5
    assert tokens(run, "--action-tokens 9") == 9
    assert tokens(saved("c"), "--action-tokens 7 --turns 1") == 7
    assert tokens(saved("c")) == 48


def test_two_models_on_the_same_prompts(saved, capsys, tmp_path):
    flags = "--task call_format --episodes 3 --samples 2 --out out --json"
    assert evaluate(saved("b", 5), "--against", saved("a"), flags) == 0
    printed = capsys.readouterr()
    report = EvaluationReport.model_validate_json(printed.out)
    assert (report.num_prompts, report.num_samples) == (3, 2)
    assert report.data == "call_format, heldout, seed 0"
    assert report.against is not None
    assert report.against.given == str(saved("a"))
    assert report.model.sampled.num_episodes == 6
    assert report.change is not None
    assert report.change.nats_per_token == pytest.approx(
        report.model.forgetting.nats_per_token - report.against.forgetting.nats_per_token
    )
    assert report.model.forgetting.nats_per_token != report.against.forgetting.nats_per_token
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock",
        "config.toml",
        "episodes_after.jsonl",
        "episodes_before.jsonl",
        "evaluation.json",
        "planned.json",
        "schema.json",
        "summary.json",
    ]
    summary = Summary.model_validate_json((tmp_path / "out/summary.json").read_text())
    assert (summary.status, summary.model) == ("passed", report.model.label)
    played_s = [model.seconds - model.load_seconds for model in (report.model, report.against)]
    assert summary.median_step_s == pytest.approx(sum(played_s) / 2, abs=0.1)
    (measured,) = measured_runs(tmp_path / "out")
    assert (measured.verb, measured.model.split()[0]) == ("evaluate", "llama")
    asked = tomllib.loads((tmp_path / "out/config.toml").read_text())["evaluate"]
    assert (asked["task"], asked["episodes"], asked["seed"]) == ("call_format", 3, 0)
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == json.loads(printed.out)
    lines = (tmp_path / "out/episodes_after.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [0, 1, 2, 0, 0, 1, 1, 2, 2]
    assert "greedy, 3 episodes" in printed.err


def test_a_run_brings_its_own_heldout_data_and_limits(saved, capsys, tmp_path):
    write_task(tmp_path / "data", "call_format", num_episodes={"train": 2, "heldout": 3})
    run = run_folder(tmp_path / "runs/first", tmp_path / "data", saved("a"))
    assert evaluate(run, "--samples", 1) == 0
    first = capsys.readouterr().out
    assert first.startswith("success 0% [0%, 56%]")
    assert "wrote   runs/evaluate-call_format" in first
    assert f"next    composer-replication evaluate {run} --against MODEL_BEFORE" in first
    report = json.loads((tmp_path / "runs/evaluate-call_format/evaluation.json").read_text())
    assert report["data"] == f"{tmp_path / 'data'}, heldout"
    assert report["model"]["greedy"]["num_tokens"] <= 3 * 5
    assert report["model"]["greedy"]["num_cut"] == report["model"]["greedy"]["num_actions"] == 3
    assert "cut off, greedy actions" in first
    # Another one does not overwrite it.
    assert evaluate(run, "--samples", 1, "--split", "train") == 0
    second = json.loads((tmp_path / "runs/evaluate-call_format-2/evaluation.json").read_text())
    assert second["num_prompts"] == 2


SMALL = "--task call_format --episodes 2 --samples 1 --out out"


def test_a_finished_evaluation_is_not_run_again(saved, capsys, monkeypatch):
    assert evaluate(saved("a"), SMALL, "--json") == 0
    first = capsys.readouterr().out
    assert evaluate(saved("a"), SMALL) == 2
    assert "out already holds a run" in capsys.readouterr().err
    monkeypatch.setattr(LOAD, lambda *_: pytest.fail("a model was loaded"))
    assert evaluate(saved("a"), SMALL, "--resume --json") == 0
    assert capsys.readouterr().out == first
    assert evaluate(saved("a"), SMALL.replace("1", "2"), "--resume") == 2
    assert "out was begun with other values of samples (out/config.toml" in capsys.readouterr().err


def test_an_evaluation_that_was_killed_measures_what_is_missing(saved, capsys, monkeypatch):
    flags = f"{SMALL} --against {saved('a')} --json"
    loaded = []

    def load(place, say):
        loaded.append(place)
        if len(loaded) == 2:
            raise KeyboardInterrupt
        return load_evaluated_model(place, say)

    monkeypatch.setattr(LOAD, load)
    assert evaluate(saved("b", 5), flags) == 130
    assert json.loads(capsys.readouterr().out)["status"] == "stopped"
    assert evaluate(saved("b", 5), flags, "--resume") == 0
    resumed = json.loads(capsys.readouterr().out)
    assert loaded == [str(saved("a")), str(saved("b")), str(saved("b"))]
    assert not list(Path("out").glob("figures_*"))
    assert evaluate(saved("b"), flags.replace("--out out", "--out whole")) == 0
    whole = json.loads(capsys.readouterr().out)
    for report in (resumed, whole):
        report["total_s"] = 0
        for model in (report["model"], report["against"]):
            model["seconds"] = model["load_seconds"] = 0
    assert resumed == whole
    for name in ("after", "before"):
        episodes = f"episodes_{name}.jsonl"
        assert Path("out", episodes).read_text() == Path("whole", episodes).read_text()


def test_a_process_of_its_own_finds_the_same(saved, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    assert evaluate(saved("a"), SMALL, "--json") == 0
    here = json.loads(capfd.readouterr().out)
    there = f"{SMALL.replace('--out out', '--out there')} --on local --json"
    assert evaluate(saved("a"), there) == 0
    found = json.loads(capfd.readouterr().out)
    for report in (here, found):
        report["total_s"] = report["model"]["seconds"] = report["model"]["load_seconds"] = 0
    assert found == here
    (record,) = load_records(Path("runs"))
    assert (record.verb, record.where, record.status) == ("evaluate", "local", "passed")
    assert evaluate(saved("a"), there, "--resume") == 0  # finished: no second process
    assert len(load_records(Path("runs"))) == 1


def test_a_run_lends_its_data_to_another_model(saved, capsys, tmp_path):
    write_task(tmp_path / "data", "call_format", num_episodes={"train": 2, "heldout": 3})
    run_folder(tmp_path / "run", tmp_path / "data")
    assert evaluate(saved("a"), "--data run --samples 1 --out out --json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["data"] == f"{tmp_path / 'data'}, heldout"
    assert report["model"]["greedy"]["num_tokens"] <= 3 * 5
    assert evaluate(saved("a"), "--data out") == 2
    assert "out is what an evaluation wrote" in capsys.readouterr().err


def test_pairs_and_the_old_convention_are_measured_where_the_task_has_them(saved, capsys):
    assert evaluate(saved("a"), "--task fix_call --episodes 4 --samples 1 --json") == 0
    fix = json.loads(capsys.readouterr().out)
    assert fix["model"]["pairs"]["num_pairs"] > 0
    assert fix["model"]["forgetting"]["old_convention"] is None
    assert evaluate(saved("a"), "--task api_drift --episodes 2 --samples 1 --json") == 0
    drift = json.loads(capsys.readouterr().out)
    assert drift["model"]["forgetting"]["old_convention"]["num_episodes"] == 2


def test_an_adapter_is_merged_into_the_base_that_it_names(saved, tiny_llama, capsys, tmp_path):
    base = saved("a")
    model = tiny_llama(seed=0)
    model.name_or_path = str(base)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    flags = "--task call_format --episodes 1 --samples 1 --json"
    assert evaluate(tmp_path / "adapter", "--against", base, flags) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["label"] == f"{base} + {tmp_path / 'adapter'}"
    assert report["change"]["nats_per_token"] != 0


def test_an_unfinished_run_is_measured_at_its_newest_checkpoint(saved, tmp_path, monkeypatch):
    run = run_folder(tmp_path / "run", tmp_path)
    notes = []
    checkpoint = run / "checkpoints/checkpoint-8"
    monkeypatch.setattr(
        "composer_replication.experiments.evaluated_model.newest_checkpoint",
        lambda folder, say: checkpoint if folder == checkpoint.parent else None,
    )
    assert model_place(str(run), notes.append) == str(checkpoint)
    assert notes == [f"{run} has no model/ (the run did not finish): checkpoint-8 stands in."]
    assert model_place("smollm2-135m", notes.append) == "smollm2-135m"


REFUSALS = {
    "no model": ([], "MODEL"),
    "nothing to play": (["smollm2-135m"], "--task names a shipped task"),
    "unknown task": (["smollm2-135m", "--task", "api_drfit"], "'api_drift'"),
    "unknown knob": (["smollm2-135m", "--task", "call_format", "--set", "demos=1"], "num_demos"),
    "split as a knob": (["m", "--task", "call_format", "--set", "split=train"], "knob 'split'"),
    "bad knob": (["smollm2-135m", "--task", "call_format", "--set", "demos"], "KEY=VALUE"),
    "bad split": (["smollm2-135m", "--task", "call_format", "--split", "test"], "split 'test'"),
    "two sources": (["smollm2-135m", "--task", "call_format", "--data", "d"], "Drop one"),
    "no folder": (["smollm2-135m", "--data", "nowhere"], "nowhere does not exist"),
    "episodes of a folder": (["m", "--data", ".", "--episodes", "3"], "no --task was given"),
    "no episodes": (["m", "--task", "call_format", "--episodes", "0"], "--episodes is '0'"),
    "too many": (["m", "--task", "call_format", "--episodes", "1001"], "1 to 1000"),
    "temperature": (["m", "--task", "call_format", "--temperature", "0"], "above 0"),
    "not a temperature": (["m", "--task", "call_format", "--temperature", "nan"], "above 0"),
    "modal here": (
        ["m", "--task", "call_format", "--set", "modal.retries=2"],
        "no knob 'modal.retries'",
    ),
    "dry run here": (["m", "--task", "call_format", "--dry-run"], "--on modal is not given"),
    "seed": (["m", "--task", "call_format", "--seed", "-1"], "--seed is '-1'"),
    "unknown model": (["smolm2-135m", "--task", "call_format"], "smollm2-135m"),
    "unknown model before": (
        ["smollm2-135m", "--task", "call_format", "--against", "nobody/nothing"],
        "nobody/nothing",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_work_is_refused_before_a_model_loads(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(LOAD, lambda *_: pytest.fail("a model was loaded"))
    arguments, text = REFUSALS[name]
    assert evaluate(*arguments) == 2
    printed = capsys.readouterr()
    assert text in printed.err
    assert printed.out == ""
    # Nothing is left behind.
    assert not list(tmp_path.rglob("*evaluat*"))


def test_a_folder_with_files_is_not_written_into(saved, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    assert evaluate(saved("a"), "--task", "call_format", "--out", "out") == 2
    assert "out is not empty and is not a run directory" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["notes.txt"]


def test_data_without_a_heldout_split_is_refused(capsys, tmp_path):
    write_task(tmp_path / "data", "call_format", num_episodes={"train": 2, "heldout": 1})
    shutil.rmtree(tmp_path / "data/heldout")
    assert evaluate("smollm2-135m", "--data", "data") == 2
    assert "has no heldout/ folder" in capsys.readouterr().err
    run = run_folder(tmp_path / "run", tmp_path / "data")
    (run / "checkpoints").mkdir()
    assert evaluate(run, "--split", "train") == 2
    assert "saved no model and no checkpoint" in capsys.readouterr().err


def test_a_run_whose_reward_function_cannot_be_called_is_refused(capsys, tmp_path):
    write_task(tmp_path / "data", "call_format", num_episodes={"train": 2, "heldout": 1})
    run = tmp_path / "run"
    run.mkdir()
    config = RunConfig(data=str(tmp_path / "data"), rollout={"reward": "json:dumps"})
    (run / "config.toml").write_text(dump_config(config))
    assert evaluate(run) == 2
    assert "which cannot be called" in " ".join(capsys.readouterr().err.split())
