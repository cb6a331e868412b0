"""Turns of the loop as MLflow runs, where MLflow is installed:

    pip install -c torch.txt -c constraints.txt -e '.[track]'

Why it is optional: everything it shows stands in the manifests and in `artifacts/loop/turns/`, which need no server and no
database. A team that already looks at MLflow gets the same facts there: parameters, figures, the records of the turn, and two
aliases of the registered model, `current` and `candidate`. For the same reason an MLflow that fails is told in a line and holds
nothing up.

    mlflow ui --backend-store-uri sqlite:///artifacts/loop/mlflow.db
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_engineer_track.lifecycle.gate import Check
from ml_engineer_track.lifecycle.turn import Begin, Turn
from shared.settings import Settings

NAME = "health-assistant"
DATABASE = "mlflow.db"


def log(settings: Settings, turn: Turn) -> bool:
    """The turn as a run of the experiment `loop`. False when it is not: without MLflow, or when that fails."""
    return _told(settings.artifacts, f"turn {turn.number}", lambda mlflow: _log(mlflow, settings, turn))


def went_back(artifacts: Path, version: str) -> bool:
    """The alias `current` on the version that a rollback made current. False when it is not, or no turn was logged."""
    if not (artifacts / "loop" / DATABASE).exists():
        return False
    return _told(artifacts, version, lambda mlflow: _alias(mlflow, artifacts, version, "current"))


def _told(artifacts: Path, what: str, tell: Callable[[Any], None]) -> bool:
    """Tell MLflow, if it is there; telemetry is off."""
    if importlib.util.find_spec("mlflow") is None:
        return False
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when the package is imported
    try:
        import mlflow

        mlflow.set_tracking_uri(f"sqlite:///{(artifacts / 'loop').resolve() / DATABASE}")
        tell(mlflow)
    except Exception as error:  # its own, its database's, the disk's: what is told stands on disk already
        print(f"loop: MLflow was not told of {what}: {' '.join(str(error).split()) or type(error).__name__}", flush=True)
        return False
    return True


def _log(mlflow: Any, settings: Settings, turn: Turn) -> None:
    loop = (settings.artifacts / "loop").resolve()
    if mlflow.get_experiment_by_name("loop") is None:
        mlflow.create_experiment("loop", artifact_location=(loop / "mlflow").as_uri())
    mlflow.set_experiment("loop")
    begin, how = turn.get("begin", Begin), turn.end
    checks: list[Check] = turn.get("checks", list[Check]) or []
    with mlflow.start_run(run_name=f"turn {turn.number}"):
        mlflow.set_tags({"parent": begin.parent, "reason": begin.reason, "result": how.result if how else "open"})
        mlflow.log_params({**settings.finetune.model_dump(), "seed": settings.seed})
        mlflow.log_metrics(figures_of(checks))
        for path in sorted(turn.folder.glob("*.json")):
            mlflow.log_artifact(str(path))
        if how and how.candidate:
            _alias(mlflow, settings.artifacts, how.candidate, "current" if how.result == "promoted" else "candidate")


def figures_of(checks: list[Check]) -> dict[str, float]:
    """What was measured, by the check's name; a difference of nothing at all is measured, too."""
    measured = {check.name.replace(" ", "_"): check.figure.value for check in checks if check.figure}
    return {name: value for name, value in measured.items() if value is not None}


def _alias(mlflow: Any, artifacts: Path, version: str, alias: str) -> None:
    """The alias on the version of the registered model that points to this folder of the handoff; the weights are not copied."""
    client = mlflow.MlflowClient()
    if not client.search_registered_models(f"name = '{NAME}'"):
        client.create_registered_model(NAME)
    known = [made for made in client.search_model_versions(f"name = '{NAME}'") if made.tags.get("version") == version]
    source = (artifacts / "models" / version).resolve().as_uri()
    made = known[0] if known else client.create_model_version(NAME, source, tags={"version": version})
    client.set_registered_model_alias(NAME, alias, made.version)
