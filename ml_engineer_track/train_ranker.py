"""Trains the ranker: which passages, and which of their sentences, answer a question.

Why an ML engineer does this next to the language model: whatever is not retrieved cannot be answered, and a model of a dozen
weights that reads its candidates in a millisecond is often worth more than ten times the parameters in the generator. It
travels in the same handoff, because a ranker is as much a trained model as the rest.

    python -m ml_engineer_track train-ranker [--preset tiny]

Three parts, each fitted by softmax regression on **training** questions over **training** leaflets only: what kind of section
a question asks for (from its vector), the weights of the passage features, and the weights of the sentence features. The
weights are fitted on section guesses made *out of fold* (for a family of leaflets by a classifier that never saw its
questions); otherwise they would trust guesses that are better in training than they will ever be again (stacking, Wolpert
1992). The validation split says whether it is worth serving; the test split is not read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ml_engineer_track.progress import progress
from shared import library as lib
from shared.errors import UserError
from shared.files import sha256_tree, write_text
from shared.metrics import Estimate, estimate_mean
from shared.passages import DIMENSIONS, embedder, leaflet_passages, unit_texts
from shared.ranking import ASSET, PASSAGE_FEATURES, SENTENCE_FEATURES, Corpus, Ranker
from shared.settings import Settings

Array = np.ndarray[Any, np.dtype[Any]]
#: passages each of the two rankings contributes as candidates
CANDIDATES = 30
#: passages whose sentences compete when sentence weights are fitted
TOP = 8
FOLDS = 5


@dataclass(frozen=True)
class TrainedRanker:
    """`path` holds the ranker; figures are on validation, over the leaflets of training and validation."""

    path: str
    seconds_to_fit: float
    figures: dict[str, Estimate]


@dataclass
class Asked:
    """Questions with their vectors, (questions, 384)."""

    questions: list[lib.Question]
    vectors: Array


def train_ranker(settings: Settings) -> TrainedRanker:
    """Fit on the training split, measure on validation, write `ranker.json`. UserError when there are no questions to fit."""
    library = lib.load_library(settings.datasets)
    rows, _ = lib.read_rows(settings.datasets, "questions.jsonl", lib.Question)
    known = [q for q in rows if q.answerable and all(library.has(sid) for sid in q.answer_sentences)]
    train, validation = ([q for q in known if q.split == split] for split in ("train", "validation"))
    if not train:
        raise UserError("no answerable training questions", str(settings.datasets / "questions.jsonl"), "Add some")
    leaflets = [leaf for leaf in library if leaf.split != "test"]
    passages = [p for leaf in leaflets for p in leaflet_passages(leaf, f"{leaf.id}.md")]
    texts = [text for p in passages for text in unit_texts(p)]
    asked = [q.question for q in train + validation]
    with progress("train-ranker: embedding", total=len(texts) + len(asked)) as bar:
        vectors = embedder().embed([*texts, *asked], bar.update)
    units, questions = vectors[: len(texts)], vectors[len(texts) :]
    in_training = [p for p in passages if library.leaflets[p.document].split == "train"]
    is_training = np.repeat([library.leaflets[p.document].split == "train" for p in passages], [1 + len(p.sentences) for p in passages])
    ranker = fit(Corpus(in_training, units[is_training]), Asked(train, questions[: len(train)]), settings.seed)
    ranker = ranker.model_copy(update={"trained_on": sha256_tree([settings.datasets / "questions.jsonl"])[:12]})
    figures = measure(ranker, Corpus(passages, units), Asked(validation, questions[len(train) :]), settings)
    path = settings.work / "train-ranker" / ASSET
    write_text(path, ranker.model_dump_json(indent=1) + "\n")
    return TrainedRanker(str(path), 0.0, figures)
