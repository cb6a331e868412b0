"""Training rows: what they quote is right, nothing of the test split is in them, and what was left out is on record."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from ml_engineer_track import curate as c
from ml_engineer_track.curate import CuratedData, Row, curate
from ml_engineer_track.ordering import ServedOrder
from shared import library as lib
from shared.chat import NOT_ANSWERED, Decision, Message, Verdict, answer_text, follow_up, parse_answer
from shared.errors import UserError
from shared.files import read_jsonl
from shared.library import SPLITS, Library
from shared.settings import Settings
from shared.versions import datasets_version
from tests.ml_engineer_track.conftest import RANKER, WordVectors

MakeSettings = Callable[..., Settings]
SKILLS = {"answer", "decide", "clarify", "judge"}


@pytest.fixture(scope="module")
def library(small_datasets: Path) -> Library:
    return lib.load_library(small_datasets)


def add_row(datasets: Path, file: str, **changes: Any) -> None:
    """A copy of the file's first row with some fields changed."""
    path = datasets / file
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0]) | changes
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def quarantine(data: CuratedData) -> list[dict[str, Any]]:
    return read_jsonl(data.folder / "quarantine.jsonl")


def talks(data: CuratedData, split: lib.Split = "train") -> list[Row]:
    """Rows in which more than one question is asked."""
    return [row for row in data.rows(split) if len(row.messages) > 1]


def ids(data: CuratedData, split: lib.Split) -> set[str]:
    return {row.id.split("#")[0] for row in data.rows(split)}


# --- where the rows come from ----------------------------------------------------------------------------------------


def test_every_row_says_which_rows_of_the_data_it_was_made_of(small_data: CuratedData, small_datasets: Path) -> None:
    known = {row.id: row for file, kind in lib.ROW_FILES.items() for row in lib.read_rows(small_datasets, file, kind)[0]}
    for split in SPLITS:
        for row in small_data.rows(split):
            assert row.made_from, row.id
            assert {known[origin].split for origin in row.made_from} == {split}
            if len(row.messages) == 1:
                assert len(row.made_from) == 1
                assert row.id.split("#")[0].removesuffix("x") == row.made_from[0]
    for row in talks(small_data):
        asked = [m["content"].rsplit("Question: ", 1)[1] for m in row.messages if m["role"] == "user"]
        assert [" ".join(known[origin].question.split()) for origin in row.made_from] == asked


def test_a_data_version_names_the_data_folder_it_was_made_of(
    small_data: CuratedData, small_datasets: Path, tmp_path: Path
) -> None:
    assert small_data.datasets == datasets_version(small_datasets)
    assert c.load_curated(small_data.folder).datasets == small_data.datasets
    (tmp_path / "report.json").write_text('{"version": "d-1", "counts": {}, "dropped": {}}', encoding="utf-8")
    assert c.load_curated(tmp_path).datasets is None  # written before it was kept


# --- what the rows show ----------------------------------------------------------------------------------------------


def test_every_split_has_rows_of_every_skill(small_data: CuratedData) -> None:
    for split in SPLITS:
        assert set(small_data.counts[split]) == SKILLS
        assert small_data.counts[split] == {skill: len(small_data.rows(split, skill)) for skill in small_data.counts[split]}


def test_gold_numbers_point_at_the_annotated_sentences(small_data: CuratedData, small_datasets: Path, library: Library) -> None:
    questions = {q.id: q for q in lib.read_rows(small_datasets, "questions.jsonl", lib.Question)[0]}
    checked = 0
    for split in SPLITS:
        for row in small_data.rows(split, "answer"):
            if not row.gold:
                continue
            wanted = questions[row.id.split("#")[0]].answer_sentences
            assert [row.sources[n - 1] for n in row.gold] == wanted
            assert [q.text for q in parse_answer(row.reply)] == [library.sentence(sid).text for sid in wanted]
            assert row.reply in row.messages[0]["content"] or len(wanted) > 1
            checked += 1
    assert checked > 30


def test_sources_stand_in_the_prompt_under_their_number(small_data: CuratedData, library: Library) -> None:
    for row in [*small_data.rows("train", "answer"), *small_data.rows("test", "judge")]:
        numbered = dict(re.findall(r"^\[(\d+)\] (.*)$", row.messages[0]["content"], flags=re.MULTILINE))
        assert numbered == {str(n): library.sentence(sid).text for n, sid in enumerate(row.sources, start=1)}


