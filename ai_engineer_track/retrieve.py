"""Finds the passages that answer a message: by meaning, by words, by both, and reranked.

Why an AI engineer measures this before anything else: an answer can only be as good as what was found for it. Meaning finds
what is said in other words and misses names and numbers; words find exactly those and miss everything else; fused by
reciprocal rank (Cormack et al. 2009) they cover for each other; and the ranker of the ML track weighs the evidence of each
candidate. One function serves the evaluation, the agent and the API, so that what is measured is what people get.

    python -m ai_engineer_track search "my ankle is swollen, can I walk on it"

Without a ranker in the published model, everything works on `fused`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from ai_engineer_track.documents import split_sentences
from ai_engineer_track.ingest import Index
from ai_engineer_track.settings import AiSettings
from shared import handoff
from shared.chat import Source
from shared.errors import UserError
from shared.library import Question
from shared.metrics import Estimate, estimate_mean
from shared.passages import Passage, embedder
from shared.ranking import ASSET, Corpus, Ranker, read_ranker, sentence_ratings

Mode = Literal["dense", "bm25", "fused", "reranked"]
MODES: tuple[Mode, ...] = ("dense", "bm25", "fused", "reranked")

#: The embedding model reads about 190 words and silently ignores the rest. Messages up to here are searched as they are:
#: on training and validation questions of 40 to 140 words every way of shortening them found less than the whole did.
LONG_WORDS = 150
#: What a longer message is cut down to: at most so many words, of sentences at most so much less near than the nearest.
#: Chosen on validation questions hidden in 400 words of backstory: leaflet recall@5 0.83, against 0.02 for the whole message
#: (which is cut off where the embedding model stops reading) and 0.97 for the question alone.
CORE_WORDS = 60
CORE_MARGIN = 0.1
QUESTION_BONUS = 0.1
#: sentences of an enormous message that are looked at, from its beginning and from its end
MAX_SENTENCES = 40
PLEASANTRY = re.compile(
    r"(hi|hello|hey|hiya|dear|good (morning|afternoon|evening)|thanks|thank you|many thanks|cheers|sorry|kind regards|"
    r"best wishes|please help|any help)\b",
    re.IGNORECASE,
)


class Hit(BaseModel):
    """A passage that was found. Ranks count from 1 and are None where that ranking did not find it among its candidates."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    passage: Passage
    score: float
    dense_rank: int | None = None
    bm25_rank: int | None = None
    dense_score: float | None = None


