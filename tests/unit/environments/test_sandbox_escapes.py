"""What a confined program cannot do; each attempt is seen to succeed where nothing confines."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from sandboxed_runs import SAFE, mechanism_id, run_program

from composer_replication.environments.sandbox import mechanisms
from composer_replication.environments.sandbox.confine import kernel_version
from composer_replication.environments.sandbox.confined_process import (
    ConfinedProcess,
    run_confined,
)
from composer_replication.environments.sandbox.launching import Mechanism
from composer_replication.environments.sandbox.mechanisms import choose_mechanism
from composer_replication.environments.sandbox.sandbox_limits import SandboxLimits
from composer_replication.errors import ConfigError, DataError, SandboxUnavailableError

ESCAPES = {
    "reads_a_secret": "open(SECRET).read()",
    "finds_hidden_tests": "assert os.listdir(OUTSIDE)",
    "sees_that_a_file_is_there": "os.stat(SECRET)",
    "writes_outside": "open(OUTSIDE + '/new', 'w').close()",
    "writes_to_tmp": "make_and_remove('/tmp/composer-escape')",
    "writes_to_shared_memory": "make_and_remove('/dev/shm/composer-escape')",
    "writes_through_a_symlink": "os.symlink(OUTSIDE, 'link'); open('link/new', 'w').close()",
    "links_a_file_in": "os.symlink(SECRET, 'link'); open('link').read()",
    "deletes_a_file": "os.remove(OUTSIDE + '/to_delete')",
    "changes_the_mode_of_a_file": "os.chmod(SECRET, 0o644)",
    "changes_the_times_of_a_file": "os.utime(SECRET)",
    "reads_the_parents_environment": "open(f'/proc/{PID}/environ').read()",
    "sees_other_processes": "os.kill(PID, 0)",
    "connects_over_tcp": "socket.create_connection(('127.0.0.1', PORT)).close()",
    "sends_over_udp": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "connects_to_a_service_by_path": "unix(OUTSIDE + '/service')",
    "connects_to_an_abstract_service": "unix(chr(0) + ABSTRACT)",
    "keeps_memory_without_a_process": "os.memfd_create('x')",
    "keeps_shared_memory": "assert libc.shmctl(libc.shmget(0, 4096, 0o1600), 0, None) == 0",
    "maps_pages_that_no_process_holds": "mmap.mmap(-1, 4096)",
    "maps_pages_of_zeros_shared": "mmap.mmap(os.open('/dev/zero', os.O_RDWR), 4096)",
    "traces_a_process": "assert libc.ptrace(0, 0, 0, 0) == 0",
    "enlarges_what_a_socket_holds": "pair()[0].setsockopt(1, socket.SO_SNDBUF, 1 << 16)",
    "enlarges_what_a_socket_takes": "pair()[0].setsockopt(1, socket.SO_RCVBUF, 1 << 16)",
    "enlarges_a_pipe": "fcntl.fcntl(os.pipe()[1], fcntl.F_SETPIPE_SZ, 1 << 17)",
    "gives_pages_to_a_pipe": "assert libc.vmsplice(os.pipe()[1], None, 0, 0) == 0",
    "makes_a_user_namespace": "assert libc.unshare(0x10000000) == 0",
}
PRELUDE = """\
import ctypes, fcntl, mmap, os, socket
SECRET, OUTSIDE, PID, PORT, ABSTRACT = {secret!r}, {outside!r}, {pid}, {port}, {abstract!r}
libc, pair = ctypes.CDLL(None), socket.socketpair
def unix(address):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
def make_and_remove(path):
    open(path, 'w').close()
    os.remove(path)
