"""What current model and candidate are both asked, and what each said: row by row, so that they can be compared in pairs.

Why an ML engineer asks rows of their own here instead of comparing the figures of two manifests: those were read on other days
and rows. Both versions get the same questions over the same sentences, each in the order in which its own ranker puts them,
because a version is its weights *and* its ranker. What was asked of one version once is not asked again.

Four parts: `test` (answerable questions of the frozen test split), `failures` (labels that nobody trained on), `refusals`
(questions the library does not answer, and questions whose right leaflet was taken out of the sources), and `decisions` on
emergencies and messages that only sound like one. Decisions are read as probabilities: a small model may call nothing an
emergency and still be a long way nearer to it than the next one.

Beside the emergencies of the test split stand *known* ones: those the data sets have about the leaflets that the labels speak of,
first the messages that a label is about. Both were trained on, so they say nothing of how good a model is. They say whether the
labels taught it otherwise, which a handful of wrong ones can do without moving any average.

    artifacts/loop/readings/<version>-<exam>.json
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch.nn.functional import log_softmax

from ml_engineer_track import curate as c
from ml_engineer_track.evaluate import answer_scores, sample
from ml_engineer_track.finetune import bucket, collate, encode, reply_logits
from ml_engineer_track.generate import generate, lark_grammar
from ml_engineer_track.lifecycle.collect import Collected
from ml_engineer_track.lifecycle.retrain import PREFIX, decision_rows, loop_of, question_of, share_vectors
from ml_engineer_track.models import load_model, load_tokenizer
from ml_engineer_track.ordering import ServedOrder
from ml_engineer_track.quantize import SERVED_ONLY
from ml_engineer_track.serving import inprocess
from ml_engineer_track.serving.catalog import has_openvino
from ml_engineer_track.serving.grammar import constraint
from shared import chat
from shared import library as lib
from shared.files import replace_folder, sha256_text, write_text
from shared.metrics import Estimate, estimate_mean
from shared.passages import StoredVectors, embedder
from shared.ranking import read_ranker
from shared.settings import Settings

#: names of extra questions start so; they are measured and decide nothing
EXTRA = "extra-"
#: fewer sentences than this are no search result
FEWEST_SOURCES = 3
#: names of known emergencies start so; as many are asked at most
KNOWN, MOST_KNOWN = "known-", 120


class Item(BaseModel):
    """A question over sentences in no particular order; `gold` are the ids of those that answer it."""

    model_config = ConfigDict(frozen=True)
    id: str
    part: str
    question: str
    sources: list[str]
    gold: list[str]


class Decision(BaseModel):
    model_config = ConfigDict(frozen=True)
    id: str
    messages: list[chat.Message]
    action: chat.Action


class Exam(BaseModel):
    """`extra` parts are reported, never decided on."""

    model_config = ConfigDict(frozen=True)
    items: list[Item]
    decisions: list[Decision]

    @property
    def id(self) -> str:
        return "e-" + sha256_text(self.model_dump_json())[:12]


class Reading(BaseModel):
    """What a version said. `scores`: part -> item id -> evidence F1, 1.0 for a correct refusal, or the probability of a labelled
    decision; `log_probability` of the right decision in nats, and whether it was the likeliest, by id; `samples` are the first
    replies of every part."""

    version: str
    exam: str
    scores: dict[str, dict[str, float]]
    log_probability: dict[str, float]
    decided: dict[str, float]
    samples: list[dict[str, str]]

    def figures(self, resamples: int, seed: int) -> dict[str, Estimate]:
        """Means for the manifest, by part, with intervals."""
        named = {"test": "grounded/evidence_f1", "refusals": "grounded/correct_refusal", "failures": "failures/evidence_f1"}
        found = {named.get(part, part): list(by_id.values()) for part, by_id in self.scores.items()}
        found["grounded/decision_accuracy"] = list(self.decided.values())
        return {name: estimate_mean(values, resamples, seed) for name, values in found.items()}


def make_exam(settings: Settings, ranker: Path, collected: Collected, extra: dict[str, list[lib.Question]], work: Path) -> Exam:
    """The exam of a turn. `extra` are further questions by the name of their part."""
    library = lib.load_library(settings.datasets)
    questions = [q for q in lib.read_rows(settings.datasets, "questions.jsonl", lib.Question)[0] if q.split == "test"]
    labelled = [question for label in collected.examined if (question := question_of(label, library))]
    more = [q.model_copy(update={"id": f"{EXTRA}{name}-{q.id}"}) for name, rows in extra.items() for q in rows]

    def write(target: Path) -> None:
        for path in sorted(settings.datasets.rglob("*")):
            if path.is_file() and path.name != "questions.jsonl":
                write_text(target / path.relative_to(settings.datasets), path.read_text(encoding="utf-8"))
        lines = [q.model_dump_json(by_alias=True) for q in (*questions, *labelled, *more)]
        write_text(target / "questions.jsonl", "".join(f"{line}\n" for line in lines))

    share_vectors(settings, work)
    replace_folder(work / "exam", write)
    asked = settings.curate.model_copy(update={"copies": 1, "conversations": 0, "single_share": 1.0, "max_rows": None})
    own = settings.model_copy(update={"datasets": work / "exam", "curate": asked, "artifacts": work})
    data = c.curate(own, read_ranker(ranker))
    options = loop_of(settings).gate
    test, rows = data.rows("test", "answer"), data.rows("train", "answer")
    answerable = sample([r for r in test if r.gold], options.test_rows, settings.seed)
    items = [_item(row, "test") for row in answerable]
    items += [_item(row, "failures") for row in rows if row.id.startswith(PREFIX) and row.gold]
    items += [_item(row, name) for name in extra for row in rows if row.id.startswith(f"{EXTRA}{name}-") and row.gold]
    refusals = [_item(row, "refusals") for row in (*test, *rows) if not row.gold and not row.id.startswith(EXTRA)]
    taken = [
        made for row in test if row.gold and row not in answerable and (made := _without_its_leaflet(_item(row, "refusals")))
    ]
    missing = max(0, options.refusal_rows - len(refusals))
    items += refusals + random.Random(settings.seed).sample(taken, min(missing, len(taken)))
    decided = [row for row in data.rows("test", "decide") if row.id.startswith("em-")]
    decided += [row for label in collected.examined if label.id in collected.decided for row in decision_rows(label, library, 1)]
    decisions = [_decision(row) for row in decided]
    decisions += [d.model_copy(update={"id": KNOWN + d.id}) for d in map(_decision, _known(settings, collected, data))]
    return Exam(items=items, decisions=decisions)


def take_exam(settings: Settings, exam: Exam, folders: dict[str, Path], ranker: Path, name: str) -> Reading:
    """Ask a model everything: answers through the variant that is served, decisions of the merged weights."""
    items = arranged(settings, exam.items, ranker)
    library = lib.load_library(settings.datasets)
    sources = [c.sources_of(library, item.sources) for item in items]
    replies = _answers(settings, folders, items, sources, name)
    scores: dict[str, dict[str, float]] = {}
    samples: list[dict[str, str]] = []
    for item, given, reply in zip(items, sources, replies, strict=True):
        gold = [item.sources.index(sid) + 1 for sid in item.gold]
        row = c.Row(id=item.id, split="test", skill="answer", messages=[], reply="", gold=gold)
        scored = answer_scores([row], [given], [reply])
        scores.setdefault(item.part, {})[item.id] = (scored["evidence_f1"] if gold else scored["correct_refusal"])[0]
        if len(scores[item.part]) <= 3:
            samples.append({"part": item.part, "question": item.question, "reply": reply})
    likely = decision_probabilities(folders["bf16"], exam.decisions)
    log_p = {d.id: likely[d.id][d.action] for d in exam.decisions}
    labelled = [key for key in log_p if key.startswith(PREFIX)]
    scores.setdefault("failures", {}).update({key: math.exp(log_p.pop(key)) for key in labelled})
    decided = {
        d.id: float(max(likely[d.id], key=lambda a, p=likely[d.id]: p[a]) == d.action)
        for d in exam.decisions
        if d.id in log_p and not d.id.startswith(KNOWN)
    }
    return Reading(version=name, exam=exam.id, scores=scores, log_probability=log_p, decided=decided, samples=samples)


def read_once(settings: Settings, exam: Exam, version: Path) -> Reading:
    """The reading of a published version, from disk where it was taken before."""
    path = settings.artifacts / "loop" / "readings" / f"{version.name}-{exam.id}.json"
    if path.exists():
        return Reading.model_validate_json(path.read_text(encoding="utf-8"))
    folders = {folder.name: folder for folder in version.iterdir() if folder.is_dir()}
    reading = take_exam(settings, exam, folders, version / "assets" / "ranker.json", version.name)
    keep(settings, reading)
    return reading


def keep(settings: Settings, reading: Reading) -> None:
    path = settings.artifacts / "loop" / "readings" / f"{reading.version}-{reading.exam}.json"
    write_text(path, reading.model_dump_json() + "\n")


def arranged(settings: Settings, items: Sequence[Item], ranker: Path) -> list[Item]:
    """The same items with their sources in the order in which this ranker puts them."""
    library = lib.load_library(settings.datasets)
    vectors = StoredVectors(settings.artifacts / "vectors.npz", lambda texts: embedder().embed(texts))
    order = ServedOrder(library, [item.question for item in items], read_ranker(ranker), vectors)
    return [
        item.model_copy(update={"sources": [s.id for s in order(item.question, c.sources_of(library, item.sources))]})
        for item in items
    ]


@torch.no_grad()
def decision_probabilities(model_path: Path, decisions: Sequence[Decision]) -> dict[str, dict[chat.Action, float]]:
    """Log-probability (nats) of every action among the four, by decision id."""
    model, tokenizer = load_model(str(model_path)), load_tokenizer(str(model_path))
    rows = [
        c.Row(id=d.id, split="test", skill="decide", messages=d.messages, reply=chat.to_json(chat.Decision(action=action)))
        for d in decisions
        for action in chat.ACTIONS
    ]
    examples = encode(rows, tokenizer)
    said = [0.0] * len(rows)
    for group in bucket(examples, 8192):
        if not group:
            continue
        batch = collate([examples[i] for i in group], tokenizer.pad_token_id)
        labels = batch.labels[:, -batch.keep :]
        likely = log_softmax(reply_logits(model, batch).float(), -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        for i, total in zip(group, (likely * (labels >= 0)).sum(1).tolist(), strict=True):
            said[i] = total
    four = torch.tensor(said).view(len(decisions), len(chat.ACTIONS)).log_softmax(1).tolist()
    return {d.id: dict(zip(chat.ACTIONS, row, strict=True)) for d, row in zip(decisions, four, strict=True)}


def _answers(
    settings: Settings, folders: dict[str, Path], items: Sequence[Item], sources: Sequence[list[chat.Source]], name: str
) -> list[str]:
    """Greedy replies under the grammar of the sources, through the CPU engine where there is a variant for it."""
    messages = [chat.answer_messages(item.question, given) for item, given in zip(items, sources, strict=True)]
    grammars = [chat.grounded_grammar(given) for given in sources]
    limit = settings.evaluate.max_new_tokens
    served = [variant for variant in SERVED_ONLY if variant in folders]
    if served and has_openvino():
        with inprocess.started(folders[served[0]]) as engine:
            compiled = [constraint({"grammar": g}) for g in grammars]
            return inprocess.generate(engine, messages, limit, compiled, f"exam of {name}")
    path = str(folders["bf16"])
    compiled_here = [lark_grammar(g) for g in grammars]
    size = settings.evaluate.batch_size
    return generate(load_model(path), load_tokenizer(path), messages, limit, size, compiled_here, f"exam of {name}")


def _known(settings: Settings, collected: Collected, data: c.CuratedData) -> list[c.Row]:
    """Emergencies of the training split about the leaflets of the labels; first those whose message a label is about."""
    touched = {sid.split("/")[0] for label in collected.labels for sid in (*label.passages, *label.answer_sentences)}
    asked = {label.question for label in collected.labels}
    found = [
        row
        for row in lib.read_rows(settings.datasets, "emergencies.jsonl", lib.Emergency)[0]
        if row.split == "train" and row.emergency and str(row.sign).split("/")[0] in touched
    ]
    random.Random(settings.seed).shuffle(found)
    found.sort(key=lambda row: row.message not in asked)
    wanted = {row.id for row in found[:MOST_KNOWN]}
    return [row for row in data.rows("train", "decide") if row.id.split("#")[0] in wanted]


def _decision(row: c.Row) -> Decision:
    return Decision(id=row.id, messages=row.messages, action=chat.Decision.model_validate_json(row.reply).action)


def _item(row: c.Row, part: str) -> Item:
    question = row.messages[0]["content"].split("\n\nQuestion: ")[-1]
    gold = [row.sources[n - 1] for n in row.gold]
    return Item(id=row.id, part=part, question=question, sources=row.sources, gold=gold)


def _without_its_leaflet(item: Item) -> Item | None:
    """The same question when nothing of the right leaflet was found; None when too little is left to be a search result."""
    right = {sid.split("/")[0] for sid in item.gold}
    left = [sid for sid in item.sources if sid.split("/")[0] not in right]
    return item.model_copy(update={"sources": left, "gold": []}) if len(left) >= FEWEST_SOURCES else None
