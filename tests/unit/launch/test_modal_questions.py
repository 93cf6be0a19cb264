"""What a user at a terminal is asked, and what each answer does; the terminal is a real one."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest
from remote_cli import cli, environment_of, ledger_of

from composer_replication.launch.records import load_records

TRAIN = ["train", "base.toml", "--on", "modal", "--out", "there"]


class Terminal:
    """A command whose input is a terminal; its two outputs are read as they come."""

    def __init__(self, *arguments, platform):
        keyboard, stdin = pty.openpty()
        self._keyboard = os.fdopen(keyboard, "wb", buffering=0)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "composer_replication", *arguments],
            env=environment_of(platform),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        os.close(stdin)
        self.said = ""
        streams = (self._process.stdout, self._process.stderr)
        self._readers = [threading.Thread(target=self._read, args=(each,)) for each in streams]
        for reader in self._readers:
            reader.start()

    def _read(self, stream):
        with stream:
            while text := os.read(stream.fileno(), 4096):
                self.said += text.decode()

    def wait_for(self, text):
        end = time.monotonic() + 120
        while text not in self.said:
            assert time.monotonic() < end, self.said
            assert self._process.poll() is None, self.said
            time.sleep(0.02)

    def answer(self, text):
        self._keyboard.write(text)

    def interrupt(self):
        self._process.send_signal(signal.SIGINT)

    def end(self):
        """The exit code."""
        code = self._process.wait(120)
        for reader in self._readers:
            reader.join()
        self._keyboard.close()
        return code


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A shell starts its background jobs deaf to Ctrl-C, and what they start inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("answer", [b"\n", b"n\n", b"N\n", b"later\n", b"\x04"])
def test_anything_but_yes_to_the_spending_question_sends_nothing(platform, workplace, answer):
    terminal = Terminal(*TRAIN, platform=platform)
    terminal.wait_for("USD? [y/N] ")
    terminal.answer(answer)
    assert terminal.end() == 0
    assert "Nothing was sent." in terminal.said
    assert platform.calls == []
    assert not (workplace / "runs").exists()
    assert not (workplace / "there").exists()


@pytest.mark.parametrize("answer", [b"y\n", b"Yes\n"])
def test_yes_to_the_spending_question_sends_what_was_asked_about(platform, workplace, answer):
    terminal = Terminal(*TRAIN, platform=platform)
    terminal.wait_for("[y/N] ")
    terminal.answer(answer)
    assert terminal.end() == 0, terminal.said
    record, _ = ledger_of(workplace)
    question = f"about {record.expected_usd:.2f} USD, at most {record.worst_usd:.2f} USD?"
    assert f"Spend {question} [y/N] " in terminal.said
    assert (record.status, len(platform.inputs)) == ("passed", 1)


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
