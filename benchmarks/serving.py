"""Serving: the inference server, or any OpenAI-compatible URL, under load, beside the same model without a server.

Why: users never meet a model alone. How many of them a machine carries, and how long each waits, is decided by batching,
scheduling and caching, and only load shows it.

    python -m benchmarks run --suite serving [--model FOLDER | --url http://host:8001/v1]

What runs: a closed loop at rising concurrency (fixed lengths, rounds of the levels take turns); Poisson arrivals at rising
rates until the server saturates, with chat-like and RAG-like lengths; a 600-token prefix cold and reused; and, in this very
process, `model.generate` one request at a time and in static batches of 32, so that the gain of a server is a ratio of one run.
Lengths are drawn from a fixed seed. Replies have fixed token counts through `ignore_eos` where the server knows it.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.budget import REPEATS, Task
from benchmarks.limits import Limits
from benchmarks.load import Ask, Load, Target, arrivals, closed_loop, connection, figures, open_loop, samples
from benchmarks.load import ask as send
from benchmarks.results import Record, spread
from shared.errors import UserError
from shared.library import load_library
from shared.settings import OVERRIDES, ROOT

NAME = "serving"
LEVELS = (1, 8, 32, 128)
#: open loop: arrival rates as shares of the best closed-loop request throughput; beyond 1 the queue must grow
RATE_SHARES = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25)
PROMPT_TOKENS, NEW_TOKENS = 256, 32
PREFIX_TOKENS = 600
STATIC_BATCH = 32
#: name -> median and log-normal sigma of the prompt, then of the reply, then the longest of each, in tokens.
#: `chat` has the shape of shared chats (many short, few long), `rag` a long prompt of passages and a short answer.
MIXES = {"chat": (90, 1.0, 60, 0.8, 700, 200), "rag": (900, 0.15, 48, 0.4, 1200, 128)}
START_SECONDS = 180.0


def measure(task: Task, limits: Limits | None = None) -> Iterator[Record]:
    """Everything this suite can measure of the server at `task.url`, or of one started for the first model."""
    del limits
    if task.url:
        yield from measure_server(task, Target(task.url.rstrip("/"), task.served_model or first_model(task.url)), "server")
        return
    path = next(iter(task.models.values()))
    try:
        with server(served_folder(path)) as (url, process):
            target = Target(url, task.served_model or first_model(url))
            name = f"server, {target.model}"
            yield from measure_server(task, target, name)
            yield Record(suite=NAME, model=name, case={"what": "memory"}, metrics={"max_ram": peak_memory(process)})
    except UserError as error:
        task.skip(str(error))
    yield from without_server(path)


def measure_server(task: Task, target: Target, name: str) -> Iterator[Record]:
    """The closed-loop sweep, the rate sweep of each mix, and the prefix, within what is left of the task's time."""
    target, words, note = calibrate(target)
    total = task.left
    best = 0.0
    for record in closed_sweep(task, target, name, words, 0.45 * total):
        best = max(best, record.metrics.get("request_throughput") or 0.0)
        yield record.model_copy(update={"note": note})
    if best:
        for mix in [mix for mix in MIXES if task.fits(0, f"{name}, {mix}")]:
            for record in rate_sweep(task, target, name, words, mix, 0.18 * total):
                yield record.model_copy(update={"note": note})
        yield prefix(target, name, words, task.seed)


def closed_sweep(task: Task, target: Target, name: str, words: float, seconds: float) -> Iterator[Record]:
    """Every level of concurrency once to warm up, then in rounds, each level in turn."""
    asks = fixed_asks(words, 512, task.seed)
    kept: list[int] = []
    for level in LEVELS:
        warm = asyncio.run(closed_loop(target, asks, level, 0.0, level))
        if not any(a.ok for a in warm.answers):
            raise UserError(f"no request was answered: {warm.answers[0].error}", target.base_url, "Look at the server's log")
        if REPEATS * warm.duration * (len(kept) + 1) <= seconds or not kept:
            kept.append(level)
        else:
            task.skip(f"{name}: {level} and more concurrent (a round of {level} takes {warm.duration:.1f} s)")
            break
    rounds: dict[int, list[Load]] = {level: [] for level in kept}
    for turn in range(REPEATS):
        for level in kept[turn % len(kept) :] + kept[: turn % len(kept)]:
            slot = seconds / REPEATS / len(kept)
            rounds[level].append(asyncio.run(closed_loop(target, asks[turn * 64 :] + asks[: turn * 64], level, slot, level)))
    for level, loads in rounds.items():
        case: dict[str, str | int | float] = {
            "what": "closed", "max_concurrency": level, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS,
        }  # fmt: skip
        yield Record(suite=NAME, model=name, case=case, metrics=figures(loads, task.slo), samples=samples(loads))


