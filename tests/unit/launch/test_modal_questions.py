"""What a user at a terminal is asked, and what each answer does; the terminal is a real one."""

import json
import signal
import sys
from types import SimpleNamespace

import pytest
from remote_cli import cli, ledger_of
from terminal import Terminal

from composer_replication.cli.modal_calls import refuse_nobody
from composer_replication.errors import InputError
from composer_replication.launch.ledger import Ledger
from composer_replication.launch.records import load_records

TRAIN = ["train", "base.toml", "--on", "modal", "--out", "there"]


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A shell starts its background jobs deaf to Ctrl-C, and what they start inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("answer", [b"\n", b"later\n", b"\x04"])
def test_anything_but_yes_to_the_spending_question_sends_nothing(platform, workplace, answer):
    terminal = Terminal(*TRAIN, platform=platform)
    terminal.wait_for("USD? [y/N] ")
    terminal.answer(answer)
    assert terminal.end() == 0
    assert "Nothing was sent." in terminal.said
    assert platform.calls == []
    assert not (workplace / "runs").exists()
    assert not (workplace / "there").exists()


def test_who_reads_json_is_not_asked_even_at_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    refuse_nobody(SimpleNamespace(yes=False, json=False))
    refuse_nobody(SimpleNamespace(yes=True, json=True))
    with pytest.raises(InputError, match="Give --yes to go ahead"):
        refuse_nobody(SimpleNamespace(yes=False, json=True))


def test_yes_to_the_spending_question_sends_what_was_asked_about(platform, workplace):
    terminal = Terminal(*TRAIN, platform=platform)
    terminal.wait_for("[y/N] ")
    terminal.answer(b"Yes\n")
    assert terminal.end() == 0, terminal.said
    record, _ = ledger_of(workplace)
    question = f"about {record.expected_usd:.2f} USD, at most {record.worst_usd:.2f} USD?"
    assert f"Spend {question} [y/N] " in terminal.said
    assert (record.status, len(platform.inputs)) == ("passed", 1)


def test_ctrl_c_while_the_image_is_built_frees_what_was_set_aside(platform, workplace):
    platform.builds_long = True
    terminal = Terminal(*TRAIN, "--yes", platform=platform)
    terminal.wait_until(lambda: "ImageJoinStreaming" in platform.names)
    record, ledger = ledger_of(workplace)
    assert (record.status, ledger.total_usd()) == ("launching", record.worst_usd)
    terminal.interrupt()
    assert terminal.end() == 130, terminal.said
    record, ledger = ledger_of(workplace)
    assert (record.status, ledger.total_usd()) == ("failed", 0.0)
    assert "nothing of it runs or is set aside" in terminal.said
    assert platform.inputs == {}


def running(platform):
    """A terminal whose run has begun and takes long."""
    platform.environment["STAND_IN_HANG_AT"] = "3"
    terminal = Terminal(*TRAIN, "--yes", platform=platform)
    terminal.wait_for("step 2")
    terminal.interrupt()
    terminal.wait_for("Cancel it (c), or leave it running (Enter)? ")
    assert "is running and costs" in terminal.said
    return terminal


def test_ctrl_c_and_enter_leave_the_run_alone(platform, workplace):
    terminal = running(platform)
    terminal.answer(b"\n")
    assert terminal.end() == 130, terminal.said
    record, ledger = ledger_of(workplace)
    assert f"runs fetch {record.job_id}" in terminal.said
    call = platform.inputs["fc-1"]
    assert (record.status, call.is_cancelled, call.result) == ("running", False, None)
    assert ledger.accounts()[record.job_id].reserved_usd == record.worst_usd
    fetched = cli("runs", "fetch", record.job_id, platform=platform)
    assert "is still running" in fetched.stderr


@pytest.mark.parametrize("answer", ["c", "Ctrl-C"])
def test_ctrl_c_and_c_or_ctrl_c_again_cancel_the_run(platform, workplace, answer):
    terminal = running(platform)
    terminal.interrupt() if answer == "Ctrl-C" else terminal.answer(b"c\n")
    assert terminal.end() == 130, terminal.said
    assert platform.inputs["fc-1"].is_cancelled
    record, ledger = ledger_of(workplace)
    assert f"cancelled {record.job_id}" in terminal.said
    assert (record.status, ledger.accounts()[record.job_id].reserved_usd) == ("cancelled", 0.0)
    assert 0 < ledger.total_usd() < record.worst_usd
    assert len(load_records(workplace / "runs")) == 1


SWEEP = ["sweep", "base.toml", "--grid", "alpha_sdpo=0,0.2", "--out", "s", "--on", "modal", "--yes"]


def running_sweep(platform):
    platform.environment |= {"STAND_IN_HANG_AT": "3", "STAND_IN_GO": str(platform.root / "go")}
    terminal = Terminal(*SWEEP, platform=platform)
    terminal.wait_until(
        lambda: sum("step 2\n" in call.lines for call in platform.inputs.values()) == 2
    )
    terminal.interrupt()
    terminal.wait_for("Cancel them (c), or leave them running (Enter)? ")
    assert "2 members are running and cost" in terminal.said
    return terminal


def test_ctrl_c_and_enter_leave_a_sweeps_members_alone_and_resume_waits_for_them(
    platform, workplace
):
    terminal = running_sweep(platform)
    terminal.answer(b"\n")
    assert terminal.end() == 130, terminal.said
    assert {record.status for record in load_records(workplace / "runs")} == {"running"}
    platform.bill = {platform.tags["run_id"]: 0.75}
    (platform.root / "go").touch()
    resumed = cli(*SWEEP, "--resume", platform=platform)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert len(platform.inputs) == 2  # no member was sent again
    assert "bill    0.7500 USD for all members so far" in resumed.stdout
    assert json.loads((workplace / "s/sweep.json").read_text())["billed_usd"] == 0.75
    for log in (workplace / "s/logs").iterdir():
        assert "passed  4 steps" in log.read_text()
    assert len(list((workplace / "s/logs").iterdir())) == 2


def test_ctrl_c_and_c_cancel_a_sweeps_members_and_free_what_they_had_set_aside(platform, workplace):
    terminal = running_sweep(platform)
    terminal.answer(b"c\n")
    assert terminal.end() == 130, terminal.said
    assert all(call.is_cancelled for call in platform.inputs.values())
    accounts = Ledger(workplace / "s/ledger.json").accounts().values()
    assert all(account.reserved_usd == 0 < account.usd for account in accounts)


def test_a_sweep_shows_its_plan_before_it_asks_and_no_sends_nothing(platform, workplace):
    terminal = Terminal(*SWEEP[:-1], platform=platform)
    terminal.wait_for("[y/N] ")
    assert "sweep   2 members, 2 at a time on " in terminal.said
    assert "where  gpu" in terminal.said
    terminal.answer(b"\n")
    assert terminal.end() == 0
    assert terminal.said.endswith("Nothing was sent.\n")
    assert platform.calls == []
    assert not (workplace / "s").exists()
