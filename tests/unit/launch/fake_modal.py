"""A double of Modal's API on this machine that runs the remote body for real, in processes.

It speaks the client's own protocol (`modal_proto`) and keeps what was asked of it in `calls`:
`fake_platform` answers, `fake_container_host` acts as the platform does where that matters to a
run, and this module serves both over the network.
"""

import asyncio
import contextlib
import hashlib
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpclib.server
from fake_container_host import kill
from fake_platform import BLOCK_BYTES, OK, FakeModal
from modal._utils.grpc_utils import custom_detail_codec
from modal_proto import api_pb2 as pb


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
    self.calls.append(("ImageJoinStreaming", await stream.recv_message()))
    while self.builds_long:
        await asyncio.sleep(0.05)
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
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
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
    threading.Thread(target=files.serve_forever, args=(0.05,), daemon=True).start()
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
                kill(call.process)
        stops.set()
        thread.join(5)
        files.shutdown()
        files.server_close()


def random_preemptions(seed, num_kills, most_rows, step_s):
    """Instants at which the next containers are taken away, a step before the end at the latest."""
    source = random.Random(seed)
    return [(source.randint(0, most_rows), source.uniform(0, step_s)) for _ in range(num_kills)]
