"""Sustained load: does the machine still do after ten minutes what it did in the first?

Why: a laptop or a small cloud machine is fast until it is warm or its credit is used up. A benchmark of one minute measures
the sprint, a service runs the marathon.

    python -m benchmarks run --suite sustained --budget 11m

One model decodes at a fixed batch size without a pause. Each window of time is a point: throughput, resident memory, CPU
clock and temperature where the system tells, GPU clock and temperature where there is a GPU. `last_to_first` is the median
throughput of the last tenth of the windows over that of the first: below 0.95 the machine throttles or something else runs.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from statistics import median

import psutil

from benchmarks.budget import Task
from benchmarks.limits import Limits
from benchmarks.results import Record
from ml_engineer_track.benchmark import one_run
from ml_engineer_track.models import load_model
from shared.hardware import device

NAME = "sustained"
LONGEST = 600.0
WINDOWS = 120
BATCH, PROMPT_TOKENS, NEW_TOKENS = 8, 64, 32


def measure(task: Task, limits: Limits | None = None) -> Iterator[Record]:
    """Steady load for ten minutes, or for what the budget leaves."""
    del limits
    name, path = next(iter(task.models.items()))
    model = load_model(path)
    one_run(model, BATCH, PROMPT_TOKENS, NEW_TOKENS)
    seconds = min(LONGEST, task.left)
    window = max(1.0, seconds / WINDOWS)
    series: dict[str, list[float | None]] = {key: [] for key in ("seconds", "output_throughput", *readings())}
    started = time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        tokens, began = 0, time.perf_counter()
        while time.perf_counter() - began < window:
            one_run(model, BATCH, PROMPT_TOKENS, NEW_TOKENS)
            tokens += BATCH * NEW_TOKENS
        point = {"seconds": passed, "output_throughput": tokens / (time.perf_counter() - began), **readings()}
        for key, value in point.items():
            series[key].append(value)
    rates = [float(r) for r in series["output_throughput"] if r is not None]
    if not rates:
        task.skip("no time left for a single window")
        return
    metrics: dict[str, float | None] = {
        "output_throughput": len(rates) / sum(1 / rate for rate in rates),
        "last_to_first": last_to_first(rates),
        "duration": seconds,
        "max_ram": max((float(m) for m in series["ram_bytes"] if m is not None), default=None),
    }
    case: dict[str, str | int | float] = {"batch": BATCH, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    yield Record(suite=NAME, model=name, case=case, metrics=metrics, samples={"output_throughput": rates}, series=series)


def last_to_first(rates: list[float]) -> float:
    tenth = max(1, len(rates) // 10)
    return median(rates[-tenth:]) / median(rates[:tenth])


def readings() -> dict[str, float | None]:
    """What the system tells about this moment; null where it does not."""
    gpu = gpu_readings()
    return {
        "ram_bytes": float(psutil.Process().memory_info().rss),
        "cpu_mhz": cpu_clock(),
        "cpu_celsius": cpu_temperature(),
        "gpu_mhz": gpu[0],
        "gpu_celsius": gpu[1],
    }


def cpu_clock() -> float | None:
    clock = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    return float(clock.current) if clock and clock.current else None


def cpu_temperature() -> float | None:
    """The hottest sensor, in degrees Celsius."""
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    return max((float(s.current) for group in sensors.values() for s in group), default=None)


def gpu_readings() -> tuple[float | None, float | None]:
    """Clock in MHz and temperature of GPU 0."""
    if device().type != "cuda":
        return None, None
    command = ["nvidia-smi", "--query-gpu=clocks.sm,temperature.gpu", "--format=csv,noheader,nounits", "--id=0"]
    try:
        clock, celsius = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(",")
        return float(clock), float(celsius)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None, None
