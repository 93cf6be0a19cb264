"""A double of Modal's API on this machine that runs the remote body for real, in processes.

It speaks the client's own protocol (`modal_proto`), keeps what was asked of it in `calls`, and acts
as the platform does where that matters to a run: images become environments, mounts become the
source that the container imports, volumes are copies that survive only what was committed, failed
inputs are retried, time-outs kill, and containers can be preempted.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpclib.server
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal._serialization import deserialize_data_format, serialize_data_format
from modal._utils.grpc_utils import custom_detail_codec
from modal_proto import api_grpc
from modal_proto import api_pb2 as pb

RESULT = pb.GenericResult
OK = RESULT(status=RESULT.GENERIC_STATUS_SUCCESS)
CONTAINER = Path(__file__).with_name("fake_container.py")
BLOCK_BYTES = 8 * 1024 * 1024


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
    billed_s: float = 0.0


class FakeModal(api_grpc.ModalClientBase):
    """The platform. `volumes/NAME` below `root` is what is committed."""

    def __init__(self, root, environment):
        self.root = root
        self.environment = environment
        self.calls = []
        self.functions, self.images, self.mounts, self.files = {}, {}, {}, {}
        self.blobs, self.inputs, self.tags = {}, {}, {}
        self.refusal = None
        """(RPC, status, text) that is refused."""
        self.preempt_after_s = []
        """Seconds after which the next containers are taken away."""
        self.bill = {}
        """USD by run_id, as the billing report gives them."""

    @property
    def names(self):
        return [name for name, _ in self.calls]

    def definition(self):
        """The created function."""
        (data,) = self.functions.values()
        return data.ranked_functions[0].function

    def reply(self, name, req):
        handler = getattr(self, f"on_{name}", None)
        if self.refusal is not None and self.refusal[0] == name:
            raise GRPCError(self.refusal[1], self.refusal[2])
        if handler is None:
            raise GRPCError(Status.UNIMPLEMENTED, name)
        return handler(req)

    def on_ClientHello(self, req):
        return pb.ClientHelloResponse()

    def on_AppCreate(self, req):
        self.tags = dict(req.tags)
        self.is_disconnected = False
        self.earlier_calls = set(self.inputs)
        return pb.AppCreateResponse(app_id="ap-1", app_page_url="https://modal.test/ap-1")

    def on_EnvironmentGetOrCreate(self, req):
        settings = pb.EnvironmentSettings(image_builder_version="2025.06")
        return pb.EnvironmentGetOrCreateResponse(
            environment_id="en-1", metadata=pb.EnvironmentMetadata(name="main", settings=settings)
        )

    def on_FunctionPrecreate(self, req):
        metadata = pb.FunctionHandleMetadata(
            function_name=req.function_name, function_type=req.function_type, app_id=req.app_id
        )
        return pb.FunctionPrecreateResponse(
            function_id=f"fu-{req.function_name}", handle_metadata=metadata
        )

    def on_FunctionCreate(self, req):
        single = req.function if req.HasField("function") else req.function_data
        ranked = pb.FunctionData.RankedFunction(rank=0, function=req.function)
        data = (
            req.function_data
            if req.HasField("function_data")
            else pb.FunctionData(ranked_functions=[ranked])
        )
        function_id = req.existing_function_id or f"fu-{single.function_name}"
        self.functions[function_id] = data
        metadata = pb.FunctionHandleMetadata(
            function_name=single.function_name,
            function_type=single.function_type,
            definition_id="de-1",
            app_id=req.app_id,
            supported_input_formats=single.supported_input_formats,
            supported_output_formats=single.supported_output_formats,
            function_schema=single.function_schema,
            max_object_size_bytes=2**21,
        )
        return pb.FunctionCreateResponse(
            function_id=function_id, function_data=data, handle_metadata=metadata
        )

    def on_SecretGetOrCreate(self, req):
        if req.deployment_name == "missing":
            raise GRPCError(Status.NOT_FOUND, "Secret 'missing' not found")
        return pb.SecretGetOrCreateResponse(
            secret_id=f"st-{req.deployment_name}",
            metadata=pb.SecretMetadata(name=req.deployment_name),
        )

    def on_VolumeGetOrCreate(self, req):
        metadata = pb.VolumeMetadata(name=req.deployment_name, version=pb.VOLUME_FS_VERSION_V2)
        return pb.VolumeGetOrCreateResponse(
            volume_id=f"vo-{req.deployment_name}", version=metadata.version, metadata=metadata
        )

    def on_MountGetOrCreate(self, req):
        mount_id = f"mo-{len(self.mounts)}"
        self.mounts[mount_id] = {file.filename: file.sha256_hex for file in req.files}
        metadata = pb.MountHandleMetadata(content_checksum_sha256_hex="00")
        return pb.MountGetOrCreateResponse(mount_id=mount_id, handle_metadata=metadata)

    def on_MountBatchedCheckExistence(self, req):
        missing = [digest for digest in req.sha256_hex_hashes if digest not in self.files]
        return pb.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    def on_MountPutFile(self, req):
        if req.WhichOneof("data_oneof") == "data":
            self.files[req.sha256_hex] = req.data
        return pb.MountPutFileResponse(exists=req.sha256_hex in self.files)

    def on_ImageGetOrCreate(self, req):
        image_id = f"im-{len(self.images)}"
        self.images[image_id] = req.image
        metadata = pb.ImageMetadata(image_builder_version="2025.06")
        return pb.ImageGetOrCreateResponse(image_id=image_id, result=OK, metadata=metadata)

    def on_WorkspaceNameLookup(self, req):
        return pb.WorkspaceNameLookupResponse(username="tester")

    def on_AppPublish(self, req):
        return pb.AppPublishResponse()

    def on_AppHeartbeat(self, req):
        return Empty()

    on_FunctionFinishInputs = on_AppHeartbeat

    def on_AppClientDisconnect(self, req):
        self.is_disconnected = True
        return Empty()

    def on_BlobCreate(self, req):
        blob_id = f"bl-{len(self.blobs)}"
        self.blobs[blob_id] = b""
        return pb.BlobCreateResponse(blob_id=blob_id, upload_url=f"{self.http}/blob/{blob_id}")

    def on_FunctionMap(self, req):
        (item,) = req.pipelined_inputs
        call = Call(f"fc-{len(self.inputs) + 1}", req.function_id, item.input)
        self.inputs[call.call_id] = call
        threading.Thread(target=self._carry_out, args=(call,), daemon=True).start()
        return pb.FunctionMapResponse(
            function_call_id=call.call_id,
            function_call_jwt="j",
            max_inputs_outstanding=1000,
            pipelined_inputs=[
                pb.FunctionPutInputsResponseItem(
                    idx=0, input_id=f"in-{call.call_id}", input_jwt="j"
                )
            ],
        )

    def on_FunctionGetOutputs(self, req):
        result = self.inputs[req.function_call_id].result
        if result is None:
            return pb.FunctionGetOutputsResponse(outputs=[], num_unfinished_inputs=1)
        return pb.FunctionGetOutputsResponse(idxs=[0], outputs=[result])

    def on_FunctionCallCancel(self, req):
        call = self.inputs[req.function_call_id]
        call.is_cancelled = True
        if call.process is not None:
            _kill(call.process)
        return Empty()

    def on_FunctionCallFromId(self, req):
        return pb.FunctionCallFromIdResponse(
            function_call_id=req.function_call_id,
            num_inputs=1,
            metadata=pb.FunctionCallHandleMetadata(app_id="ap-1", function_id="fu-1"),
        )

    def on_FunctionCallGetInfo(self, req):
        """Whether the call has ended, however; the client stops its logs by it."""
        result = self.inputs[req.function_call_id].result
        has_ended = pb.InputCategoryInfo(total=int(result is not None))
        return pb.FunctionCallGetInfoResponse(
            info=pb.FunctionCallInfo(total_inputs=1, succeeded_inputs=has_ended)
        )

    def on_VolumeCommit(self, req):
        """The request says which volume; its container is the one that sent its own token."""
        self._commit(self.sender, req.volume_id.removeprefix("vo-"))
        return pb.VolumeCommitResponse(skip_reload=True)

    def on_VolumeGetFile2(self, req):
        path = self._volume(req.volume_id.removeprefix("vo-")) / req.path.lstrip("/")
        if not path.is_file():
            raise GRPCError(Status.NOT_FOUND, f"{req.path} not found")
        size = path.stat().st_size
        blocks = -(-size // BLOCK_BYTES)
        urls = [f"{self.http}/file/{number}{path}" for number in range(blocks)]
        return pb.VolumeGetFile2Response(get_urls=urls, size=size, start=0, len=size)

    def listing(self, req):
        top = self._volume(req.volume_id.removeprefix("vo-"))
        start = top / req.path.strip("/")
        for path in sorted(start.rglob("*")):
            kind = pb.FileEntry.DIRECTORY if path.is_dir() else pb.FileEntry.FILE
            yield pb.FileEntry(path=str(path.relative_to(top)), type=kind, size=path.stat().st_size)

    def _volume(self, name):
        return self.root / "volumes" / name

    def _carry_out(self, call):
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
            self._volume(name).mkdir(parents=True, exist_ok=True)
            shutil.copytree(self._volume(name), home / mount.mount_path.lstrip("/"))
            self._known(home.name, name).write_text(json.dumps(_digests(self._volume(name))))
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
        lifetime_s = self.preempt_after_s.pop(0) if self.preempt_after_s else None
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
            call.process.wait(min(lifetime_s or 1e6, definition.timeout_secs))
        except subprocess.TimeoutExpired:
            _kill(call.process)
            reader.join()
            if lifetime_s is None:
                return RESULT.GENERIC_STATUS_TIMEOUT, "time-out"
            return None, None
        finally:
            call.billed_s += time.monotonic() - started_s
        reader.join()
        if not (home / "output").exists():
            return (None, None) if call.is_cancelled else (RESULT.GENERIC_STATUS_FAILURE, "it died")
        is_ok, value = pickle.loads((home / "output").read_bytes())
        for mount in definition.volume_mounts:
            self._commit(home.name, mount.volume_id.removeprefix("vo-"))
        return (RESULT.GENERIC_STATUS_SUCCESS if is_ok else RESULT.GENERIC_STATUS_FAILURE), value

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

    def _commit(self, container, name):
        """What the container wrote or removed since it began, into the volume."""
        definition = self.definition()
        (mount,) = (m for m in definition.volume_mounts if m.volume_id == f"vo-{name}")
        working = self.root / "containers" / container / mount.mount_path.lstrip("/")
        known = self._known(container, name)
        before, after = json.loads(known.read_text()), _digests(working)
        for relative in after.keys() | before.keys():
            target = self._volume(name) / relative
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
        }


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


def _kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _unary(name):
    async def handle(self, stream):
        request = await stream.recv_message()
        self.calls.append((name, request))
        self.sender = stream.metadata.get("x-modal-token-id", "").removeprefix("ak-")
        if name == "FunctionGetOutputs":
            end = time.monotonic() + min(request.timeout, 20)
            while self.inputs[request.function_call_id].result is None and time.monotonic() < end:
                await asyncio.sleep(0.05)
        await stream.send_message(self.reply(name, request))

    return handle


async def _logs(self, stream):
    """Lines of every call, from the entry that the client saw last."""
    request = await stream.recv_message()
    seen = int(request.last_entry_id or 0)
    end = time.monotonic() + min(request.timeout, 5)
    while True:
        calls = [c for name, c in self.inputs.items() if name not in self.earlier_calls]
        if request.function_call_id:
            calls = [self.inputs[request.function_call_id]]
        lines = [line for call in calls for line in call.lines]
        if len(lines) > seen:
            items = [
                pb.TaskLogs(data=line, file_descriptor=pb.FILE_DESCRIPTOR_STDOUT)
                for line in lines[seen:]
            ]
            seen = len(lines)
            await stream.send_message(pb.TaskLogsBatch(items=items, entry_id=str(seen)))
        is_over = self.is_disconnected and all(call.result for call in calls)
        if is_over:
            await stream.send_message(pb.TaskLogsBatch(app_done=True, eof=True))
        if is_over or time.monotonic() > end:
            return
        await asyncio.sleep(0.05)


async def _images(self, stream):
    await stream.recv_message()
    metadata = pb.ImageMetadata(image_builder_version="2025.06")
    await stream.send_message(pb.ImageJoinStreamingResponse(result=OK, metadata=metadata))


async def _listing(self, stream):
    entries = list(self.listing(await stream.recv_message()))
    await stream.send_message(pb.VolumeListFiles2Response(entries=entries))


async def _billing(self, stream):
    await stream.recv_message()
    for run_id, usd in self.bill.items():
        await stream.send_message(
            pb.WorkspaceBillingReportItem(object_id="ap-1", cost=str(usd), tags={"run_id": run_id})
        )


for _name in dir(FakeModal):
    if getattr(getattr(FakeModal, _name), "__isabstractmethod__", False):
        setattr(FakeModal, _name, _unary(_name))
FakeModal.AppGetLogs = _logs
FakeModal.ImageJoinStreaming = _images
FakeModal.VolumeListFiles2 = _listing
FakeModal.WorkspaceBillingReport = _billing
FakeModal.__abstractmethods__ = frozenset()


def _files(platform):
    class Files(BaseHTTPRequestHandler):
        def do_GET(self):
            number, path = self.path.removeprefix("/file/").split("/", 1)
            content = Path("/", path).read_bytes()
            block = content[int(number) * BLOCK_BYTES : (int(number) + 1) * BLOCK_BYTES]
            self.send_response(200)
            self.send_header("Content-Length", str(len(block)))
            self.end_headers()
            self.wfile.write(block)

        def do_PUT(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            platform.blobs[self.path.removeprefix("/blob/")] = content
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    return Files


@contextlib.contextmanager
def fake_modal(root, environment):
    """The platform at work, below `root`; `environment` is added to every container's."""
    platform = FakeModal(root, environment)
    files = ThreadingHTTPServer(("127.0.0.1", 0), _files(platform))
    platform.http = f"http://127.0.0.1:{files.server_address[1]}"
    threading.Thread(target=files.serve_forever, daemon=True).start()
    is_up, stops = threading.Event(), threading.Event()

    async def serve():
        server = grpclib.server.Server([platform], status_details_codec=custom_detail_codec)
        await server.start("127.0.0.1", 0)
        platform.port = server._server.sockets[0].getsockname()[1]
        is_up.set()
        await asyncio.get_running_loop().run_in_executor(None, stops.wait)
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert is_up.wait(10)
    try:
        yield platform
    finally:
        for call in platform.inputs.values():
            call.is_cancelled = True
            if call.process is not None:
                _kill(call.process)
        stops.set()
        thread.join(5)
        files.shutdown()
        files.server_close()


def random_instants(seed, num_kills, longest_s):
    """Seconds after which each of the next containers is taken away."""
    source = random.Random(seed)
    return [source.uniform(0.3, longest_s) for _ in range(num_kills)]
