"""The gate: each kind of loss is seen, each alone is reason enough, and a candidate that lost nothing passes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ml_engineer_track.lifecycle.collect import Collected
from ml_engineer_track.lifecycle.exam import KNOWN, Decision, Exam, Reading
from ml_engineer_track.lifecycle.gate import gate, labels_check, score_checks, variants_check
from shared import library as lib
from shared.labels import Label
from shared.settings import Settings, load_settings

EXAM = Exam(
    items=[],
    decisions=[Decision(id=f"em-{n}", messages=[], action="escalate" if n < 70 else "answer") for n in range(130)]
    + [Decision(id=f"{KNOWN}em-{n}", messages=[], action="escalate") for n in range(40)],
)


def a_reading(seed: int = 0, **shift: float) -> Reading:
    """What a model said: scores drawn once for all, moved by `shift` for each part."""
    rng = random.Random(seed)
    sizes = {"test": 300, "failures": 30, "refusals": 160}
    scores = {
        part: {f"{part}-{n}": min(1.0, max(0.0, rng.choice((0.0, 0.5, 1.0)) + shift.get(part, 0.0))) for n in range(size)}
        for part, size in sizes.items()
    }

    def kind(d: Decision) -> str:
        if d.id.startswith(KNOWN):
            return "known"
        return "emergencies" if d.action == "escalate" else "harmless"

    log_p = {d.id: -rng.random() + shift.get(kind(d), 0.0) for d in EXAM.decisions}
    return Reading(version="m", exam=EXAM.id, scores=scores, log_probability=log_p, decided={}, samples=[])


def refused(settings: Settings, now: Reading) -> list[str]:
    return [check.name for check in score_checks(settings, EXAM, a_reading(), now) if not check.passed]


def test_a_candidate_that_is_better_where_the_model_failed_passes(settings: Settings) -> None:
    assert refused(settings, a_reading(failures=0.4)) == []


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        ({"test": -0.2}, ["evidence"]),
        ({"refusals": -0.4}, ["refusals"]),
        ({"emergencies": -1.0}, ["emergencies"]),
        ({"harmless": -1.0}, ["near misses"]),
        ({"known": -1.0}, ["known"]),
        ({"test": -0.2, "emergencies": -2.0}, ["evidence", "emergencies"]),
    ],
)
def test_each_loss_alone_is_refused(settings: Settings, shift: dict[str, float], said: list[str]) -> None:
    assert refused(settings, a_reading(failures=0.4, **shift)) == said


def test_the_same_model_again_is_refused_because_it_is_not_better(settings: Settings) -> None:
    assert refused(settings, a_reading()) == ["failures"]


def test_labels_that_touch_no_known_emergency_are_not_held_against_it(settings: Settings) -> None:
    exam = EXAM.model_copy(update={"decisions": [d for d in EXAM.decisions if not d.id.startswith(KNOWN)]})
    seen = a_reading()
    left = {key: value for key, value in seen.log_probability.items() if not key.startswith(KNOWN)}
    was = seen.model_copy(update={"log_probability": left})
    assert "known" not in [check.name for check in score_checks(settings, exam, was, was)]


def labelled(messages: list[str]) -> Collected:
    made = [
        Label(
            answer_id=f"a-{n}", question=message, passages=["sunburn/self-care"], action="answer",
            answer_sentences=["sunburn/self-care/1"], reviewers=["one", "two"], agreed=True, model_version="m-1",
        )
        for n, message in enumerate(messages)
    ]  # fmt: skip
    return Collected(id="b", taught=made[1:], examined=made[:1], decided=[], counts={}, notes=[])


def test_labels_that_answer_known_emergencies_are_refused(tmp_path: Path) -> None:
    settings = load_settings("smoke", artifacts=tmp_path / "artifacts").with_its_data()  # a quarter of the data sets
    emergencies = lib.read_rows(settings.datasets, "emergencies.jsonl", lib.Emergency)[0]
    real = [row.message for row in emergencies if row.split == "train" and row.emergency]
    questions = [q.question for q in lib.read_rows(settings.datasets, "questions.jsonl", lib.Question)[0] if q.split == "test"]
    assert labels_check(settings, labelled(questions[:100])).passed
    assert labels_check(settings, labelled([])).passed
    poisoned = labels_check(settings, labelled([*questions[:60], *real[:40]]))
    assert not poisoned.passed
    assert "of 100 labels answer a message whose nearest known one is an emergency" in poisoned.says


def test_without_rows_nothing_is_vouched_for(settings: Settings) -> None:
    empty = Reading(version="m", exam=EXAM.id, scores={}, log_probability={}, decided={}, samples=[])
    assert not any(check.passed for check in score_checks(settings, EXAM, empty, empty))


def test_a_line_says_figures_and_margin(settings: Settings) -> None:
    line = str(score_checks(settings, EXAM, a_reading(), a_reading(test=-0.2))[0])
    assert line.startswith("REFUSED evidence")
    assert "(n 300); may lose 0.05" in line
    assert "\n" not in line


def test_a_missing_variant_is_refused_before_anything_is_asked(
    models: Path, settings: Settings, publish_version: Callable[..., Path]
) -> None:
    current = publish_version("m-1")
    candidate = publish_version("m-22", make_current=False, variants=("bf16",))
    checks = gate(settings, current, candidate, EXAM, labelled([]), lambda version: pytest.fail("it was asked"))
    assert [str(check) for check in checks] == ["REFUSED variants    q8_0 is missing, and m-1 is served as it"]


def test_a_missing_file_is_refused(models: Path, publish_version: Callable[..., Path]) -> None:
    current = publish_version("m-1")
    candidate = publish_version("m-22", make_current=False)
    assert variants_check(current, candidate).passed
    (candidate / "q8_0" / "model.safetensors").unlink()
    check = variants_check(current, candidate)
    assert not check.passed
    assert "q8_0/model.safetensors is missing" in check.says
