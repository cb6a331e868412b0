"""Emergencies first: before anything is looked up, is this a matter for the emergency number?

Why an AI engineer spends the most care here: a miss is the worst error the product can make, a false alarm an annoyance. So
several voters look at a message, and one is enough: two learned heads (with and without the hand-written flags, averaged,
so that neither the words of the training rows nor the list of flags is trusted alone) and the deterministic floor. The leaflets'
emergency sign nearest in meaning is what the answer cites.

No one threshold of these heads finds nearly every emergency and lets nearly everything else pass. So there are two: above the
upper one the person is told to call for help, and nothing else; above the lower one they get an answer, with a warning over it
that names the sign to watch for.

    python -m ai_engineer_track triage "..."      what every voter says about a message
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from ai_engineer_track import red_flags
from ai_engineer_track.harm import question_sample, text_of
from ai_engineer_track.heads import Array, Embed, Examples, at_sensitivity, at_specificity, family, file_key, fitted, unseen
from ai_engineer_track.settings import AiSettings
from shared import chat
from shared import library as lib
from shared.metrics import Estimate, estimate_mean

# On messages no fit had seen; the thresholds of the averaged heads follow from these.
LET_THROUGH = 0.85  # share of near misses that are not sent to the emergency number
HARMLESS_THROUGH = 0.9  # the same for everything that is no emergency
FOUND = 0.98  # share of emergencies that are sent there, or at least warned
QUESTION_STEP = 2  # every so many-th of `question_sample` stands for the harmless messages
HARMLESS_WEIGHT = (
    0.7  # of questions, vague openings and harmful requests, beside 1 for a message written for triage: they are many
)
STRENGTH, MEANING = 3.0, 0.5  # by cross-validation; here it matters more how something is said than what it is about
MIN_SIGN_COSINE = 0.3  # below this no sign of the library is about the same thing, and none is cited


class Triage(BaseModel):
    """The vote. `sign` is the id of the emergency sign nearest in meaning, `rule` the rule of the floor that applied.

    `warning`: no emergency as far as can be told, and too near to one to say nothing.
    """

    model_config = ConfigDict(frozen=True)
    emergency: bool
    warning: bool
    probability: float
    threshold: float
    rule: str | None = None
    alarms: list[str] = []
    sign: str | None = None
    sign_cosine: float = 0.0

    def votes(self) -> dict[str, str]:
        """The voters in words, for the trace."""
        return {
            "learned heads": f"{self.probability:.2f} ({'yes' if self.probability >= self.threshold else 'no'})",
            "floor": self.rule or "no",
            "alarms": ", ".join(self.alarms) or "none",
            "nearest sign": f"{self.sign} ({self.sign_cosine:.2f})" if self.sign else "none",
        }


class TriageNurse:
    """`signs` are the sentences of the library that name an emergency; a library without such a section has none."""

    def __init__(self, settings: AiSettings, embed: Embed, signs: Sequence[chat.Source]) -> None:
        key = file_key(
            settings.datasets / "emergencies.jsonl", settings.datasets / "questions.jsonl", settings.datasets / "cases.jsonl",
            settings.datasets / "harmful.jsonl", flags=red_flags.ALARMS, tones=red_flags.REASSURANCES, version=2,
        )  # fmt: skip
        self._rows: Examples | None = None

        def rows(flags: bool) -> Examples:
            self._rows = self._rows or examples(settings, embed)
            return self._rows if flags else without_flags(self._rows)

        folder = settings.artifacts / "heads"
        averaged: list[Array] = []

        def upper(probabilities: Array, labels: Array) -> float:
            averaged.append((probabilities + unseen(rows(False), STRENGTH, MEANING)) / 2)
            messages = rows(False).weights == 1.0
            near = at_specificity(LET_THROUGH)(averaged[0][messages], labels[messages])
            return max(near, at_specificity(HARMLESS_THROUGH)(averaged[0], labels))

        def lower(probabilities: Array, labels: Array) -> float:
            both = averaged[0] if averaged else (probabilities + unseen(rows(True), STRENGTH, MEANING)) / 2
            messages = rows(False).weights == 1.0
            return at_sensitivity(FOUND)(both[messages], labels[messages])

        # Each head carries one of the two thresholds; both are thresholds of the average.
        self.flags = fitted("triage", key, lambda: rows(True), upper, folder, STRENGTH, MEANING)
        self.words = fitted("triage-words", key, lambda: rows(False), lower, folder, STRENGTH, MEANING)
        self._rows = None
        self.signs = list(signs)
        self.sign_vectors = embed([s.text for s in signs])

    def judge(self, message: str, vector: Array) -> Triage:
        """Everything the voters say. `vector` (d,) is the message's embedding."""
        probability = float(self.probabilities([message], vector[None])[0])
        rule = red_flags.floor(message)
        sign, cosine = self.nearest_sign(vector)
        emergency = rule is not None or probability >= self.flags.threshold
        return Triage(
            emergency=emergency,
            warning=not emergency and probability >= self.words.threshold,
            probability=probability,
            threshold=self.flags.threshold,
            rule=rule,
            alarms=red_flags.alarms(message),
            sign=sign,
            sign_cosine=cosine,
        )

    def probabilities(self, texts: Sequence[str], vectors: Array) -> Array:
        """(n,) the mean of both heads."""
        with_flags = self.flags.probability(texts, vectors, np.array([red_flags.features(t) for t in texts]))
        return (with_flags + self.words.probability(texts, vectors, np.zeros((len(texts), 1)))) / 2

    def nearest_sign(self, vector: Array, document: str | None = None) -> tuple[str | None, float]:
        """The emergency sign nearest to a message (its vector, (d,)), of one document if it is named, and its cosine.

        Naming the document that a search finds first gives the right leaflet in 64 of 100 validation messages; in 51 without.
        """
        rows = [i for i, sign in enumerate(self.signs) if document is None or sign.id.split("/")[0] == document]
        if not rows:
            return None, 0.0
        scores = self.sign_vectors[rows] @ vector
        best = int(np.argmax(scores))
        near = float(scores[best])
        return (self.signs[rows[best]].id, near) if near >= MIN_SIGN_COSINE else (None, near)


