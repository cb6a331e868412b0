"""The page of a run leads to the studies that stand beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ml_engineer_track import report
from shared.settings import ROOT


def test_the_page_links_the_studies_that_are_there(tmp_path: Path) -> None:
    for name in ("tune.html", "distill.html", "ml.html", "low_bits.json"):
        (tmp_path / name).touch()
    made = report.studies(tmp_path)
    assert re.findall(r'href="([^"]+)"', made) == ["distill.html", "tune.html"]
    assert made.startswith("<h2>Further studies</h2>")


def test_without_studies_nothing_is_said(tmp_path: Path) -> None:
    assert report.studies(tmp_path) == ""


@pytest.mark.parametrize(("name", "says"), report.STUDIES)
def test_a_study_is_written_by_the_target_its_link_names(name: str, says: str) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "ml_engineer_track").rglob("*.py"))
    assert f'"{name}.html"' in sources
    target = re.search(r"\(make ([a-z-]+)", says)
    assert target
    assert re.search(rf"^{target[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
