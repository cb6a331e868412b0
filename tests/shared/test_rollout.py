"""A rollout is there whole or not at all, and a damaged one is said to be so."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.errors import UserError
from shared.rollout import FILE, Rollout, clear_rollout, read_rollout, write_rollout


def test_what_is_written_is_read_back_changed_and_ended(tmp_path: Path) -> None:
    models = tmp_path / "models"
    assert read_rollout(models) is None
    shadow = Rollout(candidate="m-2", mode="shadow", share=1.0)
    write_rollout(models, shadow)
    assert read_rollout(models) == shadow
    canary = Rollout(candidate="m-2", mode="canary", share=0.1)
    write_rollout(models, canary)
    assert read_rollout(models) == canary
    clear_rollout(models)
    assert read_rollout(models) is None
    clear_rollout(models)  # ending none is no error
    assert list(models.iterdir()) == []


@pytest.mark.parametrize(
    "fields", [{"share": 0}, {"share": 1.1}, {"mode": "blue"}, {"candidate": "../up"}, {"candidate": ""}, {"extra": 1}]
)
def test_a_rollout_that_means_nothing_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Rollout.model_validate({"candidate": "m-2", "mode": "canary", "share": 0.5, **fields})


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[]", b'{"schema_version": 2, "candidate": "m", "mode": "canary", "share": 1}']
)
def test_a_damaged_file_is_one_line_that_says_which(tmp_path: Path, text: bytes) -> None:
    (tmp_path / FILE).write_bytes(text)
    with pytest.raises(UserError, match=FILE):
        read_rollout(tmp_path)
