"""A load generator for any server that speaks the OpenAI HTTP API: closed loop, open loop, and vLLM's figures.

Why two loops: in a **closed loop** a fixed number of clients each wait for their reply before they ask again, which shows
what a server can do; in an **open loop** requests arrive when people send them (a Poisson process), whether or not the
server is ready, which shows what people will feel. A server near saturation looks fine in the first and drowns in the second.

Names and formulas are those of vLLM's `benchmarks/serve.py`, times in milliseconds:
- ttft: request sent until the first chunk with content; itl: gaps between chunks; e2el: until the last chunk
- tpot: (e2el - ttft) / (output tokens - 1), for requests of at least two tokens
- output_throughput: output tokens of completed requests / duration; request_throughput: completed / duration
- request_goodput: completed requests that keep every bound of the SLO / duration
Token counts are the server's own (`usage`). Percentiles are taken over all requests of a case, never averaged.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.results import spread

#: A request may take this long before it counts as failed, in seconds.
TIMEOUT = 300.0


@dataclass(frozen=True)
class Target:
    """Where requests go. `extra` is added to every body."""

    base_url: str
    model: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        key = os.environ.get("OPENAI_API_KEY")
        return {"Authorization": f"Bearer {key}"} if key else {}


@dataclass(frozen=True)
class Ask:
    """One request: its text, and how many tokens the reply must have. `extra` is added to its body."""

    prompt: str
    output_tokens: int
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """What happened to a request. Times in seconds; `late` is how long after its planned moment it was sent."""

    ok: bool = False
    status: int = 0
    error: str = ""
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    e2el: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    late: float = 0.0
    retry_after: str | None = None

    @property
    def tpot(self) -> float | None:
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.ok and self.output_tokens > 1 else None


@dataclass(frozen=True)
class Load:
    """All answers of one round and the seconds from its start to its last answer."""

    answers: list[Answer]
    duration: float


async def closed_loop(target: Target, asks: Sequence[Ask], concurrency: int, seconds: float, at_least: int = 0) -> Load:
    """`concurrency` clients ask one after the other until `seconds` are over and `at_least` requests were sent.

    Every client finishes what it began. `asks` are taken in order, from the start again when they run out.
    """
    answers: list[Answer] = []
    sent = 0
    start = time.perf_counter()

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal sent
        while time.perf_counter() - start < seconds or sent < at_least:
            ask_now = asks[sent % len(asks)]
            sent += 1
            answer = await ask(session, target, ask_now)
            answers.append(answer)
            if not answer.ok:
                await asyncio.sleep(0.05)  # a server that refuses at once must not be hammered

    async with connection(concurrency) as session:
        await asyncio.gather(*(client(session) for _ in range(concurrency)))
    return Load(answers, time.perf_counter() - start)


async def open_loop(target: Target, asks: Sequence[Ask], rate: float, requests: int, seed: int) -> Load:
    """`requests` requests with exponential gaps of mean 1 / `rate` seconds, sent on time whatever the server does."""
    moments = arrivals(rate, requests, seed)
    start = time.perf_counter()

    async def one(session: aiohttp.ClientSession, moment: float, request: Ask) -> Answer:
        await asyncio.sleep(max(0.0, moment - (time.perf_counter() - start)))
        late = time.perf_counter() - start - moment
        answer = await ask(session, target, request)
        answer.late = late
        return answer

    async with connection(requests) as session:
        answers = await asyncio.gather(*(one(session, moment, asks[n % len(asks)]) for n, moment in enumerate(moments)))
    return Load(list(answers), time.perf_counter() - start)


def arrivals(rate: float, requests: int, seed: int) -> list[float]:
    """Seconds from the start of each arrival of a Poisson process; the same for the same seed."""
    rng = random.Random(f"{seed}/{rate}")
    moments, now = [], 0.0
    for _ in range(requests):
        moments.append(now)
        now += rng.expovariate(rate)
    return moments


def connection(limit: int) -> aiohttp.ClientSession:
    """One connection for each request in flight, and none shared: clients are different people."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=max(1, limit)), timeout=aiohttp.ClientTimeout(total=TIMEOUT), read_bufsize=2**20
    )


