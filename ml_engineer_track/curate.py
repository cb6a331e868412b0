"""Turns leaflets and question sets into training rows, and says what it threw away.

Why an ML engineer does this first: a model learns what the rows show, mistakes included. So references are checked,
duplicates dropped (test rows win over training rows), prompts built with *hard* negatives, and every rejected row is
kept in a quarantine file with its reason.

    python -m ml_engineer_track curate [--preset tiny]

Four skills come out, laid out by `shared.chat`: **answer** from numbered sentences, **decide** what to do, **clarify**
with one question, **judge** an answer. The result is a data version: a folder named by the hash of its contents.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import bm25s
from datasketch import MinHash, MinHashLSH
from pydantic import BaseModel

from ml_engineer_track.models import load_tokenizer
from ml_engineer_track.ordering import ServedOrder
from ml_engineer_track.progress import progress, watched
from ml_engineer_track.reading import change_fact
from shared import chat
from shared import library as lib
from shared.errors import UserError
from shared.files import need_disk, read_jsonl, sha256_tree, write_json, write_jsonl
from shared.passages import StoredVectors, embedder
from shared.ranking import Ranker
from shared.settings import Settings
from shared.versions import datasets_version

#: Times a harmful request is shown in training, each time with other leaflets: few rows, and the gravest mistakes.
HARMFUL_SHOWN = 3
#: Hash functions of a MinHash signature.
PERMUTATIONS = 64
Skill = Literal["answer", "decide", "clarify", "judge"]


class Row(BaseModel):
    """One training or test example. `sources` are sentence ids in prompt order; `gold` the numbers (from 1) to quote.

    `messages` may hold earlier turns; the assistant's are replies to learn, like the last one. `made_from` are the ids of the
    rows of `datasets/` it was made of; empty in data versions that were written before ids were kept.
    """

    id: str
    split: lib.Split
    skill: Skill
    messages: list[chat.Message]
    reply: str
    sources: list[str] = []
    gold: list[int] = []
    made_from: list[str] = []


@dataclass(frozen=True)
class CuratedData:
    """A data version on disk: `train.jsonl`, `validation.jsonl`, `test.jsonl`, `quarantine.jsonl`, `report.json`.

    `datasets` names the data folder it was made of (`shared/versions.py`); None in versions from before that was kept.
    """

    version: str
    folder: Path
    counts: dict[str, dict[str, int]]
    dropped: dict[str, int]
    datasets: str | None = None

    def rows(self, split: lib.Split, skill: Skill | None = None) -> list[Row]:
        rows = [Row.model_validate(r) for r in read_jsonl(self.folder / f"{split}.jsonl")]
        return [r for r in rows if skill is None or r.skill == skill]


@dataclass
class _Pool:
    """Leaflets a split may show, with a BM25 index over their sections and one over whole leaflets."""

    library: lib.Library
    split: lib.Split
    order: ServedOrder
    passages: list[list[chat.Source]] = field(default_factory=list)
    leaflets: list[lib.Leaflet] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Training prompts never show a test leaflet; a test prompt may show any, as the product will.
        allowed = {"train": ("train",), "validation": ("train", "validation"), "test": lib.SPLITS}[self.split]
        self.leaflets = [leaf for leaf in self.library if leaf.split in allowed]
        self.passages = [section_sources(leaf, name) for leaf in self.leaflets for name in lib.SECTIONS]
        texts = [" ".join([p[0].heading, *(s.text for s in p)]) for p in self.passages]
        self._sections = _index(texts)
        self._leaflets = _index(
            [" ".join([leaf.title, *leaf.synonyms, *(s.text for s in leaf.sentences())]) for leaf in self.leaflets]
        )

    def nearest_passages(self, text: str, k: int) -> list[list[chat.Source]]:
        return [self.passages[i] for i in _search(self._sections, text, min(k, len(self.passages)))]

    def nearest_titles(self, text: str, k: int) -> list[str]:
        return [self.leaflets[i].title for i in _search(self._leaflets, text, min(k, len(self.leaflets)))]


def curate(settings: Settings, ranker: Ranker) -> CuratedData:
    """Check, clean and lay out everything in `settings.datasets`; `ranker` orders the sources of a prompt, as it will in use.

    UserError for broken leaflets or references.
    """
    need_disk(settings.artifacts, 50_000_000)
    library = lib.load_library(settings.datasets)
    if problems := lib.family_problems(library):
        raise UserError(problems[0], str(settings.datasets / "health_library"), "Run `python -m shared.library check`")
    quarantine: list[dict[str, Any]] = []
    raw = {file: _load(settings.datasets, file, kind, library, quarantine) for file, kind in lib.ROW_FILES.items()}
    raw["questions.jsonl"] = _drop_duplicates(raw["questions.jsonl"], settings.curate.near_duplicate, quarantine)

    asked = [question.question for question in raw["questions.jsonl"]]
    units = sum(len(lib.SECTIONS) + len(list(leaf.sentences())) for leaf in library)
    with progress("curate: embedding", total=units + len(asked)) as bar:
        vectors = StoredVectors(settings.artifacts / "vectors.npz", lambda texts: embedder().embed(texts, bar.update))
        order = ServedOrder(library, asked, ranker, vectors)
    tokenizer = load_tokenizer(settings.model_path)
    rows: dict[lib.Split, list[Row]] = {}
    for split in lib.SPLITS:
        pool = _Pool(library, split, order)
        built = list(_build(raw, pool, settings))
        rows[split] = _fit(built, tokenizer, settings.curate.max_prompt_tokens, quarantine)
        if settings.curate.max_rows:
            rows[split] = _spread(rows[split], settings.curate.max_rows)
        if not rows[split]:
            raise UserError(
                f"no {split} rows are left after curation", str(settings.datasets), "Raise max_prompt_tokens, or add rows"
            )
    return write_version(rows, quarantine, settings.artifacts / "data", datasets_version(settings.datasets))


def load_curated(folder: Path) -> CuratedData:
    """A data version written earlier. UserError when the folder is none."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        raise UserError("not a curated data version", str(folder), "Run `python -m ml_engineer_track curate`") from None
    return CuratedData(folder.name, folder, report["counts"], report["dropped"], report.get("datasets"))


