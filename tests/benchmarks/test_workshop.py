"""WORKSHOP.md can be followed from the top, and its checks tell done from not done."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.workshop import __main__ as cli
from benchmarks.workshop import place as p
from benchmarks.workshop import walk as w
from benchmarks.workshop.ai_checks import AI_CHECKS, asking_back, fusion, judging, swapped, threshold
from benchmarks.workshop.ml_checks import (
    ML_CHECKS,
    batch_size,
    bytes_against_quality,
    damages,
    grammar,
    quarantine,
    rank_against_loss,
)
from benchmarks.workshop.place import Expected, NotYet
from shared.files import write_json
from shared.settings import ROOT, load_settings

PAGE = (ROOT / "WORKSHOP.md").read_text(encoding="utf-8")


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty scratch folder."""
    monkeypatch.setenv("ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.delenv("PRESET", raising=False)
    folder = tmp_path / "artifacts" / "workshop"
    folder.mkdir(parents=True)
    return folder


# --- the page --------------------------------------------------------------------------------------------------------


def test_there_are_twelve_exercises_in_order() -> None:
    assert [part.number for part in w.parts(PAGE)] == list(range(13))
    assert sorted({**ML_CHECKS, **AI_CHECKS}) == list(range(1, 13))


@pytest.mark.parametrize("part", w.parts(PAGE)[1:], ids=lambda part: str(part.number))
def test_an_exercise_has_all_its_parts(part: w.Part) -> None:
    text = PAGE.split(f"### Exercise {part.number}: ")[1].split("### Exercise ")[0]
    for words in (
        "**You learn**",
        "**You should see**",
        "**Question.**",
        "**Change.**",
        "**Check.**",
        "<summary>Solution</summary>",
    ):
        assert words in text, words
    assert part.commands.strip()
    assert f"make check EX={part.number} " in part.solution
    assert f"make check EX={part.number}" not in part.commands


def test_every_patch_of_a_solution_fits_its_scratch_file(room: Path, tmp_path: Path) -> None:
    patches = re.findall(r"git apply <<'END'\n(.*?)END\n", PAGE, flags=re.DOTALL)
    assert len(patches) == 5
    p.lay_out()
    for patch in patches:
        done = subprocess.run(["git", "apply"], cwd=tmp_path, input=patch, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    for path in room.glob("ex*.py"):
        compile(path.read_text(encoding="utf-8"), str(path), "exec")


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_page_can_be_followed_to_the_end(tmp_path: Path) -> None:
    """Commands, a check that says "not yet", the solution, a check that passes: for all twelve."""
    times = w.walk([], tmp_path / "times.json")
    assert [part["exercise"] for part in times["exercises"]] == list(range(13))


# --- scratch files ---------------------------------------------------------------------------------------------------


def test_scratch_files_are_laid_out_once_and_never_overwritten(room: Path) -> None:
    made = p.lay_out()
    assert {"ml.yaml", "ex1.yaml", "ex5.py", "ex12.py", "bicycle", "datasets"} <= set(made)
    (room / "ml.yaml").write_text("mine", encoding="utf-8")
    (room / "ex5.py").unlink()
    assert p.lay_out() == ["ex5.py"]
    assert (room / "ml.yaml").read_text(encoding="utf-8") == "mine"


def test_the_presets_among_them_load_and_differ_only_where_they_say(room: Path) -> None:
    p.lay_out()
    smoke = load_settings("smoke").model_dump(exclude={"preset", "artifacts"})
    assert load_settings(str(room / "ml.yaml")).model_dump(exclude={"preset", "artifacts"}) == smoke
    own = load_settings(str(room / "ex1.yaml"))
    assert own.preset == "ex1"
    assert own.families == 1.0
    assert own.datasets.resolve() == (room / "datasets").resolve()
    assert (own.datasets / "questions.jsonl").exists()


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "given", "fits"),
    [
        (Expected("too long", ""), "Too long ", True),
        (Expected("too long", ""), "near duplicate", False),
        (Expected(12.0, ""), "12", True),
        (Expected(12.0, ""), "12 %", True),
        (Expected(12.0, "", 0.5), "12.4", True),
        (Expected(12.0, "", 0.5), "12.6", False),
        (Expected(12.0, ""), "twelve", False),
    ],
)
def test_an_answer(expected: Expected, given: str, fits: bool) -> None:
    assert expected.fits(given) is fits


def test_the_command_line(room: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["workshop", *words])
        status = cli.main()
        said = capsys.readouterr()
        return status, said.out + said.err

    assert run("check", "4")[0] == 1
    status, said = run("answer", "4")
    assert status == 2
    assert "no figures yet" in said
    write_json(room / "ex4.json", timings())
    status, said = run("check", "4")
    assert status == 1
    assert "Now answer the question" in said
    status, said = run("check", "4", "--answer", "7")
    assert status == 1
    assert "does not follow" in said
    assert run("answer", "4") == (0, "4\n")
    status, said = run("check", "4", "--answer", "4")
    assert status == 0
    assert "pass" in said
    assert run("check", "4")[0] == 0  # the answer is kept
    assert run("check", "13")[0] == 2


