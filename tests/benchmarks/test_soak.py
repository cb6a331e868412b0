"""A leak is seen, noise is not one."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.soak import growth


def readings(a_hour: float, noise: float, n: int = 360) -> list[dict[str, float]]:
    rng = np.random.default_rng(7)
    hours = np.arange(n) / n
    return [
        {"hours": float(h), "rss_mb": float(v)}
        for h, v in zip(hours, 1000 + a_hour * hours + rng.normal(0, noise, n), strict=True)
    ]


def test_noise_is_flat() -> None:
    assert growth(readings(0.0, 20.0), "rss_mb")["flat"] is True


def test_a_leak_is_not_flat_and_its_size_is_found() -> None:
    found = growth(readings(120.0, 20.0), "rss_mb")
    assert found["flat"] is False
    assert found["an_hour"] == pytest.approx(120, rel=0.15)


def test_what_grows_only_in_the_warm_up_is_flat() -> None:
    rows = readings(0.0, 2.0)
    for row in rows[:50]:
        row["rss_mb"] -= 500 * (1 - row["hours"] * 360 / 50)
    assert growth(rows, "rss_mb")["flat"] is True


def test_too_few_readings_say_nothing() -> None:
    assert growth(readings(0.0, 1.0, n=8), "rss_mb")["flat"] is None