async def ask(session: aiohttp.ClientSession, target: Target, request: Ask) -> Answer:
    """Send one streamed chat completion and time it. Never raises: what went wrong stands in the answer."""
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": request.prompt}],
        "max_tokens": request.output_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra,
        **request.extra,
    }
    answer = Answer()
    start = time.perf_counter()
    try:
        async with session.post(f"{target.base_url}/chat/completions", json=body, headers=target.headers) as response:
            answer.status = response.status
            if response.status != 200:
                answer.retry_after = response.headers.get("Retry-After")
                answer.error = (await response.text())[:200]
                return answer
            await _read(response, answer, start)
    except (aiohttp.ClientError, TimeoutError, OSError, json.JSONDecodeError) as error:
        answer.error = f"{type(error).__name__}: {error}"[:200]
    return answer


async def _read(response: aiohttp.ClientResponse, answer: Answer, start: float) -> None:
    last, chunks, finished = 0.0, 0, False
    async for event in events(response):
        if event == "[DONE]":
            finished = True
            break
        part = json.loads(event)
        if "error" in part:
            answer.error = str(part["error"])[:200]
            return
        now = time.perf_counter()
        if usage := part.get("usage"):
            answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        for choice in part.get("choices") or []:
            finished = finished or bool(choice.get("finish_reason"))  # `transformers serve` sends no [DONE]
            if (choice.get("delta") or {}).get("content"):
                if chunks:
                    answer.itl.append(now - last)
                else:
                    answer.ttft = now - start
                chunks, last = chunks + 1, now
    answer.e2el = (last or time.perf_counter()) - start
    answer.output_tokens = answer.output_tokens or chunks
    answer.ok = finished and chunks > 0
    if not answer.ok:
        answer.error = "the stream broke off" if not finished else "an empty reply"


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """The data of each server-sent event."""
    async for line in response.content:
        text = line.decode("utf-8").strip()
        if text.startswith("data:"):
            yield text[5:].strip()


def figures(loads: Iterable[Load], slo: dict[str, float]) -> dict[str, float | None]:
    """vLLM's figures over all requests of some rounds. `slo` bounds ttft, tpot, itl or e2el, in milliseconds."""
    loads = list(loads)
    answers = [a for load in loads for a in load.answers]
    good = [a for a in answers if a.ok]
    duration = sum(load.duration for load in loads)
    output = sum(a.output_tokens for a in good)
    prompt = sum(a.prompt_tokens for a in good)
    itl = [1e3 * gap for a in good for gap in a.itl]
    late = spread("late", [1e3 * a.late for a in answers])
    return {
        "completed": float(len(good)),
        "failed": float(sum(not a.ok and a.status != 429 for a in answers)),
        "rejected": float(sum(a.status == 429 for a in answers)),
        "duration": duration,
        "total_input_tokens": float(prompt),
        "total_output_tokens": float(output),
        "request_throughput": len(good) / duration,
        "request_goodput": sum(keeps(a, slo) for a in good) / duration,
        "output_throughput": output / duration,
        "total_token_throughput": (prompt + output) / duration,
        **spread("ttft", [1e3 * a.ttft for a in good]),
        **spread("tpot", [1e3 * a.tpot for a in good if a.tpot is not None]),
        **spread("itl", itl),
        **spread("e2el", [1e3 * a.e2el for a in good]),
        "p99_send_delay_ms": late["p99_late_ms"],
    }


def keeps(answer: Answer, slo: dict[str, float]) -> bool:
    """Does this request keep every bound? A bound on tpot is kept by a reply of one token."""
    measured = {
        "ttft": answer.ttft,
        "tpot": answer.tpot or 0.0,
        "itl": max(answer.itl, default=0.0),
        "e2el": answer.e2el,
    }
    return answer.ok and all(1e3 * measured[name] <= bound for name, bound in slo.items())


def samples(loads: Sequence[Load]) -> dict[str, list[float]]:
    """What `compare` works on: one throughput for each round, and the times of each request."""
    good = [a for load in loads for a in load.answers if a.ok]
    return {
        "output_throughput": [sum(a.output_tokens for a in load.answers if a.ok) / load.duration for load in loads],
        "ttft_ms": [1e3 * a.ttft for a in good],
        "tpot_ms": [1e3 * a.tpot for a in good if a.tpot is not None],
        "e2el_ms": [1e3 * a.e2el for a in good],
    }
