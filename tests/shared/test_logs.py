"""Log lines: JSON, tied to a request, and never what a person wrote."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.logs import accept_id, request_id, setup_logs

LOGGER = logging.getLogger("shared.test_logs")


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Any]:
    path = tmp_path / "logs" / "service.jsonl"
    setup_logs(path)
    yield lambda: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for name in ("shared", "ml_engineer_track", "ai_engineer_track"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(logging.NOTSET)


def test_a_line_has_its_facts_and_the_request_it_belongs_to(lines: Any) -> None:
    mark = request_id.set("r-12345678")
    LOGGER.info("turn", extra={"facts": {"kind": "answer", "seconds": 0.5}})
    request_id.reset(mark)
    (line,) = lines()
    assert line["event"] == "turn"
    assert line["request_id"] == "r-12345678"
    assert (line["kind"], line["seconds"], line["level"]) == ("answer", 0.5, "info")


@pytest.mark.parametrize("wanted", [False, True])
def test_an_exception_is_logged_without_its_text_unless_asked_for(
    lines: Any, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    monkeypatch.setenv("LOG_CONTENT", "1" if wanted else "0")
    try:
        try:
            int("my knee hurts")
        except ValueError as error:
            raise RuntimeError("about my knee") from error
    except RuntimeError:
        LOGGER.exception("no answer")
    (line,) = lines()
    assert line["exception"]["type"] == "RuntimeError"
    assert line["exception"]["cause"]["type"] == "ValueError"
    assert "test_logs.py" in line["exception"]["at"][-1]
    assert ("knee" in json.dumps(line)) == wanted


def test_setting_up_twice_writes_each_line_once(lines: Any, tmp_path: Path) -> None:
    setup_logs(tmp_path / "logs" / "service.jsonl")
    LOGGER.info("once")
    assert [line["event"] for line in lines()] == ["once"]


def test_without_a_place_to_write_the_process_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    setup_logs(tmp_path / "file" / "service.jsonl")


@given(st.text())
def test_an_accepted_id_is_short_and_plain(given: str) -> None:
    kept = accept_id(given)
    assert 8 <= len(kept) <= 64
    assert kept.isascii()
    assert set(kept) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
