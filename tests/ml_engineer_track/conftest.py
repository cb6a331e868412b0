"""A model with random weights and the bundled tokenizer, small data, and settings that make a stage take a second."""

from __future__ import annotations

import json
import lzma
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track.consult import Matches
from ml_engineer_track.corpus import PRETRAIN_FILES, TASK_FILES, Corpus, load_corpus
from ml_engineer_track.curate import CuratedData, curate
from ml_engineer_track.models import load_model, load_tokenizer
from ml_engineer_track.reading import Exercises
from shared.library import ROW_FILES
from shared.passages import DIMENSIONS
from shared.ranking import Ranker
from shared.settings import BASE_MODEL, OVERRIDES, ROOT, Settings, load_settings

#: every how many-th row of a real file goes into the small copy
THINNING = {"questions.jsonl": 40, "cases.jsonl": 12, "emergencies.jsonl": 12, "harmful.jsonl": 4, "judge_labels.jsonl": 10}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that is set up for a run must not change what is tested; and nothing here needs a hub."""
    for variable in (*OVERRIDES, "PRESET"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for programs that a test starts
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def micro_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of two layers with random weights: every code path, none of the waiting."""
    folder = tmp_path_factory.mktemp("models") / "micro"
    tokenizer = load_tokenizer(str(BASE_MODEL))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def micro(micro_path: str) -> PreTrainedModel:
    """A fresh float32 copy for a test to use up."""
    return load_model(micro_path, torch.float32)


