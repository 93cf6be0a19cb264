"""Modal: the function made from a spec, its calls, and what comes back; alone imports modal."""

import contextlib
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import modal
import modal.config
import modal.exception

from composer_replication.errors import (
    ComposerError,
    InputError,
    LaunchError,
    UnreachableError,
)
from composer_replication.launch.container import run_attempt
from composer_replication.launch.function_spec import (
    APP_NAME,
    CACHE_VOLUME,
    RUNS_VARIABLE,
    RUNS_VOLUME,
    FunctionSpec,
)
from composer_replication.launch.modal_errors import (
    SETUP_REMEDY,
    explain_modal_error,
    silent,
    unreachable,
)
from composer_replication.runs.atomic_files import temporary_name
from composer_replication.runs.process_age import cold_start_s

PROBE_TIMEOUT_S = 5.0
"""The client itself gives up after about a minute."""

_NO_SOURCE = ("**/__pycache__", "**/*.pyc")
"""The default leaves out whatever is not Python, and with it prices, schemas and data."""

_HOUR_S = 3600.0

_LONGEST_BOOT_S = 120.0
"""Of a container's process; a clock that says more is not believed, as it makes dollars."""

_POLL_S = 2.0
PATIENCE_S = 600.0
"""How long a network may be away while a run goes on."""


def run_in_container(payload: dict[str, object]) -> dict[str, object]:
    """The remote body: one attempt at a job, its files committed to the volumes as it goes."""
    booted_s = time.time() - min(cold_start_s() or 0.0, _LONGEST_BOOT_S)
    volumes = [modal.Volume.from_name(name) for name in (RUNS_VOLUME, CACHE_VOLUME)]

    def commit() -> None:
        for volume in volumes:
            try:
                volume.commit()
            except (modal.exception.Error, RuntimeError) as error:
                # The platform also commits by itself; a run need not end over one that failed.
                print(f"note  a volume was not committed: {error}", flush=True)  # noqa: T201

    runs = Path(os.environ[RUNS_VARIABLE])
    return run_attempt(payload, runs=runs, commit=commit, booted_s=booted_s)


@dataclass(frozen=True, slots=True)
class RemoteFunction:
    """A created function, ready for calls.

    Example:
        >>> with launched(spec) as remote:
        ...     result = wait_for(remote.spawn(job.to_payload()))
    """

    app_id: str
    url: str
    function: Any
    """Modal's own object, whose type depends on the body's."""

    def spawn(self, payload: Mapping[str, object]) -> str:
        """Start one call and return its id, which outlives this process."""
        with explained():
            return cast("str", self.function.spawn(dict(payload)).object_id)


def build(spec: FunctionSpec) -> tuple[modal.App, Any]:
    """The app and the function of a spec; nothing is sent."""
    image = modal.Image.debian_slim(python_version=spec.image.python_version)
    image = image.uv_pip_install(*spec.image.packages)
    if spec.image.packages_without_dependencies:
        image = image.uv_pip_install(
            *spec.image.packages_without_dependencies, extra_options="--no-deps"
        )
    image = image.env(dict(spec.image.environment))
    image = image.add_local_python_source(spec.image.source, ignore=list(_NO_SOURCE))
    volumes = {
        path: modal.Volume.from_name(name, create_if_missing=True, version=2)
        for path, name in spec.volumes.items()
    }
    app = modal.App(APP_NAME, tags=dict(spec.tags))
    with explained():
        function = app.function(
            image=image,
            gpu=spec.gpu,
            cpu=spec.cpu_cores,
            memory=spec.memory_mib,
            timeout=spec.timeout_s,
            retries=modal.Retries(max_retries=spec.retries, initial_delay=1.0),
            volumes=cast("dict[str | Any, Any]", volumes),
            secrets=[
                modal.Secret.from_name(name, required_keys=["HF_TOKEN"]) for name in spec.secrets
            ],
            region=spec.region,
            max_containers=spec.max_containers,
            # Without it a container idles for a minute after its run, which is billed.
            single_use_containers=True,
            include_source=False,
        )(run_in_container)
    return app, function


@contextlib.contextmanager
def launched(spec: FunctionSpec, *, shows_output: bool = True) -> Iterator[RemoteFunction]:
    """Create the function; its calls outlive this block, and its output is shown while in it.

    Raises:
        InputError: credentials that are missing or wrong, a card or a secret that does not exist.
        LaunchError: Modal cannot be reached, or refuses.
    """
    check_credentials()
    check_reachable()
    with explained():
        app, function = build(spec)
    output = modal.enable_output() if shows_output else contextlib.nullcontext()
    with explained(), output, app.run(detach=True):
        assert app.app_id is not None, "a running app has an id"
        yield RemoteFunction(app.app_id, app.get_dashboard_url(), function)


