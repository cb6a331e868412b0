"""The yardstick is a probability model: it sums to one, learns what repeats, and falls back where it knows nothing."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_engineer_track.ngram import NGram

VOCAB = 7
TEXT = np.array([0, 1, 2, 3, 0, 1, 2, 4, 0, 1, 5, 3, 3, 3, 0, 1, 2, 3, 5, 5, 0, 1, 2, 4])


def probability(model: NGram, history: list[int], token: int) -> float:
    """Of one token after a history: the difference of two sequences."""
    before = model.nats(np.array(history)) if history else 0.0
    return math.exp(before - model.nats(np.array([*history, token])))


@given(st.lists(st.integers(0, VOCAB - 1), max_size=6), st.integers(1, 5))
def test_the_probabilities_of_all_tokens_sum_to_one_after_any_history(history: list[int], order: int) -> None:
    model = NGram(TEXT, VOCAB, order)
    chances = [probability(model, history, token) for token in range(VOCAB)]
    assert sum(chances) == pytest.approx(1.0)
    assert min(chances) > 0  # token 6 was never seen


@given(st.lists(st.integers(0, 30), min_size=6, max_size=60), st.lists(st.integers(0, 30), max_size=5))
def test_they_do_so_whatever_was_learnt_from(text: list[int], history: list[int]) -> None:
    model = NGram(np.array(text), 31, 3)
    assert sum(probability(model, history, token) for token in range(31)) == pytest.approx(1.0)


def test_one_step_of_witten_bell_is_the_published_formula() -> None:
    """After 2 came 3 twice and 4 twice; single tokens fall back to one in VOCAB."""
    seen = Counter(TEXT.tolist())
    single = (seen[3] + len(seen) / VOCAB) / (len(TEXT) + len(seen))
    assert probability(NGram(TEXT, VOCAB, 1), [], 3) == pytest.approx(single)
    assert probability(NGram(TEXT, VOCAB, 2), [2], 3) == pytest.approx((2 + 2 * single) / (4 + 2))
    unseen = (len(seen) / VOCAB) / (len(TEXT) + len(seen))
    assert probability(NGram(TEXT, VOCAB, 2), [2], 6) == pytest.approx(2 * unseen / (4 + 2))


def test_text_that_repeats_itself_is_predicted_better_than_by_single_tokens() -> None:
    rng = np.random.default_rng(0)
    phrase = rng.integers(0, 50, 20)
    text = np.concatenate([phrase] * 30)
    orders = [NGram(text, 50, order).nats(np.tile(phrase, 3)) for order in (1, 2, 5)]
    assert orders[2] < orders[1] < orders[0] / 5


def test_text_without_any_order_is_predicted_no_better_than_by_its_own_entropy() -> None:
    rng = np.random.default_rng(0)
    learnt, other = rng.integers(0, 50, 5_000), rng.integers(0, 50, 2_000)
    assert NGram(learnt, 50).nats(other) / len(other) > math.log(50)


def test_after_a_history_never_seen_a_shorter_one_is_asked() -> None:
    model = NGram(TEXT, VOCAB, 5)
    for token in range(VOCAB):
        # 6 was never seen, so nothing is known after it but how often each token comes.
        assert probability(model, [6], token) == pytest.approx(probability(NGram(TEXT, VOCAB, 1), [], token))
        # 6, 0, 1 was never seen, but 0, 1 was.
        assert probability(model, [6, 0, 1], token) == pytest.approx(probability(NGram(TEXT, VOCAB, 3), [0, 1], token))


def test_a_longer_history_that_was_seen_counts_for_more() -> None:
    model = NGram(TEXT, VOCAB, 5)
    assert probability(model, [0, 1], 2) > probability(model, [6, 1], 2) > probability(model, [6], 2)


def test_a_sequence_shorter_than_the_order_is_read_with_the_histories_it_has() -> None:
    model = NGram(TEXT, VOCAB, 5)
    assert model.nats(np.array([0, 1])) == pytest.approx(NGram(TEXT, VOCAB, 2).nats(np.array([0, 1])))


def test_tokens_may_be_of_any_integer_type() -> None:
    model = NGram(TEXT.astype(np.uint16), VOCAB)
    assert model.nats(TEXT.astype(np.int32)) == NGram(TEXT, VOCAB).nats(TEXT)
