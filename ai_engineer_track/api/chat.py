"""POST /chat: one message in, one turn out, whole as JSON or as a stream of events while it is made.

    curl -N -H 'Accept: text/event-stream' --json '{"message": "What helps against a migraine?"}' localhost:8000/chat

Events of the stream, each with JSON data: `step` (a part of the work began or ended), `delta` (the next piece of the text, or
all of it anew with `replace`), `citation`, `question`, `verdict`, then `done` with the whole exchange, or `error`. The text
is only final with `done`: an answer that fails the check on it is withdrawn by a `delta` with `replace`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from opentelemetry import trace
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from ai_engineer_track.api.feedback import record_automatically, record_outcome
from ai_engineer_track.api.limits import OUR_FAULT, error_body, log, request_id
from ai_engineer_track.api.service import Service, ServiceDep
from ai_engineer_track.api.sessions import NO_SUCH, ClientDep, Exchange, address_of
from ai_engineer_track.turn import Event, Turn
from shared.errors import UserError

T = TypeVar("T")
PING_SECONDS = 15.0  # proxies drop a silent connection after 30 to 60 s
router = APIRouter(tags=["chat"])
tracer = trace.get_tracer("ai_engineer_track.api")
EVENT_NAMES = {
    "started": "step",
    "finished": "step",
    "text": "delta",
    "citation": "citation",
    "verdict": "verdict",
    "warning": "warning",
}


class ChatRequest(BaseModel):
    """`session_id` continues a conversation; without one a new conversation begins."""

    model_config = ConfigDict(extra="forbid")
    message: str = Field(min_length=1)
    session_id: str | None = Field(default=None, max_length=64)


@router.post(
    "/chat", response_model=Exchange, responses={200: {"content": {"text/event-stream": {}}, "description": "The exchange"}}
)
async def chat(body: ChatRequest, request: Request, response: Response, service: ServiceDep, client: ClientDep) -> Any:
    """Answer a message. The reply names the conversation, for the next message, and the answer, for feedback."""
    service.need_assistant()
    service.rate.take(address_of(request))
    message = clean(body.message, service.settings.api.max_chars)
    session_id = body.session_id
    if session_id is None:
        session_id = await run_in_threadpool(service.sessions.begin, client)
    elif not await run_in_threadpool(service.sessions.belongs, session_id, client):
        raise HTTPException(404, NO_SUCH)
    if "text/event-stream" not in request.headers.get("accept", ""):
        return await start(service, session_id, message)
    events: asyncio.Queue[Event] = asyncio.Queue()
    task = start(service, session_id, message, on_event=across_threads(events))
    headers = {**dict(response.headers), "X-Session-ID": session_id, "X-Accel-Buffering": "no"}  # carries the cookie, too
    return StreamingResponse(stream(task, events), media_type="text/event-stream", headers=headers)


def clean(message: str, max_chars: int) -> str:
    """The message without control characters. HTTPException when nothing is left, or too much."""
    message = "".join(c for c in message if c in "\n\t" or c.isprintable() or c.isspace()).strip()
    if not message:
        raise HTTPException(422, "The message is empty. Write what you would like to know.")
    if len(message) > max_chars:
        raise HTTPException(413, f"The message is too long: {len(message):,} characters, at most {max_chars:,} are read.")
    return message


def start(
    service: Service, session_id: str, message: str, on_event: Callable[[Event], None] | None = None
) -> asyncio.Task[Exchange]:
    """Begin to answer a message of a conversation that is kept. HTTPException when there is no place."""

    async def work() -> Exchange:
        exchange = await answer(service, session_id, message, on_event)
        try:
            earlier = await run_in_threadpool(service.sessions.history, session_id)
            await run_in_threadpool(service.sessions.add, exchange)
            await run_in_threadpool(record_automatically, service, exchange, earlier)
        except Exception:  # a full disk must not cost a person their answer
            log.exception("request %s: the answer was given but could not be stored", request_id.get())
        return exchange

    return take_place(service, session_id, work())


def take_place(service: Service, session_id: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """`work` as a task that gives its place back however it ends. HTTPException when there is no place."""
    try:
        service.gate.enter(session_id)
    except HTTPException:
        work.close()
        service.meters.refused.labels("concurrency").inc()
        raise
    service.meters.working.inc()
    task = asyncio.create_task(work)

    def ended(_: object) -> None:
        service.gate.leave(session_id)
        service.meters.working.dec()

    task.add_done_callback(ended)
    return task


async def answer(service: Service, session_id: str, message: str, on_event: Callable[[Event], None] | None = None) -> Exchange:
    """One turn, traced and counted."""
    began = time.perf_counter()
    first_text: float | None = None

    def seen(event: Event) -> None:
        nonlocal first_text
        if event.type == "text" and first_text is None:
            first_text = time.perf_counter() - began
        if on_event is not None:
            on_event(event)

    answer_id = "a-" + secrets.token_hex(12)

    def other(turn: Turn, seconds: float) -> None:
        try:
            record_outcome(service, answer_id, turn, seconds)
        except UserError as error:  # as below: a full disk must not cost a person their answer
            log.error("%s", error)

    with tracer.start_as_current_span("chat", attributes={"request.id": request_id.get(), "answer.id": answer_id}) as span:
        turn: Turn = await service.need_assistant().run_turn(session_id, message, seen, other)
        span.set_attributes({"gen_ai.response.model": turn.model_version, "arm": turn.arm})
    seconds = time.perf_counter() - began
    service.meters.count_turn(turn, seconds)
    service.meters.first_text_seconds.observe(first_text or seconds)
    try:
        await run_in_threadpool(record_outcome, service, answer_id, turn, seconds)
    except Exception:  # as below: a full disk must not cost a person their answer
        log.exception("request %s: its outcome could not be stored", request_id.get())
    return Exchange(
        answer_id=answer_id, session_id=session_id, created=time.time(), message=message, seconds=round(seconds, 3), turn=turn
    )


def across_threads(events: asyncio.Queue[Event]) -> Callable[[Event], None]:
    """Puts events into the queue in order, from whichever thread a step of the assistant runs in."""
    loop = asyncio.get_running_loop()
    return lambda event: loop.call_soon_threadsafe(events.put_nowait, event)  # type: ignore[return-value]


async def stream(task: asyncio.Task[Exchange], events: asyncio.Queue[Event]) -> AsyncIterator[bytes]:
    """The events as they come, then `done` or `error`. Stops the work when the listener goes away."""
    shown = ""
    try:
        async for event in until_done(task, events):
            if event is None:
                yield KEEPALIVE_COMMENT
                continue
            if event.type == "text":
                shown = event.data.get("delta", "") if event.data.get("replace") else shown + event.data.get("delta", "")
            data = {"state": event.type, "node": event.node, **event.data} if EVENT_NAMES[event.type] == "step" else event.data
            yield sse(EVENT_NAMES[event.type], data)
        exchange = await task
        if exchange.turn.text != shown:  # an answer from the cache came in one piece
            yield sse("delta", {"delta": exchange.turn.text, "replace": True})
        if exchange.turn.question:
            yield sse("question", exchange.turn.question.model_dump())
        yield sse("done", exchange.model_dump(mode="json"))
    except asyncio.CancelledError:
        raise
    except Exception:
        log.exception("request %s: no answer", request_id.get())
        yield sse("error", error_body(500, OUR_FAULT)["error"])
    finally:
        task.cancel()


async def until_done(task: asyncio.Task[Any], events: asyncio.Queue[Event]) -> AsyncIterator[Event | None]:
    """Every event until the task has ended and the queue is empty; None after each quiet `PING_SECONDS`."""
    getter = asyncio.ensure_future(events.get())
    try:
        while True:
            await asyncio.wait({task, getter}, timeout=PING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if getter.done():
                yield getter.result()
                getter = asyncio.ensure_future(events.get())
            elif not task.done():
                yield None
            else:
                await asyncio.sleep(0)  # let what other threads still handed over arrive
                if not getter.done() and events.empty():
                    return
    finally:
        getter.cancel()


def sse(name: str, data: Any) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data, ensure_ascii=False, default=str))