def wait_for(
    call_id: str, timeout_s: float = math.inf, *, stops: threading.Event | None = None
) -> dict[str, object]:
    """What the call returned, once it has; a network that is away for a while is waited for.

    Args:
        call_id: of the call.
        timeout_s: the longest wait.
        stops: ends the wait.

    Raises:
        TimeoutError: it has not returned after `timeout_s`, or `stops` is set.
        UnreachableError: nobody answers; the call may go on.
        ComposerError: how it ended instead, in words.
    """
    started_s = answered_s = time.monotonic()
    while True:
        try:
            with explained():
                call = modal.FunctionCall.from_id(call_id)
                return cast("dict[str, object]", call.get(timeout=min(_POLL_S, timeout_s)))
        except TimeoutError:
            answered_s = time.monotonic()
            is_stopped = stops is not None and stops.is_set()
            if is_stopped or answered_s - started_s >= timeout_s:
                raise
        except UnreachableError as error:
            silent_s = time.monotonic() - answered_s
            if silent_s >= min(PATIENCE_S, timeout_s) or (stops is not None and stops.is_set()):
                raise silent(silent_s) from error
            time.sleep(_POLL_S)


def cancel(call_id: str) -> None:
    """End a call and its container."""
    check_credentials()
    check_reachable()
    with explained():
        modal.FunctionCall.from_id(call_id).cancel(terminate_containers=True)


def stop_app(app_id: str) -> None:
    """End an app and every container of it.

    Raises:
        LaunchError: Modal refused.
    """
    check_credentials()
    check_reachable()
    command = [sys.executable, "-m", "modal", "app", "stop", app_id, "--yes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LaunchError(
            f"Modal did not stop {app_id}: {' '.join(done.stderr.split())[-300:]} What it runs "
            "costs on: end it at modal.com/apps."
        )


def stream_logs(call_id: str) -> Iterator[str]:
    """What the call has printed and prints, until it ends."""
    check_credentials()
    check_reachable()
    with explained():
        for entry in modal.FunctionCall.from_id(call_id).logs.stream():
            yield entry.message


def fetch_run(job_id: str, folder: Path) -> int:
    """Bring the committed run directory of a job home; returns how many files it has.

    Raises:
        InputError: the volume holds no such run.
    """
    check_credentials()
    check_reachable()
    with explained():
        volume = modal.Volume.from_name(RUNS_VOLUME)
        entries = [entry for entry in volume.iterdir(job_id) if entry.type.name == "FILE"]
        num_files = 0
        for entry in entries:
            relative = Path(entry.path.lstrip("/")).relative_to(job_id)
            if relative.name.startswith(".lock"):
                continue
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(temporary_name(target.name))
            with aside.open("wb") as file:
                for chunk in volume.read_file(entry.path):
                    file.write(chunk)
            aside.replace(target)
            num_files += 1
    if num_files == 0:
        raise InputError(
            f"The volume {RUNS_VOLUME} holds nothing of {job_id} yet. It is written when the run "
            "has begun: look at it with `composer-replication runs logs ID`."
        )
    return num_files


def billed_usd(run_id: str, since_s: float) -> float | None:
    """What Modal has billed under that tag; None where it says nothing yet.

    Whole hours are reported: until the hour is over in which the run ended, a part is missing.
    """
    start = datetime.fromtimestamp(since_s, UTC).replace(minute=0, second=0, microsecond=0)
    end = datetime.now(UTC) + timedelta(seconds=_HOUR_S)
    try:
        workspace = modal.Workspace.from_context()
        items = workspace.billing.report(start=start, end=end, resolution="h", tag_names=["run_id"])
        costs = [float(item.cost) for item in items if item.tags.get("run_id") == run_id]
    except modal.exception.Error:
        return None
    return sum(costs) if costs else None


def check_credentials() -> None:
    """Refuse to go on without credentials; asks no one.

    Raises:
        InputError: there are none, or half of them.
    """
    get = modal.config.config.get
    if (get("token_id") and get("token_secret")) or get("oauth_client_id"):
        return
    raise InputError(f"There are no Modal credentials on this machine. {SETUP_REMEDY}")


def check_reachable() -> None:
    """Try the address once, since the client itself would try for a minute.

    Raises:
        LaunchError: nothing answers.
    """
    url = urlsplit(cast("str", modal.config.config.get("server_url")))
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname, port), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise unreachable(f"{url.hostname}:{port}: {error}") from None


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Modal's errors as ours."""
    try:
        yield
    except ComposerError:
        raise
    except Exception as error:
        ours = explain_modal_error(error)
        if ours is None:
            raise
        raise ours from error
