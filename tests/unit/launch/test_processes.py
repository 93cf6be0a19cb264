import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from composer_replication.launch.processes import run_process

SLEEPS = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
STUBBORN = [
    *(sys.executable, "-S", "-c"),
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)",
]


def wait_until(claim, seconds=20.0):
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_exit_code_is_the_commands_own(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        code = "import os; print(os.environ['A']); raise SystemExit(7)"
        ending = run_process(
            [sys.executable, "-S", "-c", code], environment={"A": "given"}, output=log
        )
    assert (ending.exit_code, ending.cause) == (7, "exit")
    assert (tmp_path / "log").read_text() == "given\n"


def test_at_the_deadline_it_is_asked_to_end_and_then_killed():
    asked = run_process(SLEEPS, deadline_s=time.time() + 0.5)
    assert asked.cause == "deadline"
    assert asked.exit_code in (1, -signal.SIGINT)
    killed = run_process(STUBBORN, deadline_s=time.time() + 1.5, grace_s=0.2)
    assert (killed.exit_code, killed.cause) == (-signal.SIGKILL, "deadline")


def test_another_thread_can_end_it():
    stops = threading.Event()
    threading.Timer(0.3, stops.set).start()
    assert run_process(SLEEPS, stops=stops).cause == "interrupt"


def test_an_error_of_the_watcher_leaves_no_process_behind():
    pids = []

    def fail():
        raise RuntimeError("watcher")

    with pytest.raises(RuntimeError, match="watcher"):
        run_process(SLEEPS, tick=fail, on_start=pids.append)
    assert not is_running(pids[0])


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not tell a child")
def test_a_killed_launcher_takes_its_process_with_it(tmp_path):
    code = (
        "from pathlib import Path; from composer_replication.launch.processes import run_process; "
        f"run_process({SLEEPS!r}, on_start=lambda pid: Path('pid').write_text(str(pid)))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    time.sleep(0.3)  # the child asks the kernel when it starts
    assert is_running(pid)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not is_running(pid))


@pytest.fixture
def hears_of_ctrl_c():
    """This process, even where the shell that started it put it into the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_launcher_that_ignores_ctrl_c_can_still_end_what_it_starts():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ending = run_process(SLEEPS, deadline_s=time.time() + 1.5)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ending.cause, ending.wall_s < 20) == ("deadline", True)


def test_ctrl_c_ends_the_process_once_and_is_reported(hears_of_ctrl_c):
    pids = []
    threading.Timer(0.4, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    ending = run_process(SLEEPS, on_start=pids.append)
    assert ending.cause == "interrupt"
    assert not is_running(pids[0])