def rate_sweep(task: Task, target: Target, name: str, words: float, mix: str, seconds: float) -> Iterator[Record]:
    """Poisson arrivals at rising shares of what a closed loop of this mix reaches, until the server falls behind."""
    asks = mixed_asks(mix, words, 256, task.seed)
    slot = seconds / (len(RATE_SHARES) + 1)
    closed = asyncio.run(closed_loop(target, asks, 32, slot, 8))
    capacity = figures([closed], task.slo)["request_throughput"] or 0.0
    if not capacity:
        task.skip(f"{name}, {mix}: no request was answered")
        return
    for share in RATE_SHARES:
        rate = capacity * share
        load = asyncio.run(open_loop(target, asks, rate, max(8, math.ceil(rate * slot)), task.seed))
        found = figures([load], task.slo)
        found["saturated"] = float(falls_behind(load, rate, task.seed))
        found["request_rate"] = rate
        case: dict[str, str | int | float] = {"what": "open", "mix": mix, "rate_share": share, **slo_case(task.slo)}
        yield Record(suite=NAME, model=name, case=case, metrics=found, samples={**samples([load]), "output_throughput": []})
        if found["p99_send_delay_ms"] and found["p99_send_delay_ms"] > 50:
            task.skip(
                f"{name}, {mix}: beyond {share:.0%} of capacity (requests were sent {found['p99_send_delay_ms']:.0f} ms late)"
            )
            return


