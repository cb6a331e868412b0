"""POST /feedback: a person's thumb; and the records the service writes by itself when an answer was found wanting.

Both go to `shared/feedback.py`, which removes personal data before anything is written. That file is the way back: the ML
track learns from it what the model got wrong. Beside it, how every answer went is noted without a word of it
(`shared/outcomes.py`).
"""

from __future__ import annotations

from itertools import takewhile
from typing import Literal

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from ai_engineer_track.api.service import Service, ServiceDep
from ai_engineer_track.api.sessions import ClientDep, Exchange, address_of
from ai_engineer_track.turn import Reply, Turn
from shared.feedback import Feedback, Kind, TurnSummary
from shared.outcomes import Outcome

#: retrieval less sure than this that the library answers: somebody should look at the answer
UNSURE = 0.25
router = APIRouter(tags=["feedback"])
#: messages before the answer that a record keeps; without an end a long conversation would fill the disk with itself
EARLIER = 20


class Thumb(BaseModel):
    model_config = ConfigDict(extra="forbid")
    answer_id: str = Field(max_length=64)
    kind: Literal["thumbs_up", "thumbs_down"]
    reason: str = Field(default="", max_length=2_000)


class Recorded(BaseModel):
    """`new` is false when the same remark on the same answer was already there."""

    id: str
    new: bool


@router.post("/feedback", status_code=201)
async def feedback(body: Thumb, request: Request, service: ServiceDep, client: ClientDep) -> Recorded:
    """Keep what a person thinks of an answer they got."""
    service.rate.take(address_of(request))
    exchange = await run_in_threadpool(service.sessions.exchange, body.answer_id, client)
    if exchange is None:
        raise HTTPException(404, "There is no such answer in your conversations.")
    earlier = await run_in_threadpool(service.sessions.history, exchange.session_id)
    record = make_record(service, exchange, earlier, body.kind, body.reason)
    return Recorded(id=record.id, new=await run_in_threadpool(_write, service, record))


def record_automatically(service: Service, exchange: Exchange, earlier: list[Exchange]) -> None:
    """Write down what the service itself found wrong with its answer, if anything."""
    for kind, reason in shortcomings(exchange.turn, earlier, exchange.message):
        _write(service, make_record(service, exchange, earlier, kind, reason))


def record_outcome(service: Service, answer_id: str, turn: Turn, seconds: float) -> None:
    """How the answer went, whatever it was: rates need what went right, too."""
    verdict = turn.verdict
    service.outcomes.add(
        Outcome(
            answer_id=answer_id,
            arm=turn.arm,
            model_version=turn.model_version,
            kind=turn.kind,
            grounded=verdict.grounded if verdict else None,
            safe=verdict.safe if verdict else None,
            helpful=verdict.helpful if verdict else None,
            judge_trusted={"grounded", "safe"} <= set(turn.trusted),
            quotes_verbatim=turn.quotes_verified,
            seconds=round(seconds, 4),
        )
    )


def shortcomings(turn: Turn, earlier: list[Exchange], message: str) -> list[tuple[Kind, str]]:
    """What a reviewer should look at, with the reason.

    `withheld`: an answer was written and not shown. `low_confidence`: nothing was found to answer from, or it was answered
    although retrieval was unsure. `clarify_failed`: we asked back, and there was still no answer, or the person could answer
    none of our questions.
    """
    found: list[tuple[Kind, str]] = []
    if wrong := failed_rubrics(turn):
        found.append(("judge_failed", wrong))
    asked = _asked_back(earlier)
    if turn.kind == "not_answered":
        if turn.verdict is not None or turn.quotes_verified is not None:
            found.append(("withheld", turn.reason))
        elif turn.passages:  # without any, the message could not be read and the library was not asked
            found.append(("low_confidence", turn.reason))
        if asked:
            found.append(("clarify_failed", turn.reason))
    elif turn.kind == "answer":
        if turn.confidence is not None and turn.confidence < UNSURE:
            found.append(("low_confidence", f"answered, {turn.confidence:.2f} sure that the library does"))
        replies = [*(e.message for e in asked[1:]), message]
        if asked and all(Reply(feature="", text=reply).unknown for reply in replies):
            found.append(("clarify_failed", "the person could answer none of the questions"))
    return found


def failed_rubrics(turn: Turn) -> str:
    """The judge's marks when one of them is bad; empty when none is, or nobody judged."""
    verdict = turn.verdict
    if verdict is None or (verdict.grounded and verdict.safe and verdict.helpful >= 3):
        return ""
    return f"grounded: {verdict.grounded}, safe: {verdict.safe}, helpful: {verdict.helpful}"


def judge_counts(turn: Turn) -> bool | None:
    """Is one of the bad marks (of all marks, where none is bad) in a rubric in which the judge agreed with the labels?"""
    verdict = turn.verdict
    if verdict is None:
        return None
    bad = {"grounded": not verdict.grounded, "safe": not verdict.safe, "helpful": verdict.helpful < 3}
    named = {rubric for rubric, is_bad in bad.items() if is_bad} or set(bad)
    return bool(named & set(turn.trusted))


def make_record(service: Service, exchange: Exchange, earlier: list[Exchange], kind: Kind, reason: str) -> Feedback:
    """`earlier` are exchanges of the conversation, oldest first; those after this one do not belong to it."""
    turn = exchange.turn
    place = next((n for n, e in enumerate(earlier) if e.answer_id == exchange.answer_id), len(earlier))
    before = earlier[:place][-EARLIER:]
    opening = next(iter(_asked_back(before)), exchange)
    return Feedback(
        kind=kind,
        reason=reason,
        answer_id=exchange.answer_id,
        question=exchange.message,
        opening=opening.message,
        earlier=[e.message for e in before],
        replies=[e.turn.text for e in before],
        turn=TurnSummary(
            kind=turn.kind,
            text=turn.text,
            leaflet=turn.leaflet,
            cited=[citation.sentence_id for citation in turn.citations],
            question=turn.question.text if turn.question else None,
            verdict=turn.verdict,
            withheld=_written(turn) if kind == "withheld" else None,
        ),
        steps=[f"{step.node}: {step.output}" for step in turn.trace],
        passages=[passage.id for passage in turn.passages],
        model_version=turn.model_version or "unknown",
        index_version=turn.index_version or "unknown",
        prompt_version=turn.prompt_version,
        judge_trusted=judge_counts(turn),
    )


def _asked_back(earlier: list[Exchange]) -> list[Exchange]:
    """The exchanges just before, oldest first, that asked back: the first of them began the problem."""
    found = list(takewhile(lambda exchange: exchange.turn.kind == "clarify", reversed(earlier)))
    return found[::-1]


def _written(turn: Turn) -> str | None:
    """What the check did not let through."""
    return next((step.output for step in turn.trace if step.node == "answer"), None)


def _write(service: Service, record: Feedback) -> bool:
    new = service.feedback.add(record)
    if new:
        service.meters.feedback.labels(record.kind).inc()
    return new
