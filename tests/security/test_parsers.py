"""Whatever is in a file or a request, a parser gives a value or one line that says what is wrong, and never hangs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml_engineer_track.serving.grammar import GrammarError, constraint
from shared import chat, feedback, handoff
from shared import library as lib
from shared.errors import UserError

MIGRAINE = (lib.DATASETS / "health_library" / "migraine.md").read_bytes()
once = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with a few bytes replaced, cut or repeated."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(whole)))
        end = min(len(whole), start + draw(st.integers(0, 40)))
        whole = (
            whole[:start]
            + draw(st.binary(max_size=12) | st.sampled_from([b"---\n", b"\n## ", b"[3] ", b"&a *a", b"{{", b"\0"]))
            + whole[end:]
        )
    return whole


@once
@given(content=damaged(MIGRAINE))
def test_leaflets(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "migraine.md"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        assert lib.parse_leaflet(path).id == "migraine"


def test_nine_lines_of_aliases_do_not_become_a_billion_values(tmp_path: Path) -> None:
    lines = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for one, last in zip("bcdefghi", "abcdefgh", strict=True):
        lines += f"{one}: &{one} [{', '.join([f'*{last}'] * 10)}]\n"
    path = tmp_path / "migraine.md"
    path.write_text(MIGRAINE.decode().replace("look_alikes:", lines + "look_alikes:", 1), encoding="utf-8")
    with pytest.raises(UserError, match="not valid YAML"):
        lib.parse_leaflet(path)


@once
@given(raw=JSON | st.fixed_dictionaries({"schema_version": st.integers(), "variants": JSON, "assets": JSON, "version": JSON}))
def test_manifests(tmp_path: Path, raw: Any) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(UserError):
        handoff.verify(tmp_path)


@once
@given(content=st.binary(max_size=300) | st.lists(JSON.map(json.dumps), max_size=5).map(lambda rows: "\n".join(rows).encode()))
def test_feedback(tmp_path: Path, content: bytes) -> None:
    (tmp_path / feedback.FILE).write_bytes(content)
    records, bad = feedback.read(tmp_path)
    assert not records
    assert all("\n" not in row.reason for row in bad)


@once
@given(content=st.binary(max_size=300) | JSON.map(lambda row: json.dumps(row).encode()))
def test_labels_and_other_rows(tmp_path: Path, content: bytes) -> None:
    for file, kind in lib.ROW_FILES.items():
        (tmp_path / file).write_bytes(content)
        rows, bad = lib.read_rows(tmp_path, file, kind)
        assert not rows
        assert all("\n" not in row.reason for row in bad)


@settings(max_examples=300)
@given(
    asked=st.fixed_dictionaries({"regex": st.text(alphabet=r"ab()[]{}|*+?.^$\-,0123456789dwsé😀", max_size=40)})
    | st.fixed_dictionaries({"grammar": st.text(alphabet='start: ro=ab"\\|*+?()[]{}/0123\n%', max_size=60)})
    | st.fixed_dictionaries({"json": JSON})
    | st.fixed_dictionaries({"choice": JSON})
)
def test_constraints(asked: dict[str, Any]) -> None:
    with contextlib.suppress(GrammarError):
        made = constraint(asked)
        assert made.ebnf
        assert made.lark


@settings(max_examples=200)
@given(text=st.text(max_size=80), number=st.integers(1, 9))
def test_a_source_cannot_break_out_of_the_grammar_made_of_it(text: str, number: int) -> None:
    """Quotes, backslashes, line ends, rules and control tokens in a document are characters of a sentence, and no more."""
    source = chat.Source(id="s/x/1", heading="H", text=text)
    made = chat.grounded_grammar([source] * number)
    assert len(made.splitlines()) == 2
    with contextlib.suppress(GrammarError):  # nothing but white space, or half a character
        assert constraint({"grammar": made}).literal
    (message,) = chat.answer_messages(text, [source])
    assert "<|" not in message["content"]
    assert message["content"].count("\nQuestion: ") == 1


@settings(max_examples=200)
@given(reply=st.text(alphabet="[]0123456789 ab.\n", max_size=60) | st.text(max_size=60))
def test_replies(reply: str) -> None:
    for said in chat.parse_answer(reply):
        assert said.number is None or 0 <= said.number <= 999


@settings(max_examples=200)
@given(text=st.text(max_size=200))
def test_scrubbing_twice_changes_nothing(text: str) -> None:
    assert feedback.scrub(feedback.scrub(text)) == feedback.scrub(text)
