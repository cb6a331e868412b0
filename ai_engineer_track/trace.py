"""What every step took in, gave out, and cost: for the page's panel, for the stream of events, and for OpenTelemetry.

Why an AI engineer traces from the first day: an assistant that fails does so in one of ten steps, and without a trace every
failure looks like "the model is bad". Steps (with texts) stay with the conversation; spans carry only names, times and
counts, never what a person wrote. Spans are exported when OTEL_EXPORTER_OTLP_ENDPOINT is set, else kept in a local file.
"""

from __future__ import annotations

import contextvars
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from ai_engineer_track.llm import Reply
from ai_engineer_track.settings import AiSettings
from ai_engineer_track.turn import Event, Step

MAX_TEXT = 600  # of a step's input or output, for the panel
MAX_FILE = 10_000_000  # bytes of the local span file before it begins anew
tracer = trace.get_tracer("ai_engineer_track.agent")
_current: contextvars.ContextVar[Recorder] = contextvars.ContextVar("recorder")


@dataclass
class Recorder:
    """Collects the steps of one turn and tells the listener as they happen."""

    on_event: Callable[[Event], None] | None = None
    steps: list[Step] = field(default_factory=list)
    cost: float = 0.0

    def emit(self, event: Event) -> None:
        if self.on_event is not None:
            self.on_event(event)

    def text(self, delta: str, replace: bool = False) -> None:
        self.emit(Event(type="text", data={"delta": delta, "replace": True} if replace else {"delta": delta}))


@dataclass
class Work:
    """What a node fills in while it works."""

    input: str = ""
    output: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def count(self, reply: Reply) -> Reply:
        """Add a model's reply to the bill."""
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        self.cost += reply.cost
        return reply


def recorder() -> Recorder:
    """The one of the turn that is running; a silent one outside of a turn."""
    return _current.get(Recorder())


@contextmanager
def recording(on_event: Callable[[Event], None] | None = None) -> Iterator[Recorder]:
    """Everything inside belongs to one turn."""
    token = _current.set(Recorder(on_event))
    try:
        yield _current.get()
    finally:
        _current.reset(token)


@contextmanager
def step(node: str, input: str = "") -> Iterator[Work]:
    """One node's work: a step in the trace, an event at both ends, and a span."""
    work, now, began = Work(input=input), recorder(), time.perf_counter()
    now.emit(Event(type="started", node=node))
    with tracer.start_as_current_span(node) as span:
        try:
            yield work
        finally:
            done = Step(
                node=node,
                seconds=round(time.perf_counter() - began, 4),
                prompt_tokens=work.prompt_tokens,
                completion_tokens=work.completion_tokens,
                input=work.input[:MAX_TEXT],
                output=work.output[:MAX_TEXT],
            )
            span.set_attributes(
                {
                    "node": node,
                    "gen_ai.usage.input_tokens": work.prompt_tokens,
                    "gen_ai.usage.output_tokens": work.completion_tokens,
                    "cost": work.cost,
                }
            )
            now.steps.append(done)
            now.cost += work.cost
            now.emit(Event(type="finished", node=node, data={"step": done.model_dump()}))


def setup_tracing(settings: AiSettings) -> TracerProvider:
    """Send spans to the endpoint, or keep them in `artifacts/traces/spans.jsonl`. Call `shutdown()` on what it returns."""
    provider = TracerProvider(resource=Resource.create({"service.name": "health-assistant"}))
    if settings.otel_endpoint:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter: SpanExporter = OTLPSpanExporter(endpoint=settings.otel_endpoint.rstrip("/") + "/v1/traces")
    else:
        exporter = LocalExporter(settings.artifacts / "traces" / "spans.jsonl")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider


class LocalExporter(SpanExporter):
    """One JSON line a span, in a file that begins anew when it has grown large."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        lines = [
            json.dumps(
                {
                    "name": span.name,
                    "trace": f"{span.context.trace_id:032x}" if span.context else "",
                    "span": f"{span.context.span_id:016x}" if span.context else "",
                    "parent": f"{span.parent.span_id:016x}" if span.parent else None,
                    "start_ns": span.start_time,
                    "end_ns": span.end_time,
                    "attributes": dict(span.attributes or {}),
                },
                default=str,
            )
            for span in spans
        ]
        try:
            with self._lock:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if self.path.exists() and self.path.stat().st_size > MAX_FILE:
                    self.path.replace(self.path.with_suffix(".old.jsonl"))
                with self.path.open("a", encoding="utf-8") as stream:
                    stream.write("\n".join(lines) + "\n")
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS
