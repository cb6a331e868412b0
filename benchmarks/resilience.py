"""What attacks, faults, load, an hour of people and injected drift did to the product, as text for docs/resilience.md.

    python -m benchmarks readme

Every figure comes from a committed report; what was not measured yet says so, with the command that measures it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ai_engineer_track.attack import outcome, target
from benchmarks import faults, lessons, steady
from benchmarks.lessons import machine, markdown_table
from benchmarks.studies import not_measured
from shared.metrics import Estimate


def blocks() -> dict[str, str]:
    """Mark of a section's figures -> its text."""
    sections: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
        "attacks": ("security.json", attacks),
        "faults": ("faults.json", fault_table),
        "load": ("load.json", load),
        "soak": ("soak.json", soak),
        "drift": ("drift.json", drift),
    }
    return {mark: _of(report, text) for mark, (report, text) in sections.items()}


def attacks(found: dict[str, Any]) -> str:
    rows = [[name, target(name), f"{r['hits']} of {r['n']}", _interval(r)] for name, r in found["by_category"].items()]
    outcomes = ", ".join(f"{outcome(name)}: {count}" for name, count in found["outcomes"].items())
    by_reason: dict[str, list[str]] = {}
    for name, why in found["unavailable"].items():
        by_reason.setdefault(why, []).append(name)
    silent = [f"{', '.join(names)} ({why})" for why, names in by_reason.items()]
    return (
        f"{found['attacks']} attacks written for this project, on the running service ({machine(found['hardware'])}, preset "
        f"{found['preset']}). What came back: {outcomes}.\n\n"
        + markdown_table(["success of an attack", "target", "hits", "share [95 % interval]"], rows)
        + f"\n\nAny of these: {found['any']['hits']} of {found['any']['n']}, {_interval(found['any'])}. "
        f"Unavailable: {'; '.join(silent) or 'none'}. "
        f"Written into the feedback file by an attacker: {'; '.join(found['feedback_file']) or 'nothing'}."
    )


def fault_table(found: dict[str, Any]) -> str:
    skipped = [f"Skipped: {name} ({why})." for name, why in found["skipped"].items()]
    lead = (
        f"{found['people']} people, {found['messages_each']} messages each, one fault in the middle; "
        f"{machine(found['hardware'])}, seed {found['seed']}."
    )
    return "\n\n".join([lead, markdown_table(list(faults.HEAD), faults.rows(found["trials"])), *skipped])


def load(found: dict[str, Any]) -> str:
    rounds = [*found["rounds"], *found["beyond"]]
    good = f"**{found['steady_rate']:.2f} messages a second** is the highest steady rate with p95 of the first word under "
    after = found["afterwards"]
    return (
        f"{good}{found['bound_s']:.0f} s; {machine(found['hardware'])}, seed {found['seed']}, {found['seconds_a_round']:.0f} s a "
        f"rate.\n\n{markdown_table(list(steady.HEAD), steady.rows(rounds))}\n\nAfterwards, at {after['rate']:.2f} a second: p95 "
        f"{Estimate(**after['first_word_p95'])} s, {after['refused']} refused, {after['failed']} failed."
    )


def soak(found: dict[str, Any]) -> str:
    rows: list[Sequence[str]] = [
        [part, name.replace("_", " "), f"{g['held']:.1f}", f"{g['an_hour']:+.2f} [{g['low']:+.2f}, {g['high']:+.2f}]",
         "yes" if g["flat"] else "**no**"]
        for part, each in found["growth"].items() for name, g in each.items() if g["held"] is not None
    ]  # fmt: skip
    words = found["first_word_s"]
    return (
        f"{found['minutes']:.0f} minutes, {found['rate']:g} messages a second ({found['sent']} in all): "
        f"{found['answered']} answered, {found['refused']} told to come back, {found['failed']} without a reply. "
        f"First word p50 / p99: {words['first half']['p50']:.2f} / {words['first half']['p99']:.2f} s in the first half, "
        f"{words['second half']['p50']:.2f} / {words['second half']['p99']:.2f} s in the second. "
        f"{machine(found['hardware'])}, seed {found['seed']}.\n\n"
        + markdown_table(["process", "reading", "held", "growth an hour [95 % interval]", "flat"], rows)
    )


def drift(found: dict[str, Any]) -> str:
    rows = [
        [name, f"{s['detected']['value']:.2f} [{s['detected']['low']:.2f}, {s['detected']['high']:.2f}]",
         f"{s['hours']['value']:.0f} [{s['hours']['low']:.0f}, {s['hours']['high']:.0f}]", f"{s['messages']['value']:,.0f}"]
        for name, s in found["scenarios"].items() if s["hours"]["value"] is not None
    ]  # fmt: skip
    quiet, naive = found["false_alarm_weeks"], found["false_alarm_weeks_hourly_t_test"]
    return (
        f"{found['runs']} runs of each change, {found['messages_per_hour']} messages an hour, checked every hour, seed "
        f"{found['seed']}.\n\n"
        + markdown_table(["what changed", "found", "hours until the alarm, median", "messages, median"], rows)
        + f"\n\nFalse alarms in {found['quiet_weeks']} quiet weeks: {quiet['value']:.1%} of them [{quiet['low']:.1%}, "
        f"{quiet['high']:.1%}], promised at most {found['alpha']:.0%}. "
        f"A t-test every hour at the same level: {naive['value']:.1%}."
    )


def _of(report: str, text: Callable[[dict[str, Any]], str]) -> str:
    path = lessons.DEMO / report
    if not path.exists():
        return not_measured(report)
    return text(json.loads(path.read_text(encoding="utf-8")))


def _interval(rate: dict[str, Any]) -> str:
    return "-" if rate["value"] is None else f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
