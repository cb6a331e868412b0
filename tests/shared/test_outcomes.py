"""Outcomes: one an answer and arm, readable again, and nothing in them that a person wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from shared import outcomes
from shared.outcomes import Outcome, OutcomeStore


def outcome(answer_id: str = "a-1", **fields: Any) -> Outcome:
    values = {"arm": "current", "model_version": "m-1:q4_0", "kind": "answer", "seconds": 0.5, **fields}
    return Outcome(answer_id=answer_id, **values)


def test_an_answer_and_its_shadow_are_two_outcomes_and_neither_is_written_twice(tmp_path: Path) -> None:
    store = OutcomeStore(tmp_path)
    made = [outcome(), outcome(arm="shadow", model_version="m-2:q4_0"), outcome("a-2", grounded=True, safe=True, helpful=4)]
    assert [store.add(one) for one in made] == [True, True, True]
    assert not OutcomeStore(tmp_path).add(outcome(seconds=9.0))
    assert outcomes.read(tmp_path) == (made, [])


def test_a_corrupt_line_is_reported_and_spoils_nothing(tmp_path: Path) -> None:
    store = OutcomeStore(tmp_path)
    store.add(outcome())
    with store.path.open("ab") as stream:
        stream.write(b"{torn")
    assert store.add(outcome("a-2"))
    read, bad = outcomes.read(tmp_path)
    assert [o.answer_id for o in read] == ["a-1", "a-2"]
    assert [(row.file, row.line) for row in bad] == [("outcomes.jsonl", 2)]


@pytest.mark.parametrize(
    "fields", [{"arm": "both"}, {"helpful": 6}, {"seconds": -1}, {"question": "What helps?"}, {"answer_id": ""}]
)
def test_an_outcome_of_another_shape_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        outcome(**fields)


def test_the_command_counts_by_version_and_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = OutcomeStore(tmp_path)
    for n in range(3):
        store.add(outcome(f"a-{n}"))
    store.add(outcome("a-9", arm="candidate", model_version="m-2:q4_0"))
    with store.path.open("ab") as stream:
        stream.write(b"{torn")
    assert outcomes.main(["--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert [line.split() for line in shown.out.splitlines()] == [["3", "current", "m-1:q4_0"], ["1", "candidate", "m-2:q4_0"]]
    assert "skipped outcomes.jsonl:5" in shown.err
