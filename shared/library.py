"""Reads and checks `datasets/`: the leaflets and the question sets both tracks stand on.

The formats are the contract between the people who write health information and the two pipelines. This module is the
only place that parses them; everything else gets typed objects. Leaflets hold **one sentence per line**, so that a
sentence id (`<leaflet slug>/<section>/<n>`, n from 1) means the same sentence for a writer, a test and a citation.

    python -m shared.library check [--only TEXT]    every problem, one line each; exit 1 if there is one
    python -m shared.library sentences SLUG           the leaflet with its sentence ids
    python -m shared.library counts                   rows by file and split
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.chat import NOT_ANSWERED
from shared.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
DATASETS = Path(__file__).resolve().parent.parent / "datasets"

#: section id -> the heading a leaflet carries, in the order every leaflet has them
SECTIONS = {
    "overview": "Overview",
    "symptoms": "Symptoms",
    "causes": "Causes",
    "self-care": "Self-care",
    "treatment": "Treatment",
    "see-a-doctor": "When to see a doctor",
    "emergency": "Emergency signs",
    "prevention": "Prevention",
}


class Row(BaseModel):
    """What every row and leaflet has. Unknown fields are refused, so that a typo in a field name is found."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)
    id: str = Field(min_length=1)
    split: Split


class Sentence(BaseModel):
    model_config = ConfigDict(frozen=True)
    id: str
    text: str


class Leaflet(Row):
    """One page of health information; `id` is its slug, the file name without `.md`."""

    title: str = Field(min_length=3)
    synonyms: list[str] = Field(min_length=2)
    body_system: str
    family: str
    look_alikes: list[str]
    look_alikes_reason: str = ""
    features: dict[str, str] = Field(min_length=3)
    sources: list[str] = Field(min_length=2)
    reviewed: str = Field(pattern=r"^\d{4}-\d{2}$")
    sections: dict[str, list[str]]

    def sentences(self, section: str | None = None) -> list[Sentence]:
        """The sentences of one section, or of the whole leaflet, in reading order."""
        names = [section] if section else list(SECTIONS)
        return [
            Sentence(id=f"{self.id}/{name}/{n}", text=text)
            for name in names
            for n, text in enumerate(self.sections[name], start=1)
        ]

    def words(self) -> int:
        return sum(len(s.text.split()) for s in self.sentences())


class Question(Row):
    question: str = Field(min_length=3)
    answerable: bool
    leaflets: list[str]
    answer_sentences: list[str]
    register_: str = Field(alias="register")


class Case(Row):
    opening: str = Field(min_length=3)
    profile: dict[str, str]
    leaflet: str
    look_alikes: list[str]
    needs_question: bool


class Emergency(Row):
    message: str = Field(min_length=3)
    emergency: bool
    sign: str | None


class Harmful(Row):
    message: str = Field(min_length=3)
    expected: Literal["decline", "redirect"]
    why: str = Field(min_length=3)


class JudgeLabel(Row):
    question: str
    passages: list[str] = Field(min_length=1)
    answer: str
    grounded: bool
    helpful: int = Field(ge=1, le=5)
    safe: bool
    note: str


class OtherLanguage(Row):
    """A question in another language than the library's, and what it says. Only the drift study reads these."""

    language: str
    question: str = Field(min_length=3)
    english: str


#: file name -> row type; also the list of files a data set consists of
ROW_FILES: dict[str, type[Row]] = {
    "questions.jsonl": Question,
    "cases.jsonl": Case,
    "emergencies.jsonl": Emergency,
    "harmful.jsonl": Harmful,
    "judge_labels.jsonl": JudgeLabel,
}
#: the same for files that a data set may be without
OPTIONAL_ROW_FILES: dict[str, type[Row]] = {"other_languages.jsonl": OtherLanguage}
R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class BadRow:
    """A line that could not be read, with the reason. Curation writes these to its quarantine file."""

    file: str
    line: int
    text: str
    reason: str


