"""Faults on purpose, while twenty people are talking: what do they see, what is lost, and does it come back without hands?

    python -m benchmarks faults [--only kill-inference,full-disk]        (make faults)

Why: every part of a product fails one day, and the day is not chosen by us. Each trial starts the real service, lets twenty
people talk to it and give feedback, breaks one thing in the middle, and keeps their accounts. Held against them afterwards:

- no wrong answer: every sentence that was quoted stands verbatim in the library
- no lost feedback: every thumb that was acknowledged (201) is in the file
- no lost conversation: every exchange that was completed is in its conversation's history
- recovery without hands: `/ready` says yes again, and everybody gets an answer in the end
- a clear message: whoever got none was told so in a sentence, by the service or, where it is gone, by the page itself
- a break that broke something, and only that: what it must leave alone (the index and the model in use) is what it was

Skewed clocks are tested inside a process (tests/ai_engineer_track/api/test_clock.py): no fault from outside can reach that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from ai_engineer_track.evaluate import sse_events
from benchmarks.people import Running, messages, running_service
from shared import feedback, page
from shared import library as lib
from shared.errors import UserError
from shared.files import write_json, write_text
from shared.handoff import current, verify
from shared.hardware import fingerprint
from shared.settings import Settings

PEOPLE, EACH = 20, 5  # people, and messages each of them sends
PAUSE = 2.0  # seconds a person reads before the next message
FAULT_AFTER = 6.0  # seconds into the talk
PATIENCE = 120.0  # seconds until a person gives up
#: what the page itself shows when it gets no reply, or half of one
PAGE_SAYS = "(the page) The service cannot be reached. Please try again in a moment."
PAGE_SAYS_BROKEN = "(the page) The connection broke before the answer was complete. Please try again."


@dataclass
class Account:
    """What one person lived through. `completed` are the exchanges whose end they saw; `told` what they read instead."""

    session: str = ""
    completed: list[dict[str, Any]] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    gave_up: int = 0
    history: set[str] | None = None


@dataclass(frozen=True)
class Trial:
    """One fault and what came of it. Seconds; `untold` counts failures that came without a sentence.

    `as_meant` is false when the break came too late to break anything, or what it must leave alone changed: `note` says which.
    """

    fault: str
    conversations: int
    answered: int
    gave_up: int
    wrong_answers: int
    feedback_acknowledged: int
    feedback_lost: int
    exchanges_lost: int
    untold: int
    told: dict[str, int]
    ready_again_s: float | None
    longest_wait_s: float
    note: str = ""
    as_meant: bool = True

    @property
    def held(self) -> bool:
        lost = self.wrong_answers + self.feedback_lost + self.exchanges_lost + self.untold + self.gave_up
        return not lost and self.ready_again_s is not None and self.as_meant


def need_index(artifacts: Path) -> None:
    """Build the index that the trials copy, where there is none yet. UserError when it cannot be built."""
    if (artifacts / "index" / "current").exists():
        return
    command = [sys.executable, "-m", "ai_engineer_track", "ingest"]
    done = subprocess.run(command, env=os.environ | {"ARTIFACTS": str(artifacts)}, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"there is no index, and none could be built ({last})", str(artifacts), "Run `make ai`")


class CannotMountError(UserError):
    """The only reason to skip a trial: this user may not mount a disk that can be filled."""


def failed(name: str, error: UserError) -> Trial:
    """A trial that came to no end (the service did not start, say). It has held nothing."""
    return Trial(
        fault=name, conversations=0, answered=0, gave_up=0, wrong_answers=0, feedback_acknowledged=0, feedback_lost=0,
        exchanges_lost=0, untold=0, told={}, ready_again_s=None, longest_wait_s=0.0, note=f"failed: {error}", as_meant=False,
    )  # fmt: skip


def faults(settings: Settings, only: Sequence[str] = ()) -> dict[str, Any]:
    """Every trial; writes `artifacts/reports/faults.json` and `.html`. UserError for an unknown fault."""
    if unknown := set(only) - set(FAULTS):
        raise UserError(f"no such fault: {', '.join(sorted(unknown))}", "--only", f"There is: {', '.join(FAULTS)}")
    need_index(settings.artifacts)
    trials, skipped = [], {}
    for name in tqdm(only or list(FAULTS), desc="  faults", leave=False):
        try:
            trials.append(trial(settings, name))
        except CannotMountError as error:
            skipped[name] = str(error)
        except UserError as error:
            trials.append(failed(name, error))
    found = {
        "hardware": fingerprint(), "seed": settings.seed, "people": PEOPLE, "messages_each": EACH,
        "trials": [asdict(t) | {"held": t.held} for t in trials], "skipped": skipped,
    }  # fmt: skip
    reports = settings.artifacts / "reports"
    write_json(reports / "faults.json", found)
    write_text(reports / "faults.html", html(found))
    return found


def trial(settings: Settings, name: str) -> Trial:
    """Start the service, let people talk, break one thing, wait until all is over, and look at what is left."""
    inject, where = FAULTS[name], "faults"
    with small_disk(settings.artifacts / "faults-disk") if name == "full-disk" else contextlib.nullcontext("") as disk:
        where = f"{disk}/run" if disk else where
        with running_service(settings.artifacts, where, copied=("index", "models")) as service:
            accounts, ready_again, broke = asyncio.run(talk(service, settings, inject))
            kept = {record.id for record in feedback.read(service.artifacts / "feedback")[0]}
    library = lib.load_library(settings.datasets)
    acknowledged = [name for account in accounts for name in account.acknowledged]
    lost = [e for a in accounts for e in a.completed if a.history is not None and e["answer_id"] not in a.history]
    told = Counter(sentence for account in accounts for sentence in account.told)
    return Trial(
        fault=name,
        conversations=len(accounts),
        answered=sum(len(a.completed) for a in accounts),
        gave_up=sum(a.gave_up for a in accounts),
        wrong_answers=sum(not verbatim(e["turn"], library) for a in accounts for e in a.completed),
        feedback_acknowledged=len(acknowledged),
        feedback_lost=len(set(acknowledged) - kept),
        exchanges_lost=len(lost) + sum(len(a.completed) for a in accounts if a.history is None),
        untold=told.pop("", 0),
        told=dict(told.most_common(6)),
        ready_again_s=ready_again,
        longest_wait_s=max((w for a in accounts for w in a.waits), default=0.0),
        note=broke.note,
        as_meant=broke.as_meant,
    )


async def talk(service: Running, settings: Settings, inject: Fault) -> tuple[list[Account], float | None, Broke]:
    """All conversations, the fault in the middle. Everybody's account, the seconds until ready again, what the fault says."""
    texts = messages(settings.datasets, settings.seed)
    people = [asyncio.create_task(person(service.url, texts[n * EACH : (n + 1) * EACH])) for n in range(PEOPLE)]
    await asyncio.sleep(FAULT_AFTER)
    began = time.monotonic()
    broke = await asyncio.to_thread(inject, service, settings) or Broke()
    ready_again = await until_ready(service.url, began)
    accounts = await asyncio.gather(*people)
    return list(accounts), ready_again, broke


