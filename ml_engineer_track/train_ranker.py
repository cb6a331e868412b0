"""Trains the ranker: which passages, and which of their sentences, answer a question.

Why an ML engineer does this next to the language model: whatever is not retrieved cannot be answered, and a model of a
dozen weights that reads its candidates in a millisecond is often worth more than ten times the parameters in the generator.
It travels in the same handoff, because a ranker is as much a trained model as the rest.

    python -m ml_engineer_track train-ranker [--preset tiny]

Three parts, each a softmax regression on **training** questions over **training** leaflets: what kind of section a question
asks for (from its vector), the weights of the passage features, the weights of the sentence features. The weights are fitted
on section guesses made *out of fold*, for a family of leaflets by a classifier that never saw its questions; otherwise they
would trust guesses that are better in training than they will ever be again (stacking, Wolpert 1992). Validation says
whether it is worth serving. The test split is not read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import log_softmax

from ml_engineer_track.progress import progress
from shared import library as lib
from shared.errors import UserError
from shared.files import sha256_text, write_text
from shared.metrics import Estimate, estimate_mean
from shared.passages import DIMENSIONS, StoredVectors, embedder, leaflet_passages, unit_texts
from shared.ranking import ASSET, PASSAGE_FEATURES, SENTENCE_FEATURES, Corpus, Ranker
from shared.settings import Settings

Array = np.ndarray[Any, np.dtype[Any]]
#: passages that each of the two rankings (meaning, words) contributes as candidates
CANDIDATES = 30
#: passages whose sentences compete with each other
TOP = 8
FOLDS = 5
#: weight of the squared norm; chosen by the accuracy of out-of-fold section guesses on training questions
SECTION_DECAY = 3e-4


@dataclass(frozen=True)
class TrainedRanker:
    """`path` holds the ranker. The figures are validation's, among the leaflets of training and validation."""

    path: str
    questions: int
    figures: dict[str, Estimate]


@dataclass(frozen=True)
class Asked:
    """A question with its vector, (384,)."""

    row: lib.Question
    vector: Array

    @property
    def passages(self) -> set[str]:
        return {sid.rsplit("/", 1)[0] for sid in self.row.answer_sentences}

    @property
    def sections(self) -> set[str]:
        return {sid.split("/")[1] for sid in self.row.answer_sentences}


#: the competitors for one question: their features (n, f) and which of them are right (n,)
Group = tuple[Array, Array]


def train_ranker(settings: Settings) -> TrainedRanker:
    """Fit on training questions, measure on validation, write `ranker.json`. UserError when there is nothing to fit."""
    library = lib.load_library(settings.datasets)
    rows, _ = lib.read_rows(settings.datasets, "questions.jsonl", lib.Question)
    known = [q for q in rows if q.split != "test" and q.answerable and not lib.row_problems(q, library)]
    if not any(q.split == "train" for q in known):
        raise UserError("no answerable training questions", str(settings.datasets / "questions.jsonl"), "Add some")
    passages = [p for leaf in library if leaf.split != "test" for p in leaflet_passages(leaf, f"{leaf.id}.md")]
    texts = [text for p in passages for text in unit_texts(p)]
    with progress("train-ranker: embedding", total=len(texts) + len(known)) as bar:
        vectors = StoredVectors(settings.artifacts / "vectors.npz", lambda texts: embedder().embed(texts, bar.update))
        units = vectors(texts)
        asked = [Asked(q, v) for q, v in zip(known, vectors([q.question for q in known]), strict=True)]

    trained = [library.leaflets[p.document].split == "train" for p in passages]
    corpus = Corpus(
        [p for p, mine in zip(passages, trained, strict=True) if mine],
        units[np.repeat(trained, [1 + len(p.sentences) for p in passages])],
    )
    families = {leaf.id: leaf.family for leaf in library}
    ranker = fit(corpus, [a for a in asked if a.row.split == "train"], families, settings.seed)
    figures = measure(ranker, Corpus(passages, units), [a for a in asked if a.row.split == "validation"], settings)
    path = settings.work / "train-ranker" / ASSET
    write_text(path, ranker.model_dump_json(indent=1) + "\n")
    return TrainedRanker(str(path), ranker.questions, figures)


def fit(corpus: Corpus, asked: Sequence[Asked], families: dict[str, str], seed: int) -> Ranker:
    """A ranker from questions and the leaflets they are about; `families` is leaflet -> family."""
    ranker = Ranker(
        embedder=embedder().id,
        passage=dict.fromkeys(PASSAGE_FEATURES, 0.0),
        sentence=dict.fromkeys(SENTENCE_FEATURES, 0.0),
        sections=fit_sections(asked),
        trained_on=sha256_text("\n".join(sorted(a.row.id + a.row.question for a in asked)))[:12],
        questions=len(asked),
    )
    guesses = out_of_fold(asked, families, ranker, seed)
    candidates = [
        list(dict.fromkeys(corpus.nearest(a.vector, CANDIDATES) + corpus.worded(a.row.question, CANDIDATES))) for a in asked
    ]
    features = [
        corpus.passage_features(a.row.question, a.vector, found, guess)
        for a, found, guess in zip(asked, candidates, guesses, strict=True)
    ]
    groups = [
        (x, np.array([corpus.passages[n].id in a.passages for n in found]))
        for a, x, found in zip(asked, features, candidates, strict=True)
    ]
    ranker = ranker.model_copy(update={"passage": _named(PASSAGE_FEATURES, fit_weights(groups))})
    sentences = [_sentences(ranker, corpus, a, x, found) for a, x, found in zip(asked, features, candidates, strict=True)]
    return ranker.model_copy(update={"sentence": _named(SENTENCE_FEATURES, fit_weights(sentences))})


