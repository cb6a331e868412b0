"""What every engine offers: submit a prompt, get a stream of tokens, cancel it. And what they all share: one thread, admission.

Why it is this small: everything an HTTP API adds (chat templates, text, stop texts, several choices) works on tokens and is the
same for every engine, so it stays outside; everything about batches stays inside. Between the two lies this interface.

An engine runs its batches in a thread of its own. Requests wait in order until their *reservation* fits: the prompt and all
tokens the reply may take, because an engine whose cache runs full in the middle of a batch drops replies that were
promised. A queue that is full is said at once (`Busy`), as is a request that could never fit (`DoesNotFit`).
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ml_engineer_track.serving.grammar import Constraint

Finish = Literal["stop", "length", "cancelled", "failed"]
#: How long the thread sleeps when nobody wants anything; a new request wakes it at once.
IDLE_SECONDS = 0.5
#: From MANY running generations on, tokens wait up to TOGETHER_SECONDS for those after them and are sent as one event. An event
#: costs about as much as a token of a small model, and nobody reads twenty words a second (vLLM: `--stream-interval`).
MANY, TOGETHER_SECONDS = 8, 0.05
#: Then, and after the first token of any request, the engine also waits until the server has passed on what it got: Python runs
#: one of the two threads at a time, and an engine that never waits is not interrupted before a whole reply is there, so that
#: its first word comes with its last.
PATIENCE_SECONDS, HOPS = 0.05, 8


class Busy(Exception):  # noqa: N818 - it names an answer, not a fault
    """Too many requests are waiting; try again after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already")
        self.retry_after = retry_after


class DoesNotFit(Exception):  # noqa: N818
    """A request this server can never run, whatever else it is doing."""


@dataclass(frozen=True)
class Generation:
    """One prompt to continue. `temperature` 0 is greedy; `top_logprobs` alternatives are told where the engine knows them."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    constraint: Constraint | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True)
class Token:
    """`logprob` is the model's own, before any grammar or temperature; None where a grammar left no choice."""

    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


