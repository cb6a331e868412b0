"""Feedback never holds personal data, never loses a record to a crash or a full disk, and never holds one twice."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared import feedback, library
from shared.chat import PROMPT_VERSION
from shared.errors import UserError
from shared.feedback import Feedback, FeedbackStore, TurnSummary, scrub


def record(answer_id: str = "a-1", **fields: Any) -> Feedback:
    values: dict[str, Any] = {
        "kind": "thumbs_down",
        "reason": "not what I asked",
        "question": "What helps?",
        "turn": TurnSummary(kind="answer", text="[1] Rest.", leaflet="migraine", cited=["migraine/self-care/1"]),
        "passages": ["migraine/self-care"],
        "model_version": "m-1",
        "index_version": "i-1",
        "prompt_version": PROMPT_VERSION,
    }
    return Feedback(answer_id=answer_id, **{**values, **fields})


# --- scrubbing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("My name is Ann Lee and I feel sick", "My name is [name] and I feel sick"),
        ("my name is ann and i feel sick", "my name is [name] and i feel sick"),
        ("My name's José Ñandú-O’Neil.", "My name's [name]."),
        ("I'm Priya Sharma, I have a rash", "I'm [name], I have a rash"),
        ("I’m Bob", "I’m [name]"),
        ("I am Bob. Bob's knee hurts", "I am [name]. [name]'s knee hurts"),
        ("i'm called pete", "i'm called [name]"),
        ("This is Maria Lopez speaking", "This is [name] speaking"),
        ("Please call me Kit, my friends do", "Please call me [name], my friends do"),
        ("My son Tom, 4, has a fever. Is Tom ill?", "My son [name], 4, has a fever. Is [name] ill?"),
        ("my daughter, Lily, fell", "my daughter, [name], fell"),
        ("Dr. Smith and Mrs Jones said no", "Dr [name] and Mrs [name] said no"),
        ("It hurts. Thanks,\nBob", "It hurts. Thanks,\n[name]"),
        ("ring 020 7946 0018 please", "ring [number] please"),
        ("+44 (0)7700 900123", "[number]"),
        ("07700900123", "[number]"),
        ("(555) 010-9999", "[number]"),
        ("my phone number is 555 0199", "my phone number is [number]"),
        ("NHS number 943 476 5919", "NHS number [number]"),
        ("\uff10\uff17\uff17\uff10\uff10 \uff19\uff10\uff10\uff11\uff12\uff13", "[number]"),
        ("0\u200b7700 900\u200b123", "[number]"),
        ("write to ann.lee+x@mail.example.co.uk", "write to [email]"),
        ("ann (at) mail (dot) com", "[email]"),
        ("I live at 12 Baker Street, London. My ear hurts", "I live at [address]. My ear hurts"),
        ("from Flat 3, 22 acacia avenue", "from [address]"),
        ("12 Mill Close", "[address]"),
        ("postcode NW1 6XE", "postcode [address]"),
        ("I live in Leeds", "I live in [address]"),
        ("born 12/03/1980", "born [date]"),
        ("DOB: 12.3.80", "DOB: [date]"),
        ("date of birth is 1980-03-12", "date of birth is [date]"),
        ("my birthday is 5 May", "my birthday is [date]"),
        ("I was born in 1980", "I was born in [date]"),
        ("since 3rd of March, 2026", "since [date]"),
        ("on March 3, 2026", "on [date]"),
    ],
)
def test_what_gives_people_away_is_taken_out(text: str, clean: str) -> None:
    assert scrub(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "I'm tired and pregnant, 38.5 since Monday",
        "I'm Type 1 diabetic and I'm Black",
        "blood pressure 120/80, pulse 72, oxygen 97",
        "take 2 tablets of 500 mg every 4-6 hours, at most 4000 mg in 24 hours",
        "vitamin B12 1000 micrograms",
        "call me an ambulance, call 112 or 999",
        "I live in a damp flat",
        "a verruca is called a wart",
        "in 2026 it was worse than in 2025",
        "This is the worst pain of my life",
        "My doctor GP said it is fine",
    ],
)
def test_what_says_how_someone_is_stays(text: str) -> None:
    assert scrub(text) == text


def test_the_librarys_own_sentences_and_nearly_all_questions_stay_as_they_are() -> None:
    sentences = [s.text for leaflet in library.load_library() for s in leaflet.sentences()]
    assert [text for text in sentences if scrub(text) != text] == []
    questions = [q.question for q in library.read_rows(library.DATASETS, "questions.jsonl", library.Question)[0]]
    changed = [text for text in questions if scrub(text) != text]
    assert len(changed) <= 0.01 * len(questions)  # the few that name a neighbour or a Mrs Patel


@given(st.text())
@example("I'm Dr Smith, born 1.1.1980 at 12 High Street, a@b.co 020 7946 0018")
@example("my name is [name] my name is")
def test_scrubbing_twice_changes_nothing_more(text: str) -> None:
    assert scrub(scrub(text)) == scrub(text)


FRAGMENTS = (
    "my name is|I'm|I am|this is|call me|my son|Dr|Mrs|I live at|I live in|born on|dob|call|Thanks,\n|Ann|Lee|ann|and|street"
    "|12|1980|5 May|12/03/1980|020|7946|0018|NW1 6XE|a@b.co|(at)|High Street|.|,|[name]|is called|Type 1"
).split("|")


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(" ".join))
def test_scrubbing_twice_changes_nothing_more_whatever_stands_together(text: str) -> None:
    assert scrub(scrub(text)) == scrub(text)


@given(number=st.from_regex(r"0[1-9]\d{3}[ -]?\d{6}", fullmatch=True), before=st.sampled_from(["", "ring ", "tel:", "it is "]))
def test_no_phone_number_gets_through(number: str, before: str) -> None:
    assert not any(c.isdigit() for c in scrub(before + number))


@pytest.mark.parametrize(
    "piece", ["a ", "1", "1 ", "A", "Ab ", "my name is ", "a@", "I live at ", "1.", "(at)", "my son Ab ", "12 ab "]
)
def test_no_message_makes_scrubbing_slow(piece: str) -> None:
    text = (piece * 20_000)[:20_000]
    began = time.process_time()
    scrub(text)
    assert time.process_time() - began < 2.0


def test_a_record_cannot_hold_what_was_not_scrubbed() -> None:
    secret = "My name is Ann Lee, 020 7946 0018"
    made = record(
        reason=secret, question=secret, earlier=[secret], turn=TurnSummary(kind="clarify", text=secret, question=secret)
    )
    written = made.model_dump_json()
    assert "Ann" not in written
    assert "7946" not in written
    assert written.count("[name]") == 5


# --- records ---------------------------------------------------------------------------------------------------------


def test_the_same_remark_has_the_same_id_and_another_has_another() -> None:
    assert record().id == record(time="2026-01-01T00:00:00+00:00").id
    others = [record("a-2"), record(kind="thumbs_up"), record(reason="too long")]
    assert len({record().id, *(other.id for other in others)}) == 4


@pytest.mark.parametrize("fields", [{"kind": "like"}, {"session": "s-1"}, {"answer_id": ""}, {"reason": "x" * 2001}])
def test_a_record_of_another_shape_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        record(**{"answer_id": "a-1", **fields})


# --- the file --------------------------------------------------------------------------------------------------------


def test_what_is_added_is_read_back_in_order(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "new" / "folder")
    added = [record("a-1", question="naïve\n☃ ?"), record("a-2", earlier=["It hurts"])]
    assert [store.add(one) for one in added] == [True, True]
    assert feedback.read(tmp_path / "new" / "folder") == (added, [])


def test_nothing_is_written_twice_not_even_by_another_process(tmp_path: Path) -> None:
    store, other = FeedbackStore(tmp_path), FeedbackStore(tmp_path)
    assert store.add(record())
    assert not store.add(record())
    assert not other.add(record(time="2030-01-01T00:00:00+00:00"))
    assert other.add(record("a-2"))
    assert not store.add(record("a-2"))
    assert len((tmp_path / "feedback.jsonl").read_text().splitlines()) == 2


def test_many_threads_lose_nothing(tmp_path: Path) -> None:
    def work(worker: int) -> None:
        store = FeedbackStore(tmp_path)
        for n in range(10):
            store.add(record(f"a-{worker % 4}-{n}"))  # every record is offered by two threads

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records, bad = feedback.read(tmp_path)
    assert not bad
    assert sorted(r.answer_id for r in records) == sorted(f"a-{w}-{n}" for w in range(4) for n in range(10))


def test_only_ever_appended_to(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path)
    store.add(record("a-1"))
    before = store.path.read_bytes()
    store.add(record("a-2"))
    assert store.path.read_bytes().startswith(before)


@pytest.mark.parametrize("cut", [1, 2, 40, -1])
def test_a_torn_last_line_is_reported_and_spoils_nothing_else(tmp_path: Path, cut: int) -> None:
    store = FeedbackStore(tmp_path)
    store.add(record("a-1"))
    whole = store.path.stat().st_size
    store.add(record("a-2"))
    length = whole + cut if cut > 0 else store.path.stat().st_size - 2
    os.truncate(store.path, length)
    assert [r.answer_id for r in feedback.read(tmp_path)[0]] == ["a-1"]
    assert FeedbackStore(tmp_path).add(record("a-3"))
    records, bad = feedback.read(tmp_path)
    assert [r.answer_id for r in records] == ["a-1", "a-3"]
    assert [(row.file, row.line) for row in bad] == [("feedback.jsonl", 2)]
    assert bad[0].reason


def test_a_record_whose_line_was_torn_can_be_added_again(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path)
    store.add(record())
    os.truncate(store.path, store.path.stat().st_size - 5)
    assert FeedbackStore(tmp_path).add(record())
    assert len(feedback.read(tmp_path)[0]) == 1


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeedbackStore(tmp_path)
    store.add(record("a-1"))
    before = store.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            store.add(record("a-2"))
    assert store.path.read_bytes() == before
    assert store.add(record("a-2"))


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"not json",
        b"[]",
        b"null",
        b'{"kind": "thumbs_up"}',
        b"[" * 100_000,
        json.dumps({**record("a-9").model_dump(mode="json"), "schema_version": 2}).encode(),
        json.dumps({**record("a-9").model_dump(mode="json"), "extra": 1}).encode(),
    ],
)
def test_a_line_that_is_no_record_is_skipped_with_its_reason(tmp_path: Path, line: bytes) -> None:
    store = FeedbackStore(tmp_path)
    store.add(record("a-1"))
    with store.path.open("ab") as stream:
        stream.write(line + b"\n")
    assert store.add(record("a-2"))
    records, bad = feedback.read(tmp_path)
    assert [r.answer_id for r in records] == ["a-1", "a-2"]
    assert len(bad) == 1
    assert bad[0].line == 2
    assert bad[0].reason


def test_no_file_is_no_feedback(tmp_path: Path) -> None:
    assert feedback.read(tmp_path) == ([], [])


def test_the_command_counts_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = FeedbackStore(tmp_path)
    store.add(record("a-1"))
    with store.path.open("ab") as stream:
        stream.write(b"{torn")
    assert feedback.main(["--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "1  thumbs_down" in shown.out
    assert "skipped feedback.jsonl:2" in shown.err
