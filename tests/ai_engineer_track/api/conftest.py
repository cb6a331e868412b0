"""A service over six tiny leaflets, with an assistant of a few lines (fake_assistant.py), asked in process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

sys.path.append(str(Path(__file__).parent))
from fake_assistant import FakeAssistant, FakeIndex, FakeRetriever, Serve, settings_for

from ai_engineer_track.api.main import create_app
from shared import library as lib


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def assistant(mini_datasets: Path) -> FakeAssistant:
    return FakeAssistant(lib.load_library(mini_datasets).leaflets["sunburn"])


@pytest.fixture
def serve(tmp_path: Path, mini_datasets: Path, assistant: FakeAssistant) -> Serve:
    """A client of a new service; keywords are values for the settings' `api` group. Two services share their files."""
    index = FakeIndex(mini_datasets)

    def start(**api: Any) -> TestClient:
        settings = settings_for(tmp_path / "artifacts", mini_datasets, **api)
        return TestClient(create_app(settings, assistant, index, FakeRetriever(index)))

    return start


@pytest.fixture
def client(serve: Serve) -> TestClient:
    return serve()