def test_replies_of_the_other_skills_can_be_read_back(small_data: CuratedData) -> None:
    for split in SPLITS:
        actions = {Decision.model_validate_json(row.reply).action for row in small_data.rows(split, "decide")}
        assert actions == {"answer", "clarify", "escalate", "decline"}
        assert all(Verdict.model_validate_json(row.reply) for row in small_data.rows(split, "judge"))
        assert all(row.reply.endswith("?") for row in small_data.rows(split, "clarify"))


def test_no_test_sentence_is_in_any_training_prompt(small_data: CuratedData, library: Library) -> None:
    shown: dict[str, set[str]] = {split: set() for split in SPLITS}
    for leaf in library:
        shown[leaf.split] |= {s.text for s in leaf.sentences()}
    own_to_test = shown["test"] - shown["train"]
    assert len(own_to_test) > 500
    test_titles = {leaf.title for leaf in library if leaf.split == "test"}
    for row in small_data.rows("train"):
        lines = {line.split("] ", 1)[-1] for message in row.messages for line in message["content"].splitlines()}
        assert not lines & own_to_test
        if row.skill == "decide":
            assert not test_titles & set(row.messages[0]["content"].split("Leaflets: ")[1].split("\n")[0].split("; "))


def test_families_stay_apart(small_data: CuratedData, library: Library) -> None:
    families: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for row in small_data.rows(split):
            all_own = row.skill == "judge" or len(row.messages) > 1
            quoted = row.sources if all_own else [row.sources[n - 1] for n in row.gold]
            families[split] |= {library.leaflets[sid.split("/")[0]].family for sid in quoted}
    assert all(families.values())
    assert not families["train"] & families["validation"]
    assert not families["train"] & families["test"]
    assert not families["validation"] & families["test"]


def test_a_withheld_row_shows_nothing_of_its_leaflet_and_says_so(
    small_settings: Settings, small_datasets: Path, tmp_path: Path
) -> None:
    questions = {q.id: q for q in lib.read_rows(small_datasets, "questions.jsonl", lib.Question)[0]}
    each = small_settings.curate.model_copy(update={"single_share": 1.0, "conversations": 0})
    data = curate(small_settings.model_copy(update={"curate": each, "artifacts": tmp_path}), RANKER)
    withheld = [r for r in data.rows("train", "answer") if not r.gold and questions[r.id.split("#")[0]].answerable]
    assert withheld
    for row in withheld:
        assert row.reply == NOT_ANSWERED
        assert not {sid.split("/")[0] for sid in row.sources} & set(questions[row.id.split("#")[0]].leaflets)


def test_only_training_questions_are_withheld(small_data: CuratedData, small_datasets: Path) -> None:
    questions = {q.id: q for q in lib.read_rows(small_datasets, "questions.jsonl", lib.Question)[0]}
    for split in ("validation", "test"):
        assert all(bool(r.gold) == questions[r.id.split("#")[0]].answerable for r in small_data.rows(split, "answer"))


def test_copies_show_a_question_again_with_other_distractors(make_settings: MakeSettings) -> None:
    data = curate(make_settings(curate={"copies": 4, "max_sources": 20, "max_prompt_tokens": 2000, "single_share": 1.0}), RANKER)
    copies = [r for r in data.rows("train", "answer") if r.id.startswith("q-colds-1#")]
    assert len(copies) == 4
    assert len({r.messages[0]["content"] for r in copies}) > 1
    assert len([r for r in data.rows("test", "answer") if r.id.startswith("q-burns-1#")]) == 1


def test_an_answer_prompt_keeps_to_the_number_of_sources_asked_for(make_settings: MakeSettings) -> None:
    data = curate(make_settings(curate={"max_sources": 10, "single_share": 1.0}), RANKER)
    assert {len(r.sources) for r in data.rows("train", "answer")} == {10}


def test_the_sources_stand_in_the_order_the_product_shows_them_in(
    small_data: CuratedData, small_datasets: Path, library: Library
) -> None:
    """Likeliest first, by the ranker; of a conversation, for its first question."""
    rows = [row for split in SPLITS for row in small_data.rows(split, "answer")]
    questions = [row.messages[0]["content"].split("\n\nQuestion: ")[-1] for row in rows]
    order = ServedOrder(library, list(dict.fromkeys(questions)), RANKER, WordVectors().embed)
    for row, question in zip(rows, questions, strict=True):
        sources = c.sources_of(library, row.sources)
        assert order(question, sources) == sources  # nothing left to move
    firsts = [row.gold[0] for row in rows if row.gold]
    assert firsts.count(1) > len(firsts) / 4  # among eight sources


