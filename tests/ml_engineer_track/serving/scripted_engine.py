"""An engine for other processes, in a file that loads little: it is imported by path, because some library installs a `tests`."""

from __future__ import annotations

import os
import signal
import time

from ml_engineer_track.serving.engine import Engine, Job, Token
from shared.errors import UserError


class Scripted(Engine):
    """Answers with 100, 101, ...; a prompt of one of these tokens makes it do something else in its second step."""

    FAIL, CRASH, REFUSE, LAST = 1, 2, 3, 9
    FAILING_REST = 0
    name = "scripted"

    def __init__(self, loads: bool = True) -> None:
        super().__init__(max_running=8, max_waiting=100)
        self.loads = loads

    def do_load(self) -> None:
        if not self.loads:
            raise UserError("no such file", "here", "Bring one")
        self.capacity_tokens = 1000

    def do_begin(self, job: Job) -> None:
        if job.generation.prompt[0] == self.REFUSE:
            raise ValueError("a prompt like that")
        job.state = 100

    def do_step(self) -> None:
        time.sleep(0.002)
        for job in list(self.running):
            job.state += 1
            if len(job.tokens) == 1 and job.generation.prompt[0] == self.FAIL:
                raise RuntimeError("the matrix fell over")
            if len(job.tokens) == 1 and job.generation.prompt[0] == self.CRASH:
                os.kill(os.getpid(), signal.SIGKILL)
            self.emit(job, [Token(job.state - 1, -0.5, ((7, -1.0),))], "length" if job.remaining == 1 else None)

    def do_stop(self, job: Job) -> None:
        job.state = None

    def do_recover(self) -> None: ...

    def do_rest(self) -> None:
        self.rests = getattr(self, "rests", 0) + 1
        if self.rests == self.FAILING_REST:
            raise RuntimeError("no rest")


class Restless(Scripted):
    """One that fails the second time it rests."""

    FAILING_REST = 2
