"""Ranking passages for a question: words, features, and the ranker the ML track trains and the AI track serves.

The features are few and cheap, and every one says something the others do not: what the whole passage means, what its best
sentence means, which words it shares, which words its whole document shares, and whether this *kind* of section (self-care,
causes, ...) is what the question asks for. A ranker is a weight for each, so a person can read in its file what it has
learned. With five weights and one intent classifier it cannot learn which leaflets the training questions were about, and
that is what it must not learn: the leaflets it will be asked about are others.

Words are compared with BM25 (Robertson & Zaragoza 2009) over stems *and* four-letter pieces: people misspell exactly the
words that matter most, and `ectopik` still shares pieces with `ectopic`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import bm25s
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import UserError
from shared.passages import DIMENSIONS, Passage

Array = np.ndarray[Any, np.dtype[Any]]

PassageFeature = Literal["meaning", "best_sentence", "words", "document_words", "section"]
SentenceFeature = Literal["passage", "meaning", "words"]
#: columns of `Corpus.passage_features`
PASSAGE_FEATURES: tuple[PassageFeature, ...] = ("meaning", "best_sentence", "words", "document_words", "section")
#: columns of `Corpus.sentence_features`
SENTENCE_FEATURES: tuple[SentenceFeature, ...] = ("passage", "meaning", "words")
#: name of the asset in the handoff
ASSET = "ranker.json"

STOPWORDS = frozenset(
    "a about am an and any are as at be because been but by can could did do does for from get got had has have he her him his "
    "how i if in into is it its ive just like me my no not of on or our out she should so some than that the their them then "
    "there they this to up was we were what when which who why will with would you your".split()
)


def words(text: str) -> list[str]:
    """Stems and four-letter pieces of the words that carry meaning.

    >>> words("My ankles hurt")
    ['ankl', '_ank', 'ankl', 'nkle', 'kles', 'les_', 'hurt', '_hur', 'hurt', 'urt_']
    """
    found: list[str] = []
    for word in re.findall(r"\w+", re.sub(r"['’]", "", text.casefold())):
        if word not in STOPWORDS:
            padded = f"_{word}_"
            found.append(stem(word))
            found += [padded[i : i + 4] for i in range(max(1, len(padded) - 3))]
    return found


def stem(word: str) -> str:
    """The word without its English ending: crude, and enough to let `swelling` meet `swells`."""
    for ending in ("ations", "ation", "ings", "ing", "edly", "ed", "ies", "ness", "ment", "ful", "ly", "es", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


class Bm25:
    """BM25 scores of a query over all texts at once."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._index = bm25s.BM25(k1=1.2, b=0.75)
        self._index.index([words(text) or ["-"] for text in texts], show_progress=False)
        self._size = len(texts)

    def scores(self, query: str) -> Array:
        """(texts,) float32, 0 where nothing is shared."""
        asked = [word for word in dict.fromkeys(words(query)) if word in self._index.vocab_dict]
        if not asked:
            return np.zeros(self._size, dtype=np.float32)
        return np.asarray(self._index.get_scores(asked), dtype=np.float32)


