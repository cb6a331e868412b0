"""What is usable text, and what it becomes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_engineer_track.evidence import words_of
from ai_engineer_track.harm import text_of
from ai_engineer_track.intake import EMPTY, LANGUAGE, TOO_LONG, UNREADABLE, is_english, plain, take
from shared import library as lib


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("  my   head\n\nhurts ", "my head hurts"),
        ("<p>my <b>head</b> hurts</p><script>steal()</script>", "my head hurts"),
        ("fever &amp; rash, temp < 38 and > 37", "fever & rash, temp < 38 and > 37"),
        ("my ch\u200best hu\u202erts", "my chest hurts"),
        ("my\x07head\x0bhurts when I cough", "my head hurts when I cough"),
        ("Is 37.5 > normal for my baby?", "Is 37.5 > normal for my baby?"),
    ],
)
def test_a_message_becomes_one_plain_line(message, text):
    assert plain(message) == text
    assert not take(message, 1000).problem


@pytest.mark.parametrize(
    ("message", "problem"),
    [("", EMPTY), ("...", EMPTY), ("x" * 101, TOO_LONG), ("\x00\x01\x02ab", UNREADABLE), ("как лечить мигрень", LANGUAGE),
     ("Was hilft bitte schnell gegen starke Kopfschmerzen nachts", LANGUAGE)],
)  # fmt: skip
def test_problems_have_one_answer_each(message, problem):
    assert take(message, 100).problem == problem


@pytest.mark.parametrize(
    "message", ["migraine", "rolled ankle when walk normally again", "My baby 7 week cry much, they say colic"]
)
def test_fragments_and_learners_english_pass(message):
    assert is_english(message)


def test_no_message_of_the_data_is_taken_for_another_language():
    rows = [
        text_of(row)
        for file in ("questions.jsonl", "cases.jsonl", "emergencies.jsonl", "harmful.jsonl")
        for row in lib.read_rows(lib.DATASETS, file, lib.ROW_FILES[file])[0]
        if row.split != "test"
    ]
    words = {w for leaflet in lib.load_library() for s in leaflet.sentences() for w in words_of(s.text)}
    assert not [text for text in rows if not is_english(text, words)]


@given(st.text(max_size=300))
def test_anything_can_be_sent(message):
    found = take(message, 200)
    assert found.problem or found.text
    assert "\n" not in found.text or found.reason == "too long"
