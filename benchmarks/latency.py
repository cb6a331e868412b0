"""Latency of a model in process: loading, prefill, decoding; how both grow with the batch and with the context.

Why: a server can only hide what the model costs, so this is the floor under every serving figure. All variants are loaded
and take turns in every case, so that a machine that slows down slows all of them.

    python -m benchmarks run --suite latency [--model FOLDER]

Fixed token counts, greedy, one warm-up, five repeats. `ttft` is the prefill with the first token, `tpot` the mean time of
each further token, `itl` each of these times. Memory is read in a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import psutil
from transformers import PreTrainedModel

from benchmarks.budget import REPEATS, Task, interleaved
from benchmarks.limits import Limits, decode_bytes, mbu, mfu, prefill_flops
from benchmarks.results import Record, spread
from ml_engineer_track.benchmark import memory, one_run
from ml_engineer_track.models import load_model, weight_bytes
from shared.hardware import synchronize
from shared.settings import load_settings

NAME = "latency"
BATCHES = (1, 4, 16, 32)
CONTEXTS = (64, 512, 1024, 1920)
PROMPT_TOKENS, NEW_TOKENS = 256, 32


def measure(task: Task, limits: Limits | None = None) -> Iterator[Record]:
    """Loading and memory of every model, then the batch sweep and the context sweep."""
    models: dict[str, PreTrainedModel] = {}
    for name, path in task.models.items():
        record, model = loading(name, path)
        yield record
        if weight_bytes(model) * 2 > psutil.virtual_memory().available:
            task.skip(f"{name}: too large to be held beside the others")
            continue
        models[name] = model
    first = next(iter(models.values()), None)
    if first is None:
        return
    longest = getattr(first.config, "max_position_embeddings", 10**9)
    cases = [(batch, PROMPT_TOKENS) for batch in BATCHES]
    cases += [(1, tokens) for tokens in CONTEXTS if tokens + NEW_TOKENS <= longest]
    for batch, tokens in cases:
        what = f"batch {batch}, {tokens} prompt tokens"
        if not task.fits(0, what):
            continue
        started = time.perf_counter()
        for model in models.values():
            one_run(model, batch, tokens, NEW_TOKENS)  # warms up, and tells how long a repeat takes
        needed = REPEATS * (time.perf_counter() - started)
        if task.fits(needed, what):
            yield from one_case(models, batch, tokens, limits)
    yield from memory_records(task)


def loading(name: str, path: str) -> tuple[Record, PreTrainedModel]:
    """Time to load with the files in the page cache; the first load of five and one more warms that cache."""
    seconds: list[float] = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        model = load_model(path)
        synchronize(model.device)
        seconds.append(time.perf_counter() - started)
    load = [1e3 * s for s in seconds[1:]]
    metrics: dict[str, float | None] = {**spread("load", load), "weight_bytes": float(weight_bytes(model))}
    return Record(suite=NAME, model=name, case={"what": "load"}, metrics=metrics, samples={"load_ms": load}), model


def one_case(models: dict[str, PreTrainedModel], batch: int, tokens: int, limits: Limits | None) -> list[Record]:
    """All models in turn, at one batch size and prompt length."""
    sides = {n: (lambda m=m: one_run(m, batch, tokens, NEW_TOKENS)) for n, m in models.items()}
    return [describe(name, models[name], runs, batch, tokens, limits) for name, runs in interleaved(sides).items()]


def describe(
    name: str, model: PreTrainedModel, runs: list[dict[str, Any]], batch: int, tokens: int, limits: Limits | None
) -> Record:
    """Percentiles over the runs' samples; throughputs are totals over totals."""
    ttft = [1e3 * run["ttft"] for run in runs]
    itl = [1e3 * gap for run in runs for gap in run["itl"]]
    tpot = [1e3 * sum(run["itl"]) / len(run["itl"]) for run in runs]
    reach = tokens + NEW_TOKENS // 2  # the cache in the middle of the reply
    medians = {
        "ttft": float(spread("ttft", ttft)["median_ttft_ms"] or 0),
        "tpot": float(spread("tpot", tpot)["median_tpot_ms"] or 0),
    }
    metrics: dict[str, float | None] = {
        **spread("ttft", ttft),
        **spread("tpot", tpot),
        **spread("itl", itl),
        "prefill_throughput": batch * tokens * len(runs) / (sum(ttft) / 1e3),
        "decode_throughput": batch * len(itl) / (sum(itl) / 1e3),
        "decode_mbu": mbu(decode_bytes(model, batch, reach), medians["tpot"] / 1e3, limits),
        "prefill_mfu": mfu(prefill_flops(model, batch, tokens), medians["ttft"] / 1e3, limits),
    }
    case: dict[str, str | int | float] = {"what": "run", "batch": batch, "prompt_tokens": tokens, "new_tokens": NEW_TOKENS}
    return Record(suite=NAME, model=name, case=case, metrics=metrics, samples={"ttft_ms": ttft, "tpot_ms": tpot, "itl_ms": itl})


def memory_records(task: Task) -> Iterator[Record]:
    """Peak memory of a fresh process for each model (optimum-benchmark's names)."""
    options = load_settings("tiny").benchmark.model_copy(update={"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS})
    needed = 5.0
    for name, path in task.models.items():
        if task.fits(needed, f"memory of {name}"):
            started = time.perf_counter()
            figures = memory(path, options)
            needed = time.perf_counter() - started
            yield Record(suite=NAME, model=name, case={"what": "memory", "batch": 1}, metrics=figures)
