"""Where the platform of `fake_modal` keeps volumes and runs containers: folders and processes.

Images become environments, mounts become the source that the container imports, volumes are copies
that survive only what was committed, failed inputs are retried, time-outs kill, and containers can
be preempted.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from modal._serialization import deserialize_data_format, serialize_data_format
from modal_proto import api_pb2 as pb

from composer_replication.launch.function_spec import RUNS_PATH, RUNS_VOLUME

RESULT = pb.GenericResult
CONTAINER = Path(__file__).with_name("fake_container.py")


@dataclass
class Call:
    """One input of a function: its containers and its result."""

    call_id: str
    function_id: str
    payload: pb.FunctionInput
    result: pb.FunctionGetOutputsItem | None = None
    lines: list[str] = field(default_factory=list)
    process: subprocess.Popen | None = None
    is_cancelled: bool = False
    num_containers: int = 0
    billed_s: list[float] = field(default_factory=list)
    """By container."""


class ContainerHost:
    """`volumes/NAME` below `root` is what is committed; `containers/` is what each one sees."""

    def __init__(self, root, environment):
        self.root = root
        self.environment = environment
        self.functions, self.images, self.mounts, self.files = {}, {}, {}, {}
        self.blobs, self.inputs = {}, {}
        # A commit is whole before another container sees the volume.
        self._committing = threading.RLock()
        self.preemptions = []
        """Of the next containers: (rows of metrics that it has to see, seconds after them)."""
        self.times_out_hanging = False
        """Whether a run that hangs, with a checkpoint committed, has reached its time-out."""

    def definition(self):
        """The created function."""
        (data,) = self.functions.values()
        return data.ranked_functions[0].function

    def volume(self, name):
        return self.root / "volumes" / name

    def carry_out(self, call):
        """Containers, one after another, until one has a result."""
        definition = self.definition()
        blob = call.payload.args_blob_id
        data = self.blobs[blob] if blob else call.payload.args
        args = deserialize_data_format(data, call.payload.data_format, None)
        failures = 0
        while call.result is None:
            call.num_containers += 1
            status, value = self._run_container(call, definition, args)
            if status == RESULT.GENERIC_STATUS_FAILURE and failures < (
                definition.retry_policy.retries
            ):
                failures += 1
                continue
            if status is None and not call.is_cancelled:
                continue  # preempted: the platform starts the input again, and counts no retry
            if call.is_cancelled:
                status, value = RESULT.GENERIC_STATUS_TERMINATED, "cancelled"
            call.result = _output(status, value)

    def _run_container(self, call, definition, args):
        """(status, value), or (None, None) for a container that was taken away."""
        home = self.root / "containers" / f"{call.call_id}-{call.num_containers}"
        for mount in definition.volume_mounts:
            name = mount.volume_id.removeprefix("vo-")
            self.volume(name).mkdir(parents=True, exist_ok=True)
            with self._committing:
                shutil.copytree(self.volume(name), home / mount.mount_path.lstrip("/"))
                self._known(home.name, name).write_text(json.dumps(_digests(self.volume(name))))
        for mount_id in definition.mount_ids:
            for filename, digest in self.mounts[mount_id].items():
                if "composer_replication" in filename:
                    target = home / filename.lstrip("/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(self.files[digest])
        (home / "input").write_bytes(
            pickle.dumps((definition.module_name, definition.function_name, args))
        )
        environment = self._environment(definition, home, call)
        preemption = self.preemptions.pop(0) if self.preemptions else None
        started_s = time.monotonic()
        call.process = subprocess.Popen(
            [sys.executable, str(CONTAINER), str(home)],
            cwd=home,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        reader = threading.Thread(target=_read, args=(call.process.stdout, call.lines))
        reader.start()
        try:
            end = self._wait(call.process, home, preemption, definition.timeout_secs)
        finally:
            call.billed_s.append(time.monotonic() - started_s)
        if end is not None:
            kill(call.process)
            reader.join()
            return (None, None) if end == "preempted" else (RESULT.GENERIC_STATUS_TIMEOUT, end)
        reader.join()
        if not (home / "output").exists():
            return (None, None) if call.is_cancelled else (RESULT.GENERIC_STATUS_FAILURE, "it died")
        is_ok, value = pickle.loads((home / "output").read_bytes())
        for mount in definition.volume_mounts:
            self.commit(home.name, mount.volume_id.removeprefix("vo-"))
        return (RESULT.GENERIC_STATUS_SUCCESS if is_ok else RESULT.GENERIC_STATUS_FAILURE), value

    def _wait(self, process, home, preemption, timeout_s):
        """What ended it from outside; a time-out counts from the body's start."""
        runs = home / RUNS_PATH.lstrip("/")
        body_s = due_s = None
        while process.poll() is None:
            now_s = time.monotonic()
            if body_s is None and (home / "started").exists():
                body_s = now_s
            # By what the run has done, since how fast it is differs from machine to machine.
            if due_s is None and preemption is not None and body_s is not None:
                num_rows, and_s = preemption
                due_s = now_s + and_s if _num_rows(runs) >= num_rows else None
            if due_s is not None and now_s >= due_s:
                return "preempted"
            if body_s is not None and now_s - body_s >= timeout_s:
                return "time-out"
            if self.times_out_hanging and (home / "hanging").exists():
                known = self._known(home.name, RUNS_VOLUME)
                if "checkpoint-" in known.read_text():
                    return "time-out"
            time.sleep(0.01)
        return None

    def _environment(self, definition, home, call):
        """The image's variables, its paths moved into the container's folder."""
        lines = self.images[definition.image_id].dockerfile_commands
        pairs = (shlex.split(line)[1].split("=", 1) for line in lines if line.startswith("ENV "))
        inside = {}
        for key, value in pairs:
            mounted = any(value.startswith(mount.mount_path) for mount in definition.volume_mounts)
            inside[key] = str(home / value.lstrip("/")) if mounted else value
        source = next(home.glob("**/composer_replication/__init__.py")).parents[1]
        python_path = [str(source), *self.environment.get("PYTHONPATH", "").split(os.pathsep)]
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            **self.environment,
            **inside,
            **self.client_environment(home.name),
            "PYTHONPATH": os.pathsep.join(python_path),
        }

    def commit(self, container, name):
        """What the container wrote or removed since it began, into the volume."""
        with self._committing:
            self._commit(container, name)

    def _commit(self, container, name):
        definition = self.definition()
        (mount,) = (m for m in definition.volume_mounts if m.volume_id == f"vo-{name}")
        working = self.root / "containers" / container / mount.mount_path.lstrip("/")
        known = self._known(container, name)
        before, after = json.loads(known.read_text()), _digests(working)
        for relative in after.keys() | before.keys():
            target = self.volume(name) / relative
            if relative not in after:
                target.unlink(missing_ok=True)
            elif before.get(relative) != after[relative]:
                target.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    target.write_bytes((working / relative).read_bytes())
        known.write_text(json.dumps(after))

    def _known(self, container, name):
        return self.root / "containers" / f"{container}.{name}.json"

    def client_environment(self, token="client"):
        return {
            "MODAL_SERVER_URL": f"http://127.0.0.1:{self.port}",
            "MODAL_TOKEN_ID": f"ak-{token}",
            "MODAL_TOKEN_SECRET": "as-x",
            "MODAL_CONFIG_PATH": "/nonexistent.toml",
            # How long who detaches waits for the last output, of 10 s.
            "MODAL_LOGS_TIMEOUT": "2",
        }


def _num_rows(runs):
    """Steps that the furthest run below the folder has written."""
    files = runs.glob("*/metrics.jsonl")
    return max((path.read_bytes().count(b"\n") for path in files), default=0)


def _read(stream, lines):
    with stream:
        lines.extend(stream)


def _digests(folder):
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _output(status, value):
    if status == RESULT.GENERIC_STATUS_SUCCESS:
        result = RESULT(status=status, data=serialize_data_format(value, pb.DATA_FORMAT_PICKLE))
    else:
        result = RESULT(status=status, exception=value, traceback="")
    return pb.FunctionGetOutputsItem(
        idx=0, input_id="in", data_format=pb.DATA_FORMAT_PICKLE, result=result
    )


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
