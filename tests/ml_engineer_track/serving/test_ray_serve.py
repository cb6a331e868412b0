"""Two replicas of the inference server as a user starts them: a kill, an update, a bad version, and people who ask meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from benchmarks import replicas as drill
from ml_engineer_track.serving.catalog import Limits
from ml_engineer_track.serving.ray_serve import open_replica, serve_ray
from shared import handoff
from shared.errors import UserError
from shared.files import write_text
from shared.replicas import REPLICA_HEADER, read_journals
from tests.ml_engineer_track.serving.conftest import QUESTION

pytest.importorskip("ray")
LIMITS = Limits(64, 8, 8)


def spoilt(artifact: Path, name: str) -> Path:
    """A version beside this one whose golden replies say something its weights do not."""
    folder = artifact.with_name(name)
    shutil.copytree(artifact, folder)
    manifest = handoff.read_manifest(folder)
    for variant in manifest.variants.values():
        variant.golden[0].token_ids[0] += 1
    write_text(folder / "manifest.json", manifest.model_copy(update={"version": name}).model_dump_json())
    handoff.write_sums(folder)
    return folder


def test_no_model_is_told_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model has been published"):
        serve_ray(None, [], "auto", "127.0.0.1", 8001, 2, None, tmp_path, LIMITS)


def test_a_port_that_is_taken_is_told_before_anything_is_started(artifact: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of 127.0.0.1 is in use"):
            serve_ray(artifact, [], "auto", "127.0.0.1", port, 2, None, artifact, LIMITS)


@pytest.mark.anyio
async def test_a_replica_of_a_version_that_says_something_else_is_not_opened(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "m-test")
    with pytest.raises(UserError, match=r"golden prompt 1 of 2 .* is answered differently from token 1 on"):
        await open_replica(spoilt(tmp_path / "m-test", "m-bad"), ["q8_0"], "auto", tmp_path, LIMITS, "127.0.0.1")


@pytest.fixture(scope="module")
def side(artifact: Path) -> Iterator[drill.Side]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARTIFACTS", str(artifact.parent.parent))
        with drill.running("inference", 2) as running:
            yield running


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_openai_client_streams_through_both_replicas(side: drill.Side) -> None:
    client = openai.OpenAI(base_url=f"{side.url}/v1", api_key="none", max_retries=0, timeout=120)
    (model, *_) = [m.id for m in client.models.list()]
    options = {"model": model, "messages": QUESTION, "max_tokens": 24, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert len(chunks) > 3
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    seen = {httpx.get(f"{side.url}/ready").headers[REPLICA_HEADER] for _ in range(40)}
    assert seen == {journal.replica for journal in read_journals(side.journals)}
    assert len(seen) == 2
    assert httpx.post(f"{side.url}/v1/chat/completions", json={"model": "nobody", "messages": []}).status_code == 400


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.anyio
async def test_a_killed_replica_takes_along_only_what_it_was_working_on(side: drill.Side) -> None:
    found = (await drill.under_load(side, "kill", 2, drill.kill_one)).metrics
    assert found["in_flight_on_the_killed"] > 0
    assert found["failed_elsewhere"] == 0
    assert found["failed"] <= found["in_flight_on_the_killed"]
    assert len(drill.alive(side)) == 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.anyio
async def test_a_new_version_replaces_all_and_no_request_fails(side: drill.Side) -> None:
    found = (await drill.under_load(side, "update", 2, drill.update)).metrics
    assert found["failed"] == 0
    assert found["old_version_afterwards"] == 0
    assert {journal.version for journal in drill.alive(side)} == {handoff.current(side.artifacts / "models").name}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.anyio
async def test_a_version_that_says_something_else_gets_no_request(side: drill.Side) -> None:
    good = handoff.current(side.artifacts / "models")

    async def publish(side: drill.Side, sent: list[drill.Sent]) -> dict[str, float]:
        spoilt(good, "m-bad")
        handoff.set_current(side.artifacts / "models", "m-bad")
        await drill.until(lambda: f"{good.name} goes on" in side.log.read_text(encoding="utf-8"), "it was not refused")
        return {}

    found = (await drill.under_load(side, "update", 2, publish)).metrics
    assert found["failed"] == 0
    assert "m-bad is not served: no replica of m-bad can serve: golden prompt 1 of 2" in side.log.read_text(encoding="utf-8")
    assert "m-bad" not in {journal.version for journal in read_journals(side.journals)}
    assert {journal.version for journal in drill.alive(side)} == {good.name}
    handoff.set_current(side.artifacts / "models", good.name)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_sigterm_ends_everything_that_was_started(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARTIFACTS", str(artifact.parent.parent))
    with drill.running("inference", 1) as side:
        (replica,) = drill.alive(side)
        command = next(p for p in psutil.Process(os.getpid()).children() if "serve-ray" in p.cmdline())
        started = command.children(recursive=True)
        command.send_signal(signal.SIGTERM)
        assert command.wait(120) == 0
        _, left = psutil.wait_procs(started, timeout=30)
        assert left == []
        assert not psutil.pid_exists(replica.pid)
        assert "Traceback" not in side.log.read_text(encoding="utf-8")
