"""Reviews: what people say the right response to a failed answer would have been, and when two of them make a label.

    artifacts/feedback/reviews.jsonl     one opinion a line, only ever appended to
    artifacts/feedback/labels.jsonl      what came of them: `shared/labels.py`

Why an AI engineer has every answer looked at twice: a label becomes a training row, and one tired reviewer must not teach the
model. The first two do not see each other's opinion; when they differ, a third sees both and decides. How far the first two
agree beyond chance (Cohen's kappa) says whether the instructions are clear enough for the labels to be worth anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared import feedback, labels
from shared.feedback import Feedback
from shared.labels import Label, LabelAction
from shared.library import BadRow
from shared.metrics import cohen_kappa
from shared.records import RecordStore, read_records

FILE = "reviews.jsonl"
#: initials or a short name; it says who agreed with whom, and no more
REVIEWER = r"^[a-z][a-z0-9-]{1,19}$"


class Review(BaseModel):
    """One person's opinion: what should have been done, and which sentences answer, in the order they should be quoted.

    `found` are passages that the reviewer had to search for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    answer_id: str = Field(min_length=1, max_length=64)
    reviewer: str = Field(pattern=REVIEWER)
    #: a reviewer has one opinion of an answer
    id: str = Field(default_factory=lambda made: f"{made.get('answer_id')}/{made.get('reviewer')}", max_length=90)
    action: LabelAction
    sentences: list[str] = Field(default=[], max_length=20)
    found: list[str] = Field(default=[], max_length=20)
    time: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.action == "answer") != bool(self.sentences):
            raise ValueError("an answer needs sentences, and nothing else may have any")
        if len(set(self.sentences)) < len(self.sentences):
            raise ValueError("a sentence is there twice")
        return self

    def agrees(self, other: Review) -> bool:
        """The same response: the order of the sentences is a matter of taste."""
        return self.action == other.action and set(self.sentences) == set(other.sentences)


class ReviewStore(RecordStore[Review]):
    """Appends to the reviews of a folder. Several threads and processes may do so at once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / FILE, Review)


def read(folder: Path) -> tuple[list[Review], list[BadRow]]:
    return read_records(folder / FILE, Review)


class Failed(BaseModel):
    """An answer that was found wanting, for all its reasons, with the opinions about it so far, oldest first."""

    records: list[Feedback]
    reviews: list[Review] = []
    labelled: bool = False

    @property
    def record(self) -> Feedback:
        return self.records[0]

    @property
    def weight(self) -> int:
        """What to look at first: what people disliked, then what the service noticed, last a judge that is not trusted."""
        order = ("thumbs_down", "withheld", "clarify_failed", "low_confidence", "judge_failed")
        counted = [order.index(r.kind) for r in self.records if r.kind != "judge_failed" or r.judge_trusted]
        return min(counted, default=len(order))

    def open_to(self, reviewer: str) -> bool:
        return not self.labelled and reviewer not in {review.reviewer for review in self.reviews}

    def decided(self) -> Label | None:
        """The label, when the first two agree or a third has decided."""
        opinions = self.reviews
        if len(opinions) < 2:
            return None
        agreed = opinions[0].agrees(opinions[1])
        if not agreed and len(opinions) < 3:
            return None
        chosen = opinions[0] if agreed else opinions[2]
        heard = opinions[:2] if agreed else opinions[:3]
        found = [passage for review in heard for passage in review.found]
        needed = [sentence.rsplit("/", 1)[0] for sentence in chosen.sentences]
        return Label(
            answer_id=self.record.answer_id,
            question=self.record.opening or self.record.question,
            passages=list(dict.fromkeys([*self.record.passages, *needed, *found])),
            action=chosen.action,
            answer_sentences=chosen.sentences,
            reviewers=[review.reviewer for review in heard],
            agreed=agreed,
            model_version=self.record.model_version,
        )


def failed_answers(folder: Path) -> list[Failed]:
    """Every answer of the feedback that something was wrong with, oldest first. Lines that cannot be read are passed over."""
    found: dict[str, Failed] = {}
    for record in feedback.read(folder)[0]:
        if record.kind != "thumbs_up":
            found.setdefault(record.answer_id, Failed(records=[])).records.append(record)
    for review in read(folder)[0]:
        if review.answer_id in found:
            found[review.answer_id].reviews.append(review)
    for label in labels.read(folder)[0]:
        if label.answer_id in found:
            found[label.answer_id].labelled = True
    return list(found.values())


def next_for(reviewer: str, failed: Sequence[Failed]) -> Failed | None:
    """What this person should look at: answers others began on first, so that opinions become labels; then by weight."""
    waiting = [answer for answer in failed if answer.open_to(reviewer)]
    return min(waiting, key=lambda answer: (-len(answer.reviews), answer.weight), default=None)


class Agreement(BaseModel):
    """How far the first two reviewers agree. Kappa is None below two answers that both have looked at.

    `sentences` is the kappa of marking, over the sentences of the passages in front of both, where both said `answer`.
    """

    model_config = ConfigDict(extra="forbid")
    answers: int
    same: int
    action: float | None
    sentences: float | None


def agreement(failed: Sequence[Failed], sentences_of: dict[str, list[str]]) -> Agreement:
    """`sentences_of` has the sentence ids of each passage."""
    pairs = [answer for answer in failed if len(answer.reviews) >= 2]
    actions: list[tuple[Any, Any]] = [(a.reviews[0].action, a.reviews[1].action) for a in pairs]
    marks: list[tuple[Any, Any]] = []
    for answer in pairs:
        first, second = answer.reviews[:2]
        if first.action == second.action == "answer":
            shown = [s for passage in answer.record.passages for s in sentences_of.get(passage, [])]
            marks += [
                (s in first.sentences, s in second.sentences)
                for s in dict.fromkeys([*shown, *first.sentences, *second.sentences])
            ]
    return Agreement(
        answers=len(pairs),
        same=sum(a.reviews[0].agrees(a.reviews[1]) for a in pairs),
        action=_kappa(actions),
        sentences=_kappa(marks) if marks else None,
    )


def _kappa(pairs: list[tuple[Any, Any]]) -> float | None:
    """None where it is not defined: fewer than two pairs, or both always say one and the same."""
    if len(pairs) < 2 or len({label for pair in pairs for label in pair}) < 2:
        return None
    return round(cohen_kappa(pairs), 3)