async def person(url: str, texts: Sequence[str]) -> Account:
    """Sends every message, again where nothing came, thanks for each answer, and reads the whole conversation at the end."""
    account = Account()
    async with httpx.AsyncClient(base_url=url, timeout=60.0) as client:
        for text in texts:
            began = time.monotonic()
            while not (done := await once(client, account, text)) and time.monotonic() - began < PATIENCE:
                await asyncio.sleep(1.0)
            account.gave_up += not done
            account.waits.append(time.monotonic() - began)
            if done:
                await thank(client, account)
            await asyncio.sleep(PAUSE)
        deadline = time.monotonic() + PATIENCE
        while account.session and account.history is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                reply = await client.get(f"/sessions/{account.session}")
                if reply.status_code in (200, 404):
                    account.history = {e["answer_id"] for e in reply.json().get("exchanges", [])}
                    break
            await asyncio.sleep(1.0)
    return account


async def once(client: httpx.AsyncClient, account: Account, text: str) -> bool:
    """One try. False when it ended without an answer; what the person then reads is noted."""
    body = {"message": text} | ({"session_id": account.session} if account.session else {})
    said, done = "", None
    try:
        async with client.stream("POST", "/chat", json=body, headers={"Accept": "text/event-stream"}) as response:
            if response.status_code != 200:
                account.told.append(sentence((await response.aread()).decode(errors="replace")))
                if response.status_code == 404:  # the page begins a new conversation then
                    account.session = ""
                return False
            account.session = response.headers.get("X-Session-ID", account.session)
            async for name, data in sse_events(response):
                said = str(data.get("message", "")) if name == "error" else said
                done = data if name == "done" else done
    except httpx.HTTPError as error:
        account.told.append(PAGE_SAYS if isinstance(error, httpx.ConnectError) else PAGE_SAYS_BROKEN)
        return False
    if done is None:
        account.told.append(said or PAGE_SAYS_BROKEN)
        return False
    account.completed.append(done)
    if done["turn"]["kind"] == "unavailable":
        account.told.append(done["turn"]["text"])
        return False
    return True


