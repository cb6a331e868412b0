"""Turns of the loop as MLflow runs, where MLflow is installed: `pip install 'two-engineers[track]'`.

Why it is optional: everything it shows stands in the manifests and in `artifacts/loop/turns/`, which need no server and no
database. A team that already looks at MLflow gets the same facts there: parameters, figures, the records of the turn, and two
aliases of the registered model, `current` and `candidate`.

    mlflow ui --backend-store-uri sqlite:///artifacts/loop/mlflow.db
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from ml_engineer_track.lifecycle.gate import Check
from ml_engineer_track.lifecycle.turn import Begin, Turn
from shared.settings import Settings

NAME = "health-assistant"


def log(settings: Settings, turn: Turn) -> bool:
    """The turn as a run of the experiment `loop`. False, and nothing done, without MLflow. Telemetry is off."""
    if importlib.util.find_spec("mlflow") is None:
        return False
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when the package is imported
    import mlflow

    loop = (settings.artifacts / "loop").resolve()
    mlflow.set_tracking_uri(f"sqlite:///{loop / 'mlflow.db'}")
    if mlflow.get_experiment_by_name("loop") is None:
        mlflow.create_experiment("loop", artifact_location=(loop / "mlflow").as_uri())
    mlflow.set_experiment("loop")
    begin, how = turn.get("begin", Begin), turn.end
    checks: list[Check] = turn.get("checks", list[Check]) or []
    with mlflow.start_run(run_name=f"turn {turn.number}"):
        mlflow.set_tags({"parent": begin.parent, "reason": begin.reason, "result": how.result if how else "open"})
        mlflow.log_params({**settings.finetune.model_dump(), "seed": settings.seed})
        mlflow.log_metrics({check.name.replace(" ", "_"): v for check in checks if check.figure and (v := check.figure.value)})
        for path in sorted(turn.folder.glob("*.json")):
            mlflow.log_artifact(str(path))
        if how and how.candidate:
            _alias(mlflow, settings, how.candidate, "current" if how.result == "promoted" else "candidate")
    return True


def _alias(mlflow: Any, settings: Settings, version: str, alias: str) -> None:
    """A version of the registered model that points to the folder of the handoff; the weights are not copied."""
    client = mlflow.MlflowClient()
    if not client.search_registered_models(f"name = '{NAME}'"):
        client.create_registered_model(NAME)
    source = (settings.artifacts / "models" / version).resolve().as_uri()
    made = client.create_model_version(NAME, source, tags={"version": version})
    client.set_registered_model_alias(NAME, alias, made.version)
