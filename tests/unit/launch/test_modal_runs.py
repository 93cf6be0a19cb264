"""`--on modal` against a double of Modal's API that runs the remote body for real."""

import itertools
import json
import subprocess
import sys
import time

import pytest
from fake_modal import random_preemptions
from grpclib import Status
from remote_cli import cli, content_of, ledger_of

from composer_replication.cli import main, modal_calls
from composer_replication.launch.ledger import Ledger
from composer_replication.launch.records import load_records

TRAIN = ["train", "base.toml", "--on", "modal"]
BEFORE_ANY_CALL = {"ClientHello", "EnvironmentGetOrCreate"}


def spans_of(workplace, record):
    """When the volume says each attempt began and ended."""
    folder = workplace / "modal/volumes/composer-replication-runs/.attempts"
    return json.loads((folder / f"{record.job_id}.json").read_text())


def test_a_remote_run_leaves_the_run_directory_of_a_local_one(platform, workplace):
    assert cli("train", "base.toml", "--out", "here").returncode == 0
    done = cli(*TRAIN, "--out", "there", "--yes", platform=platform)
    assert done.returncode == 0, done.stderr
    assert "step 4" in done.stdout  # what the container printed, live
    assert content_of(workplace / "there") == content_of(workplace / "here")
    record, ledger = ledger_of(workplace)
    assert (record.status, record.call_id, record.app_id) == ("passed", "fc-1", "ap-1")
    account = ledger.accounts()[record.job_id]
    assert account.reserved_usd == 0.0
    assert account.usd == record.cost_usd
    assert 0 < record.cost_usd < record.worst_usd
    # The container is held before its body begins.
    ((start_s, _),) = spans_of(workplace, record)
    assert start_s < (workplace / "modal/containers/fc-1-1/started").stat().st_mtime
    assert json.loads((workplace / "there/summary.json").read_text())["cost_usd"] == (
        record.cost_usd
    )


def test_a_run_that_came_home_names_the_paths_of_this_machine_and_resumes_here(platform, workplace):
    folder = workplace / "some data"
    folder.mkdir()
    (folder / "prompts.jsonl").write_text("{}\n")
    options = ["--set", f'data="{folder}"']
    assert cli("train", "base.toml", *options, "--out", "here").returncode == 0
    assert cli(*TRAIN, *options, "--out", "there", "--yes", platform=platform).returncode == 0
    texts = [(workplace / name / "config.toml").read_text() for name in ("here", "there")]
    assert texts[0] == texts[1]
    assert str(folder) in texts[1]
    again = cli("train", "base.toml", *options, "--out", "there", "--resume")
    assert again.returncode == 0, again.stderr


def test_the_created_function_is_the_one_that_a_dry_run_prints(platform, workplace):
    options = ["--gpu", "H100!:2", "--hub-secret", "hub", "--set", "modal.retries=2"]
    asked = cli(*TRAIN, *options, "--dry-run", "--json")
    assert asked.returncode == 0, asked.stderr
    planned = json.loads(asked.stdout)
    assert set(planned) == {"schema", "function", "plan", "worst_usd"}
    assert cli(*TRAIN, *options, "--yes", "--detach", platform=platform).returncode == 0
    made, function = platform.definition(), planned["function"]
    resources = made.resources
    gpu = f"{resources.gpu_config.gpu_type}:{resources.gpu_config.count}"
    assert function["gpu"] == "H100!:2" == gpu
    assert resources.milli_cpu == function["cpu"] * 1000
    assert resources.memory_mb == function["memory_mib"]
    assert made.timeout_secs == function["timeout_s"]
    assert made.retry_policy.retries == function["retries"] == 2
    mounted = {m.mount_path: m.volume_id.removeprefix("vo-") for m in made.volume_mounts}
    assert mounted == function["volumes"]
    assert list(made.secret_ids) == ["st-hub"]
    assert function["secrets"] == ["hub"]
    assert made.single_use_containers
    assert not made.scheduler_placement.regions
    assert not made.scheduler_placement.nonpreemptible
    versions = [request.version for name, request in platform.calls if name == "VolumeGetOrCreate"]
    assert set(versions[:2]) == {2}
    tags = dict(function["tags"])
    assert platform.tags["run_id"].startswith("base-")
    assert {**platform.tags, "run_id": ""} == {**tags, "run_id": ""}
    lines = "\n".join(
        line for image in platform.images.values() for line in image.dockerfile_commands
    )
    assert all(package in lines for package in function["image"]["packages"])
    for unwanted in ("flash-attn", "bitsandbytes", "xformers", "unsloth"):
        assert unwanted not in lines
    data = [name for mount in platform.mounts.values() for name in mount]
    assert any(name.endswith("planner/modal_prices.json") for name in data)