class Stream:
    """The tokens of one generation as they come: `async for tokens in stream`. Then `finish` says why it ended.

    `loop` is where it is read; None in a process where nobody reads (engine_process.py).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        self.queue: asyncio.Queue[tuple[list[Token], Finish | None]] = asyncio.Queue()
        self.finish: Finish | None = None
        self.error: str | None = None
        self.cancelled = False
        #: has any token been sent on?
        self.begun = False

    async def __aiter__(self) -> AsyncIterator[list[Token]]:
        while self.finish is None:
            tokens, self.finish = await self.queue.get()
            while not self.queue.empty():  # whoever reads slowly gets more at once instead of falling behind
                more, self.finish = self.queue.get_nowait()
                tokens = [*tokens, *more]
            if tokens:
                yield tokens

    def cancel(self) -> None:
        """Free the slot within one step. Harmless when it has ended."""
        self.cancelled = True


#: what each stream has got since it was last told: tokens, and why it ended if it did
Outbox = dict[Stream, tuple[list[Token], Finish | None]]


@dataclass(eq=False)
class Job:
    """A generation inside an engine: what it wants, what it got, and whatever the engine keeps with it."""

    generation: Generation
    stream: Stream
    reserved: int
    tokens: list[int] = field(default_factory=list)
    state: Any = None

    @property
    def remaining(self) -> int:
        return self.generation.max_tokens - len(self.tokens)


@dataclass(frozen=True)
class Stats:
    running: int
    waiting: int
    reserved_tokens: int
    capacity_tokens: int
    failures: int


class Engine(ABC):
    """A model, loaded, with the thread that runs its batches. Subclasses say how to begin, step and stop.

    All methods with a leading `do_` run in the engine's thread, `do_load` first.
    """

    name = ""
    #: tokens that one cache block holds; reservations are rounded up to it
    block = 1
    capacity_tokens = 0

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self.running: set[Job] = set()
        self.waiting: deque[Job] = deque()
        self.failures = 0
        self._reserved = 0
        self._outbox: Outbox = {}
        self._delivered = 0.0
        self._seconds_per_job = 1.0
        self._wake = threading.Condition()
        self._closing = False
        self._loaded: threading.Event = threading.Event()
        self._load_error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"engine {self.name}", daemon=True)

    # --- from the server's event loop ---

    def start(self) -> None:
        """Load the model and begin to serve; returns when it is loaded, raises what loading raised."""
        self._thread.start()
        self._loaded.wait()
        if self._load_error is not None:
            raise self._load_error

    def submit(self, generation: Generation) -> Stream:
        """Queue a generation. Busy when too many wait; DoesNotFit when it can never run."""
        self.check(generation)
        tokens = len(generation.prompt) + generation.max_tokens
        reserved = (tokens // self.block + 1) * self.block
        if reserved > self.capacity_tokens:
            raise DoesNotFit(
                f"the prompt has {len(generation.prompt)} tokens and the reply may take {generation.max_tokens}; "
                f"the key-value cache of this server holds {self.capacity_tokens}"
            )
        job = Job(generation, Stream(asyncio.get_running_loop()), reserved)
        with self._wake:
            if self._closing:
                raise Busy(len(self.waiting), 5)
            if len(self.waiting) >= self.max_waiting:
                ahead = len(self.waiting) / max(self.max_running, 1) * self._seconds_per_job
                raise Busy(len(self.waiting), max(1, min(60, round(ahead))))
            self.waiting.append(job)
            self._wake.notify()
        return job.stream

    def check(self, generation: Generation) -> None:  # noqa: B027
        """DoesNotFit or GrammarError for what this engine cannot do at all."""

    def stats(self) -> Stats:
        return Stats(len(self.running), len(self.waiting), self._reserved, self.capacity_tokens, self.failures)

    def close(self) -> None:
        """Stop at the next step; what is still running ends as cancelled."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    # --- in the engine's thread ---

    @abstractmethod
    def do_load(self) -> None:
        """Load the model; sets `capacity_tokens`."""

    @abstractmethod
    def do_begin(self, job: Job) -> None:
        """Put a job into the batch."""

    @abstractmethod
    def do_step(self) -> None:
        """One step of the batch; hands on what came with `emit`."""

    @abstractmethod
    def do_stop(self, job: Job) -> None:
        """Take a job out of the batch."""

    @abstractmethod
    def do_recover(self) -> None:
        """After a step that failed: nothing is running any more; be ready for new jobs."""

    def do_rest(self) -> None:  # noqa: B027
        """Nothing runs and nothing waits: time for what would hold up a batch."""

    def emit(self, job: Job, tokens: Sequence[Token], finish: Finish | None = None) -> None:
        """Hand tokens to a job's stream; with `finish`, the job is over."""
        job.tokens.extend(token.id for token in tokens)
        before, _ = self._outbox.get(job.stream, ([], None))
        self._outbox[job.stream] = ([*before, *tokens], finish)
        if finish is not None and job in self.running:
            self.running.discard(job)
            self._reserved -= job.reserved

    def take(self) -> Outbox:
        """What was emitted since the last time; it counts as handed on."""
        taken, self._outbox = self._outbox, {}
        return taken

    def _run(self) -> None:
        try:
            self.do_load()
        except BaseException as error:
            self._load_error = error
            return
        finally:
            self._loaded.set()
        while not self._closing:
            with self._wake:
                while not (self.running or self.waiting or self._closing):
                    self._wake.wait(IDLE_SECONDS)
            started = time.perf_counter()
            before = len(self.running)
            try:
                self._admit()
                self._drop_cancelled()
                if self.running:
                    self.do_step()
            except Exception as error:
                self._fail(error)
            self._deliver()
            if before and (done := before - len(self.running)) > 0:
                seconds = (time.perf_counter() - started) * before / done
                self._seconds_per_job = 0.9 * self._seconds_per_job + 0.1 * max(seconds, self._seconds_per_job / 2)
            if not (self.running or self.waiting or self._closing):
                try:
                    self.do_rest()
                except Exception as error:
                    self._fail(error)
        for job in [*self.running, *self.waiting]:
            self.emit(job, [], "cancelled")
        self._deliver()

    def _admit(self) -> None:
        """In order of arrival, whoever fits: a long request is never overtaken for ever."""
        with self._wake:
            gone = [job for job in self.waiting if job.stream.cancelled]
            if gone:
                self.waiting = deque(job for job in self.waiting if not job.stream.cancelled)
        for job in gone:
            self.emit(job, [], "cancelled")
        while self.waiting:
            job = self.waiting[0]
            if self._reserved + job.reserved > self.capacity_tokens or len(self.running) >= self.max_running:
                return
            with self._wake:
                self.waiting.popleft()
            self.running.add(job)
            self._reserved += job.reserved
            try:
                self.do_begin(job)
            except Exception as error:  # nothing of it is in the batch yet: only this one fails
                self.end(job, error)

    def _drop_cancelled(self) -> None:
        for job in [job for job in self.running if job.stream.cancelled]:
            self.do_stop(job)
            self.emit(job, [], "cancelled")

    def _fail(self, error: Exception) -> None:
        """Everything in the batch ends; what waits goes on in a fresh one."""
        traceback.print_exception(error)
        self.failures += 1
        for job in list(self.running):
            self.end(job, error)
        self._deliver()
        try:
            self.do_recover()
        except Exception as again:  # no engine, no service: every later job fails the same way and says so
            traceback.print_exception(again)

    def end(self, job: Job, error: Exception) -> None:
        """This job fails, and says why."""
        lines = str(error).strip().splitlines() or [repr(error)]
        job.stream.error = f"the engine failed: {lines[-1][:200]}"
        self.emit(job, [], "failed")

    def _deliver(self) -> None:
        """One hop into each event loop for a whole step: a hop per token would cost more than the token.

        First tokens and ends never wait, so neither the time to the first token nor the last one gets later.
        """
        if len(self.running) < MANY or time.perf_counter() - self._delivered >= TOGETHER_SECONDS:
            due, self._delivered = self._outbox, time.perf_counter()
        else:
            due = {stream: item for stream, item in self._outbox.items() if item[1] is not None or not stream.begun}
        self._outbox = {stream: item for stream, item in self._outbox.items() if stream not in due}
        patient = len(self.running) >= MANY or any(tokens and not stream.begun for stream, (tokens, _) in due.items())
        by_loop: dict[asyncio.AbstractEventLoop, Outbox] = {}
        for stream, item in due.items():
            stream.begun = stream.begun or bool(item[0])
            if stream.loop is not None:
                by_loop.setdefault(stream.loop, {})[stream] = item
        for loop, items in by_loop.items():
            if not loop.is_closed():
                passed_on = threading.Event()
                loop.call_soon_threadsafe(_put_all, items, passed_on)
                if patient:
                    passed_on.wait(PATIENCE_SECONDS)


def _put_all(items: Outbox, passed_on: threading.Event) -> None:
    for stream, item in items.items():
        stream.queue.put_nowait(item)
    _after(HOPS, passed_on)


def _after(hops: int, passed_on: threading.Event) -> None:
    """Set the event after so many rounds of the event loop: from a stream's reader to the socket it takes that many.

    A first token takes the most (seven): until it comes, the status of its reply is not sent either.
    """
    if hops:
        asyncio.get_running_loop().call_soon(_after, hops - 1, passed_on)
    else:
        passed_on.set()
