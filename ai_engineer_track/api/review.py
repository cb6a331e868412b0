"""GET /review, /reviews/next and POST /reviews: failed answers, their sources, and what reviewers say is right.

    make serve, then open http://127.0.0.1:8000/review

A data-collection tool for the people who run the service, not for those who use it: it shows what others asked (without names,
numbers and addresses). So it needs the API token where one is set, and without one it only works on the machine itself.
"""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from ai_engineer_track.api.search import Sentence
from ai_engineer_track.api.service import Index, Service, ServiceDep
from ai_engineer_track.reviews import (
    REVIEWER,
    Agreement,
    Failed,
    Review,
    ReviewStore,
    agreement,
    failed_answers,
    next_for,
)
from shared.chat import Verdict
from shared.labels import LabelAction, LabelStore

router = APIRouter(tags=["review"])
NOT_HERE = "Reviewing is only possible on the machine itself, or with an API token (API_TOKEN)."


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Source(_Strict):
    """A passage to choose sentences from."""

    id: str
    title: str
    heading: str
    sentences: list[Sentence]


class Opinion(_Strict):
    """What another reviewer said; only shown to the one who decides."""

    reviewer: str
    action: LabelAction
    sentences: list[str]


class Reason(_Strict):
    """Why the answer is here. `counts` is false for the marks of a judge that did not agree with the labels."""

    kind: str
    text: str
    counts: bool


class Task(_Strict):
    """One failed answer. `earlier` are (message, reply) pairs of the conversation before it."""

    answer_id: str
    question: str
    earlier: list[tuple[str, str]]
    kind: str
    text: str
    withheld: str | None
    cited: list[str]
    verdict: Verdict | None
    reasons: list[Reason]
    sources: list[Source]
    opinions: list[Opinion]
    model_version: str


class Progress(_Strict):
    """`waiting` counts answers without a label, `yours` those of them that this reviewer can still look at."""

    failed: int
    labelled: int
    waiting: int
    yours: int
    agreement: Agreement


class Next(_Strict):
    task: Task | None
    progress: Progress


class Given(_Strict):
    """`labelled`: the opinion settled it, and a label was written."""

    labelled: bool
    agreed: bool | None


def reviewing(request: Request, service: ServiceDep) -> None:
    """403 for anybody but people on this machine, where no token protects what others asked.

    The name in the address counts, too: a page elsewhere could otherwise have its own name lead here (DNS rebinding).
    """
    if service.settings.api.token is None and not (_local(service.settings.api.host) and _local(request.url.hostname or "")):
        raise HTTPException(403, NOT_HERE)


Reviewing = Annotated[None, Depends(reviewing)]


@router.get("/reviews/next")
async def next_task(
    service: ServiceDep, _: Reviewing, reviewer: Annotated[str, Query(pattern=REVIEWER, description="who looks")]
) -> Next:
    """The failed answer this reviewer should look at, and how far the reviewing has come."""
    index = service.need_index()
    failed = await run_in_threadpool(failed_answers, _folder(service))
    chosen = next_for(reviewer, failed)
    sentences_of = {passage.id: [s.id for s in passage.sentences] for passage in index.passages.values()}
    progress = Progress(
        failed=len(failed),
        labelled=sum(answer.labelled for answer in failed),
        waiting=sum(not answer.labelled for answer in failed),
        yours=sum(answer.open_to(reviewer) for answer in failed),
        agreement=agreement(failed, sentences_of),
    )
    return Next(task=_task(chosen, index) if chosen else None, progress=progress)


@router.post("/reviews", status_code=201)
async def give(body: Review, service: ServiceDep, _: Reviewing) -> Given:
    """Keep an opinion; when it settles the answer, write the label. HTTPException 404, 409 or 422 says what is wrong."""
    known = {s.id for passage in service.need_index().passages.values() for s in passage.sentences}
    if unknown := [s for s in body.sentences if s not in known]:
        raise HTTPException(422, f"There is no sentence {unknown[0][:120]!r} in the library.")
    return await run_in_threadpool(_keep, service, body)


def _keep(service: Service, body: Review) -> Given:
    folder = _folder(service)
    answer = _find(folder, body.answer_id)
    if answer is None:
        raise HTTPException(404, "There is no such answer to review.")
    if not answer.open_to(body.reviewer):
        raise HTTPException(409, "This answer has its label, or you have given your opinion of it already.")
    ReviewStore(folder).add(body)
    answer = _find(folder, body.answer_id)  # somebody else may have given theirs meanwhile
    label = answer.decided() if answer else None
    if label is not None:
        LabelStore(folder).add(label)
    return Given(labelled=label is not None, agreed=label.agreed if label else None)


def _find(folder: Path, answer_id: str) -> Failed | None:
    return next((a for a in failed_answers(folder) if a.record.answer_id == answer_id), None)


def _task(answer: Failed, index: Index) -> Task:
    record = answer.record
    differ = len(answer.reviews) >= 2
    wanted = [*record.passages, *(s.rsplit("/", 1)[0] for s in record.turn.cited)]
    if differ:
        wanted += [passage for review in answer.reviews for passage in review.found]
    return Task(
        answer_id=record.answer_id,
        question=record.question,
        earlier=list(zip(record.earlier, [*record.replies, *[""] * len(record.earlier)], strict=False)),
        kind=record.turn.kind,
        text=record.turn.text,
        withheld=next((r.turn.withheld for r in answer.records if r.turn.withheld), None),
        cited=record.turn.cited,
        verdict=record.turn.verdict,
        reasons=[
            Reason(kind=r.kind, text=r.reason, counts=r.kind != "judge_failed" or bool(r.judge_trusted)) for r in answer.records
        ],
        sources=[_source(index.passages[name]) for name in dict.fromkeys(wanted) if name in index.passages],
        opinions=[Opinion(reviewer=r.reviewer, action=r.action, sentences=r.sentences) for r in answer.reviews] if differ else [],
        model_version=record.model_version,
    )


def _source(passage: Any) -> Source:
    sentences = [Sentence(id=s.id, text=s.text) for s in passage.sentences]
    return Source(id=passage.id, title=passage.title, heading=passage.heading, sentences=sentences)


def _folder(service: Service) -> Path:
    return service.feedback.path.parent


def _local(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
