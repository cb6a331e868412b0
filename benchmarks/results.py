"""What a run leaves behind: one JSON document with the machine, the models, every figure and the raw samples behind it.

Why an engineer keeps raw samples and not only medians: two runs can then be compared honestly months later, with an
interval, by someone who was not there. The document is written again after every record, so an interrupted run keeps what it
had measured.

    artifacts/benchmarks/<time>.json      what `make bench` writes (git-ignored)
    benchmarks/results/*.json             the runs this repository publishes
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import UserError
from shared.files import sha256_tree, write_json
from shared.hardware import busy, fingerprint
from shared.metrics import percentiles
from shared.settings import ROOT

SCHEMA_VERSION: Literal[1] = 1
#: Share of the cores other programs may use before a run counts as disturbed.
BUSY = 0.3
RUNS = ROOT / "artifacts" / "benchmarks"
PUBLISHED = ROOT / "benchmarks" / "results"
PEERS = ROOT / "artifacts" / "peers"
#: engines whose versions decide about serving figures; peers have environments of their own
ENGINES = ("openvino-genai", "openvino", "llama-cpp-python")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Record(_Strict):
    """One measured case: under which conditions, the figures, and the raw samples they were computed from.

    `metrics` hold null for what this device cannot tell. `samples` are independent repeats (requests, runs, rounds) and are
    what `compare` works on; `series` run over time and are only drawn.
    """

    suite: str
    model: str
    case: dict[str, str | int | float] = {}
    metrics: dict[str, float | None] = {}
    samples: dict[str, list[float]] = {}
    series: dict[str, list[float | None]] = {}
    note: str = ""


class ModelInfo(_Strict):
    """llama-bench's names; `sha256` covers the weight files and is null for a hub id."""

    model_filename: str
    model_size: int | None = None
    model_n_params: int | None = None
    sha256: str | None = None


class Result(_Strict):
    schema_version: Literal[1] = SCHEMA_VERSION
    status: Literal["complete", "interrupted"] = "interrupted"
    test_time: str
    suites: list[str]
    budget_seconds: float | None = None
    seconds: float = 0.0
    environment: dict[str, Any]
    models: dict[str, ModelInfo] = {}
    records: list[Record] = Field(default_factory=list)
    skipped: list[str] = Field(default_factory=list)

    def of(self, suite: str) -> list[Record]:
        return [r for r in self.records if r.suite == suite]


def write(result: Result, path: Path) -> None:
    write_json(path, result.model_dump())


def read(path: Path) -> Result:
    """A result file. UserError when it is missing, damaged, or of another schema."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such result file", str(path), "Run `make bench`") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        raise UserError("not a result file (it is not JSON)", str(path), "Run `make bench` again") from None
    schema = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(schema, int):
        raise UserError("not a result file (no schema_version)", str(path), "Files of `make bench` are what is read here")
    if schema != SCHEMA_VERSION:
        fix = "Update the code" if schema > SCHEMA_VERSION else "Measure again: its figures had other names"
        raise UserError(f"result has schema {schema}, this code reads {SCHEMA_VERSION}", str(path), fix)
    try:
        return Result.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"result field {where}: {first['msg']}", str(path), "Run `make bench` again") from None


def stored() -> list[Path]:
    """Every result file of this checkout that can be read, oldest first by the time of its run."""
    found: list[tuple[str, Path]] = []
    for path in [*RUNS.glob("*.json"), *PUBLISHED.glob("*.json")]:
        try:
            found.append((read(path).test_time, path))
        except UserError as error:
            print(f"left out: {error}")
    return [path for _, path in sorted(found)]


def environment() -> dict[str, Any]:
    """`shared.hardware.fingerprint` with what decides whether a run can be repeated: commit, power, load before the start."""
    machine = fingerprint()
    return machine | {
        "libraries": machine["libraries"] | {name: _version(name) for name in ENGINES},
        "build_commit": _git("rev-parse", "--short", "HEAD"),
        "build_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "gpu_driver": _gpu_driver(),
        "power_source": _power_source(),
        "cpu_governor": _first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "last_level_cache": last_level_cache(),
        "busy_share": round(busy(), 3),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def model_info(path: str) -> ModelInfo:
    """Size and content hash of a model folder; a hub id has neither here."""
    folder = Path(path)
    if not folder.is_dir():
        return ModelInfo(model_filename=path)
    weights = sorted(folder.glob("*.safetensors"))
    name = str(folder.relative_to(ROOT)) if folder.resolve().is_relative_to(ROOT) and folder.is_absolute() else str(folder)
    return ModelInfo(model_filename=name, model_size=sum(w.stat().st_size for w in weights), sha256=sha256_tree(weights))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def spread(name: str, values: list[float]) -> dict[str, float | None]:
    """vLLM's statistics of a time in milliseconds: mean_, median_, std_, p90_ and p99_<name>_ms; null without samples."""
    if not values:
        return {f"{kind}_{name}_ms": None for kind in ("mean", "median", "std", "p90", "p99")}
    p = percentiles(values)
    return {
        f"mean_{name}_ms": float(np.mean(values)),
        f"median_{name}_ms": p["p50"],
        f"std_{name}_ms": float(np.std(values)),
        f"p90_{name}_ms": p["p90"],
        f"p99_{name}_ms": p["p99"],
    }


def last_level_cache() -> int | None:
    """Bytes of the largest CPU cache, where Linux tells. Weights that fit in it are not limited by memory bandwidth."""
    sizes = [_first_line(p) for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s and s[-1] in units), default=None)


def _version(package: str) -> str | None:
    """Of this environment, else of a peer's."""
    places = [*sys.path, *map(str, PEERS.glob("*/lib/python*/site-packages"))]
    return next((found.version for found in distributions(name=package, path=places)), None)


def _power_source() -> str | None:
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None:
        return None
    return "mains" if battery.power_plugged else "battery"


def _gpu_driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").splitlines()[0].strip()
    except (OSError, IndexError, UnicodeDecodeError):
        return None
