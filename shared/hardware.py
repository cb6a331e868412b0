"""What this machine is and what it can do at most: the device, a fingerprint, and a measured matmul peak.

Every figure the project publishes carries `fingerprint()`, and every throughput is set against `matmul_peak()`, the
rate this very device reaches on a large matrix product, not against a number from a datasheet.
"""

from __future__ import annotations

import os
import platform
import time
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "llguidance")


def device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_has_fast_bf16() -> bool:
    """True where the CPU multiplies bf16 natively (AVX512-BF16 or AMX); elsewhere bf16 is emulated and slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def compute_dtype(target: torch.device) -> torch.dtype:
    """bf16 where it is faster than float32 on `target`, else float32."""
    fast = torch.cuda.is_bf16_supported() if target.type == "cuda" else cpu_has_fast_bf16()
    return torch.bfloat16 if fast else torch.float32


@lru_cache(maxsize=4)
def matmul_peak(target: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of five n x n matrix products on random data (n = 8192 on CUDA, 2048 on a CPU)."""
    n = 8192 if target.type == "cuda" else 2048
    a = torch.randn(n, n, device=target, dtype=dtype)
    best = float("inf")
    for _ in range(6):  # the first warms up and is never the best
        synchronize(target)
        start = time.perf_counter()
        a @ a
        synchronize(target)
        best = min(best, time.perf_counter() - start)
    return float(2 * n**3 / best)


def synchronize(target: torch.device) -> None:
    """Wait for queued work, so that a clock read afterwards includes it."""
    if target.type == "cuda":
        torch.cuda.synchronize(target)


def fingerprint() -> dict[str, Any]:
    """Hardware and library versions, under llama-bench's names where it has one."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu_info": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "n_threads": torch.get_num_threads(),
        "cpu_bf16": cpu_has_fast_bf16(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu_info": ", ".join(gpus) or None,
        "gpu_memory_gib": [round(torch.cuda.mem_get_info(i)[1] / 2**30, 1) for i in range(len(gpus))] or None,
        "driver": torch.version.cuda if gpus else None,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def busy() -> float:
    """Share of all cores other processes use right now, 0 to 1: measured over a fifth of a second."""
    return psutil.cpu_percent(interval=0.2) / 100


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
