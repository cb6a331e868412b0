"""Who may ask, how much and how often: bearer token, body size, rate and concurrency.

`Guard` wraps the whole application, before any of it parses a byte: it gives every request an id, checks token and size, sets
the security headers and counts. Rate and concurrency are asked for by the routes that cost something.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Callable
from contextvars import ContextVar

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("ai_engineer_track.api")
OUR_FAULT = "Something went wrong on our side, so there is no answer. Please try again."

#: the id of the request being worked on, for logs and traces
request_id: ContextVar[str] = ContextVar("request_id", default="")

#: the pages and the probes carry no data of anyone; everything else needs the token when one is set
PAGES = ("/", "/app.js", "/page.js", "/style.css", "/icon.svg", "/review", "/review.js", "/review.css")
OPEN_PATHS = (*PAGES, "/health", "/ready")
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """ASGI middleware. `count(method, route, status, seconds)` is called once a request, `refuse(why)` for each refusal."""

    def __init__(
        self,
        app: ASGIApp,
        token: str | None,
        max_bytes: int,
        count: Callable[[str, str, int, float], None],
        refuse: Callable[[str], None],
    ) -> None:
        self.app, self.token, self.max_bytes, self.count, self.refuse = app, token, max_bytes, count, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, started_sending = time.perf_counter(), 500, False
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if re.fullmatch(r"[\w.-]{8,64}", given, re.ASCII) else secrets.token_hex(8)
        mark = request_id.set(name)

        async def answer(message: Message) -> None:
            nonlocal status, started_sending
            if message["type"] == "http.response.start":
                started_sending = True
                status = message["status"]
                outgoing = MutableHeaders(scope=message)
                outgoing["X-Request-ID"] = name
                outgoing.setdefault("Cache-Control", "no-store")
                for header, value in HEADERS.items():
                    outgoing[header] = value
            await send(message)

        try:
            if problem := self._problem(scope["path"], headers):
                self.refuse(problem[1])
                await _reply(answer, *problem)
            else:
                await self.app(scope, self._measured(receive), answer)
        except Exception:
            log.exception("request %s failed", name)
            if not started_sending:
                await _reply(answer, 500, "error", OUR_FAULT)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # never the raw path: a scanner would fill the metrics
            self.count(scope["method"], route, status, time.perf_counter() - started)
            request_id.reset(mark)

    def _problem(self, path: str, headers: Headers) -> tuple[int, str, str] | None:
        if self.token is not None and path not in OPEN_PATHS and not same_token(bearer(headers), self.token):
            return 401, "token", "This service needs a token: send it as `Authorization: Bearer <token>`."
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self.max_bytes:
            return 413, "size", f"The request is too large: at most {self.max_bytes:,} bytes are taken."
        return None

    def _measured(self, receive: Receive) -> Receive:
        """A body sent in chunks announces no length; it is counted as it comes."""
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.max_bytes:
                self.refuse("size")
                raise HTTPException(413, f"The request is too large: at most {self.max_bytes:,} bytes are taken.")
            return message

        return counted


class RateLimit:
    """A token bucket for each client: `per_minute` at once, refilled evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self.clock = per_minute, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # client -> (tokens left, when that was)

    def take(self, client: str) -> None:
        """HTTPException 429 with Retry-After when the client has to wait."""
        now = self.clock()
        if len(self._buckets) > 10_000:  # full buckets say nothing; forget them
            self._buckets = {name: b for name, b in self._buckets.items() if self._left(b, now) < self.per_minute}
        left = self._left(self._buckets.get(client, (float(self.per_minute), now)), now)
        if left < 1:
            wait = math.ceil((1 - left) * 60 / self.per_minute)
            raise HTTPException(429, f"Too many messages. Please try again in {wait} s.", {"Retry-After": str(wait)})
        self._buckets[client] = (left - 1, now)

    def _left(self, bucket: tuple[float, float], now: float) -> float:
        tokens, since = bucket
        return min(float(self.per_minute), tokens + (now - since) * self.per_minute / 60)


class Gate:
    """Lets `limit` messages be worked on at once, and one for each conversation.

    The counts change between two awaits only, so that an event loop needs no lock.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.working: set[str] = set()

    def enter(self, session_id: str) -> None:
        """HTTPException 409 or 503 (Retry-After) when there is no room; else `leave` must follow."""
        if session_id in self.working:
            raise HTTPException(409, "Your previous message is still being answered.", {"Retry-After": "1"})
        if len(self.working) >= self.limit:
            raise HTTPException(503, "Too many people are asking right now. Please try again in a moment.", {"Retry-After": "2"})
        self.working.add(session_id)

    def leave(self, session_id: str) -> None:
        self.working.discard(session_id)


def bearer(headers: Headers) -> str:
    """The token of the request. Headers arrive as Latin-1; a token with other letters was sent as UTF-8."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip().encode("latin-1").decode("utf-8", "replace") if scheme.lower() == "bearer" else ""


def same_token(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())


def error_body(status: int, message: str) -> dict[str, dict[str, str]]:
    """The one shape of every error: OpenAI's, so that its clients can show it too."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "rate_limit_error" if status == 429 else "server_error"
    return {"error": {"message": message, "type": kind, "request_id": request_id.get()}}


async def _reply(send: Send, status: int, why: str, message: str) -> None:
    body = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if why == "token":
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
