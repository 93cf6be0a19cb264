"""What the platform of `fake_modal` answers to each call of Modal's client, and what it notes."""

import threading

from fake_container_host import RESULT, Call, ContainerHost, kill
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_grpc
from modal_proto import api_pb2 as pb

OK = RESULT(status=RESULT.GENERIC_STATUS_SUCCESS)
BLOCK_BYTES = 8 * 1024 * 1024


class FakeModal(ContainerHost, api_grpc.ModalClientBase):
    """The platform: a method for each RPC, by its name."""

    def __init__(self, root, environment):
        super().__init__(root, environment)
        self.calls = []
        self.tags = {}
        self.variants = []
        """Options of the variants of a function that were asked for."""
        self.refusal = None
        """(RPC, status, text) that is refused."""
        self.lost = set()
        """RPCs that are carried out and whose answer does not arrive."""
        self.outage = {}
        """How often each RPC is not answered from now on."""
        self.builds_long = False
        """Whether images are never done."""
        self.bill = {}
        """USD by run_id, as the billing report gives them."""

    @property
    def names(self):
        return [name for name, _ in self.calls]

    def reply(self, name, req):
        handler = getattr(self, f"on_{name}", None)
        if self.refusal is not None and self.refusal[0] == name:
            raise GRPCError(self.refusal[1], self.refusal[2])
        if self.outage.get(name, 0) > 0:
            self.outage[name] -= 1
            raise GRPCError(Status.UNAVAILABLE, "the network is away")
        if handler is None:
            raise GRPCError(Status.UNIMPLEMENTED, name)
        answer = handler(req)
        if name in self.lost:
            raise GRPCError(Status.FAILED_PRECONDITION, "boom")
        return answer

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
        metadata = _handle(
            single,
            definition_id="de-1",
            app_id=req.app_id,
            function_schema=single.function_schema,
        )
        return pb.FunctionCreateResponse(
            function_id=function_id, function_data=data, handle_metadata=metadata
        )

    def on_FunctionBindParams(self, req):
        """A variant of the function, such as on another card."""
        self.variants.append(req.function_options)
        return pb.FunctionBindParamsResponse(
            bound_function_id=f"{req.function_id}-{len(self.variants)}",
            handle_metadata=_handle(self.definition()),
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
        result = None if self.builds_long else OK
        return pb.ImageGetOrCreateResponse(image_id=image_id, result=result, metadata=metadata)

    def on_WorkspaceNameLookup(self, req):
        return pb.WorkspaceNameLookupResponse(username="tester")

    def on_AppPublish(self, req):
        return pb.AppPublishResponse()

    def on_AppHeartbeat(self, req):
        return Empty()

    on_FunctionFinishInputs = on_AppHeartbeat

    def on_AppGetByDeploymentName(self, req):
        """The client takes `ap-1` for a name: ids are longer."""
        return pb.AppGetByDeploymentNameResponse(app_id=req.name)

    def on_AppStop(self, req):
        for call in self.inputs.values():
            call.is_cancelled = True
            if call.process is not None:
                kill(call.process)
        return Empty()

    def on_AppClientDisconnect(self, req):
        self.is_disconnected = True
        return Empty()

    def on_BlobCreate(self, req):
        blob_id = f"bl-{len(self.blobs)}"
        self.blobs[blob_id] = b""
        urls = pb.UploadUrlList(items=[f"{self.http}/blob/{blob_id}"])
        return pb.BlobCreateResponse(blob_ids=[blob_id], upload_urls=urls)

    def on_FunctionMap(self, req):
        (item,) = req.pipelined_inputs
        call = Call(f"fc-{len(self.inputs) + 1}", req.function_id, item.input)
        self.inputs[call.call_id] = call
        threading.Thread(target=self.carry_out, args=(call,), daemon=True).start()
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
            kill(call.process)
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
        self.commit(self.sender, req.volume_id.removeprefix("vo-"))
        return pb.VolumeCommitResponse(skip_reload=True)

    def on_VolumeGetFile2(self, req):
        path = self.volume(req.volume_id.removeprefix("vo-")) / req.path.lstrip("/")
        if not path.is_file():
            raise GRPCError(Status.NOT_FOUND, f"{req.path} not found")
        size = path.stat().st_size
        blocks = -(-size // BLOCK_BYTES)
        urls = [f"{self.http}/file/{number}{path}" for number in range(blocks)]
        return pb.VolumeGetFile2Response(get_urls=urls, size=size, start=0, len=size)

    def listing(self, req):
        top = self.volume(req.volume_id.removeprefix("vo-"))
        start = top / req.path.strip("/")
        for path in sorted(start.rglob("*")):
            kind = pb.FileEntry.DIRECTORY if path.is_dir() else pb.FileEntry.FILE
            yield pb.FileEntry(path=str(path.relative_to(top)), type=kind, size=path.stat().st_size)


def _handle(definition, **others):
    """What a function's answers say of it."""
    return pb.FunctionHandleMetadata(
        function_name=definition.function_name,
        function_type=definition.function_type,
        supported_input_formats=definition.supported_input_formats,
        supported_output_formats=definition.supported_output_formats,
        max_object_size_bytes=2**21,
        **others,
    )