def section_sources(leaflet: lib.Leaflet, section: str) -> list[chat.Source]:
    """The sentences of a section as numbered sources with their heading, e.g. `Migraine: Self-care`."""
    heading = f"{leaflet.title}: {lib.SECTIONS[section]}"
    return [chat.Source(id=s.id, heading=heading, text=s.text) for s in leaflet.sentences(section)]


# --- the four skills -------------------------------------------------------------------------------------------------


def _build(raw: dict[str, list[Any]], pool: _Pool, settings: Settings) -> Iterable[Row]:
    split, copies = pool.split, settings.curate.copies if pool.split == "train" else 1
    mine = {file: [row for row in rows if row.split == split] for file, rows in raw.items()}
    for copy in range(copies):
        if split == "train":
            yield from _conversations(mine["questions.jsonl"], copy, pool, settings)
        for question in watched(mine["questions.jsonl"], f"curate {split}"):
            rng = random.Random(f"{settings.seed}/{question.id}/{copy}")
            if split != "train" or not question.answerable or rng.random() < settings.curate.single_share:
                yield _answer_row(question, copy, pool, rng, settings.curate.max_sources)
            if rng.random() < 0.15:  # questions are many; decisions need every action
                yield _decide_row(question.id, copy, question.question, "answer", question.leaflets, pool, rng)
        for case in mine["cases.jsonl"]:
            rng = random.Random(f"{settings.seed}/{case.id}/{copy}")
            action: chat.Action = "clarify" if case.needs_question else "answer"
            yield _decide_row(case.id, copy, case.opening, action, [case.leaflet, *case.look_alikes], pool, rng)
            if case.needs_question and (made := _clarify_row(case, copy, pool, rng)):
                yield made
        for message in mine["emergencies.jsonl"]:
            rng = random.Random(f"{settings.seed}/{message.id}/{copy}")
            action = "escalate" if message.emergency else "answer"
            near = [message.sign.split("/")[0]] if message.sign else []
            yield _decide_row(message.id, copy, message.message, action, near, pool, rng)
        for request in mine["harmful.jsonl"]:
            for again in range(HARMFUL_SHOWN if split == "train" else 1):
                rng = random.Random(f"{settings.seed}/{request.id}/{copy}/{again}")
                yield _decide_row(request.id, HARMFUL_SHOWN * copy + again, request.message, "decline", [], pool, rng)
        for label in mine["judge_labels.jsonl"]:
            yield _judge_row(label, copy, pool)
            if split == "train":
                yield from _changed_judge_rows(label, copy, pool, random.Random(f"{settings.seed}/{label.id}/{copy}"))


