"""An engine in a process of its own, beside the server: steps and the Python that sends their tokens on run at the same time.

Why: a step of openvino-genai holds Python's interpreter lock. In one process the engine therefore stands still whenever the
server lays out a prompt or sends a word, and the server whenever the engine computes; with a small model both take about as
long. (vLLM's engine core is a process for the same reason.) And an engine that crashes outright, in foreign code, takes its
batch along and not the server: the next request finds a new process.

Only the batch moves there. Admission, queues and delivery stay here with `Engine`; the two talk through a pipe: requests
to begin and to stop one way, what each step gave the other way. The process steps as long as anything runs, whether or not its
last step has been read.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ml_engineer_track.serving.engine import Engine, Finish, Generation, Job, Stream, Token
from shared.errors import UserError
from shared.level_memory import keep_memory_level

#: how long a process may take to end by itself once its pipe is closed
END_SECONDS = 5.0


@dataclass(frozen=True)
class Begin:
    number: int
    generation: Generation


@dataclass(frozen=True)
class Stop:
    number: int


@dataclass(frozen=True)
class Recover:
    """What was sent before it belonged to a batch that failed; answers `Failed`."""


@dataclass(frozen=True)
class Loaded:
    capacity_tokens: int


@dataclass(frozen=True)
class Failed:
    why: str


#: what a step gave each request: its number, its tokens (id, log probability, alternatives), why it ended, and the error if one
News = list[tuple[int, list[tuple[Any, ...]], Finish | None, str | None]]


class EngineProcess(Engine):
    """Runs the engine that `make` makes in another process; `make` is pickled, so it is a class or a `partial` of one."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self.local = make()  # never loaded: it only says what the one over there can do
        super().__init__(self.local.max_running, self.local.max_waiting)
        self.make, self.name, self.block = make, self.local.name, self.local.block
        self.jobs: dict[int, Job] = {}
        self.number = 0
        self.process: multiprocessing.process.BaseProcess | None = None
        atexit.register(self.close)  # Python waits for the process at its end, and the process for its pipe to close

    def check(self, generation: Generation) -> None:
        self.local.check(generation)

    def do_load(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(self.make, theirs), name=f"engine {self.name}", daemon=True)
        self.process.start()
        theirs.close()
        answer = self.receive()
        if isinstance(answer, UserError):
            raise answer
        self.capacity_tokens = answer.capacity_tokens

    def do_begin(self, job: Job) -> None:
        if not self.jobs and not self.alive():
            self.do_load()
        self.number += 1
        job.state = self.number
        self.pipe.send(Begin(job.state, job.generation))
        self.jobs[job.state] = job

    def do_step(self) -> None:
        for number, tokens, finish, error in self.receive():
            job = self.jobs.get(number)
            if job is None:
                continue  # cancelled in the meantime
            if finish is not None:
                del self.jobs[number]
            job.stream.error = error
            self.emit(job, [Token(*token) for token in tokens], finish)

    def do_stop(self, job: Job) -> None:
        self.jobs.pop(job.state, None)
        self.pipe.send(Stop(job.state))

    def do_recover(self) -> None:
        self.jobs.clear()
        if self.alive():
            self.pipe.send(Recover())
        else:
            self.do_load()

    def receive(self) -> Any:
        """The next message. RuntimeError when it says that a step failed, or when the process is gone."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            assert self.process is not None
            self.process.join(END_SECONDS)
            raise RuntimeError(f"its process ended (exit status {self.process.exitcode})") from None
        if isinstance(message, Failed):
            raise RuntimeError(message.why)
        return message

    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def close(self) -> None:
        atexit.unregister(self.close)
        super().close()
        if self.process is not None:
            self.pipe.close()
            self.process.join(END_SECONDS)
            if self.process.is_alive():  # in a step that does not end
                self.process.kill()


# --- in the other process --------------------------------------------------------------------------------------------


def work(make: Callable[[], Engine], pipe: Connection) -> None:
    """Load, then step until the pipe is closed. Signals are the server's: it drains first and closes the pipe last."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    keep_memory_level()  # a limit set in the server's process is not inherited
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        engine = make()
        try:
            engine.do_load()
        except UserError as problem:
            pipe.send(problem)
        except Exception as error:
            traceback.print_exception(error)
            pipe.send(Failed(f"loading failed: {error!r}"))
        else:
            pipe.send(Loaded(engine.capacity_tokens))
            Worker(engine, pipe).run()


class Worker:
    """The batch of an engine, moved by what comes through the pipe."""

    def __init__(self, engine: Engine, pipe: Connection) -> None:
        self.engine, self.pipe = engine, pipe
        self.jobs: dict[int, Job] = {}

    def run(self) -> None:
        """Until the pipe is closed, which is an EOFError or BrokenPipeError."""
        while True:
            while not self.jobs or self.pipe.poll():
                if not self.jobs and not self.pipe.poll():
                    self.rest()
                self.obey(self.pipe.recv())
            try:
                self.engine.do_step()
            except Exception as error:
                self.fail(error)
            else:
                self.tell()

    def rest(self) -> None:
        try:
            self.engine.do_rest()
        except Exception as error:  # whoever comes next is told, and finds an engine that has recovered
            self.fail(error)

    def obey(self, order: Begin | Stop | Recover) -> None:
        if isinstance(order, Recover):
            self.start_again()
        elif isinstance(order, Begin):
            job = self.jobs[order.number] = Job(order.generation, Stream(None), 0, state=None)
            self.engine.running.add(job)
            try:
                self.engine.do_begin(job)
            except Exception as error:  # nothing of it is in the batch yet: only this one fails
                self.engine.end(job, error)
        elif job := self.jobs.pop(order.number, None):  # type: ignore[assignment]
            self.engine.do_stop(job)
            self.engine.running.discard(job)

    def tell(self) -> None:
        """One message for the whole step."""
        numbers = {job.stream: number for number, job in self.jobs.items()}
        news: News = []
        for stream, (tokens, finish) in self.engine.take().items():
            if stream in numbers:
                plain = [(t.id, t.logprob, t.alternatives) for t in tokens]
                news.append((numbers[stream], plain, finish, stream.error))
                if finish is not None:
                    del self.jobs[numbers[stream]]
        self.pipe.send(news)

    def fail(self, error: Exception) -> None:
        """Everything in the batch ends, also what was sent before the server knew."""
        traceback.print_exception(error)
        self.pipe.send(Failed(reason(error)))
        while not isinstance(self.pipe.recv(), Recover):
            pass
        self.start_again()

    def start_again(self) -> None:
        self.jobs.clear()
        self.engine.running.clear()
        self.engine.take()
        self.engine.do_recover()


def reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[-1]
