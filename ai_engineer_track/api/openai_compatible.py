"""POST /v1/chat/completions and GET /v1/models: the assistant behind the API that every chat client speaks.

Stateless, as that API is: the conversation is what the client sends. The person's earlier messages are gone through again in
a throwaway conversation, so that a reply to a clarifying question is understood as one; what the client says the assistant
said is not believed, and system messages are not obeyed. Sampling parameters are accepted and have no effect.
A stream of this API cannot take text back, so text is sent only once it has passed the checks.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from ai_engineer_track.api.chat import PING_SECONDS, answer, clean, take_place
from ai_engineer_track.api.feedback import record_automatically
from ai_engineer_track.api.limits import OUR_FAULT, error_body, log
from ai_engineer_track.api.service import Service, ServiceDep
from ai_engineer_track.api.sessions import Exchange, address_of
from ai_engineer_track.turn import Turn
from shared.logs import request_id

MODEL = "assistant"
#: earlier messages gone through again; each costs as much as a message of its own
MAX_EARLIER = 4
router = APIRouter(prefix="/v1", tags=["openai"])


class Part(BaseModel):
    type: str
    text: str = ""


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None


class StreamOptions(BaseModel):
    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The fields that mean something here; clients send many more, which are ignored."""

    model: str = MODEL
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None


@router.get("/models")
async def models() -> dict[str, Any]:
    return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "two-engineers"}]}


@router.post("/chat/completions", response_model=None)
async def completions(body: CompletionRequest, request: Request, service: ServiceDep) -> dict[str, Any] | StreamingResponse:
    service.need_assistant()
    service.rate.take(address_of(request))
    if body.model != MODEL:
        raise HTTPException(404, f"There is no model {body.model[:80]!r} here. Use {MODEL!r}.")
    if body.messages[-1].role != "user":
        raise HTTPException(422, "The last message must be the user's.")
    said = [clean(_text(m), service.settings.api.max_chars) for m in body.messages if m.role == "user"]
    task = take_place(service, name := "v1-" + secrets.token_hex(12), _converse(service, name, said[-MAX_EARLIER - 1 :]))
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": MODEL}
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return StreamingResponse(_stream(task, head, usage), media_type="text/event-stream")
    turn = (await task).turn
    head["system_fingerprint"] = turn.model_version
    message = {"role": "assistant", "content": as_text(turn), "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(turn)}


def as_text(turn: Turn) -> str:
    """The whole turn for a client that shows nothing but text: a warning, the question's choices and the sources become lines."""
    lines = [turn.warning, "", turn.text] if turn.warning else [turn.text]
    if turn.question:
        lines += [f"- {choice}" for choice in turn.question.choices]
    if turn.citations:
        lines += ["", "Sources:"]
        lines += [f"[{c.number}] {c.title}, {c.section} ({c.sentence_id})" for c in turn.citations]
    return "\n".join(lines)


async def _converse(service: Service, session_id: str, said: list[str]) -> Exchange:
    assistant = service.need_assistant()
    earlier: list[Exchange] = []
    try:
        for message in said[:-1]:
            turn = await assistant.run_turn(session_id, message)
            earlier.append(
                Exchange(answer_id="", session_id=session_id, created=time.time(), message=message, seconds=0.0, turn=turn)
            )
        exchange = await answer(service, session_id, said[-1])
        try:
            await run_in_threadpool(record_automatically, service, exchange, earlier)
        except Exception:  # a full disk must not cost a person their answer
            log.exception("request %s: the answer was given but its shortcomings could not be stored", request_id.get())
        return exchange
    finally:
        await assistant.forget(session_id)


async def _stream(task: asyncio.Task[Exchange], head: dict[str, Any], usage: bool) -> AsyncIterator[bytes]:
    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return _data({**head, "object": "chat.completion.chunk", "choices": [choice]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        while not (await asyncio.wait({task}, timeout=PING_SECONDS))[0]:
            yield KEEPALIVE_COMMENT
        turn = (await task).turn
        head = {**head, "system_fingerprint": turn.model_version}
        for piece in re.findall(r"\s*\S+\s*", as_text(turn)):
            yield chunk({"content": piece})
        yield chunk({}, "stop")
        if usage:
            yield _data({**head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(turn)})
        yield b"data: [DONE]\n\n"
    except asyncio.CancelledError:
        raise
    except Exception:
        log.exception("request %s: no answer", request_id.get())
        yield _data(error_body(500, OUR_FAULT))
    finally:
        task.cancel()


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, list):
        if any(part.type != "text" for part in message.content):
            raise HTTPException(422, "Only text is understood; leave out images, sounds and files.")
        return "\n".join(part.text for part in message.content)
    return message.content or ""


def _usage(turn: Turn) -> dict[str, int]:
    prompt = sum(step.prompt_tokens for step in turn.trace)
    completion = sum(step.completion_tokens for step in turn.trace)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _data(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
