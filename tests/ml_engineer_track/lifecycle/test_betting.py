"""A bet wins against a change and, however often one looks, hardly ever against none; it never knows what comes later."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_engineer_track.lifecycle import betting as b

ALPHA, RUNS = 0.05, 300
#: more false alarms than this in RUNS runs have a probability below 1 in 10,000 while the promise holds
TOO_MANY = 31


def ever(log_wealth: b.Array) -> bool:
    return bool((log_wealth >= np.log(1 / ALPHA)).any())


def test_a_reference_message_is_dealt_once_at_most_and_the_round_ends_when_none_is_left() -> None:
    for reference in (1, 7, 800, 5_000):
        dealt = b.deal(reference, 10_000, seed=1)
        assert len(set(dealt.rows)) == len(dealt.rows) == reference
        assert len(dealt.of) == reference
        assert dealt.of.max() == len(dealt.starts) - 1 < 10_000


@given(st.integers(1, 5_000), st.integers(1, 400), st.integers(1, 400))
def test_what_a_message_is_dealt_does_not_depend_on_how_many_will_come(reference: int, few: int, more: int) -> None:
    first, second = b.deal(reference, few, seed=3), b.deal(reference, few + more, seed=3)
    n = len(first.rows)
    assert (first.rows == second.rows[:n]).all()
    assert (first.starts == second.starts[: len(first.starts)]).all()


def test_means_over_what_was_dealt_leave_out_what_is_not_known() -> None:
    dealt = b.Deal(rows=np.arange(5), starts=np.array([0, 2, 4]))
    found = dealt.mean(np.array([1.0, 3.0, np.nan, 4.0, np.nan]))
    assert found[:2].tolist() == [2.0, 4.0]
    assert np.isnan(found[2])


def test_without_payoffs_wealth_stays_one() -> None:
    assert b.log_wealth(np.zeros(5), two_sided=True) == pytest.approx(np.zeros(5))
    assert b.log_wealth(np.full(5, np.nan), two_sided=False) == pytest.approx(np.zeros(5))


def test_wealth_is_the_mean_over_the_stakes() -> None:
    assert np.exp(b.log_wealth(np.array([1.0]), two_sided=False))[0] == pytest.approx(1 + b.STAKES.mean())
    assert np.exp(b.log_wealth(np.array([1.0]), two_sided=True))[0] == pytest.approx(1)


def values(rng: np.random.Generator, n: int, change: float = 0.0) -> b.Array:
    return np.asarray(rng.random(n) < 0.2 + change, dtype=float)


def categories(rng: np.random.Generator, n: int, change: float = 0.0) -> b.Array:
    return np.where(rng.random(n) < change, 0, rng.integers(0, 12, n))


def meanings(rng: np.random.Generator, n: int, change: float = 0.0) -> b.Array:
    places = np.random.default_rng(0).normal(size=(9, 24))
    return np.asarray(places[np.where(rng.random(n) < change, 8, rng.integers(0, 8, n))] + 0.3 * rng.normal(size=(n, 24)))


def bet(kind: str, now: b.Array, before: b.Array, dealt: b.Deal) -> b.Array:
    if kind == "values":
        return b.log_wealth(b.bet_on_mean(now, before, dealt), two_sided=True)
    if kind == "categories":
        return b.log_wealth(b.bet_on_categories(now, before, dealt, 12), two_sided=False)
    return b.log_wealth(b.bet_on_meaning(now, before, dealt), two_sided=False)


DRAW = {"values": values, "categories": categories, "meanings": meanings}


@pytest.mark.parametrize("kind", DRAW)
def test_false_alarms_stay_within_the_promise_although_every_message_is_a_look(kind: str) -> None:
    alarms = 0
    for run in range(RUNS):
        rng = np.random.default_rng([5, run])
        before, now = DRAW[kind](rng, 1_000), DRAW[kind](rng, 300)
        alarms += ever(bet(kind, now, before, b.deal(1_000, 300, run)))
    assert alarms <= TOO_MANY


@pytest.mark.parametrize("kind", DRAW)
def test_a_change_is_found(kind: str) -> None:
    found = 0
    for run in range(20):
        rng = np.random.default_rng([6, run])
        before, now = DRAW[kind](rng, 2_000), DRAW[kind](rng, 400, 0.25)
        found += ever(bet(kind, now, before, b.deal(2_000, 400, run)))
    assert found >= 18


@pytest.mark.parametrize("kind", DRAW)
def test_wealth_after_a_message_does_not_depend_on_later_ones(kind: str) -> None:
    rng = np.random.default_rng(8)
    before, now, other = DRAW[kind](rng, 2_000), DRAW[kind](rng, 120, 0.2), DRAW[kind](rng, 180)
    short = bet(kind, now, before, b.deal(2_000, 120, 1))
    long = bet(kind, np.concatenate([now, other]), before, b.deal(2_000, 300, 1))
    assert long[:120] == pytest.approx(short)


def test_a_repeated_test_without_bets_cries_wolf() -> None:
    """Why there are bets at all: the same data, a t-test after every 10 messages at the same level."""
    from scipy.stats import ttest_ind

    alarms = 0
    for run in range(50):
        rng = np.random.default_rng([5, run])
        before, now = values(rng, 1_000), values(rng, 300)
        alarms += any(ttest_ind(now[:n], before, equal_var=False).pvalue < ALPHA for n in range(30, 301, 10))
    assert alarms > 50 * ALPHA * 2


def test_messages_of_which_nothing_is_known_say_nothing() -> None:
    rng = np.random.default_rng(2)
    before, now = meanings(rng, 500), np.full((60, 24), np.nan)
    assert bet("meanings", now, before, b.deal(500, 60, 1)) == pytest.approx(np.zeros(60))
    assert bet("categories", np.full(60, -1), categories(rng, 500), b.deal(500, 60, 1)) == pytest.approx(np.zeros(60))
    assert bet("values", np.full(60, np.nan), values(rng, 500), b.deal(500, 60, 1)) == pytest.approx(np.zeros(60))
