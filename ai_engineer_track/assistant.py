"""The assistant, opened whole: index, retriever, models, agent, sessions and tracing, for as long as a service runs.

    async with open_assistant(settings) as assistant:
        turn = await assistant.run_turn("session-1", "What helps against a migraine?")

Why an AI engineer keeps the opening in one place: the API, the evaluation and the tests then talk to the very same thing.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from ai_engineer_track.agent import build_agent, forget, history, run_turn
from ai_engineer_track.ingest import open_index
from ai_engineer_track.llm import Llm, LlmNonsense, LlmUnavailable
from ai_engineer_track.retrieve import Retriever
from ai_engineer_track.settings import AiSettings
from ai_engineer_track.trace import setup_tracing
from ai_engineer_track.turn import Event, Turn
from shared.errors import UserError
from shared.files import private


class Assistant:
    """What answers. Sessions are kept apart; two messages of one session wait for each other."""

    def __init__(self, agent: Any, llm: Llm, judge_llm: Llm, retriever: Any) -> None:
        self.agent, self.llm, self.judge_llm = agent, llm, judge_llm
        self.retriever, self.index = retriever, retriever.index
        self._model = ""
        self._turns: dict[str, asyncio.Lock] = {}

    @property
    def model_version(self) -> str:
        """The name of the model that answers; empty before it was reached."""
        return self._model

    async def run_turn(self, session_id: str, message: str, on_event: Callable[[Event], None] | None = None) -> Turn:
        lock = self._turns.setdefault(session_id, asyncio.Lock())
        try:
            async with lock:
                return await run_turn(self.agent, session_id, message, on_event)
        finally:
            if not lock.locked():
                self._turns.pop(session_id, None)

    async def forget(self, session_id: str) -> None:
        """Delete all that is remembered of a session, on the disk, too: the write-ahead log would keep it for a while."""
        await forget(self.agent, session_id)
        await self.agent.checkpointer.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    async def history(self, session_id: str) -> dict[str, Any]:
        return await history(self.agent, session_id)

    async def problem(self) -> str | None:
        """Why it cannot answer right now, as one sentence; None when it can."""
        try:
            self._model = await self.llm.model()
            await self.judge_llm.model()
        except (LlmUnavailable, LlmNonsense) as error:
            return f"The language model does not answer: {error}."
        return None


@asynccontextmanager
async def open_assistant(settings: AiSettings) -> AsyncIterator[Assistant]:
    """Everything opened and, at the end, closed. UserError when the index is missing or the sessions cannot be stored."""
    index = await asyncio.to_thread(open_index, settings)
    retriever = await asyncio.to_thread(Retriever, index, settings)
    llm = Llm(settings.llm)
    judge_llm = llm if settings.judge is None else Llm(settings.judge)
    large = Llm(settings.large) if settings.large else None
    path = settings.artifacts / "sessions.sqlite"
    provider = setup_tracing(settings)
    try:
        async with AsyncSqliteSaver.from_conn_string(str(private(path))) as saver:
            await saver.setup()
            await saver.conn.execute("PRAGMA secure_delete = ON")
            agent = await asyncio.to_thread(build_agent, settings, retriever, llm, judge_llm, saver, large)
            assistant = Assistant(agent, llm, judge_llm, retriever)
            await assistant.problem()  # learns the model's name, if it is up already
            yield assistant
    except (sqlite3.Error, OSError) as error:
        raise UserError(f"sessions cannot be stored ({error})", str(path), "Free disk space, or set ARTIFACTS") from None
    finally:
        for model in {llm, judge_llm, large or llm}:
            await model.close()
        await asyncio.to_thread(provider.shutdown)
        index.close()
