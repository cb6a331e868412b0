"""The ready-made dashboard asks only for metrics that the servers give."""

from __future__ import annotations

import json
import re

from prometheus_client.parser import text_string_to_metric_families

from ai_engineer_track.api.service import Meters as ServiceMeters
from ml_engineer_track.serving.engine import Stats
from ml_engineer_track.serving.metrics import Meters as InferenceMeters
from shared.settings import ROOT

FOLDER = ROOT / "docs" / "monitoring"


class Idle:
    def stats(self) -> Stats:
        return Stats(running=0, waiting=0, reserved_tokens=0, capacity_tokens=1, failures=0)


def given(text: str) -> set[str]:
    """Sample names; a histogram or counter that was never touched has its family's names all the same."""
    names: set[str] = set()
    for family in text_string_to_metric_families(text):
        names |= {family.name, *(f"{family.name}{end}" for end in ("_total", "_bucket", "_sum", "_count"))}
    return names


def test_every_metric_of_the_dashboard_exists() -> None:
    from prometheus_client import generate_latest

    served = {
        "service": given(generate_latest(ServiceMeters().registry).decode()),
        "inference": given(InferenceMeters(lambda: {"m": Idle()}).text().decode()),  # type: ignore[dict-item]
    }
    panels = json.loads((FOLDER / "grafana.json").read_text(encoding="utf-8"))["panels"]
    asked = [t["expr"] for panel in panels for t in panel["targets"]]
    assert len(asked) >= 12
    for expression in asked:
        ((metric, job),) = re.findall(r'(\w+)\{job="(\w+)"\}', expression)
        assert metric in served[job], expression
