"""Builds the index: documents, cut into passages, embedded, and stored so that they are found by meaning.

Why an AI engineer does this with so much care: the index is the product's knowledge, and it changes under a running
service. So unchanged texts are not embedded again, what was deleted disappears, a new index is built beside the old one and
becomes visible by one rename, and an index that does not fit the code is refused instead of answering badly.

    python -m ai_engineer_track ingest            CORPUS=folder for your own documents

    artifacts/index/current                       one line: the version in use
    artifacts/index/<version>/passages.json       the passages, in reading order
    artifacts/index/<version>/vectors.npy         (units, 384) float32, unit length; rows as in `passages.unit_texts`
    artifacts/index/<version>/chroma/             the same vectors in Chroma, for search by meaning with filters
    artifacts/index/<version>/index.json          what it was built with; written last, so without it an index is not whole
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
from chromadb.config import Settings as ChromaSettings
from chromadb.errors import ChromaError
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from tqdm import tqdm

from ai_engineer_track.documents import read_corpus
from ai_engineer_track.settings import AiSettings
from shared.errors import UserError
from shared.files import locked, need_disk, sha256_file, sha256_text, write_json, write_text
from shared.passages import DIMENSIONS, Passage, StoredVectors, embedder, unit_texts
from shared.sqlite import is_sound

FORMAT = 1
REBUILD = "Run `python -m ai_engineer_track ingest`"
_PASSAGES = TypeAdapter(list[Passage])
COLLECTION = "units"
SELF_TESTS = 8
log = logging.getLogger(__name__)


class IngestReport(BaseModel):
    """What an ingest did. `added`, `removed` and `unchanged` count passages; `embedded` counts texts the model had to read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: str
    passages: int
    added: int
    removed: int
    unchanged: int
    embedded: int
    skipped: list[tuple[str, str]]
    seconds: float