# --- checks: every one says what is missing, step by step ---------------------------------------------------------------


@pytest.mark.parametrize("exercise", range(1, 13))
def test_nothing_done_is_not_yet(exercise: int, room: Path) -> None:
    with pytest.raises(NotYet) as hint:
        {**ML_CHECKS, **AI_CHECKS}[exercise]()
    assert len(str(hint.value)) > 20


def test_1_the_leak_must_be_a_test_row(room: Path) -> None:
    p.lay_out()
    folder = room.parent / "data" / "d-1"
    write_json(room.parent / "runs" / "ex1-bundled" / "curate" / "stamp.json", {"done": True, "result": {"folder": str(folder)}})
    long = {"id": "q-a-1", "reason": "too long"}

    def curated(*rows: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in (long, long, *rows))
        (folder / "quarantine.jsonl").write_text(lines, encoding="utf-8")

    path = room / "datasets" / "questions.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    test, train = (next(r for r in rows if r["split"] == split) for split in ("test", "train"))
    curated()
    with pytest.raises(NotYet, match="Append a row"):
        quarantine()
    mine = {**test, "id": "mine-1", "split": "train", "answerable": False, "leaflets": [], "answer_sentences": []}
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(mine) + "\n")
    with pytest.raises(NotYet, match="was not thrown out"):
        quarantine()
    curated({"id": "mine-1", "reason": "exact duplicate", "of": train["id"]})
    with pytest.raises(NotYet, match="no test row"):
        quarantine()
    curated({"id": "mine-1", "reason": "exact duplicate", "of": test["id"]})
    assert quarantine().value == "too long"


def test_2_rank_and_seed_are_changed_one_at_a_time(room: Path) -> None:
    def trained(name: str, share: float, loss: float) -> None:
        write_json(room / f"ex2-{name}.json", {"result": {"trainable_share": share, "best_validation_loss": loss}})

    trained("first", 0.02, 3.6)
    trained("rank", 0.02, 3.6)
    trained("seed", 0.02, 3.6)
    with pytest.raises(NotYet, match="Change `rank:`"):
        rank_against_loss()
    trained("rank", 0.08, 3.2)
    with pytest.raises(NotYet, match="same training"):
        rank_against_loss()
    trained("seed", 0.08, 3.5)
    with pytest.raises(NotYet, match="Put the rank back"):
        rank_against_loss()
    trained("seed", 0.02, 3.5)
    assert rank_against_loss().value == "yes"
    trained("seed", 0.02, 3.0)
    assert rank_against_loss().value == "no"


def test_3_the_smaller_group(room: Path) -> None:
    def report(group: int, bits: float) -> dict[str, Any]:
        quality = {"2-bit": {"divergence": {"value": 1.0}}}
        return {"settings": {"group": group}, "quality": quality, "bits_per_weight": {"2-bit": bits}}

    write_json(room / "ex3-first.json", report(64, 2.5))
    write_json(room.parent / "reports" / "low_bits.json", report(64, 2.5))
    with pytest.raises(NotYet, match="smaller"):
        bytes_against_quality()
    write_json(room.parent / "reports" / "low_bits.json", report(16, 4.0))
    assert bytes_against_quality().fits("1.5")


def timings(batches: tuple[str, ...] = ("1", "4", "16"), new_tokens: int = 32) -> dict[str, Any]:
    rows = {b: {"decode_throughput": 100.0 * int(b) ** 0.5, "tpot": {"p50": 0.01 * int(b) ** 0.5}} for b in batches}
    return {"settings": {"new_tokens": new_tokens}, "models": {"base": {"batch": rows}}}


def test_4_both_batches_and_enough_tokens(room: Path) -> None:
    (room / "ex4.json").write_text("  benchmark: other programs use 90% of this machine\n" + json.dumps(timings(("1",))), "utf-8")
    with pytest.raises(NotYet, match="batches of 1 and of 16"):
        batch_size()
    write_json(room / "ex4.json", timings(new_tokens=4))
    with pytest.raises(NotYet, match="too few for a tpot"):
        batch_size()
    write_json(room / "ex4.json", timings())
    assert batch_size().fits("4.1")
    assert not batch_size().fits("4.5")
    (room / "ex4.json").write_text("{ half", "utf-8")
    with pytest.raises(NotYet, match="not whole"):
        batch_size()


