"""People at the product: the whole service as a process of its own, and messages that arrive whether or not it is ready.

Why beside benchmarks/load.py: that one loads a model's server with prompts; this one asks the product, whose every message is
triage, search, several model calls and a check. What a person feels is the time to the first word they can read. Arrivals are
a Poisson process (open loop): people do not wait for each other. No message is sent twice in a run, so that no answer comes
from the cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from ai_engineer_track.evaluate import sse_events
from ai_engineer_track.inference import free_port, stop
from ai_engineer_track.pipeline import SUITE_RATE_PER_MINUTE, own_folder
from benchmarks.load import arrivals
from shared import library as lib
from shared.errors import UserError

START_SECONDS = 180.0
#: a message may take this long before it counts as failed, in seconds
PATIENCE = 60.0
#: turned away, and told so: by the rate limit, or because too many are asking
REFUSED = (429, 503)


@dataclass(frozen=True)
class Running:
    """The service: where it answers, the process that was started, and what it keeps."""

    url: str
    process: psutil.Process
    artifacts: Path

    def parts(self) -> dict[str, psutil.Process]:
        """Its processes that are alive, by what they are: `service`, `inference` and the `engine` beneath it.

        The one that was started only watches.
        """
        found: dict[str, psutil.Process] = {}
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = child.cmdline()
                if "ml_engineer_track" in line:
                    found["inference"] = child
                elif any("spawn_main" in word for word in line):
                    found["engine"] = child
                elif "--unsupervised" in line:
                    found["service"] = child
        return found


@dataclass
class Reply:
    """What came of a message; seconds from the moment it was sent. `first_word` is None for one that got no text."""

    message: str
    status: int = 0
    kind: str = ""
    first_word: float | None = None
    seconds: float = 0.0
    late: float = 0.0
    retry_after: str = ""
    error: str = ""

    @property
    def answered(self) -> bool:
        return self.status == 200 and not self.error and self.first_word is not None

    @property
    def refused(self) -> bool:
        return self.status in REFUSED


@contextmanager
def running_service(artifacts: Path, name: str, copied: Sequence[str] = ()) -> Iterator[Running]:
    """`python -m ai_engineer_track serve` on a free port, with an empty `artifacts/<name>` for all it writes.

    UserError when it does not become ready; its log is `artifacts/<name>/service.log`.
    """
    folder, port = own_folder(artifacts, name, copied), free_port()
    environment = os.environ | {"ARTIFACTS": str(folder), "PORT": str(port), "HOST": "127.0.0.1"}
    environment["RATE_PER_MINUTE"] = str(SUITE_RATE_PER_MINUTE)  # all these people come from one address
    url, log = f"http://127.0.0.1:{port}", folder / "service.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "ai_engineer_track", "serve"]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until_ready(url, START_SECONDS, lambda: process.poll() is None, log)
        yield Running(url, psutil.Process(process.pid), folder)
    finally:
        stop(process)


def wait_until_ready(url: str, seconds: float, alive: Callable[[], bool], log: Path) -> float:
    """Seconds until `/ready` says yes. UserError when it takes longer than `seconds`, or when the process ended."""
    began = time.monotonic()
    while time.monotonic() - began < seconds and alive():
        try:
            if httpx.get(f"{url}/ready", timeout=5.0).status_code == 200:
                return time.monotonic() - began
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise UserError("the service did not become ready", url, f"Read {log}")


def messages(datasets: Path, seed: int) -> list[str]:
    """What people send: every question, opening and emergency of the data sets once, in an order that `seed` decides."""
    questions = [q.question for q in lib.read_rows(datasets, "questions.jsonl", lib.Question)[0]]
    openings = [c.opening for c in lib.read_rows(datasets, "cases.jsonl", lib.Case)[0]]
    emergencies = [e.message for e in lib.read_rows(datasets, "emergencies.jsonl", lib.Emergency)[0]]
    found = list(dict.fromkeys([*questions, *openings, *emergencies]))
    random.Random(f"{seed}/people").shuffle(found)
    return found


async def arrive(
    url: str, texts: Sequence[str], rate: float, seed: int, on_reply: Callable[[Reply], object] | None = None
) -> list[Reply]:
    """Send every text at its moment of a Poisson process of `rate` a second, each as a person of its own."""
    moments = arrivals(rate, len(texts), seed)
    start = time.perf_counter()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)

    async def one(client: httpx.AsyncClient, moment: float, text: str) -> Reply:
        await asyncio.sleep(max(0.0, moment - (time.perf_counter() - start)))
        late = time.perf_counter() - start - moment
        reply = await say(client, text)
        reply.late = late
        if on_reply:
            on_reply(reply)
        return reply

    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
        return list(await asyncio.gather(*(one(client, m, t) for m, t in zip(moments, texts, strict=True))))


async def say(client: httpx.AsyncClient, text: str) -> Reply:
    """Begin a conversation with `text` and read the stream to its end. Never raises: what went wrong stands in the reply."""
    reply, began, done = Reply(text), time.perf_counter(), False
    client.cookies.clear()  # the next message comes from somebody else
    try:
        async with client.stream("POST", "/chat", json={"message": text}, headers={"Accept": "text/event-stream"}) as response:
            reply.status, reply.retry_after = response.status_code, response.headers.get("retry-after", "")
            if response.status_code == 200:
                async for name, data in sse_events(response):
                    if reply.first_word is None and (name == "question" or (name == "delta" and data.get("delta"))):
                        reply.first_word = time.perf_counter() - began
                    if name == "done":
                        done, reply.kind = True, data["turn"]["kind"]
                    if name == "error":
                        reply.error = str(data.get("message", "an error"))[:200]
                reply.error = reply.error or ("" if done else "the stream broke off")
    except (httpx.HTTPError, ValueError, OSError) as error:
        reply.error = f"{type(error).__name__}: {error}"[:200]
    reply.seconds = time.perf_counter() - began
    return reply