class Retriever:
    """Search over one index. Safe to use from several threads."""

    def __init__(self, index: Index, settings: AiSettings) -> None:
        self.index, self.settings = index, settings.retrieve
        self.corpus = Corpus(list(index.passages.values()), index.vectors)
        self.ranker = published_ranker(settings)
        self._place = {passage.id: n for n, passage in enumerate(self.corpus.passages)}

    def with_ranker_of(self, folder: Path) -> Retriever:
        """The same search with the ranker of another published version. UserError as in `published_ranker`."""
        other = copy.copy(self)
        other.ranker = ranker_of(folder)
        return other

    @property
    def default_mode(self) -> Mode:
        """The one that measured best."""
        return "reranked" if self.ranker else "fused"

    def search(
        self, query: str, k: int | None = None, mode: Mode | None = None, where: dict[str, Any] | None = None
    ) -> list[Hit]:
        """The `k` passages that fit best, best first; fewer when there are no more.

        `where` is a filter as in `Index.dense`. UserError for a filter that is not understood, and for `reranked` without
        a ranker.
        """
        mode = mode or self.default_mode
        if mode == "reranked" and not self.ranker:
            raise UserError("the published model carries no ranker", "", "Run `make ml`, or search with mode fused")
        k = self.settings.k if k is None else k
        query = self.condense(query)
        if k < 1 or not query:
            return []
        depth = max(k, self.settings.candidates)
        vector = self.index.embed_query(query)
        near = dict(self.index.dense(vector, depth, where))
        allowed = None if where is None else self.index.matching(where)
        worded = self._worded(query, depth, allowed)
        dense_rank = {key: n for n, key in enumerate(near, start=1)}
        bm25_rank = {key: n for n, key in enumerate(worded, start=1)}
        if mode == "dense":
            scores = near
        elif mode == "bm25":
            scores = worded
        else:
            scores = self._fused(dense_rank, bm25_rank)
            if mode == "reranked" and self.ranker:
                scores = dict(zip(scores, self._ranked(self.ranker, query, vector, list(scores)), strict=True))
        best = sorted(scores, key=lambda key: -scores[key])[:k]
        return [
            Hit(
                passage=self.index.passages[key], score=scores[key], dense_rank=dense_rank.get(key),
                bm25_rank=bm25_rank.get(key), dense_score=near.get(key),
            )
            for key in best
        ]  # fmt: skip

    def best_sentences(self, query: str, hits: Sequence[Hit], n: int) -> list[Source]:
        """The `n` sentences of `hits` most likely to hold the answer, the likeliest first, for a model that reads few.

        The ML track orders its training prompts by the same ratings. Without a ranker nearness in meaning decides.
        """
        query = self.condense(query)
        if not hits or not query:
            return []
        vector = self.index.embed_query(query)
        places = list(dict.fromkeys(self._place[hit.passage.id] for hit in hits))
        if self.ranker:
            rating = sentence_ratings(self.ranker, self.corpus, query, vector, places)
        else:
            rating = self.corpus.sentence_nearness(vector, places)
        sentences = [s for place in places for s in self.corpus.passages[place].sentences]
        return sorted(sentences, key=lambda s: -rating[s.id])[:n]

    def condense(self, message: str) -> str:
        """The searchable core of a message: as it is when short, else the sentences nearest to anything in the library.

        A question is kept before a statement of the same nearness, because a long story often ends in the one that counts.
        """
        sentences = split_sentences(message)
        kept = [s for s in sentences if not (len(s.split()) <= 6 and PLEASANTRY.match(s))] or sentences
        if sum(len(s.split()) for s in kept) <= LONG_WORDS:
            return " ".join(kept)
        if len(kept) > 2 * MAX_SENTENCES:
            kept = kept[:MAX_SENTENCES] + kept[-MAX_SENTENCES:]
        asks = np.array([s.endswith("?") for s in kept])
        nearness = (self.index.embed(kept) @ self.index.vectors.T).max(axis=1) + QUESTION_BONUS * asks
        order = np.argsort(-nearness, kind="stable")
        core = [int(order[0])]
        for i in order[1:]:
            near = nearness[i] >= nearness[order[0]] - CORE_MARGIN
            if near and sum(len(kept[j].split()) for j in [*core, i]) <= CORE_WORDS:
                core.append(int(i))
        return " ".join(kept[i] for i in sorted(core))

    def _worded(self, query: str, n: int, allowed: set[str] | None) -> dict[str, float]:
        """The `n` passages that share most words, best first, with their BM25 scores."""
        scores = self.corpus.words.scores(query)
        found: dict[str, float] = {}
        for place in np.argsort(-scores, kind="stable"):
            if scores[place] <= 0 or len(found) == n:
                break
            key = self.corpus.passages[place].id
            if allowed is None or key in allowed:
                found[key] = float(scores[place])
        return found

    def _fused(self, *rankings: dict[str, int]) -> dict[str, float]:
        """Reciprocal rank fusion: the sum of 1 / (rrf_k + rank)."""
        fused: dict[str, float] = {}
        for ranking in rankings:
            for key, rank in ranking.items():
                fused[key] = fused.get(key, 0.0) + 1.0 / (self.settings.rrf_k + rank)
        return fused

    def _ranked(self, ranker: Ranker, query: str, vector: np.ndarray, keys: Sequence[str]) -> list[float]:
        places = [self._place[key] for key in keys]
        features = self.corpus.passage_features(query, vector, places, ranker.intent(vector))
        return [float(score) for score in ranker.passage_scores(features)]


