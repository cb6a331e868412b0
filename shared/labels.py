"""Labels: what reviewers say the right answer would have been, ready to become training rows with their provenance.

    artifacts/feedback/labels.jsonl      one label an answer, only ever appended to

A label is written once, when two reviewers said the same or a third decided between them. It names the answer it corrects, so
the feedback record of that answer tells how it came about.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.feedback import FOLDER, Scrubbed
from shared.files import sha256_text
from shared.library import BadRow
from shared.records import RecordStore, read_records

FILE = "labels.jsonl"
#: what should have been done: the prompt contract's actions, and `not_answered` for its NOT_ANSWERED
LabelAction = Literal["answer", "clarify", "escalate", "decline", "not_answered"]


class Label(BaseModel):
    """The right response to `question`, given these passages. `model_version` (`<published version>:<variant>`) is the
    model whose answer was corrected.

    `answer_sentences` are the ids of the sentences that answer, in their order; there are some exactly when `action` is
    `answer`. `agreed`: the first two reviewers said the same. False: they did not, and the last of `reviewers` decided.
    Either way the label counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    answer_id: str = Field(min_length=1, max_length=64)
    #: an answer has one label
    id: str = Field(default_factory=lambda made: _label_id(made), max_length=64)
    question: Scrubbed = Field(min_length=1, max_length=20_000)
    passages: list[str]
    action: LabelAction
    answer_sentences: list[str] = []
    reviewers: list[str] = Field(min_length=2)
    agreed: bool
    time: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    model_version: str

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.action == "answer") != bool(self.answer_sentences):
            raise ValueError("an answer needs sentences, and nothing else may have any")
        if len(set(self.answer_sentences)) < len(self.answer_sentences):
            raise ValueError("a sentence is there twice")
        if len(set(self.reviewers)) < len(self.reviewers):
            raise ValueError("a reviewer is there twice")
        return self


class LabelStore(RecordStore[Label]):
    """Appends to the labels of a folder. Several threads and processes may do so at once."""

    def __init__(self, folder: Path = FOLDER) -> None:
        super().__init__(folder / FILE, Label)


def read(folder: Path = FOLDER) -> tuple[list[Label], list[BadRow]]:
    """All labels in the order they were written, each once, and the lines that are none. No file: two empty lists."""
    return read_records(folder / FILE, Label)


def _label_id(made: dict[str, Any]) -> str:
    return "l-" + sha256_text(str(made.get("answer_id")))[:16]