async def thank(client: httpx.AsyncClient, account: Account) -> None:
    body = {"answer_id": account.completed[-1]["answer_id"], "kind": "thumbs_up"}
    with contextlib.suppress(httpx.HTTPError):
        reply = await client.post("/feedback", json=body)
        if reply.status_code == 201:
            account.acknowledged.append(reply.json()["id"])


def sentence(body: str) -> str:
    """What the page would show of an error; empty when there is no sentence in it."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


async def until_ready(url: str, since: float) -> float | None:
    async with httpx.AsyncClient(base_url=url, timeout=5.0) as client:
        while time.monotonic() - since < PATIENCE:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get("/ready")).status_code == 200:
                    return time.monotonic() - since
            await asyncio.sleep(0.2)
    return None


def verbatim(turn: dict[str, Any], library: lib.Library) -> bool:
    """Does every sentence the turn quotes stand so in the library? An answer that quotes none is nobody's words."""
    quoted = [(c["sentence_id"], c["text"]) for c in turn["citations"]]
    if turn["kind"] == "answer" and not quoted:
        return False
    return all(library.has(name) and library.sentence(name).text == text for name, text in quoted)


# --- the faults ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broke:
    """What a break says of itself, and whether it broke what it should and nothing else."""

    note: str = ""
    as_meant: bool = True


Fault = Callable[[Running, Settings], Broke | None]


def kill_inference(service: Running, settings: Settings) -> None:
    service.parts()["inference"].kill()


def kill_engine(service: Running, settings: Settings) -> None:
    """Only the process that computes; the server that talks HTTP lives on."""
    service.parts()["engine"].kill()


def kill_service(service: Running, settings: Settings) -> None:
    service.parts()["service"].kill()


def kill_index_build(service: Running, settings: Settings) -> Broke:
    """A build with one more document, killed as soon as its folder appears; the index in use must be the old one."""
    corpus = service.artifacts / "corpus"
    corpus.mkdir()
    for path in (settings.datasets / "health_library").glob("*.md"):
        (corpus / path.name).write_bytes(path.read_bytes())
    (corpus / "one-more.md").write_text("# One more\n\nThis page is only here to make another index.\n", encoding="utf-8")
    root = service.artifacts / "index"
    before, folders = (root / "current").read_text(), set(root.iterdir())
    with child(service, ["ai_engineer_track", "ingest"], CORPUS=str(corpus)) as build:
        wait_for(lambda: bool(set(root.iterdir()) - folders) or build.poll() is not None)
        caught = build.poll() is None
        build.kill()
    same = (root / "current").read_text() == before
    note = f"killed {'while it was building' if caught else 'too late'}; index in use {'unchanged' if same else 'CHANGED'}"
    return Broke(note, caught and same)


def kill_training(service: Running, settings: Settings) -> Broke:
    models = service.artifacts / "models"
    before = current(models).name
    with child(service, ["ml_engineer_track", "run", "--preset", "smoke"]) as training:
        wait_for(lambda: any((service.artifacts / "runs").glob("*/finetune/*")) or training.poll() is not None, 90.0)
        caught = training.poll() is None
        training.kill()
    same, state = False, "CHANGED"
    try:
        verify(current(models))
        if current(models).name == before:
            same, state = True, "unchanged and verified"
    except UserError as error:
        state = f"DAMAGED ({error})"
    return Broke(f"killed {'in fine-tuning' if caught else 'too late'}; model in use {state}", caught and same)


def full_disk(service: Running, settings: Settings) -> Broke:
    ballast = service.artifacts / "ballast"
    written = 0
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
        while True:
            written += stream.write(bytes(1 << 16))
    time.sleep(10.0)
    ballast.unlink()
    return Broke(f"no byte was free for 10 s ({written / 1e6:.0f} MB of ballast)")


