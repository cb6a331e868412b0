"""Heads learn, keep families apart in cross-validation, survive on disk, and choose thresholds on rows they have not seen."""

import numpy as np
import pytest
from small_index import embed

from ai_engineer_track.heads import (
    Examples,
    Head,
    at_sensitivity,
    at_specificity,
    family,
    fitted,
    terms,
    unseen,
)

TEXTS = [f"{animal} {verb} number {n}" for n in range(12) for animal, verb in (("cat", "purrs"), ("dog", "barks"))]


@pytest.fixture
def rows():
    return Examples(
        texts=TEXTS,
        vectors=embed(TEXTS),
        extra=np.zeros((len(TEXTS), 1)),
        labels=np.array([float("cat" in t) for t in TEXTS]),
        groups=[f"g{i // 2 % 6}" for i in range(len(TEXTS))],
        training=np.array([i < 20 for i in range(len(TEXTS))]),
    )


def test_it_learns_and_is_the_same_after_a_round_trip(rows, tmp_path):
    head = Head().fit(rows.part(rows.training))
    head.threshold = 0.3
    path = tmp_path / "head.npz"
    head.save(path)
    again = Head.load(path)
    new = ["a cat purrs", "a dog barks", "", "nothing known here"]
    found = again.probability(new, embed(new), np.zeros((4, 1)))
    assert found[0] > 0.6 > 0.4 > found[1]
    assert np.allclose(found, head.probability(new, embed(new), np.zeros((4, 1))))
    assert again.threshold == 0.3
    assert again.probability([], np.zeros((0, 384)), np.zeros((0, 1))).shape == (0,)


def test_fitted_fits_once_and_again_after_damage(rows, tmp_path):
    calls = []

    def make():
        calls.append(1)
        return rows

    for _ in range(2):
        fitted("x", "key", make, at_specificity(0.9), tmp_path)
    assert len(calls) == 1
    next(tmp_path.glob("x-*.npz")).write_bytes(b"broken")
    fitted("x", "key", make, at_specificity(0.9), tmp_path)
    fitted("x", "other key", make, at_specificity(0.9), tmp_path)
    assert len(calls) == 3


def test_unseen_rows_were_not_in_the_fit(rows):
    """A family with labels turned around is only right by chance when it was not learned from."""
    turned = rows.part(np.ones(len(rows.texts), bool))
    odd = np.array([g == "g0" for g in turned.groups])
    turned.labels[odd] = 1 - turned.labels[odd]
    found = unseen(turned)
    assert np.mean((found[odd] > 0.5) == turned.labels[odd]) < 0.5


def test_thresholds():
    p, y = np.array([0.1, 0.2, 0.3, 0.6, 0.8, 0.9]), np.array([0, 0, 1, 0, 1, 1])
    assert at_sensitivity(1.0)(p, y) == pytest.approx(0.3)
    assert at_sensitivity(0.5)(p, y) == pytest.approx(0.8)
    assert at_specificity(0.5)(p, y) == pytest.approx(0.2)
    assert at_specificity(1.0)(p, y) == pytest.approx(0.6)


def test_terms_and_family():
    assert terms("Can't wait! 3 days") == ["can't", "wait", "!", "3", "days", "can't wait", "wait !", "! 3", "3 days"]
    assert family("em-back-pain-05") == family("case-back-pain-12") == "back-pain"