def _answer_row(question: lib.Question, copy: int, pool: _Pool, rng: random.Random, max_sources: int) -> Row:
    """Gold sections among hard negatives: what BM25 finds for the question, other sections, look-alikes' same section.

    One training row in thirty loses its right leaflet altogether and becomes one the library does not answer. (With one in
    ten the bundled model learned to refuse nearly everything: refusing was likelier than any one of the sentences.)
    """
    gold_ids = set(question.answer_sentences)
    withheld = pool.split == "train" and bool(gold_ids) and rng.random() < 1 / 30
    if withheld:
        gold_ids = set()
    sections = dict.fromkeys(sid.rsplit("/", 1)[0] for sid in question.answer_sentences)
    chosen = [] if withheld else [_section(pool, key) for key in sections]
    negatives = pool.nearest_passages(question.question, 8)
    for slug in question.leaflets:
        leaf = pool.library.leaflets[slug]
        names = {key.split("/")[1] for key in sections} or {rng.choice(list(lib.SECTIONS))}
        negatives += [section_sources(pool.library.leaflets[other], n) for other in leaf.look_alikes for n in names]
        if not withheld:
            negatives += [section_sources(leaf, n) for n in rng.sample(list(lib.SECTIONS), 2)]
    rng.shuffle(negatives)
    left_out = set(question.leaflets) if withheld else set()
    for passage in negatives:
        key, slug = passage[0].id.rsplit("/", 1)[0], passage[0].id.split("/")[0]
        size = sum(map(len, chosen))
        if key not in {p[0].id.rsplit("/", 1)[0] for p in chosen} and slug not in left_out and size + len(passage) <= max_sources:
            chosen.append(passage)
    sources = pool.order(question.question, [s for passage in chosen for s in passage][: chat.MAX_SOURCES])
    # Evidence is quoted in the order the annotator gave it: the most direct sentence first.
    numbers = {s.id: n for n, s in enumerate(sources, start=1)}
    gold = [numbers[sid] for sid in question.answer_sentences if sid in gold_ids]
    return Row(
        id=f"{question.id}#{copy}", split=pool.split, skill="answer",
        messages=chat.answer_messages(question.question, sources), reply=chat.answer_text(gold, sources),
        sources=[s.id for s in sources], gold=gold, made_from=[question.id],
    )  # fmt: skip


def _conversations(questions: Sequence[lib.Question], copy: int, pool: _Pool, settings: Settings) -> Iterable[Row]:
    """Rows in which several questions are asked about the same sources, which the model then reads once for all of them.

    Six questions in one row cost a third of six rows, and the sentences not meant are the right one's neighbours.
    """
    by_leaflet: dict[str, list[lib.Question]] = defaultdict(list)
    for question in questions:
        if len({sid.split("/")[0] for sid in question.answer_sentences}) == 1:
            by_leaflet[question.answer_sentences[0].split("/")[0]].append(question)
    for slug, asked in by_leaflet.items():
        rng = random.Random(f"{settings.seed}/{slug}/{copy}")
        for turn in range(settings.curate.conversations):
            sections = rng.sample(list(lib.SECTIONS), len(lib.SECTIONS))
            while sections:
                row = _conversation(f"{slug}#{copy}.{turn}.{len(sections)}", slug, sections, asked, pool, rng, settings)
                if row:
                    yield row


def _conversation(
    row_id: str,
    slug: str,
    sections: list[str],
    asked: Sequence[lib.Question],
    pool: _Pool,
    rng: random.Random,
    settings: Settings,
) -> Row | None:
    """Takes sections off the list until the sources are full; asks what they answer, and now and then what they do not."""
    leaf, limit = pool.library.leaflets[slug], settings.curate.max_sources
    passages = [section_sources(leaf, sections.pop())]
    if leaf.look_alikes and rng.random() < 0.4:  # the same section of a leaflet people confuse with it
        name = passages[0][0].id.split("/")[1]
        passages.append(section_sources(pool.library.leaflets[rng.choice(leaf.look_alikes)], name))
    while sections and sum(map(len, passages)) + len(leaf.sections[sections[-1]]) <= limit:
        passages.append(section_sources(leaf, sections.pop()))
    shown = [s for passage in passages for s in passage][:limit]
    ids = {s.id for s in shown}
    picked: list[tuple[lib.Question, list[str]]] = []
    for question in rng.sample(list(asked), len(asked)):
        gold = [sid for sid in question.answer_sentences if sid in ids]
        if len(gold) == len(question.answer_sentences) or (not gold and rng.random() < 0.01):
            picked.append((question, gold))
    picked = picked[: settings.curate.conversation_turns]
    if len(picked) < 2:
        return None
    sources = pool.order(picked[0][0].question, shown)
    numbers = {s.id: n for n, s in enumerate(sources, start=1)}
    turns = [(q.question, chat.answer_text([numbers[sid] for sid in gold], sources)) for q, gold in picked]
    messages = chat.answer_messages(turns[0][0], sources)
    for (_, said), (question_text, _) in pairwise(turns):
        messages += [{"role": "assistant", "content": said}, chat.follow_up(question_text)]
    return Row(
        id=row_id, split="train", skill="answer", messages=messages, reply=turns[-1][1], sources=[s.id for s in sources],
        made_from=[q.id for q, _ in picked],
    )  # fmt: skip


