"""Exercises are right by construction, what is measured on is never trained on, and a broken corpus is found first."""

from __future__ import annotations

import json
import lzma
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_engineer_track import corpus as c
from ml_engineer_track import pretrain as pt
from ml_engineer_track import reading as r
from ml_engineer_track.corpus import Corpus
from ml_engineer_track.reading import Exercise, Exercises
from shared.chat import NOT_ANSWERED, Source, follow_up, parse_answer, render_sources
from shared.errors import UserError

QUOTING = ("find", "define", "section", "squad_reading", "medquad_reading", "choose_question", "consult")
JSON_KINDS = {"claim": "grounded", "same_question": "same", "vague": "vague", "harmful": "harmful"}
KINDS = [*QUOTING, *JSON_KINDS, "copy", "lookup", "index", "quiz", "ask_back", "fields"]


def some(exercises: Exercises, kind: str, n: int = 60) -> list[Exercise]:
    """Exercises of several sizes, the short form without an instruction among them."""
    rng = random.Random(kind)
    return [exercises.make(kind, rng, rng.choice((120, 190, 250, 500))) for _ in range(n)]


def conversation(exercise: Exercise) -> list[tuple[str, str]]:
    """The turns of a quiz: what is asked, and the reply."""
    opening, *later = exercise.reply.split("<|end|><|user|>")
    turns = [(exercise.messages[0]["content"].split("\n\n")[-1], opening)]
    for turn in later:
        question, reply = turn.split("<|end|><|assistant|>")
        turns.append((question, reply))
    return turns


def numbered(exercise: Exercise) -> dict[int, str]:
    found = re.findall(r"^\[(\d+)\] (.*)$", exercise.messages[0]["content"], flags=re.MULTILINE)
    assert [int(n) for n, _ in found] == list(range(1, len(found) + 1))
    return {int(n): text for n, text in found}


# --- every kind ------------------------------------------------------------------------------------------------------