def measure(ranker: Ranker, corpus: Corpus, asked: Sequence[Asked], settings: Settings) -> dict[str, Estimate]:
    """Leaflet and passage recall at 5 of the ranker and of its two sources alone, per question, with intervals."""
    hits: dict[str, list[float]] = {}
    for a in asked:
        near, worded = corpus.nearest(a.vector, CANDIDATES), corpus.worded(a.row.question, CANDIDATES)
        both = list(dict.fromkeys(near + worded))
        scores = ranker.passage_scores(corpus.passage_features(a.row.question, a.vector, both, ranker.intent(a.vector)))
        ranked = [both[i] for i in np.argsort(-scores, kind="stable")]
        for name, order in {"dense": near, "bm25": worded, "ranker": ranked}.items():
            found = [corpus.passages[n] for n in order]
            documents = list(dict.fromkeys(p.document for p in found))[:5]
            hits.setdefault(f"{name}/leaflet_recall@5", []).append(float(bool(set(documents) & set(a.row.leaflets))))
            hits.setdefault(f"{name}/passage_recall@5", []).append(float(any(p.id in a.passages for p in found[:5])))
    return {name: estimate_mean(values, settings.evaluate.bootstrap, settings.seed) for name, values in hits.items()}


# --- fitting ---------------------------------------------------------------------------------------------------------


def out_of_fold(asked: Sequence[Asked], families: dict[str, str], ranker: Ranker, seed: int) -> list[dict[str, float]]:
    """Section guesses for every question by a classifier that saw no question about its family."""
    own = [families[a.row.leaflets[0]] for a in asked]
    names = sorted(set(own))
    random.Random(seed).shuffle(names)
    fold = {name: n % FOLDS for n, name in enumerate(names)}
    guesses: list[dict[str, float]] = [{} for _ in asked]
    for k in range(FOLDS):
        others = [a for a, family in zip(asked, own, strict=True) if fold[family] != k]
        if not others:  # a library of a single family has nothing to hold out
            continue
        guesser = ranker.model_copy(update={"sections": fit_sections(others)})
        for n, a in enumerate(asked):
            if fold[own[n]] == k:
                guesses[n] = guesser.intent(a.vector)
    return guesses


def fit_sections(asked: Sequence[Asked]) -> dict[str, list[float]]:
    """Multinomial logistic regression from a question's vector to the sections that answer it: 384 weights and a bias each."""
    names = list(lib.SECTIONS)
    right = torch.tensor([[float(name in a.sections) for name in names] for a in asked])
    right = right / right.sum(1, keepdim=True)
    inputs = torch.tensor(np.stack([np.append(a.vector, 1.0) for a in asked]), dtype=torch.float32)
    weights = torch.zeros(len(names), DIMENSIONS + 1)

    def loss(w: torch.Tensor) -> torch.Tensor:
        decay = SECTION_DECAY * w[:, :DIMENSIONS].square().sum()
        return -(right * log_softmax(inputs @ w.T, dim=1)).sum(1).mean() + decay

    return {name: [round(x, 5) for x in row] for name, row in zip(names, _minimise(loss, weights).tolist(), strict=True)}


def fit_weights(groups: Sequence[Group]) -> Array:
    """Weights (f,) under which the right competitors of each group win (a softmax over the group, as in ListNet).

    Groups in which nothing is right teach nothing and are left out. Zeros when there is no other group.
    """
    count = len(groups[0][0][0])
    groups = [(x, right) for x, right in groups if right.any()]
    if not groups:
        return np.zeros(count, dtype=np.float32)
    widest = max(len(x) for x, _ in groups)
    features, target = torch.zeros(len(groups), widest, count), torch.zeros(len(groups), widest)
    absent = torch.ones(len(groups), widest, dtype=torch.bool)
    for n, (x, right) in enumerate(groups):
        features[n, : len(x)], absent[n, : len(x)] = torch.tensor(x), False
        target[n, : len(x)] = torch.tensor(right / right.sum())
    spread = features[~absent].std(0).clamp(min=1e-6)  # on one scale the solver converges in a few steps

    def loss(w: torch.Tensor) -> torch.Tensor:
        scores = ((features / spread) @ w).masked_fill(absent, -1e9)
        return -(target * log_softmax(scores, dim=1)).sum(1).mean() + 1e-3 * w.square().sum()

    return np.asarray(_minimise(loss, torch.zeros(count)) / spread)


def _minimise(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    weights = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        solver.zero_grad()
        value = loss(weights)
        value.backward()
        return value

    solver.step(step)
    return weights.detach()


def _sentences(ranker: Ranker, corpus: Corpus, a: Asked, features: Array, found: Sequence[int]) -> Group:
    """The sentences of the best passages as competitors."""
    scores = ranker.passage_scores(features)
    top = np.argsort(-scores, kind="stable")[:TOP]
    best = [found[i] for i in top]
    x = np.concatenate(corpus.sentence_features(a.row.question, a.vector, best, scores[top].tolist()))
    return x, np.isin([s.id for n in best for s in corpus.passages[n].sentences], a.row.answer_sentences)


def _named(names: Sequence[str], weights: Array) -> dict[str, float]:
    return {name: round(float(w), 5) for name, w in zip(names, weights, strict=True)}
