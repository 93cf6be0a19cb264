"""The command line around a run: its answer, its files and its exit code, whatever happens.

The experiments are stand-ins here, since what they compute is tested where it is written.
"""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from composer_replication.allocator_settings import ALLOCATOR_SETTINGS
from composer_replication.cli import main
from composer_replication.config.loading import load_config
from composer_replication.errors import ModelError, TrainingError
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.runs.summary import Check, Summary


@pytest.fixture
def experiments(monkeypatch, tmp_path):
    """Stand-ins for the verbs' modules, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    calls = types.SimpleNamespace(seen=[], outcome=Summary(status="passed", steps=1))

    def run_smoke(config, run, console):
        return finish("smoke", config, run, console, None)

    def run_train(config, run, console, resume):
        return finish("train", config, run, console, resume)

    def finish(verb, config, run, console, resume):
        print("chatter of a library")
        console.print("the answer")
        calls.seen.append((verb, config, run.path, resume))
        if isinstance(calls.outcome, BaseException):
            raise calls.outcome
        run.append_metrics({"step": 1})
        run.write_summary(calls.outcome)
        return calls.outcome

    for name, function in (("smoke", run_smoke), ("train", run_train)):
        module = types.ModuleType(f"composer_replication.experiments.{name}")
        setattr(module, f"run_{name}", function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def written_summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_smoke_needs_no_configuration_and_keeps_the_one_it_used(experiments, tmp_path, capsys):
    assert main(["smoke", "--model", "org/m", "--steps", "3", "--fixed-shapes", "2, 1024"]) == 0
    ((verb, config, folder, _),) = experiments.seen
    assert (verb, config.model, config.smoke.steps) == ("smoke", "org/m", 3)
    assert config.smoke.fixed_shapes == (2, 1024)
    assert folder.resolve() == tmp_path / "runs" / "run"
    assert load_config(folder / "config.toml", []) == config
    assert "the answer" in capsys.readouterr().out


def test_options_win_over_set_and_set_over_the_file(experiments, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('model = "file"\nseed = 1\nalpha_sdpo = 1\n')
    data = 'a "quoted" = folder'
    options = ["--model", "option", "--data", data, "--set", "model=set", "--set", "seed=2"]
    assert main(["smoke", str(path), *options]) == 0
    config = experiments.seen[0][1]
    assert (config.model, config.data, config.seed, config.alpha_sdpo) == ("option", data, 2, 1.0)


def test_json_prints_one_object_on_stdout_and_everything_else_on_stderr(experiments, capsys):
    assert main(["smoke", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out == experiments.outcome.to_json() + "\n"
    assert "chatter of a library" in captured.err
    assert "the answer" in captured.err


def test_a_failed_check_is_exit_code_1(experiments):
    experiments.outcome = Summary(status="failed", checks=[Check("finite_loss", False)])
    assert main(["smoke"]) == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_a_step_that_cannot_train_is_recorded_as_failed(experiments, tmp_path, capsys, as_json):
    experiments.outcome = TrainingError("loss is nan at step 3. Lower grpo.learning_rate.")
    arguments = ["train", "c.toml", "--out", "out", *(["--json"] if as_json else [])]
    (tmp_path / "c.toml").write_text('model = "org/m"\n')
    assert main(arguments) == 1
    captured = capsys.readouterr()
    text = (
        "loss is nan at step 3. Lower grpo.learning_rate. "
        f"The traceback is in {Path('out/error.txt')}."
    )
    assert captured.err.splitlines()[-1] == f"error: {text}"
    summary = written_summary(tmp_path / "out")
    assert (summary["status"], summary["error"], summary["model"]) == ("failed", text, "org/m")
    assert summary["total_s"] > 0
    assert summary["steps"] is None
    assert "TrainingError" in (tmp_path / "out" / "error.txt").read_text()
    if as_json:
        assert json.loads(captured.out) == summary


def test_bad_input_found_while_running_is_exit_code_2_without_a_traceback(
    experiments, tmp_path, capsys
):
    experiments.outcome = ModelError("model is 'x', which does not exist. Check the name.")
    assert main(["smoke", "--out", "out"]) == 2
    assert "error: model is 'x', which does not exist. Check the name.\n" in capsys.readouterr().err
    assert written_summary(tmp_path / "out")["status"] == "failed"
    assert not (tmp_path / "out" / "error.txt").exists()


def test_an_unexpected_error_leaves_its_traceback_in_the_run_directory(
    experiments, tmp_path, capsys
):
    experiments.outcome = KeyError("weights")
    assert main(["smoke", "--out", "out"]) == 1
    stderr = capsys.readouterr().err
    assert stderr == (
        "error: unexpected KeyError: 'weights'. It came from a library below, or is a bug of this "
        f"one: please report that. The traceback is in {Path('out/error.txt')}.\n"
    )
    assert "Traceback" in (tmp_path / "out" / "error.txt").read_text()


def test_ctrl_c_is_recorded_as_stopped(experiments, tmp_path, capsys):
    experiments.outcome = KeyboardInterrupt()
    assert main(["smoke", "--out", "out"]) == 130
    assert written_summary(tmp_path / "out")["status"] == "stopped"
    assert capsys.readouterr().err == "stopped: Ctrl-C. out keeps what was done.\n"


def test_a_taken_default_folder_gets_a_number_and_a_taken_out_is_an_error(
    experiments, tmp_path, capsys
):
    assert [main(["smoke"]), main(["smoke"])] == [0, 0]
    assert [path.name for _, _, path, _ in experiments.seen] == ["run", "run-2"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["run", "run-2"]
    assert main(["smoke", "--out", "runs/run"]) == 2
    assert "runs/run already holds a run." in capsys.readouterr().err


def test_resume_reaches_training_and_the_latest_folder(experiments, tmp_path):
    (tmp_path / "c.toml").write_text('name = "t"\n')
    for _ in range(2):
        assert main(["train", "c.toml"]) == 0
    assert main(["train", "c.toml", "--resume", "--set", "grpo.max_steps=9"]) == 0
    assert [(path.name, resume) for _, _, path, resume in experiments.seen] == [
        ("t", False),
        ("t-2", False),
        ("t-2", True),
    ]


def test_resume_under_another_configuration_is_refused(experiments, capsys):
    assert main(["smoke", "--out", "out"]) == 0
    assert main(["smoke", "--out", "out", "--resume", "--set", "seed=1"]) == 2
    assert capsys.readouterr().err == (
        "error: out was started with other values of seed. A run that changes on the way cannot be "
        f"reproduced. Resume with {Path('out/config.toml')}, or start a new run with "
        "another --out.\n"
    )
    assert len(experiments.seen) == 1


def test_a_resumed_smoke_starts_its_metrics_anew_and_drops_the_old_error(experiments, tmp_path):
    experiments.outcome = KeyError("x")
    assert main(["smoke", "--out", "out"]) == 1
    experiments.outcome = Summary(status="passed")
    for _ in range(2):
        assert main(["smoke", "--out", "out", "--resume"]) == 0
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not (tmp_path / "out" / "error.txt").exists()


def test_the_lock_is_free_after_every_ending(experiments, tmp_path):
    for number, outcome in enumerate((TrainingError("x"), KeyboardInterrupt(), ModelError("y"))):
        experiments.outcome = outcome
        assert main(["smoke", "--out", f"out-{number}"]) != 0
        RunDirectory.create(tmp_path / f"out-{number}", resume=True).close()


MISTAKES = {
    "no_verb": (
        [],
        "no verb was given. Known: doctor, evaluate, plan, report, runs, smoke, sweep, train. "
        "See 'composer-replication --help'.",
    ),
    "misspelt_verb": (
        ["smok"],
        "unknown verb 'smok'. Did you mean 'smoke'? See 'composer-replication --help'.",
    ),
    "misspelt_option": (
        ["smoke", "--stesp", "3"],
        "smoke does not take '--stesp'. Did you mean '--steps'? "
        "See 'composer-replication smoke --help'.",
    ),
    "option_without_value": (
        ["smoke", "--out"],
        "argument --out: expected one argument. See 'composer-replication smoke --help'.",
    ),
    "train_without_configuration": (
        ["train"],
        "the following arguments are required: CONFIG.toml. "
        "See 'composer-replication train --help'.",
    ),
    "shapes_without_comma": (
        ["smoke", "--fixed-shapes", "2x1024"],
        "--fixed-shapes is '2x1024'; it must be two whole numbers, B rows and T tokens, with a "
        "comma between. Write for example --fixed-shapes 2,1024.",
    ),
    "no_steps": (
        ["smoke", "--steps", "0"],
        "--steps is '0'; it counts optimizer steps and must be a whole number of at least 1. "
        "Write for example --steps 50.",
    ),
    "absent_file": (
        ["train", "absent.toml"],
        "absent.toml does not exist, so there is no configuration to read. "
        "Check the path; configs/ holds examples.",
    ),
    "bad_value": (
        ["smoke", "--set", "sdpo.tail=true"],
        "configuration: sdpo.tail is true and sdpo.top_k is not set. The whole vocabulary is "
        "compared then and leaves no tail. Set sdpo.top_k, or leave sdpo.tail out.",
    ),
}


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(("arguments", "text"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_exit_code_2_and_starts_nothing(
    experiments, tmp_path, capsys, arguments, text, as_json
):
    extra = ["--json"] if as_json and arguments else []
    before = sorted(tmp_path.iterdir())
    assert main([*arguments[:1], *extra, *arguments[1:]]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {text}\n"
    assert experiments.seen == []
    assert sorted(tmp_path.iterdir()) == before
    if extra:
        assert json.loads(captured.out)["error"] == text


@pytest.mark.parametrize(("is_ok", "code"), [(True, 0), (False, 1)])
def test_doctor_answers_in_its_exit_code_and_writes_nothing(
    monkeypatch, tmp_path, capsys, is_ok, code
):
    module = types.ModuleType("composer_replication.experiments.doctor")
    module.run_doctor = lambda: [is_ok]
    module.render_doctor = lambda lines, console: console.print(f"lines: {lines}")
    module.doctor_summary = lambda lines: {"schema": 1, "checks": lines, "is_ok": is_ok}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == code
    assert capsys.readouterr().out == f"lines: [{is_ok}]\n"
    assert main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["checks"] == [is_ok]
    assert list(tmp_path.iterdir()) == []


REEXECUTED = """
import json, os, sys, types
module = types.ModuleType("composer_replication.experiments.smoke")
def run_smoke(config, run, console):
    from composer_replication.runs.summary import Summary
    ours = ("MALLOC_", "OMP_WAIT", "GOMP_", "COMPOSER_", "TOKENIZERS")
    names = [name for name in os.environ if name.startswith(ours)]
    seen = {name: os.environ[name] for name in names}
    return Summary(status="passed", notes=[json.dumps(seen), str(os.getpid()), *sys.argv[1:]])
