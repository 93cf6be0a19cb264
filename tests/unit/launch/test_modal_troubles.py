"""What goes wrong around a remote run: networks, killed launchers, folders in use, caps reached."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from grpclib import Status
from modal._serialization import deserialize_data_format
from remote_cli import cli, ledger_of

from composer_replication.cli.modal_calls import note_sending, settle_without_result
from composer_replication.launch.job import new_job_id
from composer_replication.launch.ledger import Ledger
from composer_replication.launch.records import LaunchRecord, load_records

TRAIN = ["train", "base.toml", "--on", "modal", "--out", "there", "--yes"]
SWEEP = ["sweep", "base.toml", "--out", "s", "--on", "modal", "--yes"]
UNANSWERED = 12
"""The client itself asks four times."""


def await_end(platform, call_id="fc-1"):
    end = time.monotonic() + 120
    while platform.inputs[call_id].result is None:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_network_that_is_away_for_a_while_ends_nothing(platform, workplace):
    platform.outage["FunctionGetOutputs"] = UNANSWERED
    done = cli(*TRAIN, platform=platform)
    assert done.returncode == 0, done.stderr
    assert platform.outage["FunctionGetOutputs"] == 0
    record, ledger = ledger_of(workplace)
    assert (record.status, len(platform.inputs)) == ("passed", 1)
    assert ledger.total_usd() == record.cost_usd


def test_what_nobody_can_ask_about_stays_set_aside(platform, workplace):
    assert cli(*TRAIN, "--detach", platform=platform).returncode == 0
    await_end(platform)
    platform.outage["FunctionGetOutputs"] = 10**6
    (record,) = load_records(workplace / "runs")
    fetched = cli("runs", "fetch", record.job_id, platform=platform)
    assert fetched.returncode == 1
    assert "may go on, so what it may cost stays set aside" in fetched.stderr
    record, ledger = ledger_of(workplace)
    assert (record.status, ledger.total_usd()) == ("running", record.worst_usd)
    for action in ("fetch", "cancel"):
        unknown = cli("runs", action, record.job_id)  # without credentials
        assert (unknown.returncode, "no Modal credentials" in unknown.stderr) == (2, True)
        record, ledger = ledger_of(workplace)
        assert (record.status, ledger.total_usd()) == ("running", record.worst_usd)
    platform.outage.clear()
    platform.refusal = ("FunctionGetOutputs", Status.UNAUTHENTICATED, "the token was withdrawn")
    refused = cli("runs", "fetch", record.job_id, platform=platform)
    assert (refused.returncode, "does not accept the credentials" in refused.stderr) == (2, True)
    record, ledger = ledger_of(workplace)
    assert (record.status, ledger.total_usd()) == ("running", record.worst_usd)
    platform.refusal = None
    assert cli("runs", "fetch", record.job_id, platform=platform).returncode == 0
    assert ledger_of(workplace)[0].status == "passed"


def test_a_detached_run_that_ended_without_a_result_is_settled_and_goes_on(platform, workplace):
    platform.environment |= {"STAND_IN_HANG_AT": "3", "STAND_IN_DEAF": "1"}
    platform.times_out_hanging = True
    options = ["--set", "modal.timeout_s=600", "--set", "modal.retries=0"]
    assert cli(*TRAIN, "--detach", *options, platform=platform).returncode == 0
    await_end(platform)
    (record,) = load_records(workplace / "runs")
    fetched = cli("runs", "fetch", record.job_id, platform=platform)
    assert fetched.returncode == 1
    assert "was ended at its time-out" in fetched.stderr
    record, ledger = ledger_of(workplace)
    assert (record.status, ledger.accounts()[record.job_id].reserved_usd) == ("failed", 0.0)
    spent_usd = ledger.total_usd()
    assert (workplace / "there/checkpoints/checkpoint-2/complete.json").is_file()
    assert cli("runs", "fetch", record.job_id, platform=platform).returncode == 0
    assert ledger.total_usd() == spent_usd  # asked again, it has cost no more
    del platform.environment["STAND_IN_HANG_AT"]
    longer = ["--yes", "--set", "modal.timeout_s=1800"]
    resumed = cli("runs", "resume", record.job_id, *longer, platform=platform)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step 2" in resumed.stdout


def test_the_cap_of_a_job_can_be_raised_where_it_goes_on(platform, workplace):
    worst_usd = json.loads(cli(*TRAIN[:-1], "--dry-run", "--json").stdout)["worst_usd"]
    platform.environment["STAND_IN_FAIL"] = '{"base": 1}'
    cap = f"{worst_usd + 1e-4:.6f}"
    assert cli(*TRAIN, "--budget", cap, platform=platform).returncode == 1
    (record,) = load_records(workplace / "runs")
    Ledger(workplace / record.ledger).settle(record.job_id, "all", worst_usd / 2)
    resume = ["runs", "resume", record.job_id, "--yes"]
    refused = cli(*resume, platform=platform)
    assert (refused.returncode, "Raise --budget" in refused.stderr) == (2, True)
    assert len(platform.inputs) == 1
    assert cli(*resume, "--budget", "0", platform=platform).returncode == 2
    (workplace / "there/error.txt").write_text("of the first attempt")
    resumed = cli(*resume, "--budget", "50", platform=platform)
    assert resumed.returncode == 0, resumed.stderr
    assert ledger_of(workplace)[0].budget_usd == 50
    assert not (workplace / "there/error.txt").exists()


def test_a_folder_that_a_run_comes_home_to_is_in_nobodys_way(platform, workplace):
    platform.environment["STAND_IN_HANG_AT"] = "3"
    assert cli(*TRAIN, "--detach", platform=platform).returncode == 0
    (record,) = load_records(workplace / "runs")
    resumes = f"`composer-replication runs resume {record.job_id}`"
    for command, text in [
        (TRAIN, "Two runs in one folder would mix"),
        (["train", "base.toml", "--out", "there"], "Two runs in one folder would mix"),
        ([*TRAIN, "--resume"], resumes),
    ]:
        refused = cli(*command, platform=platform)
        assert (refused.returncode, text in refused.stderr) == (2, True), refused.stderr
    assert len(platform.inputs) == 1


def test_a_run_that_began_here_is_not_paid_for_again_there(workplace):
    assert cli("train", "base.toml", "--out", "there").returncode == 0
    refused = cli(*TRAIN, "--resume")
    assert refused.returncode == 2
    assert "holds a run of this machine" in refused.stderr


def test_cancelling_what_has_ended_brings_it_home(platform, workplace):
    assert cli(*TRAIN, "--detach", platform=platform).returncode == 0
    await_end(platform)
    (record,) = load_records(workplace / "runs")
    cancelled = cli("runs", "cancel", record.job_id, platform=platform)
    assert cancelled.returncode == 0, cancelled.stderr
    assert "had ended before" in cancelled.stdout
    record, ledger = ledger_of(workplace)
    assert (record.status, ledger.total_usd()) == ("passed", record.cost_usd)


def test_what_a_killed_launcher_had_begun_to_start_is_ended(platform, workplace):
    platform.environment["STAND_IN_HANG_AT"] = "1"
    assert cli(*TRAIN, "--detach", platform=platform).returncode == 0
    (record,) = load_records(workplace / "runs")
    path = workplace / "runs/.jobs" / f"{record.job_id}.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"call_id": None, "status": "launching"})
    )
    (workplace / "runs/.jobs/of-another-version.json").write_text("{}")
    cancelled = cli("runs", "cancel", record.job_id, platform=platform)
    assert cancelled.returncode == 0, cancelled.stderr
    assert ("AppStop" in platform.names, platform.inputs["fc-1"].is_cancelled) == (True, True)
    record, ledger = ledger_of(workplace)
    assert (record.status, ledger.accounts()[record.job_id].reserved_usd) == ("cancelled", 0.0)


def test_a_call_whose_answer_was_lost_is_ended_and_counted(platform, workplace):
    platform.environment["STAND_IN_HANG_AT"] = "1"
    platform.lost.add("FunctionMap")
    done = cli(*TRAIN, platform=platform)
    assert done.returncode == 1, done.stderr
    assert "boom" in done.stderr
    assert ("AppStop" in platform.names, platform.inputs["fc-1"].is_cancelled) == (True, True)
    record, ledger = ledger_of(workplace)
    assert (record.status, ledger.accounts()[record.job_id].reserved_usd) == ("failed", 0.0)
    assert ledger.total_usd() == record.cost_usd > 0


def test_a_job_that_is_launched_again_keeps_what_its_earlier_calls_cost(workplace):
    record = LaunchRecord(
        job_id="a",
        verb="train",
        where="modal",
        folder="a",
        created_s=0.0,
        usd_per_hour=3600.0,
        worst_usd=5.0,
        cost_usd=2.0,
        ledger="a.ledger",
    )
    note_sending(record)
    record.sent_s -= 3.0
    settle_without_result(record)
    assert 5.0 <= record.cost_usd < 6.0  # not from the job's first call on
    for _ in range(2):
        record.sent_s -= 100.0
        settle_without_result(record)
        assert record.cost_usd == 2.0 + record.worst_usd == Ledger(Path("a.ledger")).total_usd()


def test_a_new_sweep_in_the_place_of_another_takes_none_of_its_results(platform, workplace):
    point = ["--grid", "alpha_sdpo=0.2"]
    assert cli(*SWEEP, *point, platform=platform).returncode == 0
    shutil.rmtree(workplace / "s")
    (workplace / "base.toml").write_text('name = "base"\n[grpo]\nmax_steps = 6\nsave_steps = 2\n')
    done = cli(*SWEEP, *point, platform=platform)
    assert done.returncode == 0, done.stderr
    summary = json.loads((workplace / "s/members/alpha_sdpo-0.2-seed-0/summary.json").read_text())
    assert summary["steps"] == 6


def test_members_wait_for_room_under_the_cap_that_others_leave(platform, workplace):
    grid = ["--grid", "alpha_sdpo=0,0.1,0.2"]
    answer = json.loads(cli(*SWEEP[:-1], *grid, "--dry-run", "--json").stdout)
    cap = f"{2 * answer['plan']['worst_usd'] + 1e-4:.6f}"
    go = workplace / "go"
    trouble = {"STAND_IN_HANG_AT": "3", "STAND_IN_HANG_IN": "-0.1-", "STAND_IN_GO": str(go)}
    platform.environment |= trouble

    def let_go():
        """When the third has had time to find that there is no room beside the one that hangs."""
        end = time.monotonic() + 120
        while not list((workplace / "s/members").glob("*-0.2-*/summary.json")):
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.5)
        assert len(platform.inputs) == 2
        go.touch()

    watcher = threading.Thread(target=let_go)
    watcher.start()
    done = cli(*SWEEP, *grid, "--budget", cap, platform=platform)
    watcher.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 members passed" in done.stdout
    assert Ledger(workplace / "s/ledger.json").total_usd() < float(cap)


def test_both_attempts_of_a_member_share_one_deadline_and_one_worst_case(platform, workplace):
    platform.environment["STAND_IN_FAIL"] = '{"alpha_sdpo-0.2-": 9}'
    sweep = [*SWEEP, "--grid", "alpha_sdpo=0.2"]
    answer = json.loads(cli(*sweep, "--dry-run", "--json").stdout)
    cap = f"{answer['plan']['worst_usd'] + 1e-4:.6f}"
    done = cli(*sweep, "--budget", cap, platform=platform)
    assert done.returncode == 1, done.stderr
    sent = []
    for call in platform.inputs.values():
        data = platform.blobs.get(call.payload.args_blob_id, call.payload.args)
        (payload,), _ = deserialize_data_format(data, call.payload.data_format, None)
        sent.append(payload)
    first, second = sent
    assert first["deadline_s"] == second["deadline_s"]
    log = workplace / "s/logs/alpha_sdpo-0.2-seed-0.log"
    assert str(log.relative_to(workplace)) in done.stdout
    assert "told to fail 9 times" in log.read_text()


@pytest.mark.parametrize("name", ["my sweep", "a" * 90, "ein/name"])
def test_every_job_id_is_a_tag_that_modal_takes(name):
    job_id = new_job_id(name)
    assert len(job_id) <= 63
    assert set(job_id) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_")