# --- conversations ---------------------------------------------------------------------------------------------------

#: what is asked about the common cold -> the sentences that answer it
ASKED = {
    "What does the word common cold mean?": ["overview/1"],
    "How will I notice that it has got me?": ["symptoms/1"],
    "Which of the signs come last?": ["symptoms/3", "symptoms/2"],
    "Who or what gave it to us?": ["causes/2"],
    "Is there any treatment that works?": ["treatment/1"],
    "Should grandmother see somebody about hers?": ["see-a-doctor/4"],
    "When must an ambulance come?": ["emergency/1", "emergency/2"],
    "How do we keep the baby from catching one?": ["prevention/5"],
    "Do hot drinks and more sleep do any good?": ["self-care/2", "prevention/1"],
}
TALKATIVE = {"max_sources": 12, "max_prompt_tokens": 2000, "conversations": 6, "conversation_turns": 4, "single_share": 0.0}


@pytest.fixture
def asked(mini_datasets: Path) -> dict[str, list[str]]:
    """The mini data with more questions about one leaflet of every split, and one that nothing answers; texts with ids."""
    # In another order the same words are no duplicate.
    for split, slug, order in (
        ("train", "common-cold", list),
        ("validation", "tonsillitis", sorted),
        ("test", "minor-burns", reversed),
    ):
        for n, (question, sentences) in enumerate(ASKED.items()):
            told = {"question": " ".join(order(question.split())), "leaflets": [slug]}
            told["answer_sentences"] = [f"{slug}/{s}" for s in sentences]
            add_row(mini_datasets, "questions.jsonl", id=f"q-{slug}-{n}", split=split, **told)
    nothing = {"answerable": False, "leaflets": [], "answer_sentences": []}
    add_row(mini_datasets, "questions.jsonl", id="q-open", question="Who was the first person with a cold?", **nothing)
    rows = [lib.Question.model_validate(row) for row in read_jsonl(mini_datasets / "questions.jsonl")]
    return {row.question: row.answer_sentences for row in rows}


def turns(row: Row) -> list[tuple[str, str]]:
    """Questions with their replies."""
    questions = [m["content"].split("Question: ")[-1] for m in row.messages[::2]]
    return list(zip(questions, [*(m["content"] for m in row.messages[1::2]), row.reply], strict=True))


