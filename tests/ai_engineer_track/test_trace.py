"""Steps are collected and told; spans carry no words of a person; they stay local without an endpoint."""

import json

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from ai_engineer_track import trace
from ai_engineer_track.llm import Reply

REPLY = Reply(text="x", model="m", prompt_tokens=7, completion_tokens=3, seconds=0.1, ttft=None, cost=0.25)


def test_a_step_is_collected_counted_and_told():
    events = []
    with trace.recording(events.append) as recorder, trace.step("answer", "in") as work:
        work.count(REPLY)
        work.count(REPLY)
        work.output = "o" * 5000
    step = recorder.steps[0]
    assert (step.node, step.prompt_tokens, step.completion_tokens) == ("answer", 14, 6)
    assert len(step.output) == trace.MAX_TEXT
    assert recorder.cost == 0.5
    assert [e.type for e in events] == ["started", "finished"]
    assert events[1].data["step"]["node"] == "answer"


def test_a_step_that_fails_is_in_the_trace_too():
    with trace.recording() as recorder, pytest.raises(ValueError, match="no"), trace.step("x"):
        raise ValueError("no")
    assert recorder.steps[0].node == "x"


def test_turns_do_not_mix():
    with trace.recording() as outer:
        with trace.recording() as inner, trace.step("inner"):
            pass
        with trace.step("outer"):
            pass
    assert [s.node for s in inner.steps] == ["inner"]
    assert [s.node for s in outer.steps] == ["outer"]
    assert trace.recorder().steps == []


def test_spans_stay_local_and_carry_no_words(tmp_path, monkeypatch):
    path = tmp_path / "traces" / "spans.jsonl"
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(trace.LocalExporter(path)))
    monkeypatch.setattr(trace, "tracer", provider.get_tracer("test"))
    with trace.recording(), trace.step("triage", "I have a secret illness") as work:
        work.output = "secret, too"
    line = json.loads(path.read_text())
    assert line["name"] == "triage"
    assert "secret" not in path.read_text()
    monkeypatch.setattr(trace, "MAX_FILE", 10)
    with trace.recording(), trace.step("decide"):
        pass
    assert json.loads(path.read_text())["name"] == "decide"
    assert (tmp_path / "traces" / "spans.old.jsonl").exists()


def test_a_disk_that_cannot_be_written_loses_spans_not_turns(tmp_path):
    (tmp_path / "file").write_text("")
    exporter = trace.LocalExporter(tmp_path / "file" / "spans.jsonl")
    assert exporter.export([]).name == "FAILURE"
