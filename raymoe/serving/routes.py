"""The HTTP routes: OpenAI's, /health, and raymoe's own status."""

import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from raymoe.serving.answers import Answer, Answering
from raymoe.serving.guard import PAGE_FILES, Guard
from raymoe.serving.openai_answers import ChatAnswer, CompletionAnswer, Piece
from raymoe.serving.openai_api import ApiError, Budgets, ChatRequest, CompletionRequest, parse_request

_PAGE = Path(__file__).parent / "page"

logger = logging.getLogger("raymoe.serving")


def create_api(answering: Answering) -> FastAPI:
    """The ASGI application; what it does is in `Answering`."""
    # FastAPI's own pages about the API load their scripts from elsewhere
    about = "OpenAI's API over a Mixture-of-Experts model"
    api = FastAPI(title="raymoe", description=about, docs_url=None, redoc_url=None)
    api.add_middleware(Guard, answering=answering)
    api.exception_handler(ApiError)(_api_error)
    api.exception_handler(HTTPException)(_http_error)
    api.exception_handler(Exception)(_internal_error)
    model = {"id": answering.model, "object": "model", "created": 0, "owned_by": "raymoe"}

    @api.post("/v1/completions", openapi_extra=_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        asked = parse_request(CompletionRequest, await _read_body(request, answering.config.max_body_bytes))
        return await _respond(answering, asked, CompletionAnswer)

    @api.post("/v1/chat/completions", openapi_extra=_body(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        asked = parse_request(ChatRequest, await _read_body(request, answering.config.max_body_bytes))
        return await _respond(answering, asked, ChatAnswer)

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @api.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != answering.model:
            raise ApiError(f"The model '{name}' does not exist", status=404, param="model", code="model_not_found")
        return model

    @api.get("/health")
    async def health() -> Response:
        engines = await answering.engine.status()
        alive = sum(engine["is_alive"] for engine in engines)
        is_ok = alive > 0
        return JSONResponse(
            {"status": "ok" if is_ok else "unavailable", "engines": alive}, status_code=200 if is_ok else 503
        )

    @api.post("/v1/raymoe/budgets", openapi_extra=_body(Budgets))
    async def budgets(request: Request) -> dict[str, Any]:
        """Changes the budgets of all engines that run now; one that is started later has those of the configuration."""
        asked = parse_request(Budgets, await _read_body(request, answering.config.max_body_bytes))
        await answering.engine.set_budgets(asked.model_dump(exclude_none=True))
        return {"model": answering.model, "engines": await answering.engine.status()}

    for path, (file, media_type) in PAGE_FILES.items():
        api.add_api_route(path, _file(file, media_type), include_in_schema=False)

    @api.get("/v1/raymoe/status")
    async def status(history: bool = False) -> dict[str, Any]:
        """Every engine's facts and counters; `history=true` adds the cache's seconds, for a plot."""
        return {"model": answering.model, "engines": await answering.engine.status(history=history)}

    @api.get("/metrics")
    async def metrics() -> Response:
        """Where the metrics are: a scraper that is pointed here finds none, and its reader finds out why."""
        endpoints = answering.engine.metrics_endpoints()
        lines = ["# raymoe's metrics (raymoe_serve_*) are exported by Ray, at one address a node:", *endpoints]
        return PlainTextResponse("\n# ".join(lines) + "\n")

    return api


async def _respond(
    answering: Answering, asked: CompletionRequest | ChatRequest, kind: type[CompletionAnswer]
) -> Response:
    answer = await answering.start(asked)
    form = kind(
        uuid.uuid4().hex,
        answering.model,
        tells_logprobs=asked.num_logprobs is not None,
        tells_usage=asked.wants_usage,
    )
    if asked.stream:
        return StreamingResponse(
            _stream(answer, form, asked.wants_usage),
            media_type="text/event-stream",
            # proxies on the way must not gather the events
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    try:
        choices = await answer.whole()
    finally:
        await answer.close()
    return JSONResponse(form.whole(choices, answer.usage))


async def _stream(answer: Answer, form: CompletionAnswer, wants_usage: bool) -> AsyncIterator[str]:
    try:
        for index in range(answer.num_choices):
            opening = form.opening(index)
            if opening is not None:
                yield _event(opening)
        async with aclosing(answer.pieces()) as pieces:
            async for index, piece in pieces:
                if piece.text or piece.likelihoods or piece.routes:
                    yield _event(form.chunk(index, piece._replace(finish_reason=None)))
                if piece.finish_reason is not None:
                    yield _event(form.chunk(index, Piece("", piece.finish_reason, [])))
        if wants_usage:
            yield _event(form.usage_chunk(answer.usage))
    except ApiError as error:
        # the status line is out already
        yield _event(error.body)
    finally:
        await answer.close()
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _file(name: str, media_type: str) -> Callable[[], Awaitable[Response]]:
    text = (_PAGE / name).read_text(encoding="utf-8")
    # nothing from elsewhere, and no script but the page's own
    headers = {
        "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
    }

    async def answer() -> Response:
        return Response(text, media_type=media_type, headers=headers)

    return answer


async def _read_body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise ApiError(f"the request body is larger than {max_bytes} bytes (max_body_bytes)", status=413)
    return bytes(body)


def _body(schema: type[CompletionRequest | ChatRequest | Budgets]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema.model_json_schema(mode="serialization")}}
    return {"requestBody": {"required": True, "content": content}}


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    found = ApiError(f"{error.detail}: {request.method} {request.url.path}", status=error.status_code)
    return JSONResponse(found.body, status_code=found.status, headers=error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    found = ApiError("internal error; the server's log has the details", status=500, kind="server_error")
    return JSONResponse(found.body, status_code=found.status)
