"""How a remote run ends when it does not end by itself: what is said, and what is set aside after.

The double of Modal runs the remote body for real; the command line is a process of its own.
"""

import json

import pytest
from remote_cli import cli, ledger_of

TRAIN = ["train", "base.toml", "--on", "modal", "--out", "there", "--yes", "--json"]


def error_of(done):
    assert done.returncode == 1, done.stderr
    return json.loads(done.stdout)["error"]


def test_a_run_that_reaches_its_time_out_says_how_it_goes_on_for_longer(platform, workplace):
    platform.environment |= {"STAND_IN_HANG_AT": "3", "STAND_IN_JUMP_S": "600"}
    done = cli(*TRAIN, "--set", "modal.timeout_s=600", platform=platform)
    record, ledger = ledger_of(workplace)
    assert error_of(done).startswith(
        "The run reached its time-out and was asked to end. It goes on from its newest checkpoint "
        f"with `composer-replication runs resume {record.job_id}`, and for longer with "
        "`--set modal.timeout_s=SECONDS` after that."
    )
    assert platform.inputs["fc-1"].num_containers == 1
    assert ledger.total_usd() == record.cost_usd < record.worst_usd
    before_usd = record.worst_usd
    del platform.environment["STAND_IN_HANG_AT"]
    longer = ["runs", "resume", record.job_id, "--yes", "--set", "modal.timeout_s=1800"]
    resumed = cli(*longer, platform=platform)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step 2" in resumed.stdout
    assert platform.definition().timeout_secs == 1800
    record, _ = ledger_of(workplace)
    assert (record.status, record.worst_usd) == ("passed", pytest.approx(3 * before_usd))


def test_a_run_that_the_kernel_killed_for_memory_says_how_it_gets_more(platform, workplace):
    platform.environment["STAND_IN_OOM_AT"] = "3"
    done = cli(*TRAIN, platform=platform)
    record, _ = ledger_of(workplace)
    assert error_of(done) == (
        "The run was killed because it needed more RAM than its container has. It goes on with "
        f"more by `composer-replication runs resume {record.job_id} --set modal.memory_gib=GIB`."
    )
    assert platform.inputs["fc-1"].num_containers == 1  # the next would be killed alike
    del platform.environment["STAND_IN_OOM_AT"]
    more = ["runs", "resume", record.job_id, "--yes", "--set", "modal.memory_gib=32"]
    resumed = cli(*more, platform=platform)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step 2" in resumed.stdout
    assert platform.definition().resources.memory_mb == 32 * 1024


def test_a_volume_without_room_stops_the_run_and_says_how_to_make_some(platform, workplace):
    platform.environment["STAND_IN_FULL_AT"] = "3"
    done = cli(*TRAIN, platform=platform)
    record, ledger = ledger_of(workplace)
    assert error_of(done) == (
        "The volume composer-replication-runs has no room left, so the run stopped. What was "
        "committed is whole. `modal volume ls composer-replication-runs` lists what is there; make "
        "room with `modal volume rm -r composer-replication-runs NAME`, then go on with "
        f"`composer-replication runs resume {record.job_id}`."
    )
    assert platform.inputs["fc-1"].num_containers == 1
    assert (workplace / "there/checkpoints/checkpoint-2/complete.json").is_file()
    assert ledger.total_usd() == record.cost_usd
    del platform.environment["STAND_IN_FULL_AT"]
    resumed = cli("runs", "resume", record.job_id, "--yes", platform=platform)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step 2" in resumed.stdout


def test_a_resumed_job_keeps_what_it_computes(platform, workplace):
    platform.environment["STAND_IN_FAIL"] = '{"base": 9}'
    cli(*TRAIN, platform=platform)
    record, _ = ledger_of(workplace)
    resume = ["runs", "resume", record.job_id, "--yes", "--set"]
    refused = cli(*resume, "seed=3", platform=platform)
    assert refused.returncode == 2
    assert "only the limits of [modal] can change" in refused.stderr
    refused = cli(*resume, "modal.memory=3", platform=platform)
    assert refused.returncode == 2
    assert "Did you mean 'modal.memory_gib'?" in refused.stderr
    assert len(platform.inputs) == 1
