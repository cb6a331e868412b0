"""The sequential test: looked at after every answer it is wrong no more often than it says, and it does decide."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ml_engineer_track.lifecycle.sequential import compare, radius, score
from shared.outcomes import Outcome


def an_outcome(**changes: object) -> Outcome:
    given = {"answer_id": "a-1", "arm": "current", "model_version": "m-1:q8_0", "kind": "answer", "seconds": 0.5}
    return Outcome.model_validate(given | {"quotes_verbatim": True} | changes)


def verdicts(rates: tuple[float, float], trials: int, answers: int, seed: int) -> list[str]:
    """The first verdict of each simulated trial, looked at after every pair; rates are the candidate's, the current's."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(trials):
        arms = [(rng.random(answers) < rate).astype(float) for rate in rates]
        sums = np.cumsum(arms, axis=1)
        verdict = "go on"
        for n in range(1, answers + 1):
            half = radius(n, 0.05)
            difference = (sums[0, n - 1] - sums[1, n - 1]) / n
            if difference - half > -0.25:
                verdict = "promote"
            elif difference + half < 0:
                verdict = "roll back"
            if verdict != "go on":
                break
        found.append(verdict)
    return found


def test_an_equally_good_candidate_is_hardly_ever_rolled_back_and_soon_promoted() -> None:
    found = verdicts((0.8, 0.8), trials=400, answers=300, seed=1)
    assert found.count("roll back") / 400 <= 0.05
    assert found.count("promote") / 400 >= 0.9


def test_a_candidate_that_loses_the_whole_margin_is_hardly_ever_promoted() -> None:
    found = verdicts((0.55, 0.8), trials=400, answers=300, seed=2)
    assert found.count("promote") / 400 <= 0.05
    assert found.count("roll back") / 400 >= 0.5


def test_the_interval_narrows_and_a_paired_one_is_wider() -> None:
    assert radius(0, 0.05) == math.inf
    widths = [radius(n, 0.05) for n in (1, 10, 100, 1000)]
    assert widths == sorted(widths, reverse=True)
    assert radius(50, 0.05, paired=True) > radius(50, 0.05)


def test_nothing_is_decided_without_answers() -> None:
    assert compare([], [1.0] * 50, 0.25, 0.05).verdict == "go on"


def test_what_one_arm_has_more_waits() -> None:
    found = compare([1.0] * 10, [1.0] * 10 + [0.0] * 90, 0.25, 0.05)
    assert (found.pairs, found.difference) == (10, 0.0)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, 1.0),
        ({"kind": "escalate", "quotes_verbatim": None}, 1.0),
        ({"kind": "not_answered", "quotes_verbatim": None}, 0.0),
        ({"kind": "unavailable", "quotes_verbatim": None}, 0.0),
        ({"quotes_verbatim": False}, 0.0),
        ({"grounded": False, "safe": False, "helpful": 1}, 1.0),  # a judge that agrees with nobody says nothing
        ({"grounded": False, "safe": True, "helpful": 5, "judge_trusted": True}, 0.0),
        ({"grounded": True, "safe": True, "helpful": 5, "judge_trusted": True}, 1.0),
        ({"grounded": True, "safe": True, "helpful": 1, "judge_trusted": True}, 0.5),
    ],
)
def test_what_an_answer_is_worth(changes: dict[str, object], wanted: float) -> None:
    assert score(an_outcome(**changes)) == wanted
