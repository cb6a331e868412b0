"""Sides take turns on the same prompts, and the ratio is that of their pairs."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from ml_engineer_track import decode_speed as d


def test_sides_answer_the_same_prompts_in_turns_and_the_first_round_does_not_count() -> None:
    asked: list[tuple[str, int]] = []

    def side(name: str, seconds: list[float]) -> d.Turn:
        def turn(prompt: int) -> float:
            asked.append((name, prompt))
            first_round = sum(who == name for who, _ in asked) <= 2
            return 100.0 if first_round else seconds[prompt]

        return turn

    found = d.take_turns({"slow": side("slow", [2.0, 4.0]), "fast": side("fast", [1.0, 1.0])}, 2, 10, 3, 200, 7, "test")
    pairs = [asked[at : at + 2] for at in range(0, len(asked), 2)]
    assert len(pairs) == 8
    assert all({name for name, _ in pair} == {"slow", "fast"} and pair[0][1] == pair[1][1] for pair in pairs)
    assert {pair[0][0] for pair in pairs} == {"slow", "fast"}  # neither always comes first
    assert found.turns == 6
    assert found.seconds == {"slow": [2.0, 4.0] * 3, "fast": [1.0] * 6}
    assert found.throughput == {"slow": 60 / 18, "fast": 60 / 6}
    assert found.ratio.value == pytest.approx(3.0)
    assert found.ratio.low is not None
    assert found.ratio.high is not None
    assert 2.0 <= found.ratio.low < 3.0 < found.ratio.high <= 4.0


def test_a_machine_that_slows_both_sides_down_changes_no_ratio() -> None:
    moods = [1.0, 9.0, 3.0, 1.0, 5.0, 2.0, 8.0, 1.0]  # one for each pair of turns
    calls = {"slow": 0, "fast": 0}

    def side(name: str, seconds: float) -> d.Turn:
        def turn(_: int) -> float:
            calls[name] += 1
            return seconds * moods[calls[name] - 1]

        return turn

    found = d.take_turns({"slow": side("slow", 0.5), "fast": side("fast", 0.2)}, 2, 4, 3, 200, 7, "test")
    assert [found.ratio.low, found.ratio.value, found.ratio.high] == pytest.approx([2.5, 2.5, 2.5])


def test_in_transformers_as_many_steps_are_timed_as_tokens_are_counted(micro: PreTrainedModel) -> None:
    lengths: list[int] = []
    micro.register_forward_pre_hook(lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True)
    assert d.in_transformers(micro, 16, 5)(0) > 0
    assert lengths == [16, 1, 1, 1, 1, 1]
