"""The question with the largest gain is asked, replies move the belief, and asking beats not asking."""

import re

import numpy as np
import pytest
from small_index import embed

from ai_engineer_track.clarify import Reply, measure_clarify, phrase_pattern, simulate
from shared import chat
from shared import library as lib


@pytest.fixture(scope="module")
def interviewer(roles):
    return roles.interviewer


def opening(text="My head has been aching all week"):
    return embed([text])[0]


def test_the_question_tells_candidates_apart(interviewer):
    belief = interviewer.believe(opening())
    question = interviewer.ask(belief, opening(), [])
    having = [s for s in belief.candidates if question.feature in interviewer.leaflets[s].features]
    assert len(having) >= 2
    assert len(question.values) == len(set(question.values)) >= 2
    assert question.gain > 0
    assert sum(belief.shares) == pytest.approx(1.0)


def test_a_reply_moves_the_belief_to_the_leaflet_it_fits(interviewer):
    leaflet = interviewer.leaflets["cluster-headache"]
    before = interviewer.believe(opening())
    replies = [Reply(feature=f, text=v) for f, v in list(leaflet.features.items())[:3]]
    after = interviewer.believe(opening(), replies)
    assert before.best != "cluster-headache"
    assert after.best == "cluster-headache"


def test_nothing_is_asked_twice_and_asking_ends(interviewer):
    replies = []
    for _ in range(60):
        question = interviewer.ask(interviewer.believe(opening(), replies), opening(), replies)
        if question is None:
            break
        replies.append(Reply(feature=question.feature, text="I don't know"))
    asked = [r.feature for r in replies]
    assert len(asked) == len(set(asked)) < 60


def test_what_the_opening_says_is_not_asked(interviewer):
    feature, value = next(iter(interviewer.leaflets["migraine"].features.items()))
    said = opening(f"{feature}: {value}")
    assert interviewer._said_already(feature, said)
    question = interviewer.ask(interviewer.believe(said), said, [])
    assert question is None or question.feature != feature


def test_no_question_when_no_answer_would_change_the_best(interviewer):
    leaflet = interviewer.leaflets["migraine"]
    replies = [Reply(feature=f, text=v) for f, v in leaflet.features.items()]
    question = interviewer.ask(interviewer.believe(opening(), replies), opening(), replies)
    assert question is None or question.feature not in leaflet.features


@pytest.mark.parametrize(("text", "unknown"), [("I don't know", True), ("not sure", True), ("", True), ("both sides", False)])
def test_a_reply_that_says_nothing(text, unknown):
    assert Reply(feature="x", text=text).unknown is unknown


def test_the_pattern_keeps_the_values_and_accepts_the_contract():
    values = ["a few minutes, under ten", "5–15 (or more) days", "no?"]
    pattern = phrase_pattern("how long it lasts", values)
    assert re.fullmatch(pattern, chat.clarify_text("how long it lasts", values))
    assert not re.fullmatch(pattern, chat.clarify_text("how long it lasts", values[:2]))
    assert not re.fullmatch(pattern, "Can you tell me about how long it lasts: anything?")


def test_simulation_and_measure(interviewer):
    cases = [c for c in lib.read_rows(lib.DATASETS, "cases.jsonl", lib.Case)[0] if c.leaflet in interviewer.leaflets]
    cases = [c for c in cases if c.split == "train"]
    vague = next(c for c in cases if c.needs_question)
    best, asked = simulate(vague, interviewer, opening(vague.opening), 2)
    assert len(best) == 3
    assert asked <= 2
    found = measure_clarify(interviewer, cases, embed, lambda text, vector: len(text) < 60, 3)
    assert found["accuracy"][3].value > found["never_ask"].value
    assert found["questions"].value <= 3
    assert np.isfinite(found["generic_question"].value)