def slow_model(service: Running, settings: Settings) -> Broke:
    """The inference server gets one twentieth of the time for 15 s."""
    process = service.parts()["inference"]
    for _ in range(15):
        process.suspend()
        time.sleep(0.95)
        process.resume()
        time.sleep(0.05)
    return Broke("the model ran at a twentieth of its speed for 15 s")


def corrupt_sqlite(service: Running, settings: Settings) -> Broke:
    files = [service.artifacts / "sessions.sqlite", service.artifacts / "service" / "sessions.sqlite"]
    sizes = [scribble(path) + scribble(path.with_name(path.name + "-wal")) for path in files]
    return Broke(f"{sum(sizes)} bytes of the two conversation stores were overwritten while open", sum(sizes) > 0)


def corrupt_chroma(service: Running, settings: Settings) -> Broke:
    """The index's database and graph overwritten; then the service killed, so that it must open what is left."""
    version = (service.artifacts / "index" / "current").read_text().strip()
    folder = service.artifacts / "index" / version / "chroma"
    count = sum(scribble(path) for path in folder.rglob("*") if path.is_file())
    service.parts()["service"].kill()
    return Broke(f"{count} bytes of Chroma's files were overwritten, and the service was killed", count > 0)


FAULTS: dict[str, Fault] = {
    "kill-inference": kill_inference,
    "kill-engine": kill_engine,
    "kill-service": kill_service,
    "kill-index-build": kill_index_build,
    "kill-training": kill_training,
    "full-disk": full_disk,
    "slow-model": slow_model,
    "corrupt-sqlite": corrupt_sqlite,
    "corrupt-chroma": corrupt_chroma,
}


def scribble(path: Path) -> int:
    """Overwrite the middle third of a file; bytes written. The first page stays, so that it still looks like a database."""
    if not path.exists():
        return 0
    size = path.stat().st_size
    start, length = max(4096, size // 3), size // 3
    if start + length > size or not length:
        return 0
    with path.open("r+b") as stream:
        stream.seek(start)
        stream.write(os.urandom(length))
    return length


@contextmanager
def child(service: Running, arguments: Sequence[str], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of ours with the service's artifacts; killed at the end, with all it started."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments], env=os.environ | {"ARTIFACTS": str(service.artifacts), **environment},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(happened: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)


@contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """A disk of its own for the trial, in memory; its name. CannotMountError where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        told = "a disk that can be filled needs the right to mount one"
        raise CannotMountError(told, str(folder), "Run it as root on Linux")
    try:
        yield folder.name
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


# --- the report ------------------------------------------------------------------------------------------------------

HEAD = ("fault", "held", "exchanges completed", "wrong answers", "feedback kept / acknowledged", "exchanges lost",
        "failures without a sentence", "gave up", "ready again, s", "longest wait, s", "what was broken")  # fmt: skip


def rows(trials: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            t["fault"], "yes" if t["held"] else "NO", str(t["answered"]), str(t["wrong_answers"]),
            f"{t['feedback_acknowledged'] - t['feedback_lost']} / {t['feedback_acknowledged']}", str(t["exchanges_lost"]),
            str(t["untold"]), str(t["gave_up"]), "-" if t["ready_again_s"] is None else f"{t['ready_again_s']:.1f}",
            f"{t['longest_wait_s']:.1f}", t["note"] or "-",
        ]
        for t in trials
    ]  # fmt: skip


def html(found: dict[str, Any]) -> str:
    lead = f"{found['people']} people, {found['messages_each']} messages each, one fault in the middle. Seed {found['seed']}."
    parts = [page.heading("Faults on purpose", 1), page.paragraph(lead, lead=True), page.table(HEAD, rows(found["trials"]))]
    for t in found["trials"]:
        parts += [page.heading(t["fault"]), page.paragraph(t["note"])] if t["note"] else [page.heading(t["fault"])]
        said = [[str(count), text] for text, count in t["told"].items()]
        parts.append(page.table(("times", "what people read instead of an answer"), said or [["0", "everybody got an answer"]]))
    if found["skipped"]:
        parts += [page.heading("Skipped"), page.table(("fault", "why"), [list(item) for item in found["skipped"].items()])]
    return page.document("Faults", parts)


def show(found: dict[str, Any], reports: Path) -> None:
    """The last line is one JSON document."""
    print(f"report: {reports / 'faults.html'}")
    print(json.dumps(found))
