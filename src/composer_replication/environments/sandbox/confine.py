"""The script that confines its own process and then becomes the program.

It runs as `python -I -S confine.py STAGE`, before any code of a model, reads one JSON object from
stdin, and imports the standard library alone: the package is not there inside a sandbox.

    landlock    own user, process, network, IPC and mount namespaces; Landlock; then as `inside`
    inside      what bubblewrap, which has made the same namespaces, leaves to do: calls and limits
    unsafe      limits only
"""

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import struct
import sys
from pathlib import Path

# <linux/landlock.h>; the three system calls have these numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_VERSION_FLAG = 1
_READ_RIGHTS = 0b1101
"""Execute, read a file, read a folder."""
_READ_FILE_RIGHTS = 0b101
_WRITE_FILE_RIGHTS = 0b110
# Rights that each version of the interface knows: the first knows 13, then refer, truncate, ioctl.
_KNOWN_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_ALL_RIGHTS = (1 << 16) - 1
_TCP_RIGHTS = 0b11
_SCOPES = 0b11
"""No abstract socket and no signal to a process outside."""

_NEW_NAMESPACES = 0x10000000 | 0x20000 | 0x40000000 | 0x8000000 | 0x4000000 | 0x20000000
"""User, mount, network, IPC, host name, process."""
_SET_PARENT_DEATH_SIGNAL, _SET_NO_NEW_PRIVS = 1, 38
_MS_NOSUID_NODEV = 0b110
_MS_BIND_ALL = (1 << 12) | (1 << 14)
_MS_PRIVATE_ALL = (1 << 18) | (1 << 14)
_ATTRIBUTE_READ_ONLY, _AT_RECURSIVE = 1, 0x8000
_DETACH = 2
_UNPRIVILEGED_ID = 65534
_FIRST_WITH_OWN_PROCESS_IDS = (6, 14)
_LEAST_PROCESS_ID_LIMIT, _OWN_PROCESSES = 301, 8
"""The kernel takes no smaller one."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_MIB = 1 << 20

_MACHINES = ("x86_64", "aarch64")
# Calls that no solution needs: a socket; what holds memory that no limit sees; and doors to parts
# of the kernel that have had holes. Name: its number on each machine.
_DENIED_CALLS = {
    "socket": (41, 198),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "vmsplice": (278, 75),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "io_uring_setup": (425, 425),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
}
# Pairs of sockets (asyncio needs them) and pipes keep the kernel's own size: what waits in them is
# no process's memory. Numbers of setsockopt and fcntl; the argument; SO_SNDBUF, SO_RCVBUF and the
# two that force them, and F_SETPIPE_SZ.
_DENIED_ARGUMENTS = (((54, 208), 2, (7, 8, 32, 33)), ((72, 25), 1, (1031,)))
# mmap, its flags, MAP_SHARED: pages that a fork holds without having touched them are in no
# process's memory either.
_DENIED_BIT = ((9, 222), 3, 1)
_MAX_OPEN_FILES = 64
_AUDIT_ARCHITECTURES = (0xC000003E, 0xC00000B7)
_SET_SECCOMP, _FILTER_MODE = 22, 2
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_FIRST_X32_CALL = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Confine this process as the stage says and execute the program."""
    stage, order = sys.argv[1], json.loads(sys.stdin.buffer.read())
    os.set_inheritable(order["ready_fd"], False)
    _checked("prctl", _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0))
    if stage == "landlock":
        _enter_namespaces()
        _become_init()
        _limit_processes(order["num_processes"])
        _enter_own_root(order)
    os.chdir(order["folder"])
    _write_files(order)
    if stage == "landlock":
        _restrict_paths(order)
        _fork_program()
    _execute(order, stage)


def landlock_version() -> int:
    """The Landlock interface of this kernel, 0 where it has none or it is switched off."""
    return max(_libc.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG), 0)


