"""The report: goals are computed, nothing is left out, and nothing a model wrote becomes markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ai_engineer_track import report
from ai_engineer_track.evaluate import summarise
from ai_engineer_track.settings import load_ai_settings
from shared.metrics import Estimate


def figure(value: float | None) -> dict[str, Any]:
    return Estimate(value=value, low=value, high=value, n=0 if value is None else 10).model_dump()


def facts(**suite: Any) -> dict[str, Any]:
    """What a run hands over; every part reached its goal."""
    measured = summarise([], load_ai_settings("smoke"))
    measured |= {"answer_rate": figure(0.95), "needless_questions": figure(0.02), "quotes_verified": figure(1.0)}
    measured["success"] = {kind: figure(0.9) for kind in measured["success"]}
    measured["first_word_s"] = {"p50": 0.8, "p90": 1.0, "p99": 2.0}
    return {
        "preset": "smoke",
        "seed": 7,
        "model": "m-<1>",
        "hardware": {"cpu_info": "A processor", "n_threads": 2, "memory_gib": 8.0, "gpu_info": None},
        "index": {"version": "i-1", "passages": 12},
        "suite": measured | suite,
        "judge": {"model": "m-1", "kappa": {"grounded": figure(0.4)}, "rows": 72},
        "retrieval": {"used": {"leaflet/recall@5": figure(0.97)}},
        "triage": {"sensitivity": figure(0.99), "specificity": figure(0.9), "found": figure(0.99), "missed": []},
        "harm": {"sensitivity": figure(0.9)},
        "refusal": {"refused": figure(0.9)},
        "clarify": {"gain": figure(0.2), "accuracy": {"0": figure(0.4), "3": figure(0.6)}},
        "worst": [story("emergency", False, "My <b>chest</b> & arm hurt", "<script>alert(1)</script>")],
        "samples": [story("answerable", True, "What helps?", "[1] Rest & drink.")],
        "seconds": {"model": 1.0, "converse": 2.0},
    }


def story(kind: str, ok: bool, said: str, replied: str) -> dict[str, Any]:
    transcript = [{"who": "person", "text": said}, {"who": "answer", "text": replied}]
    return {"id": f"{kind}-1", "kind": kind, "ok": ok, "why": "answer", "transcript": transcript}


class Texts(HTMLParser):
    """The text a person sees, and every tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def reached(found: dict[str, Any], claim: str) -> bool | None:
    return next(goal["reached"] for goal in report.goals(found) if claim in goal["claim"])


def test_goals_are_reached_by_figures_alone() -> None:
    assert {goal["reached"] for goal in report.goals(facts())} == {True}


@pytest.mark.parametrize(
    ("claim", "path", "bar", "higher"),
    [(claim, path, bar, relation == ">=") for claim, path, relation, bar in report.GOALS],
    ids=lambda value: "/".join(value) if isinstance(value, tuple) else None,
)
def test_a_goal_is_reached_missed_or_not_measured(claim: str, path: tuple[str, ...], bar: float, higher: bool) -> None:
    found = facts()

    def put(value: Any) -> None:
        place = found
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    worse = bar - 0.01 if higher else bar + 0.01
    for value, expected in ((figure(bar), True), (figure(worse), False), (figure(None), None), (None, None)):
        put(value)
        assert reached(found, claim) is expected


def test_a_part_that_did_not_run_is_not_measured() -> None:
    found = facts()
    del found["retrieval"], found["clarify"]
    assert reached(found, "recall@5") is None
    assert reached(found, "right more often with questions") is None
    assert report.page(found | {"goals": report.goals(found)})


@pytest.mark.parametrize(("p50", "expected"), [(1.5, True), (1.51, False), (None, None)])
def test_the_time_to_the_first_word_is_a_goal(p50: float | None, expected: bool | None) -> None:
    first_word = p50 and {"p50": p50, "p90": 9.0, "p99": 9.0}
    assert reached(facts(first_word_s=first_word), "first word") is expected


def test_every_goal_is_listed_whatever_was_measured() -> None:
    nothing = {"suite": None}
    assert [g["claim"] for g in report.goals(nothing)] == [g["claim"] for g in report.goals(facts())]
    assert {g["reached"] for g in report.goals(nothing)} == {None}


def test_the_page_shows_every_goal_and_every_transcript() -> None:
    found = facts()
    found["goals"] = report.goals(found)
    seen = " ".join(Texts(report.page(found)).texts)
    for goal in found["goals"]:
        assert goal["claim"] in seen
        assert goal["value"] in seen
    for one in found["worst"] + found["samples"]:
        assert one["id"] in seen
        for line in one["transcript"]:
            assert line["text"] in seen


def test_the_judges_own_marks_come_before_its_opinions() -> None:
    found = facts()
    page = report.page(found | {"goals": report.goals(found)})
    assert page.index("How far to trust the judge") < page.index("What the run set out to show")


def test_what_people_and_models_wrote_is_no_markup() -> None:
    found = facts()
    parsed = Texts(report.page(found | {"goals": report.goals(found)}))
    assert not {"script", "b"} & parsed.tags
    assert "<script>alert(1)</script>" in parsed.texts


def test_both_files_and_the_table_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = report.write(facts(), tmp_path / "reports")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    stored = json.loads((tmp_path / "reports" / "ai.json").read_text(encoding="utf-8"))
    assert len(stored["goals"]) == len(report.GOALS) + 1
    printed = capsys.readouterr().out
    assert "emergencies sent to the emergency number" in printed
    assert str(page) in printed


def test_a_run_without_any_outcome_still_has_a_page() -> None:
    found = facts(**summarise([], load_ai_settings("smoke"))) | {"worst": [], "samples": []}
    assert "not measured" in report.page(found | {"goals": report.goals(found)})


def test_leaves_are_the_figures_with_their_paths() -> None:
    nested = {
        "a": figure(0.5), "b": {"c": 2, "d": 0.25, "e": {"f": figure(None)}}, "text": "t", "list": [1], "none": None, "empty": {},
    }  # fmt: skip
    assert list(report.leaves(nested)) == [
        (("a",), ["0.500 [0.500, 0.500]", "10"]),
        (("b", "c"), ["2", ""]),
        (("b", "d"), ["0.250", ""]),
        (("b", "e", "f"), ["-", "0"]),
    ]
