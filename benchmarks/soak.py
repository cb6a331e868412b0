"""An hour of people: do memory and open files stay flat?

    python -m benchmarks soak [--minutes 60] [--rate 0.5]        (make soak MINUTES=60)

Why: a leak of a kilobyte a message passes every test and stops a service on its tenth day. People arrive at a steady rate for an
hour while the resident memory and the open files of both processes are read every few seconds. After a warm-up (caches, the
engine's pool) a line is laid through the readings (Theil-Sen, Sen 1968: the median of the slopes between all pairs, which a few
outliers do not move); its slope times an hour, with a 95 % interval, is the growth. Flat means less than FLAT of what is held.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import psutil
from scipy.stats import theilslopes
from tqdm import tqdm

from benchmarks.people import Running, arrive, messages, running_service
from shared import page
from shared.errors import UserError
from shared.files import write_json, write_text
from shared.hardware import fingerprint
from shared.metrics import percentiles
from shared.settings import Settings

EVERY = 10.0  # seconds between readings
WARM_UP = 1 / 6  # of the time
FLAT = 0.05  # of the held memory or files, in an hour
READINGS = ("rss_mb", "open_files", "threads")


def soak(settings: Settings, minutes: float, rate: float) -> dict[str, Any]:
    """Send `rate` messages a second for `minutes`; write `artifacts/reports/soak.json` and `.html`. Returns what was found."""
    texts = list(islice(messages(settings.datasets, settings.seed), round(rate * minutes * 60)))
    if len(texts) < rate * minutes * 60 - 1:
        most = len(texts) / rate / 60
        raise UserError(
            "there are not enough different messages", f"--minutes {minutes:g} --rate {rate:g}", f"At most {most:.0f}"
        )
    with running_service(settings.artifacts, "soak") as service, watched(service) as series:
        first = service.parts()["service"].pid
        with tqdm(total=len(texts), desc="  soak", leave=False) as bar:
            replies = asyncio.run(arrive(service.url, texts, rate, settings.seed, lambda _: bar.update(1)))
        restarted = service.parts()["service"].pid != first
    halves = [[r.first_word for r in half if r.first_word] for half in np.array_split(np.array(replies, dtype=object), 2)]
    found = {
        "hardware": fingerprint(), "seed": settings.seed, "minutes": minutes, "rate": rate, "restarted": restarted,
        "sent": len(replies), "answered": sum(r.answered for r in replies), "refused": sum(r.refused for r in replies),
        "failed": sum(not r.answered and not r.refused for r in replies),
        "errors": sorted({r.error for r in replies if r.error})[:5],
        "first_word_s": {"first half": percentiles(halves[0]), "second half": percentiles(halves[1])},
        "growth": {part: {name: growth(rows, name) for name in READINGS} for part, rows in series.items()},
        "series": series,
    }  # fmt: skip
    reports = settings.artifacts / "reports"
    write_json(reports / "soak.json", found)
    write_text(reports / "soak.html", html(found))
    return found


@contextmanager
def watched(service: Running, every: float = EVERY) -> Iterator[dict[str, list[dict[str, float]]]]:
    """Readings of each process of the service while the block runs."""
    series: dict[str, list[dict[str, float]]] = {}
    over, began = threading.Event(), time.monotonic()

    def look() -> None:
        while True:
            for part, process in service.parts().items():
                try:
                    with process.oneshot():
                        reading = {
                            "hours": (time.monotonic() - began) / 3600, "rss_mb": process.memory_info().rss / 1e6,
                            "open_files": float(process.num_fds()), "threads": float(process.num_threads()),
                        }  # fmt: skip
                except psutil.Error:
                    continue
                series.setdefault(part, []).append(reading)
            if over.wait(every):
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield series
    finally:
        over.set()
        thread.join()


def growth(rows: Sequence[dict[str, float]], name: str) -> dict[str, float | bool | None]:
    """What is held in the middle, how much it grows in an hour with its 95 % interval, and whether that is flat."""
    late = [row for row in rows if row["hours"] >= rows[-1]["hours"] * WARM_UP]
    if len(late) < 10:
        return {"held": None, "an_hour": None, "low": None, "high": None, "flat": None}
    values = np.array([row[name] for row in late])
    slope, _, low, high = theilslopes(values, [row["hours"] for row in late], 0.95)
    held = float(np.median(values))
    return {"held": held, "an_hour": float(slope), "low": float(low), "high": float(high), "flat": bool(high <= FLAT * held)}


def html(found: dict[str, Any]) -> str:
    lead = (
        f"{found['sent']} messages in {found['minutes']:.0f} minutes ({found['rate']:g} a second, seed {found['seed']}): "
        f"{found['answered']} answered, {found['refused']} told to come back, {found['failed']} without reply. "
        f"{found['hardware']['cpu_info']}, {found['hardware']['cpu_cores']} cores."
    )
    lines = [
        [part, name, *(("-",) * 3 if g["held"] is None else
         (f"{g['held']:.1f}", f"{g['an_hour']:+.2f} [{g['low']:+.2f}, {g['high']:+.2f}]", "yes" if g["flat"] else "no"))]
        for part, each in found["growth"].items() for name, g in each.items()
    ]  # fmt: skip
    parts = [page.heading("An hour of people", 1), page.paragraph(lead, lead=True)]
    parts.append(page.table(("process", "reading", "held", "growth an hour [95 %]", "flat"), lines))
    for name in ("rss_mb", "open_files"):
        figure, axes = plt.subplots(figsize=(9, 3))
        for part, series in found["series"].items():
            axes.plot([60 * row["hours"] for row in series], [row[name] for row in series], label=part)
        axes.set(xlabel="minutes", ylabel={"rss_mb": "resident memory, MB"}.get(name, "open files"), ylim=(0, None))
        axes.legend()
        parts.append(page.svg(figure))
        plt.close(figure)
    return page.document("Soak", parts)


def show(found: dict[str, Any], reports: Path) -> None:
    """The last line is one JSON document, without the readings."""
    print(f"report: {reports / 'soak.html'}")
    print(json.dumps({key: value for key, value in found.items() if key != "series"}))
