"""Asks a model the test split and scores what it says, free and under a grammar, with intervals.

Why an ML engineer does this before anything is published: "it looks better" is not a figure. Base, tuned and every
quantised variant get the same rows, the same prompts and the same decoding, so differences are theirs alone. A variant is asked
through what will run it: transformers for what it loads, the server's CPU engine for GGUF files.

    python -m ml_engineer_track evaluate [--preset tiny] [--path MODEL_FOLDER]

What is scored:
- **answer**: evidence-sentence F1 against the annotated sentences, beside what always quoting [1], the ranker's choice, gets;
  citation precision (of the marks, how many stand before a quote the cited sentence really says) and recall (of the
  statements, how many carry such a mark; after ALCE, Gao et al. 2023); how often it rightly says that the library does not
  answer, and how often it answers what can be answered;
- **decide**: accuracy over all and per action; share of valid JSON without a grammar;
- **judge**: Cohen's kappa and accuracy per rubric against the data set's labels;
- **perplexity** of the right replies, per token; left out for GGUF files, whose engine does not tell it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track.curate import CuratedData, Row
from ml_engineer_track.finetune import batches, encode, validation_loss
from ml_engineer_track.generate import generate, json_grammar, lark_grammar
from ml_engineer_track.serving import inprocess
from ml_engineer_track.serving.grammar import constraint
from shared import chat
from shared.library import load_library
from shared.metrics import Estimate, cohen_kappa, estimate, estimate_mean, set_f1
from shared.settings import Settings

#: Words of a quote that must be the cited sentence's for the citation to count as supported.
SUPPORT = 0.9
T = TypeVar("T", bound=BaseModel)
DECODINGS = ("free", "grounded")
#: figures of which models are compared row by row: the rows they are defined on do not depend on the model
PAIRED = ("grounded/evidence_f1", "grounded/decision_accuracy")


#: What a reply is held to: a grammar in Lark notation, or the JSON of a schema.
Grammar = str | type[BaseModel]


@dataclass(frozen=True)
class Scores:
    """Everything measured about one model. Keys of `figures` are `<decoding>/<metric>`, e.g. `grounded/evidence_f1`.

    `rows` holds what the means in PAIRED were taken of, a value per row in an order that is the same for every model.
    """

    model: str
    figures: dict[str, Estimate]
    samples: list[dict[str, str]]
    rows: dict[str, list[float]] = field(default_factory=dict)


class Ask(Protocol):
    """A model to be asked: greedy replies in the order of the conversations, each held to its grammar where there are any."""

    def __call__(
        self, conversations: Sequence[Sequence[chat.Message]], max_tokens: int, grammars: Sequence[Grammar] | None, what: str
    ) -> list[str]: ...


def evaluate(
    settings: Settings, data: CuratedData, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> Scores:
    """Score a loaded model on the test split (or the fixed sample of it that the settings ask for)."""
    size = settings.evaluate.batch_size

    def ask(
        conversations: Sequence[Sequence[chat.Message]], max_tokens: int, grammars: Sequence[Grammar] | None, what: str
    ) -> list[str]:
        compiled = grammars and [lark_grammar(g) if isinstance(g, str) else json_grammar(g) for g in grammars]
        return generate(model, tokenizer, conversations, max_tokens, size, compiled, f"{name}: {what}")

    scores = score(settings, data, ask, name)
    rows = [row for chosen in sampled_rows(settings, data).values() for row in chosen]
    perplexity = math.exp(min(50.0, validation_loss(model, batches(encode(rows, tokenizer), 8192, tokenizer.pad_token_id))))
    model.eval()
    scores.figures["perplexity"] = Estimate(value=perplexity, low=None, high=None, n=len(rows))
    return scores


def evaluate_served(settings: Settings, data: CuratedData, folder: Path, name: str) -> Scores:
    """Score a GGUF variant through the engine that serves it: the same rows and figures, but for the perplexity."""

    def ask(
        conversations: Sequence[Sequence[chat.Message]], max_tokens: int, grammars: Sequence[Grammar] | None, what: str
    ) -> list[str]:
        compiled = grammars and [
            constraint({"grammar": g} if isinstance(g, str) else {"json": g.model_json_schema()}) for g in grammars
        ]
        return inprocess.generate(served, conversations, max_tokens, compiled, f"{name}: {what}")

    with inprocess.started(folder) as served:
        return score(settings, data, ask, name)


def score(settings: Settings, data: CuratedData, ask: Ask, name: str) -> Scores:
    """Ask every question of the test split, free and under its grammar, and score the replies."""
    options = settings.evaluate
    texts = {s.id: s.text for leaf in load_library(settings.datasets) for s in leaf.sentences()}
    figures: dict[str, Estimate] = {}
    samples: list[dict[str, str]] = []
    by_row: dict[str, list[float]] = {}
    asked = sampled_rows(settings, data)

    def replies_to(rows: Sequence[Row], tokens: int, what: str, grammars: Sequence[Grammar] | None) -> list[str]:
        return ask([row.messages for row in rows], tokens, grammars, what)

    def mean(key: str, values: Sequence[float]) -> None:
        figures[key] = estimate_mean(values, options.bootstrap, settings.seed)
        if key in PAIRED:
            by_row[key] = list(values)

    mean("first_source/evidence_f1", [set_f1({1}, set(row.gold)) for row in asked["answer"] if row.gold])
    for decoding in DECODINGS:
        answers = asked["answer"] if decoding == "grounded" else sample(asked["answer"], options.free_rows, settings.seed)
        sources = [[chat.Source(id=sid, heading="", text=texts[sid]) for sid in row.sources] for row in answers]
        grammars = [chat.grounded_grammar(s) for s in sources] if decoding == "grounded" else None
        replies = replies_to(answers, options.max_new_tokens, f"answers, {decoding}", grammars)
        for key, values in answer_scores(answers, sources, replies).items():
            mean(f"{decoding}/{key}", values)
        samples += [
            {"decoding": decoding, "id": r.id, "question": question_of(r), "reply": reply, "right": r.reply}
            for r, reply in zip(answers[:40], replies, strict=False)
        ]

    decisions = asked["decide"]
    for decoding in DECODINGS:
        held_to = [chat.Decision] * len(decisions) if decoding == "grounded" else None
        said = [_parse(chat.Decision, reply) for reply in replies_to(decisions, 24, f"decisions, {decoding}", held_to)]
        right = [chat.Decision.model_validate_json(row.reply).action for row in decisions]
        if decoding == "free":
            mean("free/json_validity", [float(d is not None) for d in said])
        mean(f"{decoding}/decision_accuracy", [float(d is not None and d.action == a) for d, a in zip(said, right, strict=True)])
        for action in chat.ACTIONS:
            hits = [float(d is not None and d.action == a) for d, a in zip(said, right, strict=True) if a == action]
            mean(f"{decoding}/decision_accuracy_{action}", hits)

    judged = asked["judge"]
    verdicts = [_parse(chat.Verdict, reply) for reply in replies_to(judged, 32, "judgements", [chat.Verdict] * len(judged))]
    labels = [chat.Verdict.model_validate_json(row.reply) for row in judged]
    for rubric in ("grounded", "safe", "helpful"):
        pairs = [(getattr(v, rubric), getattr(g, rubric)) for v, g in zip(verdicts, labels, strict=True) if v is not None]
        weights = "quadratic" if rubric == "helpful" else "none"
        figures[f"judge/{rubric}_kappa"] = estimate(
            pairs, lambda p, w=weights: cohen_kappa(p, w), options.bootstrap, settings.seed
        )
        mean(f"judge/{rubric}_accuracy", [float(a == b) for a, b in pairs])
    return Scores(name, figures, samples, by_row)


def sampled_rows(settings: Settings, data: CuratedData) -> dict[str, list[Row]]:
    """What every model is asked, by skill."""
    counts = {
        "answer": settings.evaluate.answer_rows,
        "decide": settings.evaluate.other_rows,
        "judge": settings.evaluate.other_rows,
    }
    return {skill: sample(data.rows("test", skill), n, settings.seed) for skill, n in counts.items()}


def answer_scores(
    rows: Sequence[Row], sources: Sequence[Sequence[chat.Source]], replies: Sequence[str]
) -> dict[str, list[float]]:
    """Per-row scores of the answer skill, by metric; each metric holds only the rows it is defined on."""
    scores: dict[str, list[float]] = {
        "evidence_f1": [], "answer_rate": [], "correct_refusal": [], "citation_precision": [], "citation_recall": [],
    }  # fmt: skip
    for row, given, reply in zip(rows, sources, replies, strict=True):
        statements = chat.parse_answer(reply)
        supported = [q for q in statements if q.number and q.number <= len(given) and supports(given[q.number - 1].text, q.text)]
        cited = {q.number for q in statements if q.number}
        if row.gold:
            scores["evidence_f1"].append(set_f1(cited, set(row.gold)))
            scores["answer_rate"].append(float(bool(statements)))
        else:
            scores["correct_refusal"].append(float(bool(reply) and not statements))
        if statements:
            marks = [q for q in statements if q.number]
            scores["citation_precision"].append(len(supported) / len(marks) if marks else 0.0)
            scores["citation_recall"].append(len(supported) / len(statements))
    return scores


def supports(sentence: str, quoted: str) -> bool:
    """Does the cited sentence say what is quoted: at least SUPPORT of the quoted words, counted with repeats, are its."""
    own = sentence.lower().split()
    words = quoted.lower().split()
    found = 0
    for word in words:
        if word in own:
            own.remove(word)
            found += 1
    return bool(words) and found / len(words) >= SUPPORT


def sample(rows: list[Row], n: int, seed: int) -> list[Row]:
    """The same `n` rows for every model, chosen by the seed, in the order of the file."""
    if len(rows) <= n:
        return rows
    chosen = set(random.Random(seed).sample(range(len(rows)), n))
    return [row for i, row in enumerate(rows) if i in chosen]


def question_of(row: Row) -> str:
    """The question in an answer prompt, for showing samples."""
    return row.messages[0]["content"].split("\n\nQuestion: ")[-1]


def _parse(kind: type[T], reply: str) -> T | None:
    try:
        return kind.model_validate_json(reply)
    except ValidationError:
        return None