def test_a_conversation_asks_about_the_sources_of_its_first_message(
    make_settings: MakeSettings, asked: dict[str, list[str]]
) -> None:
    rows = talks(curate(make_settings(curate=TALKATIVE), RANKER))
    assert len(rows) >= 6
    for row in rows:
        assert row.skill == "answer"
        assert [m["role"] for m in row.messages] == ["user", "assistant"] * (len(row.messages) // 2) + ["user"]
        assert all(m == follow_up(question) for m, (question, _) in zip(row.messages[2::2], turns(row)[1:], strict=True))
        assert [m["content"].count("Sources:") for m in row.messages] == [1] + [0] * (len(row.messages) - 1)
        assert len(row.sources) == len(set(row.sources)) <= 12
        questions = [question for question, _ in turns(row)]
        assert 2 <= len(set(questions)) == len(questions) <= 4


def test_every_reply_of_a_conversation_quotes_the_annotated_sentences_or_none_of_them_is_shown(
    make_settings: MakeSettings, mini_datasets: Path, asked: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = lib.load_library(mini_datasets)
    replies = []
    for row in talks(curate(make_settings(curate={**TALKATIVE, "copies": 12}), RANKER)):
        sources = c.sources_of(library, row.sources)
        for question, reply in turns(row):
            wanted = asked[question]
            if set(wanted) <= set(row.sources):
                assert reply == answer_text([row.sources.index(sid) + 1 for sid in wanted], sources)
            else:
                assert reply == NOT_ANSWERED
                assert not set(wanted) & set(row.sources)
            replies.append(reply)
    assert 0 < replies.count(NOT_ANSWERED) < len(replies) / 10


def test_all_sections_of_a_leaflet_are_gone_through_and_its_look_alikes_are_among_them(
    make_settings: MakeSettings, asked: dict[str, list[str]]
) -> None:
    sources = {sid for row in talks(curate(make_settings(curate=TALKATIVE), RANKER)) for sid in row.sources}
    assert {sid.split("/")[1] for sid in sources if sid.startswith("common-cold/")} == set(lib.SECTIONS)
    assert {sid.split("/")[0] for sid in sources} == {"common-cold", "influenza"}


def test_only_training_has_conversations_and_each_has_an_id_of_its_own(
    make_settings: MakeSettings, asked: dict[str, list[str]]
) -> None:
    data = curate(make_settings(curate={**TALKATIVE, "copies": 2}), RANKER)
    assert talks(data, "validation") == talks(data, "test") == []
    assert {"q-minor-burns-0", "q-minor-burns-8"} <= ids(data, "test")
    named = [row.id for row in data.rows("train")]
    assert len(set(named)) == len(named)


@pytest.mark.parametrize(("share", "fewest", "most"), [(0.0, 0, 0), (0.5, 6, 34), (1.0, 40, 40)])
def test_as_many_questions_as_asked_for_also_get_a_row_of_their_own(
    make_settings: MakeSettings, asked: dict[str, list[str]], share: float, fewest: int, most: int
) -> None:
    data = curate(make_settings(curate={**TALKATIVE, "single_share": share, "copies": 4}), RANKER)
    single = [row.id for row in data.rows("train", "answer") if len(row.messages) == 1]
    assert fewest <= len([name for name in single if not name.startswith("q-open")]) <= most
    assert len([name for name in single if name.startswith("q-open")]) == 4  # what is not answered is always shown
    assert talks(data)


def test_without_conversations_every_row_is_one_question(make_settings: MakeSettings, asked: dict[str, list[str]]) -> None:
    data = curate(make_settings(curate={**TALKATIVE, "conversations": 0, "single_share": 1.0}), RANKER)
    assert talks(data) == []


def test_a_conversation_is_measured_with_all_of_its_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    opening = Row(id="one", split="train", skill="answer", messages=[follow_up("What helps?")], reply="[1] Rest.")
    more: list[Message] = [{"role": "assistant", "content": "[1] Rest."}, follow_up("What else helps?")]
    talk = opening.model_copy(update={"id": "talk", "messages": [*opening.messages, *more]})
    dropped: list[dict[str, Any]] = []
    limit = len(tokenizer(opening.messages[0]["content"] + opening.reply, add_special_tokens=False)["input_ids"])
    assert c._fit([opening, talk], tokenizer, limit, dropped) == [opening]
    assert [q["id"] for q in dropped] == ["talk"]
    assert dropped[0]["tokens"] > 1.8 * limit


# --- what is left out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["What helps with minor-burns?", "what helps, with minor burns"])
def test_a_repeated_question_is_dropped_and_the_test_row_kept(
    make_settings: MakeSettings, mini_datasets: Path, question: str
) -> None:
    # The second spelling has the same words once punctuation and case are gone.
    add_row(mini_datasets, "questions.jsonl", id="q-colds-twin", question=question.replace("-", " "))
    rows = read_jsonl(mini_datasets / "questions.jsonl")
    rows[-2]["question"] = "What helps with minor burns?"
    (mini_datasets / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    data = curate(make_settings(), RANKER)
    assert "q-burns-1" in ids(data, "test")
    assert "q-colds-twin" not in ids(data, "train")
    found = {"file": "questions.jsonl", "id": "q-colds-twin", "reason": "exact duplicate", "of": "q-burns-1"}
    assert found in quarantine(data)
    assert data.dropped == {"exact duplicate": 1}


def test_a_nearly_repeated_question_is_dropped_and_the_test_row_kept(make_settings: MakeSettings, mini_datasets: Path) -> None:
    long = "My little son spilled a whole cup of hot tea over his left hand this morning what should I do now"
    add_row(mini_datasets, "questions.jsonl", id="q-colds-twin", question=long + " please")
    test_row = {"split": "test", "leaflets": ["minor-burns"], "answer_sentences": ["minor-burns/self-care/1"]}
    add_row(mini_datasets, "questions.jsonl", id="q-burns-long", question=long, **test_row)
    data = curate(make_settings(), RANKER)
    assert "q-burns-long" in ids(data, "test")
    assert "q-colds-twin" not in ids(data, "train")
    assert data.dropped == {"near duplicate": 1}


def test_different_questions_are_not_taken_for_duplicates(make_settings: MakeSettings, mini_datasets: Path) -> None:
    add_row(mini_datasets, "questions.jsonl", id="q-colds-2", question="How long does a cold last in children?")
    data = curate(make_settings(curate={"single_share": 1.0}), RANKER)
    assert "q-colds-2" in ids(data, "train")
    assert data.dropped == {}


def test_a_malformed_line_lands_in_quarantine_with_its_reason(make_settings: MakeSettings, mini_datasets: Path) -> None:
    with (mini_datasets / "cases.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"id": "case-broken", "split": "train"\n')
    data = curate(make_settings(), RANKER)
    (entry,) = quarantine(data)
    assert entry["file"] == "cases.jsonl"
    assert entry["line"] == 4
    assert entry["reason"].startswith("malformed: ")
    assert len(entry["reason"]) > len("malformed: ")
    assert "case-broken" in entry["text"]
    assert data.dropped == {"malformed": 1}


def test_a_second_row_with_the_same_id_lands_in_quarantine(make_settings: MakeSettings, mini_datasets: Path) -> None:
    add_row(mini_datasets, "harmful.jsonl", message="Quite another request")
    assert quarantine(curate(make_settings(), RANKER)) == [
        {"file": "harmful.jsonl", "id": "harm-colds-1", "reason": "duplicate id"}
    ]


def test_rows_that_are_too_long_land_in_quarantine_and_are_not_cut(make_settings: MakeSettings, mini_datasets: Path) -> None:
    whole = curate(make_settings(), RANKER)
    shorter = curate(make_settings(curate={"max_prompt_tokens": 120}), RANKER)
    long = [q for q in quarantine(shorter) if q["reason"] == "too long"]
    assert long
    assert all(q["tokens"] > q["limit"] == 120 for q in long)
    for split in SPLITS:
        before, after = ({r.id: r for r in data.rows(split)} for data in (whole, shorter))
        assert after.items() <= before.items()
        assert set(before) - set(after) == {q["id"] for q in long} & set(before)


def test_a_data_set_of_which_nothing_is_left_is_refused(make_settings: MakeSettings) -> None:
    settings = make_settings(curate={"max_prompt_tokens": 5})
    with pytest.raises(UserError, match="no train rows are left"):
        curate(settings, RANKER)
    assert not (settings.artifacts / "data").exists()


def test_the_quarantine_on_disk_is_that_of_the_last_curation(make_settings: MakeSettings, mini_datasets: Path) -> None:
    """The rows do not change when a broken line is added, so neither does the version; the record must."""
    settings = make_settings()
    clean = curate(settings, RANKER)
    with (mini_datasets / "cases.jsonl").open("a", encoding="utf-8") as stream:
        stream.write("not a row\n")
    again = curate(settings, RANKER)
    assert again.version == clean.version
    assert [q["reason"].split(":")[0] for q in quarantine(again)] == ["malformed"]
    assert c.load_curated(again.folder).dropped == {"malformed": 1}


def rows_of(counts: dict[str, int]) -> list[Row]:
    kinds = [skill for skill, n in counts.items() for _ in range(n)]
    return [Row(id=f"r{i}", split="train", skill=skill, messages=[], reply="") for i, skill in enumerate(kinds)]


@pytest.mark.parametrize("limit", [20, 40, 60, 99, 100])
def test_a_limit_on_rows_keeps_every_skill_in_proportion(limit: int) -> None:
    counts = {"answer": 70, "decide": 20, "clarify": 5, "judge": 5}
    kept = c._spread(rows_of(counts), limit)
    assert len(kept) <= limit
    assert len({r.id for r in kept}) == len(kept)
    for skill, n in counts.items():
        assert sum(r.skill == skill for r in kept) == max(1, limit * n // 100)


def test_a_limit_on_rows_takes_them_from_everywhere() -> None:
    kept = c._spread(rows_of({"answer": 100}), 10)
    assert [r.id for r in kept] == [f"r{i}" for i in range(0, 100, 10)]


def test_a_skill_of_few_rows_is_not_lost() -> None:
    assert {r.skill for r in c._spread(rows_of({"answer": 500, "clarify": 1}), 20)} == {"answer", "clarify"}


@pytest.mark.parametrize("limit", [120, 200, 1000])
def test_a_limit_above_the_number_of_rows_keeps_each_once(limit: int) -> None:
    rows = rows_of({"answer": 70, "decide": 20, "clarify": 5, "judge": 5})
    assert sorted(r.id for r in c._spread(rows, limit)) == sorted(r.id for r in rows)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_question_that_points_to_no_sentence_is_refused_by_row_and_file(
    make_settings: MakeSettings, mini_datasets: Path
) -> None:
    add_row(mini_datasets, "questions.jsonl", id="q-lost", answer_sentences=["common-cold/self-care/99"])
    settings = make_settings()
    with pytest.raises(UserError) as caught:
        curate(settings, RANKER)
    for part in ("q-lost", "common-cold/self-care/99", str(mini_datasets / "questions.jsonl")):
        assert part in str(caught.value)
    assert not settings.artifacts.exists()


def test_a_broken_leaflet_is_refused_and_nothing_written(make_settings: MakeSettings, mini_datasets: Path) -> None:
    (mini_datasets / "health_library" / "sunburn.md").write_text("no front matter", encoding="utf-8")
    settings = make_settings()
    with pytest.raises(UserError, match=r"sunburn\.md"):
        curate(settings, RANKER)
    assert not settings.artifacts.exists()


def edit_leaflet(datasets: Path, slug: str, old: str, new: str) -> None:
    path = datasets / "health_library" / f"{slug}.md"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("slug", "old", "new", "told"),
    [
        ("common-cold", "look_alikes: [influenza]", "look_alikes: [minor-burns]", "look-alike 'minor-burns' is in split test"),
        ("common-cold", "look_alikes: [influenza]", "look_alikes: [no-leaflet]", "look-alike 'no-leaflet' does not exist"),
        ("sunburn", "family: burns", "family: colds", "family colds is in splits ['test', 'train']"),
    ],
)
def test_what_would_let_test_text_into_training_is_refused(
    make_settings: MakeSettings, mini_datasets: Path, slug: str, old: str, new: str, told: str
) -> None:
    edit_leaflet(mini_datasets, slug, old, new)
    settings = make_settings()
    with pytest.raises(UserError) as caught:
        curate(settings, RANKER)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not settings.artifacts.exists()


# --- versions --------------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_version_and_another_seed_another_order(
    small_settings: Settings, small_data: CuratedData, tmp_path: Path
) -> None:
    again = curate(small_settings.model_copy(update={"artifacts": tmp_path}), RANKER)
    assert again.version == small_data.version
    assert all(again.rows(split) == small_data.rows(split) for split in SPLITS)
    other = curate(small_settings.model_copy(update={"seed": 8}), RANKER)
    assert other.version != small_data.version
    first = {r.id: r.sources for r in small_data.rows("test", "answer")}
    changed = [r.sources != first[r.id] for r in other.rows("test", "answer") if r.id in first]
    assert sum(changed) > len(changed) / 2


def test_a_changed_sentence_gives_another_version(make_settings: MakeSettings, mini_datasets: Path) -> None:
    before = curate(make_settings(), RANKER).version
    edit_leaflet(mini_datasets, "common-cold", "self-care fact 1 helps", "self-care fact 1 truly helps")
    assert curate(make_settings(), RANKER).version != before


def test_a_version_is_read_back_as_it_was_made(small_data: CuratedData, tmp_path: Path) -> None:
    assert c.load_curated(small_data.folder) == small_data
    with pytest.raises(UserError, match="not a curated data version"):
        c.load_curated(tmp_path)


# --- text ------------------------------------------------------------------------------------------------------------


@given(st.text())
@example("\x00a\x07b\u200b\ud7ff\u2028c")
def test_normalised_text_is_one_line_without_control_characters(text: str) -> None:
    clean = c.normalise(text)
    assert not [ch for ch in clean if unicodedata.category(ch).startswith("C")]
    assert clean == " ".join(clean.split())
    assert c.normalise(clean) == clean


def test_normalising_keeps_words_and_composes_accents() -> None:
    assert c.normalise("cafe\u0301\x00 au\t lait \n\u200b") == "caf\u00e9 au lait"


def test_control_characters_in_a_question_do_not_reach_the_prompt(make_settings: MakeSettings, mini_datasets: Path) -> None:
    add_row(mini_datasets, "questions.jsonl", id="q-pasted", question="How long\x07 does\u200b a\ncold last?")
    data = curate(make_settings(curate={"single_share": 1.0}), RANKER)
    (row,) = [r for r in data.rows("train", "answer") if r.id.startswith("q-pasted")]
    assert "Question: How long does a cold last?" in row.messages[0]["content"].splitlines()
