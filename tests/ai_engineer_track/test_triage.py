"""The floor, the flags and the voters. The figures on real vectors are in the report; here is what must never change."""

import pytest
from small_index import embed

from ai_engineer_track import red_flags
from ai_engineer_track.triage import TriageNurse, examples, measure_triage
from shared import library as lib
from shared.library import load_library


@pytest.mark.parametrize(
    ("message", "rule"),
    [
        ("He's clutching his chest and his left arm aches", "chest pressure with arm, sweat, breath or collapse"),
        ("Mum's face has dropped on one side and her words come out wrong", "signs of a stroke"),
        ("my baby won't wake up and her lips are blue", "not breathing, or blue"),
        ("I've written the letters, I don't want to be here tomorrow", "a plan of suicide"),
        ("I swallowed about thirty paracetamol an hour back", "overdose"),
        ("he has a high fever and a stiff neck", "signs of meningitis"),
        ("our six week old has a temperature of 38.5", "fever in a young baby"),
        ("she ate a peanut and her tongue is swelling and she's wheezing", "throat closing"),
        ("I've pressed on the nosebleed for twenty minutes and it's still pouring", "bleeding that goes on"),
        ("she's been fitting for ten minutes", "fit that does not stop"),
    ],
)
def test_the_floor_knows_the_plain_cases(message, rule):
    assert red_flags.floor(message) == rule


@pytest.mark.parametrize(
    "message",
    [
        "What are the signs of a stroke?",
        "I had a heart attack in 2019 with chest pain and a numb arm, may I fly?",
        "no chest pain, no sweating, my arm just aches after tennis",
        "My face is fine and my speech is not slurred",
        "The nosebleed has stopped and I feel fine",
        "How long does a migraine last?",
    ],
)
def test_the_floor_leaves_questions_the_past_and_denials_alone(message):
    assert red_flags.floor(message) is None


def test_the_floor_calls_no_near_miss_an_emergency():
    """On training and validation rows, which the list may be tuned on."""
    rows = [r for r in lib.read_rows(lib.DATASETS, "emergencies.jsonl", lib.Emergency)[0] if r.split != "test"]
    assert not [r.message for r in rows if not r.emergency and red_flags.floor(r.message)]
    found = [red_flags.floor(r.message) is not None for r in rows if r.emergency]
    # It knows the plain cases; most of these rows were written to be told in other words than the list's.
    assert sum(found) / len(found) > 0.15


def test_a_denied_alarm_is_no_alarm():
    assert "high fever" in red_flags.alarms("he has a high fever")
    assert "high fever" not in red_flags.alarms("he has no high fever")


def test_features_are_of_one_length_for_any_text():
    lengths = {len(red_flags.features(t)) for t in ("", "x", "chest pain!!!", "é" * 5000)}
    assert lengths == {len(red_flags.ALARMS) + len(red_flags.REASSURANCES) + 1}


@pytest.fixture(scope="module")
def nurse(roles):
    return roles.nurse


def test_one_voter_is_enough_and_the_sign_is_from_the_library(nurse):
    message = "he's clutching his chest, grey and sweating"
    vote = nurse.judge(message, embed([message])[0])
    assert vote.emergency
    assert vote.rule
    assert vote.sign.split("/")[1] == "emergency"
    assert set(vote.votes()) == {"learned heads", "floor", "alarms", "nearest sign"}


def test_a_harmless_question_passes(nurse):
    message = "How long should I rest my ankle?"
    assert not nurse.judge(message, embed([message])[0]).emergency


def test_no_test_row_is_learned_from(settings, small_data):
    texts = set(examples(settings, embed).texts)
    library = load_library(small_data)
    test = {r.message for r in lib.read_rows(small_data, "emergencies.jsonl", lib.Emergency)[0] if r.split == "test"}
    test |= {s.text for leaf in library if leaf.split == "test" for s in leaf.sentences("emergency")}
    assert not texts & test


def test_measures_have_intervals_and_name_the_misses(nurse, settings):
    found = measure_triage(nurse, settings, embed, "validation")
    assert 0.0 <= found["sensitivity"].low <= found["sensitivity"].value <= 1.0
    assert found["specificity"].n > 5
    assert isinstance(found["missed"], list)


def test_a_library_without_signs_still_escalates(settings, roles):
    plain = TriageNurse(roles.settings, embed, [])
    message = "he's clutching his chest, grey and sweating"
    vote = plain.judge(message, embed([message])[0])
    assert vote.emergency
    assert vote.sign is None


def test_between_the_thresholds_there_is_a_warning(nurse, settings):
    """Training and validation messages on both sides; nothing below the lower threshold is said to be near an emergency."""
    rows = [r for r in lib.read_rows(settings.datasets, "emergencies.jsonl", lib.Emergency)[0] if r.split != "test"]
    votes = [nurse.judge(r.message, vector) for r, vector in zip(rows, embed([r.message for r in rows]), strict=True)]
    assert nurse.words.threshold < nurse.flags.threshold
    for vote in votes:
        assert vote.warning == (not vote.emergency and vote.probability >= nurse.words.threshold)
        assert not (vote.warning and vote.emergency)
    found = [v.emergency or v.warning for r, v in zip(rows, votes, strict=True) if r.emergency]
    assert sum(found) / len(found) >= 0.9


def test_the_thresholds_survive_a_damaged_file(roles, settings, nurse):
    """Either head can be missing, so that the other one's predictions have to be made anew."""
    for name in ("triage", "triage-words"):
        for path in (roles.settings.artifacts / "heads").glob(f"{name}-????????????????.npz"):
            path.write_bytes(b"damaged")
            again = TriageNurse(roles.settings, embed, [])
            assert again.flags.threshold == pytest.approx(nurse.flags.threshold)
            assert again.words.threshold == pytest.approx(nurse.words.threshold)


def test_a_sign_can_be_asked_of_one_leaflet(nurse):
    vector = embed(["he's clutching his chest, grey and sweating"])[0]
    documents = {sign.id.split("/")[0] for sign in nurse.signs}
    assert len(documents) > 1
    for document in documents:
        sign, cosine = nurse.nearest_sign(vector, document)
        assert sign is None or sign.startswith(f"{document}/emergency/")
        assert cosine <= nurse.nearest_sign(vector)[1] + 1e-6
    assert nurse.nearest_sign(vector, "no-such-leaflet") == (None, 0.0)
