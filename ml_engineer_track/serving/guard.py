"""What no request may do before it is read: come from a web page elsewhere, or be larger than any prompt.

Why an ML engineer minds: the server trusts whoever reaches it and has no password, so a page open in the same browser could ask
it, and one endless body would fill the memory that the cache needs. Plain ASGI, as everything that streams here.
"""

from __future__ import annotations

import json

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ml_engineer_track.serving.protocol import ApiError
from shared import foreign

#: Longest body, in bytes: far beyond any context window, also where JSON spells every character in twelve bytes.
MAX_BODY = 8_000_000
TOO_LARGE = f"the request is too large: at most {MAX_BODY:,} bytes are taken"


class Guard:
    """ASGI middleware; `hosts` are the names the server answers to (`foreign.allowed_hosts`)."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if why := foreign.refusal(headers, self.hosts):
            await _reply(send, ApiError(403, why, "foreign_request"))
        elif not length.isdecimal() or int(length[:20]) > MAX_BODY:
            await _reply(send, ApiError(413, TOO_LARGE, "too_large"))
        else:
            await self.app(scope, _counted(receive), send)


def _counted(receive: Receive) -> Receive:
    """A body sent in chunks announces no length; it is counted as it comes."""
    total = 0

    async def counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > MAX_BODY:
            raise HTTPException(413, TOO_LARGE)
        return message

    return counted


async def _reply(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
