"""Small decisions to the small model, unsure answers to the large one, and either stands in for the other."""

import asyncio

import pytest

from ai_engineer_track.llm import LlmNonsense, LlmUnavailable
from ai_engineer_track.router import Router


class Fake:
    def __init__(self, name, error=None):
        self.name, self.error = name, error

    async def chat(self, messages, **_):
        if self.error:
            raise self.error
        return self.name


def go(router, task, confidence=1.0):
    return asyncio.run(router.chat(task, [], max_tokens=1, confidence=confidence))


@pytest.mark.parametrize(
    ("task", "confidence", "name"),
    [("decide", 0.1, "small"), ("phrase", 0.1, "small"), ("answer", 0.1, "large"), ("answer", 0.95, "small")],
)
def test_who_does_what(task, confidence, name):
    assert go(Router(Fake("small"), Fake("large")), task, confidence) == name
    assert go(Router(Fake("small")), task, confidence) == "small"


def test_either_stands_in_for_the_other():
    down = LlmUnavailable("down")
    assert go(Router(Fake("small"), Fake("large", down)), "answer", 0.1) == "small"
    assert go(Router(Fake("small", down), Fake("large")), "decide") == "large"
    with pytest.raises(LlmUnavailable):
        go(Router(Fake("small", down), Fake("large", down)), "answer")


def test_nonsense_is_not_hidden_by_another_model():
    with pytest.raises(LlmNonsense):
        go(Router(Fake("small", LlmNonsense("?")), Fake("large")), "decide")
