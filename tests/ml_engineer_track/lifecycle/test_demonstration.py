"""The demonstrations: what is missing is missing, what is measured was neither asked nor taught, poison looks like labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ml_engineer_track.lifecycle import demonstration as d
from ml_engineer_track.lifecycle.collect import collect
from ml_engineer_track.lifecycle.retrain import loop_of
from shared import library as lib
from shared.settings import Settings


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
