"""Opinions become a label when two agree or a third decides; what is worst is looked at first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ai_engineer_track.reviews import Failed, Review, ReviewStore, agreement, failed_answers, next_for
from shared.feedback import Feedback, FeedbackStore, TurnSummary
from shared.labels import LabelStore


def record(answer_id: str = "a-1", kind: str = "thumbs_down", **fields: Any) -> Feedback:
    values: dict[str, Any] = {
        "question": "What helps?",
        "turn": TurnSummary(kind="answer", text="[1] Rest."),
        "passages": ["migraine/self-care"],
        "model_version": "m-1:q4_0",
        "index_version": "i-1",
        "prompt_version": 1,
        **fields,
    }
    return Feedback(answer_id=answer_id, kind=kind, **values)  # type: ignore[arg-type]


def review(reviewer: str, action: str = "answer", *sentences: str, answer_id: str = "a-1", **fields: Any) -> Review:
    return Review(answer_id=answer_id, reviewer=reviewer, action=action, sentences=list(sentences), **fields)  # type: ignore[arg-type]


ONE, TWO = "migraine/self-care/1", "migraine/self-care/2"


def decided(*reviews: Review, **fields: Any) -> Any:
    return Failed(records=[record(**fields)], reviews=list(reviews)).decided()


def test_two_who_agree_make_a_label_whatever_order_they_marked_in() -> None:
    label = decided(review("ab", "answer", TWO, ONE), review("cd", "answer", ONE, TWO))
    assert label.agreed
    assert label.answer_sentences == [TWO, ONE]
    assert label.reviewers == ["ab", "cd"]
    assert (label.question, label.passages, label.model_version) == ("What helps?", ["migraine/self-care"], "m-1:q4_0")


def test_one_opinion_or_two_that_differ_make_none_and_a_third_decides() -> None:
    differ = [review("ab", "answer", ONE), review("cd", "escalate")]
    assert decided(differ[0]) is None
    assert decided(*differ) is None
    label = decided(*differ, review("ef", "not_answered"))
    assert (label.action, label.agreed, label.reviewers) == ("not_answered", False, ["ab", "cd", "ef"])


def test_a_label_asks_what_began_the_problem_and_holds_what_was_searched_for() -> None:
    found = "stroke/emergency/1"
    opinions = [review(name, "answer", found, found=["stroke/emergency"]) for name in ("ab", "cd")]
    label = decided(*opinions, question="yes", opening="Half of my face droops")
    assert label.question == "Half of my face droops"
    assert label.passages == ["migraine/self-care", "stroke/emergency"]


def test_what_people_disliked_comes_first_and_an_untrusted_judge_last() -> None:
    judged = Failed(records=[record("a-1", "judge_failed", judge_trusted=False)])
    trusted = Failed(records=[record("a-2", "judge_failed", judge_trusted=True)])
    withheld = Failed(records=[record("a-3", "judge_failed"), record("a-3", "withheld")])
    disliked = Failed(records=[record("a-4")])
    order = sorted([judged, trusted, withheld, disliked], key=lambda answer: answer.weight)
    assert order == [disliked, withheld, trusted, judged]
    begun = Failed(records=[record("a-5", "judge_failed")], reviews=[review("ab", "decline", answer_id="a-5")])
    assert next_for("cd", [disliked, begun]) is begun  # an opinion alone is no label
    assert next_for("ab", [disliked, begun]) is disliked
    assert next_for("ab", [begun]) is None


def test_failed_answers_are_put_together_from_the_files(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path)
    for one in (record("a-1"), record("a-1", "judge_failed"), record("a-2", "thumbs_up"), record("a-3", "withheld")):
        store.add(one)
    assert ReviewStore(tmp_path).add(review("ab", "answer", ONE))
    assert not ReviewStore(tmp_path).add(review("ab", "decline"))  # one opinion a person
    ReviewStore(tmp_path).add(review("ab", "decline", answer_id="a-unknown"))
    LabelStore(tmp_path).add(decided(*(review(name, "answer", ONE, answer_id="a-3") for name in ("ab", "cd")), answer_id="a-3"))
    first, third = failed_answers(tmp_path)
    assert ([r.kind for r in first.records], len(first.reviews), first.labelled) == (["thumbs_down", "judge_failed"], 1, False)
    assert third.labelled
    assert not third.open_to("xy")


def test_agreement_counts_the_first_two_and_is_unknown_without_a_choice() -> None:
    sentences = {"migraine/self-care": [ONE, TWO]}
    same = Failed(records=[record()], reviews=[review("ab", "answer", ONE), review("cd", "answer", ONE), review("ef", "decline")])
    assert agreement([same], sentences).action is None
    other = Failed(records=[record("a-2")], reviews=[review("ab", "decline"), review("cd", "decline")])
    found = agreement([same, other, Failed(records=[record("a-3")])], sentences)
    assert (found.answers, found.same, found.action, found.sentences) == (2, 2, 1.0, 1.0)
    apart = Failed(records=[record("a-4")], reviews=[review("ab", "decline"), review("cd", "escalate")])
    assert 0 < agreement([same, other, apart], sentences).action < 1  # type: ignore[operator]


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "answer", "sentences": []},
        {"action": "decline", "sentences": [ONE]},
        {"sentences": [ONE, ONE]},
        {"reviewer": "A B"},
        {"reviewer": "ann@example.com"},
        {"action": "unavailable"},
    ],
)
def test_an_opinion_that_cannot_be_learnt_from_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Review.model_validate({"answer_id": "a-1", "reviewer": "ab", "action": "answer", "sentences": [ONE], **fields})