def kernel_version() -> tuple[int, int]:
    """Of the running kernel, such as (6, 14); (0, 0) where its name has no version."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _call_number(name: str) -> int:
    return _DENIED_CALLS[name][_MACHINES.index(os.uname().machine)]


def _enter_namespaces() -> None:
    user, group = os.geteuid(), os.getegid()
    _checked("unshare", _libc.unshare(_NEW_NAMESPACES))
    # Not 0 inside: what is executed then keeps none of the new namespace's capabilities.
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{_UNPRIVILEGED_ID} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{_UNPRIVILEGED_ID} {group} 1")
    # A further user namespace would give the program capabilities again.
    Path("/proc/sys/user/max_user_namespaces").write_text("0")


def _become_init() -> None:
    """Go on as process 1 of the new process namespace; its end kills every process in it."""
    child = os.fork()
    if child:
        os._exit(_exit_code(os.waitpid(child, 0)[1]))
    _checked("prctl", _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0))


def _limit_processes(num_processes: int) -> None:
    """Bound the new namespace's process ids: RLIMIT_NPROC does not hold for the administrator.

    A watcher is too slow for a fork bomb on a busy machine. Before Linux 6.14 the same file is the
    whole machine's, and is left alone.
    """
    if kernel_version() >= _FIRST_WITH_OWN_PROCESS_IDS:
        largest = max(_LEAST_PROCESS_ID_LIMIT, num_processes + _OWN_PROCESSES)
        with contextlib.suppress(OSError):
            Path("/proc/sys/kernel/pid_max").write_text(str(largest))


def _fork_program() -> None:
    """Go on as a child of process 1, which stays behind to reap, and ends when the child does."""
    program = os.fork()
    while program:
        ended, status = os.wait()
        if ended == program:
            os._exit(_exit_code(status))


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _enter_own_root(order: dict) -> None:
    """Change to a root that holds nothing but the readable paths and an empty writable folder.

    Landlock alone leaves files' modes, names and sockets within reach of their owner.
    """
    folder = order["folder"]
    _mount("none", "/", "", _MS_PRIVATE_ALL)
    # The new root lies over the folder, and the folder's namesake inside it.
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID_NODEV, "size=1m,mode=755")
    for path in (*order["read_paths"], *_DEVICES):
        if Path(path).exists():
            place = Path(folder + path)
            if Path(path).is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
            _mount(path, str(place), "", _MS_BIND_ALL)
    own = folder + folder
    Path(own).mkdir(parents=True)
    read_only = struct.pack("=4Q", _ATTRIBUTE_READ_ONLY, 0, 0, 0)
    place = ctypes.c_char_p(folder.encode())
    size = ctypes.c_size_t(len(read_only))
    _checked(
        "mount_setattr",
        _libc.syscall(_call_number("mount_setattr"), -1, place, _AT_RECURSIVE, read_only, size),
    )
    # In memory: of bounded size, and gone when the last process is.
    options = f"size={order['folder_mib']}m,nr_inodes=4096,mode=700"
    _mount("tmpfs", own, "tmpfs", _MS_NOSUID_NODEV, options)
    os.chdir(folder)
    _checked("pivot_root", _libc.syscall(_call_number("pivot_root"), b".", b"."))
    _checked("umount2", _libc.umount2(b".", _DETACH))
    os.chdir("/")


def _mount(source: str, place: str, kind: str, flags: int, options: str = "") -> None:
    texts = (source.encode(), place.encode(), kind.encode())
    result = _libc.mount(*texts, ctypes.c_ulong(flags), options.encode())
    _checked(f"mount {place}", result)


def _write_files(order: dict) -> None:
    for name, text in order["files"].items():
        Path(name).write_text(text, encoding="utf-8")


def _restrict_paths(order: dict) -> None:
    """Landlock: read the listed paths, write the folder, and nothing else."""
    version = landlock_version()
    rights = _KNOWN_RIGHTS.get(version, _ALL_RIGHTS)
    fields = [
        rights,
        *([_TCP_RIGHTS] if version >= 4 else []),
        *([_SCOPES] if version >= 6 else []),
    ]
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = _checked(
        "landlock_create_ruleset",
        _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0),
    )
    allowed = dict.fromkeys(order["read_paths"], _READ_RIGHTS)
    allowed |= dict.fromkeys(_DEVICES, _WRITE_FILE_RIGHTS)
    allowed[order["folder"]] = rights
    for path, granted in allowed.items():
        with contextlib.suppress(FileNotFoundError):
            _allow(ruleset, path, granted & rights)
    _checked("prctl", _libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked("landlock_restrict_self", _libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not Path(path).is_dir() and path not in _DEVICES:
        rights &= _READ_FILE_RIGHTS
    rule = struct.pack("=Qi", rights, opened)
    _checked("landlock_add_rule", _libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0))
    os.close(opened)


def _deny_calls() -> None:
    """Answer the denied system calls with EPERM, in every other calling convention too."""
    machine = _MACHINES.index(os.uname().machine)
    # (code, jump if true, jump if false, operand) over {call number, architecture, ...}.
    steps = [
        (_LOAD, 0, 0, 4),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_JUMP_AT_LEAST, 0, 1, _FIRST_X32_CALL),
        (_RETURN, 0, 0, _DENY),
    ]
    for numbers in _DENIED_CALLS.values():
        steps += [(_JUMP_EQUAL, 0, 1, numbers[machine]), (_RETURN, 0, 0, _DENY)]
    for numbers, argument, values in _DENIED_ARGUMENTS:
        steps.append((_JUMP_EQUAL, 0, 3 + len(values), numbers[machine]))
        steps.append((_LOAD, 0, 0, 16 + 8 * argument))
        for left, value in zip(reversed(range(len(values))), values, strict=True):
            steps.append((_JUMP_EQUAL, left, 0 if left else 1, value))
        steps += [(_RETURN, 0, 0, _DENY), (_RETURN, 0, 0, _ALLOW)]
    numbers, argument, bit = _DENIED_BIT
    steps += [
        (_JUMP_EQUAL, 0, 3, numbers[machine]),
        (_LOAD, 0, 0, 16 + 8 * argument),
        (_JUMP_BIT, 0, 1, bit),
        (_RETURN, 0, 0, _DENY),
        (_RETURN, 0, 0, _ALLOW),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    filter_ = struct.pack("@HP", len(steps), ctypes.addressof(program))
    _checked("prctl", _libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked("seccomp", _libc.prctl(_SET_SECCOMP, _FILTER_MODE, filter_, 0, 0))


def _execute(order: dict, stage: str) -> None:
    seconds = max(1, round(order["wall_s"] + 0.5))
    size = order["folder_mib"] * _MIB
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: order["memory_mib"] * _MIB,
        resource.RLIMIT_FSIZE: size,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: _MAX_OPEN_FILES,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if stage != "unsafe":
        # It counts per user namespace, and outside of one all processes of the user.
        limits[resource.RLIMIT_NPROC] = order["num_processes"]
        # A signal to its own process group would else reach the launcher outside.
        os.setsid()
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))
    with os.fdopen(os.memfd_create("stdin"), "w+b") as given:
        given.write(order["stdin"].encode())
        given.seek(0)
        os.dup2(given.fileno(), 0)
    if stage != "unsafe":
        _deny_calls()
    os.write(order["ready_fd"], b"ready")
    os.execve(order["argv"][0], order["argv"], order["environment"])


def _checked(call: str, result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")
    return result


if __name__ == "__main__":
    main()
