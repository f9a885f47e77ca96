"""The gRPC methods of the gateway, which Serve's gRPC proxy calls by their names: `generation.proto`."""

import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from ipaddress import ip_address
from typing import Any

import grpc
from ray.serve.grpc_util import RayServegRPCContext

from raymoe.serving import generation_pb2 as pb
from raymoe.serving.answers import Answer, Answering
from raymoe.serving.guard import bearer, check_key
from raymoe.serving.logprobs import Likelihood
from raymoe.serving.openai_answers import Piece, Usage
from raymoe.serving.openai_api import ApiError, ChatRequest, CompletionRequest, check_request

SERVICERS = ("raymoe.serving.generation_pb2_grpc.add_GenerationServicer_to_server",)
"""For `grpc_options.grpc_servicer_functions` of Serve."""

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}

logger = logging.getLogger("raymoe.serving")


class GenerationMethods:
    """Mixed into the gateway's class."""

    _answering: Answering

    async def Complete(self, request: pb.CompleteRequest, grpc_context: RayServegRPCContext) -> pb.Answer:
        with self._told(grpc_context):
            return await self._whole(_completion(request, self._admit(request, grpc_context)))

    async def StreamComplete(
        self, request: pb.CompleteRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.Chunk, None]:
        with self._told(grpc_context):
            asked = _completion(request, self._admit(request, grpc_context) | {"stream": True})
            async with aclosing(self._chunks(asked)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def Chat(self, request: pb.ChatRequest, grpc_context: RayServegRPCContext) -> pb.Answer:
        with self._told(grpc_context):
            return await self._whole(_chat(request, self._admit(request, grpc_context)))

    async def StreamChat(
        self, request: pb.ChatRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.Chunk, None]:
        with self._told(grpc_context):
            asked = _chat(request, self._admit(request, grpc_context) | {"stream": True})
            async with aclosing(self._chunks(asked)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def Models(self, request: pb.ModelsRequest, grpc_context: RayServegRPCContext) -> pb.ModelsReply:
        with self._told(grpc_context):
            self._check_caller(grpc_context)
            return pb.ModelsReply(models=[self._answering.model])

    def _admit(self, request: pb.CompleteRequest | pb.ChatRequest, context: RayServegRPCContext) -> dict[str, Any]:
        """The arguments that both kinds of request share, of a caller who may ask. Raises: ApiError."""
        self._check_caller(context)
        config = self._answering.config
        if request.ByteSize() > config.max_body_bytes:
            raise ApiError(f"the request is larger than {config.max_body_bytes} bytes (max_body_bytes)", status=413)
        given = {field.name: value for field, value in request.sampling.ListFields()}
        return given | {"model": request.model} | ({"stop": list(given["stop"])} if "stop" in given else {})

    def _check_caller(self, context: RayServegRPCContext) -> None:
        config = self._answering.config
        check_peer(context.peer(), config.host)
        metadata = {str(name): str(value) for name, value in context.invocation_metadata()}
        check_key(bearer(metadata), config.api_keys + config.admin_keys)

    async def _whole(self, asked: CompletionRequest | ChatRequest) -> pb.Answer:
        answer = await self._answering.start(asked)
        try:
            choices = [_choice(index, piece) for index, piece in enumerate(await answer.whole())]
        finally:
            await answer.close()
        return pb.Answer(model=self._answering.model, choices=choices, usage=_usage(answer.usage))

    async def _chunks(self, asked: CompletionRequest | ChatRequest) -> AsyncGenerator[pb.Chunk, None]:
        answer: Answer = await self._answering.start(asked)
        try:
            async with aclosing(answer.pieces()) as pieces:
                async for index, piece in pieces:
                    yield pb.Chunk(choice=_choice(index, piece))
            yield pb.Chunk(usage=_usage(answer.usage))
        finally:
            await answer.close()

    @contextmanager
    def _told(self, context: RayServegRPCContext) -> Iterator[None]:
        """Errors become status codes; Serve's proxy takes them from the context of a call that raises."""
        try:
            yield
        except ApiError as error:
            context.set_code(_CODES.get(error.status, grpc.StatusCode.INTERNAL))
            context.set_details(error.body["error"]["message"])
            raise
        except Exception as error:
            logger.error("a gRPC call failed", exc_info=error)
            context.set_code(grpc.StatusCode.INTERNAL)
            context.set_details("internal error; the server's log has the details")
            raise


def check_peer(peer: str, host: str) -> None:
    """Serve's gRPC proxy listens at all addresses: where only this machine is to be served, others are refused.

    Args:
        peer: as gRPC names it, e.g. "ipv4:127.0.0.1:5000" or "ipv6:[::1]:5000".

    Raises: ApiError.
    """
    if not (host == "localhost" or ip_address(host).is_loopback) or peer.startswith("unix:"):
        return
    address = peer.split(":", 1)[1].rpartition(":")[0].replace("%5B", "[").replace("%5D", "]").strip("[]")
    found = ip_address(address)
    if not (getattr(found, "ipv4_mapped", None) or found).is_loopback:
        raise ApiError(
            f"this server is for {host} only; set host in the application's arguments (0.0.0.0 for all addresses)",
            status=403,
        )


def _completion(request: pb.CompleteRequest, shared: dict[str, Any]) -> CompletionRequest:
    kind = request.WhichOneof("prompt")
    prompt = {} if kind is None else {"prompt": request.text if kind == "text" else list(request.tokens.ids)}
    return check_request(CompletionRequest, shared | prompt | {"echo": request.echo})


def _chat(request: pb.ChatRequest, shared: dict[str, Any]) -> ChatRequest:
    if "logprobs" in shared:
        shared |= {"logprobs": True, "top_logprobs": shared["logprobs"]}
    messages = [{"role": message.role, "content": message.content} for message in request.messages]
    return check_request(ChatRequest, shared | {"messages": messages})


def _choice(index: int, piece: Piece) -> pb.Choice:
    told = [_logprob(one) for one in piece.likelihoods]
    return pb.Choice(index=index, text=piece.text, finish_reason=piece.finish_reason or "", logprobs=told)


def _logprob(one: Likelihood) -> pb.TokenLogprob:
    top = [pb.Likely(text=token.text, logprob=logprob) for token, logprob in one.top]
    return pb.TokenLogprob(text=one.token.text, logprob=one.logprob, top=top)


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)