class Corpus:
    """Passages with all that their features are computed from.

    `vectors` is (units, 384) with the rows of `passages.unit_texts`, passage after passage.
    """

    def __init__(self, passages: Sequence[Passage], vectors: Array) -> None:
        self.passages = list(passages)
        self.vectors = vectors
        sizes = [1 + len(p.sentences) for p in self.passages]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        if self._first[-1] != len(vectors):
            raise ValueError(f"{len(vectors)} vectors for {self._first[-1]} units")
        documents = {slug: n for n, slug in enumerate(dict.fromkeys(p.document for p in self.passages))}
        self._document = np.array([documents[p.document] for p in self.passages], dtype=int)
        whole: list[list[str]] = [[] for _ in documents]
        for passage, document in zip(self.passages, self._document, strict=True):
            whole[document] += [*([] if whole[document] else 2 * [passage.title, *passage.names]), passage.text]
        self.words = Bm25([" ".join([p.heading, *p.names, p.text]) for p in self.passages])
        self._document_words = Bm25([" ".join(parts) for parts in whole])
        self._sentence_words = Bm25([s.text for p in self.passages for s in p.sentences])

    def nearest(self, vector: Array, n: int) -> list[int]:
        """The `n` passages whose nearest unit is nearest to `vector`, best first: exact, over all of them."""
        best = np.maximum.reduceat(self.vectors @ vector, self._first[:-1])
        return [int(i) for i in np.argsort(-best, kind="stable")[:n]]

    def worded(self, query: str, n: int) -> list[int]:
        """The `n` passages that share most words with `query`, best first; only those that share any."""
        scores = self.words.scores(query)
        return [int(i) for i in np.argsort(-scores, kind="stable")[:n] if scores[i] > 0]

    def passage_features(self, query: str, vector: Array, candidates: Sequence[int], intent: dict[str, float]) -> Array:
        """(candidates, 5) float32, columns PASSAGE_FEATURES. `vector` is the query's, `intent` what `Ranker.intent` says."""
        rows = np.zeros((len(candidates), len(PASSAGE_FEATURES)), dtype=np.float32)
        in_passage, in_document = self.words.scores(query), self._document_words.scores(query)
        for row, n in zip(rows, candidates, strict=True):
            nearness = self.vectors[self._first[n] : self._first[n + 1]] @ vector
            row[0], row[1] = nearness[0], nearness[1:].max()
            row[2], row[3] = np.log1p(in_passage[n]), np.log1p(in_document[self._document[n]])
            row[4] = intent.get(self.passages[n].section, 0.0)
        return rows

    def sentence_features(self, query: str, vector: Array, passages: Sequence[int], scores: Sequence[float]) -> list[Array]:
        """For each passage (sentences, 3) float32, columns SENTENCE_FEATURES; `scores` are the passages' own."""
        in_sentence = self._sentence_words.scores(query)
        made = []
        for n, score in zip(passages, scores, strict=True):
            first, last = int(self._first[n]), int(self._first[n + 1])
            nearness = self.vectors[first + 1 : last] @ vector
            shared = np.log1p(in_sentence[first - n : last - n - 1])  # every passage before has one unit more than sentences
            made.append(np.stack([np.full(len(nearness), score), nearness, shared], axis=1).astype(np.float32))
        return made

    def sentence_nearness(self, vector: Array, passages: Sequence[int]) -> dict[str, float]:
        """Cosine of every sentence of these passages with `vector`, by sentence id."""
        return {
            sentence.id: float(nearness)
            for n in passages
            for sentence, nearness in zip(
                self.passages[n].sentences, self.vectors[self._first[n] + 1 : self._first[n + 1]] @ vector, strict=True
            )
        }


class Ranker(BaseModel):
    """What the ML track learned from training questions. `sections`: 384 weights and a bias for each kind of section."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    embedder: str
    passage: dict[PassageFeature, float]
    sentence: dict[SentenceFeature, float]
    sections: dict[str, list[float]]
    trained_on: str
    questions: int

    def intent(self, vector: Array) -> dict[str, float]:
        """How likely the question asks for each kind of section: log probability, 0 being what an even guess would say."""
        if not self.sections:
            return {}
        weights = np.array(list(self.sections.values()), dtype=np.float32)
        logits = weights[:, :DIMENSIONS] @ vector + weights[:, DIMENSIONS]
        log_p = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        return dict(zip(self.sections, (log_p + np.log(len(logits))).tolist(), strict=True))

    def passage_scores(self, features: Array) -> Array:
        """(candidates,) float32 from (candidates, 5)."""
        return np.asarray(features @ np.array([self.passage[name] for name in PASSAGE_FEATURES], dtype=np.float32))

    def sentence_scores(self, features: Array) -> Array:
        """(sentences,) float32 from (sentences, 3)."""
        return np.asarray(features @ np.array([self.sentence[name] for name in SENTENCE_FEATURES], dtype=np.float32))


def sentence_ratings(ranker: Ranker, corpus: Corpus, query: str, vector: Array, passages: Sequence[int]) -> dict[str, float]:
    """How likely each sentence of these passages holds the answer, by sentence id: the order of the sources in a prompt."""
    scores = ranker.passage_scores(corpus.passage_features(query, vector, passages, ranker.intent(vector)))
    features = corpus.sentence_features(query, vector, passages, scores.tolist())
    return {
        sentence.id: float(rating)
        for n, rows in zip(passages, features, strict=True)
        for sentence, rating in zip(corpus.passages[n].sentences, ranker.sentence_scores(rows), strict=True)
    }


def read_ranker(path: Path) -> Ranker:
    """UserError when the file is none."""
    try:
        ranker = Ranker.model_validate_json(path.read_bytes())
        complete = set(ranker.passage) == set(PASSAGE_FEATURES) and set(ranker.sentence) == set(SENTENCE_FEATURES)
        if not complete or any(len(w) != DIMENSIONS + 1 for w in ranker.sections.values()):
            raise ValueError
    except (OSError, ValidationError, ValueError):
        raise UserError("the ranker is missing or malformed", str(path), "Run `make ml`") from None
    return ranker
