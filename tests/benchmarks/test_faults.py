"""What a trial counts, and that its damage is real damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import FAULTS, Trial, faults, scribble, sentence, verbatim
from shared import library as lib
from shared.errors import UserError
from shared.settings import load_settings


def trial(**changed: object) -> Trial:
    values: dict[str, object] = {
        "fault": "x",
        "conversations": 20,
        "answered": 100,
        "gave_up": 0,
        "wrong_answers": 0,
        "feedback_acknowledged": 90,
        "feedback_lost": 0,
        "exchanges_lost": 0,
        "untold": 0,
        "told": {},
        "ready_again_s": 1.0,
        "longest_wait_s": 3.0,
    }
    return Trial(**(values | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["gave_up", "wrong_answers", "feedback_lost", "exchanges_lost", "untold"])
def test_one_loss_is_enough_not_to_hold(what: str) -> None:
    assert trial().held
    assert not trial(**{what: 1}).held
    assert not trial(ready_again_s=None).held


def test_a_changed_quote_is_a_wrong_answer(mini_datasets: Path) -> None:
    library = lib.load_library(mini_datasets)
    known = next(iter(library)).sentences()[0]
    right = {"sentence_id": known.id, "text": known.text}
    assert verbatim({"citations": [right]}, library)
    assert not verbatim({"citations": [right | {"text": known.text + "!"}]}, library)
    assert not verbatim({"citations": [right | {"sentence_id": "no/such/1"}]}, library)


def test_the_sentence_of_an_error_is_found_and_anything_else_is_none() -> None:
    assert sentence('{"error": {"message": "Too many people are asking."}}') == "Too many people are asking."
    assert sentence("<html>Bad gateway</html>") == ""
    assert sentence("[]") == ""


def test_damage_leaves_size_and_first_page_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(60_000))
    assert scribble(path) == 20_000
    content = path.read_bytes()
    assert len(content) == 60_000
    assert content[:4096] == bytes(4096)
    assert content != bytes(60_000)
    assert scribble(tmp_path / "none") == 0


def test_an_unknown_fault_is_one_line() -> None:
    with pytest.raises(UserError, match="no such fault"):
        faults(load_settings("tiny"), ["meteor"])
    assert len(FAULTS) >= 8
