"""POST /feedback: a person's thumb; and the records the service writes by itself when an answer was found wanting.

Both go to `shared/feedback.py`, which removes personal data before anything is written. That file is the way back: the ML
track learns from it what the model got wrong.
"""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from ai_engineer_track.api.service import Service, ServiceDep
from ai_engineer_track.api.sessions import ClientDep, Exchange, address_of
from ai_engineer_track.turn import Turn
from shared.chat import PROMPT_VERSION
from shared.feedback import Feedback, Kind, TurnSummary

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
    for kind, reason in shortcomings(exchange.turn, earlier):
        _write(service, make_record(service, exchange, earlier, kind, reason))


def shortcomings(turn: Turn, earlier: list[Exchange]) -> list[tuple[Kind, str]]:
    """What a reviewer should look at, with the reason.

    `withheld`: an answer was written and not shown. `low_confidence`: nothing was found to answer from. `clarify_failed`: the
    person answered our questions and still got no answer.
    """
    found: list[tuple[Kind, str]] = []
    verdict = turn.verdict
    if verdict and not (verdict.grounded and verdict.safe and verdict.helpful >= 3):
        said = f"grounded: {verdict.grounded}, safe: {verdict.safe}, helpful: {verdict.helpful}"
        found.append(("judge_failed", said))
    if turn.kind == "not_answered":
        if any(step.node == "verify" for step in turn.trace):
            found.append(("withheld", turn.reason))
        elif turn.passages:  # without any, the message could not be read and the library was not asked
            found.append(("low_confidence", turn.reason))
        if earlier and earlier[-1].turn.kind == "clarify":
            found.append(("clarify_failed", turn.reason))
    return found


def make_record(service: Service, exchange: Exchange, earlier: list[Exchange], kind: Kind, reason: str) -> Feedback:
    turn = exchange.turn
    return Feedback(
        kind=kind,
        reason=reason,
        answer_id=exchange.answer_id,
        question=exchange.message,
        earlier=[e.message for e in earlier if e.created < exchange.created][-EARLIER:],
        turn=TurnSummary(
            kind=turn.kind,
            text=turn.text,
            leaflet=turn.leaflet,
            cited=[citation.sentence_id for citation in turn.citations],
            question=turn.question.text if turn.question else None,
            verdict=turn.verdict,
        ),
        passages=[passage.id for passage in turn.passages],
        model_version=service.assistant.model_version if service.assistant else "unknown",
        index_version=service.index.version if service.index else "unknown",
        prompt_version=PROMPT_VERSION,
    )


def _write(service: Service, record: Feedback) -> bool:
    new = service.feedback.add(record)
    if new:
        service.meters.feedback.labels(record.kind).inc()
    return new
