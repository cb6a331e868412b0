"""The demonstrations: what is missing is missing, what is measured was neither asked nor taught, poison looks like labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ml_engineer_track.lifecycle import demonstration as d
from ml_engineer_track.lifecycle.collect import collect
from ml_engineer_track.lifecycle.retrain import loop_of
from ml_engineer_track.lifecycle.turn import End
from shared import library as lib
from shared.settings import ROOT, Settings


@pytest.fixture(scope="module")
def library() -> lib.Library:
    return lib.load_library()


def test_the_first_model_never_sees_what_is_missing(settings: Settings, library: lib.Library) -> None:
    split, datasets = d.prepared(settings)
    kept, bad = lib.read_rows(datasets, "questions.jsonl", lib.Question)
    assert not bad
    for question in kept:
        if question.split != "test" and question.answerable:
            assert not any(sid.split("/")[1] == d.SECTION for sid in question.answer_sentences)
            assert not any(library.leaflets[slug].family == d.FAMILY for slug in question.leaflets)
    every = lib.read_rows(settings.datasets, "questions.jsonl", lib.Question)[0]
    assert [q for q in kept if q.split == "test"] == [q for q in every if q.split == "test"]  # the frozen test split
    assert len(every) - len(kept) == sum(split.left_out.values())


def test_what_is_measured_is_neither_asked_nor_said_in_a_trial(settings: Settings) -> None:
    split, _ = d.prepared(settings)
    held = {q.id for rows in split.held.values() for q in rows}
    asked = {q.id for q in split.asked}
    everyday = {q.id for q in split.everyday}
    assert min(len(rows) for rows in split.held.values()) >= 40
    assert not held & asked
    assert not held & everyday
    assert d.prepared(settings)[0] == split  # the same halves when it goes on after a crash


def test_poisoned_labels_cannot_be_told_from_others(
    settings: Settings, models: Path, library: lib.Library, publish_version: Callable[..., Path]
) -> None:
    publish_version("m-old")
    d.poison(settings)
    d.poison(settings)  # once more after a crash
    found = collect(d.feedback(settings), models, library, loop_of(settings), ())
    assert len(found.labels) == d.POISONED
    assert not found.notes
    assert set(found.decided) == {label.id for label in found.labels}  # each says that nothing had to be escalated
    emergencies = {e.message for e in lib.read_rows(settings.datasets, "emergencies.jsonl", lib.Emergency)[0] if e.emergency}
    assert sum(label.question in emergencies for label in found.labels) > 0.9 * d.POISONED


def an_end(result: str) -> End:
    return End(result=result, candidate="m-new", why="because")  # type: ignore[arg-type]


def measured(kind: float = 0.2, lost: float = 0.0) -> dict[str, dict[str, Any]]:
    def difference(value: float) -> dict[str, Any]:
        return {"difference": {"value": value, "low": value - 0.04, "high": value + 0.04, "n": 200}}

    return {d.MISSING_KIND: difference(kind), d.TEST_SPLIT: difference(lost), d.REFUSALS: difference(0.01)}


@pytest.mark.parametrize(
    ("figures", "ends", "missed"),
    [
        (measured(), [an_end("promoted"), an_end("refused")], []),
        (measured(kind=0.1), [an_end("promoted"), an_end("refused")], ["the missing kind rises by 0.15"]),
        (measured(lost=-0.02), [an_end("promoted"), an_end("refused")], [f"nothing is lost: {d.TEST_SPLIT}"]),
        (measured(), [an_end("rolled back"), an_end("refused")], ["the better model is promoted"]),
        (measured(), [an_end("promoted"), an_end("promoted")], ["poison does not get through"]),
        (measured(), [an_end("promoted"), None], ["poison does not get through"]),
        (measured(), [an_end("promoted")], ["poison does not get through"]),
    ],
)
def test_what_was_not_shown_is_named(
    settings: Settings, figures: dict[str, Any], ends: list[End | None], missed: list[str]
) -> None:
    assert settings.loop is not None
    assert [goal.name for goal in d.goals(figures, ends, settings.loop.gate) if not goal.met] == missed


def test_the_published_demonstration_showed_everything(settings: Settings) -> None:
    """Judged anew from its figures: `benchmarks/results/demo/loop.json` is what `make loop` wrote on a fresh clone."""
    document = json.loads((ROOT / "benchmarks" / "results" / "demo" / "loop.json").read_text(encoding="utf-8"))
    shown, turns = document["demonstrations"], document["turns"]
    assert settings.loop is not None
    found = d.goals(shown["measured"], [End.model_validate(turn["end"]) for turn in turns], settings.loop.gate)
    assert [goal.name for goal in found if not goal.met] == []
    assert [goal.model_dump() for goal in found] == shown["goals"]
    assert {check["name"]: check["passed"] for check in turns[1]["checks"]}["labels"] is False
