"""What people notice when one of several replicas is killed, and when a new version takes over: asked over HTTP all the while.

Why an engineer kills what works: "no request is lost" is a promise about the worst moment, and only that moment shows whether it
is kept. The replica is killed as the system kills one (SIGKILL) while it is working on something. Its journal then says what it
was working on; every request that failed and is not in there was lost by us.

    python -m benchmarks replicas [--side inference,service] [--replicas 2] [--out FILE]
    python -m benchmarks readme                       # docs/serving-at-scale.md from the published run

Needs a published model (`make ml`) and the extra [ray]. Works on a copy of the artifacts, so what is published stays as it is.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp

from benchmarks import results
from benchmarks.load import TIMEOUT, events
from benchmarks.results import Record, Result, spread
from benchmarks.runner import warn_if_busy
from benchmarks.serving import first_model, free_port
from shared import handoff
from shared.cluster import need_ray
from shared.errors import UserError
from shared.files import write_text
from shared.library import DATASETS, Question, read_rows
from shared.replicas import REPLICA_HEADER, REQUEST_ID, Journaled, read_journals
from shared.settings import ROOT

NAME = "replicas"
#: people who ask one after the other, and how long each waits between two questions of the service (it counts them by address)
CLIENTS, PAUSE = 8, {"inference": 0.0, "service": 5.0}
#: requests answered before something happens; seconds of load after it is over
WARM, SETTLE = 4 * CLIENTS, 3.0
#: how long a start, a recovery or an update may take before the run is given up, in seconds
PATIENCE, STOP_SECONDS = 600.0, 120.0
REPLY_TOKENS = 64
PUBLISHED = ROOT / "benchmarks" / "results" / "replicas" / "cpu.json"
WHAT = {"kill": "one killed", "update": "all replaced"}
ROWS = {
    "requests": "requests",
    "failed": "failed",
    "in_flight_on_the_killed": "being worked on by the killed replica",
    "failed_elsewhere": "**failed and were not its own** (promised: 0)",
    "seconds_until_all_are_back": "seconds until a new replica answered",
    "seconds_to_replace": "seconds until every replica had the new version",
    "old_version_afterwards": "answered by the old version afterwards (promised: 0)",
    "median_e2el_ms": "whole reply, median ms",
    "p99_e2el_ms": "whole reply, 99th percentile ms",
}


@dataclass
class Sent:
    """One request and what became of it. `replica` is empty when no answer had begun."""

    name: str
    ok: bool = False
    error: str = ""
    replica: str = ""
    seconds: float = 0.0


@dataclass
class Conversation:
    """What the next message goes on with, if anything."""

    session_id: str = ""


@dataclass(frozen=True)
class Side:
    """A running command: its address, its replicas' journals, what it printed, what it works on, and the model it serves."""

    name: str
    url: str
    journals: Path
    log: Path
    artifacts: Path
    corpus: Path
    model: str = ""


def run(sides: Sequence[str], replicas: int, out: Path | None) -> tuple[Result, Path]:
    """Kill one replica of each side, then replace a version, and write what happened. UserError when a side does not start."""
    need_ray("benchmarks replicas", "serve")
    if unknown := [name for name in sides if name not in SIDES]:
        raise UserError(f"unknown side {unknown[0]!r}", "--side", f"Use: {', '.join(SIDES)}")
    started, environment = time.perf_counter(), results.environment()
    warn_if_busy(environment)
    result = Result(test_time=results.now(), suites=[NAME], environment=environment)
    path = out or results.RUNS / f"{result.test_time.replace(':', '').replace('+0000', 'Z')}-replicas.json"
    for name in sides or list(SIDES):
        print(f"{name}: starting {replicas} replicas", flush=True)
        with running(name, replicas) as side:
            for what, happening in (("kill", kill_one), ("update", update)):
                record = asyncio.run(under_load(side, what, replicas, happening))
                result.records.append(record)
                result.seconds = time.perf_counter() - started
                results.write(result, path)
                told = (f"{value:.4g} {name}" for name, value in record.metrics.items() if value is not None)
                print(f"  {what}: {', '.join(told)}", flush=True)
    result.status = "complete"
    results.write(result, path)
    return result, path


