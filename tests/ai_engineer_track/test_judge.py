"""The judge replies in its form; its calibration says how far to trust it; only then may it act."""

import asyncio

import pytest

from ai_engineer_track.judge import (
    Calibration,
    calibrate,
    confusion,
    fails,
    judge,
    long_minus_short,
    renumbered,
    save_calibration,
    sources_of,
    trusted_rubrics,
)
from ai_engineer_track.llm import Llm, LlmNonsense, LlmUnavailable
from shared import chat
from shared import library as lib

LIBRARY = lib.load_library()
LABELS = lib.read_rows(lib.DATASETS, "judge_labels.jsonl", lib.JudgeLabel)[0]


def verdict(grounded=True, safe=True, helpful=4):
    return chat.Verdict(grounded=grounded, safe=safe, helpful=helpful)


def test_a_verdict_is_asked_for_under_the_schema_at_temperature_zero(stub, settings):
    stub.say("Judge", chat.to_json(verdict(grounded=False)))
    label = LABELS[0]
    found = asyncio.run(judge(Llm(settings.llm), label.question, sources_of(label.passages, LIBRARY), label.answer))
    assert found.verdict == verdict(grounded=False)
    request = stub.requests[-1]
    assert request["temperature"] == 0
    assert request["structured_outputs"]["json"]["required"] == ["grounded", "safe", "helpful"]


@pytest.mark.parametrize("reply", ['{"grounded":true}', '{"grounded":true,"safe":true,"helpful":9}', "yes"])
def test_another_form_is_nonsense(stub, settings, reply):
    stub.say("Judge", reply)
    with pytest.raises(LlmNonsense):
        asyncio.run(judge(Llm(settings.llm), "q", [], "a"))


def test_a_judge_that_copies_the_labels_is_trusted(stub, settings):
    labels = LABELS[:40]
    for label in labels:
        stub.say(f"Question: {label.question}\n\nAnswer: {' '.join(label.answer.split())}", chat.to_json(
            chat.Verdict(grounded=label.grounded, safe=label.safe, helpful=label.helpful)))  # fmt: skip
    found = asyncio.run(calibrate(Llm(settings.llm), labels, LIBRARY, resamples=100))
    assert found.rows == 40
    assert found.kappa["grounded"].value == found.kappa["helpful"].value == 1.0
    assert found.accuracy["safe"].value == 1.0
    assert found.trusted == {"grounded", "safe", "helpful"}
    assert found.repeat.value == 1.0
    assert found.length.value == 0.0
    save_calibration(found, settings.artifacts)
    assert trusted_rubrics(settings.artifacts, "stub") == found.trusted
    assert trusted_rubrics(settings.artifacts, "another model") == set()


def test_a_judge_that_always_says_yes_is_heard_but_not_trusted(stub, settings):
    stub.say("Judge", chat.to_json(verdict()))
    found = asyncio.run(calibrate(Llm(settings.llm), LABELS[:30], LIBRARY, resamples=100))
    assert found.kappa["grounded"].value == 0.0
    assert found.trusted == set()
    assert sum(sum(row.values()) for row in found.confusion["safe"].values()) == 30
    assert any("not trusted" in line for line in found.lines())
    assert Calibration.model_validate_json(found.model_dump_json()) == found


def test_rows_without_a_verdict_are_counted(stub, settings):
    stub.say("Judge", "no idea")
    found = asyncio.run(calibrate(Llm(settings.llm), LABELS[:4], LIBRARY, resamples=100))
    assert (found.rows, found.failed) == (0, 4)
    assert found.kappa["safe"].value is None
    assert found.trusted == set()


def test_no_server_is_no_calibration(stub, settings):
    stub.fault = "down"
    with pytest.raises(LlmUnavailable):
        asyncio.run(calibrate(Llm(settings.llm), LABELS[:2], LIBRARY))


def test_a_verdict_only_forbids_in_what_the_judge_is_trusted_with():
    assert fails(verdict(safe=False), set()) is None
    assert "unsafe" in fails(verdict(safe=False), {"safe"})
    assert "supported" in fails(verdict(grounded=False), {"grounded"})
    assert fails(verdict(helpful=1), {"grounded", "safe", "helpful"}) is None


def test_without_a_file_or_with_a_broken_one_nothing_is_trusted(tmp_path):
    assert trusted_rubrics(tmp_path, "stub") == set()
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "calibration.json").write_text("{")
    assert trusted_rubrics(tmp_path, "stub") == set()


def test_helpers():
    assert renumbered("[1] a [3] b [9] c", 3) == "[3] a [1] b [9] c"
    assert confusion([(1, 1), (1, 0), (1, 1)]) == {"1": {"1": 2, "0": 1}}
    assert long_minus_short([(True, 2.0), (False, 0.5)]) == 1.5
    assert long_minus_short([(True, 2.0)]) == 0.0
