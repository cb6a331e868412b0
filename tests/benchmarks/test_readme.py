"""The pages' figures say what the committed results say, and a run is only taken over whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import lessons, readme
from shared.errors import UserError
from shared.settings import ROOT


@pytest.mark.parametrize("name", readme.PAGES)
def test_a_page_says_what_the_committed_results_say(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert readme.fill(page, readme.PAGES[name]) == page, "run `python -m benchmarks readme`"


def test_every_page_with_marks_is_filled() -> None:
    marked = {
        path.relative_to(ROOT).as_posix()
        for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md"))
        if ": begin -->" in path.read_text(encoding="utf-8")
    }
    assert marked == set(readme.PAGES)


def test_every_mark_is_whole_and_every_block_is_shown_somewhere() -> None:
    shown: set[str] = set()
    for name in readme.PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        marks = [m["name"] for m in readme.MARK.finditer(page)]
        assert page.count(": begin -->") == page.count(": end -->") == len(marks), name
        shown.update(marks)
    assert shown == set(readme.blocks())


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the committed run, to be changed."""
    for path in readme.DEMO.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(readme, "DEMO", tmp_path)
    monkeypatch.setattr(lessons, "DEMO", tmp_path)
    return tmp_path


def test_a_changed_figure_changes_the_pages(results: Path) -> None:
    figures = json.loads((results / "ai.json").read_text(encoding="utf-8"))
    figures["suite"]["conversations"] = 98765
    figures["judge"]["rows"] = 43210
    (results / "ai.json").write_text(json.dumps(figures), encoding="utf-8")
    assert "98765 conversations" in readme.fill((ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    assert "43210 labelled test answers" in readme.fill((ROOT / "docs" / "lessons.md").read_text(encoding="utf-8"))


def test_a_sentence_turns_around_with_its_figures(results: Path) -> None:
    ml = json.loads((results / "ml.json").read_text(encoding="utf-8"))
    said = {}
    for value in (0.0, 1.0):
        ml["quality"]["bf16"]["first_source/evidence_f1"]["value"] = value
        (results / "ml.json").write_text(json.dumps(ml), encoding="utf-8")
        said[value] = lessons.lora().splitlines()[-1]
    assert said[0.0].endswith("less than the tuned model.")
    assert said[1.0].endswith("more than the tuned model.")


def test_a_study_is_shown_once_its_report_is_kept(results: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (results / "low_bits.json").unlink(missing_ok=True)
    assert "Not measured yet: `make quantize BITS=2`" in lessons.blocks()["lesson low bits"]
    reports = tmp_path_factory.mktemp("reports")
    claims = [{"claim": "it repairs", "value": "1 → 2", "reached": False}]
    (reports / "low_bits.json").write_text(json.dumps({"findings": claims, "path": f"{ROOT}/artifacts/x"}), encoding="utf-8")
    readme.take_study(reports, ["low_bits.json"])
    assert "| it repairs | 1 → 2 | **no** |" in lessons.blocks()["lesson low bits"]
    assert str(ROOT) not in (results / "low_bits.json").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="no such report"):
        readme.take_study(reports, ["distill.json"])
    with pytest.raises(UserError, match="no page uses"):
        readme.take_study(reports, ["other.json"])


def test_the_times_of_the_workshop(results: Path) -> None:
    parts = [{"exercise": n, "title": f"t{n}", "commands_s": 60.0, "solution_s": 0.0} for n in range(3)]
    hardware = {"cpu_info": "CPU", "n_threads": 2, "gpu_info": None}
    (results / "workshop.json").write_text(json.dumps({"hardware": hardware, "exercises": parts}), encoding="utf-8")
    said = readme.workshop_times()
    assert "| 2 | t2 | 60 | 0 |" in said
    assert said.endswith("All of it, one after the other: 3 minutes.")


def test_only_lines_of_stages_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "DEMO", tmp_path / "demo")
    log = tmp_path / "demo.log"
    log.write_text(
        "noise\n[1/7] train-ranker: x (3 s)\n  train-ranker: 2 of 9\n10%|#\r20%|##\rmeasure    judge.  (2 s)\n"
        "model:  artifacts/models/m-1\n",
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
        readme.fill("# A page\n", ["transcript"])


def test_a_mark_that_nothing_fills_is_refused() -> None:
    with pytest.raises(UserError, match="nothing fills"):
        readme.fill("<!-- other: begin -->\n<!-- other: end -->\n")