"""


@pytest.fixture
def outside(tmp_path):
    """A folder of the host, with what the attempts reach for."""
    (tmp_path / "secret").write_text("token")
    (tmp_path / "to_delete").write_text("work")
    abstract = f"composer-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as service,
        socket.socket(socket.AF_UNIX) as abstract_service,
    ):
        service.bind(str(tmp_path / "service"))
        service.listen()
        abstract_service.bind(f"\0{abstract}")
        abstract_service.listen()
        yield PRELUDE.format(
            secret=str(tmp_path / "secret"),
            outside=str(tmp_path),
            pid=os.getpid(),
            port=server.getsockname()[1],
            abstract=abstract,
        )


@pytest.mark.parametrize("name", ESCAPES)
def test_an_attempt_succeeds_where_nothing_confines(name, outside):
    result = run_program(f"{outside}{ESCAPES[name]}\nprint('escaped')", Mechanism.UNSAFE)
    assert result.stdout == "escaped\n", result.stderr


@pytest.mark.parametrize("mechanism", SAFE, ids=mechanism_id)
def test_no_attempt_succeeds_confined(mechanism, outside, tmp_path):
    attempts = "".join(
        f"try:\n{textwrap.indent(attempt, '    ')}\n    print({name!r})\nexcept Exception: pass\n"
        for name, attempt in ESCAPES.items()
    )
    result = run_program(f"{outside}{attempts}print('end')", mechanism)
    assert result.stdout.split() in (["end"], [])
    assert (result.stdout == "end\n") == (mechanism is not None), result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "service", "to_delete"]


@pytest.mark.parametrize("mechanism", [*SAFE, Mechanism.UNSAFE], ids=mechanism_id)
def test_a_program_gets_its_files_its_input_and_no_environment(mechanism, monkeypatch):
    monkeypatch.setenv("COMPOSER_SECRET", "token")
    code = "import os, sys; print(sorted(os.environ), os.listdir('.'), sys.stdin.read())"
    result = run_program(code, mechanism)
    names = ["HOME", "LANG", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
    wanted = f"{[*names, 'PATH', 'TMPDIR']} ['main.py'] \n"
    assert result.stdout == ("" if mechanism is None else wanted)


@pytest.mark.parametrize("mechanism", SAFE, ids=mechanism_id)
@pytest.mark.parametrize(
    ("code", "endings", "limits"),
    [
        ("import os\nwhile True: os.fork()", {"processes", "exit"}, {"num_processes": 8}),
        ("b = bytearray(300 << 20)", {"exit"}, {"memory_mib": 200}),
        (
            "import os, time\nfor _ in range(4):\n"
            "    if not os.fork():\n        b = bytearray(90 << 20)\n        time.sleep(30)\n"
            "time.sleep(30)",
            {"memory"},
            {"memory_mib": 200},
        ),
        ("while True: print('x' * 1000)", {"output"}, {"output_kib": 64}),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output"}, {"output_kib": 64}),
        ("while True: pass", {"timeout"}, {"wall_s": 0.8}),
        (
            "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(30)",
            {"timeout"},
            {"wall_s": 0.8},
        ),
        (
            "for n in range(9):\n    open(f'{n}', 'wb').write(bytes(1 << 20))",
            {"exit"},
            {"folder_mib": 4},
        ),
        ("import os, signal\nos.kill(0, signal.SIGKILL)", {"exit"}, {}),
        ("import os, signal\nos.kill(-1, signal.SIGKILL)\nos.abort()", {"exit"}, {}),
    ],
    ids=[
        "fork_bomb", "memory", "memory_of_many_processes", "output", "error_output", "busy_loop",
        "ignored_signal", "full_disk", "kill_of_the_group", "kill_of_everything",
    ],
)  # fmt: skip
def test_a_program_without_measure_is_stopped_at_its_limit(mechanism, code, endings, limits):
    result = run_program(code, mechanism, **limits)
    if mechanism is not None:
        assert result.ending in endings
    assert result.exit_code != 0
    assert len(result.stdout) + len(result.stderr) < 200_000
    assert result.wall_s < 6


SHARES = """
import mmap, os, time
try:
    for _ in range(6):
        held = mmap.mmap(-1, 80 << 20)
        for start in range(0, 80 << 20, 4096):
            held[start] = 1
        if os.fork() == 0:
            time.sleep(30)
        held.close()
