"""Which version answers whom: follows `current` and `rollout.json`, starts and stops servers, and drops nobody on the way.

    artifacts/models/current         the version that answers
    artifacts/models/rollout.json    a candidate on trial: it answers a share of the sessions (canary), or only repeats their
                                     messages in the background (shadow)

Why an AI engineer switches between processes instead of reloading in place: the new version is started beside the old one, has to
be ready (its golden replies included) before anybody is sent to it, and the old one is stopped only when its last answer is
out. So a promotion, a rollback or a candidate that does not start changes nothing a person could notice. Whoever promotes only
writes the two files; nothing here decides.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver

from ai_engineer_track.agent import State, connect, run_turn
from ai_engineer_track.inference import Server, Servers
from ai_engineer_track.roles import Roles
from ai_engineer_track.turn import Turn
from shared import handoff
from shared.errors import UserError
from shared.rollout import Rollout, read_rollout

if TYPE_CHECKING:
    from ai_engineer_track.assistant import Assistant

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0
RESTART_SECONDS = 30.0  # at least, between two tries to bring back a current version whose server died
SHADOWS_WAITING = 16  # messages kept for a shadow; when more come, the oldest are forgotten
QUIET_SECONDS = 0.05


class Arm:
    """One version, ready to answer. `server` is None where somebody else serves the model."""

    def __init__(self, roles: Roles, checkpointer: BaseCheckpointSaver[Any], server: Server | None = None) -> None:
        self.roles, self.server = roles, server
        self.llm, self.judge_llm = roles.router.small, roles.judge_llm
        self.agent = connect(roles, checkpointer)
        self.working = 0

    @property
    def version(self) -> str:
        return self.server.version if self.server else ""

    @property
    def alive(self) -> bool:
        return self.server is None or self.server.alive

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """It is not stopped while the block runs."""
        self.working += 1
        try:
            yield
        finally:
            self.working -= 1

    async def shadow_turn(self, message: str, begin: State) -> Turn:
        """What this version would have answered. Nothing of it is kept."""
        return await run_turn(connect(self.roles, InMemorySaver()), "shadow", message, begin=begin)

    async def close(self) -> None:
        """Give connections and files back; the server is stopped by whoever started it."""
        for model in {self.llm, self.judge_llm, self.roles.router.large or self.llm}:
            await model.close()
        if self.roles.cache is not None:
            self.roles.cache.close()


def in_share(session_id: str, rollout: Rollout) -> bool:
    """Is this session among those a candidate is tried on? The same each time; a larger share keeps those of a smaller one."""
    digest = hashlib.sha256(f"{rollout.candidate}\0{session_id}".encode()).digest()
    return int.from_bytes(digest[:8]) < rollout.share * 2**64


class Shadows:
    """Work for a candidate that nobody waits for: one message at a time, begun only while no person is being answered.

    At most SHADOWS_WAITING messages wait. Under lasting load most are forgotten: a shadow must cost people nothing.
    """

    def __init__(self, quiet: Callable[[], bool]) -> None:
        self.quiet = quiet
        self._waiting: deque[Callable[[], Awaitable[None]]] = deque(maxlen=SHADOWS_WAITING)

    def offer(self, work: Callable[[], Awaitable[None]]) -> None:
        self._waiting.append(work)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(QUIET_SECONDS)
            if self._waiting and self.quiet():
                try:
                    await self._waiting.popleft()()
                except Exception:  # a candidate's fault is no reason to stop looking at it
                    log.exception("a shadow's answer could not be made")


@dataclass(frozen=True)
class Wish:
    """What the files ask for."""

    current: str
    rollout: Rollout | None


class Watcher:
    """Keeps an assistant in step with the files."""

    def __init__(self, assistant: Assistant, servers: Servers, make: Callable[[Server], Arm]) -> None:
        self.assistant, self.servers, self.make = assistant, servers, make
        self.arms: dict[str, Arm] = {assistant.current.version: assistant.current}
        self._starting: dict[str, asyncio.Task[Arm]] = {}
        self._refused: set[str] = set()
        self._tried = -RESTART_SECONDS
        self._wish: Wish | None = None
        self._said = ""
        self._retiring: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Look again every POLL_SECONDS, for as long as the service runs."""
        try:
            while True:
                try:
                    await self.step()
                except Exception:
                    log.exception("the model versions could not be looked at")
                await asyncio.sleep(POLL_SECONDS)
        finally:
            self.servers.give_up()
            for task in (*self._starting.values(), *self._retiring):
                task.cancel()
            for arm in self.arms.values():
                if arm is not self.assistant.current:
                    await arm.close()

    async def step(self) -> None:
        """One look: start what is missing, switch to what is ready, retire what is not wanted any more."""
        wish = await asyncio.to_thread(self._read)
        if wish != self._wish:
            self._wish = wish
            self._refused.clear()
        self._take_started()
        self._bury_the_dead()
        wanted = [wish.current] + ([wish.rollout.candidate] if wish.rollout else [])
        for version in wanted:
            if version not in {*self.arms, *self._starting, *self._refused} and self._may_start(version):
                self._starting[version] = asyncio.create_task(self._start(version))
        self._switch(wish)
        for version in [v for v in self.arms if v not in wanted and self.arms[v] is not self.assistant.current]:
            self._retire(self.arms.pop(version))

    def _may_start(self, version: str) -> bool:
        """The current version, whose server died, at once and then every RESTART_SECONDS; any other one at any time."""
        if version == self.assistant.current.version:
            if time.monotonic() - self._tried < RESTART_SECONDS:
                return False
            self._tried = time.monotonic()
        return True

    def _read(self) -> Wish:
        """The files as they are now; a damaged one is said once, and then is as if it asked for nothing new."""
        rollout, problem = None, ""
        current = self._wish.current if self._wish else self.assistant.current.version
        try:
            current = handoff.current(self.servers.models).name
            rollout = read_rollout(self.servers.models)
        except UserError as error:
            problem = str(error)
        if problem and problem != self._said:
            log.error("model versions: %s", problem)
        self._said = problem
        return Wish(current, rollout if rollout and rollout.candidate != current else None)

    async def _start(self, version: str) -> Arm:
        server = await asyncio.to_thread(self.servers.start, version)
        try:
            arm = await asyncio.to_thread(self.make, server)
            await arm.llm.model()  # learns its name
            return arm
        except BaseException:
            await asyncio.to_thread(self.servers.stop, server)
            raise

    def _take_started(self) -> None:
        for version, task in list(self._starting.items()):
            if task.done():
                del self._starting[version]
                if problem := task.exception():
                    if version != self.assistant.current.version:
                        self._refused.add(version)
                    told = problem if isinstance(problem, UserError) else repr(problem)
                    log.error("version %s does not answer anybody: %s", version, told)
                else:
                    self.arms[version] = task.result()

    def _bury_the_dead(self) -> None:
        """A candidate whose server died is not tried again; the current version is, after a while."""
        for version, arm in list(self.arms.items()):
            if not arm.alive:
                del self.arms[version]
                if arm is self.assistant.current:
                    log.error("the server of version %s died; it is started again", version)
                else:
                    self._refused.add(version)
                    log.error("the server of version %s died; the current version answers its sessions", version)
                    self._retire(arm)

    def _switch(self, wish: Wish) -> None:
        assistant = self.assistant
        arm = self.arms.get(wish.current)
        if arm is not None and arm is not assistant.current:
            before, assistant.current = assistant.current, arm
            arm.roles.judge_llm = arm.judge_llm
            log.warning("version %s answers now, in place of %s", arm.version, before.version)
            if before.version not in self.arms:  # it had died
                self._retire(before)
        candidate = self.arms.get(wish.rollout.candidate) if wish.rollout else None
        if candidate is not None and wish.rollout is not None:
            candidate.roles.judge_llm = assistant.current.judge_llm  # one judge for both, or their marks could not be compared
            if wish.rollout != assistant.rollout:
                log.warning("version %s is on trial: %s, share %s", candidate.version, wish.rollout.mode, wish.rollout.share)
        assistant.candidate = candidate
        assistant.rollout = wish.rollout if candidate else None
        for one in self.arms.values():  # an answer from the cache would say nothing of either
            one.roles.caching = one is assistant.current and assistant.rollout is None

    def _retire(self, arm: Arm) -> None:
        task = asyncio.create_task(self._drain(arm))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _drain(self, arm: Arm) -> None:
        """Stop it when its last answer is out."""
        try:
            while arm.working:
                await asyncio.sleep(QUIET_SECONDS)
        finally:
            await arm.close()
        if arm.server is not None:
            await asyncio.to_thread(self.servers.stop, arm.server)