def test_a_measured_run_gets_the_h100_that_was_asked_for_and_no_h200(workplace, capsys):
    for verb, asked, card in (
        ("smoke", "H100", "H100!"),
        ("train", "H100", "H100"),
        ("train", "H100!:2", "H100!:2"),
        # At the price of a B200, a B300 where there is one.
        ("train", "B200+", "B200+"),
        ("train", "B200", "B200"),
    ):
        assert (
            main([verb, "base.toml", "--on", "modal", "--gpu", asked, "--dry-run", "--json"]) == 0
        )
        assert json.loads(capsys.readouterr().out)["function"]["gpu"] == card


def test_a_preempted_run_ends_as_one_that_was_not_and_no_dollar_counts_twice(
    platform, workplace, monkeypatch
):
    assert cli("train", "base.toml", "--out", "here").returncode == 0
    platform.environment["STAND_IN_STEP_S"] = "0.4"
    platform.preemptions = random_preemptions(5, num_kills=3, most_rows=2, step_s=0.4)
    done = cli(*TRAIN, "--out", "there", "--yes", platform=platform)
    assert done.returncode == 0, done.stderr
    assert platform.inputs["fc-1"].num_containers == 4
    assert content_of(workplace / "there") == content_of(workplace / "here")
    record, ledger = ledger_of(workplace)
    held_s = record.cost_usd / record.usd_per_hour * 3600
    # What an attempt did after its last commit counts, too; one that died before its first one,
    # and so lived the shortest, left nothing to count it by.
    spans = spans_of(workplace, record)
    assert held_s >= sum(sorted(platform.inputs["fc-1"].billed_s)[4 - len(spans) :])
    assert all(end > start for (_, end), (start, _) in itertools.pairwise(spans))
    assert ledger.total_usd() == record.cost_usd
    # The bill in place of the estimate and not beside it; a low one when its hour is over.
    least_usd, estimate_usd = 1e-9, record.cost_usd
    for billed_usd, is_hour_over, usd in [
        (0.25, False, 0.25),
        (least_usd, False, estimate_usd),
        (least_usd, True, least_usd),
    ]:
        monkeypatch.setattr(modal_calls, "_is_hour_over", lambda _, is_over=is_hour_over: is_over)
        platform.bill = {record.job_id: billed_usd}
        again = cli("runs", "fetch", record.job_id, platform=platform)
        assert again.returncode == 0, again.stderr
        assert ledger.total_usd() == usd


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "Nobody is at a terminal to answer whether to spend, so nothing was sent."),
        (["--json"], "Nobody is at a terminal to answer whether to spend, so nothing was sent."),
        (["--yes", "--budget", "0.01"], "0.01"),
        (["--yes", "--budget", "-1"], "a cap of 0 or less forbids every run"),
        (["--yes", "--gpu", "Z9"], "There is no GPU 'Z9'"),
        (["--yes", "--gpu", "T4", "--set", "grpo.bf16=true"], "T4 has no bf16"),
    ],
)
def test_what_may_not_be_spent_is_refused_and_nothing_is_sent(platform, workplace, options, text):
    done = cli(*TRAIN, *options, platform=platform)
    assert done.returncode == 2, done.stderr
    assert text in done.stderr
    assert platform.calls == []
    assert not (workplace / "runs").exists()


