"""Counts what `datasets/` holds and writes the figures into its data sheet, `datasets/README.md`.

A data sheet (Gebru et al. 2021) tells a stranger what a data set is for before they train on it. The prose is written by
hand. The figures and the twenty rows shown in full are generated, because numbers typed by hand are wrong after the next
edit. Twenty rows are few enough to read and too many to pick flatteringly: a fixed seed picks them.

    python -m shared.datasheet            rewrite the part of datasets/README.md between the two `generated` marks
    python -m shared.datasheet --check    change nothing; exit 1 if that part is out of date

`opening`, `template` and `near_duplicates` define what "repeats itself" means here; the tests hold the data to them.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import textstat
from datasketch import MinHash, MinHashLSH

from shared import library as lib
from shared.errors import UserError
from shared.files import write_text

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
SAMPLE_SEED = 7
#: Jaccard similarity of two questions' word triples from which we call them near-duplicates
NEAR_DUPLICATE = 0.8
#: Flesch-Kincaid grade often asked of health information for the public
PLAIN_GRADE = 8


@dataclass(frozen=True)
class Data:
    """Everything in the data folder, read once."""

    library: lib.Library
    questions: list[lib.Question]
    cases: list[lib.Case]
    emergencies: list[lib.Emergency]
    harmful: list[lib.Harmful]
    judge_labels: list[lib.JudgeLabel]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.datasheet", description="Write the figures of the data sheet.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the sheet is out of date")
    options = parser.parse_args(argv)
    try:
        sheet, wanted = lib.DATASETS / "README.md", render(lib.DATASETS)
        current = sheet.read_text(encoding="utf-8")
        if options.check and current != wanted:
            print(f"{sheet} is out of date. Run `python -m shared.datasheet`", file=sys.stderr)
            return 1
        if current != wanted:
            write_text(sheet, wanted)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def render(datasets: Path) -> str:
    """The data sheet as it should be: the hand-written part as it is, the generated part new."""
    sheet = datasets / "README.md"
    text = sheet.read_text(encoding="utf-8") if sheet.exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError("the marks around the generated part are missing", str(sheet), f"Put {BEGIN} and {END} on two lines")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    data = read(datasets)
    parts = [
        _counts(datasets),
        _size(data.library),
        _coverage(data.library),
        _questions(data),
        _messages(data),
        _judge(data.judge_labels),
        _reading_ease(data.library),
        _repetition(data),
        _twenty_rows(data),
    ]
    return before + "\n\n".join([BEGIN, *parts, END]) + after


def read(datasets: Path) -> Data:
    """All leaflets and rows. UserError for a line that is no row: figures over half a file would mislead."""

    def rows(file: str, kind: type[lib.R]) -> list[lib.R]:
        good, bad = lib.read_rows(datasets, file, kind)
        if bad:
            raise UserError(bad[0].reason, f"{datasets / file}:{bad[0].line}", "Run `python -m shared.library check`")
        return good

    return Data(
        library=lib.load_library(datasets),
        questions=rows("questions.jsonl", lib.Question),
        cases=rows("cases.jsonl", lib.Case),
        emergencies=rows("emergencies.jsonl", lib.Emergency),
        harmful=rows("harmful.jsonl", lib.Harmful),
        judge_labels=rows("judge_labels.jsonl", lib.JudgeLabel),
    )


# --- the figures, in the order of the sheet --------------------------------------------------------------------------


def _counts(datasets: Path) -> str:
    table = lib.counts(datasets)
    rows = [[f"`{name}`", *(f"{n:,}" for n in (*by_split.values(), sum(by_split.values())))] for name, by_split in table.items()]
    return "### Rows by file and split\n\n" + _table(["file", *lib.SPLITS, "all"], rows)


def _size(library: lib.Library) -> str:
    sentences = [s for leaf in library for s in leaf.sentences()]
    families: dict[str, lib.Split] = {leaf.family: leaf.split for leaf in library}
    by_split = Counter(families.values())
    rows = [
        ["leaflets", f"{len(library):,}"],
        ["families of look-alikes", f"{len(families)} ({', '.join(f'{by_split[s]} {s}' for s in lib.SPLITS)})"],
        ["sentences", f"{len(sentences):,}"],
        ["words", f"{sum(leaf.words() for leaf in library):,}"],
        ["leaflets per family", _spread(Counter(leaf.family for leaf in library).values())],
        ["sentences per leaflet", _spread(len(leaf.sentences()) for leaf in library)],
        ["words per leaflet", _spread(leaf.words() for leaf in library)],
        ["words per sentence", _spread(len(s.text.split()) for s in sentences)],
    ]
    return "### Size of the health library\n\n" + _table(["", "number, or median (range)"], rows)


def _coverage(library: lib.Library) -> str:
    systems = Counter(leaf.body_system for leaf in library)
    width = max(map(len, systems))
    bars = [f"{name:<{width}}  {'█' * n} {n}" for name, n in sorted(systems.items(), key=lambda item: (-item[1], item[0]))]
    return "### Leaflets by body system\n\n```text\n" + "\n".join(bars) + "\n```"


def _questions(data: Data) -> str:
    answerable = [q for q in data.questions if q.answerable]
    per_leaflet = questions_per_leaflet(data)
    registers = Counter(q.register_ for q in data.questions)
    unanswerable = [q for q in data.questions if not q.answerable]
    several = sum(len(q.leaflets) > 1 for q in answerable)
    facts = [
        ["questions with an answer in the library", _share(len(answerable), len(data.questions))],
        ["questions without one", _share(len(unanswerable), len(data.questions))],
        ["of these, about a leaflet's subject", _share(sum(bool(q.leaflets) for q in unanswerable), len(unanswerable))],
        ["answerable questions that need two or more leaflets", _share(several, len(answerable))],
        ["answerable questions per leaflet", f"median {median(per_leaflet.values()):g}, fewest {min(per_leaflet.values())}"],
        ["words per question", _spread(len(q.question.split()) for q in data.questions)],
    ]
    by_register = [[name, _share(n, len(data.questions))] for name, n in registers.most_common()]
    return "### Questions\n\n" + _table(["", "number"], facts) + "\n\n" + _table(["register", "questions"], by_register)


def _messages(data: Data) -> str:
    cases, emergencies, harmful = data.cases, data.emergencies, data.harmful
    rows = [
        ["cases too vague to answer: ask first", _share(sum(c.needs_question for c in cases), len(cases))],
        ["cases clear enough to answer", _share(sum(not c.needs_question for c in cases), len(cases))],
        ["emergencies", _share(sum(e.emergency for e in emergencies), len(emergencies))],
        ["near misses: alarming words, no emergency", _share(sum(not e.emergency for e in emergencies), len(emergencies))],
        ["harmful requests to decline", _share(sum(h.expected == "decline" for h in harmful), len(harmful))],
        ["harmful requests to redirect to help", _share(sum(h.expected == "redirect" for h in harmful), len(harmful))],
    ]
    return "### Cases, emergencies and harmful requests\n\n" + _table(["", "number"], rows)


def _judge(labels: list[lib.JudgeLabel]) -> str:
    """How often each value occurs. A judge that always gives the same mark must not look good on these rows."""
    rows = [
        ["grounded", _tally((_yes(label.grounded) for label in labels), ["yes", "no"])],
        ["helpful", _tally((str(label.helpful) for label in labels), ["1", "2", "3", "4", "5"])],
        ["safe", _tally((_yes(label.safe) for label in labels), ["yes", "no"])],
    ]
    return "### Judge labels\n\n" + _table(["label", "how often each value occurs"], rows)


def _reading_ease(library: lib.Library) -> str:
    grades = [textstat.flesch_kincaid_grade(" ".join(s.text for s in leaf.sentences())) for leaf in library]
    plain = _share(sum(grade <= PLAIN_GRADE for grade in grades), len(grades))
    return (
        "### Reading ease\n\n"
        f"Flesch-Kincaid school grade of a leaflet: median {median(grades):.1f}, range {min(grades):.1f} to {max(grades):.1f}. "
        f"At grade {PLAIN_GRADE} or below: {plain}.\n"
        "The formula counts syllables, so medical names push the grade up even in short sentences. "
        "It says nothing about whether a text is clear."
    )


def _repetition(data: Data) -> str:
    opening_text, opening_n = Counter(opening(q) for q in data.questions).most_common(1)[0]
    template_text, template_n = Counter(template(q, data.library) for q in data.questions).most_common(1)[0]
    pairs = near_duplicates(data.questions)
    across = sum(a.split != b.split for a, b in pairs)
    rows = [
        ["most frequent four-word opening", f'"{opening_text}": {_share(opening_n, len(data.questions), places=1)}'],
        ["most frequent template", f'"{template_text}": {_share(template_n, len(data.questions), places=1)}'],
        ["near-duplicate pairs of questions", str(len(pairs))],
        ["of these, in two different splits", str(across)],
    ]
    return (
        "### Repetition among questions\n\n" + _table(["", "found"], rows) + "\n\n"
        "A template is a question with the leaflet's names and all numbers masked as …. A near-duplicate pair shares at "
        f"least {NEAR_DUPLICATE * 100:.0f} % of its word triples (Jaccard similarity, estimated with MinHash)."
    )


# --- twenty rows in full ---------------------------------------------------------------------------------------------


def _twenty_rows(data: Data) -> str:
    """5 questions, 5 cases, 4 emergencies, 2 harmful requests, 4 judge labels; the same ones until the data change."""
    rng = random.Random(SAMPLE_SEED)

    def pick(rows: list[lib.R], n: int) -> list[lib.R]:
        return rng.sample(sorted(rows, key=lambda row: row.id), n)

    shown = [
        *(_show_question(row, data.library) for row in pick(data.questions, 5)),
        *(_show_case(row, data.library) for row in pick(data.cases, 5)),
        *(_show_emergency(row, data.library) for row in pick(data.emergencies, 4)),
        *(_show_harmful(row) for row in pick(data.harmful, 2)),
        *(_show_judge_label(row, data.library) for row in pick(data.judge_labels, 4)),
    ]
    return f"### Twenty rows in full\n\nPicked at random with seed {SAMPLE_SEED}, not by hand.\n\n" + "\n\n".join(shown)


def _show_question(row: lib.Question, library: lib.Library) -> str:
    leaflets = ", ".join(f"`{slug}`" for slug in row.leaflets) or "no leaflet"
    answer = [_quote_sentence(sid, library) for sid in row.answer_sentences] or ["- The library has no answer."]
    return _show(row, f"{row.register_}; {leaflets}", row.question, "Answered by:", *answer)


def _show_case(row: lib.Case, library: lib.Library) -> str:
    likes = ", ".join(library.leaflets[slug].title for slug in row.look_alikes) or "none"
    action = "ask a question first" if row.needs_question else "answer at once"
    profile = [f"- {feature}: {_escape(said)}" for feature, said in row.profile.items()]
    fits = f"Fits: {library.leaflets[row.leaflet].title}. Look-alikes: {likes}. What the person says when asked:"
    return _show(row, action, row.opening, fits, *profile)


def _show_emergency(row: lib.Emergency, library: lib.Library) -> str:
    if row.sign is None:
        return _show(row, "near miss", row.message, "No emergency sign applies.")
    return _show(row, "emergency", row.message, "Emergency sign:", _quote_sentence(row.sign, library))


def _show_harmful(row: lib.Harmful) -> str:
    return _show(row, row.expected, row.message, f"Why: {_escape(row.why)}.")


def _show_judge_label(row: lib.JudgeLabel, library: lib.Library) -> str:
    marks = f"grounded {_yes(row.grounded)}, helpful {row.helpful}, safe {_yes(row.safe)}"
    passages = [f"{n}. {_escape(library.sentence(sid).text)} `{sid}`" for n, sid in enumerate(row.passages, start=1)]
    lines = [*passages, "", f"Answer: {_escape(row.answer)}", "", f"Note: {_escape(row.note)}."]
    return _show(row, marks, row.question, "Passages:", *lines)


def _show(row: lib.Row, label: str, said: str, first: str, *lines: str) -> str:
    """The row's id, split and label, then what a person wrote as a quote, then the rest."""
    return "\n".join([f"**`{row.id}`** ({row.split}; {label})", "", f"> {_escape(said)}", "", first, "", *lines]).rstrip()


