"""GET /health (the process is alive), /ready (it can answer) and /metrics (Prometheus).

A supervisor restarts what is not alive and sends no messages to what is not ready; the two must not be mixed up: a service whose
inference server is down is alive, and restarting it would not help.
"""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from ai_engineer_track.api.service import ServiceDep

router = APIRouter(tags=["health"])


class Alive(BaseModel):
    status: str = "ok"


class Ready(BaseModel):
    """`problem` is null when the service can answer."""

    ready: bool
    problem: str | None = None
    model_version: str | None = None
    index_version: str | None = None
    passages: int = 0


@router.get("/health")
async def health() -> Alive:
    return Alive()


@router.get("/ready", responses={503: {"model": Ready}})
async def ready(service: ServiceDep, response: Response) -> Ready:
    """200 when index and inference server are there, else 503 with the reason."""
    problem = service.broken if service.assistant is None or service.index is None else await service.assistant.problem()
    response.status_code = 503 if problem else 200
    return Ready(
        ready=problem is None,
        problem=problem,
        model_version=service.assistant.model_version if service.assistant else None,
        index_version=service.index.version if service.index else None,
        passages=len(service.index.passages) if service.index else 0,
    )


@router.get("/metrics", response_class=Response)
async def metrics(service: ServiceDep) -> Response:
    return Response(generate_latest(service.meters.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
