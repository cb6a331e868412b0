"""The stub inference server, settings that point at it, and an agent over a few leaflets that is fitted once."""

from __future__ import annotations

import asyncio
import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parent))  # test folders are not packages
from small_index import SmallIndex, SmallRetriever
from stub_llm import StubServer

from ai_engineer_track.agent import connect, run_turn
from ai_engineer_track.llm import Llm
from ai_engineer_track.roles import Roles
from ai_engineer_track.router import Router
from ai_engineer_track.settings import load_ai_settings
from shared.library import DATASETS, ROW_FILES

#: every how many-th row of a file is kept: enough to learn from, few enough to fit in a second
THINNING = {"questions.jsonl": 8, "cases.jsonl": 2, "emergencies.jsonl": 1, "harmful.jsonl": 1, "judge_labels.jsonl": 10}


@pytest.fixture(scope="session")
def _stub():
    with StubServer() as server:
        yield server


@pytest.fixture
def stub(_stub):
    _stub.reset()
    return _stub


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """The real leaflets with fewer rows."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "health_library").symlink_to(DATASETS / "health_library")
    for file in ROW_FILES:
        lines = (DATASETS / file).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / file).write_text("".join(lines[:: THINNING[file]]), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_index():
    return SmallIndex()


@pytest.fixture
def settings(stub, tmp_path, small_data):
    loaded = load_ai_settings("tiny", llm_base_url=stub.url, artifacts=tmp_path, datasets=small_data)
    return loaded.model_copy(update={"llm": loaded.llm.model_copy(update={"timeout_s": 5.0, "retries": 1})})


@pytest.fixture(scope="session")
def roles(_stub, tmp_path_factory, small_data, small_index):
    """The roles with their heads, fitted once."""
    folder = tmp_path_factory.mktemp("artifacts")
    fitted = load_ai_settings("tiny", llm_base_url=_stub.url, artifacts=folder, datasets=small_data)
    return Roles(fitted, SmallRetriever(small_index), Llm(fitted.llm), Llm(fitted.llm))


@pytest.fixture
def roles_for(roles, settings):
    """`roles_for(settings)`: the fitted roles with a model, a cache and settings of their own, for one event loop."""

    def make(used=settings, index=None):
        own = copy.copy(roles)
        llm = Llm(used.llm)
        own.settings, own.router, own.judge_llm, own.cache = used, Router(llm), llm, None
        if index is not None:
            own.index, own.retriever = index, SmallRetriever(index)
        return own

    return make


@pytest.fixture
def talk(settings, roles_for):
    """`talk(["message", ...])` has one conversation and returns its turns, with the events of each in `.events`."""
    from langgraph.checkpoint.memory import InMemorySaver

    def have(messages, *, index=None, change=None, saver=None, session="s"):
        used = settings.model_copy(update=change or {})

        async def run():
            own = roles_for(used, index)
            agent = connect(own, saver or InMemorySaver())
            turns = []
            for message in messages:
                events = []
                turn = await run_turn(agent, session, message, events.append)
                turns.append(SimpleNamespace(turn=turn, events=events))
            await own.judge_llm.close()
            return turns

        return asyncio.run(run())

    return have
