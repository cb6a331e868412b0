"""Replies are remembered for their family of conditions only, and follow-ups are read in context."""

import pytest

from ai_engineer_track.clarify import Reply
from ai_engineer_track.memory import MAX_FACTS, in_context, recall, remember


def test_the_newest_word_counts_and_nothing_is_remembered_of_i_dont_know():
    facts = remember([], [Reply(feature="side", text="left"), Reply(feature="age", text="I don't know")], "headaches")
    facts = remember(facts, [Reply(feature="side", text="both")], "headaches")
    assert [(f.feature, f.text) for f in facts] == [("side", "both")]


def test_it_is_used_only_for_its_own_family():
    facts = remember([], [Reply(feature="where", text="the heel")], "feet")
    assert recall(facts, "feet") == [Reply(feature="where", text="the heel")]
    assert recall(facts, "headaches") == []
    assert recall(facts, "") == []


def test_it_does_not_grow_for_ever():
    facts = remember([], [Reply(feature=f"f{i}", text="x") for i in range(100)], "a")
    assert len(facts) == MAX_FACTS
    assert facts[-1].feature == "f99"


@pytest.mark.parametrize(
    ("message", "covered", "read"),
    [
        ("And for children?", False, "Migraine: And for children?"),
        ("how long does it last?", False, "Migraine: how long does it last?"),
        ("how long does it last?", True, "how long does it last?"),
        ("What helps against gout?", False, "What helps against gout?"),
        ("And another thing, my ankle is swollen since I fell from the ladder at work", False, None),
    ],
)
def test_follow_ups(message, covered, read):
    assert in_context(message, "Migraine", covered) == (read or message)
    assert in_context(message, "", covered) == message
