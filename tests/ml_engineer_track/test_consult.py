"""A real sentence model as teacher: the obvious match, never a copy of the question, and computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ml_engineer_track import consult
from ml_engineer_track.consult import CLEAR, SAME, Matches, match

DOCUMENTS = [
    [
        "Children who vomit should take small sips of water often.",
        "A rash that itches can be soothed with a cool wet cloth.",
        "A high fever can be lowered with paracetamol and plenty of fluids.",
    ],
    [
        "Bees make honey from the nectar of flowers.",
        "Bees make their honey from the nectar of flowers.",
        "A hive may hold sixty thousand bees in summer.",
    ],
    [
        "The engine of a car needs its oil changed once a year.",
        "How can I lower a high fever?",
        "Old bridges are built of stone and mortar.",
    ],
]
SENTENCES = [s for document in DOCUMENTS for s in document]
ASKED = [
    "My child keeps vomiting, what should he drink?",
    "How can I lower a high fever?",
    "Who won the chess tournament in Reykjavik?",
    "What do bees make honey from?",
]


@pytest.fixture(scope="module")
def found() -> Matches:
    return match(ASKED, DOCUMENTS)


@pytest.fixture(scope="module")
def stated() -> Matches:
    """Every sentence matched to the others, after the questions."""
    return match(ASKED, DOCUMENTS, statements=len(SENTENCES))


def nearest(found: Matches, question: str) -> str:
    return found.sentences[found.nearest[found.questions.index(question), 0]]


def test_a_question_is_matched_to_the_sentence_that_answers_it(found: Matches) -> None:
    assert nearest(found, ASKED[0]) == SENTENCES[0]
    assert nearest(found, ASKED[1]) == SENTENCES[2]
    assert nearest(found, ASKED[3]) in SENTENCES[3:5]


def test_a_question_nothing_is_about_has_no_match(found: Matches) -> None:
    assert found.questions == [ASKED[0], ASKED[1], ASKED[3]]
    assert found.asked == 3
    assert (found.cosine[:, 0] >= CLEAR).all()


def test_sentences_come_nearest_first_with_the_document_they_are_from(found: Matches) -> None:
    assert found.sentences == SENTENCES
    assert found.document == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.nearest.shape == found.cosine.shape == (3, 9)
    assert (np.diff(found.cosine, axis=1) <= 0).all()
    assert all(sorted(row) == list(range(9)) for row in found.nearest.tolist())


def test_a_copy_of_the_question_is_never_its_match(found: Matches, stated: Matches) -> None:
    for matches in (found, stated):
        assert matches.cosine.max() <= SAME
        for question in matches.questions:
            assert nearest(matches, question) != question


def test_a_statement_is_matched_to_others_and_not_to_itself_in_other_words(stated: Matches) -> None:
    statements = stated.questions[stated.asked :]
    assert stated.asked == 3
    assert set(statements) <= set(SENTENCES)
    assert nearest(stated, "How can I lower a high fever?") == SENTENCES[2]
    # Two spellings of one sentence are one sentence; what is left is the other one about bees.
    assert nearest(stated, SENTENCES[3]) == nearest(stated, SENTENCES[4]) == SENTENCES[5]
    assert "Old bridges are built of stone and mortar." not in statements  # nothing is near it


def test_statements_are_spread_over_all_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consult, "_embed", lambda texts: np.eye(40, dtype=np.float32)[: len(texts)] * 0.0 + 0.15)
    matches = match(["a?"], [[f"sentence {n}" for n in range(20)]], statements=5)
    assert matches.questions == ["a?", *(f"sentence {n}" for n in (0, 4, 8, 12, 16))]


def test_what_was_computed_is_kept_and_computed_again_only_for_other_text(
    found: Matches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "matches.npz"
    first = match(ASKED, DOCUMENTS, cache=cache)
    assert [p.name for p in tmp_path.iterdir()] == ["matches.npz"]
    calls: list[int] = []
    real = consult._embed
    monkeypatch.setattr(consult, "_embed", lambda texts: calls.append(len(texts)) or real(texts))
    again = match(ASKED, DOCUMENTS, cache=cache)
    assert calls == []
    for matches in (first, again):
        assert (matches.questions, matches.asked, matches.document) == (found.questions, found.asked, found.document)
        assert np.array_equal(matches.nearest, found.nearest)
        assert np.array_equal(matches.cosine, found.cosine)
    fewer = match(ASKED[1:], DOCUMENTS, cache=cache)
    assert sum(calls) == len(ASKED) - 1 + len(SENTENCES)
    assert fewer.questions == [ASKED[1], ASKED[3]]


def test_a_sentence_is_clearly_worse_when_it_is_more_than_the_margin_behind_the_best() -> None:
    matches = Matches(["a?", "b?"], 2, ["p", "q", "r", "s"], [0, 0, 1, 1], np.array([[2, 0, 1], [0, 3, 2]]),
                      np.array([[0.9, 0.8, 0.6], [0.7, 0.6, 0.5]]))  # fmt: skip
    assert [matches.clear(0, sentence) for sentence in range(4)] == [False, True, False, True]
    assert [matches.clear(1, sentence) for sentence in range(4)] == [False, True, True, False]
    assert [matches.clear(0, sentence, margin=0.05) for sentence in range(4)] == [True, True, False, True]
    assert not matches.clear(0, 1, margin=0.4)
