"""How many people a second? The highest steady rate at which the first word still comes in time, and what happens beyond it.

    python -m benchmarks steady [--seconds 45]        (make load)

Why: a service that is fast for one person says nothing about the tenth, and a service that takes every message in a rush
answers none of them in time. So messages arrive at a fixed rate (open loop) that is raised until p95 of the time to the first
word passes BOUND; then at two and four times that rate. Beyond its limit a service must shed (429 or 503 with Retry-After) and
go on answering at about the rate it can: what must not happen is a collapse, or a connection without any reply.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.people import Reply, arrive, messages, running_service
from shared import page
from shared.files import write_json, write_text
from shared.hardware import busy, fingerprint
from shared.metrics import Estimate, estimate
from shared.settings import Settings

BOUND = 2.0  # seconds to the first word, at p95
FIRST_RATE = 0.5  # messages a second
FINER = 3  # times the gap between the last good and the first bad rate is halved
BEYOND = (2.0, 4.0)  # times the highest good rate
RESAMPLES = 1000


@dataclass(frozen=True)
class Round:
    """One rate held for a while. Rates a second, times in seconds; `failed` had no whole reply and no refusal either."""

    rate: float
    sent: int
    answered: int
    refused: int
    refused_without_retry_after: int
    failed: int
    goodput: float
    first_word_p50: float | None
    first_word_p95: Estimate
    p99_send_delay: float
    errors: list[str]

    @property
    def good(self) -> bool:
        p95 = self.first_word_p95.value
        return not self.refused and not self.failed and p95 is not None and p95 <= BOUND


def steady(settings: Settings, seconds: float) -> dict[str, Any]:
    """Find the rate, go beyond it, write `artifacts/reports/load.json` and `.html`. Returns what was found."""
    texts = iter(messages(settings.datasets, settings.seed))
    with running_service(settings.artifacts, "load") as service:
        hold(service.url, list(islice(texts, 8)), 1.0, settings.seed)  # what is loaded at the first message is loaded now
        disturbed = busy()
        rounds = list(search(service.url, texts, seconds, settings.seed))
        best = max((r.rate for r in rounds if r.good), default=0.0)
        beyond = [hold(service.url, take(texts, f * best, seconds), f * best, settings.seed) for f in BEYOND if best]
        after = hold(service.url, take(texts, max(best / 2, FIRST_RATE), seconds / 2), max(best / 2, FIRST_RATE), settings.seed)
    found = {
        "hardware": fingerprint(), "busy_before": disturbed, "seed": settings.seed, "seconds_a_round": seconds,
        "bound_s": BOUND, "steady_rate": best, "rounds": [written(r) for r in sorted(rounds, key=lambda r: r.rate)],
        "beyond": [written(r) for r in beyond], "afterwards": written(after),
    }  # fmt: skip
    reports = settings.artifacts / "reports"
    write_json(reports / "load.json", found)
    write_text(reports / "load.html", html(found))
    return found


def search(url: str, texts: Iterator[str], seconds: float, seed: int) -> Iterator[Round]:
    """Double the rate until a round is bad, then halve the gap FINER times."""
    low, high, rate = 0.0, 0.0, FIRST_RATE
    while not high:
        yield (now := hold(url, take(texts, rate, seconds), rate, seed))
        low, high, rate = (rate, 0.0, 2 * rate) if now.good else (low, rate, rate)
    for _ in range(FINER if low else 0):
        rate = (low + high) / 2
        yield (now := hold(url, take(texts, rate, seconds), rate, seed))
        low, high = (rate, high) if now.good else (low, rate)


def take(texts: Iterator[str], rate: float, seconds: float) -> list[str]:
    """As many messages as arrive in `seconds` on average; at least twenty, so that a p95 means something."""
    return list(islice(texts, max(20, round(rate * seconds))))


def hold(url: str, texts: Sequence[str], rate: float, seed: int) -> Round:
    with tqdm(total=len(texts), desc=f"  {rate:.2f} a second", leave=False) as bar:
        return summed_up(asyncio.run(arrive(url, texts, rate, seed, lambda _: bar.update(1))), rate, seed)


def summed_up(replies: Sequence[Reply], rate: float, seed: int) -> Round:
    first = [r.first_word for r in replies if r.answered and r.first_word is not None]
    failed = [r for r in replies if not r.answered and not r.refused]
    refused = [r for r in replies if r.refused]
    return Round(
        rate=rate,
        sent=len(replies),
        answered=len(first),
        refused=len(refused),
        refused_without_retry_after=sum(not r.retry_after.isdigit() for r in refused),
        failed=len(failed),
        goodput=rate * sum(f <= BOUND for f in first) / len(replies),
        first_word_p50=float(np.median(first)) if first else None,
        first_word_p95=estimate(first, lambda rows: float(np.percentile(rows, 95)), RESAMPLES, seed),
        p99_send_delay=float(np.percentile([r.late for r in replies], 99)),
        errors=sorted({r.error for r in failed})[:3],
    )


def written(found: Round) -> dict[str, Any]:
    return {**asdict(found), "first_word_p95": found.first_word_p95.model_dump()}


HEAD = ("messages a second", "sent", "answered", "told to come back", "without reply", "in time, a second", "first word p50, s",
        "first word p95, s")  # fmt: skip


def rows(rounds: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            f"{r['rate']:.2f}", str(r["sent"]), str(r["answered"]), str(r["refused"]), str(r["failed"]), f"{r['goodput']:.2f}",
            "-" if r["first_word_p50"] is None else f"{r['first_word_p50']:.2f}", str(Estimate(**r["first_word_p95"])),
        ]
        for r in rounds
    ]  # fmt: skip


def html(found: dict[str, Any]) -> str:
    lead = (
        f"{found['steady_rate']:.2f} messages a second is the highest steady rate at which p95 of the time to the first word "
        f"stays under {found['bound_s']:.0f} s. {found['hardware']['cpu_info']}, {found['hardware']['cpu_cores']} cores, "
        f"seed {found['seed']}; messages arrive as a Poisson process, none is sent twice."
    )
    parts = [
        page.heading("How many people a second", 1),
        page.paragraph(lead, lead=True),
        page.table(HEAD, rows(found["rounds"])),
    ]
    parts += [page.heading("Beyond it"), page.table(HEAD, rows(found["beyond"]))]
    parts += [page.heading("Afterwards, at half of it"), page.table(HEAD, rows([found["afterwards"]]))]
    return page.document("Load", parts)


def show(found: dict[str, Any], reports: Path) -> None:
    """The last line is one JSON document."""
    print(f"report: {reports / 'load.html'}")
    print(json.dumps(found))
