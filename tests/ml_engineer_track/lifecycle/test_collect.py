"""What is learnt from: only what can be reproduced, is not part of the test, and was not tried before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ml_engineer_track.lifecycle.collect import Collected, collect, reason_to_retrain
from shared.feedback import Feedback, FeedbackStore, TurnSummary
from shared.labels import Label, LabelStore
from shared.library import Library, load_library
from shared.settings import Settings


@pytest.fixture(scope="module")
def library() -> Library:
    return load_library()


@pytest.fixture
def feedback(tmp_path: Path) -> Path:
    return tmp_path / "artifacts" / "feedback"


@pytest.fixture
def gather(
    models: Path, feedback: Path, library: Library, settings: Settings, publish_version: Callable[..., Path]
) -> Callable[..., Collected]:
    """Writes labels of the version m-old and collects them."""
    publish_version("m-old")
    assert settings.loop is not None
    options = settings.loop

    def run(*labels: Label, tried: tuple[str, ...] = ()) -> Collected:
        store = LabelStore(feedback)
        for label in labels:
            store.add(label)
        return collect(feedback, models, library, options, tried)

    return run


def test_labels_are_split_by_their_own_hash(gather: Callable[..., Collected], a_label: Callable[..., Label]) -> None:
    few = gather(*(a_label(n) for n in range(60)))
    more = gather(*(a_label(n) for n in range(60, 120)))
    assert {label.id for label in few.examined} <= {label.id for label in more.examined}
    assert 0.1 < len(more.examined) / 120 < 0.35
    assert {label.id for label in more.labels} == {a_label(n).id for n in range(120)}


def test_the_batch_is_named_by_its_content(gather: Callable[..., Collected], a_label: Callable[..., Label]) -> None:
    assert gather(a_label(1)).id == gather().id != gather(a_label(2)).id


def test_what_was_tried_before_does_not_come_again(gather: Callable[..., Collected], a_label: Callable[..., Label]) -> None:
    assert gather(a_label(1), a_label(2), tried=(a_label(1).id,)).labels == [
        a_label(2).model_copy(update={"time": gather().labels[1].time})
    ]


def test_corrupt_lines_are_one_note_each(gather: Callable[..., Collected], feedback: Path, a_label: Callable[..., Label]) -> None:
    feedback.mkdir(parents=True)
    (feedback / "labels.jsonl").write_bytes(b'{"answer_id": "a\n\xff\xfe\n')
    (feedback / "feedback.jsonl").write_text("{}\n", encoding="utf-8")
    (feedback / "outcomes.jsonl").write_text("[1]\n", encoding="utf-8")
    found = gather(a_label())
    assert len(found.labels) == 1
    assert [note.split(":")[0] for note in found.notes] == [
        "skipped feedback.jsonl", "skipped labels.jsonl", "skipped labels.jsonl", "skipped outcomes.jsonl",
    ]  # fmt: skip
    assert all("\n" not in note for note in found.notes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_version": "m-never:q8_0"}, "model versions that are not here (m-never)"),
        ({"answer_sentences": ["ankle-sprain/self-care/99"]}, "sentence ankle-sprain/self-care/99 is not in the library"),
        ({"action": "not_answered", "answer_sentences": [], "passages": []}, "names no leaflet"),
    ],
)
def test_what_cannot_be_learnt_from_is_named(
    gather: Callable[..., Collected], a_label: Callable[..., Label], changes: dict[str, object], said: str
) -> None:
    found = gather(a_label(**changes))
    assert not found.labels
    assert any(said in note for note in found.notes)


def test_nothing_is_trained_on_a_leaflet_of_the_test_split(
    gather: Callable[..., Collected], library: Library, a_label: Callable[..., Label]
) -> None:
    held = next(leaf for leaf in library if leaf.split == "test")
    found = gather(
        a_label(1, answer_sentences=[f"{held.id}/symptoms/1"]),
        a_label(2, action="not_answered", answer_sentences=[], passages=[f"{held.id}/symptoms"]),
    )
    assert not found.labels
    assert sum("test split" in note for note in found.notes) == 2


@pytest.mark.parametrize(
    ("done", "action", "corrected"),
    [
        ("answer", "answer", False),  # another sentence, not another decision
        ("not_answered", "answer", False),
        (None, "answer", False),
        ("escalate", "answer", True),
        ("answer", "escalate", True),
        (None, "escalate", True),
        ("escalate", "escalate", False),
        ("answer", "not_answered", False),
    ],
)
def test_which_labels_correct_a_decision(
    gather: Callable[..., Collected],
    feedback: Path,
    a_label: Callable[..., Label],
    done: str | None,
    action: str,
    corrected: bool,
) -> None:
    label = a_label(1, action=action, **({} if action == "answer" else {"answer_sentences": []}))
    if done:
        FeedbackStore(feedback).add(
            Feedback(
                answer_id=label.answer_id, kind="thumbs_down", question=label.question, turn=TurnSummary(kind=done, text=""),
                passages=[], model_version="m-old:q8_0", index_version="i-1", prompt_version=1,
            )
        )  # fmt: skip
    assert gather(label).decided == ([label.id] if corrected else [])


def test_reasons(gather: Callable[..., Collected], settings: Settings, models: Path, a_label: Callable[..., Label]) -> None:
    assert settings.loop is not None
    options = settings.loop.model_copy(update={"enough_labels": 5, "oldest_days": None})
    current = models / "m-old"
    assert reason_to_retrain(gather(), current, options, lambda: "everything changed") is None  # nothing to learn from
    few = gather(a_label(1), a_label(2))
    assert reason_to_retrain(few, current, options) is None
    assert "everything changed" in (reason_to_retrain(few, current, options, lambda: "everything changed") or "")
    assert "days old" in (reason_to_retrain(few, current, options.model_copy(update={"oldest_days": 1e-9})) or "")
    assert "enough" in (reason_to_retrain(gather(*(a_label(n) for n in range(9))), current, options) or "")
