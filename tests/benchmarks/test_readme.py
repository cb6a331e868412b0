"""The README's tables say what the committed run says, and a run is only taken over whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import readme
from shared.errors import UserError
from shared.settings import ROOT


def test_the_readme_says_what_the_committed_run_says() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.fill(page) == page, "run `python -m benchmarks readme`"


def test_a_changed_figure_changes_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in readme.DEMO.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    figures = json.loads((tmp_path / "ai.json").read_text(encoding="utf-8"))
    figures["suite"]["conversations"] = 98765
    (tmp_path / "ai.json").write_text(json.dumps(figures), encoding="utf-8")
    monkeypatch.setattr(readme, "DEMO", tmp_path)
    assert "98765 conversations" in readme.fill(page)


def test_only_lines_of_stages_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "DEMO", tmp_path / "demo")
    log = tmp_path / "demo.log"
    log.write_text(
        "noise\n[1/7] train-ranker: x (3 s)\n10%|#\r20%|##\rmeasure    judge.  (2 s)\nmodel:  artifacts/models/m-1\n",
        encoding="utf-8",
    )
    for name in readme.REPORTS:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    readme.take_over(tmp_path, log)
    kept = (tmp_path / "demo" / "transcript.txt").read_text(encoding="utf-8").splitlines()
    assert kept == ["[1/7] train-ranker: x (3 s)", "measure    judge.  (2 s)", "model:  artifacts/models/m-1"]


@pytest.mark.parametrize("missing", ["ml.json", "ai.json", "demo.log"])
def test_a_run_that_is_not_whole_is_refused(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "DEMO", tmp_path / "demo")
    for name in (*readme.REPORTS, "demo.log"):
        (tmp_path / name).write_text("[1/7] curate: x\n", encoding="utf-8")
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match="no such file"):
        readme.take_over(tmp_path, tmp_path / "demo.log")
    assert not (tmp_path / "demo").exists()


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(UserError, match="marks"):
        readme.fill("# A page\n")
