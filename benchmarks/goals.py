"""What the server is meant to reach, and whether it did: one record for each goal, met, missed or not measured.

Why: a goal written down before the run and shown beside its figure, whichever way it comes out, is the difference between a
measurement and an advertisement. Each is a ratio of two sides of one run, so it means the same on another machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.results import Record

#: the figure, and the smallest and largest of it over rounds where rounds can be told apart
Found = tuple[float | None, list[float]]
NOT_MEASURED: Found = (None, [])
OURS, IN_PROCESS, ONE_AT_A_TIME = "server, Q8_0", "the same engine in process, Q8_0", "model.generate, one at a time"
OURS_Q4, LLAMA_Q4 = "server, Q4_0", "llama.cpp, Q4_0"


@dataclass(frozen=True)
class Goal:
    """`part`: the part of the suite it belongs to; `at_least`: the figure must not be below `bound`, else not above it."""

    part: str
    name: str
    bound: float
    at_least: bool
    find: Callable[[Sequence[Record]], Found]


def judge(records: Sequence[Record], suite: str, model: str, parts: Sequence[str]) -> list[Record]:
    """The goals of these parts, as records of `suite`; `met` is null where a side of the ratio is missing."""
    judged = []
    for goal in (goal for goal in GOALS if goal.part in parts):
        value, rounds = goal.find(records)
        met = None if value is None else float(value >= goal.bound if goal.at_least else value <= goal.bound)
        case: dict[str, str | int | float] = {"what": "goal", "goal": goal.name, "at": "least" if goal.at_least else "most"}
        metrics = {
            "value": value, "bound": goal.bound, "met": met,
            "lowest_round": min(rounds, default=None), "highest_round": max(rounds, default=None),
        }  # fmt: skip
        judged.append(Record(suite=suite, model=model, case=case, metrics=metrics))
    return judged


# --- how each figure is found ----------------------------------------------------------------------------------------


def throughput_ratio(side: str, level: int, other: str, other_level: int) -> Callable[[Sequence[Record]], Found]:
    """Output throughput of one side over another's; round by round too, because rounds interleave the sides."""

    def find(records: Sequence[Record]) -> Found:
        mine = one(records, "throughput", side, level)
        theirs = one(records, "throughput", other, other_level)
        if mine is None or theirs is None:
            return NOT_MEASURED
        rounds = zip(mine.samples["output_throughput"], theirs.samples["output_throughput"], strict=False)
        return over(mine, theirs, "output_throughput"), [a / b for a, b in rounds if b]

    return find


def tpot_ratio(records: Sequence[Record]) -> Found:
    """Median time per token of a single stream, ours over llama.cpp's, both from the same Q4_0 file."""
    mine, theirs = (one(records, "single stream", side, 1) for side in (OURS_Q4, LLAMA_Q4))
    return NOT_MEASURED if mine is None or theirs is None else (over(mine, theirs, "median_tpot_ms"), [])


def reused_to_cold(records: Sequence[Record]) -> Found:
    found = first(records, "prefix")
    if found is None:
        return NOT_MEASURED
    pairs = zip(found.samples["ttft_reused_ms"], found.samples["ttft_cold_ms"], strict=True)
    return found.metrics["reused_to_cold"], [reused / cold for reused, cold in pairs if cold]


def dearest_grammar(records: Sequence[Record]) -> Found:
    """The largest cost of any kind of grammar."""
    costs = [r.metrics["grammar_cost"] for r in records if r.metrics.get("grammar_cost") is not None]
    return max((c for c in costs if c is not None), default=None), []


def dropped(records: Sequence[Record]) -> Found:
    """Connections that got neither a whole reply nor a 429 that says when to come back."""
    found = first(records, "connections")
    if found is None:
        return NOT_MEASURED
    return (found.metrics["failed"] or 0.0) + (found.metrics["refused_without_retry_after"] or 0.0), []


def memory_share(records: Sequence[Record]) -> Found:
    found = first(records, "connections")
    peak, budget = (found.metrics["max_ram"], found.metrics["memory_budget"]) if found else (None, None)
    return (peak / budget if peak is not None and budget else None), []


def same_replies(records: Sequence[Record]) -> Found:
    found = first(records, "connections")
    return (found.metrics["same_replies"] if found else None), []


GOALS = (
    Goal("throughput", "32 chats over HTTP / one at a time, output throughput", 12.0, True,
         throughput_ratio(OURS, 32, ONE_AT_A_TIME, 1)),
    Goal("throughput", "32 chats over HTTP / the engine in process, output throughput", 0.85, True,
         throughput_ratio(OURS, 32, IN_PROCESS, 32)),
    Goal("throughput", "128 chats / 32 chats, output throughput", 1.0, True, throughput_ratio(OURS, 128, OURS, 32)),
    Goal("single stream", "tpot / llama.cpp's, Q4_0, one chat", 1.5, False, tpot_ratio),
    Goal("prefix", "ttft with a reused prefix / a cold one", 0.2, False, reused_to_cold),
    Goal("grammar", "time per token with a grammar / without, dearest kind", 1.15, False, dearest_grammar),
    Goal("connections", "connections without a reply or a 429 with Retry-After", 0.0, False, dropped),
    Goal("connections", "max_ram / memory_budget", 1.0, False, memory_share),
    Goal("connections", "greedy replies that are the same afterwards", 1.0, True, same_replies),
)  # fmt: skip


def first(records: Sequence[Record], what: str) -> Record | None:
    return next((r for r in records if r.case["what"] == what), None)


def one(records: Sequence[Record], what: str, side: str, level: int) -> Record | None:
    """The record of a side: its model ends with the side's name, behind the name of the model both sides serve."""
    return next(
        (
            r for r in records
            if r.case["what"] == what and r.case["max_concurrency"] == level and r.model.endswith(f": {side}")
        ),
        None,
    )  # fmt: skip


def over(a: Record, b: Record, key: str) -> float | None:
    mine, theirs = a.metrics.get(key), b.metrics.get(key)
    return mine / theirs if mine is not None and theirs else None
