"""Runs suites within a budget and keeps every record as soon as it is measured.

Why the limits come first: every decode and training figure is shown beside the share of what this device can do at all, so
the device is measured before the models are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import energy, engines, latency, limits, quality, results, retrieval, serving, sustained, training
from benchmarks.budget import Task, plan, share
from benchmarks.limits import Limits
from benchmarks.results import BUSY, Record, Result
from ml_engineer_track.models import check_model_path
from shared.errors import UserError
from shared.handoff import current, read_manifest
from shared.settings import BASE_MODEL

Suite = Callable[[Task, Limits | None], Iterator[Record]]


@dataclass(frozen=True)
class Entry:
    """A suite, the fewest seconds it makes sense in, and its weight when a budget is shared out."""

    measure: Suite
    minimum: float
    weight: float


SUITES: dict[str, Entry] = {
    "latency": Entry(latency.measure, 30, 3),
    "serving": Entry(serving.measure, 60, 5),
    "training": Entry(training.measure, 40, 3),
    "retrieval": Entry(retrieval.measure, 25, 2),
    "quality": Entry(quality.measure, 1, 0.05),
    "energy": Entry(energy.measure, 10, 1),
    "sustained": Entry(sustained.measure, 60, 2),
    "engines": Entry(engines.measure, 120, 5),
}
#: Seconds for a suite when no budget is given.
UNLIMITED = 1800.0


@dataclass(frozen=True)
class Request:
    """What `python -m benchmarks run` was asked for."""

    suites: list[str] = field(default_factory=list)
    budget: float | None = None
    model: str | None = None
    url: str | None = None
    served_model: str | None = None
    slo: dict[str, float] | None = None
    out: Path | None = None


def run(request: Request, suites: dict[str, Entry] = SUITES) -> tuple[Result, Path]:
    """Measure and write; Ctrl-C keeps what was measured and marks the run as interrupted.

    UserError, before anything is measured, for an unknown suite, a budget that is too small, or no model.
    """
    started = time.perf_counter()
    minimum = {name: entry.minimum for name, entry in suites.items()}
    weight = {name: entry.weight for name, entry in suites.items()}
    wanted, left_out = plan(request.suites or list(suites), bool(request.suites), minimum, request.budget)
    models = find_models(request.model)
    environment = results.environment()
    warn_if_busy(environment)
    result = Result(
        test_time=results.now(), suites=wanted, budget_seconds=request.budget, environment=environment,
        models={name: results.model_info(path) for name, path in models.items()},
        skipped=[f"{name}: does not fit the budget" for name in left_out],
    )  # fmt: skip
    path = request.out or results.RUNS / f"{result.test_time.replace(':', '').replace('+0000', 'Z')}.json"
    results.write(result, path)

    def keep(record: Record) -> None:
        result.records.append(record)
        result.seconds = time.perf_counter() - started
        results.write(result, path)
        print(f"  {line(record)}", flush=True)

    try:
        print("limits of this device", flush=True)
        walls = None
        for record in limits.measure(Task("limits", models, 60)):
            keep(record)
            walls = limits.limits_of(record)
        for number, name in enumerate(wanted):
            left = UNLIMITED if request.budget is None else request.budget - (time.perf_counter() - started)
            seconds = left if request.budget is None else share(name, wanted[number + 1 :], weight, minimum, left)
            task = Task(name, models, seconds, url=request.url, served_model=request.served_model)
            if request.slo:
                task.slo = request.slo
            print(f"{name} (up to {seconds:.0f} s)", flush=True)
            try:
                for record in suites[name].measure(task, walls):
                    keep(record)
            except UserError as error:
                task.skip(str(error))
            finally:
                result.skipped += task.skipped
        result.status = "complete"
    except KeyboardInterrupt:
        print(f"\nstopped; {len(result.records)} records are kept", flush=True)
    result.seconds = time.perf_counter() - started
    results.write(result, path)
    return result, path


def find_models(model: str | None) -> dict[str, str]:
    """Names and folders: the model asked for, else every variant of the published one, else the bundled base model."""
    if model == "bundled":
        return {"base": str(BASE_MODEL)}
    if model:
        check_model_path(model)
        return {Path(model).name: str(Path(model).resolve()) if Path(model).exists() else model}
    try:
        folder = current()
        names = list(read_manifest(folder).variants)
    except UserError:
        return {"base": str(BASE_MODEL)}
    # Full precision first: it is the one that can be fine-tuned. Engine files (GGUF) are the server's business.
    names.sort(key=lambda name: name != "bf16")
    loadable = {name: str(folder / name) for name in names if list((folder / name).glob("*.safetensors"))}
    return loadable or {"base": str(BASE_MODEL)}


def warn_if_busy(environment: dict[str, object]) -> None:
    share_used = float(str(environment.get("busy_share") or 0))
    if share_used > BUSY:
        print(
            f"warning: other programs use {share_used:.0%} of this machine (load average {environment['load_average']}); "
            "its times are not what it can do, and `compare` will refuse this run",
            flush=True,
        )


#: what the line printed for a record shows, first found first
SHOWN = (
    "value", "met", "times_one_at_a_time", "grammar_cost", "same_replies",
    "median_ttft_ms", "median_tpot_ms", "output_throughput", "request_goodput", "decode_throughput", "tokens_per_second",
    "mfu", "ingest_throughput", "embed_throughput", "median_query_ms", "recall_at_10", "grounded/evidence_f1",
    "joules_per_token", "last_to_first", "max_ram", "median_load_ms", "memory_bandwidth", "matmul_peak", "reused_to_cold",
)  # fmt: skip


def line(record: Record) -> str:
    case = " ".join(f"{k}={v}" for k, v in record.case.items())
    figures = [f"{key} {record.metrics[key]:.4g}" for key in SHOWN if record.metrics.get(key) is not None]
    return f"{record.suite}, {record.model}, {case}: {', '.join(figures[:4]) or 'null on this device'}"


def summary(result: Result, path: Path) -> dict[str, object]:
    """The one JSON document a run ends with: where everything is, and the figures without their samples."""
    return {
        "file": str(path),
        "status": result.status,
        "seconds": round(result.seconds, 1),
        "busy_share": result.environment.get("busy_share"),
        "skipped": result.skipped,
        "records": [r.model_dump(include={"suite", "model", "case", "metrics"}) for r in result.records],
    }


def need_device(device: str) -> None:
    """UserError when `cuda` is asked for on a machine without one."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA GPU, or torch was installed without CUDA", "--device cuda", "Use --device cpu")
