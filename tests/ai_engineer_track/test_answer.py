"""Quotations resolve and stand verbatim; what does not is dropped; nothing at all is nonsense, not an answer."""

import asyncio
import json

import pytest

from ai_engineer_track.answer import cite, grammar, in_library, verbatim, write
from ai_engineer_track.llm import Llm, LlmNonsense
from ai_engineer_track.router import Router
from shared import chat

QUESTION = "What helps against a migraine?"


@pytest.fixture
def sources(small_index):
    return [*small_index.passages["migraine/self-care"].sentences, *small_index.passages["migraine/causes"].sentences][:6]


@pytest.fixture
def ask(settings, small_index, sources):
    def call(mode="grounded", may_refuse=True, given=None):
        answer = settings.answer.model_copy(update={"mode": mode})
        chosen = sources if given is None else given
        return asyncio.run(
            write(QUESTION, chosen, small_index.passages, Router(Llm(settings.llm)), answer, may_refuse=may_refuse)
        )

    return call


def test_marks_and_citations_agree(stub, ask, sources):
    stub.say(QUESTION, f"[3] {sources[2].text} [1] {sources[0].text}")
    written = ask()
    assert [c.number for c in written.citations] == [3, 1]
    assert [c.sentence_id for c in written.citations] == [sources[2].id, sources[0].id]
    assert written.citations[0].section == "self-care"
    assert written.citations[0].title == "Migraine"
    assert written.verified is True
    assert stub.requests[-1]["structured_outputs"]["grammar"].startswith("start: ")


def test_a_refusal_is_no_answer(stub, ask):
    stub.say(QUESTION, chat.NOT_ANSWERED)
    written = ask()
    assert (written.refused, written.citations, written.verified) == (True, [], None)


def test_without_sources_no_model_is_asked(stub, ask):
    assert ask(given=[]).refused
    assert not stub.requests


def test_the_grammar_without_refusal_has_only_quotations(sources):
    assert json.dumps(chat.NOT_ANSWERED) in grammar(sources, 2, may_refuse=True)
    strict = grammar(sources, 2, may_refuse=False)
    assert chat.NOT_ANSWERED not in strict
    assert strict.startswith("start: sentence")


@pytest.mark.parametrize("reply", ["Take 40 tablets.", "[1] Take 40 tablets.", "[99] Rest.", "", "[1]"])
def test_what_the_sources_do_not_say_is_never_shown(stub, ask, reply):
    """A server that ignores the grammar is caught by the check on the reply."""
    stub.say(QUESTION, reply or " ")
    with pytest.raises(LlmNonsense):
        ask(may_refuse=False)


def test_only_the_sentence_that_stands_is_kept(stub, ask, sources):
    stub.say(QUESTION, f"[1] {sources[0].text} [2] Also take 40 tablets.")
    written = ask()
    assert [c.number for c in written.citations] == [1]
    assert "40 tablets" not in written.text


def test_a_sentence_is_quoted_once(stub, ask, sources):
    stub.say(QUESTION, f"[1] {sources[0].text} [1] {sources[0].text}")
    assert len(ask().citations) == 1


def test_free_mode_drops_statements_without_a_citation(stub, ask):
    stub.say(QUESTION, "Migraine is common. [2] Rest in a dark room. [77] Fly.")
    written = ask(mode="free")
    assert written.text == "[2] Rest in a dark room."
    assert written.verified is False
    assert "structured_outputs" not in stub.requests[-1]


def test_free_mode_without_any_citation_falls_back_to_quotations(stub, ask, sources):
    stub.say(QUESTION, "Just rest.")
    with pytest.raises(LlmNonsense):
        ask(mode="free", may_refuse=False)
    assert [("structured_outputs" in r) for r in stub.requests] == [False, True]


def test_a_citation_that_was_changed_is_noticed(small_index, sources):
    citation = cite(1, sources[0], small_index.passages)
    assert in_library(citation, small_index.passages)
    assert not in_library(citation.model_copy(update={"text": citation.text + " Not."}), small_index.passages)
    assert not in_library(citation.model_copy(update={"sentence_id": "nowhere/self-care/1"}), small_index.passages)
    assert not verbatim(chat.Quoted(number=7, text=sources[0].text), sources)
