"""A thousand people at once: nobody may be dropped, memory must stay inside its budget, and afterwards all is as before.

Why: a server is judged on its worst minute. It may refuse (429, with the time after which to come back), but it must not hang
up, grow without bound, or come out of the rush a different server.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence

import httpx
import psutil

from benchmarks.load import TIMEOUT, Ask, Target, closed_loop, figures, samples
from benchmarks.results import Record
from benchmarks.serving import peak_memory

CONNECTIONS = 1000
#: greedy replies compared before and after
REPLIES, REPLY_TOKENS = 3, 32
#: files a process has open beside its connections: libraries, logs, models
OTHER_FILES = 200


def rush(
    target: Target, process: psutil.Process, asks: Sequence[Ask], memory_budget: float | None, slo: dict[str, float]
) -> Record:
    """As many connections as `asks`, opened together, each for one chat. `memory_budget` in bytes, null where none is known."""
    questions = ["What helps with a headache?", "What is a fever?", "When should I see a doctor?"][:REPLIES]
    greedy(target, questions)  # from here on their prefixes are in the cache, before and after alike
    before = greedy(target, questions)
    with open_connections(process) as seen:
        load = asyncio.run(closed_loop(target, asks, len(asks), 0.0, len(asks)))
    after = greedy(target, questions)
    refused = [a for a in load.answers if a.status == 429]
    found = figures([load], slo)
    found |= {
        "peak_connections": float(max(seen)) if seen else None,
        "refused_without_retry_after": float(sum(not (a.retry_after or "").isdigit() for a in refused)),
        "max_ram": peak_memory(process),
        "memory_budget": memory_budget,
        "same_replies": sum(a is not None and a == b for a, b in zip(before, after, strict=True)) / len(before),
    }
    case: dict[str, str | int | float] = {
        "what": "connections", "max_concurrency": len(asks), "new_tokens": asks[0].output_tokens,
    }  # fmt: skip
    errors = sorted({a.error for a in load.answers if not a.ok and a.status != 429})
    return Record(suite="", model="", case=case, metrics=found, samples=samples([load]), note="; ".join(errors[:3]))


def greedy(target: Target, questions: Sequence[str]) -> list[str | None]:
    """The server's greedy replies, one at a time; None for one that did not come."""
    replies: list[str | None] = []
    for question in questions:
        body = {
            "model": target.model, "messages": [{"role": "user", "content": question}], "max_tokens": REPLY_TOKENS,
            "temperature": 0.0,
        }  # fmt: skip
        try:
            answer = httpx.post(f"{target.base_url}/chat/completions", json=body, headers=target.headers, timeout=TIMEOUT)
            answer.raise_for_status()
            replies.append(str(answer.json()["choices"][0]["message"]["content"]))
        except (httpx.HTTPError, KeyError, ValueError):
            replies.append(None)
    return replies


@contextlib.contextmanager
def open_connections(process: psutil.Process, every: float = 0.25) -> Iterator[list[int]]:
    """How many connections a process holds, read again and again; empty where the system does not tell."""
    seen: list[int] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(every):
            try:
                held = process.net_connections("tcp")
            except psutil.Error:
                return
            seen.append(sum(c.status == psutil.CONN_ESTABLISHED for c in held))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files as far as the system lets it; servers started from here on inherit it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES if hard == resource.RLIM_INFINITY else min(count + OTHER_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
