"""Members of a sweep on Modal, ended, listed, followed, fetched and gone on with from outside."""

import json
import subprocess
import sys
import time

import pytest
from remote_cli import cli, environment_of

from composer_replication.launch.ledger import Ledger
from composer_replication.launch.records import load_records, save_record

SWEEP = ["sweep", "base.toml", "--grid", "alpha_sdpo=0,0.2", "--out", "s", "--on", "modal", "--yes"]


@pytest.fixture
def launcher(platform):
    """The process of a sweep whose two members have done two steps and hang."""
    platform.environment["STAND_IN_HANG_AT"] = "3"
    process = subprocess.Popen(
        [sys.executable, "-m", "composer_replication", *SWEEP],
        env=environment_of(platform),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        end = time.monotonic() + 120
        while sum("step 2\n" in call.lines for call in platform.inputs.values()) < 2:
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.05)
        yield process
        process.kill()


def records(workplace):
    return load_records(workplace / "runs")


def test_members_are_ended_one_by_one_and_as_one_and_paid_for_once(platform, workplace, launcher):
    first, second = records(workplace)
    sweep_id = (workplace / "s/sweep_id").read_text().strip()
    for action in ("cancel", "fetch"):
        refused = cli("runs", action, sweep_id, platform=platform)
        assert (refused.returncode, "still runs" in refused.stderr) == (2, True), refused.stderr
    assert cli("runs", "cancel", first.job_id, platform=platform).returncode == 0
    told = next(
        line for line in launcher.stdout if first.job_id.removeprefix(f"{sweep_id}-") in line
    )
    assert told.split()[0] == "stopped"  # and not retried: whoever ends it does not pay for another
    launcher.kill()
    launcher.wait()
    (sweep,) = json.loads(cli("runs", "list", "--json").stdout)["sweeps"]
    expected = {"sweep": sweep_id, "folder": "s", "status": "running", "num_launched": 2}
    assert expected.items() <= sweep.items()
    cancelled = cli("runs", "cancel", sweep_id, "--json", platform=platform)
    assert cancelled.returncode == 0, cancelled.stderr
    answer = json.loads(cancelled.stdout)
    assert (answer["status"], len(answer["members"])) == ("cancelled", 2)
    assert len(platform.inputs) == 2
    assert all(call.is_cancelled for call in platform.inputs.values())
    ledger = Ledger(workplace / "s/ledger.json")
    for record in records(workplace):
        account = ledger.accounts()[record.job_id]
        assert (record.status, account.reserved_usd) == ("cancelled", 0.0)
        assert account.spent_usd == {"all": record.cost_usd}
        assert 0 < record.cost_usd < second.worst_usd
    again = cli("runs", "cancel", sweep_id, platform=platform)
    assert (again.returncode, "there is nothing to end" in again.stderr) == (2, True)
    shown = cli("runs", "logs", sweep_id, platform=platform).stdout.splitlines()
    assert shown.count("alpha_sdpo-0.2-seed-0  step 2") == 1
    assert shown.count("alpha_sdpo-0-seed-0    step 2") == 1
    fetched = cli("runs", "fetch", sweep_id, platform=platform)
    assert (fetched.returncode, fetched.stdout.count("cancelled ")) == (1, 2)
    assert len(list((workplace / "s").glob("members/*/checkpoints/checkpoint-2"))) == 2
    resumed = cli("runs", "resume", sweep_id)
    assert (resumed.returncode, "goes on with --resume" in resumed.stderr) == (2, True)


def test_a_call_that_nobody_noted_is_ended_before_its_member_is_sent_again(
    platform, workplace, launcher
):
    launcher.kill()
    launcher.wait()
    orphan, other = records(workplace)
    fetched = cli("runs", "fetch", orphan.sweep, platform=platform)
    assert (fetched.returncode, fetched.stdout.count("running ")) == (1, 2)
    assert not any(call.is_cancelled for call in platform.inputs.values())
    # As a launcher leaves it that is killed after it sent the member.
    orphan.call_id, orphan.status = None, "launching"
    save_record(workplace / "runs", orphan)
    ledger = Ledger(workplace / "s/ledger.json")
    before_usd = ledger.total_usd()
    del platform.environment["STAND_IN_HANG_AT"]
    done = cli(*SWEEP, "--resume", platform=platform)
    assert done.returncode == 0, done.stderr
    assert platform.names.count("AppStop") == 1
    calls = platform.inputs
    assert [calls[name].is_cancelled for name in calls] == [True, True, False, False]
    for call_id in ("fc-3", "fc-4"):
        assert any("resumed from step 2" in line for line in calls[call_id].lines)
    assert set(ledger.accounts()) == {orphan.job_id, other.job_id}
    for record in records(workplace):
        account = ledger.accounts()[record.job_id]
        assert (record.status, account.reserved_usd) == ("passed", 0.0)
        assert account.spent_usd == {"all": record.cost_usd}
    billed_s = sum(sum(call.billed_s) for call in calls.values())
    assert billed_s * other.usd_per_hour / 3600 <= ledger.total_usd() < before_usd
    listed = cli("runs", "list").stdout
    assert f"{orphan.sweep} " in listed
    assert "s  2 of 2 members passed\n" in listed
    num_asked = platform.names.count("FunctionGetOutputs")
    fetched = cli("runs", "fetch", orphan.sweep, platform=platform)
    assert (fetched.returncode, fetched.stdout.count("passed ")) == (0, 2)
    assert platform.names.count("FunctionGetOutputs") == num_asked  # all is here
