"""Conversations: whose they are, what was said, and deleting them.

A conversation belongs to the client that began it. A client is known by a signed cookie, which the page gets with its first
response, or, without a cookie, by its bearer token. Another client's conversation is answered like one that does not exist.
What was said is kept in SQLite, so a conversation survives a restart; DELETE removes it here and in the assistant's memory.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from ai_engineer_track.api.limits import bearer
from ai_engineer_track.api.service import ServiceDep
from ai_engineer_track.turn import Turn
from shared.errors import UserError
from shared.files import private
from shared.sqlite import is_damage, mend

COOKIE = "client"
NO_SUCH = "There is no such conversation."
router = APIRouter(tags=["sessions"])


class Exchange(BaseModel):
    """One message and what came of it."""

    model_config = ConfigDict(extra="forbid")
    answer_id: str
    session_id: str
    created: float
    message: str
    seconds: float
    turn: Turn


class History(BaseModel):
    model_config = ConfigDict(extra="forbid")
    session_id: str
    exchanges: list[Exchange]


class SessionStore:
    """Conversations in one SQLite file. Every call is one short transaction, safe from several threads.

    A damaged file is mended when it is noticed (`shared/sqlite.py`): what can be read of it goes on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._open()
        #: signs the cookies; made with the file
        self.secret: bytes = self._run("SELECT value FROM keys WHERE name = 'cookie'")[0][0]

    def _open(self) -> None:
        path = self.path
        try:
            mend(private(path))
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.executescript(
                """
                PRAGMA journal_mode = WAL; PRAGMA secure_delete = ON; PRAGMA foreign_keys = ON; PRAGMA busy_timeout = 5000;
                CREATE TABLE IF NOT EXISTS keys (name TEXT PRIMARY KEY, value BLOB NOT NULL);
                INSERT OR IGNORE INTO keys VALUES ('cookie', randomblob(32));
                CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, client TEXT NOT NULL, created REAL NOT NULL);
                CREATE TABLE IF NOT EXISTS exchanges (
                  answer_id TEXT PRIMARY KEY, session_id TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
                  created REAL NOT NULL, body TEXT NOT NULL);
                CREATE INDEX IF NOT EXISTS by_session ON exchanges (session_id, created);
                """
            )
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"conversations cannot be stored ({error})", str(path), "Check the disk, or remove the file"
            ) from None

    def begin(self, client: str) -> str:
        """A new conversation's id: 160 random bits, so that nobody can guess another's."""
        session_id = "s-" + secrets.token_hex(20)
        self._run("INSERT INTO sessions VALUES (?, ?, ?)", session_id, client, time.time())
        return session_id

    def belongs(self, session_id: str, client: str) -> bool:
        return bool(self._run("SELECT 1 FROM sessions WHERE id = ? AND client = ?", session_id, client))

    def add(self, exchange: Exchange) -> bool:
        """False when the conversation was deleted meanwhile; nothing is kept then."""
        try:
            self._run(
                "INSERT INTO exchanges VALUES (?, ?, ?, ?)",
                exchange.answer_id,
                exchange.session_id,
                exchange.created,
                exchange.model_dump_json(),
            )
        except sqlite3.IntegrityError:
            return False
        return True

    def history(self, session_id: str, last: int = -1) -> list[Exchange]:
        """The exchanges, oldest first (in the order they were written: clocks jump); only the `last` ones when not negative."""
        newest = "SELECT body, rowid AS place FROM exchanges WHERE session_id = ? ORDER BY rowid DESC LIMIT ?"
        rows = self._run(f"SELECT body FROM ({newest}) ORDER BY place", session_id, last)
        return [Exchange.model_validate_json(body) for (body,) in rows]

    def exchange(self, answer_id: str, client: str) -> Exchange | None:
        """The exchange with this answer, when it is the client's."""
        rows = self._run(
            "SELECT body FROM exchanges JOIN sessions ON sessions.id = session_id WHERE answer_id = ? AND client = ?",
            answer_id,
            client,
        )
        return Exchange.model_validate_json(rows[0][0]) if rows else None

    def delete(self, session_id: str) -> None:
        """Overwrites the text in the file (secure_delete) and empties the write-ahead log that also held it."""
        self._run("DELETE FROM sessions WHERE id = ?", session_id)
        self._run("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        self._db.close()

    def _run(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                with closing(self._db.execute(sql, values)) as cursor:
                    return cursor.fetchall()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                self._db.close()
                self._open()
                if hasattr(self, "secret"):  # cookies that people hold stay valid
                    self._db.execute("INSERT OR REPLACE INTO keys VALUES ('cookie', ?)", (self.secret,))
                with closing(self._db.execute(sql, values)) as cursor:
                    return cursor.fetchall()


def client_of(request: Request, response: Response, service: ServiceDep) -> str:
    """The client's name; a new one gets a cookie. A cookie with a wrong signature counts as none."""
    if known := _signed(request.cookies.get(COOKIE, ""), service.sessions.secret):
        return known
    if service.settings.api.token is not None and request.url.path != "/":
        return "token-" + hashlib.sha256(bearer(request.headers).encode()).hexdigest()[:32]
    name = secrets.token_urlsafe(18)
    value = f"{name}.{_signature(name, service.sessions.secret)}"
    response.set_cookie(COOKIE, value, httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return name


ClientDep = Annotated[str, Depends(client_of)]


def address_of(request: Request) -> str:
    """What rates are counted by. A cookie would not do: a client that drops it would start afresh."""
    return request.client.host if request.client else "unknown"


async def own_session(session_id: str, client: ClientDep, service: ServiceDep) -> str:
    """404 unless the conversation is this client's."""
    if not await run_in_threadpool(service.sessions.belongs, session_id, client):
        raise HTTPException(404, NO_SUCH)
    return session_id


OwnSession = Annotated[str, Depends(own_session)]


@router.get("/sessions/{session_id}")
async def history(session_id: OwnSession, service: ServiceDep) -> History:
    """The conversation so far, oldest first."""
    exchanges = await run_in_threadpool(service.sessions.history, session_id)
    return History(session_id=session_id, exchanges=exchanges)


@router.delete("/sessions/{session_id}", status_code=204)
async def delete(session_id: OwnSession, service: ServiceDep) -> None:
    """Forget the conversation: here and in the assistant's memory. Feedback stays; it names nobody."""
    if service.gate.busy(session_id):
        raise HTTPException(409, "A message is still being answered. Try again in a moment.", {"Retry-After": "1"})
    if service.assistant is not None:
        await service.assistant.forget(session_id)
    await run_in_threadpool(service.sessions.delete, session_id)


def _signed(cookie: str, secret: bytes) -> str | None:
    name, _, signature = cookie.rpartition(".")
    return name if name and hmac.compare_digest(signature.encode(), _signature(name, secret).encode()) else None


def _signature(name: str, secret: bytes) -> str:
    return hmac.new(secret, name.encode(), hashlib.sha256).hexdigest()
