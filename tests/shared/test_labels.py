"""A label says what the right response was, by whom, and can become a training row."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from shared import labels
from shared.chat import ACTIONS
from shared.labels import Label, LabelAction, LabelStore


def label(answer_id: str = "a-1", **fields: Any) -> Label:
    values = {
        "question": "What helps?",
        "passages": ["migraine/self-care"],
        "action": "answer",
        "answer_sentences": ["migraine/self-care/1"],
        "reviewers": ["ab", "cd"],
        "agreed": True,
        "model_version": "m-1:q4_0",
        **fields,
    }
    return Label(answer_id=answer_id, **values)


def test_the_actions_are_the_prompt_contracts_and_not_answered() -> None:
    assert get_args(LabelAction) == (*ACTIONS, "not_answered")


def test_an_answer_has_one_label(tmp_path: Path) -> None:
    store = LabelStore(tmp_path)
    made = [label(), label("a-2", action="escalate", answer_sentences=[], reviewers=["ab", "cd", "ef"], agreed=False)]
    assert [store.add(one) for one in made] == [True, True]
    assert not LabelStore(tmp_path).add(label(action="not_answered", answer_sentences=[]))
    assert labels.read(tmp_path) == (made, [])


@pytest.mark.parametrize(
    "fields",
    [
        {"answer_sentences": []},
        {"action": "escalate"},
        {"answer_sentences": ["a/b/1", "a/b/1"]},
        {"reviewers": ["ab"]},
        {"reviewers": ["ab", "ab"]},
        {"action": "unavailable", "answer_sentences": []},
        {"question": ""},
    ],
)
def test_a_label_that_cannot_be_learnt_from_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        label(**fields)


def test_what_a_person_asked_is_scrubbed() -> None:
    assert label(question="I'm Ann Lee. What helps?").question == "I'm [name]. What helps?"
