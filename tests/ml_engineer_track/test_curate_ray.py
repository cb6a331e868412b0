"""A corpus cleaned shard by shard holds the rows that `curate.py` would have kept of it."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from datasketch import MinHashLSH
from hypothesis import given
from hypothesis import strategies as st

from ml_engineer_track import curate as c
from ml_engineer_track import curate_ray as r
from shared import library as lib
from shared.errors import UserError

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'")
WORDS = "how long does a cold last and what helps with the cough when it will not stop at night after two weeks".split()


def a_question(number: int, text: str, split: str) -> lib.Question:
    return lib.Question(
        id=f"q-{number}", split=split, question=text, answerable=False, leaflets=[], answer_sentences=[], register="plain"
    )  # type: ignore[arg-type]


@st.composite
def corpora(draw: st.DrawFn) -> list[lib.Question]:
    """Texts with exact and near repeats among them, in all splits, some ids twice."""
    rng = random.Random(draw(st.integers(0, 10_000)))
    rows: list[lib.Question] = []
    for number in range(draw(st.integers(1, 30))):
        old = rng.choice(rows).question if rows and rng.random() < 0.6 else " ".join(rng.sample(WORDS, len(WORDS)) * 2)
        kind = rng.random()
        text = old.upper() if kind < 0.3 else f"{old} {rng.choice(WORDS)}" if kind < 0.8 else old
        rows.append(a_question(rng.randint(0, number), text, rng.choice(lib.SPLITS)))
    return rows


def in_memory(rows: list[lib.Question]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(id, text) of what stays, and (id, reason) of what goes, as `curate` has it."""
    quarantine: list[dict[str, Any]] = []
    seen: set[str] = set()
    first = []
    for row in rows:
        if row.id in seen:
            quarantine.append({"id": row.id, "reason": "duplicate id"})
        else:
            seen.add(row.id)
            first.append(row)
    kept = c._drop_duplicates(first, 0.8, quarantine)
    return sorted((row.id, row.question) for row in kept), sorted((q["id"], q["reason"]) for q in quarantine)


@given(corpora())
def test_the_rule_over_keys_keeps_what_the_rule_over_rows_keeps(rows: list[lib.Question]) -> None:
    index = MinHashLSH(threshold=0.8, num_perm=c.PERMUTATIONS)
    gone = r.losers(r.Sharer(n, row.id, row.split, r.keys_of(row, index)) for n, row in enumerate(rows))
    kept = sorted((row.id, row.question) for n, row in enumerate(rows) if n not in gone)
    dropped = sorted((rows[n].id, reason) for n, (reason, _) in gone.items())
    assert (kept, dropped) == in_memory(rows)
    staying = {row.id for n, row in enumerate(rows) if n not in gone}
    assert all(of in staying or reason == "duplicate id" for reason, of in gone.values())


def test_a_place_orders_rows_by_shard_and_line_and_says_what_is_malformed(tmp_path: Path) -> None:
    good = a_question(1, "cafe\u0301  au\tlait", "train").model_dump_json(by_alias=True)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + good.encode() + b"\n\n{}\n\xff\n" + good.encode())
    rows = list(r.read_shard(2, tmp_path / "a.jsonl"))
    assert [place - (2 << 32) for place, _ in rows] == [1, 3, 4, 5]
    assert [isinstance(row, lib.BadRow) for _, row in rows] == [False, True, True, False]
    assert rows[0][1].question == "café au lait"  # type: ignore[union-attr]


def test_a_folder_without_shards_and_one_that_would_overwrite_itself_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no shards here"):
        r.curate_corpus(tmp_path, tmp_path / "clean", 0.8)
    (tmp_path / "a.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="would replace its source"):
        r.curate_corpus(tmp_path, tmp_path, 0.8)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Ray is not installed"):
        r.curate_corpus(tmp_path, tmp_path / "clean", 0.8)


@pytest.mark.parametrize(
    ("shards", "into", "says"),
    [
        ("data/q", "data", "would replace its source"),
        ("data/q", "data/../data/q", "would replace its source"),
        ("linked", "data", "would replace its source"),
        ("data/q", "full", "holds something else"),
        ("data/q", "half", "holds something else"),
        ("data/q", "full/notes.txt", "this is a file"),
    ],
)
def test_no_folder_is_replaced_that_the_command_did_not_write(tmp_path: Path, shards: str, into: str, says: str) -> None:
    """`curate-corpus data/q --into data` removed the questions, and `--into datasets` the data sets."""
    for name in ("data/q/a.jsonl", "full/notes.txt", "half/quarantine/mine.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine\n", encoding="utf-8")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.jsonl").symlink_to(tmp_path / "data" / "q" / "a.jsonl")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=says) as caught:
        r.curate_corpus(tmp_path / shards, tmp_path / into, 0.8)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("earlier", [[], ["quarantine/a.jsonl", "report.json", "a.jsonl"]])
def test_an_empty_folder_and_what_the_command_left_before_may_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: list[str]
) -> None:
    (tmp_path / "a.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "clean").mkdir()
    for name in earlier:
        (tmp_path / "clean" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "clean" / name).write_text("", encoding="utf-8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Ray is not installed"):  # the next thing that is looked at
        r.curate_corpus(tmp_path, tmp_path / "clean", 0.8)


def test_ray_without_its_part_for_data_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("", encoding="utf-8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(UserError, match=r"what ray\.data needs"):
        r.curate_corpus(tmp_path, tmp_path / "clean", 0.8)


@pytest.mark.slow
@needs_ray
@pytest.mark.timeout(900)
def test_shards_are_cleaned_as_the_same_rows_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a shard and several partitions; repeats across shards."""
    rng = random.Random(7)
    rows: list[lib.Question] = []
    for n in range(600):
        text = rng.choice(rows).question if n and rng.random() < 0.3 else " ".join(rng.choice(WORDS) for _ in range(25))
        rows.append(
            a_question(n if rng.random() < 0.95 else n // 2, f"{text} {rng.choice(['', '!', 'please'])}", rng.choice(lib.SPLITS))
        )
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        lines = [row.model_dump_json(by_alias=True) for row in rows[number * 200 : (number + 1) * 200]]
        (shards / f"part-{number}.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n", encoding="utf-8")
    monkeypatch.setattr(r, "PARTITION", 40_000)
    done = r.curate_corpus(shards, tmp_path / "clean", 0.8)
    kept, dropped = in_memory([c.cleaned(row) for row in rows])
    files = sorted((tmp_path / "clean").glob("*.jsonl"))
    written = [lib.Question.model_validate_json(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    refused = [
        json.loads(line)
        for file in (tmp_path / "clean" / "quarantine").glob("*.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    assert sorted((row.id, row.question) for row in written) == kept
    assert sorted((q["id"], q["reason"]) for q in refused if "id" in q) == dropped
    assert sum(q["reason"].startswith("malformed") for q in refused) == 3
    assert {reason for _, reason in dropped} == set(r.REASONS.values())
    assert done.kept == len(kept)
    assert done.dropped["malformed"] == 3
    assert sum(done.dropped.values()) == len(dropped) + 3