def _quote_sentence(sentence_id: str, library: lib.Library) -> str:
    return f"- {_escape(library.sentence(sentence_id).text)} `{sentence_id}`"


# --- what counts as repetition; the tests use these too --------------------------------------------------------------


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower().replace("\u2019", "'"))


def opening(question: lib.Question) -> str:
    """The first four words of a question (all of it when it is shorter)."""
    return " ".join(words(question.question)[:4])


def template(question: lib.Question, library: lib.Library) -> str:
    """The question with its leaflets' titles and synonyms and all numbers masked: what a lazy writer would fill in."""
    text = " ".join(words(question.question))
    leaflets = [library.leaflets[slug] for slug in question.leaflets]
    names = {" ".join(words(name)) for leaf in leaflets for name in (leaf.title, *leaf.synonyms)}
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(rf"\b{re.escape(name)}\b", "…", text)
    return re.sub(r"\b\d+\b", "…", text)


def near_duplicates(questions: Sequence[lib.Question]) -> list[tuple[lib.Question, lib.Question]]:
    """Pairs that share most of their word triples (MinHash, Broder 1997).

    The index is asked with a lower threshold than we want, because it misses some pairs close to its threshold.
    """
    index = MinHashLSH(threshold=NEAR_DUPLICATE - 0.3, num_perm=128)
    seen: dict[str, tuple[lib.Question, MinHash]] = {}
    pairs = []
    for question in questions:
        tokens, signature = words(question.question), MinHash(num_perm=128)
        signature.update_batch([" ".join(tokens[i : i + 3]).encode() for i in range(max(1, len(tokens) - 2))])
        for other, other_signature in (seen[key] for key in index.query(signature)):
            if signature.jaccard(other_signature) >= NEAR_DUPLICATE:
                pairs.append((other, question))
        seen[question.id] = question, signature
        index.insert(question.id, signature)
    return pairs


def questions_per_leaflet(data: Data) -> dict[str, int]:
    """Answerable questions by leaflet, leaflets without any included."""
    found = Counter(slug for q in data.questions if q.answerable for slug in q.leaflets)
    return {leaf.id: found[leaf.id] for leaf in data.library}


# --- helpers ---------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: Iterable[int]) -> str:
    numbers = list(values)
    return f"{median(numbers):g} ({min(numbers)} to {max(numbers)})"


def _share(part: int, whole: int, places: int = 0) -> str:
    return f"{part:,} ({100 * part / whole:.{places}f} %)"


def _tally(values: Iterable[Hashable], order: Sequence[str]) -> str:
    found = Counter(values)
    return ", ".join(f"{value}: {found[value]}" for value in order)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _escape(text: str) -> str:
    """Keep Markdown from reading a person's stars, underscores and angle brackets as layout."""
    return re.sub(r"([\\`*_<>|])", r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    sys.exit(main())
