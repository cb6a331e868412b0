"""Is B faster than A? Ratios with intervals, and the honest answer where the samples cannot tell.

Why: two runs of the same code differ. A change is a change only when it is larger than what repeating alone would show.

    python -m benchmarks compare A B [--threshold 0.05]       A and B: result files, or commits that have one

For each figure that both runs have raw samples of: the ratio of medians B / A with a 95 % percentile-bootstrap interval
(both sides resampled). It counts as different when the interval, widened for the number of figures looked at (Bonferroni),
leaves out 1 and the ratio is further from 1 than the threshold; everything else is "no difference that this many samples
can show". Samples of one run share its minute and its machine state: only repeated runs show what varies between runs.

Exit status: 0 nothing got worse, 1 something got worse, 2 the runs cannot be compared. A ratio has a meaning when one
thing differs: machine, software or model. Runs that differ in two are refused, and so are disturbed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from benchmarks.results import BUSY, Record, Result, read, stored
from shared.errors import UserError

RESAMPLES = 10_000
FEWEST = 5
MACHINE = ("cpu_info", "cpu_cores", "n_threads", "memory_gib", "gpu_info", "power_source")
SOFTWARE = ("build_commit", "build_dirty", "libraries", "python", "driver")
HIGHER_IS_BETTER = ("throughput", "per_second", "recall", "bandwidth")
Verdict = Literal["better", "worse", "no difference that this many samples can show"]


class Comparison(BaseModel):
    """One figure on both sides. `low` and `high` bound B / A with 95 % confidence."""

    model_config = ConfigDict(frozen=True)
    suite: str
    model: str
    case: str
    metric: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    n: tuple[int, int]
    verdict: Verdict


def compare(a: Result, b: Result, threshold: float = 0.05, seed: int = 7) -> list[Comparison]:
    """Every figure both runs have samples of. UserError, with the reason, when the runs are not comparable."""
    model_pairs = check_comparable(a, b)
    theirs = {key_of(r, model_pairs): r for r in b.records}
    pairs: list[tuple[Record, str, list[float], list[float]]] = []
    for mine in a.records:
        other = theirs.get(key_of(mine, {}))
        for metric, left in mine.samples.items():
            right = other.samples.get(metric, []) if other else []
            # itl_ms repeats what tpot_ms says, from samples that are not independent
            if metric != "itl_ms" and len(left) >= FEWEST and len(right) >= FEWEST and min(*left, *right) > 0:
                pairs.append((mine, metric, left, right))
    if not pairs:
        suites = f"{', '.join(a.suites)} and {', '.join(b.suites)}"
        raise UserError(f"the runs have no case in common with {FEWEST} samples on both sides", suites, "Run the same suites")
    return [compare_samples(mine, metric, left, right, len(pairs), threshold, seed) for mine, metric, left, right in pairs]


def compare_samples(
    record: Record, metric: str, a: Sequence[float], b: Sequence[float], looked_at: int, threshold: float, seed: int
) -> Comparison:
    """The ratio of medians with its interval, and the verdict at a level widened for `looked_at` figures."""
    ratios = bootstrap_ratio(a, b, seed)
    low, high = np.percentile(ratios, [2.5, 97.5])
    tail = 2.5 / looked_at
    # With few samples the bootstrap has no tails that thin: its extremes are then the whole answer.
    wide_low, wide_high = np.percentile(ratios, [tail, 100 - tail])
    ratio = float(np.median(b) / np.median(a))
    different = (wide_low > 1 or wide_high < 1) and abs(np.log(ratio)) > np.log1p(threshold)
    improved = (ratio > 1) == any(word in metric for word in HIGHER_IS_BETTER)
    verdict: Verdict = "no difference that this many samples can show"
    if different:
        verdict = "better" if improved else "worse"
    case = " ".join(f"{k}={v}" for k, v in record.case.items())
    return Comparison(
        suite=record.suite, model=record.model, case=case, metric=metric, a=float(np.median(a)), b=float(np.median(b)),
        ratio=ratio, low=float(low), high=float(high), n=(len(a), len(b)), verdict=verdict,
    )  # fmt: skip


def bootstrap_ratio(a: Sequence[float], b: Sequence[float], seed: int) -> np.ndarray:
    """RESAMPLES ratios of the medians of resampled sides, shape (RESAMPLES,)."""
    rng = np.random.default_rng(seed)
    medians = []
    for values in (np.asarray(a, dtype=float), np.asarray(b, dtype=float)):
        # Thousands of requests need no 10,000 x n table at once.
        parts = [np.median(values[rng.integers(0, len(values), (500, len(values)))], axis=1) for _ in range(RESAMPLES // 500)]
        medians.append(np.concatenate(parts))
    return np.asarray(medians[1] / medians[0])


def check_comparable(a: Result, b: Result) -> dict[str, str]:
    """UserError unless at most one of machine, software and model differs and neither run was disturbed.

    Returns how b's model names map to a's, where a single model was measured under two names.
    """
    for name, run in (("A", a), ("B", b)):
        share = float(run.environment.get("busy_share") or 0)
        if share > BUSY:
            raise UserError(f"run {name} was disturbed: other programs used {share:.0%} of the machine", "", "Measure it again")
    differs = {
        "the machine": [k for k in MACHINE if a.environment.get(k) != b.environment.get(k)],
        "the software": [k for k in SOFTWARE if a.environment.get(k) != b.environment.get(k)],
        "the model": models_differ(a, b),
    }
    several = {what: keys for what, keys in differs.items() if keys}
    if len(several) > 1:
        told = "; ".join(f"{what} ({', '.join(keys)})" for what, keys in several.items())
        raise UserError(
            f"more than one thing differs, so a ratio would not say what caused it: {told}", "", "Change one at a time"
        )
    if len(a.models) == len(b.models) == 1:
        return {next(iter(b.models)): next(iter(a.models))}
    return {}


def models_differ(a: Result, b: Result) -> list[str]:
    """Names that stand for other weights in the other run; with one model each, whether it is another one."""
    if len(a.models) == len(b.models) == 1:
        (mine,), (theirs,) = a.models.values(), b.models.values()
        return [] if (mine.sha256 or mine.model_filename) == (theirs.sha256 or theirs.model_filename) else [theirs.model_filename]
    return [name for name in a.models.keys() & b.models.keys() if a.models[name].sha256 != b.models[name].sha256]


def key_of(record: Record, names: dict[str, str]) -> tuple[Any, ...]:
    """What makes two records the same case; model names of b are translated by `names`."""
    model = record.model
    for theirs, ours in names.items():
        model = model.replace(theirs, ours)
    return (record.suite, model, tuple(sorted((k, str(v)) for k, v in record.case.items())))


def find(name: str, files: Callable[[], list[Path]] = stored) -> Result:
    """A result file, or the latest stored run of a commit. UserError when there is neither."""
    if Path(name).exists() or name.endswith(".json"):
        return read(Path(name))
    for path in reversed(files()):
        run = read(path)
        commit = str(run.environment.get("build_commit") or "")
        if commit and (commit.startswith(name) or name.startswith(commit)):
            return run
    raise UserError(f"no result of {name!r}", "compare", "Give a result file, or check out that commit and run `make bench`")


def print_comparison(found: Sequence[Comparison]) -> None:
    for c in found:
        print(f"{c.suite}, {c.model}, {c.case}, {c.metric}: {c.a:.4g} -> {c.b:.4g}, "
              f"ratio {c.ratio:.3f} [{c.low:.3f}, {c.high:.3f}], n = {c.n[0]} and {c.n[1]}: {c.verdict}")  # fmt: skip
    counts = {verdict: sum(c.verdict == verdict for c in found) for verdict in ("better", "worse")}
    print(f"{len(found)} figures: {counts['better']} better, {counts['worse']} worse, the rest undecided")
