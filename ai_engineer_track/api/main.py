"""The service: the routes, the limits around them and the web page, put together.

    python -m ai_engineer_track serve          then open http://127.0.0.1:8000

What a person may see of an error is one sentence and the id of the request; the traceback stays in the log.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException

from ai_engineer_track.api import chat, feedback, health, openai_compatible, review, search, sessions
from ai_engineer_track.api.limits import Gate, Guard, RateLimit, error_body, log
from ai_engineer_track.api.service import Assistant, Index, Retriever, Service
from ai_engineer_track.inference import Servers
from ai_engineer_track.settings import AiSettings
from shared.errors import UserError
from shared.feedback import FeedbackStore
from shared.foreign import allowed_hosts
from shared.outcomes import OutcomeStore

WEB = Path(__file__).resolve().parent.parent / "web"
#: JSON may spell a character in up to twelve bytes, and a client of the OpenAI API sends the whole conversation each time
BYTES_PER_CHAR = 32


def create_app(
    settings: AiSettings,
    assistant: Assistant | None = None,
    index: Index | None = None,
    retriever: Retriever | None = None,
    servers: Servers | None = None,
) -> FastAPI:
    """The application. Without an `assistant` the real one is opened at start-up, with index, retriever and models.

    With `servers` it serves the published versions itself, and follows what is published (rollout.py).

    When it cannot be opened (no index yet, for instance) the service still runs, and says so in `/ready`.
    """
    service = Service(
        settings=settings,
        sessions=sessions.SessionStore(settings.artifacts / "service" / "sessions.sqlite"),
        feedback=FeedbackStore(settings.artifacts / "feedback"),
        outcomes=OutcomeStore(settings.artifacts / "feedback"),
        gate=Gate(settings.api.concurrency, settings.artifacts / "service" / "working.lock"),
        rate=RateLimit(settings.api.rate_per_minute),
        assistant=assistant,
        index=index,
        retriever=retriever,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if assistant is None:
                from ai_engineer_track.assistant import open_assistant  # loads torch

                try:
                    opened = await stack.enter_async_context(open_assistant(settings, servers))
                    service.assistant, service.index, service.retriever = opened, opened.index, opened
                except UserError as error:
                    service.broken = f"The assistant cannot answer yet: {error.what}."
                    log.error("%s", error)
            yield
        service.sessions.close()
        service.gate.close()

    # The built-in documentation pages load scripts from elsewhere; /openapi.json describes the API.
    app = FastAPI(title="Two engineers, one model", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    for module in (chat, sessions, search, feedback, review, health, openai_compatible):
        app.include_router(module.router)
    app.add_api_route("/", page, include_in_schema=False, response_class=FileResponse)
    app.add_api_route("/review", _file("review.html"), include_in_schema=False, response_class=FileResponse)
    for name in ("app.js", "page.js", "review.js", "style.css", "review.css", "icon.svg"):
        app.add_api_route(f"/{name}", _file(name), include_in_schema=False, response_class=FileResponse)
    token = settings.api.token.get_secret_value() if settings.api.token else None
    app.add_middleware(
        Guard,
        token=token,
        max_bytes=BYTES_PER_CHAR * settings.api.max_chars,
        hosts=allowed_hosts(settings.api.host),
        count=service.meters.count_request,
        refuse=lambda why: service.meters.refused.labels(why).inc(),
    )
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _not_understood)
    app.add_exception_handler(UserError, _cannot)
    return app


async def page(client: sessions.ClientDep, response: Response) -> FileResponse:
    """The web page; it comes with the cookie that makes this browser's conversations its own."""
    return FileResponse(WEB / "index.html", headers={**response.headers, "Cache-Control": "no-cache"})


def _file(name: str):  # type: ignore[no-untyped-def]
    async def file() -> FileResponse:
        return FileResponse(WEB / name, headers={"Cache-Control": "no-cache"})

    return file


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404 and message == "Not Found":
        message = "There is nothing at this address."
    if error.status_code == 405:
        message = f"{request.method} is not possible here."
    if error.status_code == 429:
        request.app.state.service.meters.refused.labels("rate").inc()
    return JSONResponse(error_body(error.status_code, message), error.status_code, headers=error.headers)


async def _not_understood(request: Request, error: Exception) -> JSONResponse:
    """One sentence about the first problem; what was sent is not repeated."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        message = "The request is not valid JSON."
    else:
        where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        message = f"{where}: {first['msg']}."
    return JSONResponse(error_body(422, message), 422)


async def _cannot(request: Request, error: Exception) -> JSONResponse:
    log.error("%s", error)
    assert isinstance(error, UserError)
    return JSONResponse(error_body(503, f"The service cannot do that right now: {error.what}."), 503)