@pytest.fixture(scope="session")
def tokenizer(micro_path: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(micro_path)


@pytest.fixture(scope="session")
def small_datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All real leaflets and a thin sample of the real rows, every split included."""
    folder = tmp_path_factory.mktemp("small") / "datasets"
    shutil.copytree(ROOT / "datasets" / "health_library", folder / "health_library")
    for file in ROW_FILES:
        by_split: dict[str, list[str]] = {}
        for line in (ROOT / "datasets" / file).read_text(encoding="utf-8").splitlines():
            by_split.setdefault(json.loads(line)["split"], []).append(line)
        kept = [line for lines in by_split.values() for line in lines[:: THINNING[file]]]
        (folder / file).write_text("\n".join(kept) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_settings(micro_path: str, small_datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The smoke preset on the micro model and the small data, with artifacts of its own."""
    artifacts = tmp_path_factory.mktemp("artifacts")
    made = load_settings("smoke", model=micro_path, artifacts=artifacts, datasets=small_datasets)
    return made.model_copy(update={"curate": made.curate.model_copy(update={"max_rows": None, "max_prompt_tokens": 500})})


#: orders sources by nearness in meaning and shared words, whatever passage they are from
RANKER = Ranker(
    embedder="words",
    passage=dict.fromkeys(("meaning", "best_sentence", "words", "document_words", "section"), 0.0),
    sentence={"passage": 0.0, "meaning": 1.0, "words": 1.0},
    sections={},
    trained_on="nothing",
    questions=0,
)


class WordVectors:
    """Stands in for the sentence model where only speed matters: the 6,000 texts of the library take it a minute."""

    def embed(self, texts: Sequence[str], done: Callable[[int], Any] = lambda n: None) -> np.ndarray:
        vectors = np.full((len(texts), DIMENSIONS), 1e-3, dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in text.lower().split():
                row[crc32(word.encode()) % DIMENSIONS] += 1
        done(len(texts))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="session", autouse=True)
def _quick_vectors() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ml_engineer_track.curate.embedder", WordVectors)
        yield


@pytest.fixture(scope="session")
def small_data(small_settings: Settings) -> CuratedData:
    return curate(small_settings, RANKER)


@pytest.fixture
def make_settings(micro_path: str, mini_datasets: Path, tmp_path: Path) -> Callable[..., Settings]:
    """Settings on the micro model and the mini data; parts are changed by name: make_settings(finetune={"epochs": 2})."""

    def make(**changes: Any) -> Settings:
        given = {"model": micro_path, "artifacts": tmp_path / "artifacts", "datasets": mini_datasets}
        given |= {k: changes.pop(k) for k in list(changes) if k in ("model", "artifacts", "datasets", "seed", "method")}
        made = load_settings("smoke", **given)
        made = made.model_copy(update={"curate": made.curate.model_copy(update={"max_rows": None})})
        return made.model_copy(update={name: getattr(made, name).model_copy(update=part) for name, part in changes.items()})

    return make


# --- a corpus for reading and pretraining ----------------------------------------------------------------------------

NOUNS = "kidney liver lung river engine garden nerve muscle candle bridge vessel market forest signal crystal".split()
VERBS = "carries filters moves protects warms guides holds changes".split()
THINGS = "blood water heat light oxygen sugar salt air".split()


def write_corpus(folder: Path) -> Path:
    """All files of a corpus in their formats, with a few hundred made-up sentences."""
    rng = random.Random(0)

    def sentence() -> str:
        noun, verb, thing = rng.choice(NOUNS), rng.choice(VERBS), rng.choice(THINGS)
        place = f"part {rng.randint(1, 900)} of the old {rng.choice(NOUNS)}"
        return rng.choice((f"The {noun} {verb} {thing} through {place}.", f"A {noun} is a thing that {verb} {thing} in {place}."))

    def text(n: int) -> str:
        return " ".join(sentence() for _ in range(n))

    foci = [f"Disease {rng.choice(NOUNS)} {n}" for n in range(60)]
    for name in PRETRAIN_FILES:
        if name.startswith("health_medquad"):
            documents = [f"{focus}. What is {focus}? {text(6)}" for focus in foci]
        else:
            documents = [text(12) for _ in range(250)]
        _write_xz(folder / "pretrain" / f"{name}.txt.xz", documents)
    contexts = [text(5) for _ in range(40)]
    titles = [f"Article {n}" for n in range(8)]
    rows: dict[str, list[dict[str, Any]]] = {
        "squad2_16_articles": [
            {"title": titles[i % 8], "context": c, "question": f"What is said in {i}?", "is_impossible": i % 4 == 0,
             "answers": [] if i % 4 == 0 else [c.split(". ")[1][4:20]]}
            for i, c in enumerate(contexts)
        ],
        "medquad_1_to_6": [
            {"focus": focus, "synonyms": [f"{focus} illness"] if n % 2 else [],
             "sections": [{"qtype": kind, "question": f"What are the {kind} of {focus}?", "answer": text(3)}
                          for kind in ("symptoms", "causes", "treatment")]}
            for n, focus in enumerate(foci)
        ],
        "rqe_train": [
            {"chq": f"Hello, my {n} has trouble with {t}, help?", "faq": f"How does a {n} deal with {t}?", "entails": i % 2 == 0}
            for i, (n, t) in enumerate((n, t) for n in NOUNS for t in THINGS)
        ],
        "qulac": [{"topic": n, "facet_desc": f"the age of the {n}", "question": f"Do you mean an old {n}?"} for n in NOUNS],
        "in3_train": [{"task": f"Find me a {n}", "vague": i % 2 == 0} for i, n in enumerate(NOUNS)],
        "medsafety_train": [{"harmful_medical_request": f"How can I harm a {n}?"} for n in NOUNS],
        "halueval_qa": [
            {"knowledge": text(2), "question": f"What is {n}?", "right_answer": "A thing.", "hallucinated_answer": "A king."}
            for n in NOUNS
        ],
    }  # fmt: skip
    for name in TASK_FILES:
        _write_xz(folder / "tasks" / f"{name}.jsonl.xz", [json.dumps(row) for row in rows[name]])
    return folder


def _write_xz(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(("\n".join(lines) + "\n").encode(), preset=1))


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def corpus(corpus_folder: Path) -> Corpus:
    """That corpus, with matches of the kind a sentence model gives."""
    corpus = load_corpus(corpus_folder)
    corpus.matches = made_up_matches(corpus.paragraphs[:60])
    return corpus


def made_up_matches(documents: list[list[str]], each: int = 60) -> Matches:
    """`each` questions and as many statements; the two sentences around the nearest one are hardly less near, all others clearly.

    A statement's nearest sentence stands before it, and it is never matched to itself, as `match` has it.
    """
    sentences = [s for d in documents for s in d]
    rng, nearest, width = np.random.default_rng(0), [], len(sentences) - 4
    best = rng.choice(np.arange(1, len(sentences) - 2), 2 * each, replace=False)
    for number, first in enumerate(best):
        near = [first, first + 2, first - 1]
        itself = first + 1 if number >= each else -1
        nearest.append([*near, *(i for i in rng.permutation(len(sentences)) if i not in near and i != itself)][:width])
    cosine = np.tile(np.concatenate([[0.9, 0.85, 0.8], np.linspace(0.7, 0.1, width - 3)]), (2 * each, 1))
    questions = [f"could somebody tell me about number {n}?" for n in range(each)] + [sentences[i + 1] for i in best[each:]]
    return Matches(questions, each, sentences, [i for i, d in enumerate(documents) for _ in d], np.array(nearest), cosine)


@pytest.fixture(scope="session")
def exercises(corpus: Corpus) -> Exercises:
    return Exercises(corpus)


@pytest.fixture(scope="session")
def pretrained(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a finished run of the test edition."""
    from ml_engineer_track import pretrain as pt

    work = tmp_path_factory.mktemp("pretrain")
    pt.pretrain(corpus_folder, pt.EDITIONS["test"], work)
    return work


@pytest.fixture(scope="session")
def own(pretrained: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of that run."""
    return AutoTokenizer.from_pretrained(pretrained / "tokenizer")
