"""The stub inference server and settings that point at it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # test folders are not packages
from stub_llm import StubServer

from ai_engineer_track.settings import load_ai_settings


@pytest.fixture(scope="session")
def _stub():
    with StubServer() as server:
        yield server


@pytest.fixture
def stub(_stub):
    _stub.reset()
    return _stub


@pytest.fixture
def settings(stub, tmp_path):
    loaded = load_ai_settings("tiny", llm_base_url=stub.url, artifacts=tmp_path)
    return loaded.model_copy(update={"llm": loaded.llm.model_copy(update={"timeout_s": 5.0, "retries": 1})})
