"""Reads the public training text and splits it, by document, into what is trained on and what is only measured on.

Why an ML engineer keeps the split in one place: a sentence of a held-out document that slips into training makes every figure
of the model card worth nothing. One disease is in several MedQuAD files, so the split goes by its name, not by file or row.

    python -m ml_engineer_track pretrain --corpus FOLDER      (this module is part of it; it has no command of its own)
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_engineer_track.consult import Matches, match
from shared.errors import UserError

PRETRAIN_FILES = (
    "health_openstax",
    "health_biology_philschatz",
    "health_medquad_1_to_6",
    "general_openstax",
    "general_wikipedia",
    "fiction_eltec_eng",
)
#: question set -> the fields its rows must have
TASK_FILES = {
    "medquad_1_to_6": {"focus", "synonyms", "sections"},
    "squad2_16_articles": {"title", "context", "question", "is_impossible", "answers"},
    "rqe_train": {"chq", "faq", "entails"},
    "qulac": {"topic", "facet_desc", "question"},
    "in3_train": {"task", "vague"},
    "medsafety_train": {"harmful_medical_request"},
    "halueval_qa": {"knowledge", "question", "right_answer", "hallucinated_answer"},
}
HELD_OUT_SQUAD_ARTICLES = 3


@dataclass
class Corpus:
    """Public training text, split by document into what is trained on and what is only measured on.

    `documents` and `held_out` map a source name to its documents; `paragraphs` and `held_out_paragraphs` are runs of
    sentences of these; `tasks` and `held_out_tasks` hold the rows of the question sets.
    """

    documents: dict[str, list[str]]
    held_out: dict[str, list[str]]
    tasks: dict[str, list[dict[str, Any]]]
    held_out_tasks: dict[str, list[dict[str, Any]]]
    paragraphs: list[list[str]] = field(default_factory=list)
    held_out_paragraphs: list[list[str]] = field(default_factory=list)
    matches: Matches | None = None

    def add_matches(self, cache: Path | None = None) -> None:
        """Match RQE's questions, and statements, to sentences of MedQuAD and of the paragraphs (minutes, once)."""
        asked = {flat(row[key]) for row in self.tasks["rqe_train"] for key in ("chq", "faq") if len(row[key]) < 300}
        rows = self.tasks["medquad_1_to_6"]
        documents = [[s for part in row["sections"] for s in sentences(part["answer"])[:3]] for row in rows]
        documents += random.Random(0).sample(self.paragraphs, min(4000, len(self.paragraphs)))
        seen = Counter(s for d in documents for s in set(d))  # what many documents say is boilerplate, and answers nothing
        documents = [[s for s in dict.fromkeys(d) if seen[s] <= 3] for d in documents]
        self.matches = match(sorted(asked), documents, 16_000, cache)


def load_corpus(folder: Path, max_chars_per_source: int | None = None) -> Corpus:
    """Read and split the corpus. UserError, before any training, for a missing, truncated or wrongly encoded file."""
    texts = {name: _read_xz(folder / "pretrain" / f"{name}.txt.xz") for name in PRETRAIN_FILES}
    tasks = {name: _json_rows(folder / "tasks" / f"{name}.jsonl.xz", fields) for name, fields in TASK_FILES.items()}
    held_tasks: dict[str, list[dict[str, Any]]] = {}
    titles = sorted({row["title"] for row in tasks["squad2_16_articles"]}, key=_hash)
    measured = set(titles[:HELD_OUT_SQUAD_ARTICLES])
    tasks["squad2_16_articles"], held_tasks["squad2_16_articles"] = _part(
        tasks["squad2_16_articles"], lambda row: row["title"] in measured
    )
    # One disease stands in several MedQuAD files; splitting by its name keeps all of it on one side, and the same name
    # takes the text version of the document out of stage 1.
    tasks["medquad_1_to_6"], held_tasks["medquad_1_to_6"] = _part(
        tasks["medquad_1_to_6"], lambda row: _hash(row["focus"].lower()) % 20 == 0
    )
    foci = {row["focus"].lower() for row in held_tasks["medquad_1_to_6"]}
    documents, held_out = {}, {}
    for name, text in texts.items():
        lines = [line for line in text.split("\n") if line.strip()]
        if name.startswith("health_medquad"):
            lines, held_out[name] = _part(lines, lambda line: line.split(". What", 1)[0].lower() in foci)
        else:
            lines, held_out[name] = _part(lines, lambda line: _hash(line[:400]) % 100 == 0)
        documents[name] = _head(lines, max_chars_per_source)
    corpus = Corpus(documents, held_out, tasks, held_tasks)
    corpus.paragraphs, corpus.held_out_paragraphs = _all_paragraphs(documents), _all_paragraphs(held_out)
    return corpus


def sentences(text: str) -> list[str]:
    """Statements of 25 to 320 characters, in order; headings, list marks, fragments and questions are left out."""
    text = re.sub(r"==+[^=]*==+", " ", text)
    parts = re.split(r"(?<=[.!?])\s+(?=[A-Z\"“(0-9])|\s+- (?=[A-Z])", text)
    return [flat(p) for p in parts if 25 <= len(p) <= 320 and p.strip()[-1:] in ".!"]


def _all_paragraphs(documents: dict[str, list[str]]) -> list[list[str]]:
    prose = [doc for name, docs in documents.items() if not name.startswith("fiction") for doc in docs]
    return [paragraph for doc in prose for paragraph in _paragraphs(doc)]


def _paragraphs(document: str, size: int = 8) -> list[list[str]]:
    found = sentences(document)
    return [run for i in range(0, len(found), size) if len(run := found[i : i + size]) >= 3]


def flat(text: str) -> str:
    """One line, single spaces."""
    return " ".join(text.split())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _part(rows: list[Any], measured: Callable[[Any], bool]) -> tuple[list[Any], list[Any]]:
    kept, held = [], []
    for row in rows:
        (held if measured(row) else kept).append(row)
    return kept, held


def _head(lines: list[str], max_chars: int | None) -> list[str]:
    if max_chars is None:
        return lines
    kept, total = [], 0
    for line in sorted(lines, key=_hash):
        if total >= max_chars:
            break
        kept.append(line)
        total += len(line)
    return kept


def _read_xz(path: Path) -> str:
    try:
        return lzma.decompress(path.read_bytes()).decode("utf-8")
    except FileNotFoundError:
        raise UserError("corpus file is missing", str(path), "Pass CORPUS=<folder with pretrain/ and tasks/>") from None
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"corpus file is truncated or damaged ({error})", str(path), "Fetch it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"corpus file is not UTF-8 (byte {error.start})", str(path), "Convert it to UTF-8") from None


def _json_rows(path: Path, fields: set[str]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_read_xz(path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                raise UserError("line is not JSON", f"{path}:{number}", "Fetch the file again") from None
            if not isinstance(row, dict) or not fields <= set(row):
                raise UserError(f"line lacks one of {sorted(fields)}", f"{path}:{number}", "Fetch the file again")
            rows.append(row)
    return rows
