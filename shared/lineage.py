"""Where an answer came from: the model that gave it, what that model was trained on, and the leaflets it quotes.

    python -m shared.lineage ANSWER_ID [--json]

Every step is named by its content, so the way back is a chain of names: the answer's record names a model version, its manifest a
curated set, that set's rows the rows of `datasets/` they were made of, and the answer itself the sentences it quotes. A record
is found in the feedback, the outcomes, or the conversations that people have not deleted. Of a version that was trained on from
an earlier one, the earlier one's rows count, too.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from shared import chat, exchanges, feedback, outcomes
from shared.errors import UserError
from shared.files import sha256_file
from shared.handoff import Manifest, read_manifest
from shared.library import ROW_FILES, load_library, named_leaflets, read_rows
from shared.settings import load_settings
from shared.versions import datasets_version

#: how a training row is related to what an answer cites, the closest first
Relation = Literal["quotes", "shows", "about"]
SAYS: dict[Relation, str] = {
    "quotes": "teach to quote a cited sentence",
    "shows": "show one among their sources",
    "about": "are about a cited leaflet",
}
SHOWN = 8  # rows in the text; --json has all


class _Fact(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Answer(_Fact):
    """What is on record; None and empty where it is not. `seen_in` says which files it was found in."""

    id: str
    seen_in: list[str]
    time: str | None = None
    question: str | None = None
    kind: str | None = None
    text: str | None = None
    cited: list[str] = []
    passages: list[str] = []
    remarks: list[str] = []
    model: str | None = None
    index_version: str | None = None
    prompt_version: int | None = None


class CitedSentence(_Fact):
    """`unchanged`: whether it still stands in the library as it was quoted; None when it is gone from there."""

    id: str
    text: str | None
    unchanged: bool | None


class CitedLeaflet(_Fact):
    """A leaflet as it is now. None: it is gone."""

    slug: str
    split: str | None
    sha256: str | None
    sentences: list[CitedSentence]


class TrainingRow(_Fact):
    """A row of a curated set; `sentences` are the cited ones that it quotes or shows."""

    id: str
    data: str
    relation: Relation
    made_from: list[str]
    sentences: list[str]


class Model(_Fact):
    """`chain` are the version and those it was trained on from, each with the rows of its curated set."""

    version: str
    variant: str | None
    created: str
    commit: str | None
    base: str
    licence: str
    data: str
    datasets: str | None
    training: dict[str, Any]
    seed: int
    chain: list[str]
    rows: int
    labels: list[str]


class Lineage(_Fact):
    """`library` is the name of the data folder as it is now; another one than `model.datasets` has changed since."""

    answer: Answer
    model: Model | None
    library: str
    leaflets: list[CitedLeaflet]
    training_rows: list[TrainingRow]


def lineage(answer_id: str, artifacts: Path, datasets: Path) -> Lineage:
    """UserError, one line: for an answer nobody recorded, and for a model version or a curated set that is no longer there."""
    answer = find_answer(answer_id, artifacts)
    leaflets = _leaflets(answer, datasets)
    if answer.model is None:
        return Lineage(answer=answer, model=None, library=datasets_version(datasets), leaflets=leaflets, training_rows=[])
    version, _, variant = answer.model.partition(":")
    chain = _chain(version, artifacts / "models")
    rows = [(m.data.version, row) for m in chain for row in _train_rows(artifacts / "data" / m.data.version)]
    first, parents = chain[0], [getattr(m, "lineage", None) for m in chain]
    model = Model(
        version=version, variant=variant or None, created=first.created, commit=first.commit, base=first.base_model.id,
        licence=first.base_model.licence, data=first.data.version, datasets=first.data.datasets, training=first.training,
        seed=first.seed, chain=[m.version for m in chain], rows=len(rows),
        labels=[label for parent in parents if parent for label in parent.labels],
    )  # fmt: skip
    related = _related(rows, answer.cited, datasets)
    return Lineage(answer=answer, model=model, library=datasets_version(datasets), leaflets=leaflets, training_rows=related)


def find_answer(answer_id: str, artifacts: Path) -> Answer:
    """Everything that is on record about an answer. UserError when nothing is."""
    folder = artifacts / "feedback"
    remarks = [r for r in feedback.read(folder)[0] if r.answer_id == answer_id]
    shown = [o for o in outcomes.read(folder)[0] if o.answer_id == answer_id and o.arm != "shadow"]
    kept = exchanges.read(artifacts / exchanges.FILE, answer_id)
    if not (remarks or shown or kept):
        fix = "Check the id; a conversation that its owner deleted leaves no trace but its outcome and remarks"
        raise UserError(f"no answer {answer_id!r} is on record", str(artifacts), fix)
    found: dict[str, Any] = {"id": answer_id, "seen_in": []}
    if shown:
        outcome = shown[0]
        found |= {"time": outcome.time, "kind": outcome.kind, "model": outcome.model_version}
        found["seen_in"].append(outcomes.FILE)
    if kept:
        turn = kept[0].turn
        found |= {"question": kept[0].message, "kind": turn.kind, "text": turn.text, "passages": [p.id for p in turn.passages]}
        noted = {"model": turn.model_version, "index_version": turn.index_version, "prompt_version": turn.prompt_version}
        found |= {name: value for name, value in noted.items() if value}
        found["cited"] = [citation.sentence_id for citation in turn.citations]
        found["seen_in"].append(exchanges.FILE)
    if remarks:
        record = remarks[0]
        found = {"time": record.time} | found
        found |= {"question": record.question, "kind": record.turn.kind, "text": record.turn.text, "cited": record.turn.cited}
        found |= {"passages": record.passages, "model": record.model_version, "index_version": record.index_version}
        found["prompt_version"] = record.prompt_version
        found["remarks"] = [f"{r.kind}: {r.reason}".removesuffix(": ") for r in remarks]
        found["seen_in"].append(feedback.FILE)
    return Answer(**found)


def _chain(version: str, models: Path) -> list[Manifest]:
    """The manifest of a version and those of the versions it was trained on from."""
    chain: list[Manifest] = []
    while True:
        folder = models / version
        if not re.fullmatch(r"\w[\w.-]*", version) or not folder.is_dir():
            fix = "It was removed, or never published here: then only its provider knows where it comes from"
            raise UserError(f"model version {version!r} is not there", str(models), fix)
        chain.append(read_manifest(folder))
        parent = getattr(chain[-1], "lineage", None)
        if parent is None or parent.parent in {m.version for m in chain}:
            return chain
        version = parent.parent


def _train_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "train.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except OSError:
        fix = "`python -m ml_engineer_track curate` makes it again: the same data give the same name"
        raise UserError(f"data set {folder.name} is not there", str(folder.parent), fix) from None
    except ValueError:
        raise UserError("a data set is damaged (not JSON)", str(path), "Remove its folder and curate again") from None


def _leaflets(answer: Answer, datasets: Path) -> list[CitedLeaflet]:
    library = load_library(datasets)
    quoted = {said.text for said in chat.parse_answer(answer.text or "")}
    found = []
    for slug in dict.fromkeys(sid.split("/")[0] for sid in answer.cited):
        sentences = []
        for sid in (s for s in answer.cited if s.split("/")[0] == slug):
            text = library.sentence(sid).text if library.has(sid) else None
            same = None if text is None else feedback.scrub(text) in quoted or text in quoted
            sentences.append(CitedSentence(id=sid, text=text, unchanged=same))
        leaf, path = library.leaflets.get(slug), datasets / "health_library" / f"{slug}.md"
        sha256 = sha256_file(path) if leaf else None
        found.append(CitedLeaflet(slug=slug, split=leaf.split if leaf else None, sha256=sha256, sentences=sentences))
    return found


def _related(rows: Sequence[tuple[str, dict[str, Any]]], cited: Sequence[str], datasets: Path) -> list[TrainingRow]:
    """The rows that have to do with what is cited, those that teach to quote it first."""
    slugs, wanted = {sid.split("/")[0] for sid in cited}, set(cited)
    if not wanted:
        return []
    about = {
        row.id for file, kind in ROW_FILES.items() for row in read_rows(datasets, file, kind)[0] if named_leaflets(row) & slugs
    }
    found = []
    for data, row in rows:
        sources, made_from = row.get("sources", []), row.get("made_from", [])
        quoted = wanted & _quoted(row, sources)
        shown = wanted & set(sources)
        named = slugs & {sid.split("/")[0] for sid in sources} or about & set(made_from)
        relation: Relation | None = "quotes" if quoted else "shows" if shown else "about" if named else None
        if relation:
            sentences = sorted(quoted or shown)
            found.append(TrainingRow(id=row["id"], data=data, relation=relation, made_from=made_from, sentences=sentences))
    return sorted(found, key=lambda row: list(SAYS).index(row.relation))


def _quoted(row: dict[str, Any], sources: Sequence[str]) -> set[str]:
    """The sentence ids that the replies of an `answer` row quote, those of its earlier turns included."""
    if row.get("skill") != "answer":
        return set()
    replies = [*(m["content"] for m in row["messages"] if m["role"] == "assistant"), row["reply"]]
    numbers = [said.number for reply in replies for said in chat.parse_answer(reply)]
    return {sources[n - 1] for n in numbers if n is not None and 1 <= n <= len(sources)}


# --- for a person ----------------------------------------------------------------------------------------------------


def text(found: Lineage) -> str:
    """The lineage as a person reads it."""
    answer, model = found.answer, found.model
    lines = [f"answer     {answer.id}, {answer.time or 'time not recorded'} (in {', '.join(answer.seen_in)})"]
    lines += [f"asked      {_short(answer.question)}"] if answer.question else ["asked      not kept"]
    lines += [f"said       {answer.kind}: {_short(answer.text)}" if answer.text else f"said       {answer.kind}: text not kept"]
    lines += [f"remark     {_short(remark)}" for remark in answer.remarks]
    if model is None:
        lines.append("model      not recorded with this answer")
    else:
        lines.append(f"model      {model.version}, variant {model.variant or 'not recorded'}, published {model.created}")
        lines += [f"           trained on from {parent}" for parent in model.chain[1:]]
        lines.append(f"base       {model.base} ({model.licence})")
        lines.append(f"training   {', '.join(f'{k} {v}' for k, v in model.training.items() if v is not None)}; seed {model.seed}")
        lines.append(f"code       commit {model.commit or 'not recorded'}")
        changed = "" if model.datasets in (None, found.library) else f"; the folder is {found.library} by now"
        lines.append(f"data       {model.data}, made of {model.datasets or 'a folder whose version was not recorded'}{changed}")
        lines += [f"labels     {len(model.labels)} of reviewers"] if model.labels else []
    lines.append(f"index      {answer.index_version or 'not recorded'}; {len(answer.passages)} passages retrieved")
    for leaf in found.leaflets:
        lines.append(f"leaflet    {leaf.slug} ({leaf.split or 'gone from the library'}), sha256 {(leaf.sha256 or '-')[:16]}")
        for sentence in leaf.sentences:
            state = {True: "as quoted", False: "changed since, or moved", None: "no longer there"}[sentence.unchanged]
            lines.append(f"           {sentence.id}: {_short(sentence.text)} ({state})")
    if model is None or not found.leaflets:
        lines.append("rows       no sentence was cited" if not found.leaflets else "rows       not known without the model")
        return "\n".join(lines)
    counts = {kind: sum(row.relation == kind for row in found.training_rows) for kind in SAYS}
    lines.append(f"rows       of {model.rows:,} training rows " + ", ".join(f"{n} {SAYS[kind]}" for kind, n in counts.items()))
    for row in found.training_rows[:SHOWN]:
        origin = ", ".join(row.made_from) or "origin not kept"
        lines.append(f"           {row.id} {row.relation} {', '.join(row.sentences) or 'the leaflet'} (from {origin})")
    if len(found.training_rows) > SHOWN:
        lines.append(f"           and {len(found.training_rows) - SHOWN} more: --json has them all")
    return "\n".join(lines)


def _short(said: str | None, limit: int = 110) -> str:
    line = " ".join((said or "").split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.lineage", description="Where an answer came from.")
    parser.add_argument("answer_id", help="as the page and the feedback name it, a-…")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    options = parser.parse_args(argv)
    try:
        settings = load_settings()
        found = lineage(options.answer_id, settings.artifacts, settings.datasets)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(found.model_dump_json(indent=2) if options.json else text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
