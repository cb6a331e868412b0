"""Scores with their uncertainty. Nothing in this project is published as a bare mean.

Intervals are percentile bootstrap intervals over rows (Efron & Tibshirani 1993): resample the rows with replacement,
recompute, take the 2.5th and 97.5th percentile. The seed is fixed, so a report can be reproduced to the last digit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict


class Estimate(BaseModel):
    """A figure, its 95 % interval and the number of rows behind it; all None when there were no rows."""

    model_config = ConfigDict(frozen=True)
    value: float | None
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        return f"{self.value:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if self.low is not None else "")


def estimate(rows: Sequence[Any], statistic: Callable[[Sequence[Any]], float], resamples: int, seed: int) -> Estimate:
    """Any statistic of rows with its bootstrap interval."""
    if not rows:
        return Estimate(value=None, low=None, high=None, n=0)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(rows), size=(resamples, len(rows)))
    values = [statistic([rows[i] for i in pick]) for pick in picks]
    low, high = np.percentile(values, [2.5, 97.5])
    return Estimate(value=float(statistic(rows)), low=float(low), high=float(high), n=len(rows))


def estimate_mean(values: Sequence[float], resamples: int, seed: int) -> Estimate:
    """The mean of per-row scores with its bootstrap interval."""
    if not len(values):
        return Estimate(value=None, low=None, high=None, n=0)
    data = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, len(data), size=(resamples, len(data)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(value=float(data.mean()), low=float(low), high=float(high), n=len(data))


def estimate_ratio(ours: Sequence[float], theirs: Sequence[float], resamples: int, seed: int) -> Estimate:
    """Mean of ours over mean of theirs, both on the same rows in the same order; rows are resampled as pairs.

    What makes a row hard makes it hard for both, so the interval is narrower than those of the two means would suggest.
    Without rows, or where theirs are all zero, there is no ratio. ValueError when the lengths differ.
    """
    pairs = list(zip(ours, theirs, strict=True))
    if not sum(theirs):
        return Estimate(value=None, low=None, high=None, n=len(pairs))
    data = np.asarray(pairs, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(data), size=(resamples, len(data)))
    sums = data[picks].sum(axis=1)
    low, high = np.percentile(sums[:, 0] / np.maximum(sums[:, 1], 1e-12), [2.5, 97.5])
    return Estimate(value=float(data[:, 0].sum() / data[:, 1].sum()), low=float(low), high=float(high), n=len(data))


def estimate_difference(ours: Sequence[float], theirs: Sequence[float], resamples: int, seed: int) -> Estimate:
    """Mean of ours minus mean of theirs, row by row, as `estimate_ratio` pairs them. ValueError when the lengths differ."""
    return estimate_mean([a - b for a, b in zip(ours, theirs, strict=True)], resamples, seed)


def set_f1(predicted: set[Any], gold: set[Any]) -> float:
    """F1 of two sets; 1.0 when both are empty."""
    if not predicted and not gold:
        return 1.0
    overlap = len(predicted & gold)
    return 2 * overlap / (len(predicted) + len(gold))


def cohen_kappa(pairs: Sequence[tuple[Any, Any]], weights: Literal["none", "quadratic"] = "none") -> float:
    """Agreement of two raters beyond chance (Cohen 1960; `quadratic` weights for ordered labels, Cohen 1968).

    0.0 when chance alone explains everything, for instance when one rater only ever gives one label.
    """
    labels = sorted({label for pair in pairs for label in pair})
    if len(labels) < 2:
        return 0.0
    place = {label: i for i, label in enumerate(labels)}
    observed = np.zeros((len(labels), len(labels)))
    for a, b in pairs:
        observed[place[a], place[b]] += 1
    expected = np.outer(observed.sum(1), observed.sum(0)) / len(pairs)
    if weights == "quadratic":
        steps = np.asarray(labels, dtype=float)
        cost = (steps[:, None] - steps[None, :]) ** 2
    else:
        cost = 1.0 - np.eye(len(labels))
    disagreement = float((cost * expected).sum())
    return 1.0 - float((cost * observed).sum()) / disagreement if disagreement else 0.0


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 (linear interpolation). Never average these over runs. ValueError without values."""
    if not len(values):
        raise ValueError("percentiles of no values")
    p50, p90, p99 = np.percentile(np.asarray(values, dtype=float), [50, 90, 99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99)}
