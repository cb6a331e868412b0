"""The charts of the report: black and grey, told apart by marker, line style and hatch, as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from shared.page import svg

STYLES = ("ko-", "ks--", "k^:", "kd-.", "kv-", "kx--", "k+:", "k*-.")
Points = Sequence[tuple[float, float]]


def lines(sides: Mapping[str, Points], x: str, y: str, log_x: bool = False, log_y: bool = False) -> str:
    """One line a side through its points (x, y)."""
    figure, axes = plt.subplots(figsize=(8, 3.2))
    for number, (name, points) in enumerate(sides.items()):
        ordered = sorted(points)
        style = STYLES[number % len(STYLES)]
        axes.plot(
            [p[0] for p in ordered],
            [p[1] for p in ordered],
            style,
            label=name,
            markersize=5,
            linewidth=1.2,
            markerfacecolor="white",
        )
    if log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({p[0] for points in sides.values() for p in points})
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel=x, ylabel=y)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _closed(figure)


def over_time(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str) -> str:
    """One small chart under the other, one a quantity, with a common time axis."""
    figure, all_axes = plt.subplots(len(series), 1, figsize=(8, 1.7 * len(series)), sharex=True, squeeze=False)
    for axes, (name, (times, values)) in zip(all_axes[:, 0], series.items(), strict=True):
        axes.plot(times, values, "k-", linewidth=1)
        axes.set_ylabel(name, fontsize=9)
        axes.set_ylim(0, 1.1 * max(values) or 1)
    all_axes[-1, 0].set_xlabel(x)
    return _closed(figure)


def pareto(points: Mapping[str, tuple[float, float, float]], x: str, y: str, size: str) -> str:
    """One circle a model at (x, y), its area by the third figure; the front (nothing is both better) is joined."""
    figure, axes = plt.subplots(figsize=(8, 3.6))
    largest = max(p[2] for p in points.values())
    for name, (px, py, weight) in points.items():
        axes.scatter([px], [py], s=60 + 900 * weight / largest, facecolor="0.9", edgecolor="black", zorder=2)
        axes.annotate(name, (px, py), ha="center", va="center", fontsize=9, zorder=3)
    front = sorted(p[:2] for n, p in points.items() if not any(q[0] < p[0] and q[1] >= p[1] for m, q in points.items() if m != n))
    axes.plot(
        [p[0] for p in front], [p[1] for p in front], "k--", linewidth=1, zorder=1, label="front: nothing is faster and as good"
    )
    axes.margins(0.2)
    axes.set(xlabel=x, ylabel=y, title=f"area of a circle: {size}")
    axes.title.set_fontsize(9)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return _closed(figure)


def bars(groups: Mapping[str, Mapping[str, tuple[float, float | None, float | None]]], y: str) -> str:
    """Groups of bars (value, low, high), told apart by grey and hatch."""
    figure, axes = plt.subplots(figsize=(8, 3.2))
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        places, values, below, above = [], [], [], []
        for place, group in enumerate(groups.values()):
            if name in group:
                value, low, high = group[name]
                places.append(place + (number - (len(names) - 1) / 2) * width)
                values.append(value)
                below.append(max(0.0, value - (value if low is None else low)))
                above.append(max(0.0, (value if high is None else high) - value))
        hatch = ("", "//", "..", "xx", "--", "\\\\")[number % 6]
        axes.bar(places, values, width, yerr=[below, above], capsize=3, label=name, color=str(0.95 - 0.13 * (number % 6)),
                 edgecolor="black", hatch=hatch)  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=9)
    axes.set_ylabel(y)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _closed(figure)


def _closed(figure: Any) -> str:
    text = svg(figure)
    plt.close(figure)
    return text
