"""The real assistant behind the routes: index, retriever, models and graph, opened when the service starts.

What the graph remembers of a conversation lies in SQLite beside the conversations themselves, so that a question it asked
before a restart can still be answered after it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from ai_engineer_track.agent import build_agent, run_turn
from ai_engineer_track.api.service import Service
from ai_engineer_track.ingest import open_index
from ai_engineer_track.llm import Llm, LlmNonsense, LlmUnavailable
from ai_engineer_track.retrieve import Retriever
from ai_engineer_track.turn import Event, Turn


class GraphAssistant:
    """The agent's graph as the routes see it."""

    def __init__(self, agent: Any, llm: Llm, memory: AsyncSqliteSaver) -> None:
        self.agent, self.llm, self.memory = agent, llm, memory
        self.model_version = llm.settings.model or "unknown"

    async def run_turn(self, session_id: str, message: str, on_event: Callable[[Event], None] | None = None) -> Turn:
        return await run_turn(self.agent, session_id, message, on_event)

    async def forget(self, session_id: str) -> None:
        await self.memory.adelete_thread(session_id)
        await self.memory.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the log, too, held what was said

    async def problem(self) -> str | None:
        try:
            self.model_version = await self.llm.model()
        except (LlmUnavailable, LlmNonsense) as error:
            return f"The language model does not answer: {error}."
        return None


@asynccontextmanager
async def open_parts(service: Service) -> AsyncIterator[None]:
    """Fill the service's `assistant`, `index` and `retriever` for as long as the block runs. UserError without an index."""
    settings = service.settings
    index = open_index(settings)
    retriever = Retriever(index, settings)
    llm, judge = Llm(settings.llm), Llm(settings.judge_llm)
    path = settings.artifacts / "service" / "memory.sqlite"
    path.touch(mode=0o600)
    async with AsyncSqliteSaver.from_conn_string(str(path)) as memory:
        await memory.conn.execute("PRAGMA secure_delete = ON")
        service.assistant = GraphAssistant(build_agent(settings, retriever, llm, judge, memory), llm, memory)
        service.index, service.retriever = index, retriever
        try:
            yield
        finally:
            service.assistant = service.index = service.retriever = None
            index.close()