async def under_load(
    side: Side, what: str, replicas: int, happening: Callable[[Side, list[Sent]], Awaitable[dict[str, float]]]
) -> Record:
    """Clients that ask until `happening` is over, and the figures of both."""
    sent: list[Sent] = []
    over = asyncio.Event()
    questions = [row.question for row in read_rows(DATASETS, "questions.jsonl", Question)[0] if row.split == "train"][:200]

    async def client(number: int) -> None:
        rng, conversation = random.Random(number), Conversation()
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=TIMEOUT), cookie_jar=aiohttp.CookieJar(unsafe=True), read_bufsize=2**20
        ) as session:
            while not over.is_set():
                one = Sent(f"{what}-{number}-{len(sent)}-{rng.randrange(10**9)}")
                began = time.perf_counter()
                try:
                    await SIDES[side.name].ask(session, side, rng.choice(questions), one, conversation)
                except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                    one.error = f"{type(error).__name__}: {error}"[:200]
                one.seconds = time.perf_counter() - began
                sent.append(one)
                await asyncio.sleep(max(PAUSE[side.name] - one.seconds, 0.0 if one.ok else 0.05))

    clients = [asyncio.create_task(client(n)) for n in range(CLIENTS)]
    try:
        found = await happening(side, sent)
        await asyncio.sleep(SETTLE)
    finally:
        over.set()
        await asyncio.gather(*clients)
    failed = [one for one in sent if not one.ok]
    lost = read_lost(side) if what == "kill" else frozenset()
    metrics: dict[str, float | None] = {
        "requests": float(len(sent)),
        "failed": float(len(failed)),
        **({"in_flight_on_the_killed": float(len(lost))} if what == "kill" else {}),
        "failed_elsewhere": float(sum(one.name not in lost for one in failed)),
        **found,
        **spread("e2el", [1e3 * one.seconds for one in sent if one.ok]),
    }
    case: dict[str, str | int | float] = {"what": what, "replicas": replicas, "clients": CLIENTS}
    note = "; ".join(sorted({one.error for one in failed})[:3])
    return Record(suite=NAME, model=side.name, case=case, metrics=metrics, note=note)


async def kill_one(side: Side, sent: list[Sent]) -> dict[str, float]:
    """Kill the replica with most to do; over when one that was not there before has answered."""
    await until(lambda: sum(one.ok for one in sent) >= WARM, "the load did not begin")
    before = {journal.replica for journal in read_journals(side.journals)}
    victim = max(alive(side), key=lambda j: len(j.unfinished))
    await until(lambda: bool(of(side, victim.pid).unfinished), "the replica had nothing to do")
    killed = time.perf_counter()
    os.kill(victim.pid, signal.SIGKILL)
    await until(lambda: any(one.ok and one.replica not in before for one in sent), "no new replica came")
    return {"seconds_until_all_are_back": time.perf_counter() - killed}


async def update(side: Side, sent: list[Sent]) -> dict[str, float]:
    """Publish another version; over when the command says that every replica serves it."""
    await until(lambda: sum(one.ok for one in sent) >= WARM, "the load did not begin")
    told = side.log.read_text(encoding="utf-8").count("\nserving ")
    moved = time.perf_counter()
    await asyncio.to_thread(SIDES[side.name].publish, side)
    published = time.perf_counter()
    await until(lambda: side.log.read_text(encoding="utf-8").count("\nserving ") > told, "the new version was not served")
    served = time.perf_counter()
    newest = max(read_journals(side.journals), key=lambda j: j.ready).version
    await asyncio.sleep(SETTLE)
    late = len(sent)
    await until(lambda: len(sent) >= late + CLIENTS, "the load stopped")
    versions = {journal.replica: journal.version for journal in read_journals(side.journals)}
    old = sum(one.ok and versions.get(one.replica) != newest for one in sent[late:])
    return {
        "seconds_to_publish": published - moved,
        "seconds_to_replace": served - published,
        "old_version_afterwards": float(old),
    }


def alive(side: Side) -> list[Journaled]:
    """The replicas whose process is there."""
    return [journal for journal in read_journals(side.journals) if Path(f"/proc/{journal.pid}").exists()]


def of(side: Side, pid: int) -> Journaled:
    return next(journal for journal in read_journals(side.journals) if journal.pid == pid)


def read_lost(side: Side) -> frozenset[str]:
    """What replicas whose process is gone had begun and not ended; those that were replaced in order have ended everything."""
    here = {journal.pid for journal in alive(side)}
    return frozenset().union(*(journal.unfinished for journal in read_journals(side.journals) if journal.pid not in here))


async def until(true: Callable[[], bool], else_: str) -> None:
    """UserError when it does not come true in PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not await asyncio.to_thread(true):
        if time.monotonic() > deadline:
            raise UserError(f"{else_} within {PATIENCE:.0f} s", NAME, "Look at the log of the command")
        await asyncio.sleep(0.05)


# --- the two sides ---------------------------------------------------------------------------------------------------


@contextmanager
def running(name: str, replicas: int) -> Iterator[Side]:
    """The command of a side, as a user starts it, on a copy of the published artifacts."""
    source = Path(os.environ.get("ARTIFACTS") or ROOT / "artifacts")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        side = Side(
            name, f"http://127.0.0.1:{port}", Path(folder) / "artifacts" / "logs" / "replicas" / name, Path(folder) / "log",
            Path(folder) / "artifacts", Path(folder) / "corpus",
        )  # fmt: skip
        if name == "inference" or not os.environ.get("LLM_BASE_URL"):
            version = handoff.current(source / "models")
            shutil.copytree(version, side.artifacts / "models" / version.name)
            handoff.set_current(side.artifacts / "models", version.name)
        shutil.copytree(os.environ.get("CORPUS") or DATASETS / "health_library", side.corpus)
        command = [sys.executable, "-m", f"{SIDES[name].track}", "serve-ray", "--replicas", str(replicas)]
        command += ["--port", str(port)] if name == "inference" else []
        with side.log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment_of(side) | {"PORT": str(port)}
            )
        try:
            _wait(process, side.log)
            yield replace(side, model=first_model(f"{side.url}/v1")) if name == "inference" else side
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def environment_of(side: Side) -> dict[str, str]:
    """This shell's, with the copy in place of what is published."""
    return {**os.environ, "ARTIFACTS": str(side.artifacts), "CORPUS": str(side.corpus), "HF_HUB_OFFLINE": "1"}


