"""Tracking: with MLflow a turn is a run and the versions have aliases; without it the loop goes on as before."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ml_engineer_track import __main__ as cli
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


def test_a_difference_of_exactly_nothing_is_a_figure() -> None:
    def check(name: str, value: float | None) -> Check:
        return Check(name=name, passed=True, says="as good", figure=Estimate(value=value, low=value, high=value, n=3))

    whole = Check(name="variants", passed=True, says="every file as published")
    assert tracking.figures_of([check("near misses", 0.0), check("failures", None), whole]) == {"near_misses": 0.0}


class Registry:
    """MLflow, as far as aliases go."""

    def __init__(self) -> None:
        self.versions: list[SimpleNamespace] = []
        self.aliases: dict[str, str] = {}

    def set_tracking_uri(self, uri: str) -> None:
        self.uri = uri

    def MlflowClient(self) -> Registry:  # noqa: N802
        return self

    def search_registered_models(self, query: str) -> list[str]:
        return [tracking.NAME] if self.versions else []

    def create_registered_model(self, name: str) -> None:
        pass

    def search_model_versions(self, query: str) -> list[SimpleNamespace]:
        return self.versions

    def create_model_version(self, name: str, source: str, tags: dict[str, str]) -> SimpleNamespace:
        self.versions.append(SimpleNamespace(version=str(len(self.versions) + 1), source=source, tags=tags))
        return self.versions[-1]

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self.aliases[alias] = version


@pytest.fixture
def mlflow(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A stand-in, and the database of an earlier turn."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "mlflow", registry := Registry())  # type: ignore[arg-type]
    (settings.artifacts / "loop").mkdir(parents=True, exist_ok=True)
    (settings.artifacts / "loop" / tracking.DATABASE).touch()
    return registry


def test_a_rollback_takes_the_alias_with_it(
    settings: Settings, publish_version: Callable[..., Path], mlflow: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("m-1", "m-22"):
        publish_version(version)
        tracking._alias(mlflow, settings.artifacts, version, "current")
    assert mlflow.aliases == {"current": "2"}
    monkeypatch.setenv("ARTIFACTS", str(settings.artifacts))
    monkeypatch.setattr("sys.argv", ["ml_engineer_track", "models", "rollback"])
    assert cli.main() == 0
    assert mlflow.aliases == {"current": "1"}
    assert len(mlflow.versions) == 2  # the one that was there
    (settings.artifacts / "loop" / tracking.DATABASE).unlink()
    assert tracking.went_back(settings.artifacts, "m-22") is False  # nobody looks at MLflow here


def test_an_mlflow_that_fails_holds_nothing_up(
    settings: Settings, turn: Turn, mlflow: Registry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(uri: str) -> None:
        raise RuntimeError("database is locked\n(and so on)")

    monkeypatch.setattr(mlflow, "set_tracking_uri", fails)
    assert tracking.log(settings, turn) is False
    assert tracking.went_back(settings.artifacts, "m-new") is False
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "loop: MLflow was not told of turn 1: database is locked (and so on)"
    assert len(said) == 2


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
