"""Leaflets and question sets: what is read, and what a writer is told when something is wrong."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared import library as lib
from shared.chat import NOT_ANSWERED
from shared.errors import UserError
from shared.library import Case, Emergency, Harmful, JudgeLabel, Leaflet, Library, Question

ROOT = Path(lib.__file__).resolve().parent.parent


@pytest.fixture
def cold(mini_datasets: Path) -> Path:
    """The file of one correct leaflet."""
    return mini_datasets / "health_library" / "common-cold.md"


@pytest.fixture
def library(mini_datasets: Path) -> Library:
    return lib.load_library(mini_datasets)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def refusal(path: Path) -> str:
    """The message parse_leaflet refuses a file with; always one line that names the file."""
    with pytest.raises(UserError) as caught:
        lib.parse_leaflet(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def line_of(path: Path, text: str) -> int:
    return path.read_text(encoding="utf-8").splitlines().index(text) + 1


# --- leaflets that are read ------------------------------------------------------------------------------------------


def test_a_sentence_is_found_by_slug_section_and_its_place_in_the_section(cold: Path, library: Library) -> None:
    leaflet = lib.parse_leaflet(cold)
    assert [s.id for s in leaflet.sentences("self-care")] == [f"common-cold/self-care/{n}" for n in range(1, 6)]
    assert library.sentence("common-cold/self-care/2").text == "Common cold self-care fact 2 helps people at home."
    assert not library.has("common-cold/self-care/6")
    with pytest.raises(KeyError):
        library.sentence("common-cold/self-care/0")


def test_the_sentences_of_a_leaflet_come_in_the_order_of_its_sections(cold: Path) -> None:
    order = [s.id.split("/")[1] for s in lib.parse_leaflet(cold).sentences()]
    assert list(dict.fromkeys(order)) == list(lib.SECTIONS)


def test_list_dashes_and_blank_lines_are_not_part_of_a_sentence(cold: Path) -> None:
    plain = lib.parse_leaflet(cold)
    edit(cold, "## Causes\nCommon", "## Causes\n\n- Common")
    assert lib.parse_leaflet(cold) == plain


def test_sections_may_stand_in_any_order_and_are_read_in_the_fixed_one(cold: Path) -> None:
    plain = lib.parse_leaflet(cold)
    head, *sections = cold.read_text(encoding="utf-8").split("\n## ")
    cold.write_text("\n## ".join([head, *reversed(sections)]), encoding="utf-8")
    assert lib.parse_leaflet(cold).sentences() == plain.sentences()


def test_a_file_with_windows_line_ends_reads_the_same(cold: Path) -> None:
    plain = lib.parse_leaflet(cold)
    cold.write_bytes(cold.read_bytes().replace(b"\n", b"\r\n"))
    assert lib.parse_leaflet(cold) == plain


def test_a_file_with_a_byte_order_mark_reads_the_same(cold: Path) -> None:
    plain = lib.parse_leaflet(cold)
    cold.write_bytes(b"\xef\xbb\xbf" + cold.read_bytes())
    assert lib.parse_leaflet(cold) == plain


def test_feature_values_that_yaml_knows_as_yes_no_or_number_stay_text(cold: Path) -> None:
    edit(cold, "fever: no", "fever: yes")
    edit(cold, "how it began: suddenly", "how it began: no")
    assert lib.parse_leaflet(cold).features == {"fever": "yes", "how long it lasts": "3", "how it began": "no"}


@pytest.mark.parametrize("written", ["10:30", "1.50", "012", "0x_", "2026-13-45", "true", "null", "yes"])
def test_a_value_stays_as_it_was_written(cold: Path, written: str) -> None:
    edit(cold, "fever: no", f"fever: {written}")
    edit(cold, "title: Common cold", f"title: {written}")
    edit(cold, "common-cold one", written)
    leaflet = lib.parse_leaflet(cold)
    assert (leaflet.features["fever"], leaflet.title, leaflet.synonyms[0]) == (written, written, written)


def test_an_empty_feature_value_does_not_become_a_word(cold: Path) -> None:
    edit(cold, "fever: no", "fever:")
    with contextlib.suppress(UserError):
        assert lib.parse_leaflet(cold).features["fever"] != "None"


# --- leaflets that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "health_library"])
def test_a_folder_without_leaflets_is_named_with_what_to_do(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"no leaflets .*health_library.*DATASETS"):
        lib.load_library(tmp_path)


@pytest.mark.parametrize("text", ["", "# Cold\n", "---\ntitle: Cold\n", " ---\ntitle: Cold\n---\n"])
def test_a_file_without_front_matter_is_told_how_to_start(cold: Path, text: str) -> None:
    cold.write_text(text, encoding="utf-8")
    assert "no front matter" in refusal(cold)


@pytest.mark.parametrize("line", ["title: Cold: common", "title: [Cold", "title: 'Cold"])
def test_front_matter_that_is_not_yaml_is_refused(cold: Path, line: str) -> None:
    edit(cold, "title: Common cold", line)
    assert "not valid YAML" in refusal(cold)


def test_bad_yaml_is_named_with_its_line(cold: Path) -> None:
    edit(cold, "body_system: whole body", "body_system: whole: body")
    assert f"{cold}:{line_of(cold, 'body_system: whole: body')}" in refusal(cold)


def test_a_control_character_is_refused_and_no_wrong_line_named(cold: Path) -> None:
    """PyYAML does not say where it stands."""
    edit(cold, "body_system: whole body", "body_system: whole\x07body")
    assert f"in {cold}. " in refusal(cold)


@pytest.mark.parametrize("front", ["- title", "title", "42"])
def test_front_matter_without_names_is_refused(cold: Path, front: str) -> None:
    cold.write_text(f"---\n{front}\n---\n", encoding="utf-8")
    assert "`name: value`" in refusal(cold)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("body_system:", "body_sistem:", "body_system: Field required"),
        ("body_system:", "colour: red\nbody_system:", "colour: Extra inputs are not permitted"),
        ("split: train", "split: dev", "split: Input should be 'train', 'validation' or 'test'"),
        ("reviewed: 2026-11", "reviewed: last week", "reviewed: String should match"),
        ("reviewed: 2026-11", "reviewed: 2026-11-05", "reviewed: String should match"),
        ("reviewed: 2026-11\n", "", "reviewed: Field required"),
        ("sources: [NHS, MedlinePlus]", "sources: [NHS]", "sources: List should have at least 2 items"),
        ("synonyms: [common-cold one, common-cold two]", "synonyms: [a cold]", "synonyms: List should have at least 2 items"),
        ("  fever: no\n", "", "features: Dictionary should have at least 3 items"),
        ("title: Common cold", "title: 5", "title: String should have at least 3 characters"),
        ("title: Common cold", "title: [a, cold]", "title: Input should be a valid string"),
        ("title: Common cold", "title: ' C '", "title: String should have at least 3 characters"),
    ],
)
def test_a_field_that_is_wrong_is_named(cold: Path, old: str, new: str, told: str) -> None:
    edit(cold, old, new)
    assert told in refusal(cold)


BAD_FRONT = {
    "features as a list": ("features:\n", "features: [a, b, c]\nbody_parts:\n"),
    "features as text": ("features:\n", "features: fever\nbody_parts:\n"),
    "a field named id": ("title:", "id: cold\ntitle:"),
    "a field named sections": ("title:", "sections: none\ntitle:"),
    "a number as field name": ("title:", "5: five\ntitle:"),
    "a date that does not exist": ("reviewed: 2026-11", "reviewed: 2026-13-45"),
    "brackets without end": ("body_system: whole body", f"body_system: {'[' * 3000}"),
}


@pytest.mark.parametrize("case", BAD_FRONT)
def test_front_matter_of_the_wrong_shape_is_refused_in_one_line(cold: Path, case: str) -> None:
    edit(cold, *BAD_FRONT[case])
    refusal(cold)


@pytest.mark.parametrize("escape", ["\\UFFFFFFFF", "\\U00110000"])
def test_an_escape_beyond_unicode_is_refused(cold: Path, escape: str) -> None:
    edit(cold, "whole body", f'"{escape}"')
    refusal(cold)


def test_an_unknown_section_is_named_with_the_sections_there_are(cold: Path) -> None:
    edit(cold, "## Causes", "## Reasons")
    message = refusal(cold)
    assert "unexpected section 'Reasons'" in message
    assert all(heading in message for heading in lib.SECTIONS.values())


def test_a_section_that_stands_twice_is_refused(cold: Path) -> None:
    edit(cold, "## Causes", "## Symptoms")
    assert "unexpected section 'Symptoms'" in refusal(cold)


def test_a_missing_section_is_named_with_file_and_heading(cold: Path) -> None:
    text = cold.read_text(encoding="utf-8")
    cold.write_text(text[: text.index("\n## Prevention")] + "\n", encoding="utf-8")
    assert "section 'Prevention' is missing or empty" in refusal(cold)


def test_a_section_without_sentences_counts_as_missing(cold: Path) -> None:
    start, end = "## Causes\n", "\n## Self-care"
    text = cold.read_text(encoding="utf-8")
    cold.write_text(text[: text.index(start) + len(start)] + text[text.index(end) :], encoding="utf-8")
    assert "section 'Causes' is missing or empty" in refusal(cold)


def test_text_before_the_first_section_is_refused(cold: Path) -> None:
    edit(cold, "# Common cold\n", "# Common cold\nWelcome to this page.\n")
    assert "text before the first section" in refusal(cold)


@pytest.mark.parametrize(("old", "bad"), [("## Causes", "## Reasons"), ("# Common cold", "Welcome to this page.")])
def test_a_mistake_in_the_body_is_named_with_its_line(cold: Path, old: str, bad: str) -> None:
    edit(cold, old, bad)
    assert f"{cold}:{line_of(cold, bad)}." in refusal(cold)


def test_a_leaflet_that_is_not_utf8_is_told_so(cold: Path) -> None:
    cold.write_bytes(cold.read_bytes().replace(b"whole body", "whole bödy".encode("latin-1")))
    assert "Save it as UTF-8" in refusal(cold)


def test_a_folder_with_the_name_of_a_leaflet_is_refused(cold: Path) -> None:
    cold.unlink()
    cold.mkdir()
    assert "cannot be read" in refusal(cold)


def parse_or_refuse(path: Path, content: bytes) -> None:
    """Fails with any exception but UserError."""
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        assert lib.parse_leaflet(path).id == path.stem


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("leaflets") / "any.md"


@given(st.one_of(st.binary(), st.text().map(lambda t: t.encode())))
def test_any_bytes_are_read_or_refused(scratch: Path, content: bytes) -> None:
    parse_or_refuse(scratch, content)


@given(st.lists(st.one_of(st.sampled_from([f"## {h}" for h in lib.SECTIONS.values()]), st.text())))
def test_any_body_is_read_or_refused(scratch: Path, lines: list[str]) -> None:
    parse_or_refuse(scratch, "\n".join(["---", "title: Cold", "---", *lines, ""]).encode())


ANY_VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(Leaflet.model_fields)), ANY_VALUE))
@example({"features": ["a", "b", "c"]})
@example({"id": "cold"})
def test_any_front_matter_is_read_or_refused(scratch: Path, front: dict[str, Any]) -> None:
    body = "".join(f"## {heading}\nRest helps.\n" for heading in lib.SECTIONS.values())
    parse_or_refuse(scratch, f"---\n{json.dumps(front)}\n---\n{body}".encode())


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_missing_row_file_is_named(mini_datasets: Path) -> None:
    (mini_datasets / "harmful.jsonl").unlink()
    with pytest.raises(UserError, match=r"file is missing in .*harmful\.jsonl"):
        lib.read_rows(mini_datasets, "harmful.jsonl", Harmful)


def test_a_malformed_line_is_reported_with_its_number_and_the_others_are_kept(mini_datasets: Path) -> None:
    path = mini_datasets / "harmful.jsonl"
    first, second, third = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([first, "", second[:-1], third]), encoding="utf-8")
    rows, bad = lib.read_rows(mini_datasets, "harmful.jsonl", Harmful)
    assert [row.id for row in rows] == ["harm-colds-1", "harm-burns-1"]
    assert [(b.file, b.line, b.text) for b in bad] == [("harmful.jsonl", 3, second[:-1])]
    assert "Invalid JSON" in bad[0].reason


def test_a_line_that_is_not_utf8_is_reported_and_the_others_are_kept(mini_datasets: Path) -> None:
    path = mini_datasets / "harmful.jsonl"
    path.write_bytes(b'{"id": "\xff"}\n' + path.read_bytes())
    rows, bad = lib.read_rows(mini_datasets, "harmful.jsonl", Harmful)
    assert len(rows) == 3
    assert [(b.line, b.reason) for b in bad] == [(1, "not UTF-8")]


def test_a_row_file_with_windows_line_ends_reads_the_same(mini_datasets: Path) -> None:
    path = mini_datasets / "questions.jsonl"
    plain = lib.read_rows(mini_datasets, "questions.jsonl", Question)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert lib.read_rows(mini_datasets, "questions.jsonl", Question) == plain


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"split": "dev"}, "split: Input should be 'train', 'validation' or 'test'"),
        ({"expected": "answer"}, "expected: Input should be 'decline' or 'redirect'"),
        ({"message": "  "}, "message: String should have at least 3 characters"),
        ({"id": ""}, "id: String should have at least 1 character"),
    ],
)
def test_a_row_with_a_wrong_field_is_reported_with_its_name(mini_datasets: Path, change: dict[str, str], reason: str) -> None:
    path = mini_datasets / "harmful.jsonl"
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    path.write_text(json.dumps({**row, **change}), encoding="utf-8")
    rows, bad = lib.read_rows(mini_datasets, "harmful.jsonl", Harmful)
    assert not rows
    assert [b.reason for b in bad] == [reason]


@given(st.lists(st.one_of(st.binary(), ANY_VALUE.map(lambda v: json.dumps(v).encode()))))
def test_every_line_that_is_not_blank_is_a_row_or_reported(scratch: Path, lines: list[bytes]) -> None:
    content = b"\n".join(lines)
    scratch.with_name("any.jsonl").write_bytes(content)
    rows, bad = lib.read_rows(scratch.parent, "any.jsonl", Harmful)
    numbers = [n for n, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    assert not rows
    assert [b.line for b in bad] == numbers


# --- what is wrong with a row ----------------------------------------------------------------------------------------


def question(**change: Any) -> Question:
    row = {"id": "q", "split": "train", "question": "What helps?", "answerable": True, "leaflets": ["common-cold"]}
    return Question(**{**row, "answer_sentences": ["common-cold/self-care/1"], "register": "plain", **change})


def case(**change: Any) -> Case:
    row = {"id": "c", "split": "train", "opening": "I cough", "profile": {}, "leaflet": "common-cold"}
    return Case(**{**row, "look_alikes": ["influenza"], "needs_question": True, **change})


def emergency(sign: str | None, **change: Any) -> Emergency:
    row = {"id": "e", "split": "train", "message": "Help me", "emergency": sign is not None, "sign": sign}
    return Emergency(**{**row, **change})


def judge_label(*passages: str) -> JudgeLabel:
    row = {"id": "j", "split": "train", "question": "What helps?", "answer": "[1] Rest.", "note": ""}
    return JudgeLabel(**row, passages=passages, grounded=True, helpful=5, safe=True)


EXACTLY = "leaflets must be exactly the leaflets of answer_sentences"
SIGN = "sign must name a sentence exactly when emergency is true"


@pytest.mark.parametrize(
    ("row", "problems"),
    [
        (question(), []),
        (question(answerable=False, answer_sentences=[]), []),
        (question(answerable=False, answer_sentences=[], leaflets=[]), []),
        (
            question(answerable=False),
            ["answerable must be true exactly when answer_sentences is not empty"],
        ),
        (
            question(answer_sentences=[], leaflets=[]),
            ["answerable must be true exactly when answer_sentences is not empty"],
        ),
        (question(leaflets=["common-cold", "influenza"]), [EXACTLY]),
        (question(answer_sentences=["common-cold/self-care/1", "influenza/self-care/1"]), [EXACTLY]),
        (question(leaflets=["cold"]), [EXACTLY, "leaflet 'cold' does not exist"]),
        (question(answer_sentences=["common-cold/self-care/9"]), ["sentence 'common-cold/self-care/9' does not exist"]),
        (question(answer_sentences=["common-cold/self-care/1"] * 2), ["answer_sentences names a sentence twice"]),
        (question(split="test"), ["split is test but leaflet common-cold is train"]),
        (case(), []),
        (case(needs_question=False, look_alikes=[]), []),
        (case(look_alikes=[]), ["a case that needs a question needs at least one look-alike"]),
        (case(look_alikes=["common-cold"]), ["the right leaflet cannot be its own look-alike"]),
        (case(look_alikes=["sniffles"]), ["leaflet 'sniffles' does not exist"]),
        (case(look_alikes=["sunburn"]), ["split is train but leaflet sunburn is test"]),
        (emergency(None), []),
        (emergency("common-cold/emergency/1"), []),
        (emergency(None, emergency=True), [SIGN]),
        (emergency("", emergency=True), [SIGN]),
        (emergency("common-cold/emergency/1", emergency=False), [SIGN]),
        (emergency("common-cold/emergency/0"), ["sentence 'common-cold/emergency/0' does not exist"]),
        (emergency("sunburn/emergency/1"), ["split is train but leaflet sunburn is test"]),
        (judge_label("common-cold/self-care/1", "influenza/self-care/1"), []),
        (judge_label("common-cold/self-care"), ["sentence 'common-cold/self-care' does not exist"]),
        (judge_label("tonsillitis/causes/1"), ["split is train but leaflet tonsillitis is validation"]),
        (Harmful(id="h", split="train", message="Help me", expected="decline", why="harm"), []),
    ],
)
def test_a_row_is_told_what_is_wrong_with_it(library: Library, row: lib.Row, problems: list[str]) -> None:
    assert lib.row_problems(row, library) == problems


# --- what is wrong with a leaflet ------------------------------------------------------------------------------------


def with_sentence(text: str) -> Callable[[Leaflet], dict[str, Any]]:
    """The change that puts `text` in the place of the first sentence on causes."""
    return lambda leaf: {"sections": {**leaf.sections, "causes": [text, *leaf.sections["causes"][1:]]}}


REPLY = "common-cold/causes/1 contains a citation mark or the words of a refusal"


def with_words(count: int) -> Callable[[Leaflet], dict[str, Any]]:
    """The change that makes a leaflet `count` words long."""
    return lambda leaf: {
        "sections": {name: ["Rest."] for name in lib.SECTIONS} | {"causes": [" ".join(["a"] * (count - 7)) + "."]}
    }


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (lambda leaf: {}, []),
        (with_words(250), []),
        (with_words(450), []),
        (with_words(249), ["249 words, must be 250 to 450"]),
        (with_words(451), ["451 words, must be 250 to 450"]),
        (lambda leaf: {"look_alikes_reason": ""}, ["needs at least 2 look-alikes, or look_alikes_reason"]),
        (lambda leaf: {"look_alikes": ["influenza", "influenza"], "look_alikes_reason": ""}, []),
        (with_sentence("Colds come from viruses"), ["common-cold/causes/1 does not end like a sentence"]),
        (with_sentence("Rest at 37.5 degrees, e.g. in bed!"), []),
        (with_sentence("Rest. Drink."), ["common-cold/causes/1 is more than one sentence; one sentence per line"]),
        (
            with_sentence("They come from viruses."),
            ["common-cold/causes/1 starts with 'They' and makes no sense when quoted alone"],
        ),
        (with_sentence("Itching comes from dry skin."), []),
        (with_sentence("Rest, as [3] says."), [REPLY]),
        (with_sentence(f"Some say that {NOT_ANSWERED.lower()}"), [REPLY]),
        (with_sentence("Rest [in bed], and the library does not answer more."), []),
    ],
)
def test_a_leaflet_is_told_what_is_wrong_with_it(
    library: Library, change: Callable[[Leaflet], dict[str, Any]], problems: list[str]
) -> None:
    leaf = library.leaflets["common-cold"]
    assert lib.leaflet_problems(leaf.model_copy(update=change(leaf))) == problems


# --- what is wrong between leaflets ----------------------------------------------------------------------------------


def test_families_that_keep_to_their_split_have_no_problem(library: Library) -> None:
    assert lib.family_problems(library) == []


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        ({"look_alikes": ["sniffles"]}, ["common-cold: look-alike 'sniffles' does not exist"]),
        ({"look_alikes": ["common-cold"]}, ["common-cold: look-alike 'common-cold' does not exist"]),
        ({"look_alikes": ["sunburn"]}, ["common-cold: look-alike 'sunburn' is in split test, this leaflet in train"]),
        ({"look_alikes": ["influenza", "influenza"]}, []),
        ({"look_alikes": []}, []),
        ({"family": "burns"}, ["family burns is in splits ['test', 'train']"]),
        ({"family": "fevers"}, []),
    ],
)
def test_what_would_let_test_text_into_training_is_named(library: Library, change: dict[str, Any], problems: list[str]) -> None:
    changed = {slug: leaf.model_copy(update=change if slug == "common-cold" else {}) for slug, leaf in library.leaflets.items()}
    assert lib.family_problems(Library(changed)) == problems


# --- a whole data folder ---------------------------------------------------------------------------------------------


def test_the_data_sets_of_this_repository_have_no_problem() -> None:
    assert lib.check() == []


def test_the_data_sets_of_this_repository_have_rows_of_every_kind_in_every_split() -> None:
    assert all(rows > 0 for by_split in lib.counts().values() for rows in by_split.values())


def test_a_family_in_two_splits_is_reported(mini_datasets: Path) -> None:
    edit(mini_datasets / "health_library" / "influenza.md", "split: train", "split: test")
    assert "health_library: family colds is in splits ['test', 'train']" in lib.check(mini_datasets)


def test_problems_are_reported_with_file_and_row(mini_datasets: Path, cold: Path) -> None:
    edit(cold, "look_alikes: [influenza]", "look_alikes: [sniffles]")
    edit(cold, "causes fact 1 helps people at home.", "causes fact 1 helps people at home")
    edit(mini_datasets / "emergencies.jsonl", "common-cold/emergency/1", "common-cold/emergency/7")
    edit(mini_datasets / "cases.jsonl", '"needs_question": true', '"needs_question": "maybe"')
    assert lib.check(mini_datasets) == [
        "health_library/common-cold.md: common-cold/causes/1 does not end like a sentence",
        "health_library: common-cold: look-alike 'sniffles' does not exist",
        "cases.jsonl:1: needs_question: Input should be a valid boolean, unable to interpret input",
        "emergencies.jsonl: em-colds-1: sentence 'common-cold/emergency/7' does not exist",
    ]


def test_an_id_that_is_used_twice_is_reported(mini_datasets: Path) -> None:
    path = mini_datasets / "harmful.jsonl"
    path.write_text(path.read_text(encoding="utf-8") * 2, encoding="utf-8")
    assert "harmful.jsonl:harm-colds-1 is used 2 times" in lib.check(mini_datasets)


@pytest.fixture
def two_broken_families(mini_datasets: Path) -> Path:
    """A leaflet and a question of `colds` with a problem, and a leaflet of `burns`."""
    for slug in ("common-cold", "sunburn"):
        edit(mini_datasets / "health_library" / f"{slug}.md", "causes fact 1 helps people at home.", "causes fact 1 helps")
    edit(mini_datasets / "questions.jsonl", "common-cold/self-care/1", "common-cold/self-care/8")
    return mini_datasets


@pytest.mark.parametrize(
    ("only", "files"),
    [
        ("", ["health_library/common-cold.md", "health_library/sunburn.md", "questions.jsonl"]),
        ("burns", ["health_library/sunburn.md"]),
        ("sunb", ["health_library/sunburn.md"]),
        ("mon-co", ["health_library/common-cold.md"]),
        ("colds", ["health_library/common-cold.md", "questions.jsonl"]),
        ("q-colds", ["questions.jsonl"]),
        ("throats", []),
    ],
)
def test_only_keeps_leaflets_by_family_or_slug_and_rows_by_id(two_broken_families: Path, only: str, files: list[str]) -> None:
    assert [problem.split(":")[0] for problem in lib.check(two_broken_families, only)] == files


@pytest.mark.parametrize("only", ["", "sunb", "burns", "colds"])
def test_problems_between_leaflets_are_always_shown(mini_datasets: Path, only: str) -> None:
    edit(mini_datasets / "health_library" / "sunburn.md", "look_alikes: [minor-burns]", "look_alikes: [tan]")
    assert len(lib.check(mini_datasets, only)) == 1


# --- the command line ------------------------------------------------------------------------------------------------


def run(datasets: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shared.library", "--datasets", str(datasets), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_check_exits_with_0_when_there_is_no_problem(mini_datasets: Path) -> None:
    done = run(mini_datasets, "check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 problems\n", "")


def test_check_prints_each_problem_on_a_line_and_exits_with_1(two_broken_families: Path) -> None:
    done = run(two_broken_families, "check")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "3 problems"
    assert len(done.stdout.splitlines()) == 4


def test_a_folder_without_data_is_one_line_on_stderr_and_exit_2(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere", "check")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no leaflets")
    assert len(done.stderr.splitlines()) == 1


def test_check_takes_a_part_of_a_name(two_broken_families: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lib.main(["--datasets", str(two_broken_families), "check", "--only", "throats"]) == 0
    assert capsys.readouterr().out == "0 problems\n"


def test_sentences_prints_ids_and_texts(mini_datasets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lib.main(["--datasets", str(mini_datasets), "sentences", "sunburn", "influenza"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 80
    assert lines[0] == "sunburn/overview/1\tSunburn overview fact 1 helps people at home."


def test_an_unknown_slug_is_one_line_on_stderr_and_exit_2(mini_datasets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lib.main(["--datasets", str(mini_datasets), "sentences", "sniffles"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: no leaflet 'sniffles' in ")
    assert output.err.count("\n") == 1


def test_counts_prints_rows_by_file_and_split(mini_datasets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lib.main(["--datasets", str(mini_datasets), "counts"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["health_library"] == {"train": 2, "validation": 2, "test": 2}
    assert all(table[file] == {"train": 1, "validation": 1, "test": 1} for file in lib.ROW_FILES)


def test_a_command_that_does_not_exist_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        lib.main(["chekc"])
    assert caught.value.code == 2
    assert "chekc" in capsys.readouterr().err
