"""The whole AI track on the published model: the real server, index, agent, service, judge and report. Minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ai_engineer_track.evaluate import KINDS
from ai_engineer_track.report import GOALS

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "artifacts" / "models"
STAGES = ["model", "ingest", "converse", "measure"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not (MODELS / "current").exists(), reason="no model is published; `make ml` publishes one"),
]


def test_a_run_from_the_published_model_to_the_report(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(MODELS, target_is_directory=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LLM_", "LARGE_", "JUDGE_"))}
    environment |= {"ARTIFACTS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "ai_engineer_track", "run", "--preset", "smoke"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if "Why: " in line] == STAGES

    found = json.loads((tmp_path / "reports" / "ai.json").read_text(encoding="utf-8"))
    assert found["suite"]["conversations"] == 3 * len(KINDS)
    assert found["suite"]["errors"] == 0
    assert [story["kind"] for story in found["samples"]] == list(KINDS)
    assert {"judge", "retrieval", "triage", "harm", "refusal", "clarify"} <= set(found)
    assert len(found["goals"]) == len(GOALS) + 1
    assert not [goal["claim"] for goal in found["goals"] if goal["reached"] is None]
    page = (tmp_path / "reports" / "ai.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count("<h3>") == len(found["worst"]) + len(found["samples"])

    assert not (tmp_path / "feedback").exists()
    assert not servers_of(tmp_path)


def servers_of(artifacts: Path) -> list[str]:
    """Inference servers that still run on these artifacts."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    return [line for line in listed.splitlines() if "ml_engineer_track serve" in line and str(artifacts) in line]