def examples(settings: AiSettings, embed: Embed) -> Examples:
    """Messages of training and validation beside questions, openings and requests that are not about an emergency."""
    messages = [r for r in lib.read_rows(settings.datasets, "emergencies.jsonl", lib.Emergency)[0] if r.split != "test"]
    # A question whose answer is an emergency sign may well be one: it is no example of a harmless message.
    sample = [q for q in question_sample(settings) if not any("/emergency/" in s for s in q.answer_sentences)]
    harmless = sample[::QUESTION_STEP]
    openings = [c for c in lib.read_rows(settings.datasets, "cases.jsonl", lib.Case)[0] if c.split != "test"]
    requests = [r for r in lib.read_rows(settings.datasets, "harmful.jsonl", lib.Harmful)[0] if r.split != "test"]
    # Some who ask for harm are in danger themselves; those whose request is simply declined are not.
    others: list[Any] = [*harmless, *openings, *(r for r in requests if r.expected == "decline")]
    rows: list[Any] = [*messages, *others]
    texts = [text_of(r) for r in rows]
    return Examples(
        texts=texts,
        vectors=embed(texts),
        extra=np.array([red_flags.features(t) for t in texts]),
        labels=np.array([float(m.emergency) for m in messages] + [0.0] * len(others)),
        groups=[family(r.id) for r in rows],
        training=np.array([r.split == "train" for r in rows]),
        weights=np.array([1.0] * len(messages) + [HARMLESS_WEIGHT] * len(others)),
    )


def without_flags(rows: Examples) -> Examples:
    return Examples(
        rows.texts, rows.vectors, np.zeros((len(rows.texts), 1)), rows.labels, rows.groups, rows.training, rows.weights
    )


def measure_triage(nurse: TriageNurse, settings: AiSettings, embed: Embed, split: lib.Split, seed: int = 7) -> dict[str, Any]:
    """Sensitivity and specificity with intervals, alone and by voter, false alarms among questions, and right signs.

    Sensitivity and specificity are about being sent to the emergency number. `found` counts warnings as found, too, and `quiet`
    near misses without either; `harmless_passed` and `harmless_quiet` are the same for questions and openings. `sign_leaflet`:
    share of emergencies whose cited sign is from the right leaflet; another leaflet's sign often says the same.
    """
    messages = [r for r in lib.read_rows(settings.datasets, "emergencies.jsonl", lib.Emergency)[0] if r.split == split]
    votes = [nurse.judge(m.message, v) for m, v in zip(messages, embed([m.message for m in messages]), strict=True)]
    pairs = list(zip(messages, votes, strict=True))
    harmless: list[Any] = [
        r
        for file in ("questions.jsonl", "cases.jsonl")
        for r in lib.read_rows(settings.datasets, file, lib.ROW_FILES[file])[0]
        if r.split == split and not any("/emergency/" in s for s in getattr(r, "answer_sentences", []))
    ]
    texts = [text_of(r) for r in harmless]
    calm = [nurse.judge(t, v) for t, v in zip(texts, embed(texts), strict=True)]

    def mean(values: Sequence[bool]) -> Estimate:
        return estimate_mean([float(v) for v in values], 1000, seed)

    return {
        "sensitivity": mean([v.emergency for m, v in pairs if m.emergency]),
        "specificity": mean([not v.emergency for m, v in pairs if not m.emergency]),
        "found": mean([v.emergency or v.warning for m, v in pairs if m.emergency]),
        "quiet": mean([not v.emergency and not v.warning for m, v in pairs if not m.emergency]),
        "harmless_passed": mean([not v.emergency for v in calm]),
        "harmless_quiet": mean([not v.emergency and not v.warning for v in calm]),
        "floor_sensitivity": mean([v.rule is not None for m, v in pairs if m.emergency]),
        "floor_specificity": mean([v.rule is None for m, v in pairs if not m.emergency]),
        "heads_sensitivity": mean([v.probability >= v.threshold for m, v in pairs if m.emergency]),
        "heads_specificity": mean([v.probability < v.threshold for m, v in pairs if not m.emergency]),
        "sign_leaflet": mean([(v.sign or "").split("/")[0] == (m.sign or "").split("/")[0] for m, v in pairs if m.emergency]),
        "missed": [m.message for m, v in pairs if m.emergency and not v.emergency and not v.warning],
    }