async def ask_inference(session: aiohttp.ClientSession, side: Side, question: str, sent: Sent, _: Conversation) -> None:
    """A streamed chat of a fixed length; whole when the stream says so."""
    body = {
        "model": side.model, "messages": [{"role": "user", "content": question}], "max_tokens": REPLY_TOKENS, "temperature": 0.0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    async with session.post(f"{side.url}/v1/chat/completions", json=body, headers={REQUEST_ID: sent.name}) as response:
        sent.replica = response.headers.get(REPLICA_HEADER, "")
        if response.status != 200:
            sent.error = f"{response.status}: {(await response.text())[:120]}"
            return
        async for event in events(response):
            if event == "[DONE]":
                sent.ok = True
            elif "error" in json.loads(event):
                sent.error = event[:120]
        sent.error = sent.error or ("" if sent.ok else "the stream broke off")


async def ask_service(session: aiohttp.ClientSession, side: Side, question: str, sent: Sent, talk: Conversation) -> None:
    """A message; every other one goes on with the conversation of the one before, which another replica may have answered."""
    headers = {REQUEST_ID: sent.name, "Accept": "text/event-stream"}
    body = {"message": question} | ({"session_id": talk.session_id} if talk.session_id else {})
    talk.session_id = ""
    async with session.post(f"{side.url}/chat", json=body, headers=headers) as response:
        sent.replica = response.headers.get(REPLICA_HEADER, "")
        if response.status != 200:
            sent.error = f"{response.status}: {(await response.text())[:120]}"
            return
        last = {}
        async for event in events(response):
            last = json.loads(event)
        sent.ok = last.get("turn", {}).get("kind", "unavailable") != "unavailable"
        sent.error = "" if sent.ok else f"the stream ended with {str(last)[:80]}"
        talk.session_id = "" if "session_id" in body else response.headers.get("X-Session-ID", "")


def publish_model(side: Side) -> None:
    """The same weights as a version of another name: what is measured is the change, not the model."""
    old = handoff.current(side.artifacts / "models")
    new = old.with_name(f"{old.name}-again")
    shutil.copytree(old, new)
    manifest = handoff.read_manifest(new)
    write_text(new / "manifest.json", manifest.model_copy(update={"version": new.name}).model_dump_json(indent=2) + "\n")
    handoff.write_sums(new)
    handoff.set_current(side.artifacts / "models", new.name)


def publish_documents(side: Side) -> None:
    """One leaflet is withdrawn and the index brought up to date."""
    sorted(side.corpus.glob("*.md"))[-1].unlink()
    command = [sys.executable, "-m", "ai_engineer_track", "ingest"]
    subprocess.run(command, cwd=ROOT, env=environment_of(side), check=True, capture_output=True)


@dataclass(frozen=True)
class Kind:
    """A side's package, how a person asks it, and how a new version of what it serves comes about."""

    track: str
    ask: Callable[[aiohttp.ClientSession, Side, str, Sent, Conversation], Awaitable[None]]
    publish: Callable[[Side], None]


SIDES = {
    "inference": Kind("ml_engineer_track", ask_inference, publish_model),
    "service": Kind("ai_engineer_track", ask_service, publish_documents),
}


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while "ready: " not in (told := log.read_text(encoding="utf-8", errors="replace")):
        if process.poll() is not None or time.monotonic() > deadline:
            last = (told.strip().splitlines() or ["no output"])[-1].removeprefix("error: ")
            raise UserError(f"the replicas did not start: {last}")
        time.sleep(0.2)


# --- the page --------------------------------------------------------------------------------------------------------


def markdown(result: Result) -> str:
    """The table of docs/serving-at-scale.md."""
    environment = result.environment
    head = "| | " + " | ".join(f"{r.model}, {WHAT[str(r.case['what'])]}" for r in result.records) + " |"
    rows = [
        f"| {text} | " + " | ".join(_cell(record.metrics.get(name)) for record in result.records) + " |"
        for name, text in ROWS.items()
    ]
    made = f"{environment['cpu_info']}, {environment['cpu_cores']} cores, {environment['memory_gib']} GiB"
    case = result.records[0].case
    run = f"commit {environment['build_commit']}, {result.test_time}"
    return "\n".join(
        [head, "|---|" + "---|" * len(result.records), *rows, "",
         f"{case['replicas']} replicas, {case['clients']} clients, {made}, {run}."]
    )  # fmt: skip


def page_text() -> str:
    """What stands between the marks of docs/serving-at-scale.md."""
    return markdown(results.read(PUBLISHED)) if PUBLISHED.exists() else "Not measured yet: `python -m benchmarks replicas`."


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.1f}"
