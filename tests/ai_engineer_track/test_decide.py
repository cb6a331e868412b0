"""Asking back and refusing: heads over message and coverage, and plain rules for another corpus."""

import numpy as np
from small_index import SmallIndex, embed

from ai_engineer_track.decide import Decider, ask_examples, measure_decisions, refuse_examples
from ai_engineer_track.evidence import Evidence
from shared import library as lib


def ask(decider, text):
    return decider.ask_back(text, embed([text])[0])


def test_vague_openings_are_likelier_to_be_asked_back(roles):
    assert ask(roles.decider, "My head hurts.") > ask(
        roles.decider, "Which tablets prevent migraine attacks if I have four a month?"
    )


def test_another_corpus_uses_plain_rules(settings, tmp_path):
    other = settings.model_copy(update={"corpus": tmp_path})
    decider = Decider(other, Evidence(SmallIndex()), embed)
    text = "zebra crossing paint"
    assert decider.needs_refusal(text, embed([text])[0])
    assert 0 <= decider.ask_back(text, embed([text])[0]) <= 1


def test_features_are_finite_for_any_text(roles):
    texts = ["", "?", "migraine " * 500, "头痛"]
    found = roles.evidence.features(texts, embed(texts))
    assert found.shape == (4, 11)
    assert np.isfinite(found).all()


def test_no_test_row_is_learned_from(settings, small_data, roles):
    learned = set(ask_examples(settings, roles.evidence, embed).texts) | set(
        refuse_examples(settings, roles.evidence, embed).texts
    )
    test = {q.question for q in lib.read_rows(small_data, "questions.jsonl", lib.Question)[0] if q.split == "test"}
    assert not learned & test


def test_measures(roles, settings):
    found = measure_decisions(roles.decider, settings, embed, "validation")
    assert set(found) == {"correct_refusal", "answer_rate", "needless_questions"}
    assert found["answer_rate"].n > 10
