"""Scores and their intervals: worked examples, and what holds for any input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.metrics import (
    Estimate,
    cohen_kappa,
    estimate,
    estimate_difference,
    estimate_mean,
    estimate_ratio,
    percentiles,
    set_f1,
)

SETS = st.frozensets(st.integers(0, 9)).map(set)
SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=40)
RATINGS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=40)


# --- set F1 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "gold", "f1"),
    [
        (set(), set(), 1.0),
        ({1}, set(), 0.0),
        (set(), {1}, 0.0),
        ({1}, {2}, 0.0),
        ({1, 2}, {1, 2}, 1.0),
        ({1, 2, 3}, {3, 4}, 0.4),  # precision 1/3, recall 1/2
    ],
)
def test_f1_of_worked_examples(predicted: set[int], gold: set[int], f1: float) -> None:
    assert set_f1(predicted, gold) == pytest.approx(f1)


@given(SETS, SETS)
def test_f1_is_symmetric_and_1_only_for_equal_sets(one: set[int], other: set[int]) -> None:
    assert 0.0 <= set_f1(one, other) <= 1.0
    assert set_f1(one, other) == set_f1(other, one)
    assert (set_f1(one, other) == 1.0) == (one == other)


# --- Cohen's kappa ---------------------------------------------------------------------------------------------------


def test_kappa_of_a_worked_example() -> None:
    """50 grants: both say yes 20 times, both no 15 times; 0.70 observed, 0.50 by chance."""
    pairs = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    assert cohen_kappa(pairs) == pytest.approx(0.4)


def test_quadratic_kappa_of_a_worked_example() -> None:
    """Squared distances: 1 observed, 20 / 4 = 5 by chance."""
    assert cohen_kappa([(1, 1), (2, 2), (3, 3), (1, 2)], "quadratic") == pytest.approx(0.8)


def test_quadratic_weights_forgive_a_near_miss_more_than_a_far_one() -> None:
    near, far = [(1, 1), (3, 3), (5, 5), (1, 2)], [(1, 1), (3, 3), (5, 5), (1, 5)]
    assert cohen_kappa(near, "quadratic") > cohen_kappa(far, "quadratic")


def test_quadratic_weights_use_the_distance_of_labels_not_their_rank() -> None:
    """With 1, 2 and 5 in use, 2 and 5 are three steps apart although they are neighbours in the list."""
    pairs = [(1, 1), (2, 2), (5, 5)]
    assert cohen_kappa([*pairs, (1, 2)], "quadratic") > cohen_kappa([*pairs, (2, 5)], "quadratic")


@pytest.mark.parametrize("weights", ["none", "quadratic"])
def test_raters_who_always_disagree_about_two_labels_are_below_chance(weights: str) -> None:
    assert cohen_kappa([(0, 1), (1, 0)], weights) == pytest.approx(-1.0)


@pytest.mark.parametrize("pairs", [[], [(1, 1)], [(True, True)] * 5, [(1, 1), (1, 2), (1, 3)]])
@pytest.mark.parametrize("weights", ["none", "quadratic"])
def test_kappa_is_0_when_chance_explains_everything(pairs: list[tuple[int, int]], weights: str) -> None:
    assert cohen_kappa(pairs, weights) == pytest.approx(0.0)


@given(
    st.lists(st.integers(1, 5), min_size=2).filter(lambda labels: len(set(labels)) > 1), st.sampled_from(["none", "quadratic"])
)
def test_perfect_agreement_has_kappa_1(labels: list[int], weights: str) -> None:
    assert cohen_kappa([(label, label) for label in labels], weights) == 1.0


@given(RATINGS, st.sampled_from(["none", "quadratic"]))
def test_kappa_is_at_most_1_and_the_same_with_the_raters_swapped(pairs: list[tuple[int, int]], weights: str) -> None:
    kappa = cohen_kappa(pairs, weights)
    assert kappa <= 1.0
    assert cohen_kappa([(b, a) for a, b in pairs], weights) == pytest.approx(kappa)


# --- intervals -------------------------------------------------------------------------------------------------------


@given(SCORES, st.integers(0, 2**32))
def test_the_interval_contains_the_mean(scores: list[float], seed: int) -> None:
    found = estimate_mean(scores, resamples=200, seed=seed)
    assert found.value == pytest.approx(sum(scores) / len(scores))
    assert found.low - 1e-12 <= found.value <= found.high + 1e-12
    assert found.n == len(scores)


@given(SCORES)
def test_the_same_seed_gives_the_same_figures(scores: list[float]) -> None:
    assert estimate_mean(scores, resamples=50, seed=1) == estimate_mean(scores, resamples=50, seed=1)


def test_another_seed_gives_another_interval() -> None:
    scores = np.linspace(0, 1, 30).tolist()
    assert estimate_mean(scores, resamples=100, seed=1) != estimate_mean(scores, resamples=100, seed=2)


def test_the_mean_by_either_function_is_the_same() -> None:
    scores = np.linspace(0, 1, 30).tolist()
    one, other = estimate_mean(scores, resamples=100, seed=3), estimate(scores, np.mean, resamples=100, seed=3)
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high))


def test_a_statistic_is_computed_on_whole_rows() -> None:
    """The difference of paired scores never varies here, so its interval has no width, though both scores vary."""
    rows = [(n / 10, n / 10 + 0.5) for n in range(10)]
    found = estimate(rows, lambda picked: float(np.mean([b - a for a, b in picked])), resamples=100, seed=0)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_more_rows_make_the_interval_narrower() -> None:
    few, many = ([0.0, 1.0] * n for n in (5, 500))
    width = [found.high - found.low for found in (estimate_mean(rows, resamples=500, seed=0) for rows in (few, many))]
    assert width[1] < width[0] / 5


def test_about_95_of_100_intervals_contain_the_true_mean() -> None:
    samples = np.random.default_rng(0).normal(loc=3.0, size=(400, 60))
    hits = [e.low <= 3.0 <= e.high for e in (estimate_mean(s, resamples=300, seed=i) for i, s in enumerate(samples))]
    assert 0.91 <= np.mean(hits) <= 0.98


def test_no_rows_give_no_figure_instead_of_a_zero() -> None:
    for found in (estimate_mean([], resamples=10, seed=0), estimate([], len, resamples=10, seed=0)):
        assert (found.value, found.low, found.high, found.n) == (None, None, None, 0)
        assert str(found) == "-"


def test_an_estimate_is_printed_with_its_interval() -> None:
    assert str(estimate_mean([0.5] * 4, resamples=10, seed=0)) == "0.500 [0.500, 0.500]"


def test_an_estimate_without_an_interval_is_printed_as_its_value() -> None:
    """A perplexity is one figure of all rows together."""
    assert str(Estimate(value=12.3456, low=None, high=None, n=9)) == "12.346"


# --- percentiles -----------------------------------------------------------------------------------------------------


def test_percentiles_of_a_worked_example_in_any_order() -> None:
    assert percentiles(range(100, -1, -1)) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([1, 2]) == pytest.approx({"p50": 1.5, "p90": 1.9, "p99": 1.99})
    assert percentiles([7]) == {"p50": 7.0, "p90": 7.0, "p99": 7.0}


def test_percentiles_of_no_values_are_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentiles([])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_percentiles_rise_and_stay_within_the_values(values: list[float]) -> None:
    found = percentiles(values)
    assert list(found) == ["p50", "p90", "p99"]
    assert min(values) <= found["p50"] <= found["p90"] <= found["p99"] <= max(values)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=60), st.floats(0.1, 3))
def test_a_ratio_of_rows_that_are_all_so_many_times_the_other_has_no_width(theirs: list[float], factor: float) -> None:
    """Pairs are resampled together: however the rows vary, a constant factor between them is certain."""
    found = estimate_ratio([factor * value for value in theirs], theirs, 200, 7)
    assert [found.low, found.value, found.high] == pytest.approx([factor] * 3)
    assert found.n == len(theirs)


def test_a_ratio_is_of_means_and_its_interval_of_pairs() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.integers(0, 2, 400).astype(float)
    ours = np.where(rng.random(400) < 0.05, 0.0, theirs)  # the other side's failures, and a few of its own
    found = estimate_ratio(list(ours), list(theirs), 1000, 7)
    assert found.value == pytest.approx(ours.mean() / theirs.mean())
    assert found.low is not None
    assert found.high is not None
    alone = estimate_mean(list(ours), 1000, 7)
    assert alone.low is not None
    assert alone.high is not None
    assert found.low < found.value < found.high <= 1
    assert found.high - found.low < 0.5 * (alone.high - alone.low) / theirs.mean()  # what is hard for both does not count


def test_a_difference_is_of_pairs() -> None:
    found = estimate_difference([0.5, 1.0, 0.0], [0.25, 0.75, -0.25], 200, 7)
    assert [found.low, found.value, found.high, found.n] == pytest.approx([0.25, 0.25, 0.25, 3])
    assert estimate_difference([1.0, 0.0], [0.0, 1.0], 200, 7).low == -1


def test_without_pairs_there_is_neither() -> None:
    assert estimate_ratio([], [], 100, 7).value is None
    assert estimate_ratio([1.0], [0.0], 100, 7).value is None
    assert estimate_difference([], [], 100, 7).value is None
    for compare in (estimate_ratio, estimate_difference):
        with pytest.raises(ValueError, match="zip"):
            compare([1.0], [1.0, 1.0], 100, 7)