def test_5_the_field_is_required_and_limited(room: Path) -> None:
    def asked(required: list[str], urgency: dict[str, Any] | None, fits: int = 8) -> None:
        fields = {"action": {"enum": ["answer"]}, **({"urgency": urgency} if urgency else {})}
        schema = {"properties": fields, "required": required}
        p.keep_run(5, {"schema": schema, "replies": [{}] * 8, "schema_fits": fits, "schema_right": 3})

    for run, hint in (
        ((["action"], None), "Add the field"),
        ((["action"], {"enum": ["now", "later"]}), "to `required`"),
        ((["action", "urgency"], {"type": "string"}), "enum"),
        ((["action", "urgency"], {"enum": ["now", "later"]}, 7), "Not every reply"),
    ):
        asked(*run)
        with pytest.raises(NotYet, match=hint):
            grammar()
    asked(["action", "urgency"], {"enum": ["now", "later"]})
    assert grammar().value == 3


def test_6_a_damage_that_does_nothing_is_none(room: Path) -> None:
    def seen(changed: bool) -> None:
        found = {name: {"noticed_by": who, "changed": True} for name, who in (("a", "verify"), ("b", "verify"), ("c", "server"))}
        p.keep_run(6, {"damages": {**found, "mine": {"noticed_by": "nobody", "changed": changed}}})

    seen(False)
    with pytest.raises(NotYet, match="changed nothing"):
        damages()
    seen(True)
    assert damages().value == "c"


def test_8_two_settings_were_tried(room: Path) -> None:
    run = {"candidates": 30, "questions": 10, "cells": {"both": 6, "only dense": 1, "only bm25": 2, "neither": 1}}
    p.keep_run(8, {**run, "rrf_k": 60, "found": {"fused": 8, "dense": 7}})
    with pytest.raises(NotYet, match="Change RRF_K"):
        fusion()
    p.keep_run(8, {**run, "rrf_k": 5, "found": {"fused": 8, "dense": 7}})
    assert fusion().value == 9


def test_9_the_highest_threshold_that_is_enough(room: Path) -> None:
    table = {f"{t / 100:.2f}": [1 - t / 200, t / 100, 0.9] for t in range(1, 100)}

    def chose(value: float) -> None:
        p.keep_run(9, {"threshold": value, "wanted": 0.95, "table": table})

    chose(0.5)
    with pytest.raises(NotYet, match="Lower THRESHOLD"):
        threshold()
    chose(0.05)
    with pytest.raises(NotYet, match="higher threshold"):
        threshold()
    chose(0.1)
    assert threshold().fits("90")


def test_10_another_and_a_better_way(room: Path) -> None:
    def asked(mine: list[float]) -> None:
        gain = [0.3, 0.5, 0.6, 0.62, 0.7]
        p.keep_run(10, {"accuracy": {"yours": mine, "alphabetical": [0.3, 0.4, 0.45, 0.5, 0.5], "largest expected gain": gain}})

    asked([0.3, 0.4, 0.45, 0.5, 0.5])
    with pytest.raises(NotYet, match="what the given one asks"):
        asking_back()
    asked([0.3, 0.35, 0.4, 0.4, 0.4])
    with pytest.raises(NotYet, match="likely candidates"):
        asking_back()
    asked([0.3, 0.45, 0.5, 0.55, 0.6])
    assert asking_back().value == 2


def test_11_the_lower_end_counts(room: Path) -> None:
    write_json(room.parent / "judge" / "calibration.json", {"model": "x"})

    def judged(low: float) -> None:
        p.keep_run(11, {"grounded_share": 0.56, "kappa": {"value": low + 0.1, "low": low}})

    judged(0.35)
    with pytest.raises(NotYet, match=r"0\.40 is needed"):
        judging()
    judged(0.41)
    assert judging().fits("56")


def test_12_nobody_complained(room: Path) -> None:
    p.keep_run(12, {"model": "ml-bundled:q8_0"})
    with pytest.raises(NotYet, match="Nobody said what was wrong"):
        swapped()


# --- following the page ----------------------------------------------------------------------------------------------


def test_a_page_is_taken_apart_at_its_solutions() -> None:
    page = (
        "# W\n```bash\nmake setup\n```\n### Exercise 1: One\n```bash\na\n```\n```text\nno\n```\n<details>\n```bash\nb\n```\n"
        "</details>\n## Two\n```bash\nnot part of it\n```\n### Exercise 2: Two\n```bash\nc\n```\n"
    )
    assert w.parts(page) == [
        w.Part(0, "before you start", "make setup\n", ""),
        w.Part(1, "One", "a\n", "b\n"),
        w.Part(2, "Two", "c\n", ""),
    ]


def test_a_command_that_fails_stops_the_walk_and_leaves_nothing_running(tmp_path: Path) -> None:
    import os

    from shared.errors import UserError

    script = f"sleep 300 & echo $! > {tmp_path}/pid\necho told\nfalse\necho never"
    with pytest.raises(UserError, match="failed with status 1") as error:
        w.run(script, tmp_path, dict(os.environ), "exercise 1")
    assert "told" in str(error.value)
    assert "never" not in str(error.value)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
