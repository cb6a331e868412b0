"""Every promise of SECURITY.md names a test, and that test exists."""

from __future__ import annotations

import ast
import re

from shared.settings import ROOT

NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def test_every_promise_is_held_by_a_test_that_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = NAMED.findall(text)
    assert len(named) > 35
    missing = []
    for file, name in named:
        path = ROOT / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        if not path.exists() or (name and name not in functions):
            missing.append(f"{file}::{name}")
    assert not missing


def test_every_point_of_the_list_is_there_and_names_a_test_or_a_part_of_the_suite() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    points = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert [point[:5] for point in points] == [f"LLM{n:02d}" for n in range(1, 11)]
    for point in points:
        assert NAMED.search(point) or "category" in point, point[:40]