except PermissionError:
    own = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE)
    print("refused", len(own))
"""


@pytest.mark.parametrize("mechanism", SAFE, ids=mechanism_id)
def test_pages_that_nobody_touched_cannot_be_left_with_children(mechanism):
    """Shared pages are in the memory of no child that never looked at them."""
    result = run_program(SHARES, mechanism, memory_mib=200)
    assert result.stdout == ("" if mechanism is None else "refused 1048576\n"), result.stderr


FILLS_BUFFERS = """
import fcntl, os, socket
kept, held = [], 0
try:
    while True:
        pair = socket.socketpair()
        kept.append(pair)
        for end in pair:
            end.setblocking(False)
            try:
                end.setsockopt(1, socket.SO_SNDBUF, 1 << 30)
            except OSError:
                pass
            try:
                while True:
                    held += end.send(bytes(4096))
            except BlockingIOError:
                pass
except OSError:
    print(held >> 20, flush=True)
kept, held = [], 0
try:
    while True:
        read, write = os.pipe()
        os.set_blocking(write, False)
        try:
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 20)
        except OSError:
            pass
        try:
            while True:
                held += os.write(write, bytes(4096))
        except BlockingIOError:
            pass
except OSError:
    print(held >> 20)
"""


@pytest.mark.parametrize("mechanism", SAFE, ids=mechanism_id)
def test_what_waits_in_sockets_and_pipes_is_bounded(mechanism):
    """It is in no process's memory, so the limit of memory does not see it."""
    result = run_program(FILLS_BUFFERS, mechanism)
    held_mib = [int(line) for line in result.stdout.split()]
    assert len(held_mib) == (0 if mechanism is None else 2), result.stderr
    assert sum(held_mib) < 16


@pytest.mark.parametrize("mechanism", [*SAFE, Mechanism.UNSAFE], ids=mechanism_id)
def test_asyncio_works_confined(mechanism):
    code = "import asyncio\nasync def f(): await asyncio.sleep(0); print(1)\nasyncio.run(f())"
    assert run_program(code, mechanism).stdout == ("" if mechanism is None else "1\n")


FORKS_UNTIL_REFUSED = """
import os, time
for made in range(500):
    try:
        if not os.fork():
            time.sleep(60)
    except OSError:
        break
print(made)
"""


def test_the_kernel_bounds_processes_where_no_watcher_looks(monkeypatch):
    """A watcher that waits for its turn on a busy machine let a fork bomb grow for 17 s."""
    monkeypatch.setattr(ConfinedProcess, "_reached_limit", lambda _: None)
    limits = {"num_processes": 8, "wall_s": 20.0}
    machines = Path("/proc/sys/kernel/pid_max").read_text()
    mechanism = Mechanism.LANDLOCK if Mechanism.LANDLOCK in SAFE else None
    result = run_program(FORKS_UNTIL_REFUSED, mechanism, **limits)
    # An older kernel does not hold the administrator, and must not be told to.
    is_bounded = os.geteuid() != 0 or kernel_version() >= (6, 14)
    assert int(result.stdout or 0) <= (300 if is_bounded else 500), result.stderr
    assert Path("/proc/sys/kernel/pid_max").read_text() == machines


@pytest.mark.parametrize(
    ("release", "version"),
    [("6.14.0-generic", (6, 14)), ("6.9-rc1", (6, 9)), ("5.4", (5, 4)), ("custom", (0, 0))],
)
def test_the_kernels_version_is_read_from_its_name(monkeypatch, release, version):
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert kernel_version() == version


