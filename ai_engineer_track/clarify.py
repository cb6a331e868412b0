"""Asking back: which single question best tells the look-alikes apart, and what the reply says about them.

Why an AI engineer computes this instead of letting the model ask what it likes: a question costs the person's patience, so
it should be the one whose answer is expected to change most. Every leaflet lists the features that set it apart from its
look-alikes (`where the pain is: both sides`). What fits is a belief over leaflets: how near the opening is to each, then for
every reply how near it is to each leaflet's value. The next question has the largest expected information gain (Lindley
1956): the entropy of the belief now, less its mean over the answers that the candidates would give.

    python -m ai_engineer_track run      (the report compares 0, 1, 2, 3 questions, and two ways to ask without thinking)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ai_engineer_track.evidence import Evidence
from ai_engineer_track.heads import Array, Embed
from ai_engineer_track.turn import Reply
from shared import library as lib
from shared.metrics import Estimate, estimate_mean

# Chosen on training and validation cases; the accuracy changes by two points when any of them is halved or doubled.
OPENING = 15.0  # weight of the cosine between opening and leaflet, in nats
REPLY = 20.0  # weight of the cosine between a reply and a leaflet's value of that feature
TEXT = 10.0  # weight of the cosine between a reply and the leaflet's nearest sentence
ABSENT = 0.2  # how much nearer than average a leaflet's value is than that of one which does not list the feature
UNKNOWN = 0.5  # what "I don't know" takes from a leaflet that lists the feature, in nats
KNOWN = 0.6  # how often people can answer a question about a feature of their problem
CANDIDATES = 6  # leaflets that a question is chosen for
MAX_CHOICES = 4
ANSWERED = 0.62  # cosine of opening and value above which the person has said it already


@dataclass(frozen=True)
class Belief:
    """`log_weights` (documents,) in nats, in the order of `Evidence.documents`; `candidates` are the likeliest, best first."""

    log_weights: Array
    candidates: list[str]
    shares: list[float]

    @property
    def best(self) -> str:
        return self.candidates[0]


@dataclass(frozen=True)
class Question:
    """A feature to ask about, the values that would tell the candidates apart, and the expected gain in nats."""

    feature: str
    values: list[str]
    gain: float


class Interviewer:
    """Knows the features of the leaflets in the index. A corpus of other documents has none, and then nothing is asked.

    `stored` embeds what is needed at every start and keeps it, `embed` what people say, which is not kept.
    """

    def __init__(self, leaflets: dict[str, lib.Leaflet], evidence: Evidence, stored: Embed, embed: Embed) -> None:
        self.evidence, self._embed = evidence, embed
        self.leaflets = {slug: leaflets[slug] for slug in evidence.documents if slug in leaflets}
        pairs = [(slug, f, v) for slug, leaflet in self.leaflets.items() for f, v in leaflet.features.items()]
        vectors = stored([f"{feature}: {value}" for _, feature, value in pairs])
        place = {slug: i for i, slug in enumerate(evidence.documents)}
        #: feature -> (which documents list it (documents,), their values' vectors (documents, d))
        self._features: dict[str, tuple[Array, Array]] = {}
        for (slug, feature, _), vector in zip(pairs, vectors, strict=True):
            if feature not in self._features:
                empty = np.zeros((len(evidence.documents), vectors.shape[1]), np.float32)
                self._features[feature] = (np.zeros(len(evidence.documents), bool), empty)
            listed, values = self._features[feature]
            listed[place[slug]], values[place[slug]] = True, vector

    def believe(self, opening: Array, replies: Sequence[Reply] = ()) -> Belief:
        """What fits, after the opening (its vector, (d,)) and the replies so far."""
        weights = OPENING * self.evidence.mean_scores(opening[None])[0]
        for reply in replies:
            weights = weights + self._weigh(reply)
        order = np.argsort(-weights, kind="stable")[:CANDIDATES]
        return Belief(weights, [self.evidence.documents[i] for i in order], softmax(weights[order]).tolist())

    def ask(self, belief: Belief, opening: Array, replies: Sequence[Reply]) -> Question | None:
        """The question with the largest expected gain; None when no answer could change which leaflet fits best."""
        asked = {reply.feature for reply in replies}
        best: Question | None = None
        for feature in dict.fromkeys(
            f for slug in belief.candidates if slug in self.leaflets for f in self.leaflets[slug].features
        ):
            if feature in asked or self._said_already(feature, opening):
                continue
            gain, changes = self._gain(feature, belief)
            if changes and gain > (best.gain if best else 0.0):
                best = Question(feature, self.values(feature, belief), gain)
        return best

    def values(self, feature: str, belief: Belief) -> list[str]:
        """The candidates' values of a feature, likeliest first, without repeats."""
        found = [self.leaflets[s].features[feature] for s in belief.candidates if feature in self._features_of(s)]
        return list(dict.fromkeys(found))[:MAX_CHOICES]

    def _features_of(self, slug: str) -> dict[str, str]:
        return self.leaflets[slug].features if slug in self.leaflets else {}

    def _weigh(self, reply: Reply) -> Array:
        listed, values = self._features.get(reply.feature, (np.zeros(len(self.evidence.documents), bool), None))
        if reply.unknown:
            return -UNKNOWN * listed
        vector = self._embed([f"{reply.feature}: {reply.text}"])[0]
        weights = TEXT * self.evidence.document_scores(vector[None])[0]
        if values is not None and listed.any():
            near = values @ vector
            weights = weights + REPLY * np.where(listed, near, near[listed].mean() - ABSENT)
        return np.asarray(weights)

    def _gain(self, feature: str, belief: Belief) -> tuple[float, bool]:
        """Expected information gain in nats, and whether some answer would put another leaflet first."""
        rows = np.array([self.evidence.documents.index(slug) for slug in belief.candidates])
        listed, values = self._features[feature][0][rows], self._features[feature][1][rows]
        if listed.sum() < 2 or len(self.values(feature, belief)) < 2:
            return 0.0, False
        weights, shares = belief.log_weights[rows], np.array(belief.shares)
        near = values @ values.T
        told = np.where(listed[None], near, near[:, listed].mean(axis=1, keepdims=True) - ABSENT)
        after = [softmax(weights + REPLY * told[i]) for i in np.flatnonzero(listed)]
        unknown = softmax(weights - UNKNOWN * listed)
        answered = KNOWN * shares[listed]
        expected = float((answered * [entropy(p) for p in after]).sum() + (1 - answered.sum()) * entropy(unknown))
        return entropy(shares) - expected, any(int(np.argmax(p)) != 0 for p in after)

    def _said_already(self, feature: str, opening: Array) -> bool:
        listed, values = self._features[feature]
        return bool(listed.any() and float((values[listed] @ opening).max()) >= ANSWERED)


