"""The engine without the server: replies in the order of the questions, and a failure that is not mistaken for a reply."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from ml_engineer_track.serving import openvino_engine
from ml_engineer_track.serving.catalog import has_openvino
from ml_engineer_track.serving.grammar import constraint
from ml_engineer_track.serving.inprocess import generate, started
from tests.ml_engineer_track.serving.conftest import DECIDE, QUESTION, CountingEngine, served

Make = Callable[..., CountingEngine]


def test_all_are_asked_at_once_and_answered_in_order(counting: Make, base_tokenizer: PreTrainedTokenizerBase) -> None:
    engine = counting(max_running=2, max_waiting=50, capacity=5000)
    asked: list[list[int]] = []
    submit = engine.submit
    engine.submit = lambda generation: (asked.append(generation.prompt), submit(generation))[1]  # type: ignore[method-assign]
    replies = generate(served(engine, base_tokenizer), [QUESTION, DECIDE] * 10, 3, [constraint({"choice": ["a"]})] * 20)
    assert replies == [base_tokenizer.decode([100, 101, 102]).strip()] * 20
    assert asked[0] != asked[1]
    assert asked[0::2] == [asked[0]] * 10
    assert asked[1::2] == [asked[1]] * 10


def test_an_engine_that_fails_is_no_reply(
    counting: Make, base_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = counting(max_running=2, max_waiting=50, capacity=5000)
    engine.fail_at = lambda e: e.steps == 2
    with pytest.raises(RuntimeError, match="the matrix fell over"):
        generate(served(engine, base_tokenizer), [QUESTION] * 4, 5)
    assert "the matrix fell over" in capsys.readouterr().err


@pytest.mark.skipif(not has_openvino(), reason="openvino-genai is not installed")
def test_an_engine_forgets_its_grammars_when_it_rests(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_engine, "GRAMMARS_KEPT", 3)
    choices = [constraint({"grammar": f'start: "The answer is {n}." | "It is {n + 1}."'}) for n in range(6)]
    with started(artifact / "q8_0") as engine:
        first = engine.engine.pipeline  # type: ignore[attr-defined]
        replies = [generate(engine, [QUESTION], 12, [held_to])[0] for held_to in choices]
        assert engine.engine.pipeline is not first  # type: ignore[attr-defined]
        assert engine.engine.failures == 0
        assert [generate(engine, [QUESTION], 12, [held_to])[0] for held_to in choices] == replies