def test_no_kind_is_left_untested(exercises: Exercises) -> None:
    assert set(KINDS) == set(exercises.kinds)
    assert {kind for edition in pt.EDITIONS.values() for stage in edition.stages for kind in stage.mix} - {"language"} <= set(
        KINDS
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_exercise_has_one_prompt_and_a_reply(exercises: Exercises, kind: str) -> None:
    for made in some(exercises, kind, 30):
        assert made.kind == kind
        assert [m["role"] for m in made.messages] == ["user"]
        assert made.reply.strip() == made.reply != ""
        turns = made.reply if kind != "quiz" else "".join(text for turn in conversation(made) for text in turn)
        assert "<|" not in made.messages[0]["content"] + turns


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_exercise(exercises: Exercises, kind: str) -> None:
    assert some(exercises, kind, 5) == some(exercises, kind, 5)


@pytest.mark.parametrize("kind", QUOTING)
def test_a_reading_reply_quotes_its_sources_word_for_word_or_refuses(exercises: Exercises, kind: str) -> None:
    refused = 0
    for made in some(exercises, kind):
        sources = numbered(made)
        assert sources
        if made.reply == NOT_ANSWERED:
            refused += 1
            continue
        for quoted in parse_answer(made.reply):
            assert quoted.number is not None
            assert sources[quoted.number] == quoted.text
    assert 0 < refused < 40


@pytest.mark.parametrize("kind", QUOTING)
def test_an_unanswerable_exercise_does_not_show_the_sentence_it_lost(
    exercises: Exercises, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden: list[list[str]] = []
    real = Exercises._hide

    def noted(self: Exercises, kind: str, rng: random.Random, question: str, targets: list[str], *rest: object) -> object:
        made = real(self, kind, rng, question, targets, *rest)
        if made is not None:
            hidden.append(list(targets))
        return made

    monkeypatch.setattr(Exercises, "_hide", noted)
    for made, targets in zip(some(exercises, kind), hidden, strict=True):
        shown = set(numbered(made).values())
        if made.reply == NOT_ANSWERED:
            assert not shown & set(targets)
        else:
            assert [q.text for q in parse_answer(made.reply)] == targets


def test_a_lookup_quotes_the_sentence_of_that_number(exercises: Exercises) -> None:
    for made in some(exercises, "lookup"):
        n = int(re.search(r"Quote sentence \[(\d+)\]", made.messages[0]["content"])[1])
        assert made.reply == f"[{n}] {numbered(made)[n]}"


def test_an_index_gives_words_the_number_of_a_sentence_that_has_them(exercises: Exercises) -> None:
    for made in some(exercises, "index"):
        sources = numbered(made)
        for entry in made.reply.split("; "):
            words, number = re.fullmatch(r"(.+) \[(\d+)\]", entry).groups()
            assert set(words.split()) <= set(re.findall(r"[A-Za-z][A-Za-z\-]+", sources[int(number)]))


def test_a_copy_repeats_what_it_was_given(exercises: Exercises) -> None:
    assert all(made.messages[0]["content"] == f"Copy: {made.reply}" for made in some(exercises, "copy"))


@pytest.mark.parametrize(("kind", "key"), JSON_KINDS.items())
def test_a_yes_or_no_exercise_replies_in_compact_json_and_both_occur(exercises: Exercises, kind: str, key: str) -> None:
    assert {made.reply for made in some(exercises, kind)} == {f'{{"{key}":true}}', f'{{"{key}":false}}'}


def test_a_true_claim_stands_in_the_sources_and_a_false_one_does_not(exercises: Exercises) -> None:
    for made in some(exercises, "claim", 100):
        claim = re.search(r"^Claim: (.*)$", made.messages[0]["content"], flags=re.MULTILINE)[1]
        if not claim.startswith("What is "):  # those are HaluEval's, whose claims are answers and no sentences
            assert (claim in numbered(made).values()) is json.loads(made.reply)["grounded"]


def test_filled_fields_are_the_values_given(exercises: Exercises) -> None:
    for made in some(exercises, "fields"):
        values = json.loads(made.reply)
        asked = re.search(r"with the keys (.*)\.", made.messages[0]["content"])[1].split(", ")
        assert list(values) == asked
        for name, value in values.items():
            assert f"{name} = {json.dumps(value).strip(chr(34))}" in made.messages[0]["content"]


def test_an_exercise_keeps_to_about_the_size_asked_for(exercises: Exercises) -> None:
    for kind in QUOTING:
        for made in (exercises.make(kind, random.Random(n), 300) for n in range(20)):
            assert len(made.messages[0]["content"]) < 300 * r.CHARS_PER_TOKEN * 1.1
    for made in (exercises.make("quiz", random.Random(n), 300) for n in range(20)):
        assert len(made.messages[0]["content"] + made.reply) < 300 * r.CHARS_PER_TOKEN * 1.1


def test_a_kind_without_material_is_an_error_for_the_user(corpus: Corpus) -> None:
    with pytest.raises(UserError, match="no material"):
        Exercises(Corpus({}, {}, corpus.tasks, corpus.held_out_tasks, [["Too short."]])).make("define", random.Random(0), 200)


# --- quizzes ---------------------------------------------------------------------------------------------------------


def test_a_quiz_is_a_conversation_about_one_set_of_sources_with_a_number_or_a_refusal_each(exercises: Exercises) -> None:
    replies = []
    for made in some(exercises, "quiz"):
        sources, turns = numbered(made), conversation(made)
        assert len(sources) >= 2
        assert len(turns) >= 2
        for question, reply in turns:
            assert question == follow_up(question.removeprefix("Question: "))["content"]
            assert reply == NOT_ANSWERED or int(re.fullmatch(r"\[(\d+)\]", reply)[1]) in sources
        shown = [Source(id="", heading="", text=text) for text in sources.values()]
        assert made.messages[0]["content"] == f"{render_sources(shown)}\n\n{turns[0][0]}"
        replies += [reply for _, reply in turns]
    assert 0.02 < replies.count(NOT_ANSWERED) / len(replies) < 0.3


TEXTS = [f"The {noun} of the story lives in a house of its own near the {noun} road." for noun in ("baker", "miller", "smith")]
ASKED = [(f"where is the {noun}?", n) for n, noun in enumerate(("baker", "miller", "smith"), start=1)]


@pytest.fixture
def one_quiz(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Exercises:
    """Exercises whose quizzes are all about TEXTS."""
    exercises = Exercises(corpus)
    for material in ("_words_quiz", "_squad_quiz", "_sections_quiz", "_consult_quiz"):
        monkeypatch.setattr(exercises, material, lambda rng, room: (list(TEXTS), list(ASKED)))
    return exercises


def test_a_quiz_gives_each_question_its_number_and_asks_in_any_order(one_quiz: Exercises) -> None:
    orders = set()
    for made in some(one_quiz, "quiz"):
        assert list(numbered(made).values()) == TEXTS
        kept = [turn for turn in conversation(made) if turn[1] != NOT_ANSWERED]
        assert set(kept) <= {(f"Question: {question}", f"[{number}]") for question, number in ASKED}
        orders.add(tuple(reply for _, reply in kept))
    assert len(orders) >= 6


@pytest.mark.parametrize(
    "words",
    [
        "words to ask with",
        None,
    ],
)
def test_a_quiz_refuses_only_what_its_sources_do_not_answer(
    one_quiz: Exercises, monkeypatch: pytest.MonkeyPatch, words: str | None
) -> None:
    monkeypatch.setattr(r, "_words_of", lambda sentence, rng: words)
    refused = {q for made in some(one_quiz, "quiz") for q, reply in conversation(made) if reply == NOT_ANSWERED}
    assert not refused & {f"Question: {question}" for question, _ in ASKED}


def same_words(words: Sequence[str], sentence: str) -> int:
    """How many of the words stand in a sentence, as they are or with an s more or less."""
    own = {w.lower() for w in re.findall(r"[A-Za-z\-]+", sentence)}
    return sum(bool({w.lower(), w.lower().rstrip("s"), w.lower() + "s"} & own) for w in words)


def test_a_quiz_of_words_means_the_sentence_they_are_from(exercises: Exercises) -> None:
    best = total = 0
    for n in range(40):
        texts, asked = exercises._words_quiz(random.Random(n), 1000)
        assert {number for _, number in asked} == set(range(1, len(texts) + 1))
        for question, number in asked:
            hits = [same_words(question.split(), text) for text in texts]
            best, total = best + (hits[number - 1] >= max(hits)), total + 1
    assert best / total > 0.95  # two letters of a word may have changed places


def test_a_quiz_of_a_paragraph_points_at_the_answer_or_at_nothing(exercises: Exercises) -> None:
    numbers = []
    for n in range(60):
        made = exercises._squad_quiz(random.Random(n), 2000)
        assert made is not None
        texts, asked = made
        rows = {row["question"]: row for row in exercises.squad}
        for question, number in asked:
            answers = rows[question]["answers"]
            assert [a in texts[number - 1] for a in answers[:1]] == [True] if number else rows[question]["is_impossible"]
            numbers.append(number)
        assert exercises._squad_quiz(random.Random(n), 200) is None  # five sentences are too many for so little room
    assert len(set(numbers)) > 1


def test_a_quiz_of_sections_gives_each_question_the_first_sentence_of_its_section(exercises: Exercises) -> None:
    for n in range(40):
        texts, asked = exercises._sections_quiz(random.Random(n), 2000)
        firsts = {p["question"]: c.sentences(p["answer"])[0] for row in exercises.medquad for p in row["sections"]}
        assert len(texts) == len(asked) >= 2
        assert all(texts[number - 1] == firsts[question] for question, number in asked)


def all_really_asked(corpus: Corpus) -> Exercises:
    """Exercises on matches whose questions are all asked as they stand, so that they can be found again."""
    assert corpus.matches is not None
    return Exercises(replace(corpus, matches=replace(corpus.matches, asked=len(corpus.matches.questions))))


def test_a_quiz_of_matches_has_one_clear_sentence_for_each_question(corpus: Corpus) -> None:
    exercises, m = all_really_asked(corpus), corpus.matches
    for n in range(40):
        texts, asked = exercises._consult_quiz(random.Random(n), 3000)
        assert len(asked) == len(texts) == len(set(texts)) > 2
        for question, number in asked:
            at = m.questions.index(question)
            assert texts[number - 1] == m.sentences[m.nearest[at, 0]]
            others = [m.sentences.index(text) for k, text in enumerate(texts, start=1) if k != number]
            assert all(m.clear(at, other) for other in others)


# --- consulting ------------------------------------------------------------------------------------------------------


def consulted(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, n: int = 200, tokens: int = 400) -> list[tuple[int, Exercise]]:
    """Exercises with the number of their question; strangers come from text that has nothing to do with the matches."""
    exercises, picked = Exercises(replace(corpus, paragraphs=corpus.paragraphs[100:])), []
    real = exercises._someone_asks
    monkeypatch.setattr(exercises, "_someone_asks", lambda rng: picked.append(real(rng)) or picked[-1])
    rng = random.Random(0)
    return [(picked[-1], made) for made in (exercises.make("consult", rng, tokens) for _ in range(n))]


def test_a_consultation_quotes_the_nearest_sentence_and_shows_no_other_that_is_nearly_as_near(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = corpus.matches
    assert m is not None
    neighbours = 0
    for number, made in consulted(corpus, monkeypatch):
        first, *nearly = (m.sentences[i] for i in m.nearest[number, :3])
        assert made.reply == NOT_ANSWERED or [q.text for q in parse_answer(made.reply)] == [first]
        shown = set(numbered(made).values())
        assert not shown & set(nearly)
        neighbours += (
            len(shown & {m.sentences[i] for i in range(len(m.sentences)) if m.document[i] == m.document[m.nearest[number, 0]]})
            > 1
        )
    assert neighbours > 50  # the sentence is hidden among others of its own document


def test_a_statement_is_not_shown_among_the_sentences_that_do_not_answer_it(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = corpus.matches
    assert m is not None
    for number, made in consulted(corpus, monkeypatch):
        assert m.questions[number] not in numbered(made).values()


def test_the_sentence_that_answers_a_consultation_stands_at_any_place(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [made for _, made in consulted(corpus, monkeypatch) if made.reply != NOT_ANSWERED]
    last = sum(parse_answer(made.reply)[0].number == len(numbered(made)) for made in found)
    first = sum(parse_answer(made.reply)[0].number == 1 for made in found)
    chance = sum(1 / len(numbered(made)) for made in found)
    assert last < 2 * chance
    assert first > chance / 4  # it was never first when the exercise put it at the end of its run


def test_a_question_is_asked_as_it_stands_and_a_statement_as_people_type(exercises: Exercises) -> None:
    m, rng = exercises.matches, random.Random(0)
    assert m is not None
    assert {exercises._as_question(3, rng) for _ in range(20)} == {m.questions[3]}
    words = m.questions[m.asked + 3].rstrip(".").lower().split()
    said = {exercises._as_question(m.asked + 3, rng) for _ in range(40)}
    assert len(said) > 10
    for text in said:
        left = iter(words)
        assert all(any(w.startswith(word) for w in left) for word in text.split())  # the last word may be cut
        assert len(text) <= 200


def test_as_many_questions_are_asked_as_statements(exercises: Exercises, corpus: Corpus) -> None:
    assert corpus.matches is not None
    rng = random.Random(0)
    real = [exercises._someone_asks(rng) < corpus.matches.asked for _ in range(400)]
    assert 160 < sum(real) < 240
    asked = all_really_asked(corpus)
    assert {asked._someone_asks(rng) for _ in range(2000)} == set(range(len(corpus.matches.questions)))


def test_without_matches_there_are_quizzes_but_no_consultations(corpus: Corpus) -> None:
    alone = Exercises(replace(corpus, matches=None))
    assert some(alone, "quiz", 10)
    with pytest.raises(UserError, match="no material for exercises of kind 'consult'"):
        alone.make("consult", random.Random(0), 200)


def test_the_teacher_is_asked_about_training_text_without_its_boilerplate(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Sequence[str], list[list[str]], int, Path | None]] = []
    monkeypatch.setattr(c, "match", lambda *all_of_it: given.append(all_of_it))
    often = "Ask the doctor or a nurse before anything is done."
    long = {"chq": "A long story. " * 30, "faq": "Is it long?", "entails": True}
    paragraphs = [[*paragraph, often] for paragraph in corpus.paragraphs[:5]] + corpus.paragraphs[5:30]
    tasks = corpus.tasks | {"rqe_train": [*corpus.tasks["rqe_train"], long]}
    replace(corpus, tasks=tasks, paragraphs=paragraphs).add_matches(tmp_path / "matches.npz")
    [(asked, documents, statements, cache)] = given
    assert list(asked) == sorted({row[key] for row in tasks["rqe_train"] for key in ("chq", "faq")} - {long["chq"]})
    assert (statements, cache) == (16_000, tmp_path / "matches.npz")
    told = {s for document in documents for s in document}
    assert {s for paragraph in corpus.paragraphs[:30] for s in paragraph} <= told
    assert often not in told
    assert not told & {
        s for row in corpus.held_out_tasks["medquad_1_to_6"] for p in row["sections"] for s in c.sentences(p["answer"])
    }
    assert all(len(set(document)) == len(document) for document in documents)


# --- what is measured on is not trained on ---------------------------------------------------------------------------


def test_held_out_documents_are_never_trained_on(corpus: Corpus) -> None:
    for name in c.PRETRAIN_FILES:
        assert corpus.documents[name]
        assert not set(corpus.documents[name]) & set(corpus.held_out[name])
    assert any(corpus.held_out.values())
    trained = {s for paragraph in corpus.paragraphs for s in paragraph}
    measured = {s for docs in corpus.held_out.values() for doc in docs for s in c.sentences(doc)}
    own = measured - {s for docs in corpus.documents.values() for doc in docs for s in c.sentences(doc)}
    assert own
    assert not own & trained


def test_held_out_questions_share_no_article_and_no_disease_with_training(corpus: Corpus) -> None:
    for name, key in (("squad2_16_articles", "title"), ("medquad_1_to_6", "focus")):
        trained, measured = ({row[key] for row in tasks[name]} for tasks in (corpus.tasks, corpus.held_out_tasks))
        assert trained
        assert measured
        assert not trained & measured
    foci = {row["focus"].lower() for row in corpus.held_out_tasks["medquad_1_to_6"]}
    assert not [d for d in corpus.documents["health_medquad_1_to_6"] if d.split(". What")[0].lower() in foci]


def test_held_out_exercises_show_only_held_out_sentences(corpus: Corpus) -> None:
    """The probes of pretraining are called held out; `find` and `copy` are two of them."""
    measured = [s for paragraph in corpus.held_out_paragraphs for s in paragraph]
    assert measured
    assert not set(measured) & {s for paragraph in corpus.paragraphs for s in paragraph}
    held_out = Exercises(corpus, held_out=True)
    for kind in ("find", "define", "lookup", "index"):
        for made in some(held_out, kind, 20):
            assert set(numbered(made).values()) <= set(measured)
    text = " ".join(measured)
    assert all(made.reply in text for made in some(held_out, "copy", 20))


def test_held_out_paragraphs_leave_fiction_out_as_those_of_training_do(corpus: Corpus) -> None:
    for documents, paragraphs in (
        (corpus.documents, corpus.paragraphs),
        (corpus.held_out, corpus.held_out_paragraphs),
    ):
        prose = {s for name, docs in documents.items() if "fiction" not in name for doc in docs for s in c.sentences(doc)}
        assert {s for paragraph in paragraphs for s in paragraph} <= prose


def test_the_split_does_not_depend_on_the_order_of_documents(corpus_folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(corpus_folder, tmp_path / "corpus"))
    file = folder / "pretrain" / "general_wikipedia.txt.xz"
    lines = lzma.decompress(file.read_bytes()).decode().splitlines()
    file.write_bytes(lzma.compress("\n".join(reversed(lines)).encode(), preset=1))
    again = c.load_corpus(folder)
    assert set(again.documents["general_wikipedia"]) == set(corpus.documents["general_wikipedia"])
    capped = [c.load_corpus(f, 5_000).documents["general_wikipedia"] for f in (folder, corpus_folder)]
    assert capped[0] == capped[1]
    assert 5_000 <= sum(map(len, capped[0])) < 7_000


# --- a broken corpus -------------------------------------------------------------------------------------------------

FILES = [f"pretrain/{n}.txt.xz" for n in c.PRETRAIN_FILES] + [f"tasks/{n}.jsonl.xz" for n in c.TASK_FILES]


@pytest.fixture
def broken(corpus_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus_folder, tmp_path / "corpus"))


def refusal(folder: Path, file: str, work: Path) -> str:
    """What pretraining says about a corpus, before anything is trained."""
    with pytest.raises(UserError) as caught:
        pt.pretrain(folder, pt.EDITIONS["test"], work)
    assert not (work / "tokenizer").exists()
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder / file) in message
    return message


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named_before_training(broken: Path, file: str, tmp_path: Path) -> None:
    (broken / file).unlink()
    assert "missing" in refusal(broken, file, tmp_path / "work")


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file_is_named_before_training(broken: Path, file: str, tmp_path: Path) -> None:
    content = (broken / file).read_bytes()
    for kept in (0, 10, len(content) // 2, len(content) - 1):
        (broken / file).write_bytes(content[:kept])
        assert "truncated or damaged" in refusal(broken, file, tmp_path / "work")


@pytest.mark.parametrize("file", [FILES[0], FILES[-1]])
def test_a_file_that_is_not_utf8_is_named_before_training(broken: Path, file: str, tmp_path: Path) -> None:
    (broken / file).write_bytes(lzma.compress("Ein Satz über Fieber.\n".encode("latin-1")))
    assert "not UTF-8 (byte 9)" in refusal(broken, file, tmp_path / "work")


def test_a_line_that_is_not_json_is_named_before_training(broken: Path, tmp_path: Path) -> None:
    row = json.dumps({"topic": "a", "facet_desc": "b", "question": "c"})
    (broken / "tasks" / "qulac.jsonl.xz").write_bytes(lzma.compress(f'{row}\n\n{{"topic": \n'.encode()))
    message = refusal(broken, "tasks/qulac.jsonl.xz", tmp_path / "work")
    assert "qulac.jsonl.xz:3" in message
    assert "not JSON" in message


@pytest.mark.parametrize("line", ["[]", '"title context question is_impossible answers"', "null", '{"title": "no more"}'])
def test_a_line_that_is_no_row_is_named_before_training(broken: Path, tmp_path: Path, line: str) -> None:
    (broken / "tasks" / "squad2_16_articles.jsonl.xz").write_bytes(lzma.compress(line.encode()))
    message = refusal(broken, "tasks/squad2_16_articles.jsonl.xz", tmp_path / "work")
    assert "squad2_16_articles.jsonl.xz:1" in message
    assert "is_impossible" in message


@pytest.mark.parametrize("name", c.TASK_FILES)
def test_a_row_without_one_of_its_fields_is_named_when_it_is_loaded(broken: Path, name: str) -> None:
    file = broken / "tasks" / f"{name}.jsonl.xz"
    rows = [json.loads(line) for line in lzma.decompress(file.read_bytes()).decode().splitlines()]
    for missing in c.TASK_FILES[name]:
        poor = {k: v for k, v in rows[1].items() if k != missing}
        lines = [json.dumps(row) for row in (rows[0], poor)]
        file.write_bytes(lzma.compress("\n".join(lines).encode(), preset=1))
        with pytest.raises(UserError, match=rf"{missing}.*{name}\.jsonl\.xz:2"):
            c._json_rows(file, c.TASK_FILES[name])


# --- text ------------------------------------------------------------------------------------------------------------


def test_sentences_are_cut_where_people_end_them_and_questions_left_out() -> None:
    text = (
        "== Fever ==\nA fever is a high temperature of the body. It is then over 38.5 degrees! Go. Is a fever bad for children?"
    )
    assert c.sentences(text) == [
        "A fever is a high temperature of the body.",
        "It is then over 38.5 degrees!",
    ]


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=400))
def test_sentences_are_single_lines_of_25_to_320_characters(text: str) -> None:
    for sentence in c.sentences(text):
        assert sentence == " ".join(sentence.split())
        assert len(sentence) <= 320


@given(st.integers(0, 10_000))
def test_a_changed_fact_is_another_sentence(seed: int) -> None:
    said = "Adults may take 500 mg of paracetamol before meals, but not more than four times a day."
    changed = r.change_fact(said, random.Random(seed))
    assert changed is not None
    assert changed != said
    assert r.change_fact("Hm?", random.Random(seed)) is None