module.run_smoke = run_smoke
sys.modules[module.__name__] = module
print("start", file=sys.stderr)
from composer_replication.cli import main
sys.exit(main())
"""


def run_reexecuted(tmp_path, **environment):
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "OMP_WAIT", "GOMP_"))
    }
    kept.pop("COMPOSER_REEXECUTED", None)
    kept.pop("TOKENIZERS_PARALLELISM", None)
    with subprocess.Popen(
        [sys.executable, "-c", REEXECUTED, "smoke", "--json", "--set", "model=a b"],
        cwd=tmp_path,
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    settings, pid, *arguments = json.loads(stdout)["notes"]
    assert int(pid) == process.pid
    assert arguments == ["smoke", "--json", "--set", "model=a b"]
    return json.loads(settings), stderr.count("start")


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_the_process_restarts_once_with_the_allocator_settings(tmp_path):
    settings, num_starts = run_reexecuted(tmp_path)
    assert num_starts == 2
    assert settings == {
        **ALLOCATOR_SETTINGS,
        "COMPOSER_REEXECUTED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_settings_of_the_user_are_kept(tmp_path):
    settings, num_starts = run_reexecuted(tmp_path, MALLOC_TOP_PAD_="1024")
    assert (settings["MALLOC_TOP_PAD_"], settings["MALLOC_MMAP_MAX_"]) == ("1024", "0")
    assert num_starts == 2
    settings, num_starts = run_reexecuted(tmp_path, **ALLOCATOR_SETTINGS)
    assert num_starts == 1
    assert "COMPOSER_REEXECUTED" not in settings


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_a_wait_policy_of_the_user_is_not_overruled_by_a_count(tmp_path):
    settings, num_starts = run_reexecuted(tmp_path, OMP_WAIT_POLICY="ACTIVE")
    assert num_starts == 2
    assert settings["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "GOMP_SPINCOUNT" not in settings


def test_a_process_that_was_restarted_is_not_restarted_again(tmp_path):
    settings, num_starts = run_reexecuted(tmp_path, COMPOSER_REEXECUTED="1")
    assert num_starts == 1
    assert "MALLOC_TOP_PAD_" not in settings