def falls_behind(load: Load, rate: float, seed: int) -> bool:
    """Did the answers run on after the last arrival, for longer than a tenth of the arrivals' time and one request?

    "One request" is the slowest of the first quarter, before a queue could grow.
    """
    span = arrivals(rate, len(load.answers), seed)[-1]
    early = load.answers[: max(1, len(load.answers) // 4)]
    return load.duration - span > 0.1 * span + max(a.e2el for a in early)


def prefix(target: Target, name: str, words: float, seed: int) -> Record:
    """Time to first token with a prefix never seen and with one seen before, in turns; one request at a time."""
    texts = [text(words, PREFIX_TOKENS, f"{seed}/prefix/{n}") for n in range(REPEATS + 1)]
    found: dict[str, list[float]] = {"cold": [], "reused": []}

    async def one(prompt: str) -> float:
        async with connection(1) as session:
            return 1e3 * (await send(session, target, Ask(prompt, 4))).ttft

    for turn, shared_part in enumerate(texts):
        cold = asyncio.run(one(f"{shared_part} What does the first sentence say?"))
        reused = asyncio.run(one(f"{shared_part} Which word comes last?"))
        if turn:  # the first pair warms up
            found["cold"].append(cold)
            found["reused"].append(reused)
    metrics = {**spread("ttft_cold", found["cold"]), **spread("ttft_reused", found["reused"])}
    ratio = (metrics["median_ttft_reused_ms"] or 0.0) / (metrics["median_ttft_cold_ms"] or 1.0)
    case: dict[str, str | int | float] = {"what": "prefix", "prefix_tokens": PREFIX_TOKENS}
    found_samples = {f"ttft_{kind}_ms": times for kind, times in found.items()}
    return Record(suite=NAME, model=name, case=case, metrics={**metrics, "reused_to_cold": ratio}, samples=found_samples)


def without_server(path: str) -> Iterator[Record]:
    """`model.generate` in this process: one request at a time in float32, and a static batch; they take turns."""
    import torch

    from ml_engineer_track.models import load_model
    from shared.hardware import synchronize

    model: Any = load_model(path, torch.float32)  # transformers' class of all models does not promise `generate`
    ids = torch.randint(3, model.config.vocab_size, (STATIC_BATCH, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def once(rows: int) -> float:
        batch = ids[:rows].to(model.device)
        started = time.perf_counter()
        model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        synchronize(model.device)
        return rows * NEW_TOKENS / (time.perf_counter() - started)

    sizes = (1, STATIC_BATCH)
    for size in sizes:
        once(size)
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(REPEATS):
        for size in sizes:
            rates[size].append(once(size))
    for size, values in rates.items():
        name = "model.generate, one at a time" if size == 1 else f"model.generate, static batch of {size}"
        # A rate over repeats of equal work is a harmonic mean: total tokens over total time.
        rate = len(values) / sum(1 / value for value in values)
        case: dict[str, str | int | float] = {
            "what": "in process", "batch": size, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS,
        }  # fmt: skip
        yield Record(
            suite=NAME, model=name, case=case, metrics={"output_throughput": rate}, samples={"output_throughput": values}
        )


# --- what is asked ---------------------------------------------------------------------------------------------------


def calibrate(target: Target) -> tuple[Target, float, str]:
    """Tokens a word takes with this server's tokenizer, and whether it takes `ignore_eos` (llama.cpp's and vLLM's field)."""
    probe = Ask(text(1.0, 200, "probe"), 8)

    async def one(to: Target) -> Any:
        async with connection(1) as session:
            return await send(session, to, probe)

    fixed = replace(target, extra={**target.extra, "ignore_eos": True})
    note = ""
    answer = asyncio.run(one(fixed))
    if answer.status in (400, 422):  # the second is what FastAPI says, and with it `transformers serve`
        fixed, note = target, "the server does not know ignore_eos: replies end where the model ends them"
        answer = asyncio.run(one(fixed))
    if not answer.ok:
        raise UserError(f"the server did not answer: {answer.error or answer.status}", target.base_url, "Is it running?")
    if not note and answer.output_tokens != probe.output_tokens:
        note = "the server ignores ignore_eos: replies end where the model ends them"
    return fixed, (answer.prompt_tokens or 260) / 200, note


def fixed_asks(words: float, count: int, seed: int) -> list[Ask]:
    return [Ask(text(words, PROMPT_TOKENS, f"{seed}/fixed/{n}"), NEW_TOKENS) for n in range(count)]


def mixed_asks(mix: str, words: float, count: int, seed: int) -> list[Ask]:
    """Requests with log-normal lengths; the same for the same seed."""
    prompt, prompt_sigma, reply, reply_sigma, longest, longest_reply = MIXES[mix]
    rng = random.Random(f"{seed}/{mix}")
    asks = []
    for n in range(count):
        tokens = min(longest, max(8, round(rng.lognormvariate(math.log(prompt), prompt_sigma))))
        new = min(longest_reply, max(4, round(rng.lognormvariate(math.log(reply), reply_sigma))))
        asks.append(Ask(text(words, tokens, f"{seed}/{mix}/{n}"), new))
    return asks


def text(tokens_per_word: float, tokens: int, seed: str) -> str:
    """Words of the health library in a random order, so that no two prompts share a prefix, about `tokens` long."""
    rng = random.Random(seed)
    return " ".join(rng.choices(_words(), k=max(1, round(tokens / tokens_per_word))))


def _words() -> list[str]:
    if not _WORDS:
        _WORDS.extend(w for leaflet in load_library(ROOT / "datasets") for s in leaflet.sentences() for w in s.text.split())
    return _WORDS


_WORDS: list[str] = []


def parse_slo(words: Sequence[str]) -> dict[str, float]:
    """vLLM's `--goodput` syntax, `ttft:1000 tpot:100`, in milliseconds. UserError for anything else."""
    found = {}
    for word in words:
        name, _, bound = word.partition(":")
        if name not in ("ttft", "tpot", "itl", "e2el") or not bound.replace(".", "", 1).isdigit():
            raise UserError(f"not an SLO: {word!r}", "--goodput", "Write ttft:1000,tpot:100 (milliseconds)")
        found[name] = float(bound)
    return found


def slo_case(slo: dict[str, float]) -> dict[str, str | int | float]:
    return {"slo": " ".join(f"{name}:{bound:g}" for name, bound in slo.items())}


# --- the server ------------------------------------------------------------------------------------------------------


@contextmanager
def server(path: str, command: Sequence[str] | None = None) -> Iterator[tuple[str, psutil.Process]]:
    """The inference server on a free port, until the block ends: its base URL and its process.

    UserError when it stops before it is ready, or is not ready in time.
    """
    port = free_port()
    # Other projects read variables of the same names: llama.cpp's server does not start with an empty SEED.
    environment = {k: v for k, v in os.environ.items() if k not in OVERRIDES} if command else None
    command = command or [sys.executable, "-m", "ml_engineer_track", "serve", "--port", "{port}", "--model", path]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w", encoding="utf-8") as stream:
            started = subprocess.Popen(
                [part.replace("{port}", str(port)) for part in command],
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", started, log)
            yield f"http://127.0.0.1:{port}/v1", psutil.Process(started.pid)
        finally:
            started.terminate()
            try:
                started.wait(timeout=20)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()


def served_folder(path: str) -> str:
    """What the server is given: of a variant of a published version the whole version, whose manifest knows what to serve."""
    version = Path(path).parent
    return str(version) if (version / "manifest.json").exists() else path


def wait_until_ready(address: str, process: subprocess.Popen[Any], log: Path, seconds: float = START_SECONDS) -> None:
    """Until /ready answers 200; of a server that has no such page, until /health or /v1/models does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
            raise UserError(f"the server stopped: {lines[-1][:160]}", "serving", "Start it by hand to see more")
        ready = _status(f"{address}/ready")
        if ready == 200 or (ready in (404, 405) and any(_status(address + page) == 200 for page in ("/health", "/v1/models"))):
            return
        time.sleep(0.2)
    raise UserError(f"the server was not ready after {seconds:.0f} s", "serving", "Start it by hand and use --url")


def first_model(url: str) -> str:
    """The first name /models lists. UserError when nothing answers there."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/models", timeout=10) as response:
            return str(json.load(response)["data"][0]["id"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"no model list ({error})", f"{url}/models", "Give --url as http://host:port/v1, or --served-model"
        ) from None


def peak_memory(process: psutil.Process) -> float | None:
    """The kernel's high-water marks of resident memory, in bytes, of a process and of those it started; null where none are kept.

    A sum of peaks counts shared pages twice and moments that were apart as one: the truth is not above it.
    """
    found = [peak for each in (process, *process.children(recursive=True)) if (peak := _peak(each)) is not None]
    return sum(found) if found else None


def _peak(process: psutil.Process) -> float | None:
    try:
        for line in Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return 0
