"""What every route of the service needs: the assistant, the library, the conversations, the feedback and the meters.

Routes ask for it with `ServiceDep`. Tests build one with a small fake assistant; `main.create_app` builds the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from fastapi import Depends, HTTPException, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ai_engineer_track.api.limits import Gate, RateLimit
from ai_engineer_track.settings import AiSettings
from ai_engineer_track.turn import Event, Turn
from shared.feedback import FeedbackStore
from shared.outcomes import OutcomeStore

if TYPE_CHECKING:
    from ai_engineer_track.api.sessions import SessionStore
    from shared.passages import Passage  # loads torch


class Assistant(Protocol):
    """What answers. `run_turn` keeps the conversation of a session; `forget` deletes all it remembers of one."""

    @property
    def model_version(self) -> str: ...

    async def run_turn(
        self,
        session_id: str,
        message: str,
        on_event: Callable[[Event], None] | None = None,
        on_other: Callable[[Turn, float], None] | None = None,
    ) -> Turn:
        """`on_other` is told of a turn the person did not get, and the seconds it took."""

    async def forget(self, session_id: str) -> None: ...

    async def problem(self) -> str | None:
        """Why it cannot answer right now, as one sentence; None when it can."""


class Index(Protocol):
    """The part of `ingest.Index` that is shown: its version and its passages by id."""

    @property
    def version(self) -> str: ...

    @property
    def passages(self) -> Mapping[str, Passage]: ...


class Retriever(Protocol):
    """The part of `retrieve.Retriever` that `/search` uses."""

    def search(self, query: str, k: int | None = None) -> list[Any]: ...


class Meters:
    """Prometheus metrics, in a registry of their own so that two services in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        seconds = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60)
        self.requests = self._counter("http_requests", "Requests by route and status", "method", "route", "status")
        self.request_seconds = Histogram(
            "http_request_seconds", "Duration of requests", ["route"], buckets=seconds, registry=self.registry
        )
        self.refused = self._counter("refused_requests", "Requests turned away by a limit", "why")
        self.turns = self._counter("turns", "Messages worked on, by outcome", "kind")
        self.turn_seconds = Histogram("turn_seconds", "From message to whole reply", buckets=seconds, registry=self.registry)
        self.first_text_seconds = Histogram(
            "first_text_seconds", "From message to first visible word", buckets=seconds, registry=self.registry
        )
        self.tokens = self._counter("llm_tokens", "Tokens of all model calls", "direction")
        self.cost = self._counter("llm_cost", "Money for model calls, in the unit of the price table")
        self.feedback = self._counter("feedback_records", "Feedback written, by kind", "kind")
        self.working = Gauge("turns_in_progress", "Messages being worked on", registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        self.requests.labels(method, route, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def count_turn(self, turn: Turn, seconds: float) -> None:
        self.turns.labels(turn.kind).inc()
        self.turn_seconds.observe(seconds)
        self.tokens.labels("prompt").inc(sum(step.prompt_tokens for step in turn.trace))
        self.tokens.labels("completion").inc(sum(step.completion_tokens for step in turn.trace))
        self.cost.inc(turn.cost)


@dataclass
class Service:
    """`assistant`, `retriever` and `index` are None while `broken` says, in one sentence, why they could not be opened."""

    settings: AiSettings
    sessions: SessionStore
    feedback: FeedbackStore
    outcomes: OutcomeStore
    gate: Gate
    rate: RateLimit
    meters: Meters = field(default_factory=Meters)
    assistant: Assistant | None = None
    retriever: Retriever | None = None
    index: Index | None = None
    broken: str = "The service is still starting."

    def need_assistant(self) -> Assistant:
        """503 while there is none."""
        if self.assistant is None:
            raise HTTPException(503, self.broken)
        return self.assistant

    def need_index(self) -> Index:
        if self.index is None:
            raise HTTPException(503, self.broken)
        return self.index

    def need_retriever(self) -> Retriever:
        if self.retriever is None:
            raise HTTPException(503, self.broken)
        return self.retriever


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(service_of)]
