"""Calls are constrained, counted, retried, bounded in time, and fail in one of two ways."""

import asyncio
import time

import pytest

from ai_engineer_track.llm import Llm, LlmNonsense, LlmUnavailable, check_constraint, spread
from shared import chat

ASK = chat.decide_messages("my head hurts", ["Migraine"])


def run(call):
    return asyncio.run(call)


def test_a_reply_is_counted_and_priced(stub, settings):
    llm = settings.llm.model_copy(update={"price_in": 2.0, "price_out": 4.0})
    reply = run(Llm(llm).chat(ASK, max_tokens=8))
    assert (reply.text, reply.model, reply.ttft) == ("Stub.", "stub", None)
    assert reply.cost == pytest.approx((2 * reply.prompt_tokens + 4 * reply.completion_tokens) / 1e6)
    assert stub.requests[-1]["temperature"] == 0


def test_a_published_model_is_named_by_its_version_which_no_other_weights_have(stub, settings):
    llm = Llm(settings.llm.model_copy(update={"published": "m-1"}))
    assert (llm.known, Llm(settings.llm).known) == ("m-1", "")  # before anybody was asked
    assert run(llm.chat(ASK, max_tokens=8)).model == llm.known == "m-1:stub"
    assert stub.requests[-1]["model"] == "stub"


def test_streaming_hands_over_every_piece(stub, settings):
    stub.say("head", "one two three")
    pieces = []
    reply = run(Llm(settings.llm).chat(ASK, max_tokens=8, on_text=pieces.append))
    assert "".join(pieces) == reply.text == "one two three"
    assert len(pieces) == 3
    assert 0 < reply.ttft <= reply.seconds
    assert reply.completion_tokens == 3


def test_structured_outputs_are_passed_on_and_checked(stub, settings):
    llm = Llm(settings.llm)
    assert run(llm.chat(ASK, max_tokens=8, structured={"choice": ["no", "yes"]})).text == "no"
    assert stub.requests[-1]["structured_outputs"] == {"choice": ["no", "yes"]}


@pytest.mark.parametrize(
    ("text", "structured"),
    [("maybe", {"choice": ["no", "yes"]}), ("{", {"json": {"type": "object"}}), ("ab", {"regex": "[0-9]+"})],
)
def test_a_server_that_ignores_a_constraint_is_noticed(text, structured):
    with pytest.raises(LlmNonsense):
        check_constraint(text, structured)


def test_one_failure_is_retried(stub, settings):
    stub.fault, stub.faults_left = "down", 1
    assert run(Llm(settings.llm).chat(ASK, max_tokens=8)).text == "Stub."
    assert len(stub.requests) == 2


@pytest.mark.parametrize("fault", ["down", "slow"])
def test_down_or_slow_is_unavailable_after_the_retries(stub, settings, fault):
    stub.fault = fault
    quick = settings.llm.model_copy(update={"timeout_s": 0.3, "retries": 1} if fault == "slow" else {"retries": 1})
    began = time.monotonic()
    with pytest.raises(LlmUnavailable, match=r"status 500|no reply within"):
        run(Llm(quick).chat(ASK, max_tokens=8))
    assert time.monotonic() - began < 5


def test_nobody_listening_is_unavailable(settings):
    with pytest.raises(LlmUnavailable, match="cannot be reached"):
        run(Llm(settings.llm.model_copy(update={"base_url": "http://127.0.0.1:9/v1", "retries": 0})).chat(ASK, max_tokens=8))


@pytest.mark.parametrize(("fault", "stream"), [("html", False), ("cut", True)])
def test_something_that_is_no_reply_is_nonsense(stub, settings, fault, stream):
    stub.fault = fault
    stub.say("head", "one two three")
    with pytest.raises(LlmNonsense):
        run(Llm(settings.llm).chat(ASK, max_tokens=8, on_text=(lambda _: None) if stream else None))


def test_probabilities_of_choices(stub, settings):
    choices = [chat.to_json(chat.Decision(action=a)) for a in chat.ACTIONS]
    stub.say("head", choices[2])
    found = run(Llm(settings.llm).probabilities(ASK, choices))
    assert sum(found.values()) == pytest.approx(1.0)
    assert max(found, key=found.get) == choices[2]
    assert 0.0 < found[choices[0]] < 0.2


def test_spread_follows_branches_of_tokens():
    choices = ["yes", "yellow", "no"]
    path = [("ye", {"ye": 0.7, "no": 0.2, "xx": 0.1}), ("s", {"s": 0.5, "llow": 0.5})]
    found = spread(choices, path)
    assert found["no"] == pytest.approx(0.2 / 0.9)
    assert found["yes"] == found["yellow"] == pytest.approx(0.35 / 0.9)
    assert spread(choices, []) == {}
    assert spread(choices, [("zz", {"zz": 1.0})]) == {}


def test_calls_in_flight_are_limited(stub, settings):
    llm = Llm(settings.llm.model_copy(update={"concurrency": 2}))

    async def many():
        return await asyncio.gather(*(llm.chat(ASK, max_tokens=8) for _ in range(20)))

    assert len(run(many())) == 20
