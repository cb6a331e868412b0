"""Looks at a machine before anything is installed on it or taught on it, and says what will be slow. Changes nothing.

    make doctor        (python -m shared.doctor; needs nothing but Python, and finds more once `make setup` has run)

One line a check: `ok`, `slow` (works, and what it costs) or `missing` (and what to do). Exit status 1 only when something is
missing that nothing here runs without.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Callable, Iterator  # noqa: UP035 (this file must load under the Python that is too old, to say so)

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (3, 11)
MEMORY_GIB, MEMORY_LEAST_GIB = 8.0, 4.0
#: the environment with the CPU build of torch, and a run's models, indexes and reports
ENVIRONMENT_GB, ARTIFACTS_GB = 5.0, 2.0
#: who listens where, unless told otherwise
PORTS = {8000: "the service (PORT=... picks another)", 8001: "the inference server (--port picks another)"}
BUSY = 0.3
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
#: what every `make` line runs; git also stamps each result with its commit
TOOLS = ("make", "bash", "git")


@dataclass
class Finding:
    """`state` is ok, slow or missing; only what is `essential` and missing makes the exit status 1."""

    name: str
    state: str
    said: str
    essential: bool = False


def examine() -> Iterator[Finding]:
    """Every check in order. What a check cannot find out it says; it never raises."""
    for check in (
        *(system, tools, python, environment, memory, cores, disk, packages),
        *(base_model, gpu, bf16, busy, ports, chromium, network),
    ):
        try:
            yield check()
        except Exception as error:
            yield Finding(check.__name__, "slow", f"could not be checked ({type(error).__name__}: {error})")


def system() -> Finding:
    """Files are locked with fcntl, which Windows does not have."""
    said = f"{platform.system()} {platform.machine()}"
    if platform.system() == "Windows":
        return Finding("system", "missing", f"{said}: not supported; use WSL 2, and clone the repository in there", True)
    return Finding("system", "ok", said)


def tools() -> Finding:
    absent = [name for name in TOOLS if shutil.which(name) is None]
    if absent:
        return Finding("tools", "missing", f"{', '.join(absent)}: install with the system's package manager", True)
    return Finding("tools", "ok", f"{', '.join(TOOLS)} are there")


def python() -> Finding:
    said = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] >= PYTHON:
        return Finding("python", "ok", said)
    return Finding(
        "python", "missing", f"{said}: {PYTHON[0]}.{PYTHON[1]} or newer is needed; `make setup PYTHON=python3.12`", True
    )


def environment() -> Finding:
    """`make setup` makes .venv with venv and ensurepip, which some Linux distributions package apart from Python."""
    if (ROOT / ".venv").exists():
        return Finding("environment", "ok", "made by `make setup`")
    absent = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if absent:
        return Finding(
            "environment",
            "missing",
            f"this Python has no {' and no '.join(absent)}: install it (Debian and Ubuntu: `apt install python3-venv`)",
            True,
        )
    return Finding("environment", "ok", "venv and ensurepip are there")


def memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    said = f"{total:.1f} GiB"
    if total < MEMORY_LEAST_GIB:
        return Finding("memory", "missing", f"{said}: at least {MEMORY_LEAST_GIB:.0f} GiB are needed", True)
    if total < MEMORY_GIB:
        return Finding("memory", "slow", f"{said}: use PRESET=smoke, and close the browser while a model is trained")
    return Finding("memory", "ok", said)


def cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if usable < 2:
        return Finding("cores", "slow", "1: everything takes about twice as long as the times in the pages, which used 2")
    return Finding("cores", "ok", str(usable))


def disk() -> Finding:
    """Room for what is not there yet: the environment and what runs produce."""
    folder = Path(os.environ.get("ARTIFACTS") or ROOT / "artifacts")
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free / 1e9
    needed = ARTIFACTS_GB + (0.0 if _installed("torch") else ENVIRONMENT_GB)
    said = f"{free:.1f} GB free, {needed:.0f} GB needed"
    return (
        Finding("disk", "ok", said)
        if free >= needed
        else Finding("disk", "missing", f"{said}: free some, or set ARTIFACTS", True)
    )


def packages() -> Finding:
    """The libraries that pyproject.toml names, beside the versions the published figures were made with."""
    pinned = _pinned()
    wanted = [name for name in _dependencies() if name in pinned]
    absent = [name for name in wanted if not _installed(name)]
    if "torch" in absent and not (ROOT / ".venv").exists():  # a fresh clone: nothing is wrong with it
        return Finding("packages", "slow", "not installed yet: `make setup` does that, in a few minutes and with a network")
    if absent:
        some = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        return Finding("packages", "missing", f"{some}: run `make setup`, then `source .venv/bin/activate`", True)
    other = [f"{name} {_installed(name)} (pinned {pinned[name]})" for name in wanted if _release(name) != pinned[name]]
    if other:
        return Finding("packages", "slow", f"{len(wanted)} there, others than pinned: {', '.join(other)}; figures may differ")
    return Finding("packages", "ok", f"{len(wanted)} there, as pinned in constraints.txt")


def base_model() -> Finding:
    weights = list((ROOT / "ml_engineer_track" / "base_model").glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights)
    if size < 1_000_000:
        return Finding(
            "base model", "missing", "its weights are not in ml_engineer_track/base_model: clone the repository anew", True
        )
    return Finding("base model", "ok", f"{size / 1e6:.0f} MB, in the repository")


def gpu() -> Finding:
    if not _installed("torch"):
        found = shutil.which("nvidia-smi") is not None
        return Finding("gpu", "ok", "nvidia-smi is there: setup will take torch for CUDA") if found else _no_gpu()
    from shared.hardware import fingerprint

    name = fingerprint()["gpu_info"]
    return Finding("gpu", "ok", str(name)) if name else _no_gpu()


def bf16() -> Finding:
    if not _installed("torch"):
        return Finding("bf16", "ok", "checked after `make setup`")
    from shared.hardware import compute_dtype, device

    target = device()
    if "bfloat16" in str(compute_dtype(target)):
        return Finding("bf16", "ok", f"multiplied natively by this {target.type}")
    return Finding("bf16", "slow", "not native here: float32 is used, and training and 4-bit evaluation take longer")


def busy() -> Finding:
    if not _installed("torch"):
        return Finding("busy", "ok", "checked after `make setup`")
    from shared.hardware import busy as share

    load = share()
    if load > BUSY:
        return Finding("busy", "slow", f"other programs use {load:.0%} of the machine: times measured now are theirs as well")
    return Finding("busy", "ok", f"other programs use {load:.0%} of the machine")


def ports() -> Finding:
    taken = [f"{port}: {what}" for port, what in PORTS.items() if not _free(port)]
    if taken:
        return Finding("ports", "missing", f"somebody listens on {'; '.join(taken)}")
    return Finding("ports", "ok", f"{' and '.join(map(str, PORTS))} are free")


def chromium() -> Finding:
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found:
        return Finding("chromium", "ok", found)
    return Finding("chromium", "missing", "optional: only the tests of the web page need it; any browser shows the page")


def network() -> Finding:
    return Finding("network", "ok", "not tried: after `make setup` nothing needs one but presets that fetch a model from the hub")


def _no_gpu() -> Finding:
    return Finding(
        "gpu", "slow", "none: the default presets are made for that; larger base models and the kernels' speeds need one"
    )


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _installed(package: str) -> str:
    """Its version; empty when it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _release(package: str) -> str:
    """Its version without the build, so that 2.13.0+cpu is 2.13.0."""
    return _installed(package).split("+")[0]


def _pinned() -> dict[str, str]:
    lines = [line for name in ("torch.txt", "constraints.txt") for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    pairs = [line.split(";")[0].strip().split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): number for name, number in pairs}


def _dependencies() -> list[str]:
    """The names in pyproject.toml's `dependencies`, without those that only some machines take. No tomllib: it came with 3.11."""
    block = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("dependencies = [", 1)[1].split("]", 1)[0]
    quoted = [line.strip().strip('",') for line in block.splitlines() if line.strip().startswith('"')]
    return [text.split(">")[0].split("=")[0].split("<")[0].strip().lower() for text in quoted if ";" not in text]


def main(check: Callable[[], Iterator[Finding]] = examine) -> int:
    """Print one line a check; 1 when something essential is missing."""
    findings = []
    for found in check():
        findings.append(found)
        print(f"{found.state:<8} {found.name:<11} {found.said}", flush=True)
    lacking = [found.name for found in findings if found.essential and found.state == "missing"]
    if lacking:
        print(f"not ready: {', '.join(lacking)}")
        return 1
    slow = [found.name for found in findings if found.state == "slow"]
    print("ready" + (f"; slow here: {', '.join(slow)}" if slow else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
