"""The assistant, opened whole: index, retriever, models, agent, sessions and tracing, for as long as a service runs.

    async with open_assistant(settings) as assistant:
        turn = await assistant.run_turn("session-1", "What helps against a migraine?")

Why an AI engineer keeps the opening in one place: the API, the evaluation and the tests then talk to the very same thing.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from ai_engineer_track.agent import State, beginning, forget, history, run_turn
from ai_engineer_track.inference import Server, Servers
from ai_engineer_track.ingest import open_index
from ai_engineer_track.llm import Llm, LlmNonsense, LlmUnavailable
from ai_engineer_track.retrieve import Retriever
from ai_engineer_track.roles import Roles
from ai_engineer_track.rollout import Arm, Shadows, Watcher, in_share
from ai_engineer_track.settings import AiSettings
from ai_engineer_track.trace import setup_tracing
from ai_engineer_track.turn import Event, Turn
from shared.errors import UserError
from shared.outcomes import Arm as ArmName
from shared.rollout import Rollout

log = logging.getLogger(__name__)


class Assistant:
    """What answers. Sessions are kept apart; two messages of one session wait for each other.

    `current` answers everybody, but for the sessions that a `candidate` on trial gets (rollout.py).
    """

    def __init__(self, current: Arm) -> None:
        self.current, self.index = current, current.roles.index
        self.candidate: Arm | None = None
        self.rollout: Rollout | None = None
        self.shadows = Shadows(quiet=lambda: not self._answering)
        self._answering = 0
        self._turns: dict[str, asyncio.Lock] = {}

    @property
    def model_version(self) -> str:
        """The model that answers now, as `<published version>:<variant>`; empty before it was reached."""
        return self.current.llm.known

    async def run_turn(
        self,
        session_id: str,
        message: str,
        on_event: Callable[[Event], None] | None = None,
        on_other: Callable[[Turn, float], None] | None = None,
    ) -> Turn:
        """The turn a person gets.

        `on_other` is told of the turn they did not get, and the seconds it took: a shadow's, later, or a candidate's that failed.
        """
        lock = self._turns.setdefault(session_id, asyncio.Lock())
        self._answering += 1
        try:
            async with lock:
                return await self._turn(session_id, message, on_event, on_other)
        finally:
            self._answering -= 1
            if not lock.locked():
                self._turns.pop(session_id, None)

    async def _turn(
        self,
        session_id: str,
        message: str,
        on_event: Callable[[Event], None] | None,
        on_other: Callable[[Turn, float], None] | None,
    ) -> Turn:
        current, candidate, rollout = self.current, self.candidate, self.rollout
        if candidate is None or rollout is None or not in_share(session_id, rollout):
            with current.at_work():
                return self._signed(await run_turn(current.agent, session_id, message, on_event), current, "current")
        with current.at_work(), candidate.at_work():  # the current model judges the candidate's answers, too
            begin = await beginning(current.agent, session_id, message)
            if rollout.mode == "canary" and candidate.alive:
                began = time.perf_counter()
                turn = await run_turn(candidate.agent, session_id, message, on_event)
                if turn.kind != "unavailable":
                    return self._signed(turn, candidate, "candidate")
                log.error("version %s did not answer (%s); the current version does", candidate.version, turn.reason)
                if on_other is not None:
                    failed = self._signed(turn, candidate, "candidate")
                    await asyncio.to_thread(on_other, failed, time.perf_counter() - began)
                if on_event is not None:
                    on_event(Event(type="text", data={"delta": "", "replace": True}))
                return self._signed(await run_turn(current.agent, session_id, message, on_event, begin), current, "current")
            turn = await run_turn(current.agent, session_id, message, on_event)
        if rollout.mode == "shadow" and on_other is not None:
            self.shadows.offer(lambda: self._shadow(candidate, message, begin, on_other))
        return self._signed(turn, current, "current")

    async def _shadow(self, candidate: Arm, message: str, begin: State, on_other: Callable[[Turn, float], None]) -> None:
        if candidate is not self.candidate:  # the trial is over
            return
        began = time.perf_counter()
        with candidate.at_work(), self.current.at_work():
            turn = await candidate.shadow_turn(message, begin)
            turn = self._signed(turn, candidate, "shadow")
        await asyncio.to_thread(on_other, turn, time.perf_counter() - began)

    def _signed(self, turn: Turn, arm: Arm, role: ArmName) -> Turn:
        """The turn with all that is needed to trace it back."""
        made = {"model_version": arm.llm.known, "index_version": self.index.version, "arm": role}
        return turn.model_copy(update=made)

    def search(self, query: str, k: int | None = None) -> list[Any]:
        """The passages that the current version finds."""
        found: list[Any] = self.current.roles.retriever.search(query, k)
        return found

    async def forget(self, session_id: str) -> None:
        """Delete all that is remembered of a session, on the disk, too: the write-ahead log would keep it for a while."""
        agent = self.current.agent
        await forget(agent, session_id)
        await agent.checkpointer.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[union-attr]

    async def history(self, session_id: str) -> dict[str, Any]:
        return await history(self.current.agent, session_id)

    async def problem(self) -> str | None:
        """Why it cannot answer right now, as one sentence; None when it can."""
        current = self.current
        try:
            with current.at_work():
                await current.llm.model()
                await current.roles.judge_llm.model()
        except (LlmUnavailable, LlmNonsense) as error:
            return f"The language model does not answer: {error}."
        return None


@asynccontextmanager
async def open_assistant(settings: AiSettings, servers: Servers | None = None) -> AsyncIterator[Assistant]:
    """Everything opened and, at the end, closed. With `servers`, the published versions are served and followed (rollout.py).

    UserError when the index is missing, the sessions cannot be stored, or the current version cannot be served.
    """
    index = await asyncio.to_thread(open_index, settings)
    retriever = await asyncio.to_thread(Retriever, index, settings)
    server = await asyncio.to_thread(servers.current) if servers else None
    path = settings.artifacts / "sessions.sqlite"
    provider = setup_tracing(settings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # what people say here is nobody else's business on this machine
        async with AsyncSqliteSaver.from_conn_string(str(path)) as saver, AsyncExitStack() as stack:
            await saver.setup()
            await saver.conn.execute("PRAGMA secure_delete = ON")
            made = server.serves(settings) if server else settings
            llm, judge_llm, large = models_of(made)
            roles = await asyncio.to_thread(Roles, made, retriever, llm, judge_llm, large)
            assistant = Assistant(Arm(roles, saver, server))
            stack.push_async_callback(lambda: assistant.current.close())
            await assistant.problem()  # learns the model's name, if it is up already
            if servers is not None:

                def make(server: Server) -> Arm:
                    made = server.serves(settings)
                    ranked = retriever.with_ranker_of(server.folder)
                    return Arm(roles.with_model(made, ranked, *models_of(made)), saver, server)

                for work in (Watcher(assistant, servers, make).run(), assistant.shadows.run()):
                    stack.push_async_callback(ended, asyncio.create_task(work))
            yield assistant
    except (sqlite3.Error, OSError) as error:
        raise UserError(f"sessions cannot be stored ({error})", str(path), "Free disk space, or set ARTIFACTS") from None
    finally:
        await asyncio.to_thread(provider.shutdown)
        index.close()


def models_of(settings: AiSettings) -> tuple[Llm, Llm, Llm | None]:
    """The model that decides and answers, the one that judges, and the larger one where there is one."""
    llm = Llm(settings.llm)
    return llm, Llm(settings.judge) if settings.judge else llm, Llm(settings.large) if settings.large else None


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
