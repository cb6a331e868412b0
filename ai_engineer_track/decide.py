"""Two decisions before an answer is written: ask back first? and: does the library answer this at all?

Why an AI engineer learns these from data: "several leaflets fit" and "none fits" are what retrieval scores say, but where to
draw the line is not. Both heads see what the message means, its words, and how well the library covers it
(`evidence.py`); both thresholds are chosen for how seldom they may be wrong about a clear, answerable message.
Without fitting data (another corpus) plain rules on the same features stand in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ai_engineer_track.evidence import Evidence
from ai_engineer_track.harm import question_sample, text_of
from ai_engineer_track.heads import Array, Embed, Examples, Head, at_specificity, family, file_key, fitted
from ai_engineer_track.settings import AiSettings
from shared import library as lib
from shared.metrics import Estimate, estimate_mean

CLEAR = 0.96  # share of clear messages that must not be asked back
STRENGTH, MEANING = 10.0, 0.7  # of the head that asks back, by cross-validation
ANSWERED = 0.94  # share of answerable questions that must not be refused
NEAR = 0.45  # other corpora: cosine of the best passage below which it does not answer
CLOSE = 0.02  # other corpora: lead of the best document below which two fit


class Decider:
    """`ask_back` and `refusal` are probabilities; the two `needs_...` compare them with their thresholds."""

    def __init__(self, settings: AiSettings, evidence: Evidence, embed: Embed) -> None:
        self.evidence = evidence
        self.ask_head: Head | None = None
        self.refuse_head: Head | None = None
        if settings.corpus is not None:
            return  # the rows of datasets/ speak about its own library
        data = settings.datasets
        key = file_key(data / "cases.jsonl", data / "questions.jsonl", index=evidence.index.version, version=1)
        folder = settings.artifacts / "heads"
        self.ask_head = fitted(
            "ask", key, lambda: ask_examples(settings, evidence, embed), at_specificity(CLEAR), folder, STRENGTH, MEANING
        )
        self.refuse_head = fitted(
            "refuse", key, lambda: refuse_examples(settings, evidence, embed), at_specificity(ANSWERED), folder
        )

    def ask_back(self, message: str, vector: Array) -> float:
        features = self.evidence.features([message], vector[None])
        if self.ask_head is None:
            return float(features[0, 4] < CLOSE)
        return float(self.ask_head.probability([message], vector[None], features)[0])

    def refusal(self, message: str, vector: Array) -> float:
        features = self.evidence.features([message], vector[None])
        if self.refuse_head is None:
            return float(features[0, 0] < NEAR)
        return float(self.refuse_head.probability([message], vector[None], features)[0])

    def needs_question(self, message: str, vector: Array) -> bool:
        return self.ask_back(message, vector) >= (self.ask_head.threshold if self.ask_head else 0.5)

    def needs_refusal(self, message: str, vector: Array) -> bool:
        return self.refusal(message, vector) >= self.refusal_threshold

    @property
    def refusal_threshold(self) -> float:
        return self.refuse_head.threshold if self.refuse_head else 0.5


def ask_examples(settings: AiSettings, evidence: Evidence, embed: Embed) -> Examples:
    """Openings of cases, and answerable questions, which need no question back."""
    cases = [c for c in lib.read_rows(settings.datasets, "cases.jsonl", lib.Case)[0] if c.split != "test"]
    questions = question_sample(settings)
    return _examples([*cases, *questions], [c.needs_question for c in cases] + [False] * len(questions), evidence, embed)


def refuse_examples(settings: AiSettings, evidence: Evidence, embed: Embed) -> Examples:
    """Questions the library does not answer, and the sample of those it does."""
    questions = lib.read_rows(settings.datasets, "questions.jsonl", lib.Question)[0]
    rows = [q for q in questions if q.split != "test" and not q.answerable] + question_sample(settings)
    return _examples(rows, [not q.answerable for q in rows], evidence, embed)


def measure_decisions(
    decider: Decider, settings: AiSettings, embed: Embed, split: lib.Split, seed: int = 7
) -> dict[str, Estimate]:
    """Correct refusal, answer rate, and questions back on questions that need none, by the heads alone."""
    questions = [q for q in lib.read_rows(settings.datasets, "questions.jsonl", lib.Question)[0] if q.split == split]
    rows = list(zip(questions, embed([q.question for q in questions]), strict=True))
    refused = [(q.answerable, decider.needs_refusal(q.question, v)) for q, v in rows]
    asked = [decider.needs_question(q.question, v) for q, v in rows if q.answerable]

    def mean(values: Sequence[bool]) -> Estimate:
        return estimate_mean([float(v) for v in values], 1000, seed)

    return {
        "correct_refusal": mean([r for answerable, r in refused if not answerable]),
        "answer_rate": mean([not r for answerable, r in refused if answerable]),
        "needless_questions": mean(asked),
    }


def _examples(rows: Sequence[Any], labels: Sequence[bool], evidence: Evidence, embed: Embed) -> Examples:
    texts = [text_of(row) for row in rows]
    vectors = embed(texts)
    return Examples(
        texts=texts,
        vectors=vectors,
        extra=evidence.features(texts, vectors),
        labels=np.array([float(label) for label in labels]),
        groups=[family(row.id) for row in rows],
        training=np.array([row.split == "train" for row in rows]),
    )