class IndexInfo(BaseModel):
    """`index.json`: what the index was built with, and what its files must hash to."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int
    version: str
    embedder: str
    units: int
    files: dict[str, str]


def ingest(settings: AiSettings) -> IngestReport:
    """Bring the index up to date with the corpus. UserError when there is nothing to index or another ingest is at work."""
    started = time.perf_counter()
    root = settings.artifacts / "index"
    with locked(root, "another ingest is at work"):
        passages, skipped = read_corpus(settings.corpus_path)
        if not passages:
            why = f" ({skipped[0][0]}: {skipped[0][1]})" if skipped else ""
            raise UserError(f"no document could be read{why}", str(settings.corpus_path), "Point CORPUS at a folder with text")
        texts = [text for passage in passages for text in unit_texts(passage)]
        need_disk(root, 50_000_000 + 12 * DIMENSIONS * len(texts))
        old, known = _previous(root)
        stored = StoredVectors(settings.artifacts / "vectors.npz", embedder().embed)  # the ML track may have embedded the library
        vectors, embedded = _embed(texts, {**stored.known(texts), **known})
        version = _version(passages)
        if not _is_whole(root / version):
            _build(root / version, passages, vectors)
        write_text(root / "current", version + "\n")
        _tidy(root, keep={version, old.version if old else version})
    before = {p.id: p for p in old.passages.values()} if old else {}
    unchanged = sum(before.get(p.id) == p for p in passages)
    return IngestReport(
        version=version, passages=len(passages), added=len(passages) - unchanged, removed=len(before) - unchanged,
        unchanged=unchanged, embedded=embedded, skipped=skipped, seconds=time.perf_counter() - started,
    )  # fmt: skip


class Index:
    """A whole index, opened for reading. Safe to use from several threads."""

    def __init__(self, folder: Path, info: IndexInfo) -> None:
        self.folder, self.version = folder, info.version
        found = _PASSAGES.validate_json((folder / "passages.json").read_bytes())
        #: passages by id, in reading order
        self.passages: dict[str, Passage] = {p.id: p for p in found}
        #: (units, 384): for every passage in order, first the whole of it, then its sentences
        self.vectors: np.ndarray = np.load(folder / "vectors.npy")
        #: the passage of each row of `vectors`
        self._owners = [p.id for p in found for _ in range(len(p.sentences) + 1)]
        self._client = _client(folder)
        try:
            self._units = self._client.get_collection(COLLECTION, embedding_function=None)
            if self._units.count() != info.units or len(self.vectors) != info.units:
                raise UserError("the index is damaged (vectors are missing)", str(folder), REBUILD)
        except BaseException:
            self.close()
            raise
        self.embed_query = lru_cache(maxsize=1024)(self._embed_query)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, (len(texts), 384) float32."""
        return embedder().embed(texts)

    def dense(self, query_vector: np.ndarray, n: int, where: dict[str, Any] | None = None) -> list[tuple[str, float]]:
        """The `n` passages nearest in meaning, best first, with the cosine of their nearest unit.

        `where` is a Chroma filter over document, section, family, source and passage, e.g. `{"section": "self-care"}`.
        UserError for a filter Chroma does not understand.
        """
        total = self._units.count()
        wanted = min(total, 4 * n)
        while True:
            query: dict[str, Any] = {"query_embeddings": [query_vector.tolist()], "n_results": wanted, "where": where}
            try:
                with _filter_errors(where):
                    found = self._units.query(**query, include=["metadatas", "distances"])
            except UserError:
                raise
            except Exception as error:  # Chroma raises whatever its database and its Rust bindings stumble over
                log.error("Chroma failed; searching the vectors in memory", extra={"facts": {"type": type(error).__name__}})
                return self.exact(query_vector, n)
            best: dict[str, float] = {}
            for data, distance in zip((found["metadatas"] or [[]])[0], (found["distances"] or [[]])[0], strict=True):
                best.setdefault(str(data["passage"]), 1.0 - float(distance))
            if len(best) >= n or len(found["ids"][0]) < wanted or wanted == total:
                return list(best.items())[:n]
            wanted = min(total, 4 * wanted)

    def exact(self, query_vector: np.ndarray, n: int) -> list[tuple[str, float]]:
        """The same as `dense` without a filter, from the vectors in memory: what is left when Chroma's files are damaged."""
        best: dict[str, float] = {}
        for unit in np.argsort(-(self.vectors @ query_vector)):
            best.setdefault(self._owners[unit], float(self.vectors[unit] @ query_vector))
            if len(best) == n:
                break
        return list(best.items())

    def is_sound(self) -> bool:
        """Does Chroma find what was put in? A few vectors, evenly spread, must each find themselves."""
        for unit in np.linspace(0, len(self.vectors) - 1, SELF_TESTS).astype(int):
            found = self._units.query(query_embeddings=[self.vectors[unit].tolist()], n_results=1, include=["distances"])
            if (found["distances"] or [[1.0]])[0][0] > 1e-3:
                return False
        return True

    def matching(self, where: dict[str, Any]) -> set[str]:
        """Ids of the passages a filter lets through."""
        with _filter_errors(where):
            found = self._units.get(where=where, include=["metadatas"])
        return {str(data["passage"]) for data in found["metadatas"] or []}

    def close(self) -> None:
        """Give the files back. The index cannot be searched afterwards."""
        self._client.close()

    def _embed_query(self, text: str) -> np.ndarray:
        vector: np.ndarray = self.embed([text])[0]
        vector.setflags(write=False)  # it is shared by everyone who asks the same
        return vector


def open_index(settings: AiSettings) -> Index:
    """The current index. UserError, with what to run, when it is missing, damaged or made with other code or another model."""
    root = settings.artifacts / "index"
    try:
        version = (root / "current").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise UserError("there is no index yet", str(root), REBUILD) from None
    except UnicodeDecodeError:
        raise UserError("the pointer is damaged", str(root / "current"), REBUILD) from None
    folder = root / version
    if not version or "/" in version or not folder.is_dir():
        raise UserError(f"current points to {version!r}, which does not exist", str(root / "current"), REBUILD)
    info = _checked(folder)
    if info.embedder != embedder().id:
        raise UserError(f"the index was made with another embedding model ({info.embedder})", str(folder), REBUILD)
    try:
        return Index(folder, info)
    except UserError:
        raise
    except Exception as error:  # Chroma raises whatever its database and its Rust bindings stumble over
        raise UserError(f"the index is damaged ({type(error).__name__})", str(folder), REBUILD) from None


# --- building --------------------------------------------------------------------------------------------------------


def _embed(texts: Sequence[str], known: dict[str, np.ndarray]) -> tuple[np.ndarray, int]:
    """Vectors of all texts, and how many of them were not `known`."""
    new = list(dict.fromkeys(text for text in texts if text not in known))
    if new:
        with tqdm(total=len(new), desc="  ingest: embedding", delay=2, leave=False, disable=None) as bar:
            known = {**known, **dict(zip(new, embedder().embed(new, bar.update), strict=True))}
    return np.stack([known[text] for text in texts]), len(new)


