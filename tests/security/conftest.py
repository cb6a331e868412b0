"""The attacks are tried on the agent of the AI track's own tests: an index of a few leaflets, and a stub for the model."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path += [str(TESTS / "ai_engineer_track"), str(TESTS / "ai_engineer_track" / "api")]  # test folders are not packages

from tests.ai_engineer_track.api.conftest import anyio_backend, assistant, client, serve  # noqa: E402, F401
from tests.ai_engineer_track.conftest import _stub, roles, roles_for, settings, small_data, small_index, stub, talk  # noqa: E402, F401