def phrase_pattern(feature: str, values: Sequence[str]) -> str:
    """A regular expression for the model's question: its own words for the feature, the values as they are."""
    kept = ", or ".join(re.sub(r"([^\w ,'%-])", r"\\\1", " ".join(value.split())) for value in values)
    return rf"[A-Z][A-Za-z ,'-]{{8,90}}: {kept}\?"


def names(text: str, feature: str) -> bool:
    """Does a question say what it asks about? A small model under the pattern above may fill it with anything."""
    return all(word in text.lower() for word in re.findall(r"[a-z]{4,}", feature.lower()))


def simulate(
    case: lib.Case,
    interviewer: Interviewer,
    opening: Array,
    max_questions: int,
    choose: Callable[..., Question | None] | None = None,
) -> tuple[list[str], int]:
    """A simulated person answers from the hidden profile, or does not know. The best leaflet after 0, 1, ... questions, and
    how many were asked."""
    replies: list[Reply] = []
    belief = interviewer.believe(opening)
    best = [belief.best]
    for _ in range(max_questions):
        question = (choose or interviewer.ask)(belief, opening, replies)
        if question is None:
            break
        replies.append(Reply(feature=question.feature, text=case.profile.get(question.feature, "I don't know")))
        belief = interviewer.believe(opening, replies)
        best.append(belief.best)
    return best + [best[-1]] * (max_questions + 1 - len(best)), len(replies)


def tell_more(case: lib.Case, interviewer: Interviewer, embed: Embed) -> str:
    """The baseline that always asks "Can you tell me more?": the person adds the first thing of the profile, unasked."""
    more = next(iter(case.profile.values()), "")
    return interviewer.believe(embed([f"{case.opening} {more}"])[0]).best


def measure_clarify(
    interviewer: Interviewer,
    cases: Sequence[lib.Case],
    embed: Embed,
    needs: Callable[[str, Array], bool],
    max_questions: int = 3,
    seed: int = 7,
) -> dict[str, Any]:
    """Accuracy of the final leaflet after 0 to `max_questions` questions on cases that need one, beside two baselines.

    `needs` is the product's decision to ask back: `needless` is how often it asks on a clear opening, `asks` how often on a
    vague one. Every figure has its interval.
    """
    vague, clear = [c for c in cases if c.needs_question], [c for c in cases if not c.needs_question]
    vectors = dict(zip([c.id for c in cases], embed([c.opening for c in cases]), strict=True))
    told = [(c, *simulate(c, interviewer, vectors[c.id], max_questions)) for c in vague]

    def mean(values: Sequence[float]) -> Estimate:
        return estimate_mean([float(v) for v in values], 1000, seed)

    return {
        "accuracy": {n: mean([best[n] == c.leaflet for c, best, _ in told]) for n in range(max_questions + 1)},
        "gain": mean([(best[-1] == c.leaflet) - (best[0] == c.leaflet) for c, best, _ in told]),
        "questions": mean([asked for _, _, asked in told]),
        "never_ask": mean([best[0] == c.leaflet for c, best, _ in told]),
        "generic_question": mean([tell_more(c, interviewer, embed) == c.leaflet for c in vague]),
        "asks": mean([needs(c.opening, vectors[c.id]) for c in vague]),
        "needless": mean([needs(c.opening, vectors[c.id]) for c in clear]),
    }


def softmax(weights: Array) -> Array:
    raised = np.exp(weights - weights.max())
    return np.asarray(raised / raised.sum())


def entropy(shares: Array) -> float:
    """In nats."""
    return float(-(shares * np.log(shares + 1e-12)).sum())