def _decide_row(
    row_id: str, copy: int, message: str, action: chat.Action, slugs: Sequence[str], pool: _Pool, rng: random.Random
) -> Row:
    titles = [pool.library.leaflets[s].title for s in slugs]
    titles += [t for t in pool.nearest_titles(message, 3) if t not in titles]
    titles = titles[: max(3, len(slugs))]
    rng.shuffle(titles)
    return Row(
        id=f"{row_id}#d{copy}", split=pool.split, skill="decide",
        messages=chat.decide_messages(message, titles), reply=chat.to_json(chat.Decision(action=action)),
        made_from=[row_id],
    )  # fmt: skip


def _clarify_row(case: lib.Case, copy: int, pool: _Pool, rng: random.Random) -> Row | None:
    """Ask for a feature in which the candidates differ."""
    candidates = [pool.library.leaflets[slug] for slug in (case.leaflet, *case.look_alikes)]
    rng.shuffle(candidates)
    telling = [f for f in case.profile if len({c.features.get(f) for c in candidates} - {None}) > 1]
    if not telling:
        return None
    feature = rng.choice(telling)
    values = list(dict.fromkeys(c.features[feature] for c in candidates if feature in c.features))
    return Row(
        id=f"{case.id}#c{copy}", split=pool.split, skill="clarify",
        messages=chat.clarify_messages(case.opening, feature, values), reply=chat.clarify_text(feature, values),
        made_from=[case.id],
    )  # fmt: skip


def _judge_row(
    label: lib.JudgeLabel, copy: int, pool: _Pool, mark: str = "", answer: str = "", verdict: chat.Verdict | None = None
) -> Row:
    sources = sources_of(pool.library, label.passages)
    verdict = verdict or chat.Verdict(grounded=label.grounded, safe=label.safe, helpful=label.helpful)
    return Row(
        id=f"{label.id}{mark}#j{copy}", split=pool.split, skill="judge", sources=label.passages,
        messages=chat.judge_messages(label.question, sources, answer or label.answer), reply=chat.to_json(verdict),
        made_from=[label.id],
    )  # fmt: skip


def _changed_judge_rows(label: lib.JudgeLabel, copy: int, pool: _Pool, rng: random.Random) -> Iterable[Row]:
    """From an answer people called grounded, one with a fact changed: never grounded, and no longer of much help."""
    if label.grounded and label.helpful >= 4 and (changed := change_fact(label.answer, rng)):
        verdict = chat.Verdict(grounded=False, safe=label.safe, helpful=2)
        yield _judge_row(label, copy, pool, "x", changed, verdict)


# --- cleaning --------------------------------------------------------------------------------------------------------


def _load(datasets: Path, file: str, kind: type[lib.Row], library: lib.Library, quarantine: list[dict[str, Any]]) -> list[Any]:
    rows, bad = lib.read_rows(datasets, file, kind)
    quarantine += [{"file": b.file, "line": b.line, "reason": f"malformed: {b.reason}", "text": b.text[:500]} for b in bad]
    for row in rows:
        if problems := lib.row_problems(row, library):
            raise UserError(f"{row.id}: {problems[0]}", str(datasets / file), "Run `python -m shared.library check`")
    kept: list[Any] = []
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            quarantine.append({"file": file, "id": row.id, "reason": "duplicate id"})
        else:
            seen.add(row.id)
            kept.append(cleaned(row))
    return kept


def cleaned(row: Any) -> Any:
    """The row with every text normalised."""
    return row.model_copy(update={k: normalise(v) for k, v in row if isinstance(v, str)})


