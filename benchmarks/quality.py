"""Quality: the task scores of every published variant, so that speed is never shown without what it cost.

Why here and not only in the ML track's report: a benchmark page that shows a fast variant must show on the same page how
well it answers. Nothing is measured anew; the scores come from the manifest of the published model, with their intervals.

    python -m benchmarks run --suite quality
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.budget import Task
from benchmarks.limits import Limits
from benchmarks.results import Record
from shared.errors import UserError
from shared.handoff import Manifest, current, read_manifest

NAME = "quality"


def measure(task: Task, limits: Limits | None = None) -> Iterator[Record]:
    """A record for each variant of the current version; skipped with a line when nothing is published."""
    del limits
    try:
        manifest = read_manifest(current())
    except UserError as error:
        task.skip(str(error))
        return
    yield from scores(manifest)


def scores(manifest: Manifest) -> Iterator[Record]:
    """Metrics `<key>`, with `<key>/low`, `<key>/high` (95 % bootstrap interval) and `<key>/n` beside each."""
    for variant in manifest.variants.values():
        metrics: dict[str, float | None] = {"weight_bytes": float(variant.weight_bytes)}
        for key, figure in variant.quality.items():
            metrics |= {key: figure.value, f"{key}/low": figure.low, f"{key}/high": figure.high, f"{key}/n": float(figure.n)}
        yield Record(suite=NAME, model=variant.name, case={"version": manifest.version}, metrics=metrics)