def processes_with(marker):
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if marker in (process.info["cmdline"] or [])
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def daemon(marker):
    """A program that leaves a process of its own session behind."""
    return (
        "import os, sys, time\n"
        "if not os.fork():\n    os.setsid()\n    if not os.fork():\n"
        f"        os.execv(sys.executable, [sys.executable, '-S', '-c', 'import time; "
        f"time.sleep(60)', {marker!r}])\n    os._exit(0)\ntime.sleep(0.5)\n"
    )


@pytest.mark.parametrize("mechanism", SAFE, ids=mechanism_id)
def test_nothing_that_a_program_started_outlives_it(mechanism):
    marker = f"composer-daemon-{time.monotonic_ns()}"
    result = run_program(daemon(marker) + "print('done')", mechanism)
    assert result.stdout == ("" if mechanism is None else "done\n")
    assert wait_until(lambda: not processes_with(marker))


def test_a_process_left_behind_is_seen_where_nothing_confines():
    marker = f"composer-daemon-{time.monotonic_ns()}"
    run_program(daemon(marker), Mechanism.UNSAFE)
    left = processes_with(marker)
    for process in left:
        process.kill()
    assert len(left) == 1


@pytest.mark.parametrize("mechanism", SAFE, ids=mechanism_id)
def test_a_program_dies_with_the_process_that_ran_it(mechanism):
    marker = f"composer-orphan-{time.monotonic_ns()}"
    script = f"""
import sys
from sandboxed_runs import run_program
from composer_replication.environments.sandbox.launching import Mechanism
code = '''import os, sys
os.execv(sys.executable, [sys.executable, '-S', '-c', 'import time; time.sleep(60)', {marker!r}])
'''
run_program(code, {mechanism}, wall_s=60.0)
"""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    }
    runner = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        started = wait_until(lambda: processes_with(marker), seconds=20 if mechanism else 0)
    finally:
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    assert bool(started) == (mechanism is not None)
    assert wait_until(lambda: not processes_with(marker))


def test_a_folder_of_the_host_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = run_program("open('new', 'w').close(); print(1)", Mechanism.UNSAFE)
    assert result.stdout == "1\n"
    assert not list(tmp_path.iterdir())


def test_without_a_mechanism_code_runs_only_where_that_was_asked_for(monkeypatch):
    problems = {Mechanism.BUBBLEWRAP: "bwrap is not on the PATH", Mechanism.LANDLOCK: "none"}
    monkeypatch.setattr(mechanisms, "mechanism_problems", lambda: problems)
    with pytest.raises(SandboxUnavailableError) as caught:
        choose_mechanism()
    assert str(caught.value) == (
        "This machine cannot confine model-written code (bubblewrap: bwrap is not on the PATH; "
        "landlock: none), and unconfined it could read your files and send them away. Install "
        "bubblewrap and allow unprivileged user namespaces, run on Linux 5.13 or newer with "
        "Landlock, or pass allow_unsafe=True on a machine that holds nothing of value."
    )
    assert choose_mechanism(allow_unsafe=True) is Mechanism.UNSAFE


def test_a_confinement_that_fails_is_an_error_and_no_result(monkeypatch):
    monkeypatch.setattr(
        "composer_replication.environments.sandbox.confined_process.launch_command",
        lambda *_: [sys.executable, "-c", "raise SystemExit('no user namespaces')"],
    )
    with pytest.raises(SandboxUnavailableError, match="did not run: no user namespaces"):
        run_program("print(1)", Mechanism.UNSAFE)


def test_a_trial_program_that_gets_out_is_reported():
    assert "could still do this: read:" in mechanisms._trial_problem(Mechanism.UNSAFE)


def test_limits_and_file_names_that_cannot_work_say_so():
    with pytest.raises(ConfigError, match="wall_s is 0; nothing could run"):
        SandboxLimits(wall_s=0)
    with pytest.raises(DataError, match=r"'\.\./x' cannot be a file of the sandbox"):
        run_confined(
            ["/bin/true"],
            mechanism=Mechanism.UNSAFE,
            limits=SandboxLimits(),
            files={"../x": ""},
        )
