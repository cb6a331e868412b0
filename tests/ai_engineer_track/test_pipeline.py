"""The pipeline as a whole, with small fakes where a model would be: order, report, and what a run leaves behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

sys.path.append(str(Path(__file__).parent / "api"))  # test folders are not packages
from fake_assistant import FakeAssistant, FakeIndex, FakeRetriever

from ai_engineer_track import pipeline
from ai_engineer_track.api.main import create_app
from ai_engineer_track.settings import AiSettings, load_ai_settings
from shared import library as lib
from shared.errors import UserError


@pytest.fixture
def settings(tmp_path: Path, mini_datasets: Path) -> AiSettings:
    return load_ai_settings("smoke", artifacts=tmp_path / "artifacts", datasets=mini_datasets)


@pytest.fixture
def faked(settings: AiSettings, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The real service over HTTP with a fake assistant; no model, no index. `order` lists what happened."""
    order: list[str] = []
    assistant = FakeAssistant(lib.load_library(settings.datasets).leaflets["sunburn"])
    index = FakeIndex(settings.datasets)

    @contextmanager
    def server(given: AiSettings) -> Iterator[AiSettings]:
        order.append("server up")
        try:
            yield given.model_copy(update={"llm": given.llm.model_copy(update={"base_url": "http://127.0.0.1:9/v1"})})
        finally:
            order.append("server down")

    def ingest(given: AiSettings) -> Any:
        assert given.llm.base_url
        order.append("ingest")
        return SimpleNamespace(version="i-1", passages=12, added=12, skipped=[("odd.bin", "not a text")])

    def app(given: AiSettings) -> Any:
        order.append("service")
        return create_app(given, assistant, index, FakeRetriever(index))

    async def measure_parts(given: AiSettings) -> dict[str, Any]:
        order.append("measure")
        return {"judge": {"rows": 1}, "triage": {"sensitivity": {"value": 1.0, "low": 1.0, "high": 1.0, "n": 2}}}

    async def name(given: AiSettings) -> str:
        return "m-fake"

    monkeypatch.setattr(pipeline, "inference_server", server)
    monkeypatch.setattr(pipeline, "ingest", ingest)
    monkeypatch.setattr(pipeline, "create_app", app)
    monkeypatch.setattr(pipeline, "measure_parts", measure_parts)
    monkeypatch.setattr(pipeline, "_model_name", name)
    return SimpleNamespace(order=order, assistant=assistant)


def test_all_stages_run_in_order_and_the_report_is_written(
    settings: AiSettings, faked: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    page = pipeline.run(settings)
    assert faked.order == ["server up", "ingest", "service", "measure", "server down"]
    assert page == settings.artifacts / "reports" / "ai.html"
    stored = json.loads((settings.artifacts / "reports" / "ai.json").read_text(encoding="utf-8"))
    assert (stored["model"], stored["index"]) == ("m-fake", {"version": "i-1", "passages": 12})
    assert list(stored["seconds"]) == ["model", "ingest", "converse", "measure"]
    assert stored["suite"]["conversations"] == 4
    assert stored["suite"]["errors"] == 0
    assert [s["kind"] for s in stored["samples"]] == ["answerable", "vague", "emergency", "harmful"]
    assert {s["id"] for s in stored["worst"]} == {s["id"] for s in stored["samples"] if not s["ok"]}
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if "Why: " in line] == list(stored["seconds"])
    assert "skipped odd.bin: not a text" in printed


def test_simulated_people_leave_nothing_among_real_ones(settings: AiSettings, faked: SimpleNamespace) -> None:
    """They ask the test questions: as feedback these would be learned from, and the next figures would be worth nothing."""
    pipeline.run(settings)
    assert len(faked.assistant.said) == 4
    assert not (settings.artifacts / "feedback").exists()
    assert not (settings.artifacts / "service").exists()
    assert not (settings.artifacts / "cache").exists()


def test_a_suite_sees_what_was_made_before_and_nothing_of_the_last_suite(
    settings: AiSettings, faked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (settings.artifacts / "index").mkdir(parents=True)
    (settings.artifacts / "index" / "current").write_text("i-1")
    leftover = settings.artifacts / "suite" / "cache" / "answers.sqlite"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("answers of the last run")
    seen: list[Path] = []
    real = pipeline.create_app
    monkeypatch.setattr(pipeline, "create_app", lambda given: (seen.append(given.artifacts), real(given))[1])
    with pipeline.service(settings):
        assert (seen[0] / "index" / "current").read_text() == "i-1"
        assert (seen[0] / "heads").is_dir()
        assert not leftover.exists()
    with pipeline.service(settings):  # emptying it empties nothing that it only refers to
        assert (settings.artifacts / "index" / "current").exists()


def test_the_suite_is_not_held_back_by_the_limit_for_people(settings: AiSettings, faked: SimpleNamespace) -> None:
    slow = settings.model_copy(update={"api": settings.api.model_copy(update={"rate_per_minute": 1})})
    assert not any(o.error for o in pipeline_outcomes(slow))


def test_a_service_with_a_token_is_talked_to_with_it(settings: AiSettings, faked: SimpleNamespace) -> None:
    guarded = load_ai_settings("smoke", artifacts=settings.artifacts, datasets=settings.datasets, api_token="open sesame")
    assert not any(o.error for o in pipeline_outcomes(guarded))


def test_a_service_that_cannot_answer_says_why(settings: AiSettings, faked: SimpleNamespace) -> None:
    faked.assistant.down = "The language model does not answer."
    with pytest.raises(UserError, match="The language model does not answer"), pipeline.service(settings, start_seconds=1.0):
        pass


def test_the_service_is_gone_after_the_block(settings: AiSettings, faked: SimpleNamespace) -> None:
    with pipeline.service(settings) as url:
        assert httpx.get(f"{url}/ready").status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/ready")


def test_a_failing_stage_ends_the_run_and_the_server(
    settings: AiSettings, faked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(given: AiSettings) -> Any:
        raise UserError("no documents", "here", "Set CORPUS")

    monkeypatch.setattr(pipeline, "ingest", broken)
    with pytest.raises(UserError, match="no documents"):
        pipeline.run(settings)
    assert faked.order == ["server up", "server down"]
    assert not (settings.artifacts / "reports").exists()


def pipeline_outcomes(settings: AiSettings) -> list[Any]:
    with pipeline.service(settings) as url:
        return pipeline.converse(url, settings)
