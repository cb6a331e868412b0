"""The whole service over published versions: real index, graph, routes and server processes, moved while people ask over HTTP."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from small_index import LEAFLETS
from small_versions import publish

from ai_engineer_track import rollout
from ai_engineer_track.api.main import create_app
from ai_engineer_track.inference import Servers
from ai_engineer_track.settings import load_ai_settings
from shared import handoff, outcomes
from shared import library as lib
from shared.rollout import Rollout, clear_rollout, write_rollout
from shared.settings import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: the stub of the other tests as a process: it keeps every constraint, and `m-bad` does not start
SERVER = """
import sys
sys.path.append({tests!r})
import uvicorn
from stub_llm import StubServer
option = lambda name: sys.argv[sys.argv.index(name) + 1]
if option("--model").endswith("m-bad"):
    sys.exit("error: golden prompt 1 of 1 is answered differently from token 3 on")
app = StubServer()._app()
app.add_api_route("/ready", lambda: {{}})
uvicorn.run(app, port=int(option("--port")), log_level="error")
"""


@pytest.fixture
def following(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TestClient, Path]]:
    """A client of a service that follows the models folder it comes with; m-1 is current, m-2 and m-bad are published."""
    from ai_engineer_track.ingest import ingest

    package = tmp_path / "here" / "ml_engineer_track"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(SERVER.format(tests=str(Path(__file__).parent.parent)), encoding="utf-8")
    monkeypatch.chdir(package.parent)
    monkeypatch.setattr(rollout, "POLL_SECONDS", 0.1)
    for slug in LEAFLETS:
        (tmp_path / "corpus").mkdir(exist_ok=True)
        shutil.copy(lib.DATASETS / "health_library" / f"{slug}.md", tmp_path / "corpus")
    settings = load_ai_settings("tiny", corpus=str(tmp_path / "corpus"), artifacts=str(tmp_path / "artifacts"))
    settings = settings.model_copy(update={"api": settings.api.model_copy(update={"rate_per_minute": 1_000_000})})
    models = settings.artifacts / "models"
    for version in ("m-bad", "m-2", "m-1"):
        publish(models, version)
    ingest(settings)
    with Servers(settings) as servers, TestClient(create_app(settings, servers=servers)) as client:
        yield client, models


def version_of(client: TestClient) -> str:
    return str(client.get("/ready").json()["model_version"])


def roll_back(models: Path) -> str:
    """`make rollback`, as whoever is on duty gives it, from the repository; the last line it said."""
    command = [sys.executable, "-m", "ml_engineer_track", "models", "rollback"]
    environment = os.environ | {"ARTIFACTS": str(models.parent)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.1)


def test_people_are_answered_through_a_trial_a_promotion_and_a_rollback(following: tuple[TestClient, Path]) -> None:
    client, models = following
    assert version_of(client) == "m-1:stub"
    seen: list[tuple[int, Any]] = []
    ended = threading.Event()

    def person(n: int) -> None:
        while not ended.is_set():
            reply = client.post("/chat", json={"message": f"What helps against a migraine attack {'really ' * (n % 3)}?"})
            seen.append((reply.status_code, reply.json().get("turn")))
            n += 1

    people = [threading.Thread(target=person, args=(n,)) for n in range(3)]
    for one in people:
        one.start()
    try:
        write_rollout(models, Rollout(candidate="m-bad", mode="canary", share=1.0))  # nobody ever meets it
        time.sleep(2)
        write_rollout(models, Rollout(candidate="m-2", mode="shadow", share=1.0))
        time.sleep(4)
        write_rollout(models, Rollout(candidate="m-2", mode="canary", share=0.5))
        until(lambda: any(turn and turn["arm"] == "candidate" for _, turn in seen))
        handoff.set_current(models, "m-2")
        clear_rollout(models)
        until(lambda: version_of(client) == "m-2:stub")
        time.sleep(1)
        assert roll_back(models) == "m-1 is current again"
        until(lambda: version_of(client) == "m-1:stub")
        time.sleep(1)
    finally:
        ended.set()
        for one in people:
            one.join()
    assert {status for status, _ in seen} == {200}
    kinds = {turn["kind"] for _, turn in seen}
    assert "unavailable" not in kinds, kinds
    assert {turn["model_version"] for _, turn in seen} == {"m-1:stub", "m-2:stub"}
    recorded, bad = outcomes.read(models.parent / "feedback")
    assert not bad
    assert len([o for o in recorded if o.arm != "shadow"]) == len(seen)