def published_ranker(settings: AiSettings) -> Ranker | None:
    """The ranker of the model that is asked, else of the current one; None when nothing is published, or without a ranker.

    A replica that starts while another version becomes current must not search with the new ranker for the old model.
    """
    models = settings.artifacts / "models"
    if settings.llm.published and (models / settings.llm.published).is_dir():
        return ranker_of(models / settings.llm.published)
    return ranker_of(handoff.current(models)) if (models / "current").exists() else None


def ranker_of(folder: Path) -> Ranker | None:
    """The ranker of a version, or None. UserError when it is damaged or was trained on another embedding model's vectors."""
    path = handoff.asset(folder, ASSET)
    if path is None:
        return None
    ranker = read_ranker(path)
    if ranker.embedder != embedder().id:
        raise UserError(f"the ranker was trained with another embedding model ({ranker.embedder})", str(path), "Run `make ml`")
    return ranker


# --- measuring -------------------------------------------------------------------------------------------------------

DEPTH = 50
CUTS = (1, 3, 5, 10)


def measure(
    retriever: Retriever, questions: Sequence[Question], resamples: int = 1000, seed: int = 7
) -> dict[str, dict[str, Estimate]]:
    """Every mode on the answerable ones of `questions`: mode -> figure -> estimate.

    Figures are `leaflet/…` (the distinct documents in the order they appear) and `passage/…`: recall@k counts a question
    when a right one is among the first k; mrr is the mean of 1 / rank of the first right one (0 beyond the first 50
    passages); ndcg@10 has gain 1 for every right one (Järvelin & Kekäläinen 2002).
    """
    asked = [q for q in questions if q.answerable]
    results: dict[str, dict[str, Estimate]] = {}
    for mode in MODES:
        if mode == "reranked" and not retriever.ranker:
            continue
        rows: dict[str, list[float]] = {}
        for question in asked:
            found = [hit.passage for hit in retriever.search(question.question, DEPTH, mode)]
            documents = list(dict.fromkeys(p.document for p in found))
            right = {sid.rsplit("/", 1)[0] for sid in question.answer_sentences}
            for level, order, gold in (
                ("leaflet", documents, set(question.leaflets)),
                ("passage", [p.id for p in found], right),
            ):
                for name, value in _figures(order, gold).items():
                    rows.setdefault(f"{level}/{name}", []).append(value)
        results[mode] = {name: estimate_mean(values, resamples, seed) for name, values in rows.items()}
    return results


def measure_sentences(
    retriever: Retriever,
    questions: Sequence[Question],
    counts: Sequence[int] = (8, 12),
    k: int | None = None,
    resamples: int = 1000,
    seed: int = 7,
) -> dict[str, Estimate]:
    """coverage@n: the share of a question's answer sentences among `best_sentences(…, n)` of its first `k` passages."""
    rows: dict[str, list[float]] = {}
    for question in (q for q in questions if q.answerable):
        hits = retriever.search(question.question, k)
        gold = set(question.answer_sentences)
        for n in counts:
            shown = {s.id for s in retriever.best_sentences(question.question, hits, n)}
            rows.setdefault(f"coverage@{n}", []).append(len(gold & shown) / len(gold))
    return {name: estimate_mean(values, resamples, seed) for name, values in rows.items()}


def _figures(order: Sequence[str], gold: set[str]) -> dict[str, float]:
    right = [key in gold for key in order]
    first = right.index(True) + 1 if any(right) else 0
    gain = sum(1 / np.log2(n + 1) for n, good in enumerate(right[:10], start=1) if good)
    ideal = sum(1 / np.log2(n + 1) for n in range(1, min(10, len(gold)) + 1))
    recall = {f"recall@{k}": float(any(right[:k])) for k in CUTS}
    return {**recall, "mrr": 1 / first if first else 0.0, "ndcg@10": float(gain / ideal)}