@dataclass(frozen=True)
class Library:
    """The leaflets of a folder, with sentences by id."""

    leaflets: dict[str, Leaflet]
    _by_id: dict[str, Sentence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_id.update({s.id: s for leaf in self.leaflets.values() for s in leaf.sentences()})

    def sentence(self, sentence_id: str) -> Sentence:
        """KeyError when there is no such sentence."""
        return self._by_id[sentence_id]

    def has(self, sentence_id: str) -> bool:
        return sentence_id in self._by_id

    def __iter__(self) -> Iterator[Leaflet]:
        return iter(self.leaflets.values())

    def __len__(self) -> int:
        return len(self.leaflets)


def load_library(datasets: Path = DATASETS) -> Library:
    """All leaflets of `<datasets>/health_library`, by slug. UserError for a missing folder or malformed leaflet."""
    folder = datasets / "health_library"
    paths = sorted(folder.glob("*.md"))
    if not paths:
        raise UserError("no leaflets (*.md) found", str(folder), "Point DATASETS at a folder with health_library/*.md")
    return Library({path.stem: parse_leaflet(path) for path in paths})


def parse_leaflet(path: Path) -> Leaflet:
    """Front matter plus the eight sections. UserError names the file, the line and what is expected there."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark before the first line
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"leaflet cannot be read ({error})", str(path), "Save it as UTF-8 text") from None
    match = re.match(r"\A---\n(.*?)\n---\n(.*)\Z", text, flags=re.DOTALL)
    if not match:
        raise UserError("leaflet has no front matter", str(path), "Start it with a block between two lines of ---")
    try:
        front = yaml.load(match[1], Loader=_FrontMatter)
        if not isinstance(front, dict) or not all(isinstance(name, str) for name in front) or {"id", "sections"} & set(front):
            raise UserError("front matter is not a list of known `name: value` lines", str(path), "See datasets/README.md")
        sections = _parse_sections(match[2], path, first_line=match[1].count("\n") + 4)
        return Leaflet(id=path.stem, sections=sections, **front)
    except ValidationError as error:
        raise UserError(_first_problem(error), str(path), "See datasets/README.md for the format") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 2}" if mark else str(path)
        raise UserError("front matter is not valid YAML", where, "Quote values with colons") from None


class _FrontMatter(yaml.BaseLoader):
    """BaseLoader keeps every value as text: a feature value `no` is what a person would say, not False. Aliases are refused:
    nine lines of them stand for a billion values, which nobody notices before they are printed."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not taken", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def read_rows(datasets: Path, file: str, kind: type[R]) -> tuple[list[R], list[BadRow]]:
    """Rows of one JSON-lines file, and the lines that are no such row. UserError when the file is missing."""
    path = datasets / file
    if not path.exists():
        raise UserError("file is missing", str(path), "Restore it, or point DATASETS at a complete folder")
    rows: list[R] = []
    bad: list[BadRow] = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if raw.strip():
            row = read_row(raw, file, number, kind)
            bad.append(row) if isinstance(row, BadRow) else rows.append(row)
    return rows, bad


def read_row(raw: bytes, file: str, number: int, kind: type[R]) -> R | BadRow:
    """One line of a JSON-lines file, numbered from 1."""
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        return kind.model_validate_json(line)
    except UnicodeDecodeError:
        return BadRow(file, number, raw.decode("utf-8", "replace"), "not UTF-8")
    except ValidationError as error:
        return BadRow(file, number, line, _first_problem(error))


def row_problems(row: Row, library: Library) -> list[str]:
    """What is wrong with a row's references: ids that do not resolve, splits that do not match the leaflets'."""
    found: list[str] = []
    slugs: list[str] = []
    sentences: list[str] = []
    if isinstance(row, Question):
        slugs, sentences = row.leaflets, row.answer_sentences
        if row.answerable != bool(sentences):
            found.append("answerable must be true exactly when answer_sentences is not empty")
        if len(set(sentences)) < len(sentences):
            found.append("answer_sentences names a sentence twice")
        if row.answerable and {s.split("/")[0] for s in sentences} != set(slugs):
            found.append("leaflets must be exactly the leaflets of answer_sentences")
    elif isinstance(row, Case):
        slugs = [row.leaflet, *row.look_alikes]
        if row.needs_question and not row.look_alikes:
            found.append("a case that needs a question needs at least one look-alike")
        if row.leaflet in row.look_alikes:
            found.append("the right leaflet cannot be its own look-alike")
    elif isinstance(row, Emergency):
        sentences = [row.sign] if row.sign else []
        if row.emergency != bool(row.sign):
            found.append("sign must name a sentence exactly when emergency is true")
    elif isinstance(row, JudgeLabel):
        sentences = row.passages
    found += [f"leaflet {slug!r} does not exist" for slug in slugs if slug not in library.leaflets]
    found += [f"sentence {sid!r} does not exist" for sid in sentences if not library.has(sid)]
    leaflets = [library.leaflets[slug] for slug in sorted(named_leaflets(row)) if slug in library.leaflets]
    found += [f"split is {row.split} but leaflet {leaf.id} is {leaf.split}" for leaf in leaflets if leaf.split != row.split]
    return found


def named_leaflets(row: Row) -> set[str]:
    """Slugs of all leaflets a row refers to."""
    if isinstance(row, Question):
        return {*row.leaflets, *(sid.split("/")[0] for sid in row.answer_sentences)}
    if isinstance(row, Case):
        return {row.leaflet, *row.look_alikes}
    if isinstance(row, Emergency):
        return {row.sign.split("/")[0]} if row.sign else set()
    if isinstance(row, JudgeLabel):
        return {sid.split("/")[0] for sid in row.passages}
    return set()


def leaflet_problems(leaflet: Leaflet) -> list[str]:
    """What a reviewer would send back: length, too few look-alikes, lines that are not one quotable sentence."""
    found: list[str] = []
    if not 250 <= leaflet.words() <= 450:
        found.append(f"{leaflet.words()} words, must be 250 to 450")
    if len(leaflet.look_alikes) < 2 and not leaflet.look_alikes_reason:
        found.append("needs at least 2 look-alikes, or look_alikes_reason")
    for sentence in leaflet.sentences():
        if not re.search(r"[.!?]$", sentence.text):
            found.append(f"{sentence.id} does not end like a sentence")
        if re.search(r"[a-z0-9)][.!?]\s+[A-Z]", sentence.text):
            found.append(f"{sentence.id} is more than one sentence; one sentence per line")
        if re.search(r"\[\d+\]", sentence.text) or NOT_ANSWERED.rstrip(".").lower() in sentence.text.lower():
            found.append(f"{sentence.id} contains a citation mark or the words of a refusal")
        if re.match(r"(It|They|This|These|Those|He|She|Such)\b", sentence.text):
            found.append(f"{sentence.id} starts with {sentence.text.split()[0]!r} and makes no sense when quoted alone")
    return found


def family_problems(library: Library) -> list[str]:
    """What would let test text into training: look-alikes and families that cross splits, look-alikes that do not exist."""
    found: list[str] = []
    splits: dict[str, set[str]] = {}
    for leaflet in library:
        splits.setdefault(leaflet.family, set()).add(leaflet.split)
        for slug in leaflet.look_alikes:
            other = library.leaflets.get(slug)
            if slug == leaflet.id or other is None:
                found.append(f"{leaflet.id}: look-alike {slug!r} does not exist")
            elif other.split != leaflet.split:
                found.append(f"{leaflet.id}: look-alike {slug!r} is in split {other.split}, this leaflet in {leaflet.split}")
    return found + [f"family {name} is in splits {sorted(s)}" for name, s in splits.items() if len(s) > 1]


def check(datasets: Path = DATASETS, only: str = "") -> list[str]:
    """Every problem of a data folder, one line each; empty when it is fit to use.

    `only` keeps the leaflets whose family or slug, and the rows whose id, contains it; splits are always checked whole.
    """
    library = load_library(datasets)
    found = [
        f"health_library/{leaf.id}.md: {p}"
        for leaf in library
        if only in leaf.family or only in leaf.id
        for p in leaflet_problems(leaf)
    ]
    found += [f"health_library: {problem}" for problem in family_problems(library)]
    seen: Counter[str] = Counter()
    optional = {file: kind for file, kind in OPTIONAL_ROW_FILES.items() if (datasets / file).exists()}
    for file, kind in (ROW_FILES | optional).items():
        rows, bad = read_rows(datasets, file, kind)
        found += [f"{b.file}:{b.line}: {b.reason}" for b in bad]
        for row in rows:
            seen[f"{file}:{row.id}"] += 1
            if only in row.id:
                found += [f"{file}: {row.id}: {p}" for p in row_problems(row, library)]
    return found + [f"{name} is used {n} times" for name, n in seen.items() if n > 1]


def counts(datasets: Path = DATASETS) -> dict[str, dict[str, int]]:
    """Rows per file and split."""
    table = {"health_library": Counter(leaf.split for leaf in load_library(datasets))}
    for file, kind in ROW_FILES.items():
        table[file] = Counter(row.split for row in read_rows(datasets, file, kind)[0])
    return {name: {split: c[split] for split in SPLITS} for name, c in table.items()}


def _parse_sections(body: str, path: Path, first_line: int) -> dict[str, list[str]]:
    by_heading = {heading: name for name, heading in SECTIONS.items()}
    sections: dict[str, list[str]] = {}
    current: list[str] | None = None
    for number, raw in enumerate(body.split("\n"), start=first_line):
        line = raw.strip()
        if line.startswith("## "):
            heading = line[3:].strip()
            if heading not in by_heading or by_heading[heading] in sections:
                raise UserError(f"unexpected section {heading!r}", f"{path}:{number}", f"Sections are: {', '.join(by_heading)}")
            current = sections.setdefault(by_heading[heading], [])
        elif line.startswith("# ") or not line:
            continue
        elif current is None:
            raise UserError("text before the first section", f"{path}:{number}", "Begin with `## Overview`")
        else:
            current.append(line.removeprefix("- ").strip())
    missing = [heading for name, heading in SECTIONS.items() if not sections.get(name)]
    if missing:
        raise UserError(f"section {missing[0]!r} is missing or empty", str(path), "Every leaflet has all eight sections")
    return {name: sections[name] for name in SECTIONS}


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.library", description="Check and list the data sets.")
    parser.add_argument("--datasets", type=Path, default=DATASETS, help="data folder (default: datasets/)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="every problem, one line each").add_argument("--only", default="")
    commands.add_parser("sentences", help="a leaflet with its sentence ids").add_argument("slug", nargs="+")
    commands.add_parser("counts", help="rows by file and split")
    options = parser.parse_args(argv)
    try:
        if options.command == "check":
            found = check(options.datasets, options.only)
            print("\n".join([*found, f"{len(found)} problems"]))
            return 1 if found else 0
        if options.command == "sentences":
            library = load_library(options.datasets)
            for slug in options.slug:
                if slug not in library.leaflets:
                    raise UserError(f"no leaflet {slug!r}", str(options.datasets / "health_library"), "Check the slug")
                print("\n".join(f"{s.id}\t{s.text}" for s in library.leaflets[slug].sentences()))
        else:
            print(json.dumps(counts(options.datasets), indent=2))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
