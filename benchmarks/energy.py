"""Energy: joules for each generated token, where the machine has a meter that may be read; null where it has none.

Why: on a laptop it is the battery, in a data centre the bill, and a faster variant is not always the more economical one.

    python -m benchmarks run --suite energy

The meters count energy themselves, so nothing is sampled: NVIDIA's NVML (`nvmlDeviceGetTotalEnergyConsumption`, the whole
board) for a GPU, Intel's and AMD's RAPL counters (`/sys/class/powercap`, the CPU packages; readable by root only on most
systems) for a CPU. The figure includes what the machine draws when idle; `idle_watts` says how much that was.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.budget import REPEATS, Task
from benchmarks.limits import Limits
from benchmarks.results import Record
from shared.hardware import device

NAME = "energy"
RAPL = Path("/sys/class/powercap")
BATCHES = (1, 16)
PROMPT_TOKENS, NEW_TOKENS = 128, 64
IDLE_SECONDS = 2.0
Meter = Callable[[], float]


def measure(task: Task, limits: Limits | None = None) -> Iterator[Record]:
    """Every model at every batch size; null without a meter."""
    del limits
    kind, meter = find_meter()
    cases = [(name, batch) for name in task.models for batch in BATCHES]
    if meter is None:
        for name, batch in cases:
            yield Record(suite=NAME, model=name, case={"batch": batch}, metrics=dict.fromkeys(FIGURES), note=kind)
        return
    from ml_engineer_track.models import load_model

    before, started = meter(), time.perf_counter()
    time.sleep(IDLE_SECONDS)
    idle = (meter() - before) / (time.perf_counter() - started)
    models = {name: load_model(path) for name, path in task.models.items()}
    for name, batch in cases:
        if task.fits(REPEATS, f"{name}, batch {batch}"):
            joules, seconds = tokens_energy(models[name], batch, meter)
            tokens = batch * NEW_TOKENS
            metrics: dict[str, float | None] = {
                "joules_per_token": sum(joules) / len(joules) / tokens,
                "watts": sum(joules) / sum(seconds),
                "idle_watts": idle,
            }
            found = {"joules_per_token": [j / tokens for j in joules]}
            yield Record(suite=NAME, model=name, case={"batch": batch}, metrics=metrics, samples=found, note=kind)


FIGURES = ("joules_per_token", "watts", "idle_watts")


def tokens_energy(model: object, batch: int, meter: Meter) -> tuple[list[float], list[float]]:
    """Joules and seconds of each repeat; a repeat runs at least half a second, because meters tick in milliseconds."""
    from ml_engineer_track.benchmark import one_run

    one_run(model, batch, PROMPT_TOKENS, NEW_TOKENS)  # type: ignore[arg-type]
    joules, seconds = [], []
    for _ in range(REPEATS):
        before, started, runs = meter(), time.perf_counter(), 0
        while not runs or time.perf_counter() - started < 0.5:
            one_run(model, batch, PROMPT_TOKENS, NEW_TOKENS)  # type: ignore[arg-type]
            runs += 1
        joules.append((meter() - before) / runs)
        seconds.append((time.perf_counter() - started) / runs)
    return joules, seconds


def find_meter() -> tuple[str, Meter | None]:
    """The meter for the device models run on (joules since some start), and what it is; or why there is none."""
    if device().type == "cuda":
        meter = nvml_meter()
        return ("NVML, whole board", meter) if meter else ("NVML cannot be read", None)
    return rapl_meter()


def rapl_meter(root: Path = RAPL) -> tuple[str, Meter | None]:
    """Sum over the CPU packages' counters; a counter that wrapped around is counted on."""
    packages = sorted(p for p in root.glob("*-rapl:*") if p.name.count(":") == 1 and (p / "energy_uj").exists())
    try:
        counters = [_Counter(package) for package in packages]
    except (OSError, ValueError):
        return f"RAPL counters may not be read ({root}; on most systems only root may)", None
    if not counters:
        return "no RAPL counters on this machine", None
    return f"RAPL, {len(counters)} CPU package{'s' if len(counters) > 1 else ''}", lambda: sum(c.joules() for c in counters)


class _Counter:
    """A RAPL package: microjoules that start again from 0 at `max_energy_range_uj`."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "energy_uj"
        self.range = int((folder / "max_energy_range_uj").read_text(encoding="ascii"))
        self.last, self.total = self._read(), 0

    def joules(self) -> float:
        now = self._read()
        self.total += (now - self.last) % self.range if now < self.last else now - self.last
        self.last = now
        return self.total / 1e6

    def _read(self) -> int:
        return int(self.file.read_text(encoding="ascii"))


def nvml_meter() -> Meter | None:
    """Board energy of GPU 0 through NVML's C interface, so that no package is needed."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
        return None

    def read() -> float:
        library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    return read if not library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) else None
