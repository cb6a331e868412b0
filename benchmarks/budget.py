"""Time as a resource: what a suite is given, how much of it is left, and what does not fit.

Why: a benchmark nobody waits for is not run. `BUDGET=5m` is a promise about the wall clock; a suite asks before each case
whether it still fits and leaves it out, by name, when it does not.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from shared.errors import UserError

#: Rules of measuring: one warm-up, then at least this many repeats.
REPEATS = 5
T = TypeVar("T")


@dataclass
class Task:
    """What a suite gets: the models by name (folders or hub ids), its seconds, and where to say what it left out."""

    suite: str
    models: dict[str, str]
    seconds: float
    seed: int = 7
    url: str | None = None
    served_model: str | None = None
    slo: dict[str, float] = field(default_factory=lambda: {"ttft": 1000.0, "tpot": 100.0})
    skipped: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.started)

    def skip(self, line: str) -> None:
        self.skipped.append(f"{self.suite}: {line}")
        print(f"  skipped: {self.suite}: {line}", flush=True)

    def fits(self, seconds: float, what: str) -> bool:
        """Is there time for this? If not, it is noted as skipped."""
        if seconds <= self.left:
            return True
        needed = f"about {seconds:.0f} s, " if seconds else ""
        self.skip(f"{what} ({needed}{max(0.0, self.left):.0f} s left)")
        return False


def parse_duration(text: str) -> float:
    """Seconds of `90`, `90s`, `5m`, `1h30m`. UserError for anything else."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip().lower())
    seconds = sum(int(n or 0) * unit for n, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    if seconds <= 0:
        raise UserError(f"not a duration: {text!r}", "BUDGET", "Write 90s, 5m or 1h30m")
    return float(seconds)


def plan(wanted: Sequence[str], named: bool, minimum: Mapping[str, float], budget: float | None) -> tuple[list[str], list[str]]:
    """Which suites run and which are left out. UserError when suites that were asked for by name cannot fit.

    Unnamed suites are left out from the end of the list; named ones are a promise.
    """
    if unknown := [name for name in wanted if name not in minimum]:
        raise UserError(f"unknown suite {unknown[0]!r}", "SUITE", f"Use some of: {', '.join(minimum)}")
    if budget is None:
        return list(wanted), []
    if named and (need := sum(minimum[name] for name in wanted)) > budget:
        asked = ", ".join(wanted)
        raise UserError(f"the budget is too small: {asked} need at least {need:.0f} s, {budget:.0f} s given", "BUDGET")
    chosen: list[str] = []
    for name in wanted:
        if sum(minimum[n] for n in [*chosen, name]) <= budget:
            chosen.append(name)
    if not chosen:
        least = min(minimum[name] for name in wanted)
        raise UserError(f"the budget is too small: the shortest suite needs {least:.0f} s, {budget:.0f} s given", "BUDGET")
    return chosen, [name for name in wanted if name not in chosen]


def share(suite: str, later: Sequence[str], weight: Mapping[str, float], minimum: Mapping[str, float], left: float) -> float:
    """Seconds for `suite` when `later` still have to run: its part by weight, every later one keeping its minimum."""
    total = sum(weight[name] for name in (suite, *later))
    reserved = sum(minimum[name] for name in later)
    return max(minimum[suite], min(left * weight[suite] / total, left - reserved))


def interleaved(sides: Mapping[str, Callable[[], T]], repeats: int = REPEATS) -> dict[str, list[T]]:
    """`repeats` rounds in which the sides take turns, each round another one first. They must be warm already.

    A machine that slows down half-way then slows all sides alike.
    """
    names = list(sides)
    found: dict[str, list[T]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(sides[name]())
    return found
