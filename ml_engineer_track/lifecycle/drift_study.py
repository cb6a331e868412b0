"""How good the watch for drift is: simulated weeks with nothing changed, and with a change that was put there.

Why an ML engineer measures a monitor: one that cries wolf is switched off, and one that never barks was never on. Both are
figures, and they come from weeks of which one knows what happened in them.

    python -m ml_engineer_track drift-study

Messages are drawn with replacement from the questions of `datasets/` (never the test split), so a week without a change is one
exactly. What came of them is drawn from a simple model, stated below and in the report: it is not measured. Every run has four
quiet weeks of reference; the change begins at a random hour of the first week that is watched. Questions are embedded once.

    artifacts/reports/drift.html, drift.json
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from ml_engineer_track.lifecycle import drift
from ml_engineer_track.lifecycle.betting import Array
from ml_engineer_track.lifecycle.drift import ALPHA, REFERENCE, WATCHED, Lens, Seen, Window
from ml_engineer_track.progress import watched
from shared.errors import UserError
from shared.files import write_json, write_text
from shared.hardware import fingerprint
from shared.library import OtherLanguage, Question, load_library, read_rows
from shared.metrics import Estimate, estimate
from shared.page import document, heading, paragraph, svg, table
from shared.passages import StoredVectors, embedder
from shared.settings import Settings

HOUR, WEEK = 3_600.0, 7 * 24 * 3_600.0
PER_HOUR = 8  # messages, on average; three times as many by day as by night
QUIET_WEEKS, RUNS = 600, 60
WATCHED_WEEKS = 3
#: the model of what comes of a message: a poor answer is a refusal in REFUSED of cases, else one with a low score
POOR, DECAYED, DECAY_DAYS = 0.10, 0.35, 14
CLARIFIED, REFUSED = 0.10, 0.40
LOW, HIGH = (0.0, 0.25, 0.5), (0.75, 1.0)
NEW_REGISTERS = ("teenager", "typos", "little English")
#: scenario -> (what happens, share of messages it concerns from its onset on)
SCENARIOS = {
    "new topic": ("four families of leaflets that nobody had asked about", 0.20),
    "new register": (f"messages in registers nobody had used: {', '.join(NEW_REGISTERS)}", 0.30),
    "new language": ("German and Spanish messages", 0.10),
    "slow decay": (f"poor answers grow from {POOR:.0%} to {DECAYED:.0%} within {DECAY_DAYS} days", 1.0),
}


@dataclass(frozen=True)
class Pool:
    """Every question that may be asked, as the tests see it, with what the scenarios choose by."""

    window: Window
    family: Array
    register: Array
    topics: list[str]

    def where(self, scenario: str, rng: np.random.Generator) -> tuple[Array, Array]:
        """The rows that people ask anyway, and those of the change."""
        home = self.family != "another language"
        if scenario == "new language":
            return np.flatnonzero(home), np.flatnonzero(~home)
        if scenario == "new topic":
            new = np.isin(self.family, rng.choice(np.unique(self.family[home & (self.family != "")]), 4, replace=False))
        elif scenario == "new register":
            new = np.isin(self.register, NEW_REGISTERS) & home
        else:
            return np.flatnonzero(home), np.flatnonzero(home)
        return np.flatnonzero(home & ~new), np.flatnonzero(new)


def run(settings: Settings, runs: int = RUNS, weeks: int = QUIET_WEEKS) -> Path:
    """Simulate, and write both files of the report. UserError when the data have no questions in other languages."""
    started = time.perf_counter()
    pool = load_pool(settings)
    found: dict[str, Any] = {"seed": settings.seed, "hardware": fingerprint(), **facts(pool, settings.seed, runs, weeks)}
    found["seconds"] = round(time.perf_counter() - started, 1)
    folder = settings.artifacts / "reports"
    examples = {name: example(pool, name, settings.seed) for name in ("no change", *SCENARIOS)}
    write_json(folder / "drift.json", found)
    write_text(folder / "drift.html", page(found, examples))
    print(f"  {found['says']}")
    print(f"report: {folder / 'drift.html'}  (figures: {folder / 'drift.json'})")
    return folder / "drift.html"


def load_pool(settings: Settings) -> Pool:
    questions = [q for q in read_rows(settings.datasets, "questions.jsonl", Question)[0] if q.split != "test"]
    if not (settings.datasets / "other_languages.jsonl").exists():
        raise UserError("the study needs other_languages.jsonl", str(settings.datasets), "Copy the one of this repository's data")
    foreign = read_rows(settings.datasets, "other_languages.jsonl", OtherLanguage)[0]
    library = load_library(settings.datasets)
    stored = StoredVectors(settings.artifacts / "vectors.npz", embedder().embed)
    lens = Lens(library, stored, stored)
    families = [library.leaflets[q.leaflets[0]].family if q.leaflets else "" for q in questions]
    asked = [*(q.question for q in questions), *(f.question for f in foreign)]
    return Pool(
        window=lens([Seen(0.0, "answer", text) for text in asked]),
        family=np.array([*families, *["another language"] * len(foreign)]),
        register=np.array([*(q.register_ for q in questions), *[""] * len(foreign)]),
        topics=lens.topics,
    )


# --- what happens in a simulated week --------------------------------------------------------------------------------


def stream(pool: Pool, scenario: str, onset: float, weeks: int, rng: np.random.Generator) -> Window:
    """Messages from four weeks before time 0 to `weeks` after it; the scenario begins at `onset` (seconds)."""
    first, last = -REFERENCE.total_seconds(), weeks * WEEK
    days = int((last - first) / (24 * HOUR))
    by_hour = np.tile(np.where((np.arange(24) >= 7) & (np.arange(24) < 23), 1.2, 0.6) * PER_HOUR, days)
    hours = np.repeat(np.arange(len(by_hour)), rng.poisson(by_hour))
    times = np.sort(first + (hours + rng.random(len(hours))) * HOUR)
    usual, new = pool.where(scenario, rng)
    share = SCENARIOS[scenario][1] if scenario in SCENARIOS else 0.0
    changed = (times >= onset) & (rng.random(len(times)) < share)
    rows = np.where(changed, rng.choice(new, len(times)), rng.choice(usual, len(times)))
    poor = np.full(len(times), POOR)
    if scenario == "slow decay":
        poor += (DECAYED - POOR) * np.clip((times - onset) / (DECAY_DAYS * 24 * HOUR), 0, 1)
    clarified = rng.random(len(times)) < CLARIFIED
    bad = rng.random(len(times)) < poor
    refused = ~clarified & bad & (rng.random(len(times)) < REFUSED)
    answered = ~clarified & ~refused
    score = np.where(bad, rng.choice(LOW, len(times)), rng.choice(HIGH, len(times)))
    return replace(
        pool.window.take(rows), time=times, score=np.where(answered, score, np.nan),
        answered=answered.astype(float), refused=refused.astype(float),
    )  # fmt: skip


def week(messages: Window, number: int) -> tuple[Window, Window]:
    """The reference and the messages of a watched week, as the command would take them on the last hour of it."""
    begin = number * WEEK
    t = messages.time
    reference = messages.take(np.flatnonzero((t >= begin - REFERENCE.total_seconds()) & (t < begin)))
    return reference, messages.take(np.flatnonzero((t >= begin) & (t < begin + WEEK)))


def alarm(messages: Window, number: int, topics: int) -> tuple[float, str] | None:
    """When the first hourly check of a week that raises an alarm is made, and which test had most to say; None without one.

    The threshold is `drift.compare`'s: the same for every message, because `drift.wealth` counts a later deal for less.
    """
    reference, current = week(messages, number)
    paths = drift.wealth(reference, current, topics)
    over = np.flatnonzero(np.mean([np.exp(path) for path in paths.values()], axis=0) >= 1 / ALPHA)
    if not len(over):
        return None
    name = max(paths, key=lambda test: paths[test][over[0]])
    return float(np.ceil(current.time[over[0]] / HOUR) * HOUR), name


def cried_hourly(messages: Window) -> bool:
    """Whether Welch's t-test of the week's scores so far, made each hour at a level of ALPHA, is ever significant."""
    reference, current = week(messages, 0)
    before, scored = reference.score[~np.isnan(reference.score)], ~np.isnan(current.score)
    now, times = current.score[scored], current.time[scored]
    counts = np.searchsorted(times, np.arange(1, 169) * HOUR)
    counts = counts[counts >= 30]
    mean = np.cumsum(now)[counts - 1] / counts
    spread = np.sqrt(np.maximum(np.cumsum(now**2)[counts - 1] / counts - mean**2, 1e-12) * counts / (counts - 1))
    tests = stats.ttest_ind_from_stats(mean, spread, counts, before.mean(), before.std(ddof=1), len(before), equal_var=False)
    return bool((tests.pvalue < ALPHA).any())


def facts(pool: Pool, seed: int, runs: int, weeks: int) -> dict[str, Any]:
    """The report for programs."""
    quiet: list[bool] = []
    hourly: list[bool] = []
    for n in watched(range(weeks), "drift study: quiet weeks"):
        messages = stream(pool, "no change", np.inf, 1, np.random.default_rng([seed, 0, n]))
        quiet.append(alarm(messages, 0, len(pool.topics)) is not None)
        hourly.append(cried_hourly(messages))
    scenarios = {name: injected(pool, name, seed, runs) for name in SCENARIOS}
    plain = {n: {k: v.model_dump() if isinstance(v, Estimate) else v for k, v in s.items()} for n, s in scenarios.items()}
    calm = share(quiet)
    says = (
        f"False alarms in {_percent(calm)} of {weeks} quiet weeks that were checked every hour (promised: at most {ALPHA:.0%}); "
        + "; ".join(f"{name} found in {s['detected'].value:.0%} of {runs} runs" for name, s in scenarios.items())
    )
    return {
        "alpha": ALPHA, "messages_per_hour": PER_HOUR, "quiet_weeks": weeks, "runs": runs, "watched_weeks": WATCHED_WEEKS,
        "false_alarm_weeks": calm.model_dump(), "false_alarm_weeks_hourly_t_test": share(hourly).model_dump(),
        "scenarios": plain, "says": says,
    }  # fmt: skip


def injected(pool: Pool, scenario: str, seed: int, runs: int) -> dict[str, Any]:
    """Detection and delay over runs. An alarm before the onset ends the run as a false alarm; it detects nothing."""
    hours: list[float] = []
    messages_until: list[float] = []
    named: Counter[str] = Counter()
    early = 0
    for n in watched(range(runs), f"drift study: {scenario}"):
        rng = np.random.default_rng([seed, 1 + list(SCENARIOS).index(scenario), n])
        onset = float(rng.integers(0, 120)) * HOUR
        messages = stream(pool, scenario, onset, WATCHED_WEEKS, rng)
        found = next((a for k in range(WATCHED_WEEKS) if (a := alarm(messages, k, len(pool.topics)))), None)
        if found and found[0] <= onset:
            early += 1
        elif found:
            hours.append((found[0] - onset) / HOUR)
            messages_until.append(float(((messages.time >= onset) & (messages.time < found[0])).sum()))
            named[found[1]] += 1
    return {
        "detected": share([True] * len(hours) + [False] * (runs - len(hours))),
        "hours": estimate(hours, lambda v: float(np.median(v)), 1_000, seed),
        "messages": estimate(messages_until, lambda v: float(np.median(v)), 1_000, seed),
        "false_alarms_before_onset": early,
        "first_named": dict(named.most_common()),
    }


def share(found: Sequence[bool]) -> Estimate:
    """A share with its exact 95 % interval (Clopper & Pearson 1934); the bootstrap has none where all or no runs agree."""
    interval = stats.binomtest(sum(found), len(found)).proportion_ci(method="exact")
    return Estimate(value=sum(found) / len(found), low=float(interval.low), high=float(interval.high), n=len(found))


def example(pool: Pool, scenario: str, seed: int) -> tuple[Array, Array]:
    """One week with its onset on the second day: hours, and log10 of the mean wealth."""
    messages = stream(pool, scenario, 24 * HOUR, 1, np.random.default_rng([seed, 99]))
    paths = drift.wealth(*week(messages, 0), len(pool.topics))
    mean = np.mean([np.exp(path) for path in paths.values()], axis=0)
    return messages.time[messages.time >= 0] / HOUR, np.log10(np.maximum(mean, 1e-12))


# --- what people read ------------------------------------------------------------------------------------------------


def page(f: dict[str, Any], examples: dict[str, tuple[Array, Array]]) -> str:
    h, title = f["hardware"], "The watch for drift, on weeks of which we know what happened"
    machine = f"{h['cpu_info']}, {h['n_threads']} threads; {f['seconds']:.0f} s"
    calm, hourly = (Estimate(**f[key]) for key in ("false_alarm_weeks", "false_alarm_weeks_hourly_t_test"))
    quiet = [
        ["this project's seven bets, averaged", _percent(calm, True), str(calm.n)],
        [f"for comparison: a t-test of the judge's score each hour, level {ALPHA:.0%}", _percent(hourly, True), str(hourly.n)],
    ]
    rows = [
        [
            name, f"{SCENARIOS[name][0]} ({SCENARIOS[name][1]:.0%} of messages)", _percent(Estimate(**s["detected"]), True),
            _count(Estimate(**s["messages"])), _count(Estimate(**s["hours"])), str(s["false_alarms_before_onset"]),
            ", ".join(f"{WATCHED[test]} {n}" for test, n in s["first_named"].items()) or "-",
        ]
        for name, s in f["scenarios"].items()
    ]  # fmt: skip
    story = (
        f"Messages are drawn from the training and validation questions, {f['messages_per_hour']} an hour on average, with four "
        f"quiet weeks as reference. What comes of them is a stated model, not a measurement: {POOR:.0%} poor answers, of which "
        f"{REFUSED:.0%} are refusals and the others score {', '.join(map(str, LOW))}; good ones score "
        f"{' or '.join(map(str, HIGH))}; {CLARIFIED:.0%} are questions back. Real people repeat themselves and come in seasons; "
        "expect more alarms from them."
    )
    return document(
        title,
        [
            heading(title, 1),
            paragraph(f"Seed {f['seed']}. {machine}.", lead=True),
            paragraph(f["says"] + "."),
            paragraph(story),
            heading("Nothing changed: weeks with a false alarm, checked every hour"),
            table(["test", "share of weeks [95 %]", "weeks"], quiet),
            heading(f"Something changed: {f['runs']} runs each, watched for {f['watched_weeks']} weeks"),
            table(
                ["scenario", "what changed", "found [95 %]", "messages until the alarm, median [95 %]", "hours, median [95 %]",
                 "false alarms before", "what had most to say at the alarm"],
                rows,
            ),
            paragraph(
                "Delays are those of the runs in which the change was found. From Monday on the reference holds the week before, "
                "so a change that is never acted upon becomes the new normal."
            ),
            heading("One week of each: the wealth of the bets"),
            paragraph(f"The change begins after 24 hours. An alarm is due at {1 / ALPHA:.0f} (the dashed line)."),
            chart(examples),
        ],
    )  # fmt: skip


def chart(examples: dict[str, tuple[Array, Array]]) -> str:
    figure, axes = plt.subplots(figsize=(9, 4.5))
    styles = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
    for (name, (hours, wealth)), style in zip(examples.items(), styles, strict=True):
        axes.plot(hours, np.minimum(wealth, 6), linestyle=style, color="black" if name == "no change" else None, label=name)
    axes.axhline(np.log10(1 / ALPHA), color="0.4", linestyle="--", linewidth=1)
    axes.axvline(24, color="0.8", linewidth=1)
    axes.set(xlabel="hours since Monday 00:00", ylabel="log10 of the wealth (cut at 6)", xlim=(0, 168))
    axes.legend(frameon=False)
    text = svg(figure)
    plt.close(figure)
    return text


def _percent(e: Estimate, interval: bool = False) -> str:
    if e.value is None:
        return "-"
    return f"{e.value:.1%}" + (f" [{e.low:.1%}, {e.high:.1%}]" if interval else "")


def _count(e: Estimate) -> str:
    return "-" if e.value is None else f"{e.value:,.0f} [{e.low:,.0f}, {e.high:,.0f}]"