def test_a_dry_run_needs_neither_modal_nor_credentials_nor_a_network(workplace):
    code = (
        "import sys; sys.modules['modal'] = None; from composer_replication.cli import main; "
        "sys.exit(main(['train', 'base.toml', '--on', 'modal', '--dry-run', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["where"] == "modal"
    assert not (workplace / "runs").exists()


def test_without_credentials_the_remedy_is_named_and_nothing_is_set_aside(workplace):
    done = cli(*TRAIN, "--yes")
    assert done.returncode == 2
    assert "There are no Modal credentials on this machine. Run `modal setup`" in done.stderr
    assert not (workplace / "runs").exists()


def test_an_unreachable_modal_is_said_at_once_and_frees_what_was_set_aside(workplace):
    closed = {
        "MODAL_SERVER_URL": "http://127.0.0.1:9",
        "MODAL_TOKEN_ID": "ak-x",
        "MODAL_TOKEN_SECRET": "as-x",
    }
    done = cli(*TRAIN, "--yes", **closed)
    assert done.returncode == 1
    assert "Modal cannot be reached (127.0.0.1:9" in done.stderr
    record, ledger = ledger_of(workplace)
    assert (record.status, ledger.total_usd()) == ("failed", 0.0)


@pytest.mark.parametrize(
    ("status", "said", "text"),
    [
        (Status.RESOURCE_EXHAUSTED, "workspace spend limit reached", "Modal refused to run it"),
        (Status.INVALID_ARGUMENT, "unknown gpu type", "Modal does not know that GPU"),
    ],
)
def test_a_refusal_by_modal_is_explained_and_frees_what_was_set_aside(
    platform, workplace, status, said, text
):
    platform.refusal = ("FunctionCreate", status, said)
    done = cli(*TRAIN, "--yes", platform=platform)
    assert done.returncode in (1, 2)
    assert text in done.stderr
    assert ledger_of(workplace)[1].total_usd() == 0.0


def test_a_detached_run_is_listed_followed_and_fetched_by_its_id(platform, workplace):
    started = cli(*TRAIN, "--out", "there", "--yes", "--detach", platform=platform)
    assert started.returncode == 0, started.stderr
    (record,) = load_records(workplace / "runs")
    assert (record.status, record.worst_usd > 0) == ("running", True)
    logs = cli("runs", "logs", record.job_id, platform=platform)
    assert "passed  4 steps" in logs.stdout, logs.stderr
    fetched = cli("runs", "fetch", record.job_id, platform=platform)
    assert fetched.returncode == 0, fetched.stderr
    assert json.loads((workplace / "there/summary.json").read_text())["status"] == "passed"
    listed = json.loads(cli("runs", "list", "--json").stdout)["runs"]
    assert [(row["job_id"], row["status"]) for row in listed] == [(record.job_id, "passed")]


def test_a_cancelled_run_resumes_from_what_it_committed(platform, workplace):
    platform.environment["STAND_IN_HANG_AT"] = "3"
    cli(*TRAIN, "--out", "there", "--yes", "--detach", platform=platform)
    (record,) = load_records(workplace / "runs")
    volume = workplace / "modal/volumes/composer-replication-runs" / record.job_id
    end = time.monotonic() + 120
    while not (volume / "checkpoints/checkpoint-2/complete.json").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    cancelled = cli("runs", "cancel", record.job_id, platform=platform)
    assert cancelled.returncode == 0, cancelled.stderr
    assert ledger_of(workplace)[1].accounts()[record.job_id].reserved_usd == 0.0
    del platform.environment["STAND_IN_HANG_AT"]
    resumed = cli("runs", "resume", record.job_id, "--yes", platform=platform)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step 2" in resumed.stdout
    assert cli("train", "base.toml", "--out", "here").returncode == 0
    assert content_of(workplace / "there") == content_of(workplace / "here")


def test_a_remote_failure_is_a_failure_here_with_its_reason(platform, workplace):
    platform.environment["STAND_IN_FAIL"] = '{"base": 9}'
    done = cli(*TRAIN, "--out", "there", "--yes", "--json", platform=platform)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"].startswith("told to fail 9 times")
    assert platform.inputs["fc-1"].num_containers == 1  # a second attempt would fail alike


@pytest.mark.parametrize("action", ["logs", "cancel", "fetch", "resume"])
def test_an_id_that_nobody_launched_is_the_users_input(workplace, action):
    done = cli("runs", action, "nothing")
    assert done.returncode == 2
    assert "No launched job has the id 'nothing'" in done.stderr


def test_a_sweep_runs_its_members_side_by_side_under_one_cap(platform, workplace):
    sweep = ["sweep", "base.toml", "--grid", "alpha_sdpo=0,0.2", "--out", "s", "--on", "modal"]
    refused = cli(*sweep, "--yes", "--budget", "0.01", platform=platform)
    assert refused.returncode == 2
    assert platform.calls == []
    done = cli(*sweep, "--yes", "--budget", "50", platform=platform)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 members passed" in done.stdout
    assert "2 at a time" in done.stdout
    assert platform.definition().autoscaler_settings.max_containers == 2
    accounts = Ledger(workplace / "s/ledger.json").accounts()
    assert len(accounts) == 2
    assert all(account.reserved_usd == 0 < account.usd for account in accounts.values())
    report = json.loads((workplace / "s/sweep.json").read_text())
    assert report["cost_usd"] == pytest.approx(sum(a.usd for a in accounts.values()), abs=1e-12)
