"""Tracking: with MLflow a turn is a run and the versions have aliases; without it the loop goes on as before."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from ml_engineer_track.lifecycle import tracking
from ml_engineer_track.lifecycle.collect import Collected
from ml_engineer_track.lifecycle.gate import Check
from ml_engineer_track.lifecycle.turn import Begin, End, Turn, new_turn
from shared.metrics import Estimate
from shared.settings import Settings


@pytest.fixture
def turn(settings: Settings, publish_version: Callable[..., Path]) -> Turn:
    """A turn that promoted the version m-new."""
    publish_version("m-new")
    nothing = Collected(id="fb-1", taught=[], examined=[], decided=[], counts={}, notes=[])
    made = new_turn(settings.artifacts / "loop", Begin(parent="m-old", reason="60 new labels"), nothing)
    figure = Estimate(value=0.1, low=0.05, high=0.15, n=300)
    made.put("checks", list[Check], [Check(name="near misses", passed=True, says="as good", figure=figure)])
    made.put("end", End, End(result="promoted", why="it is better", candidate="m-new"))
    return made


def test_without_mlflow_nothing_is_written(settings: Settings, turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tracking.log(settings, turn) is False
    assert not (settings.artifacts / "loop" / "mlflow.db").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_turn_is_a_run_and_the_version_has_its_alias(settings: Settings, turn: Turn) -> None:
    mlflow = pytest.importorskip("mlflow")
    assert tracking.log(settings, turn)
    (run,) = mlflow.search_runs(experiment_names=["loop"], output_format="list")
    assert (run.data.tags["parent"], run.data.tags["result"]) == ("m-old", "promoted")
    assert run.data.metrics["near_misses"] == 0.1
    assert {item.path for item in mlflow.MlflowClient().list_artifacts(run.info.run_id)} >= {"begin.json", "end.json"}
    assert mlflow.MlflowClient().get_model_version_by_alias(tracking.NAME, "current").tags == {"version": "m-new"}