def _build(folder: Path, passages: Sequence[Passage], vectors: np.ndarray) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # a damaged or half-built one of the same version
    folder.mkdir(parents=True)
    try:
        write_text(folder / "passages.json", _PASSAGES.dump_json(list(passages), indent=1).decode())
        np.save(folder / "vectors.npy", vectors)
        _fill_chroma(folder, passages, vectors)
        files = {name: sha256_file(folder / name) for name in ("passages.json", "vectors.npy")}
        info = IndexInfo(format=FORMAT, version=folder.name, embedder=embedder().id, units=len(vectors), files=files)
        write_json(folder / "index.json", info.model_dump())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fill_chroma(folder: Path, passages: Sequence[Passage], vectors: np.ndarray) -> None:
    ids, data = [], []
    for passage in passages:
        facts = {"passage": passage.id, "document": passage.document, "section": passage.section, "source": passage.source}
        if passage.family:
            facts["family"] = passage.family
        for n in range(len(passage.sentences) + 1):
            ids.append(f"{passage.id}#{n}")
            data.append(facts)
    client = _client(folder)
    try:
        # Fusion and reranking look at up to a few hundred units, more than the default width of the search.
        hnsw: Any = {"hnsw": {"space": "cosine", "ef_search": 400, "ef_construction": 200}}
        units = client.create_collection(COLLECTION, configuration=hnsw, embedding_function=None)
        size = client.get_max_batch_size()
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            units.add(ids=ids[part], embeddings=vectors[part], metadatas=data[part])
    finally:
        client.close()


def _version(passages: Sequence[Passage]) -> str:
    """Named by content: the same passages under the same model are the same index."""
    return f"i-{sha256_text(json.dumps([FORMAT, embedder().id, _PASSAGES.dump_python(list(passages), mode='json')]))[:12]}"


class _Old(BaseModel):
    version: str
    passages: dict[str, Passage]


def _previous(root: Path) -> tuple[_Old | None, dict[str, np.ndarray]]:
    """The last index's passages, and its vectors by text; nothing when there is none that can be used."""
    try:
        version = (root / "current").read_text(encoding="utf-8").strip()
        info = _checked(root / version)
        passages = _PASSAGES.validate_json((root / version / "passages.json").read_bytes())
        vectors = np.load(root / version / "vectors.npy")
    except (UserError, OSError, ValueError):
        return None, {}
    old = _Old(version=version, passages={p.id: p for p in passages})
    texts = [text for passage in passages for text in unit_texts(passage)]
    if info.embedder != embedder().id or len(texts) != len(vectors):
        return old, {}
    return old, dict(zip(texts, vectors, strict=True))


def _checked(folder: Path) -> IndexInfo:
    """The description of an index whose files are as they were written. UserError says what is wrong with it."""
    try:
        info = IndexInfo.model_validate_json((folder / "index.json").read_bytes())
        wrong = [name for name, expected in info.files.items() if sha256_file(folder / name) != expected]
    except (OSError, ValidationError):
        raise UserError("the index is damaged or of another format", str(folder), REBUILD) from None
    if wrong:
        raise UserError(f"the index is damaged ({wrong[0]} is not what was written)", str(folder), REBUILD)
    if info.format != FORMAT:
        raise UserError(f"the index has format {info.format}, this code reads {FORMAT}", str(folder), REBUILD)
    return info


def _is_whole(folder: Path) -> bool:
    try:
        index = Index(folder, _checked(folder))
        sound = index.is_sound()
        index.close()
    except Exception:  # as in `open_index`
        return False
    return sound and is_sound(folder / "chroma" / "chroma.sqlite3")


def _tidy(root: Path, keep: set[str]) -> None:
    """Remove versions nobody uses. The one before stays, because a running service may have it open."""
    for folder in root.iterdir():
        if folder.is_dir() and folder.name not in keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _filter_errors(where: dict[str, Any] | None) -> Iterator[None]:
    try:
        yield
    except (ChromaError, ValueError) as error:
        if where is None:
            raise
        raise UserError(f"filter not understood: {where}", "where", 'Use for example {"section": "self-care"}') from error


def _client(folder: Path) -> Any:
    options = ChromaSettings(anonymized_telemetry=False)
    return chromadb.PersistentClient(path=str(folder / "chroma"), settings=options)