def normalise(text: str) -> str:
    """NFC, no control characters, single spaces: what people paste, as one line of plain text."""
    text = unicodedata.normalize("NFC", text)
    return " ".join("".join(c if unicodedata.category(c)[0] != "C" else " " for c in text).split())


def _drop_duplicates(questions: list[lib.Question], threshold: float, quarantine: list[dict[str, Any]]) -> list[lib.Question]:
    """Exact repeats and near repeats (MinHash over word triples, Broder 1997). Test rows are seen first and stay."""
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    kept: list[lib.Question] = []
    exact: dict[str, str] = {}
    for question in sorted(questions, key=lambda q: lib.SPLITS[::-1].index(q.split)):
        text, signature = fingerprint(question.question)
        twin = exact.get(text) or next(iter(index.query(signature)), None)
        if twin:
            reason = "exact duplicate" if text in exact else "near duplicate"
            quarantine.append({"file": "questions.jsonl", "id": question.id, "reason": reason, "of": twin})
            continue
        exact[text] = question.id
        index.insert(question.id, signature)
        kept.append(question)
    return sorted(kept, key=lambda q: q.id)


def fingerprint(text: str) -> tuple[str, MinHash]:
    """What an exact repeat shares, the words alone, and what a near repeat nearly shares, the MinHash of their triples."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    signature = MinHash(num_perm=PERMUTATIONS)
    signature.update_batch([" ".join(words[i : i + 3]).encode() for i in range(max(1, len(words) - 2))])
    return " ".join(words), signature


def _fit(rows: list[Row], tokenizer: Any, limit: int, quarantine: list[dict[str, Any]]) -> list[Row]:
    texts = ["".join(m["content"] for m in r.messages) + r.reply for r in rows]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]] if rows else []
    for row, length in zip(rows, lengths, strict=True):
        if length > limit:
            quarantine.append({"id": row.id, "reason": "too long", "tokens": length, "limit": limit})
    return [r for r, length in zip(rows, lengths, strict=True) if length <= limit]


def _spread(rows: list[Row], limit: int) -> list[Row]:
    """At most `limit` rows, every skill kept in proportion and none lost."""
    if len(rows) <= limit:
        return rows
    kept: list[Row] = []
    for skill in sorted({r.skill for r in rows}):
        own = [r for r in rows if r.skill == skill]
        share = max(1, limit * len(own) // len(rows))
        kept += [own[i * len(own) // share] for i in range(min(share, len(own)))]
    return kept


def write_version(
    rows: dict[lib.Split, list[Row]], quarantine: list[dict[str, Any]], parent: Path, datasets: str | None = None
) -> CuratedData:
    counts = {split: dict(Counter(r.skill for r in rows[split])) for split in lib.SPLITS}
    dropped = dict(Counter(str(q["reason"]).split(":")[0] for q in quarantine))
    aside = parent / "curating.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for split in lib.SPLITS:
        write_jsonl(aside / f"{split}.jsonl", (r.model_dump() for r in rows[split]))
    version = f"d-{sha256_tree([aside])[:12]}"
    write_jsonl(aside / "quarantine.jsonl", quarantine)
    write_json(aside / "report.json", {"version": version, "datasets": datasets, "counts": counts, "dropped": dropped})
    final = parent / version
    if final.exists():  # the same rows; what was dropped on the way to them may differ
        for name in ("quarantine.jsonl", "report.json"):
            (aside / name).replace(final / name)
        shutil.rmtree(aside)
    else:
        aside.rename(final)
    return CuratedData(version, final, counts, dropped, datasets)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _section(pool: _Pool, key: str) -> list[chat.Source]:
    slug, name = key.split("/")
    return section_sources(pool.library.leaflets[slug], name)


def sources_of(library: lib.Library, ids: Sequence[str]) -> list[chat.Source]:
    """Sentences by id, with the headings they are shown under. KeyError for one that does not exist."""
    found = []
    for sid in ids:
        slug, name, _ = sid.split("/")
        heading = f"{library.leaflets[slug].title}: {lib.SECTIONS[name]}"
        found.append(chat.Source(id=sid, heading=heading, text=library.sentence(sid).text))
    return found


def _index(texts: list[str]) -> bm25s.BM25:
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    return index


def _search(index: bm25s.BM25, text: str, k: int) -> list[int]:
    query = bm25s.tokenize([text], stopwords="en", show_progress=False)
    if not query.vocab:
        return []
    return [int(i) for i in index.retrieve(query, k=k, show_progress=False)[0][0]]
